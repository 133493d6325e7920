"""The record: what was measured, as data with a schema that stays.

A record is a JSON object:

- ``schema``: always ``"oxmerge-bench"``; ``version``: of the schema, 1. A change that breaks
  readers makes it 2; keys may be added at any time.
- ``created``: UTC, ISO 8601. ``machine``: see `oxmerge.bench.machine`; ``busy_elsewhere`` and
  ``stolen`` are cores that other programs and the host kept busy meanwhile.
- ``settings``: ``size`` of the merged models, ``elements`` of the arrays, ``storage_bytes`` of the
  file, ``rounds``.
- ``notes``: what could not be measured, and what else a reader should know.
- ``rows``: one for each thing measured:

  ``part`` (`oxmerge.bench.PARTS`), ``name`` (what is done), ``by`` (who does it: ``memcpy``,
  ``system``, ``oxmerge``, ``floor``, ``mergekit``, ...), ``state`` (where the bytes are:
  ``memory``, ``warm``, ``cold``, ``direct``, ...), ``threads`` and ``simd`` (null where nobody
  tells) say what it is. No two rows of a record agree in all of these.
  ``bytes_read`` and ``bytes_written`` are those of one run: every input byte once, every output
  byte once, however often a method reads. ``elements`` are those of the output, ``tensors`` those
  of a model, or null.
  ``seconds`` has every run: of merges from the first open to the last fsync.
  ``process_seconds`` are those of whole processes, where they were some. ``peak_memory`` is the
  largest resident set of those, in bytes, ``predicted_memory`` what they predicted, or null.
  ``median_seconds``, ``quartile_seconds``, ``gb_per_s``, ``elements_per_s``, ``share_of_memcpy``,
  ``times_floor`` follow from the others and are there for people; they are not read back.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from oxmerge.bench import PARTS
from oxmerge.errors import OxmergeError

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA = "oxmerge-bench"
VERSION = 1

_GIGA = 1e9
_MOST = 1 << 63

# What readers need, by type; a list says what is in it, `None` beside a type that it may lack.
_KINDS: dict[str, dict[str, Any]] = {
    "the record": {"created": str, "machine": dict, "settings": dict, "notes": [str], "rows": list},
    "`machine`": {
        **dict.fromkeys(("cpu", "kernel", "file_system", "python", "numpy", "oxmerge"), str),
        "simd": str,
        "simd_available": [str],
        "cores": int,
        "virtual": bool,
        "caches": dict,
        "memory_bytes": int,
        "load_average": float,
    },
    "`settings`": {"size": str, "rounds": int, "elements": int, "storage_bytes": int},
    "a row": {
        **dict.fromkeys(("part", "name", "by", "state"), str),
        **dict.fromkeys(("bytes_read", "bytes_written"), int),
        **dict.fromkeys(("threads", "elements", "peak_memory"), (int, None)),
        **dict.fromkeys(("predicted_memory", "tensors"), (int, None)),
        "simd": (str, None),
        "seconds": [float],
        "process_seconds": [float],
    },
}
_OWN_THREADS = ("merge", "sweep", "digests", "tensors", "fuse")


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was measured. The module says what the fields mean."""

    part: str
    name: str
    by: str
    state: str
    bytes_read: int
    bytes_written: int
    threads: int | None = None
    simd: str | None = None
    elements: int | None = None
    seconds: tuple[float, ...] = ()
    process_seconds: tuple[float, ...] = ()
    peak_memory: int | None = None
    predicted_memory: int | None = None
    tensors: int | None = None

    @property
    def key(self) -> tuple[str, str, str, str, int | None, str | None]:
        """What tells it from the other rows of a record.

        A merge chooses its threads itself, and instruction sets are asked for in one part only;
        elsewhere they are a result.
        """
        threads = None if self.part in _OWN_THREADS else self.threads
        simd = self.simd if self.part == "simd" else None
        return (self.part, self.name, self.by, self.state, threads, simd)

    @property
    def is_plan(self) -> bool:
        """Whether it is a plan, which moves no bytes."""
        return self.name.startswith("plan of ")

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}" if self.threads else ""
        parts = (self.name, self.by, self.state, threads, self.simd)
        return f"{self.part}: {', '.join(part for part in parts if part)}"

    @property
    def bytes(self) -> int:
        """Bytes that one run moves."""
        return self.bytes_read + self.bytes_written

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def process_median(self) -> float:
        """Median of the seconds of whole processes, where it was one."""
        return statistics.median(self.process_seconds or self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds, between which half of the runs lie."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def rate(self) -> float:
        """Bytes a second, by the median."""
        return self.bytes / self.median

    @property
    def element_rate(self) -> float | None:
        """Output elements a second, by the median."""
        return None if self.elements is None else self.elements / self.median


@dataclass(frozen=True, slots=True)
class Record:
    """All that one go measured."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    created: str = field(
        default_factory=lambda: dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    )

    def memcpy_seconds(self, row: Row) -> float | None:
        """Return how long copies take that read and write as much, with as many threads.

        What is both read and written is a copy; the rest is reads or writes alone. Older records
        have only the copy.
        """
        if row.state != "memory" or row.part == "memory":
            return None
        alike = [each for each in self.rows if (each.part, each.threads) == ("memory", row.threads)]
        rates = {each.name: each.rate for each in alike}
        if "copy" not in rates:
            return None
        both = min(row.bytes_read, row.bytes_written)
        moved = {"copy": 2 * both, "read": row.bytes_read - both, "write": row.bytes_written - both}
        return sum(size / rates.get(name, rates["copy"]) for name, size in moved.items())

    def share_of_memcpy(self, row: Row) -> float | None:
        """Return how near a row comes to copies that read and write as much."""
        seconds = self.memcpy_seconds(row)
        return None if seconds is None else seconds / row.median

    def beside(self, row: Row, by: str) -> Row | None:
        """Return the row in which someone else does the same."""
        mine = (row.part, row.name, row.state)
        return next(
            (
                each
                for each in self.rows
                if (each.part, each.name, each.state) == mine and each.by == by
            ),
            None,
        )

    def times_floor(self, row: Row) -> float | None:
        """Return how many times as long as the floor it took."""
        floor = self.beside(row, "floor")
        return None if floor is None or floor is row else row.median / floor.median

    def as_dict(self) -> dict[str, Any]:
        """Return the record as the module describes it."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "created": self.created,
            "machine": self.machine,
            "settings": self.settings,
            "rows": [{**asdict(row), **self._derived(row)} for row in self.rows],
            "notes": list(self.notes),
        }

    def _derived(self, row: Row) -> dict[str, Any]:
        return {
            "median_seconds": row.median,
            "quartile_seconds": row.quartiles,
            "gb_per_s": row.rate / _GIGA,
            "elements_per_s": row.element_rate,
            "share_of_memcpy": self.share_of_memcpy(row),
            "times_floor": self.times_floor(row),
        }


def write_record(record: Record) -> str:
    """Return a record as JSON, as `read_record` reads it."""
    return json.dumps(record.as_dict(), indent=2) + "\n"


def read_record(path: str) -> Record:
    """Read a record that was saved.

    Raises
    ------
    OxmergeError
        If the file is no record, or one of a later schema.
    OSError
        If it cannot be read.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    try:
        data = json.loads(text)
    except ValueError:
        raise _no_record(path, "it is not JSON") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise _no_record(path, f'its `schema` is not "{SCHEMA}"')
    if data.get("version") != VERSION:
        raise OxmergeError(
            f"the record has version {data.get('version')!r} of its schema; "
            f"this oxmerge reads version {VERSION}",
            file=path,
            advice="make it anew, or use the version of oxmerge that made it",
        )
    try:
        return _read(data)
    except ValueError as error:
        raise _no_record(path, f"something in it is amiss: {error}") from None


def _read(data: Mapping[str, Any]) -> Record:
    """Return the record; `ValueError` says what is amiss."""
    found = _checked(data, "the record")
    machine = found["machine"]
    _checked(machine, "`machine`")
    _checked(machine["caches"], "`caches`", dict.fromkeys(machine["caches"], int))
    _checked(found["settings"], "`settings`")
    rows = tuple(_read_row(row) for row in found["rows"])
    return Record(machine, found["settings"], rows, tuple(found["notes"]), found["created"])


def _read_row(data: object) -> Row:
    if not isinstance(data, dict):
        raise ValueError("a row is no object")  # noqa: TRY004 - of a file, not of an argument
    given = _checked(data, "a row")
    if given["part"] not in PARTS:
        raise ValueError(f"`{given['part']}` is not among the parts {', '.join(PARTS)}")
    for name in ("seconds", "process_seconds"):
        given[name] = tuple(map(float, given[name]))
    row = Row(**given)
    if not row.seconds or min(row.seconds) <= 0:
        raise ValueError("a row has no run, or one that took no time")
    if row.by == "oxmerge" and row.part in _OWN_THREADS and not row.process_seconds:
        raise ValueError("a merge has no `process_seconds`")
    if row.bytes == 0:
        raise ValueError("a row moves no bytes")
    return row


def _checked(
    data: Mapping[str, Any], where: str, kinds: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what readers need of `data`, which must be of the right types."""
    found = {}
    for name, kind in (_KINDS[where] if kinds is None else kinds).items():
        if isinstance(kind, tuple) and data.get(name) is None:
            continue
        if name not in data:
            raise ValueError(f"{where} has no `{name}`")
        value, inner = data[name], kind[0] if isinstance(kind, list | tuple) else kind
        if not _is(value, list if isinstance(kind, list) else inner):
            raise ValueError(f"{where} has {value!r} for `{name}`")
        for each in value if isinstance(kind, list) else ():
            if not _is(each, inner):
                raise ValueError(f"`{name}` has {each!r} in it")
        found[name] = value
    return found


def _is(value: object, kind: type) -> bool:
    """Return whether a value is of a type; numbers are finite, and not below zero."""
    if kind is float or kind is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = whole or (kind is float and isinstance(value, float) and math.isfinite(value))
        return fits and 0 <= value < _MOST  # type: ignore[operator]
    return isinstance(value, kind)


def _no_record(path: str, why: str) -> OxmergeError:
    return OxmergeError(
        f"this is no record of `oxmerge bench`: {why}",
        file=path,
        advice="name a file that `oxmerge bench --save FILE` wrote",
    )
