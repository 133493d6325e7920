"""Tell whether the output of a merge is what was made; write nothing.

By the digests in its manifest, `oxmerge.json`; or, with `--recompute`, by computing it again. The
exit code is 0 if it is equal, 1 if it differs, and 2 if that could not be checked.
"""

from __future__ import annotations

import argparse
import re

from oxmerge.cli.arguments import (
    Parser,
    UsageError,
    add_json_option,
    add_methods_option,
    add_resource_options,
    natural,
)
from oxmerge.cli.progress import show_progress
from oxmerge.problems import shown, without_hint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from oxmerge.checking.verification import Verification
    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer

EQUAL, DIFFERENT = 0, 1
_SHARE = re.compile(r"(?a:(\d{1,3}(?:\.\d{1,6})?)(%?))")


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument("directory", metavar="OUT", help="the output of a merge")
    parser.add_argument(
        "--recompute", action="store_true", help="compute the tensors again, and compare bytes"
    )
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="what to compute again, if not what the manifest says"
    )
    parser.add_argument(
        "--sample",
        type=_share,
        default=1.0,
        metavar="SHARE",
        help="look at so many of the bytes only, such as 1%%: whole tensors, at random",
    )
    parser.add_argument(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="chooses the sample; with --recipe, also the seed that the merge had (0)",
    )
    add_methods_option(parser)
    add_resource_options(parser)
    add_json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print no progress")


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Check the output and tell what differs."""
    if options.recipe is not None and not options.recompute:
        raise UsageError("`--recipe` is of use with `--recompute` only", "add `--recompute`")
    given = {
        "recompute": options.recompute,
        "sample": options.sample,
        "seed": options.seed,
        "allow_methods": options.allow_methods or (),
        "memory": options.memory,
        "threads": options.threads,
    }
    with show_progress(printer) as progress:
        found = engine.verify(
            options.directory, options.recipe, **given, progress=progress or False
        )
    if printer.as_json:
        printer.json(found.as_dict())
    else:
        printer.lines(_lines(found))
    return EQUAL if found.is_equal else DIFFERENT


def _lines(found: Verification) -> Iterator[str]:
    for all_of_them in (found.problems, found.deviations):
        told, more = shown(all_of_them)
        for each in told:
            text, hint = without_hint(each)
            yield text
            if hint:
                yield f"  hint: {hint}"
        if more is not None:
            yield more
    yield from (f"note: {note}" for note in found.notes)
    yield found.verdict


def _share(text: str) -> float:
    """Parse a share such as `1%` or `0.01`, for an argument."""
    match = _SHARE.fullmatch(text)
    share = 0.0 if match is None else float(match[1]) / (100 if match[2] else 1)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"`{text}` is no share: write 1%, or 0.01")
    return share
