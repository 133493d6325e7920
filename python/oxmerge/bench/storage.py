"""Storage: reads and writes of one file, with none of the engine's code.

A write is timed from opening the new file to the end of its fsync. A read is timed from opening the
file to the last byte in a buffer; whether the page cache held it is checked before each.
"""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from oxmerge.bench import cache
from oxmerge.bench.crew import Crew, aligned_buffers, pieces_of, take, touch
from oxmerge.bench.measure import Job, UnavailableError, timed
from oxmerge.bench.record import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

PIECE = 4 << 20
WARM, COLD = 0.99, 0.01
"""Shares of a file in the page cache from which it is called warm, up to which cold."""


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to read or write: a name, the state that the page cache must be in, and how."""

    name: str
    cached: bool | None
    move: Callable[[Path, int, Crew, list[memoryview]], int]


def storage_jobs(folder: Path, size: int, crews: Sequence[Crew]) -> Iterator[Job]:
    """Yield the reads and writes of a file of `size` bytes in `folder`, by each crew.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    source, target = folder / "read.bin", folder / "written.bin"
    size -= size % PIECE
    _fill(source, size)
    for way in _READS:
        for crew in crews:
            row = Row("storage", "read", "system", way.name, size, 0, crew.threads)
            yield Job(row, timed(_moving(way, source, size, crew)), _preparing(way, source))
    for way in _WRITES:
        for crew in crews:
            row = Row("storage", "write", "system", way.name, 0, size, crew.threads)

            def prepare() -> None:
                target.unlink(missing_ok=True)
                os.sync()

            yield Job(row, timed(_moving(way, target, size, crew)), prepare)


def check_state(files: Sequence[Path], *, cached: bool) -> None:
    """Bring files into or out of the page cache.

    Raises
    ------
    UnavailableError
        If that does not work here, or cannot be checked.
    """
    (cache.warm if cached else cache.drop)(files)
    share = cache.cached_share(files)
    if share is None:
        raise UnavailableError("what the page cache holds cannot be checked")
    if cached and share < WARM:
        raise UnavailableError(f"only {share:.0%} of the bytes stay in the page cache")
    if not cached and share > COLD:
        raise UnavailableError(f"{share:.0%} of the bytes stay in the page cache")


def _fill(path: Path, size: int) -> None:
    """Write bytes that no file system can compress or share, and flush them."""
    random = np.random.Generator(np.random.SFC64(0))
    with path.open("wb") as file:
        for _, length in pieces_of(size, PIECE):
            file.write(random.bytes(length))
        file.flush()
        os.fsync(file.fileno())


def _preparing(way: _Way, path: Path) -> Callable[[], None] | None:
    cached = way.cached
    return None if cached is None else lambda: check_state([path], cached=cached)


def _moving(way: _Way, path: Path, size: int, crew: Crew) -> Callable[[], None]:
    buffers = aligned_buffers(crew.threads, PIECE)
    touch(buffers)

    def move() -> None:
        try:
            moved = way.move(path, size, crew, buffers)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
                raise
            raise UnavailableError("this file system cannot do it") from error
        if moved != size:
            raise UnavailableError(f"only {moved} of {size} bytes were moved")

    return move


def _read(path: Path, size: int, crew: Crew, buffers: list[memoryview], flags: int = 0) -> int:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        pieces = pieces_of(size, PIECE)
        return crew.run(
            lambda number: sum(
                os.preadv(descriptor, [buffers[number][:length]], start)
                for start, length in take(pieces)
            )
        )
    finally:
        os.close(descriptor)


def _read_direct(path: Path, size: int, crew: Crew, buffers: list[memoryview]) -> int:
    return _read(path, size, crew, buffers, os.O_DIRECT)


def _read_mapped(path: Path, size: int, crew: Crew, buffers: list[memoryview]) -> int:
    pieces = pieces_of(size, PIECE)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        return crew.run(
            lambda number: sum(
                _copy(buffers[number][:length], view[start : start + length])
                for start, length in take(pieces)
            )
        )


def _write(path: Path, size: int, crew: Crew, buffers: list[memoryview], flags: int = 0) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600)
    try:
        pieces = pieces_of(size, PIECE)
        moved = crew.run(
            lambda number: sum(
                os.pwritev(descriptor, [buffers[number][:length]], start)
                for start, length in take(pieces)
            )
        )
        os.fsync(descriptor)
        return moved
    finally:
        os.close(descriptor)


def _write_direct(path: Path, size: int, crew: Crew, buffers: list[memoryview]) -> int:
    return _write(path, size, crew, buffers, os.O_DIRECT)


def _write_mapped(path: Path, size: int, crew: Crew, buffers: list[memoryview]) -> int:
    pieces = pieces_of(size, PIECE)
    with path.open("w+b") as file:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size) as mapped, memoryview(mapped) as view:
            moved = crew.run(
                lambda number: sum(
                    _copy(view[start : start + length], buffers[number][:length])
                    for start, length in take(pieces)
                )
            )
            mapped.flush()
        os.fsync(file.fileno())
    return moved


def _copy(target: memoryview, source: memoryview) -> int:
    """Copy by NumPy, which releases the GIL; return how many bytes."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
    return len(source)


_READS = (
    _Way("cold", cached=False, move=_read),
    _Way("warm", cached=True, move=_read),
    _Way("direct", cached=False, move=_read_direct),
    _Way("mapped, cold", cached=False, move=_read_mapped),
    _Way("mapped, warm", cached=True, move=_read_mapped),
)
_WRITES = (
    _Way("buffered, flushed", cached=None, move=_write),
    _Way("direct, flushed", cached=None, move=_write_direct),
    _Way("mapped, flushed", cached=None, move=_write_mapped),
)
