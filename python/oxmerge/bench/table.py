"""The record as tables: Markdown that reads well in a terminal too, to be pasted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oxmerge.bench import PARTS
from oxmerge.bench.compare import compare, remarks
from oxmerge.bench.panels import OF_FILES, TITLES
from oxmerge.sizes import format_size, three_digits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

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
            f"{_busy(machine)}{_count(settings['rounds'], 'round')}"
        ),
    ]


def _busy(machine: Mapping[str, Any]) -> str:
    if "busy_elsewhere" not in machine:
        return ""
    return f"{machine['busy_elsewhere']:.2f} cores busy with other programs meanwhile, "


def text(record: Record) -> str:
    """Return the whole record as Markdown."""
    parts = [f"# {heading(record)}", _bullets(machine_lines(record))]
    for section in sections(record):
        parts += [f"## {section.title}", _markdown(section)]
    return "\n\n".join([*parts, _bullets(record.notes)])


def comparison(old: Record, new: Record) -> Section:
    """Return what changed between two records as a table."""
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
    return Section("Then and now", ("what", "then", "now", "as fast", "verdict"), rows)


def comparison_text(old: Record, new: Record) -> str:
    """Return what changed between two records as Markdown."""
    section = comparison(old, new)
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
    }
    for part in PARTS:
        rows = [row for row in record.rows if row.part == part]
        if rows and part in OF_FILES:
            yield _merges(record, rows)
            if any(row.by == "mergekit" for row in rows):
                yield _processes(record, rows)
        elif rows:
            yield makers[part](record, rows)


def _memory(_: Record, rows: Sequence[Row]) -> Section:
    head = ("what", "threads", "moved", "GB/s", "time (quartiles)")
    found = tuple(
        (
            row.name,
            str(row.threads),
            format_size(row.bytes, binary=True),
            _rate(row),
            _seconds(row),
        )
        for row in rows
    )
    return Section(TITLES["memory"], head, found)


def _storage(_: Record, rows: Sequence[Row]) -> Section:
    head = ("what", "how", "threads", "GB/s", "time (quartiles)")
    found = ((row.name, row.state, str(row.threads), _rate(row), _seconds(row)) for row in rows)
    size = format_size(rows[0].bytes, binary=True)
    return Section(f"{TITLES['storage']}: a file of {size}", head, tuple(found))


def _kernels(record: Record, rows: Sequence[Row]) -> Section:
    head = ["what", "GB/s", "share of memcpy", "10^9 elements/s", "time (quartiles)"]
    has_others = any(row.by != "oxmerge" for row in rows)
    if has_others:
        head[1:1] = ["by", "× oxmerge's time"]
    found = []
    for row in rows:
        cells = [
            row.name,
            _rate(row),
            _or_none(record.share_of_memcpy(row), "{:.0%}"),
            _NONE if row.element_rate is None else f"{row.element_rate / _GIGA:.2f}",
            _seconds(row),
        ]
        if has_others:
            ours = record.beside(row, "oxmerge")
            cells[1:1] = [row.by, _times(row, ours)]
        found.append(tuple(cells))
    title = f"{TITLES['kernels']}: {_count(rows[0].threads or 0, 'thread')}"
    return Section(title, tuple(head), tuple(found))


def _threads(record: Record, rows: Sequence[Row]) -> Section:
    counts = list(dict.fromkeys(row.threads for row in rows))
    by_name: dict[str, dict[int | None, Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, {})[row.threads] = row
    for copy in record.rows:
        if (copy.part, copy.name) == ("memory", "copy"):
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
    head = ["merge", "inputs", "moved", "floor s", "oxmerge s (quartiles)", "× floor"]
    head += ["floor GB/s", "oxmerge GB/s", "process s", "peak"]
    part = rows[0].part
    if part == "sweep":
        head.append("× one merge")
    if part == "tensors":
        head += ["predicted", "µs a tensor beside the floor"]
    found = []
    for row in rows:
        if row.by != "oxmerge":
            continue
        floor = record.beside(row, "floor")
        cells = [
            row.name,
            row.state,
            _NONE if row.is_plan else format_size(row.bytes),
            _or_none(None if floor is None else floor.median),
            _NONE if row.is_plan else _plain_seconds(row),
            _or_none(record.times_floor(row), "{:.2f}"),
            _NONE if floor is None else _rate(floor),
            _NONE if row.is_plan else _rate(row),
            three_digits(row.process_median),
            _memory_size(row.peak_memory),
        ]
        if part == "sweep":
            names = {
                each.name: each for each in record.rows if each.key[:3:2] == ("merge", "oxmerge")
            }
            one = names.get(row.name.partition(",")[0])
            cells.append(_times(row, one))
        if part == "tensors":
            cells += [_memory_size(row.predicted_memory), _beside(row, floor)]
        found.append(tuple(cells))
    size = "" if part == "tensors" else f": size {record.settings['size']}"
    return Section(f"{TITLES[part]}{size}", tuple(head), tuple(found))


def _beside(row: Row, floor: Row | None) -> str:
    """Return the microseconds of each tensor that the floor does not take."""
    if floor is None or row.tensors is None:
        return _NONE
    return f"{(row.median - floor.median) / row.tensors * 1e6:.0f}"


def _times(row: Row, other: Row | None) -> str:
    return _NONE if other is None else f"{row.median / other.median:.2f}"


def _processes(record: Record, rows: Sequence[Row]) -> Section:
    head = ("merge", "oxmerge s", "mergekit s", "mergekit ×", "oxmerge GB/s", "mergekit GB/s")
    found = []
    for row in rows:
        other = record.beside(row, "mergekit")
        if row.by != "oxmerge" or other is None:
            continue
        seconds = (row.process_median, other.process_median)
        found.append(
            (
                row.name,
                *map(three_digits, seconds),
                f"{seconds[1] / seconds[0]:.1f}",
                *(three_digits(row.bytes / each / _GIGA) for each in seconds),
                _memory_size(row.peak_memory),
                _memory_size(other.peak_memory),
            )
        )
    title = f"{TITLES[rows[0].part]}: whole processes, from start to exit"
    return Section(title, (*head, "oxmerge peak", "mergekit peak"), tuple(found))


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


def _or_none(value: float | None, style: str = "") -> str:
    """Return a number with three digits or in a style, or what stands for none."""
    if value is None:
        return _NONE
    return style.format(value) if style else three_digits(value)


def _seconds(row: Row) -> str:
    """Return median and quartiles in a unit that fits."""
    scales = {1: (1, "s"), 1e-3: (1e3, "ms"), 0: (1e6, "µs")}
    scale, unit = next(found for least, found in scales.items() if row.median >= least)
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
