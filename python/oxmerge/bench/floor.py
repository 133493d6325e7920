"""The floor of a merge: the same bytes read and written and flushed, and nothing computed.

It has none of the engine's code: Python threads take pieces of the output, read the same place of
every model, and write what the last one held. How that is fastest differs from machine to machine,
so a few ways are tried, and the best is the floor.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from oxmerge.bench.crew import Crew, aligned_buffers, pieces_of, take, touch
from oxmerge.bench.measure import Taken, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

_PIECES = (2 << 20, 8 << 20)
_STEP = 1 << 20  # bytes of an input read at a time: they stay in the second-level cache


@dataclass(frozen=True, slots=True)
class Way:
    """How the floor runs."""

    threads: int
    piece: int
    direct_reads: bool
    direct_writes: bool

    @property
    def words(self) -> str:
        """It as people say it."""
        reads = "direct" if self.direct_reads else "buffered"
        writes = "direct" if self.direct_writes else "buffered"
        return (
            f"{self.threads} threads, {self.piece >> 20} MiB pieces, {reads} reads, {writes} writes"
        )


class Floor:
    """The floor of the merges of some models.

    Parameters
    ----------
    models
        The weight files of each model. All models have files of the same sizes.
    folder
        Where the output goes; it is made, and its files are replaced.
    """

    def __init__(self, models: Sequence[Sequence[Path]], folder: Path) -> None:
        self.models = models
        self.folder = folder
        self.sizes = [path.stat().st_size for path in models[0]]

    @property
    def bytes_written(self) -> int:
        """Bytes of the output."""
        return sum(self.sizes)

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs."""
        return len(self.models) * self.bytes_written

    def clear(self) -> None:
        """Remove the output of the run before, and let the disk rest."""
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            path.unlink()
        os.sync()

    def run(self, way: Way) -> Taken:
        """Run once, from the first open to the last fsync.

        Raises
        ------
        UnavailableError
            If the file system has no direct reads or writes and the way needs them.
        """
        outputs = [self.folder / path.name for path in self.models[0]]
        buffers = aligned_buffers(way.threads, way.piece)
        scratch = aligned_buffers(way.threads, min(_STEP, way.piece))
        touch(buffers)
        touch(scratch)
        with Crew(way.threads) as crew:
            started = time.perf_counter()
            try:
                moved = self._move(way, crew, outputs, list(zip(buffers, scratch, strict=True)))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise UnavailableError("this file system has no direct reads or writes") from error
            seconds = time.perf_counter() - started
        if moved != self.bytes_read + self.bytes_written:
            raise UnavailableError(f"the floor moved {moved} bytes, not all")
        return Taken(seconds)

    def best_way(
        self, prepare: Callable[[], None], cores: int, *, cold: bool, say: Callable[[str], None]
    ) -> Way:
        """Return a fast way: one choice after the other is tried, the better one kept.

        Raises
        ------
        UnavailableError
            If there is none, because `prepare` cannot do its part or no way works.
        """
        times: dict[Way, float] = {}
        way = Way(cores + 6, _PIECES[-1], direct_reads=False, direct_writes=False)
        for choice in _choices(cores, cold=cold):
            ways = choice(way)
            for each in ways:
                if each not in times:
                    say(f"merge: calibrating the floor: {each.words}")
                    times[each] = self._time(each, prepare)
            way = min(ways, key=times.__getitem__)
        if times[way] == math.inf:
            prepare()  # it says why, if it is that
            raise UnavailableError("no way to read and write works")
        return way

    def _time(self, way: Way, prepare: Callable[[], None]) -> float:
        """Return the seconds of a way; infinity if it does not work here."""
        try:
            prepare()
            self.clear()
            return self.run(way).seconds
        except UnavailableError:
            return math.inf

    def _move(
        self,
        way: Way,
        crew: Crew,
        outputs: Sequence[Path],
        buffers: Sequence[tuple[memoryview, memoryview]],
    ) -> int:
        """Read every input, write the output and flush it; return the bytes moved."""
        read_flags = os.O_RDONLY | (os.O_DIRECT if way.direct_reads else 0)
        sources = [[os.open(path, read_flags) for path in model] for model in self.models]
        targets = [
            _Target(path, size, direct=way.direct_writes)
            for path, size in zip(outputs, self.sizes, strict=True)
        ]
        try:
            pieces = deque(
                (file, start, length)
                for file, size in enumerate(self.sizes)
                for start, length in pieces_of(size, way.piece)
            )
            *others, last = sources

            def work(number: int) -> int:
                buffer, scratch = buffers[number]
                moved = 0
                for file, start, length in take(pieces):
                    for model in others:
                        for offset, step in pieces_of(length, len(scratch)):
                            moved += _read(
                                model[file], scratch, start + offset, step, self.sizes[file]
                            )
                    moved += _read(last[file], buffer, start, length, self.sizes[file])
                    moved += targets[file].write(buffer[:length], start)
                return moved

            moved = crew.run(work)
            for target in targets:
                target.flush()
        finally:
            for descriptor in itertools.chain(*sources):
                os.close(descriptor)
            for target in targets:
                target.close()
        return moved


class _Target:
    """A file of the output. Whole pages are written directly, what is left over is not."""

    def __init__(self, path: Path, size: int, *, direct: bool) -> None:
        self.plain = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self.direct = os.open(path, os.O_WRONLY | os.O_DIRECT) if direct else self.plain
        if direct:
            # Writes that do not make the file longer go on at the same time.
            os.posix_fallocate(self.plain, 0, size)

    def write(self, data: memoryview, start: int) -> int:
        whole = len(data) & -4096 if self.direct != self.plain else 0
        written = os.pwritev(self.direct, [data[:whole]], start) if whole else 0
        if whole < len(data):
            written += os.pwritev(self.plain, [data[whole:]], start + whole)
        return written

    def flush(self) -> None:
        os.fsync(self.plain)

    def close(self) -> None:
        if self.direct != self.plain:
            os.close(self.direct)
        os.close(self.plain)


def _read(descriptor: int, buffer: memoryview, start: int, length: int, size: int) -> int:
    """Read a piece. Past the page cache whole pages must be asked for, also at a file's end."""
    asked = len(buffer) if start + length == size else length
    return os.preadv(descriptor, [buffer[:asked]], start)


def _choices(cores: int, *, cold: bool) -> Iterator[Callable[[Way], list[Way]]]:
    """Yield what is tried from a way. Reads past the page cache help only where that is cold."""
    yield lambda way: [way, replace(way, direct_writes=True)]
    if cold:
        yield lambda way: [way, replace(way, direct_reads=True)]
    yield lambda way: [replace(way, threads=count) for count in (way.threads, cores, 2 * cores)]
    yield lambda way: [replace(way, piece=piece) for piece in _PIECES]
