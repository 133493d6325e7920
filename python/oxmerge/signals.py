"""Signals that ask a program to end: Ctrl-C, a closed terminal, `kill`, a scheduler's time limit.

The command line lets each of them end a verb by an exception, so that what is unfinished is
removed on the way out. The library sets no handlers of its own: only where stopping half way would
leave neither the old nor the new, it puts signals off.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import ExitStack, contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Ended", "ending", "put_off"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
#: Signals that come together are one: a service manager sends SIGTERM and SIGHUP at once, and the
#: second must not interrupt the cleaning up that the first began.
_SECONDS_TOGETHER = 1.0


class Ended(KeyboardInterrupt):
    """A signal asks the program to end.

    Parameters
    ----------
    number : int
        Which signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


@contextmanager
def ending() -> Iterator[None]:
    """Raise `Ended` where a signal would end the program at once.

    Signals that are ignored, as by `nohup`, stay ignored, and handlers of others stay theirs.
    """
    last = -_SECONDS_TOGETHER

    def end(number: int, _: object) -> None:
        nonlocal last
        now = time.monotonic()
        is_another = now - last >= _SECONDS_TOGETHER
        last = now
        if is_another:
            raise Ended(number)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    with ExitStack() as stack:
        for number in _SIGNALS if _can_handle() else ():
            if signal.getsignal(number) in usual:
                _handle(stack, number, end)
        try:
            yield
        except Exception as error:
            # What comes up while a class is made, in a module that is imported, is raised as
            # another error by Python 3.11; and what ends may meet an error on its way out.
            if (ended := _ended(error)) is not None:
                raise ended from None
            raise


def _ended(error: BaseException) -> Ended | None:
    """Return the signal that an error came from, or came after, if there was one."""
    before: BaseException | None = error
    while before is not None and not isinstance(before, Ended):
        before = before.__cause__ or before.__context__
    return before


@contextmanager
def put_off() -> Iterator[None]:
    """Put off the signals that end a program until the block is over.

    Only the main thread can do that; elsewhere this does nothing.
    """
    pending: dict[int, None] = {}

    def note(number: int, _: object) -> None:
        pending[number] = None

    try:
        with ExitStack() as stack:
            for number in _SIGNALS if _can_handle() else ():
                # A handler that another program's own code has set, with Python inside it, is left
                # alone: Python could not put it back.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    _handle(stack, number, note)
            yield
    finally:
        for each in pending:
            signal.raise_signal(each)


def _can_handle() -> bool:
    return threading.current_thread() is threading.main_thread()


def _handle(stack: ExitStack, number: int, handler: signal.Handlers | object) -> None:
    # In this order, so that no signal between the two leaves our handler behind.
    stack.callback(signal.signal, number, signal.getsignal(number))
    signal.signal(number, handler)  # type: ignore[arg-type]
