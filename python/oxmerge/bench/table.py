"""The record as tables: Markdown that reads well in a terminal too, to be pasted."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oxmerge.bench import PARTS
from oxmerge.bench.compare import compare, remarks
from oxmerge.bench.panels import TITLES
from oxmerge.sizes import format_size, three_digits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from oxmerge.bench.record import Record, Row

_NONE = "–"
_GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Section:
    """A table with a title."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def heading(record: Record) -> str:
    """Return what the record is about, in a line."""
    machine = record.machine
    return f"oxmerge {machine['oxmerge']} on {machine['cpu']}, {_count(machine['cores'], 'core')}"


def machine_lines(record: Record) -> list[str]:
    """Return what the machine is, a fact a line."""
    machine, settings = record.machine, record.settings
    caches = ", ".join(
        f"{name} {format_size(size, binary=True)}" for name, size in machine["caches"].items()
    )
    virtual = ", a virtual machine" if machine["virtual"] else ""
    others = f", mergekit {settings['mergekit']}" if "mergekit" in settings else ""
    available = ", ".join(machine["simd_available"])
    return [
        (
            f"{machine['cpu']}, {_count(machine['cores'], 'core')}{virtual}; caches: "
            f"{caches or 'unknown'}; memory {format_size(machine['memory_bytes'], binary=True)}"
        ),
        f"{machine['kernel']}, {machine['file_system']}",
        (
            f"oxmerge {machine['oxmerge']} ({machine['simd']}; there are {available}), "
            f"Python {machine['python']}, NumPy {machine['numpy']}{others}"
        ),
        (
            f"{record.created}, load average {machine['load_average']:.2f} at the start, "
            f"{_count(settings['rounds'], 'round')}"
        ),
    ]


def text(record: Record) -> str:
    """Return the whole record as Markdown."""
    parts = [f"# {heading(record)}", _bullets(machine_lines(record))]
    for section in sections(record):
        parts += [f"## {section.title}", _markdown(section)]
    return "\n\n".join([*parts, _bullets(record.notes)])


def comparison_text(old: Record, new: Record) -> str:
    """Return what changed between two records as Markdown."""
    rows = tuple(
        (
            each.new.title,
            _seconds(each.old),
            _seconds(each.new),
            f"{each.ratio:.2f} ×",
            each.verdict,
        )
        for each in compare(old, new)
    )
    section = Section("Then and now", ("what", "then", "now", "as fast", "verdict"), rows)
    parts = [f"## {section.title}", _markdown(section), _bullets(list(remarks(old, new)))]
    return "\n\n".join(part for part in parts if part)


def sections(record: Record) -> Iterator[Section]:
    """Yield a table for each part that was measured."""
    makers = {
        "memory": _memory,
        "storage": _storage,
        "kernels": _kernels,
        "threads": _threads,
        "simd": _levels,
        "merge": _merges,
    }
    for part in PARTS:
        rows = [row for row in record.rows if row.part == part]
        if rows:
            yield makers[part](record, rows)


def _memory(_: Record, rows: Sequence[Row]) -> Section:
    head = ("what", "threads", "GB/s", "time (quartiles)")
    found = ((row.name, str(row.threads), _rate(row), _seconds(row)) for row in rows)
    moved = f"{format_size(rows[0].bytes, binary=True)} read and written"
    return Section(f"{TITLES['memory']}: {moved}", head, tuple(found))


def _storage(_: Record, rows: Sequence[Row]) -> Section:
    head = ("what", "how", "threads", "GB/s", "time (quartiles)")
    found = ((row.name, row.state, str(row.threads), _rate(row), _seconds(row)) for row in rows)
    size = format_size(rows[0].bytes, binary=True)
    return Section(f"{TITLES['storage']}: a file of {size}", head, tuple(found))


def _kernels(record: Record, rows: Sequence[Row]) -> Section:
    head = ("what", "GB/s", "share of memcpy", "10^9 elements/s", "time (quartiles)")
    found = (
        (
            row.name,
            _rate(row),
            _share(record.share_of_memcpy(row)),
            _NONE if row.element_rate is None else f"{row.element_rate / _GIGA:.2f}",
            _seconds(row),
        )
        for row in rows
    )
    title = f"{TITLES['kernels']}: bfloat16, {_count(rows[0].threads or 0, 'thread')}"
    return Section(title, head, tuple(found))


def _threads(record: Record, rows: Sequence[Row]) -> Section:
    counts = list(dict.fromkeys(row.threads for row in rows))
    by_name: dict[str, dict[int | None, Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, {})[row.threads] = row
    for copy in record.rows:
        if copy.part == "memory":
            by_name.setdefault("copy", {})[copy.threads] = copy
    found = (
        (name, *(_cell(each.get(count)) for count in counts), _speed_up(list(each.values())))
        for name, each in by_name.items()
    )
    head = ("GB/s with threads", *(str(count) for count in counts), "most by one")
    return Section(TITLES["threads"], head, tuple(found))


def _levels(_: Record, rows: Sequence[Row]) -> Section:
    levels = list(dict.fromkeys(row.simd for row in rows))
    by_name: dict[str, dict[str | None, Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, {})[row.simd] = row
    found = (
        (name, *(_cell(each.get(level)) for level in levels), _speed_up(list(each.values())))
        for name, each in by_name.items()
    )
    title = f"{TITLES['simd']}: {_count(rows[0].threads or 0, 'thread')}"
    return Section(title, ("GB/s with", *map(str, levels), "last by first"), tuple(found))


def _merges(record: Record, rows: Sequence[Row]) -> Section:
    head = ["merge", "inputs", "moved", "floor s", "oxmerge s (quartiles)", "× floor", "process s"]
    head += ["GB/s", "peak"]
    has_other = any(row.by == "mergekit" for row in rows)
    head += ["mergekit s", "mergekit × process", "mergekit peak"] if has_other else []
    found = []
    for row in rows:
        if row.by != "oxmerge":
            continue
        floor, other = record.beside(row, "floor"), record.beside(row, "mergekit")
        times_floor = record.times_floor(row)
        cells = [
            row.name,
            row.state,
            format_size(row.bytes),
            _NONE if floor is None else three_digits(floor.median),
            _plain_seconds(row),
            _NONE if times_floor is None else f"{times_floor:.2f}",
            three_digits(statistics.median(row.process_seconds)),
            _rate(row),
            _memory_size(row.peak_memory),
        ]
        if has_other:
            cells += _beside(row, other)
        found.append(tuple(cells))
    size = record.settings["size"]
    return Section(f"{TITLES['merge']}: size {size}", tuple(head), tuple(found))


def _beside(row: Row, other: Row | None) -> list[str]:
    if other is None:
        return [_NONE] * 3
    ratio = other.median / statistics.median(row.process_seconds)
    return [three_digits(other.median), f"{ratio:.1f}", _memory_size(other.peak_memory)]


def _markdown(section: Section) -> str:
    """Return a table whose columns are aligned."""
    lines = [section.head, *section.rows]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    # Words to the left, numbers to the right.
    left = [not any(cell[:1].isdigit() for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(cells, widths, left, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if is_left else "-" * (width - 1) + ":"
        for width, is_left in zip(widths, left, strict=True)
    ]
    return "\n".join([line(section.head), line(rule), *map(line, section.rows)])


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _rate(row: Row) -> str:
    return three_digits(row.rate / _GIGA)


def _cell(row: Row | None) -> str:
    return _NONE if row is None else _rate(row)


def _speed_up(rows: Sequence[Row]) -> str:
    return f"{rows[-1].rate / rows[0].rate:.2f} ×"


def _share(value: float | None) -> str:
    return _NONE if value is None else f"{value:.0%}"


def _seconds(row: Row) -> str:
    """Return median and quartiles in a unit that fits."""
    scale, unit = (1, "s") if row.median >= 1 else (1e3, "ms")
    first, third = row.quartiles
    if len(row.seconds) == 1:
        return f"{three_digits(scale * row.median)} {unit}"
    around = f"{three_digits(scale * first)}–{three_digits(scale * third)}"
    return f"{three_digits(scale * row.median)} {unit} ({around})"


def _plain_seconds(row: Row) -> str:
    if len(row.seconds) == 1:
        return three_digits(row.median)
    first, third = row.quartiles
    return f"{three_digits(row.median)} ({three_digits(first)}–{three_digits(third)})"


def _memory_size(size: int | None) -> str:
    return _NONE if size is None else format_size(size, binary=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
