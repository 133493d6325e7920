"""Measure this machine and the engine on it: memory, storage, kernels, merges of files."""

from __future__ import annotations

import argparse
import os
import shutil
from contextlib import contextmanager

from oxmerge.bench import PARTS, USUAL
from oxmerge.cli.arguments import Parser, UsageError, add_json_option, check_file, positive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator

    from oxmerge.bench.programs import Mergekit
    from oxmerge.bench.record import Record
    from oxmerge.bench.run import Settings
    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer

_SIZES = ("tiny", "1b")
_QUICK = {"rounds": 3, "elements": 16 << 20, "storage_bytes": 64 << 20}


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        help="whose disk is measured, in a new folder that is removed afterwards (.)",
    )
    parser.add_argument("--quick", action="store_true", help="smaller arrays and files, 3 rounds")
    parser.add_argument(
        "--only",
        type=_parts,
        metavar="PARTS",
        help=f"some of {','.join(PARTS)} (all but {','.join(PARTS[len(USUAL) :])})",
    )
    parser.add_argument("--methods", type=_names, metavar="NAMES", help="only these methods")
    parser.add_argument(
        "--size",
        choices=_SIZES,
        help="of the models merged: 53 MB or 2.5 GB (tiny)",
    )
    parser.add_argument("--rounds", type=positive, metavar="N", help="runs of each thing (5)")
    parser.add_argument(
        "--against",
        type=_other,
        metavar="mergekit=PYTHON",
        help="run the same merges there, once each: the Python that has mergekit",
    )
    parser.add_argument("--compare", metavar="OLD.json", help="say what changed since a record")
    parser.add_argument(
        "--show", metavar="FILE", help="measure nothing: take a record that was saved"
    )
    parser.add_argument("--save", metavar="FILE", help="write the record as JSON")
    parser.add_argument("--svg", metavar="FILE", help="write the chart as SVG")
    parser.add_argument("--html", metavar="FILE", help="write chart and tables as one HTML page")
    parser.add_argument("-q", "--quiet", action="store_true", help="print no progress")
    add_json_option(parser)


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Measure, and print, compare and write what is asked for."""
    # What cannot work is told before the measuring begins.
    _check_targets(options)
    _check_show(options)
    old = _read(options.compare)
    record = _read(options.show) or _measure(options, printer, engine)
    _tell(record, old, printer)
    _write(record, old, options)
    return 0


def _measure(options: Namespace, printer: Printer, engine: Engine) -> Record:
    from oxmerge.bench.machine import describe, warnings_of  # noqa: PLC0415 - not for --help
    from oxmerge.bench.run import run as measure  # noqa: PLC0415 - not for --help

    if options.directory is not None and not os.path.isdir(options.directory):
        raise UsageError(f"`{options.directory}` is no directory", "name one that exists")
    mergekit = _mergekit(options)
    methods = engine.methods()
    settings = _settings(options, {method["name"] for method in methods})
    printer.warnings(warnings_of(describe(settings.directory)))
    with _progress(printer) as say:
        return measure(settings, methods, mergekit, say)


def _settings(options: Namespace, known: set[str]) -> Settings:
    from oxmerge.bench.run import Settings  # noqa: PLC0415 - not for --help

    for name in options.methods or ():
        if name not in known:
            raise UsageError(f"there is no method `{name}`", "`oxmerge methods` lists them")
    given = {
        "directory": options.directory,
        "parts": options.only,
        "methods": options.methods,
        "size": options.size,
        "rounds": options.rounds,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    return Settings(**{**(_QUICK if options.quick else {}), **asked})


def _mergekit(options: Namespace) -> Mergekit | None:
    from oxmerge.bench.programs import Mergekit  # noqa: PLC0415 - not for --help

    if options.against is None:
        return None
    if options.only is not None and not {"merge", "tensors", "fuse"} & set(options.only):
        raise UsageError("`--against` compares merges, and `--only` leaves them out")
    return Mergekit.find(options.against)


def _read(path: str | None) -> Record | None:
    from oxmerge.bench.record import read_record  # noqa: PLC0415 - not for --help

    return None if path is None else read_record(path)


def _tell(record: Record, old: Record | None, printer: Printer) -> None:
    from oxmerge.bench import bars, compare, table  # noqa: PLC0415 - not for --help

    if printer.as_json:
        data = record.as_dict()
        if old is not None:
            data["comparison"] = [each.as_dict() for each in compare.compare(old, record)]
            data["remarks"] = list(compare.remarks(old, record))
        printer.json(data)
        return
    printer.data(table.text(record))
    if old is not None:
        printer.data("\n" + table.comparison_text(old, record))
    if printer.output.isatty():
        printer.data("")
        bars.print_bars(record, printer.output)


def _write(record: Record, old: Record | None, options: Namespace) -> None:
    from oxmerge.bench.chart import page, svg  # noqa: PLC0415 - not for --help
    from oxmerge.bench.record import write_record  # noqa: PLC0415 - not for --help

    makers: dict[str | None, Callable[[Record], str]] = {
        options.save: write_record,
        options.svg: svg,
        options.html: lambda record: page(record, old),
    }
    for path, make in makers.items():
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(make(record))


def _check_targets(options: Namespace) -> None:
    """Refuse files that cannot be written, and two that are the same."""
    given = [path for path in (options.save, options.svg, options.html) if path is not None]
    for path in given:
        check_file(path)
    if len({os.path.realpath(path) for path in given}) < len(given):
        raise UsageError("two of `--save`, `--svg` and `--html` name the same file")


def _check_show(options: Namespace) -> None:
    """Refuse what says how to measure, where nothing is measured."""
    if options.show is None:
        return
    given = {
        "DIR": options.directory,
        "--quick": options.quick or None,
        "--only": options.only,
        "--methods": options.methods,
        "--size": options.size,
        "--rounds": options.rounds,
        "--against": options.against,
    }
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"`--show` measures nothing: `{name}` has no effect", "leave it out")


@contextmanager
def _progress(printer: Printer) -> Iterator[Callable[[str], None]]:
    """Yield what shows one line that is overwritten, where a person watches.

    A spinner would be a thread that wakes up while something is measured.
    """
    if printer.quiet or not printer.is_terminal:
        yield lambda _: None
        return

    def say(text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        printer.messages.write(f"\r\x1b[K{text[:width]}")

    try:
        yield say
    finally:
        say("")


def _parts(text: str) -> tuple[str, ...]:
    """Parse a list of parts, for an argument."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"`{name}` is not among {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in names)


def _names(text: str) -> tuple[str, ...]:
    """Parse a list of methods, for an argument."""
    return tuple(name.strip() for name in text.split(","))


def _other(text: str) -> str:
    """Parse who else runs, for an argument."""
    name, equals, python = text.partition("=")
    if name != "mergekit" or not equals or not python:
        raise argparse.ArgumentTypeError(
            f"`{text}` is not understood; write `mergekit=PYTHON`, the Python that has mergekit"
        )
    return python
