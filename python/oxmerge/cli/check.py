"""Tell whether a model is sound: its files, sizes, numbers, tokens, and what lies beside them.

The exit code is 0 if there is no error (with `--strict`, no warning either), 1 if there is one, and
2 if the model could not be looked at.
"""

from __future__ import annotations

from oxmerge.cli.arguments import Parser, add_json_option, add_resource_options
from oxmerge.cli.progress import show_progress
from oxmerge.problems import shown, without_hint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from oxmerge.checking.soundness import Soundness
    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer

SOUND, UNSOUND = 0, 1


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument("model", metavar="MODEL", help="a model: what a recipe may name")
    parser.add_argument(
        "--quick", action="store_true", help="look at headers and files only, not at weights"
    )
    parser.add_argument("--strict", action="store_true", help="treat warnings as errors")
    add_resource_options(parser)
    add_json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print no progress")


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Look at the model and tell what was found."""
    given = {"quick": options.quick, "memory": options.memory, "threads": options.threads}
    with show_progress(printer) as progress:
        found = engine.check(options.model, **given, progress=progress or False)
    if printer.as_json:
        printer.json(found.as_dict())
    else:
        printer.lines(_lines(found))
    is_wrong = found.errors or (options.strict and found.warnings)
    return UNSOUND if is_wrong else SOUND


def _lines(found: Soundness) -> Iterator[str]:
    lists = {"error": found.errors, "warning": found.warnings, "note": found.notes}
    for severity, problems in lists.items():
        told, more = shown(problems)
        for problem in told:
            text, hint = without_hint(problem)
            yield f"{severity}: {text} [{getattr(problem, 'code', '')}]"
            if hint:
                yield f"  hint: {hint}"
        if more is not None:
            yield f"{severity}: {more}"
    yield found.verdict
