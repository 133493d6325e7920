"""Groups of processes whose memory the system limits: control groups, of version 1 or 2."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """A group below the one that this process is in."""

    folder: Path

    def enter(self) -> None:
        """Have this process be in it, and those that it starts."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def kills(self) -> int:
        """Return how many processes the system has killed for want of memory."""
        name = "memory.oom_control" if self._is_first else "memory.events"
        found = re.search(r"^oom_kill (\d+)$", (self.folder / name).read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])

    def limit(self, memory: int) -> None:
        """Let them have so many bytes together, with pages of files and what the kernel has."""
        name = "memory.limit_in_bytes" if self._is_first else "memory.max"
        (self.folder / name).write_text(str(memory))

    @property
    def _is_first(self) -> bool:
        return (self.folder / "memory.limit_in_bytes").exists()


@contextmanager
def memory_group(memory: int) -> Iterator[Group | None]:
    """Yield a new group that may have so many bytes; None where this process may not make one."""
    folder = _own() / f"oxmerge-test-{os.getpid()}"
    group = Group(folder)
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        group.limit(memory)
    except OSError:  # of version 2, where the group above does not hand memory on
        folder.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        folder.rmdir()


def _own() -> Path:
    """Return the folder of the group that this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/")
    return _ROOT / path.lstrip("/")
