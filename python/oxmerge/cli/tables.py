"""Tables for people."""

from __future__ import annotations

import io
import shutil
from itertools import islice

from oxmerge.problems import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from oxmerge.cli.printer import Printer

#: Columns where nobody says how many there are: a file, a pipe.
_WIDE = 160
#: Rows that are laid out together. There may be 100,000.
_AT_ONCE = 1000


def print_table(
    printer: Printer, title: str, head: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print rows as a table: names on the left, numbers on the right."""
    from rich.console import Console  # noqa: PLC0415 - heavy
    from rich.table import Table  # noqa: PLC0415 - heavy
    from rich.text import Text  # noqa: PLC0415 - heavy

    left = iter(rows)
    while part := list(islice(left, _AT_ONCE)):
        table = Table(title=title, title_justify="left", title_style="bold", box=None)
        for at, name in enumerate(head):
            table.add_column(name, justify="right" if at else "left", no_wrap=at > 0)
        for row in part:
            # A stranger's names are no markup.
            table.add_row(*(Text(printable(cell), overflow="fold") for cell in row))
        buffer = io.StringIO()
        width = shutil.get_terminal_size((_WIDE, 0)).columns
        Console(file=buffer, width=width, highlight=False).print(table)
        printer.data("\n".join(map(str.rstrip, buffer.getvalue().split("\n"))))
