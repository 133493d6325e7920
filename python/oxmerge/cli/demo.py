"""Make two small checkpoints and merge them, to see what a merge looks like."""

from __future__ import annotations

from oxmerge.cli.arguments import Parser, add_json_option, natural
from oxmerge.cli.merge import tell
from oxmerge.cli.progress import show_progress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace

    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer

_SIZES = ("tiny", "1b", "7b", "70b")


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--size",
        choices=_SIZES,
        default="tiny",
        help="of the checkpoints: tiny (53 MB each), or as large as a real model (tiny)",
    )
    parser.add_argument(
        "--directory", metavar="DIR", default="oxmerge-demo", help="where (./oxmerge-demo)"
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the weights (0)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    add_json_option(parser)


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Make the checkpoints, merge them, and tell how it went."""
    from oxmerge.claims import claimed, named  # noqa: PLC0415 - not for --help
    from oxmerge.demo import describe, make_demo  # noqa: PLC0415 - not for --help

    # Another demo there would make the checkpoints anew while this one merges them.
    with claimed(named(options.directory)):
        printer.say(f"making two checkpoints of size {options.size} in `{options.directory}`")
        demo = make_demo(options.directory, options.size, options.seed)
        output = demo.recipe.parent / "merged"
        printer.say(describe(demo))
        printer.say(f"running: oxmerge merge {demo.recipe} {output}")
        with show_progress(printer) as progress:
            report = engine.merge(str(demo.recipe), str(output), overwrite=True, progress=progress)
    tell(report, printer)
    return 0
