"""Python threads for the yardsticks: they call NumPy and the system, which release the GIL."""

from __future__ import annotations

import mmap
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Barrier
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Piece = TypeVar("Piece")


class Crew:
    """Threads that live as long as the crew, so that starting them is on nobody's clock.

    The calling thread is one of them: where it only waited, two of the others would often be put on
    the same core, and the yardstick would be too slow.

    Parameters
    ----------
    threads
        How many.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._others = ThreadPoolExecutor(max(threads - 1, 1))
        # Nobody is done before all have started.
        together = Barrier(threads)
        self.run(lambda _: together.wait())

    def run(self, work: Callable[[int], int]) -> int:
        """Run `work` with the number of each thread; return the sum of what it returns."""
        others = [self._others.submit(work, number) for number in range(1, self.threads)]
        try:
            done = work(0)
        finally:
            wait(others)
        return done + sum(other.result() for other in others)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._others.shutdown()


def take(pieces: deque[Piece]) -> Iterator[Piece]:
    """Yield pieces until none is left. Threads may take from the same ones."""
    with suppress(IndexError):
        while True:
            yield pieces.popleft()


def pieces_of(size: int, piece: int) -> deque[tuple[int, int]]:
    """Return where each piece of `size` bytes begins, and how long it is."""
    return deque((start, min(piece, size - start)) for start in range(0, size, piece))


def aligned_buffers(count: int, size: int) -> list[memoryview]:
    """Return buffers that begin at a page, as reads and writes past the page cache need.

    They are of huge pages where there are some: a direct write has to look up every page.
    """
    buffers = []
    for _ in range(count):
        buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, AttributeError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        buffers.append(memoryview(buffer))
    return buffers


def touch(buffers: Iterable[memoryview]) -> None:
    """Write to every page, so that no page is faulted in on the clock."""
    for buffer in buffers:
        for start in range(0, len(buffer), mmap.PAGESIZE):
            buffer[start] = 1
