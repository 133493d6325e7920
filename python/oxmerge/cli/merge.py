"""Merge checkpoints by a recipe, into a new model directory."""

from __future__ import annotations

from oxmerge.cli import mergekit
from oxmerge.cli.arguments import (
    Parser,
    UsageError,
    add_run_options,
    natural,
    part,
    positive,
    run_options,
)
from oxmerge.cli.progress import format_rate, show_progress
from oxmerge.options import check_completing
from oxmerge.sizes import format_duration, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer
    from oxmerge.merging import MergeReport


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    add_run_options(parser)
    add_part_options(parser)
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const=True,
        help="make parts on a Ray cluster; write it behind OUT",
    )
    parser.add_argument(
        "--parts", type=positive, metavar="N", help="with --ray: how many (two for each node)"
    )
    mergekit.add_options(parser)
    parser.add_argument(
        "directory", metavar="OUT", help="the output directory: new or empty; or s3:// or gs://"
    )


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Merge and tell how it went."""
    settings = run_options(options)
    settings |= part_options(options)
    for note in mergekit.notes(options):
        printer.say(f"note: {note}")
    with show_progress(printer) as progress:
        report = engine.merge(options.recipe, options.directory, **settings, progress=progress)
    tell(report, printer)
    return 0


def add_part_options(parser: Parser) -> None:
    """Add the options of a part."""
    parser.add_argument(
        "--part",
        type=part,
        metavar="K/N",
        help="make part K of N and leave the others to other runs, on other machines perhaps",
    )
    parser.add_argument(
        "--finish",
        action="store_true",
        help="with --part: complete the output if it is the last; else `oxmerge finish OUT` does",
    )
    parser.add_argument(
        "--wait",
        type=natural,
        metavar="SECONDS",
        help="with --part: how long to wait for what other parts find or make first (600)",
    )


def part_options(options: Namespace) -> dict[str, Any]:
    """Return what is asked for about parts, without what is not given."""
    names = ("part", "wait", "ray", "parts")
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    if {"part", "ray"} & given.keys() and (options.no_digests or options.no_resume):
        raise UsageError(
            "parts need digests and the journal: others learn from them what is made",
            "leave out `--no-digests` and `--no-resume`",
        )
    if {"part", "ray"} <= given.keys():
        raise UsageError("`--ray` makes all parts", "leave out `--part`")
    if "part" not in given and (options.finish or "wait" in given):
        raise UsageError("`--finish` and `--wait` are for a part", "add `--part K/N`")
    if "part" in given:
        try:
            check_completing(
                finish=options.finish,
                hash_inputs=options.hash_inputs,
                allow_nonfinite=options.allow_nonfinite,
            )
        except ValueError as error:
            advice = "add `--finish`, or give the option to `oxmerge finish`"
            raise UsageError(str(error).partition(": ")[0], advice) from None
    if "parts" in given and "ray" not in given:
        raise UsageError("`--parts` is how many are made on Ray", "add `--ray`")
    return given | ({"finish": True} if options.finish else {})


def tell(report: MergeReport, printer: Printer) -> None:
    """Print the warnings and the summary of a merge, and the report if it is asked for."""
    printer.warnings(report.warnings)
    for note in report.notes:
        printer.say(f"note: {note}")
    for line in summary(report) if report.files else ():  # there was something to do
        printer.say(line)
    if printer.as_json:
        printer.json(report.as_dict())


def summary(report: MergeReport, outputs: int = 1) -> tuple[str, str]:
    """Return the two lines that end a merge; the second is for all that were made in its pass."""
    moved = report.input_bytes + outputs * report.bytes_written
    files = "1 file" if report.files == 1 else f"{report.files} files"
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    peak = format_size(report.peak_memory, binary=True)
    where = f"wrote `{report.directory}`: {report.tensors} tensors in {files}, "
    how = f"{format_rate(moved, report.seconds)} (inputs and output once), peak memory {peak} of "
    arithmetic = report.simd if report.device == "cpu" else report.device
    return (
        where + f"{format_size(report.bytes_written)} in {format_duration(report.seconds)}",
        how + f"{format_size(report.memory, binary=True)}, {threads}, {arithmetic}",
    )
