"""The page cache: filling it, emptying it, and looking what is in it."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from oxmerge.bench.measure import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_READ_BYTES = 8 << 20
_WARM, _COLD = 0.99, 0.01  # shares in the page cache from which files are warm, up to which cold
_WINDOW = 1 << 30  # bytes that are mapped at a time to be looked at


def warm(files: Iterable[Path]) -> None:
    """Read the files, so that they lie in the page cache."""
    buffer = bytearray(_READ_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(files: Iterable[Path]) -> None:
    """Drop the files from the page cache. Only clean pages can go, so they are flushed first."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def bring(files: Sequence[Path], *, cached: bool) -> None:
    """Bring files into or out of the page cache, and look whether that worked.

    Raises
    ------
    UnavailableError
        If that does not work here, or cannot be checked.
    """
    (warm if cached else drop)(files)
    share = cached_share(files)
    if share is None:
        raise UnavailableError("what the page cache holds cannot be checked")
    if cached and share < _WARM:
        raise UnavailableError(f"only {share:.0%} of the bytes stay in the page cache")
    if not cached and share > _COLD:
        raise UnavailableError(f"{share:.0%} of the bytes stay in the page cache")


def cached_share(files: Iterable[Path]) -> float | None:
    """Return the share of the files' pages in the page cache; None where it cannot be told.

    The kernel is asked with `mincore`, which tells about files that this user may write.
    """
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except AttributeError:
        return None
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    present = total = 0
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            for start in range(0, size, _WINDOW):
                length = min(_WINDOW, size - start)
                pages = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
                with mmap.mmap(
                    file.fileno(), length, access=mmap.ACCESS_READ, offset=start
                ) as mapped:
                    view = np.frombuffer(mapped, np.uint8)
                    failed = mincore(view.ctypes.data, length, pages.ctypes.data)
                    del view  # or the mapping could not be closed
                if failed:
                    return None
                present += int(np.count_nonzero(pages & 1))
                total += pages.size
    return present / total if total else None
