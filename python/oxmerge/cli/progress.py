"""Progress: a bar where someone watches, a line now and then where not.

Both say the same: how much of the output is written, how fast data moves, how long it will take,
what is being merged, and the peak memory.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager

from oxmerge.problems import printable
from oxmerge.sizes import format_duration, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oxmerge.cli.engine import Progress
    from oxmerge.cli.printer import Printer
    from oxmerge.merging import Snapshot

_SECONDS_BETWEEN_LINES = 5.0
_LONGEST_NAME = 36


@contextmanager
def show_progress(printer: Printer) -> Iterator[Progress | None]:
    """Yield the callback that shows progress, or None where nobody wants it."""
    if printer.quiet or os.environ.get("OXMERGE_NO_PROGRESS"):
        yield None
    elif printer.is_terminal:
        with _bar(printer) as callback:
            yield callback
    else:
        yield PlainProgress(printer.say)


class PlainProgress:
    """A line every few seconds.

    Parameters
    ----------
    say
        Prints a line.
    clock
        Seconds, from any start.
    """

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.say = say
        self.clock = clock
        self.started = self.spoken = clock()

    def __call__(self, snapshot: Snapshot) -> None:
        """Show a snapshot, if the last one was a while ago."""
        now = self.clock()
        if now - self.spoken < _SECONDS_BETWEEN_LINES:
            return
        self.spoken = now
        self.say(progress_line(snapshot, now - self.started))


def progress_line(snapshot: Snapshot, seconds: float) -> str:
    """Return everything about a snapshot in one line."""
    share = 100 * snapshot.bytes_done // max(snapshot.bytes_total, 1)
    done, total = format_size(snapshot.bytes_done), format_size(snapshot.bytes_total)
    memory = format_size(snapshot.peak_memory, binary=True)
    return (
        f"{share:3d}%  {done} of {total}  {format_rate(_moved(snapshot), seconds)}  "
        f"{_left(snapshot, seconds)} left  peak {memory}  {snapshot.tensor}"
    )


def format_rate(size: int, seconds: float) -> str:
    """Return bytes by time as GB/s."""
    return f"{size / max(seconds, 1e-9) / 1e9:.2f} GB/s"


def _moved(snapshot: Snapshot) -> int:
    return snapshot.bytes_read + snapshot.bytes_done


def _left(snapshot: Snapshot, seconds: float) -> str:
    if snapshot.bytes_done == 0:
        return "?"
    remaining = snapshot.bytes_total - snapshot.bytes_done
    return format_duration(seconds * remaining / snapshot.bytes_done)


@contextmanager
def _bar(printer: Printer) -> Iterator[Progress]:
    from rich import console as consoles  # noqa: PLC0415 - heavy
    from rich import progress as bars  # noqa: PLC0415 - heavy
    from rich.markup import escape  # noqa: PLC0415 - heavy

    console = consoles.Console(file=printer.messages, no_color=not printer.has_colour)
    columns = (
        bars.TextColumn("{task.percentage:3.0f}%"),
        bars.BarColumn(bar_width=20),
        bars.TextColumn("{task.fields[figures]}"),
        bars.TextColumn("[dim]{task.fields[tensor]}"),
    )
    started = time.monotonic()
    # Refreshed with each snapshot, so that it needs no thread of its own, which may not be had.
    with bars.Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("merge", total=None, figures="", tensor="")

        def show(snapshot: Snapshot) -> None:
            seconds = time.monotonic() - started
            figures = (
                f"{format_size(snapshot.bytes_done)} of {format_size(snapshot.bytes_total)}  "
                f"{format_rate(_moved(snapshot), seconds)}  {_left(snapshot, seconds)} left  "
                f"peak {format_size(snapshot.peak_memory, binary=True)}"
            )
            bar.update(
                task,
                completed=snapshot.bytes_done,
                total=snapshot.bytes_total,
                figures=figures,
                tensor=escape(printable(snapshot.tensor)[-_LONGEST_NAME:]),
                refresh=True,
            )

        yield show
