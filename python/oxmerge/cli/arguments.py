"""Arguments: a parser that suggests what was meant, and the types of values."""

from __future__ import annotations

import argparse
import os
import re
import shutil

from oxmerge.options import MOST_SEED, MOST_THREADS, READ_PATHS, check_device
from oxmerge.problems import did_you_mean
from oxmerge.sizes import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NoReturn

    from oxmerge.cli.printer import Printer

_WIDEST = 80


class UsageError(Exception):
    """The command line itself is wrong."""

    def __init__(self, message: str, advice: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice

    @classmethod
    def unknown(cls, kind: str, word: str, known: Iterable[str]) -> UsageError:
        """Build the error for a word that is not among the known ones."""
        names = list(known)
        advice = did_you_mean(word, names) or f"known are: {', '.join(names)}"
        return cls(f"unknown {kind} `{word}`", advice)


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` that raises `UsageError`, knows its own options and those of its help."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401
        self.options: list[str] = []
        self.shown: list[str] = []
        super().__init__(
            **settings,
            allow_abbrev=False,
            formatter_class=_formatter,
        )

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:  # noqa: ANN401
        """Add an argument, remembering the names of options."""
        options = [name for name in names if name.startswith("-")]
        self.options += options
        self.shown += options if settings.get("help") != argparse.SUPPRESS else []
        return super().add_argument(*names, **settings)

    def parse(self, arguments: list[str], printer: Printer) -> argparse.Namespace | None:
        """Parse, or print the help and return None when that is asked for."""
        self._refuse_unknown(arguments)
        if "-h" in arguments or "--help" in arguments:
            printer.data(self.format_help().rstrip())
            return None
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and leaving."""
        raise UsageError(message, f"see `{self.prog} --help`")

    def _refuse_unknown(self, arguments: list[str]) -> None:
        before_end = arguments[: arguments.index("--")] if "--" in arguments else arguments
        for word in before_end:
            name = word.split("=", 1)[0]
            if re.match(r"--?[A-Za-z]", name) and name not in self.options:
                raise UsageError.unknown("option", name, [o for o in self.shown if o[1] == "-"])


def _formatter(prog: str) -> argparse.HelpFormatter:
    columns = min(shutil.get_terminal_size().columns, _WIDEST)
    return argparse.HelpFormatter(prog, max_help_position=26, width=columns)


def size(text: str) -> int:
    """Parse a size such as `256MiB`, for an argument."""
    try:
        value = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than nothing")
    return value


def device(text: str) -> str:
    """Check the name of a device, for an argument."""
    try:
        check_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def check_file(path: str) -> None:
    """Refuse a file that cannot be written, before any work is done for it."""
    folder = os.path.dirname(path) or "."
    if not path:
        raise UsageError("the name of a file is empty", "name a file to write")
    if not os.path.isdir(folder):
        raise UsageError(f"`{path}` cannot be written: `{folder}` is no directory")
    if os.path.isdir(path):
        raise UsageError(f"`{path}` is a directory", "name a file")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UsageError(f"`{path}` cannot be written: permission denied", "name another file")


def positive(text: str) -> int:
    """Parse a whole number from 1, for an argument."""
    return _whole(text, 1, MOST_THREADS)


def part(text: str) -> tuple[int, int]:
    """Parse a part such as `3/16`, for an argument."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(
            f"`{text}` is no part: the third of sixteen is 3/16, the first 1/16"
        )
    return int(match[1]), int(match[2])


def natural(text: str) -> int:
    """Parse a whole number from 0, for an argument."""
    return _whole(text, 0, MOST_SEED)


def _whole(text: str, least: int, most: int) -> int:
    if re.fullmatch(r"[0-9]{1,20}", text) is None or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number from {least} to {most}")
    return int(text)


def add_resource_options(parser: Parser) -> None:
    """Add `--memory` and `--threads`, which no result depends on."""
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="memory that the whole process may use (256MiB)",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="number of workers (six more than cores)"
    )


def add_plan_options(parser: Parser, *, recipe: bool = True) -> None:
    """Add the options that `plan` and `merge` share; of those without a `recipe`, the others."""
    if recipe:
        parser.add_argument(
            "recipe",
            metavar="RECIPE",
            help="the recipe file, or a saved plan; - for standard input",
        )
    add_resource_options(parser)
    parser.add_argument(
        "--device",
        type=device,
        metavar="DEVICE",
        help="where to compute: cpu, cuda or cuda:N (not yet run on a GPU), auto, "
        "or torch, which is cuda's way on torch's CPU (cpu)",
    )
    parser.add_argument(
        "--vram", type=size, metavar="SIZE", help="memory to use on each device (4GiB)"
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="keep no weights that have to be fetched, but read them through a spool",
    )
    parser.add_argument(
        "--spool",
        type=size,
        metavar="SIZE",
        help="largest size of the spool, on the output's disk (20GB)",
    )
    parser.add_argument(
        "--seed", type=natural, metavar="N", help="of the random masks that some methods draw"
    )
    parser.add_argument(
        "--shard-size",
        type=size,
        metavar="SIZE",
        help="largest size of an output file (5GB)",
    )
    parser.add_argument("--strict", action="store_true", help="treat warnings as errors")
    parser.add_argument(
        "--allow-mismatch",
        "--allow-crimes",
        action="store_true",
        help="merge models of different types, if their tensors fit",
    )
    parser.add_argument(
        "--ignore-unknown",
        action="store_true",
        help="leave out keys and parameters of the recipe that are not known",
    )
    add_methods_option(parser)
    add_json_option(parser)


def add_run_options(parser: Parser, *, recipe: bool = True) -> None:
    """Add the options that `merge` and `sweep` share; of those without a `recipe`, the others."""
    add_plan_options(parser, recipe=recipe)
    parser.add_argument(
        "--read-path", choices=READ_PATHS, default="auto", help="how input files are read (auto)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that is in the output directory"
    )
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="keep nothing of a run that is interrupted, and go on with nothing",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="remove what an interrupted run has finished, instead of going on with it",
    )
    parser.add_argument(
        "--no-digests",
        action="store_true",
        help="leave digests and statistics of the tensors out of the manifest, oxmerge.json; "
        "then an interrupted run keeps nothing",
    )
    add_finishing_options(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def add_finishing_options(parser: Parser) -> None:
    """Add the options of who completes an output."""
    parser.add_argument(
        "--hash-inputs",
        action="store_true",
        help="put the SHA-256 of every input file into the manifest: reads them once more",
    )
    parser.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="keep NaN and infinity that come up where no input has them",
    )


def run_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that `merge` and `sweep` share, without those not given."""
    return {
        **plan_options(options),
        "overwrite": options.overwrite,
        "read_path": options.read_path,
        "resume": not options.no_resume,
        "fresh": options.fresh,
        "digests": not options.no_digests,
        "hash_inputs": options.hash_inputs,
        "allow_nonfinite": options.allow_nonfinite,
    }


def add_methods_option(parser: Parser) -> None:
    """Add `--allow-methods`."""
    parser.add_argument(
        "--allow-methods",
        metavar="MODULE",
        action="append",
        help="import this module, which runs its code, for a method MODULE:NAME; may be repeated",
    )


def add_json_option(parser: Parser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def plan_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the shared options as keyword arguments, without those not given."""
    if options.vram is not None and options.device in {None, "cpu"}:
        raise UsageError(
            "`--vram` has no effect on the CPU", "add `--device cuda`, or leave `--vram` out"
        )
    given = {
        "memory": options.memory,
        "threads": options.threads,
        "device": options.device,
        "vram": options.vram,
        "stream": options.stream or None,
        "spool": options.spool,
        "seed": options.seed,
        "shard_size": options.shard_size,
        "allow_mismatch": options.allow_mismatch or None,
        "ignore_unknown": options.ignore_unknown or None,
        "allow_methods": options.allow_methods,
    }
    return {
        "strict": options.strict,
        **{name: value for name, value in given.items() if value is not None},
    }
