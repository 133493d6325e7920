"""Tables for people."""

from __future__ import annotations

import shutil
from itertools import islice

from oxmerge.problems import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from oxmerge.cli.printer import Printer

#: Columns where nobody says how many there are: a file, a pipe.
_WIDE = 160
#: Characters of names that are shown in a line, however narrow the terminal is.
_LEAST = 16
#: Rows that are laid out together. There may be 100,000, for which `rich` takes seconds.
_AT_ONCE = 1000


def print_table(
    printer: Printer, title: str, head: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print rows as a table: names on the left, numbers on the right."""
    left = iter(rows)
    while part := list(islice(left, _AT_ONCE)):
        printer.lines([title, *_laid_out([head, *part]), ""])


def _laid_out(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    # A stranger's names may be of any length: a long one goes over several lines.
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    room = shutil.get_terminal_size((_WIDE, 0)).columns
    widths[0] = min(widths[0], max(_LEAST, room - sum(width + 2 for width in widths[1:]) - 1))
    for name, *numbers in cells:
        starts = range(0, len(name), widths[0])
        first, *rest = [name[at : at + widths[0]] for at in starts] or [""]
        aligned = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        yield " " + "  ".join([first.ljust(widths[0]), *aligned])
        yield from (f" {line}" for line in rest)
