"""Storage: reads and writes of one file; the floor of a merge: its bytes, moved the fastest way.

How that is fastest differs from machine to machine, so a few ways are tried, and the best one is
the floor.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from oxmerge.bench import cache
from oxmerge.bench.crew import pieces_of
from oxmerge.bench.machine import cores
from oxmerge.bench.measure import Job, Taken, UnavailableError, timed
from oxmerge.bench.record import Row
from oxmerge.bench.transfer import BUFFERED, DIRECT, MAPPED, Transfer, Way

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from oxmerge.bench.crew import Crews

_PIECE = 4 << 20
_PIECES = (4 << 20, 8 << 20)
_FINAL_ROUNDS = 2
_READS = {
    "cold": (BUFFERED, False),
    "warm": (BUFFERED, True),
    "direct": (DIRECT, False),
    "mapped, cold": (MAPPED, False),
    "mapped, warm": (MAPPED, True),
}
"""Ways to read, and whether the page cache holds the file."""
_WRITES = {
    "buffered, flushed": BUFFERED,
    "direct, flushed": DIRECT,
    "mapped, flushed": MAPPED,
}


def storage_jobs(folder: Path, size: int, crews: Crews) -> Iterator[Job]:
    """Yield the reads and writes of a file of `size` bytes in `folder`, by one thread and by many.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    source, target = folder / "read.bin", folder / "written.bin"
    size -= size % _PIECE
    _fill(source, size)

    def read(state: str, threads: int) -> Job:
        reads, cached = _READS[state]
        row = Row("storage", "read", "system", state, size, 0, threads)
        move = Transfer([size], [[source]], []).ready(Way(threads, _PIECE, reads), crews)
        return Job(row, timed(move), lambda: cache.bring([source], cached=cached))

    def write(state: str, threads: int) -> Job:
        row = Row("storage", "write", "system", state, 0, size, threads)
        way = Way(threads, _PIECE, writes=_WRITES[state])
        move = Transfer([size], [], [[target]]).ready(way, crews)
        return Job(row, timed(move), lambda: _clear([target]))

    counts = (1, cores() + 6)
    for state in _READS:
        yield from (read(state, threads) for threads in counts)
    for state in _WRITES:
        yield from (write(state, threads) for threads in counts)


class Floor:
    """The floor of a merge: its bytes moved in the fastest way that was found.

    Parameters
    ----------
    transfer
        What is read and written.
    prepare
        Brings the inputs into the state that is measured.
    crews
        Whose threads move them.
    """

    def __init__(self, transfer: Transfer, prepare: Callable[[], None], crews: Crews) -> None:
        self.transfer = transfer
        self._prepare = prepare
        self._crews = crews

    def prepare(self) -> None:
        """Remove the output of the run before, and bring the inputs into their state."""
        _clear([path for output in self.transfer.outputs for path in output])
        self._prepare()

    def ready(self, way: Way) -> Callable[[], Taken]:
        """Return what runs it once."""
        return timed(self.transfer.ready(way, self._crews))

    def best_way(self, *, cold: bool, say: Callable[[str], None]) -> Way:
        """Return a fast way.

        One choice after the other is tried, and the better one kept; then the best two once more,
        so that a slow moment does not decide.

        Raises
        ------
        UnavailableError
            If there is none, because the inputs' state cannot be had or no way works.
        """
        times: dict[Way, float] = {}

        def time_one(way: Way) -> None:
            say(f"calibrating the floor: {way.words}")
            try:
                self.prepare()
                seconds = self.ready(way)().seconds
            except UnavailableError:
                seconds = math.inf
            times[way] = min(seconds, times.get(way, math.inf))

        best = Way(cores() + 6, _PIECES[-1])
        for choice in _choices(cold=cold):
            ways = choice(best)
            for way in ways:
                if way not in times:
                    time_one(way)
            best = min(ways, key=times.__getitem__)
        if times[best] == math.inf:
            self.prepare()  # it says why, if it is that
            raise UnavailableError("no way to read and write works")
        finalists = sorted(times, key=times.__getitem__)[:2]
        for way in finalists * _FINAL_ROUNDS:
            time_one(way)
        return min(finalists, key=times.__getitem__)


def _choices(*, cold: bool) -> Iterator[Callable[[Way], list[Way]]]:
    """Yield what is tried from a way. Reads past the page cache help only where that is cold."""
    yield lambda way: [way, replace(way, writes=DIRECT)]
    if cold:
        yield lambda way: [way, replace(way, reads=DIRECT)]
    counts = (cores() + 6, cores(), 2 * cores())
    yield lambda way: [replace(way, threads=count) for count in counts]
    yield lambda way: [replace(way, piece=piece) for piece in _PIECES]


def _clear(paths: Sequence[Path]) -> None:
    """Remove files and let the disk rest, so that no run pays for the one before it."""
    for path in paths:
        path.unlink(missing_ok=True)
    os.sync()


def _fill(path: Path, size: int) -> None:
    """Write bytes that no file system can compress or share, and flush them."""
    random = np.random.Generator(np.random.SFC64(0))
    with path.open("wb") as file:
        for _, length in pieces_of(size, _PIECE):
            file.write(random.bytes(length))
        file.flush()
        os.fsync(file.fileno())
