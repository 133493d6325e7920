"""What the charts show: groups of bars, all in GB/s, so that longer is better everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oxmerge.bench import PARTS
from oxmerge.sizes import three_digits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oxmerge.bench.record import Record, Row

TITLES = {
    "memory": "Copy in memory",
    "storage": "Storage",
    "kernels": "Kernels and methods in memory",
    "threads": "Threads",
    "simd": "Instruction sets",
    "merge": "Merges of files",
}
_GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar: GB/s by the median, and by the quartiles of the seconds."""

    label: str
    by: str
    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """The value, as it stands at the bar's end."""
        return f"{three_digits(self.value)} GB/s"


@dataclass(frozen=True, slots=True)
class Panel:
    """A group of bars on one scale."""

    title: str
    bars: tuple[Bar, ...]

    @property
    def most(self) -> float:
        """The end of the scale."""
        return max(bar.high for bar in self.bars)


def panels(record: Record) -> Iterator[Panel]:
    """Yield a panel for each part that was measured."""
    for part in PARTS:
        rows = [row for row in record.rows if row.part == part]
        if rows:
            yield Panel(TITLES[part], tuple(_bar(row) for row in rows))


def _bar(row: Row) -> Bar:
    first, third = row.quartiles
    return Bar(
        _label(row),
        row.by,
        row.rate / _GIGA,
        row.bytes / third / _GIGA,
        row.bytes / first / _GIGA,
    )


def _label(row: Row) -> str:
    threads = "1 thread" if row.threads == 1 else f"{row.threads} threads"
    if row.part == "simd":
        return f"{row.name}, {row.simd}"
    if row.part == "merge":
        return f"{row.name}, {row.state}: {row.by}"
    if row.part == "storage":
        return f"{row.name}, {row.state}, {threads}"
    return row.name if row.part == "kernels" else f"{row.name}, {threads}"
