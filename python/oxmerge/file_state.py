"""Which file a file is, and how it was left: what tells whether it is still the same."""

from __future__ import annotations

import os
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

__all__ = ["FileState", "states_of"]


class FileState(NamedTuple):
    """What the system says of a file.

    Attributes
    ----------
    device, inode : int
        Which file it is.
    size : int
        Bytes.
    modified_ns : int
        When it was last written to, nanoseconds.
    """

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """Return the state that a status tells."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def as_input(self, path: str) -> dict[str, Any]:
        """Return the file at `path` as a plan lists it."""
        return {"path": path, **self._asdict()}


def states_of(paths: Iterable[str]) -> tuple[tuple[str, FileState], ...]:
    """Return each path with the state of its file now: a key for what was read of them."""
    return tuple((path, FileState.of(os.stat(path))) for path in paths)
