"""Put adapters (LoRA) into a model, as a new model; without a model, into one adapter."""

from __future__ import annotations

import warnings
from dataclasses import asdict

from oxmerge.cli.arguments import Parser, UsageError, add_run_options, run_options
from oxmerge.cli.merge import tell
from oxmerge.cli.progress import show_progress
from oxmerge.options import PlanOptions, RunOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace

    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="the model that the adapters were trained on"
    )
    parser.add_argument("directory", metavar="OUT", help="the output directory: new or empty")
    parser.add_argument(
        "--adapter",
        metavar="A[=WEIGHT]",
        action="append",
        required=True,
        help="an adapter's folder, and what to multiply it by (1); may be repeated: they are added",
    )
    add_run_options(parser, recipe=False)


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Fuse and tell how it went."""
    settings = run_options(options)
    if options.model is None:
        overwrite = settings.pop("overwrite")
        defaults = asdict(PlanOptions()) | asdict(RunOptions())
        for name in (name for name, value in settings.items() if value != defaults[name]):
            raise UsageError(
                f"without a model adapters are added up, and `{name}` has no effect",
                "leave the option out; or name the model, then OUT",
            )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            files = engine.join_adapters(options.directory, options.adapter, overwrite=overwrite)
        printer.warnings(tuple(str(each.message) for each in told))
        printer.say(f"wrote `{options.directory}`: an adapter that is the sum of those named")
        if printer.as_json:
            printer.json({"files": files})
        return 0
    with show_progress(printer) as progress:
        report = engine.fuse(
            options.model, options.directory, options.adapter, **settings, progress=progress
        )
    tell(report, printer)
    return 0
