"""Progress: a bar where someone watches, a line now and then where not.

Both say the same: how much of the output is written, how fast data moves, how long it will take,
what is being merged, and the peak memory. A notebook has one line, which is replaced; so has a
terminal, where it is as long as fits.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from contextlib import contextmanager
from importlib import import_module

from oxmerge.problems import printable, shorten
from oxmerge.sizes import format_duration, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from oxmerge.cli.engine import Progress
    from oxmerge.cli.printer import Printer
    from oxmerge.merging import Snapshot

_SECONDS_BETWEEN_LINES = 5.0
#: Letters of a tensor's name, at the most and at the least.
_LONGEST_NAME = 36
_SHORTEST_NAME = 12
#: Letters of the bar, and of a line that has room for one.
_BAR = 20
_WIDE = 100
#: Seconds of a merge before which its end is anyone's guess. Then estimates of its whole time are
#: compared, over so many seconds and such a share of the time that has passed, and shown if they
#: differ by no more than that.
_FIRST_GUESS = 3.0
_COMPARED = 2.0
_COMPARED_SHARE = 0.25
_SWING = 1.1


@contextmanager
def watched(
    progress: Callable[[Snapshot], None] | bool | None,  # noqa: FBT001 - as in `merge`
) -> Iterator[Progress | None]:
    """Yield the callback for what a caller of `oxmerge.merge` says of progress.

    Parameters
    ----------
    progress : callable or bool, optional
        A callback; whether to show a bar; or nothing, which shows one in a notebook alone.
    """
    if callable(progress):
        yield progress
    elif progress is False or (progress is None and not _is_notebook()):
        yield None
    else:
        from oxmerge.cli.printer import Printer  # noqa: PLC0415 - heavy

        with show_progress(Printer()) as callback:
            yield callback


@contextmanager
def watched_download() -> Iterator[Callable[[int, int, str], None] | None]:
    """Yield what shows a download in a terminal or a notebook, or None where nobody watches.

    It takes the bytes that have come, all of them, and what comes at the moment.
    """
    if not (_is_notebook() or sys.stderr.isatty()):
        yield None
        return
    from oxmerge import _core  # noqa: PLC0415 - only where someone watches
    from oxmerge.cli.printer import Printer  # noqa: PLC0415 - as above
    from oxmerge.merging import Snapshot  # noqa: PLC0415 - as above

    with show_progress(Printer()) as callback:

        def show(fetched: int, to_fetch: int, current: str) -> None:
            assert callback is not None
            callback(Snapshot(0, 0, 0, 0, current, _core.peak_memory(), fetched, to_fetch))

        yield None if callback is None else show


@contextmanager
def show_progress(printer: Printer) -> Iterator[Progress | None]:
    """Yield the callback that shows progress, or None where nobody wants it."""
    if printer.quiet or os.environ.get("OXMERGE_NO_PROGRESS"):
        yield None
    elif _is_notebook():
        with _line_in_notebook() as callback:
            yield callback
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
        self.estimate = Estimate()
        self.is_fetching = False

    def __call__(self, snapshot: Snapshot) -> None:
        """Show a snapshot, if the last one was a while ago."""
        now = self.clock()
        if _is_fetching(snapshot) is not self.is_fetching:
            self.is_fetching = not self.is_fetching
            self.started = self.spoken = now
            self.estimate = Estimate()
        left = self.estimate.left(snapshot, now - self.started)
        if now - self.spoken < _SECONDS_BETWEEN_LINES:
            return
        self.spoken = now
        self.say(progress_line(snapshot, now - self.started, left))


class Estimate:
    """How long a merge will still take, once that is more than a guess.

    The first tensors may be the largest, and are read several times before anything is written: so
    the first estimates are far off, and swing.
    """

    def __init__(self) -> None:
        self._totals: deque[tuple[float, float]] = deque()
        self._has_settled = False

    def left(self, snapshot: Snapshot, seconds: float) -> float | None:
        """Return the seconds that are left after so many; None as long as nobody can tell."""
        done, whole = _done(snapshot)
        if done == 0:
            return None
        total = seconds * whole / done
        if not self._has_settled:
            self._totals.append((seconds, total))
            while self._totals[0][0] < seconds - max(_COMPARED, _COMPARED_SHARE * seconds):
                self._totals.popleft()
            totals = [total for _, total in self._totals]
            swings = max(totals) > _SWING * min(totals)
            self._has_settled = seconds >= _FIRST_GUESS and not swings
        return total - seconds if self._has_settled else None


def progress_line(
    snapshot: Snapshot, seconds: float, left: float | None = None, width: int | None = None
) -> str:
    """Return everything about a snapshot in one line; of a width, as much as fits.

    The percentage is always there, and a name is shortened before anything is left out.
    """
    done, total = _done(snapshot)
    share, filled = 100 * done // max(total, 1), _BAR * done // max(total, 1)
    moved = done if _is_fetching(snapshot) else _moved(snapshot)
    parts = [
        "#" * filled + "-" * (_BAR - filled) if width is not None and width >= _WIDE else "",
        f"{format_size(done)} of {format_size(total)}",
        "downloaded" if _is_fetching(snapshot) else "",
        format_rate(moved, seconds),
        f"network {format_rate(snapshot.bytes_fetched, seconds)}"
        if _is_streaming(snapshot)
        else "",
        f"{'?' if left is None else format_duration(left)} left",
        f"peak {format_size(snapshot.peak_memory, binary=True)}",
    ]
    line, name = f"{share:3d}%", printable(snapshot.tensor)
    for part in filter(None, parts):
        if width is None or len(line) + 2 + len(part) <= width:
            line += "  " + part
    room = _LONGEST_NAME if width is None else min(width - len(line) - 2, _LONGEST_NAME)
    return line if room < min(_SHORTEST_NAME, len(name)) else f"{line}  {shorten(name, room)}"


def format_rate(size: int, seconds: float) -> str:
    """Return bytes by time as GB/s."""
    return f"{size / max(seconds, 1e-9) / 1e9:.2f} GB/s"


def _is_streaming(snapshot: Snapshot) -> bool:
    return snapshot.bytes_fetched > 0 and snapshot.bytes_to_fetch == 0


def _is_fetching(snapshot: Snapshot) -> bool:
    return snapshot.bytes_fetched < snapshot.bytes_to_fetch


def _done(snapshot: Snapshot) -> tuple[int, int]:
    """Return the bytes that are done, and in all, of what goes on: a download, or the merge."""
    if _is_fetching(snapshot):
        return snapshot.bytes_fetched, snapshot.bytes_to_fetch
    return snapshot.bytes_done, snapshot.bytes_total


def _moved(snapshot: Snapshot) -> int:
    return snapshot.bytes_read + snapshot.bytes_done


@contextmanager
def _bar(printer: Printer) -> Iterator[Progress]:
    from rich.console import Console  # noqa: PLC0415 - heavy
    from rich.live import Live  # noqa: PLC0415 - heavy
    from rich.text import Text  # noqa: PLC0415 - heavy

    console = Console(file=printer.messages, no_color=not printer.has_colour)
    # Without a thread of its own: each snapshot is drawn as it comes.
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def show(line: str) -> None:
            live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

        yield _drawn(show, lambda: console.width)


@contextmanager
def _line_in_notebook() -> Iterator[Progress]:
    """Yield the callback that writes one line below a notebook's cell, again and again."""
    # Notebooks have it, without the widgets that rich needs there.
    handle = import_module("IPython.display").display(_Line(""), display_id=True)
    yield _drawn(lambda line: handle.update(_Line(line)), lambda: _WIDE)
    handle.update(_Line(""))


class _Line:
    """Text as a notebook shows it: without the quotes that text has."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _drawn(show: Callable[[str], None], width: Callable[[], int]) -> Progress:
    estimate, started, was_fetching = Estimate(), time.monotonic(), False

    def callback(snapshot: Snapshot) -> None:
        nonlocal estimate, started, was_fetching
        if _is_fetching(snapshot) is not was_fetching:
            estimate, started, was_fetching = Estimate(), time.monotonic(), not was_fetching
            return
        seconds = time.monotonic() - started
        left = estimate.left(snapshot, seconds)
        show(progress_line(snapshot, seconds, left, width()))

    return callback


def _is_notebook() -> bool:
    """Tell whether this runs in a cell of a notebook (Jupyter, Colab, VS Code and their like)."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")
