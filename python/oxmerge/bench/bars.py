"""The bars in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from oxmerge.bench.panels import panels

if TYPE_CHECKING:
    from typing import TextIO

    from oxmerge.bench.panels import Bar, Panel
    from oxmerge.bench.record import Record

_LENGTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_COLOURS = {"oxmerge": "blue", "mergekit": "yellow"}


def print_bars(record: Record, output: TextIO) -> None:
    """Print the chart of a record."""
    console = Console(file=output, highlight=False)
    for panel in panels(record):
        line = f"  (│ {panel.line}; % of it)" if panel.line else ""
        title = panel.title + line
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        for bar in panel.bars:
            table.add_row(bar.label, _drawn(bar, panel.most), bar.text)
        table.add_row("", _axis(panel), "GB/s")
        console.print(table)


def _drawn(bar: Bar, most: float) -> Text:
    """Return the bar itself, to an eighth of a character, and its line."""
    eighths = max(round(8 * _LENGTH * bar.value / most), 1)
    whole, rest = divmod(eighths, 8)
    text = Text("█" * whole + (_EIGHTHS[rest] if rest else ""))
    text.stylize(_COLOURS.get(bar.by, "bright_black"))
    if bar.line is not None:
        at = min(round(_LENGTH * bar.line / most), _LENGTH)
        text.pad_right(max(at + 1 - len(text), 0))
        text = Text.assemble(text[:at], "│", text[at + 1 :])
    return text


def _axis(panel: Panel) -> str:
    """Return the numbers of the scale, each where it belongs."""
    text = ""
    for tick in panel.ticks:
        at = round(_LENGTH * tick / panel.most)
        if at >= len(text):
            text = f"{text:<{at}}{tick:g}"
    return text
