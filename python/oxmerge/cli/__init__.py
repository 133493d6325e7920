"""The command line: `oxmerge VERB ...`.

Standard output carries data, standard error speaks to people, and the exit code says how it went:
0 done, 1 failed, 2 usage or recipe error, 130 interrupted, and 128 and the number for other signals
that ask it to end. Each verb is a module with
`add_arguments` and `run`; only the one asked for is imported. Exceptions end here: `failures` says
how they are told.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from oxmerge import __version__
from oxmerge.cli.arguments import Parser, UsageError
from oxmerge.cli.failures import exit_code, report, tell
from oxmerge.cli.printer import DataUnwritten, Printer
from oxmerge.signals import ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from oxmerge.cli.engine import Engine

__all__ = ["main"]

VERBS = {
    "merge": "merge checkpoints by a recipe",
    "fuse": "put adapters into a model",
    "sweep": "merge several times with other parameters, in one pass",
    "plan": "show what a merge would do, without doing it",
    "clean": "remove what an interrupted merge has left",
    "inspect": "show what is in a checkpoint",
    "diff": "show how two checkpoints differ",
    "check": "tell whether a checkpoint is sound",
    "verify": "tell whether an output is what was made",
    "methods": "list the merge methods, or explain one",
    "bench": "measure this machine: memory, storage, kernels, merges",
    "demo": "make two small checkpoints and merge them",
}
"""The verbs, and what each does."""
_ANSWERING = frozenset(("check", "diff", "verify"))
"""Verbs whose exit code answers a question: 0 yes, 1 no, 2 that there is no answer."""


def main(argv: Sequence[str] | None = None, *, engine: Engine | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        The arguments; those of the process when None.
    engine
        What does the work; the installed engine when None.

    Returns
    -------
    int
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    printer = Printer(
        quiet="--quiet" in arguments or "-q" in arguments, as_json="--json" in arguments
    )
    try:
        with ending():
            code = _dispatch(arguments, printer, engine)
            printer.flush()
    except DataUnwritten as unwritten:
        printer.close_output()
        if isinstance(unwritten.reason, BrokenPipeError):
            return 0  # whoever read the data has seen enough
        tell(unwritten.reason, printer)
        return exit_code(unwritten.reason)
    except KeyboardInterrupt as interrupt:
        report(interrupt, printer)
        return exit_code(interrupt)
    except Exception as error:
        if not report(error, printer):
            raise
        return 2 if arguments[:1] and arguments[0] in _ANSWERING else exit_code(error)
    return code


def _dispatch(arguments: list[str], printer: Printer, engine: Engine | None) -> int:
    helps = {"-h", "--help", "help"}
    if len(arguments) > 1 and arguments[0] in helps and arguments[1] in VERBS:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in helps:
        printer.data(_overview())
        return 0 if arguments else 2
    if arguments[0] in {"-V", "--version"}:
        printer.data(f"oxmerge {__version__}")
        return 0
    verb, *rest = arguments
    if verb.startswith("-"):
        example = f"`oxmerge merge RECIPE OUTPUT {verb}`"
        raise UsageError(f"`{verb}` before a command", f"write options after it: {example}")
    if verb not in VERBS and (verb.endswith((".yml", ".yaml")) or os.path.isfile(verb)):
        raise UsageError(
            f"unknown command `{verb}`", f"to merge by a recipe: `oxmerge merge {verb} OUT`"
        )
    if verb not in VERBS:
        raise UsageError.unknown("command", verb, VERBS)
    module = import_module(f"oxmerge.cli.{verb}")
    parser = Parser(prog=f"oxmerge {verb}", description=module.__doc__)
    module.add_arguments(parser)
    options = parser.parse(rest, printer)
    if options is None:
        return 0
    if engine is None:
        from oxmerge.cli.engine import Engine  # noqa: PLC0415 - only to work

        engine = Engine()
    return int(module.run(options, printer, engine))


def _overview() -> str:
    lines = [f"  {verb:<10}{purpose}" for verb, purpose in VERBS.items()]
    return "\n".join(
        [
            "Merge model checkpoints out of core: any size, in a few hundred MB of memory.",
            "",
            "usage: oxmerge COMMAND ...",
            "",
            *lines,
            "",
            "`oxmerge COMMAND --help` explains a command; `oxmerge --version` tells the version.",
            "Start with `oxmerge demo`.",
        ]
    )
