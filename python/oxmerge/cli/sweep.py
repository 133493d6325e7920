"""Merge several times with other parameters, in one pass over the inputs."""

from __future__ import annotations

from oxmerge.cli.arguments import Parser, UsageError, add_run_options, run_options
from oxmerge.cli.merge import add_part_options, part_options, summary
from oxmerge.cli.progress import show_progress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace

    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    add_run_options(parser)
    parser.add_argument(
        "pattern",
        metavar="OUT_PATTERN",
        help="the output directories, with {0} for the first value, {weight} for that of the one "
        "place that ends so, {n} or {n:03} for a number",
    )
    parser.add_argument(
        "--set",
        action="append",
        required=True,
        dest="axes",
        metavar="PLACE=VALUES",
        help="what to vary: models[chat].parameters.weight=0.1:0.9:9 (nine values from 0.1 to 0.9) "
        "or =0.1,0.5; in brackets is the end of a model's path, or its position in the list, from "
        "0; given several times, every combination",
    )
    add_part_options(parser)
    parser.add_argument(
        "--together", action="store_true", help="vary all in step, not in every combination"
    )


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Merge and tell how it went."""
    axes = _axes(options.axes)
    settings = run_options(options) | part_options(options)
    with show_progress(printer) as progress:
        reports = engine.sweep(
            options.recipe,
            options.pattern,
            axes,
            together=options.together,
            **settings,
            progress=progress,
        )
    warnings = dict.fromkeys(str(warning) for report in reports for warning in report.warnings)
    printer.warnings(warnings)
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        printer.say(f"note: {note}")
    made = [report for report in reports if report.files]  # the others were complete
    for report in made:
        printer.say(summary(report)[0])
    if made:
        printer.say(f"{len(made)} merges in one pass: {summary(made[-1], len(made))[1]}")
    if printer.as_json:
        printer.json({"merges": [report.as_dict() for report in reports]})
    return 0


def _axes(texts: list[str]) -> dict[str, str]:
    axes: dict[str, str] = {}
    for text in texts:
        place, equals, values = text.partition("=")
        if not equals or not place or not values:
            advice = "write --set PLACE=VALUES, as models[chat].parameters.weight=0.1:0.9:9"
            raise UsageError(f"`--set {text}` sets nothing", advice)
        if place in axes:
            raise UsageError(f"`{place}` is set twice", "list all of its values at once")
        axes[place] = values
    return axes
