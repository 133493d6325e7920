"""JSON files beside a model's weights. A stranger wrote them: they are read without trust."""

from __future__ import annotations

import json
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["read_json"]

#: As much as the engine reads, and as deep: what takes values apart later calls itself for every
#: level.
_MOST_BYTES = 100_000_000
_DEEPEST = 128


def read_json(path: str | os.PathLike[str]) -> tuple[Any, os.stat_result]:
    """Return what a file says, and what the file was then.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is no regular file, or holds no JSON, or more of it, or deeper, than it may.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > _MOST_BYTES:
            raise ValueError(f"longer than {_MOST_BYTES} bytes")
        text = file.read()
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    if not _is_within(value, _DEEPEST):
        raise _too_deep()
    return value, status


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe without waiting for who writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _is_within(value: object, levels: int) -> bool:
    """Tell whether a value has so many levels at the most."""
    if not isinstance(value, dict | list):
        return True
    parts = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_within(part, levels - 1) for part in parts)


def _too_deep() -> ValueError:
    return ValueError(f"nested deeper than {_DEEPEST} levels")
