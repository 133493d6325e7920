"""What the charts show: groups of bars, all in GB/s, so that longer is better everywhere.

Bars of a group are alike: reads or writes, warm or cold, the engine beside its floor or whole
processes beside each other. A line across a bar is what cannot be passed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oxmerge.bench import PARTS
from oxmerge.sizes import three_digits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from oxmerge.bench.record import Record, Row

TITLES = {
    "memory": "Copies in memory",
    "storage": "Storage",
    "kernels": "Kernels and methods in memory",
    "threads": "Threads",
    "simd": "Instruction sets",
    "merge": "Merges of files",
    "sweep": "Sweeps: several outputs in one pass",
    "digests": "Merges with and without digests and a journal",
    "tensors": "Models of many tensors",
    "fuse": "Adapters that are put into models",
}
OF_FILES = ("merge", "sweep", "digests", "tensors", "fuse")
OTHERS = ("mergekit", "peft")
"""Other programs that do the same."""
_GIGA = 1e9
_MOST_TICKS = 6


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar: GB/s by the median, and by the quartiles of the seconds; `line` is its roof."""

    label: str
    by: str
    value: float
    low: float
    high: float
    line: float | None = None

    @property
    def text(self) -> str:
        """The value, as it stands at the bar's end."""
        share = f", {self.value / self.line:.0%}" if self.line else ""
        return f"{three_digits(self.value)}{share}"


@dataclass(frozen=True, slots=True)
class Panel:
    """A group of bars on one scale; `line` says what the lines across them are."""

    title: str
    bars: tuple[Bar, ...]
    line: str | None = None

    @property
    def most(self) -> float:
        """The end of the scale."""
        return max(max(bar.high, bar.line or 0) for bar in self.bars)

    @property
    def ticks(self) -> list[float]:
        """Round numbers along the scale, from zero on."""
        least = self.most / _MOST_TICKS
        power = 10.0 ** math.floor(math.log10(least))
        step = next(each * power for each in (1, 2, 5, 10) if each * power >= least)
        return [step * number for number in range(int(self.most / step) + 1)]


def panels(record: Record) -> Iterator[Panel]:
    """Yield the panels of all that was measured."""
    for part in PARTS:
        rows = [row for row in record.rows if row.part == part]
        if part in OF_FILES:
            yield from _of_files(record, part, rows)
        elif part == "storage":
            for name in dict.fromkeys(row.name for row in rows):
                alike = [row for row in rows if row.name == name]
                yield Panel(f"{TITLES[part]}: {name}s", tuple(map(_bar, alike)))
        elif rows:
            bars = tuple(_bar(row, record.memcpy_seconds(row)) for row in rows)
            yield Panel(TITLES[part], bars, "memcpy" if bars[0].line else None)


def _of_files(record: Record, part: str, rows: Sequence[Row]) -> Iterator[Panel]:
    merges = [row for row in rows if row.by == "oxmerge" and not row.is_plan]
    for state in dict.fromkeys(row.state for row in merges):
        alike = [row for row in merges if row.state == state]
        floors = (record.beside(row, "floor") for row in alike)
        lines = (None if floor is None else floor.median for floor in floors)
        bars = tuple(map(_bar, alike, lines))
        title = f"{TITLES[part]}, {state} inputs: from the first open to the last fsync"
        yield Panel(title, bars, "floor" if any(bar.line for bar in bars) else None)
    both = []
    for row in merges:
        others = [found for by in OTHERS if (found := record.beside(row, by)) is not None]
        both += [row, *others] if others else []
    if both:
        title = f"{TITLES[part]}: whole processes, from start to exit"
        yield Panel(title, tuple(map(_process_bar, both)))


def _bar(row: Row, least: float | None = None) -> Bar:
    """Return the bar of a row; what cannot be passed takes `least` seconds."""
    first, third = row.quartiles
    return Bar(
        _label(row),
        row.by,
        row.rate / _GIGA,
        row.bytes / third / _GIGA,
        row.bytes / first / _GIGA,
        None if least is None else row.bytes / least / _GIGA,
    )


def _process_bar(row: Row) -> Bar:
    rates = _rates(row.bytes, row.process_seconds)
    return Bar(f"{row.name}: {row.by}", row.by, row.bytes / row.process_median / _GIGA, *rates)


def _rates(size: int, seconds: Iterable[float]) -> tuple[float, float]:
    times = list(seconds)
    return size / max(times) / _GIGA, size / min(times) / _GIGA


def _label(row: Row) -> str:
    threads = "1 thread" if row.threads == 1 else f"{row.threads} threads"
    if row.part == "simd":
        return f"{row.name}, {row.simd}"
    if row.part == "storage":
        return f"{row.state}, {threads}"
    if row.part in {"memory", "threads"}:
        return f"{row.name}, {threads}"
    return row.name if row.by == "oxmerge" else f"{row.name}: {row.by}"
