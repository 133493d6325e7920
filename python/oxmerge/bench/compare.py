"""Two records side by side: what became faster or slower, beyond noise.

Two rows are compared when they are of the same thing and moved the same bytes. They differ when
their medians are further apart than `NOISE` times the two interquartile ranges together, and than
`LEAST` of the old one. With normal noise that calls equal rows different about once in thirty times
with three runs each, and once in seventy with five (simulated); with fewer than three runs there is
no verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oxmerge.bench.record import Record, Row

NOISE = 1.5
LEAST = 0.03
RUNS = 3

FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "same", "too few runs"
_NAMED = 4


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row then and now."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        """How many times as fast it is now, by the medians."""
        return self.old.median / self.new.median

    @property
    def verdict(self) -> str:
        """One of `FASTER`, `SLOWER`, `SAME`, `UNKNOWN`."""
        if min(len(self.old.seconds), len(self.new.seconds)) < RUNS:
            return UNKNOWN
        apart = abs(self.new.median - self.old.median)
        spread = _spread(self.old) + _spread(self.new)
        if apart <= max(NOISE * spread, LEAST * self.old.median):
            return SAME
        return FASTER if self.new.median < self.old.median else SLOWER

    def as_dict(self) -> dict[str, Any]:
        """Return it as data."""
        names = ("part", "name", "by", "state", "threads", "simd")
        return {
            **{name: getattr(self.new, name) for name in names},
            "old_seconds": self.old.median,
            "new_seconds": self.new.median,
            "ratio": self.ratio,
            "verdict": self.verdict,
        }


def compare(old: Record, new: Record) -> list[Comparison]:
    """Return the rows that both records have, in the order of the new one."""
    before = {row.key: row for row in old.rows}
    pairs = ((before.get(row.key), row) for row in new.rows)
    return [
        Comparison(then, now) for then, now in pairs if then is not None and _same_work(then, now)
    ]


def remarks(old: Record, new: Record) -> Iterator[str]:
    """Yield what to keep in mind: other machines, and why rows could not be compared."""
    for name in ("cpu", "cores", "simd", "kernel", "file_system", "python", "numpy", "oxmerge"):
        then, now = old.machine.get(name), new.machine.get(name)
        if then != now:
            yield f"{name.replace('_', ' ')} differs: {then} then, {now} now"
    yield from _alone(old, new, "old", ("then", "now"))
    yield from _alone(new, old, "new", ("now", "then"))


def _alone(record: Record, other: Record, which: str, when: tuple[str, str]) -> Iterator[str]:
    """Yield why rows have no partner in the other record, a reason a line."""
    reasons: dict[str, list[str]] = {}
    for row in record.rows:
        reason = _why_alone(row, record, other, when)
        if reason is not None:
            reasons.setdefault(reason, []).append(row.title)
    for reason, titles in reasons.items():
        more = f" and {len(titles) - _NAMED} more" if len(titles) > _NAMED else ""
        rows = "1 row" if len(titles) == 1 else f"{len(titles)} rows"
        named = "; ".join(titles[:_NAMED])
        yield f"{rows} of the {which} record not compared, {reason}: {named}{more}"


def _why_alone(row: Row, record: Record, other: Record, when: tuple[str, str]) -> str | None:
    """Return why a row has no partner, or None where it has one."""
    here, there = when
    partner = next((each for each in other.rows if each.key == row.key), None)
    alike = [each for each in other.rows if each.part == row.part]
    named = [each for each in alike if each.key[1:4] == row.key[1:4]]
    sizes = (record.settings["size"], other.settings["size"])
    if partner is not None and _same_work(partner, row):
        return None
    if not alike:
        why = f"the part `{row.part}` was not measured {there}"
    elif not named:
        why = f"it was not measured {there}"
    elif partner is None and row.part == "simd":
        why = f"{row.simd} was not measured {there}"
    elif partner is None:
        why = f"it ran with {', '.join(str(each.threads) for each in named)} threads {there}"
    elif row.part in {"merge", "sweep", "digests", "fuse"} and sizes[0] != sizes[1]:
        why = f"the models were of size {sizes[1]} {there} and {sizes[0]} {here}"
    else:
        why = f"another number of bytes was moved {there}"
    return f"since {why}"


def _same_work(old: Row, new: Row) -> bool:
    return (old.bytes_read, old.bytes_written) == (new.bytes_read, new.bytes_written)


def _spread(row: Row) -> float:
    first, third = row.quartiles
    return third - first
