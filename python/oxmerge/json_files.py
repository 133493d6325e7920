"""JSON files beside a model's weights. A stranger wrote them: they are read without trust."""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["read_json"]

#: As deep as the engine reads. What takes values apart later calls itself for every level.
_DEEPEST = 128


def read_json(path: str | os.PathLike[str]) -> tuple[Any, os.stat_result]:
    """Return what a file says, and what the file was then.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is no JSON, or nested too deeply.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        text = file.read()
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    if not _is_within(value, _DEEPEST):
        raise _too_deep()
    return value, status


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe without waiting for who writes to it, which leaves nothing to read."""
    return os.open(path, flags | os.O_NONBLOCK)


def _is_within(value: object, levels: int) -> bool:
    """Tell whether a value has so many levels at the most."""
    if not isinstance(value, dict | list):
        return True
    parts = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_within(part, levels - 1) for part in parts)


def _too_deep() -> ValueError:
    return ValueError(f"nested deeper than {_DEEPEST} levels")
