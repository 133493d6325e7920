"""The bars in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from oxmerge.bench.panels import panels

if TYPE_CHECKING:
    from typing import TextIO

    from oxmerge.bench.panels import Bar
    from oxmerge.bench.record import Record

_LENGTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_COLOURS = {"oxmerge": "blue", "mergekit": "yellow"}


def print_bars(record: Record, output: TextIO) -> None:
    """Print the chart of a record."""
    console = Console(file=output, highlight=False)
    for panel in panels(record):
        table = Table(title=panel.title, title_justify="left", box=None, show_header=False)
        for bar in panel.bars:
            table.add_row(bar.label, _drawn(bar, panel.most), bar.text)
        console.print(table)


def _drawn(bar: Bar, most: float) -> Text:
    """Return the bar itself, to an eighth of a character."""
    eighths = max(round(8 * _LENGTH * bar.value / most), 1)
    whole, rest = divmod(eighths, 8)
    text = "█" * whole + (_EIGHTHS[rest] if rest else "")
    return Text(text, style=_COLOURS.get(bar.by, "bright_black"))
