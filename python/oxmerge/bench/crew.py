"""Python threads for the yardsticks: they call the system, which works without the GIL."""

from __future__ import annotations

import mmap
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from threading import Barrier
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
        self._buffers: dict[tuple[str, int], list[memoryview]] = {}
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

    def buffers(self, use: str, size: int) -> list[memoryview]:
        """Return a buffer for each thread; for one use and size always the same ones."""
        if (use, size) not in self._buffers:
            made = [_aligned_buffer(size) for _ in range(self.threads)]
            self._buffers[use, size] = made
        return self._buffers[use, size]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._others.shutdown()


class Crews(ExitStack):
    """The crews of one go: one for each number of threads, made when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, Crew] = {}

    def of(self, threads: int) -> Crew:
        """Return the crew with that many threads."""
        if threads not in self._made:
            self._made[threads] = self.enter_context(Crew(threads))
        return self._made[threads]


def take(pieces: deque[Piece]) -> Iterator[Piece]:
    """Yield pieces until none is left. Threads may take from the same ones."""
    with suppress(IndexError):
        while True:
            yield pieces.popleft()


def pieces_of(size: int, piece: int) -> deque[tuple[int, int]]:
    """Return where each piece of `size` bytes begins, and how long it is."""
    return deque((start, min(piece, size - start)) for start in range(0, size, piece))


def _aligned_buffer(size: int) -> memoryview:
    """Return a buffer that begins at a page, as reads and writes past the page cache need.

    It is of huge pages where there are some: a direct write has to look up every page. Every page
    was written to, so that none is faulted in on the clock.
    """
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, size, mmap.PAGESIZE):
        buffer[start] = 1
    return memoryview(buffer)
