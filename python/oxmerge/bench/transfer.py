"""Reads inputs and writes outputs, side by side, and computes nothing.

With inputs or outputs alone it measures storage; with both it is the floor of a merge: every byte
of every input is read, every byte of the outputs written and flushed, which any merge of these
files must do. It has none of the engine's code. Threads take pieces of the output, read the same
place of every model, and write what the last one held.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from oxmerge.bench.crew import pieces_of, take
from oxmerge.bench.measure import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from oxmerge.bench.crew import Crew, Crews

BUFFERED, DIRECT, MAPPED = "buffered", "direct", "mapped"
_PAGE = 4096
_STEP = 1 << 20  # bytes of an input read at a time: they stay in the second-level cache


@dataclass(frozen=True, slots=True)
class Way:
    """How bytes are moved: threads, bytes of a piece, and how files are read and written."""

    threads: int
    piece: int
    reads: str = BUFFERED
    writes: str = BUFFERED

    @property
    def words(self) -> str:
        """It as people say it."""
        return (
            f"{self.threads} threads, {self.piece >> 20} MiB pieces, "
            f"{self.reads} reads, {self.writes} writes"
        )


@dataclass(frozen=True, slots=True)
class Transfer:
    """What is read and written.

    Attributes
    ----------
    sizes
        Bytes of each file of a model; those of all models and outputs are the same.
    models
        The files of each model that is read.
    outputs
        The files of each model that is written; none of them may be there.
    """

    sizes: Sequence[int]
    models: Sequence[Sequence[Path]]
    outputs: Sequence[Sequence[Path]]

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs."""
        return len(self.models) * sum(self.sizes)

    @property
    def bytes_written(self) -> int:
        """Bytes of all outputs."""
        return len(self.outputs) * sum(self.sizes)

    def ready(self, way: Way, crews: Crews) -> Callable[[], None]:
        """Return what does it once, from the first open to the last fsync.

        Raises
        ------
        UnavailableError
            By what is returned, if the file system cannot do it, or not all bytes were moved.
        """
        crew = crews.of(way.threads)
        buffers = crew.buffers("piece", way.piece)
        # Past the page cache, every read waits for the disk: then a whole piece at a time.
        step = way.piece if way.reads == DIRECT else min(_STEP, way.piece)
        scratch = crew.buffers("step", step)

        def run() -> None:
            try:
                moved = self._move(way, crew, buffers, scratch)
            except OSError as error:
                if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
                    raise
                raise UnavailableError("this file system cannot do it") from error
            if moved != self.bytes_read + self.bytes_written:
                total = self.bytes_read + self.bytes_written
                raise UnavailableError(f"only {moved} of {total} bytes were moved")

        return run

    def _move(
        self, way: Way, crew: Crew, buffers: Sequence[memoryview], scratch: Sequence[memoryview]
    ) -> int:
        with ExitStack() as stack:
            inputs = [
                [
                    _Input(stack, path, size, way.reads)
                    for path, size in zip(model, self.sizes, strict=True)
                ]
                for model in self.models
            ]
            outputs = [
                [
                    _Output(stack, path, size, way.writes)
                    for path, size in zip(model, self.sizes, strict=True)
                ]
                for model in self.outputs
            ]
            pieces = deque(
                (file, start, length)
                for file, size in enumerate(self.sizes)
                for start, length in pieces_of(size, way.piece)
            )

            def work(number: int) -> int:
                buffer, small = buffers[number], scratch[number]
                moved = 0
                for file, start, length in take(pieces):
                    for model in inputs[:-1]:
                        for offset, part in pieces_of(length, len(small)):
                            moved += model[file].read(small, start + offset, part)
                    for model in inputs[-1:]:
                        moved += model[file].read(buffer, start, length)
                    for output in outputs:
                        moved += output[file].write(buffer[:length], start)
                return moved

            moved = crew.run(work)
            for output in outputs:
                for target in output:
                    target.flush()
        return moved


class _Input:
    def __init__(self, stack: ExitStack, path: Path, size: int, how: str) -> None:
        self.size = size
        self.file = os.open(path, os.O_RDONLY | (os.O_DIRECT if how == DIRECT else 0))
        stack.callback(os.close, self.file)
        self.view = None
        if how == MAPPED:
            mapped = stack.enter_context(mmap.mmap(self.file, size, access=mmap.ACCESS_READ))
            self.view = stack.enter_context(memoryview(mapped))

    def read(self, buffer: memoryview, start: int, length: int) -> int:
        """Read a piece. Past the page cache whole pages must be asked for, also at a file's end."""
        if self.view is not None:
            return _copy(buffer[:length], self.view[start : start + length])
        asked = len(buffer) if start + length == self.size else length
        return os.preadv(self.file, [buffer[:asked]], start)


class _Output:
    """A file that is written. Whole pages are written directly, what is left over is not."""

    def __init__(self, stack: ExitStack, path: Path, size: int, how: str) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self.file = self.direct = os.open(path, flags, 0o600)
        stack.callback(os.close, self.file)
        self.mapped, self.view = None, None
        if how == DIRECT:
            self.direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
            stack.callback(os.close, self.direct)
            # Writes that do not make the file longer go on at the same time.
            os.posix_fallocate(self.file, 0, size)
        if how == MAPPED:
            os.truncate(self.file, size)
            self.mapped = stack.enter_context(mmap.mmap(self.file, size))
            self.view = stack.enter_context(memoryview(self.mapped))

    def write(self, data: memoryview, start: int) -> int:
        if self.view is not None:
            return _copy(self.view[start : start + len(data)], data)
        whole = len(data) & -_PAGE if self.direct != self.file else 0
        written = os.pwritev(self.direct, [data[:whole]], start) if whole else 0
        if whole < len(data):
            written += os.pwritev(self.file, [data[whole:]], start + whole)
        return written

    def flush(self) -> None:
        if self.mapped is not None:
            self.mapped.flush()
        os.fsync(self.file)


def _copy(target: memoryview, source: memoryview) -> int:
    """Copy by NumPy, which releases the GIL; return how many bytes."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
    return len(source)
