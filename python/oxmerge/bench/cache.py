"""The page cache: filling it, emptying it, and looking what is in it."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_READ_BYTES = 8 << 20
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
