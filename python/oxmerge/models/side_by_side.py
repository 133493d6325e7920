"""Questions to servers, several at a time, of which nobody waits for more than needed."""

from __future__ import annotations

from collections import deque
from threading import Thread
from typing import TypeVar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

__all__ = ["side_by_side"]

#: Servers are asked by so many threads.
_THREADS = 8
#: Seconds between looks at how far it is.
_GLANCE = 0.1


def side_by_side(
    ask: Callable[[Asked], Answer],
    items: Iterable[Asked],
    glance: Callable[[], None] | None = None,
) -> list[Answer]:
    """Return what `ask` returns for each item, in their order.

    After a failure, or Ctrl-C, what has not begun does not begin, and what has is not waited for:
    a server may be silent for minutes, and must not keep the process.

    Parameters
    ----------
    ask : callable
        Is called in other threads.
    items : iterable
        What it is called with.
    glance : callable, optional
        Is called in this thread ten times a second meanwhile.
    """
    from concurrent.futures import Future, wait  # noqa: PLC0415 - seldom needed, and with it logging

    todo: deque[tuple[Asked, Future[Answer]]] = deque((item, Future()) for item in items)
    answers = [answer for _, answer in todo]

    def work() -> None:
        while True:
            try:
                item, answer = todo.popleft()
            except IndexError:
                return
            try:
                answer.set_result(ask(item))
            except BaseException as error:  # noqa: BLE001 - it is raised by who waits
                answer.set_exception(error)

    try:
        for _ in range(min(_THREADS, len(answers))):
            Thread(target=work, daemon=True, name="oxmerge-ask").start()
        for answer in answers:
            while glance is not None and wait([answer], _GLANCE).not_done:
                glance()
            answer.result()  # which raises what it met
        return [answer.result() for answer in answers]
    finally:
        todo.clear()
