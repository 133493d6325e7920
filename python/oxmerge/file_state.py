"""Which file a file is, and how it was left: what tells whether it is still the same."""

from __future__ import annotations

from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any

__all__ = ["FileState"]


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
