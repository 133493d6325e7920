"""Remove what an interrupted merge has left in its output directory."""

from __future__ import annotations

from oxmerge.cli.arguments import Parser, add_json_option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace

    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "directories",
        metavar="OUT",
        nargs="+",
        help="the output directory of that merge; a model that is there stays as it is",
    )
    add_json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Remove it and tell what there was."""
    removed = []
    for directory in options.directories:
        was_there = engine.clean(directory)
        removed += [directory] if was_there else []
        what = "removed what an interrupted merge had left" if was_there else "nothing to remove"
        printer.say(f"`{directory}`: {what}")
    if printer.as_json:
        printer.json({"removed": removed})
    return 0
