"""The record as tables: Markdown that reads well in a terminal too, to be pasted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oxmerge.bench import PARTS
from oxmerge.bench.compare import compare, remarks
from oxmerge.bench.panels import OF_FILES, OTHERS, TITLES
from oxmerge.bench.record import Row
from oxmerge.sizes import format_size, three_digits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from oxmerge.bench.record import Record

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
    """Yield the tables of each part that was measured."""
    for part in PARTS:
        rows = [row for row in record.rows if row.part == part]
        if not rows:
            continue
        title = TITLES[part]
        if part in {"threads", "simd"}:
            yield _side_by_side(record, rows)
        elif part in OF_FILES:
            ours = [row for row in rows if row.by == "oxmerge"]
            size = "" if part == "tensors" else f": size {record.settings['size']}"
            yield _section(title + size, ours, _merge_columns(record, part))
            for other in OTHERS:
                both = [row for row in ours if record.beside(row, other) is not None]
                if both:
                    whole = f"{title}: whole processes, from start to exit"
                    yield _section(whole, both, _process_columns(record, other))
        else:
            if part == "storage":
                title += f": a file of {format_size(rows[0].bytes, binary=True)}"
            elif part == "kernels":
                title += f": {_count(rows[0].threads or 0, 'thread')}"
            yield _section(title, rows, _plain_columns(record, part, rows))


Columns = dict[str, Callable[[Row], str]]
"""The heads of a table's columns, and what stands in them for a row."""


def _section(title: str, rows: Sequence[Row], columns: Columns) -> Section:
    found = tuple(tuple(cell(row) for cell in columns.values()) for row in rows)
    return Section(title, tuple(columns), found)


def _plain_columns(record: Record, part: str, rows: Sequence[Row]) -> Columns:
    columns: Columns = {"what": lambda row: row.name}
    if part == "kernels":
        if any(row.by != "oxmerge" for row in rows):
            columns["by"] = lambda row: row.by
            columns["× oxmerge's time"] = lambda row: _times(row, record.beside(row, "oxmerge"))
        columns["GB/s"] = _rate
        columns["share of memcpy"] = lambda row: _number(record.share_of_memcpy(row), "{:.0%}")
        columns["10^9 elements/s"] = lambda row: _number(row.element_rate, "{:.2f}", _GIGA)
    else:
        if part == "storage":
            columns["how"] = lambda row: row.state
        columns |= {"threads": lambda row: str(row.threads), "GB/s": _rate}
    return columns | {"time (quartiles)": _seconds}


def _merge_columns(record: Record, part: str) -> Columns:
    def floor(row: Row) -> Row | None:
        return record.beside(row, "floor")

    def of_merge(cell: Callable[[Row], str]) -> Callable[[Row], str]:
        return lambda row: _NONE if row.is_plan else cell(row)

    def of_floor(cell: Callable[[Row], str]) -> Callable[[Row], str]:
        return lambda row: _NONE if (found := floor(row)) is None else cell(found)

    def beside(row: Row) -> str:
        found = floor(row)
        if found is None or row.tensors is None:
            return _NONE
        return f"{(row.median - found.median) / row.tensors * 1e6:.0f}"

    columns: Columns = {
        "merge": lambda row: row.name,
        "inputs": lambda row: row.state,
        "moved": of_merge(lambda row: format_size(row.bytes)),
        "floor s": of_floor(lambda row: three_digits(row.median)),
        "oxmerge s (quartiles)": of_merge(_plain_seconds),
        "× floor": lambda row: _number(record.times_floor(row), "{:.2f}"),
        "floor GB/s": of_floor(_rate),
        "oxmerge GB/s": of_merge(_rate),
        "process s": lambda row: three_digits(row.process_median),
        "peak": lambda row: _memory_size(row.peak_memory),
    }
    if part == "sweep":
        single = {
            (row.name, row.state): row
            for row in record.rows
            if (row.part, row.by) == ("merge", "oxmerge")
        }
        columns["× one merge"] = lambda row: _times(
            row, single.get((row.name.partition(",")[0], row.state))
        )
    if part == "tensors":
        columns["predicted"] = lambda row: _memory_size(row.predicted_memory)
        columns["µs a tensor beside the floor"] = beside
    return columns


def _process_columns(record: Record, by: str) -> Columns:
    def other(row: Row) -> Row:
        return record.beside(row, by) or row

    def rate(row: Row) -> str:
        return three_digits(row.bytes / row.process_median / _GIGA)

    return {
        "merge": lambda row: row.name,
        "oxmerge s": lambda row: three_digits(row.process_median),
        f"{by} s": lambda row: three_digits(other(row).process_median),
        f"{by} ×": lambda row: f"{other(row).process_median / row.process_median:.1f}",
        "oxmerge GB/s": rate,
        f"{by} GB/s": lambda row: rate(other(row)),
        "oxmerge peak": lambda row: _memory_size(row.peak_memory),
        f"{by} peak": lambda row: _memory_size(other(row).peak_memory),
    }


def _side_by_side(record: Record, rows: Sequence[Row]) -> Section:
    """Return rates by number of threads, or by instruction set."""
    of_threads = rows[0].part == "threads"
    copies = [row for row in record.rows if (row.part, row.name) == ("memory", "copy")]
    by_name: dict[str, dict[object, Row]] = {}
    for row in (*rows, *(copies if of_threads else ())):
        by_name.setdefault(row.name, {})[row.threads if of_threads else row.simd] = row
    heads = list(dict.fromkeys(row.threads if of_threads else row.simd for row in rows))
    found = []
    for name, each in by_name.items():
        rates = [each[head].rate for head in heads if head in each]
        cells = (_rate(each[head]) if head in each else _NONE for head in heads)
        found.append((name, *cells, f"{rates[-1] / rates[0]:.2f} ×"))
    title = TITLES[rows[0].part]
    if not of_threads:
        title += f": {_count(rows[0].threads or 0, 'thread')}"
    first = "GB/s with threads" if of_threads else "GB/s with"
    return Section(title, (first, *map(str, heads), "last by first"), tuple(found))


def _times(row: Row, other: Row | None) -> str:
    return _NONE if other is None else f"{row.median / other.median:.2f}"


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


def _number(value: float | None, style: str, unit: float = 1) -> str:
    return _NONE if value is None else style.format(value / unit)


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
