"""Small files beside a model, such as its config. A stranger wrote them: they are not trusted."""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["NO_FILE", "naming", "parse_json", "read_json", "read_object", "read_start"]

#: Errors that say that there is no file of a name, or something else: trying again is of no use.
NO_FILE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG))

#: Real configs take some kilobytes; those with thousands of labels, a megabyte or two. All of one
#: is kept, for the output has all of it too, and Python takes up to a hundred bytes for a value of
#: two or three letters. So what is far beyond any is refused before it is read.
_MOST_BYTES = 16_000_000
_MOST_VALUES = 1_000_000
#: What takes values apart later calls itself for every level.
_DEEPEST = 128


def read_json(path: str | os.PathLike[str]) -> tuple[Any, os.stat_result]:
    """Return what a file says, and what the file was then.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is no regular file, or holds no JSON, or more of it, or deeper, than a config does.
    """
    text, status = read_start(path, _MOST_BYTES + 1)
    return parse_json(text), status


def parse_json(text: bytes) -> Any:  # noqa: ANN401 - what JSON may hold
    """Return what a text says.

    Raises
    ------
    ValueError
        If it is no JSON, or more of it, or deeper, than a config is.
    """
    if len(text) > _MOST_BYTES:
        raise ValueError(f"longer than {_MOST_BYTES} bytes")
    # Each value but the first has one of these before it. Those in text count too.
    if sum(map(text.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES} values")
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    if not _is_within(value, _DEEPEST):
        raise _too_deep()
    return value


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file says as an object; an empty one if there is no file, or it holds none.

    Raises
    ------
    OSError
        If the system fails to read a file that is there.
    """
    try:
        value, _ = read_json(path)
    except ValueError:
        return {}
    except OSError as error:
        if error.errno in NO_FILE or isinstance(error, PermissionError):
            return {}
        raise
    return value if isinstance(value, dict) else {}


def read_start(path: str | os.PathLike[str], most: int) -> tuple[bytes, os.stat_result]:
    """Return the first bytes of a file, so many at the most, and what the file was then.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is no regular file.
    """
    with naming(path), open(path, "rb", opener=open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        return file.read(most), status


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have errors of the system name the file: those of one that is open do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def open_at_once(path: str, flags: int) -> int:
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
