"""Complete a merge of which all parts are made (`oxmerge merge --part`)."""

from __future__ import annotations

from oxmerge.cli.arguments import (
    Parser,
    add_finishing_options,
    add_json_option,
    add_methods_option,
)
from oxmerge.cli.merge import tell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace

    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument("directory", metavar="OUT", help="the output directory of the parts")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that is in the output directory"
    )
    parser.add_argument("--strict", action="store_true", help="treat warnings as errors")
    add_finishing_options(parser)
    add_methods_option(parser)
    add_json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Complete it and tell how it went."""
    report = engine.finish(
        options.directory,
        overwrite=options.overwrite,
        strict=options.strict,
        hash_inputs=options.hash_inputs,
        allow_nonfinite=options.allow_nonfinite,
        allow_methods=options.allow_methods or (),
    )
    tell(report, printer)
    return 0
