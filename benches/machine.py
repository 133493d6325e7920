"""The machine: what it is, and the state of its page cache."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

READ_SIZE = 8 << 20


def describe(data: Path) -> dict[str, str | int]:
    """What a record says of the machine. No names of hosts and no paths."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": file_system(data),
        "python": platform.python_version(),
    }


def label() -> str:
    """A short name for file names: the processor and the number of cores."""
    words = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    return f"{words}-{cores()}-core"


def cores() -> int:
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`: that of the longest mount point above it."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, this_kind, *_ = line.split()
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, this_kind
    return kind


def load_average() -> float:
    return os.getloadavg()[0]


def sync_tree(directory: Path) -> None:
    """Flushes every file of an output: what a merge owes before it may call itself done."""
    for path in sorted(directory.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def warm(files: list[Path]) -> None:
    """Reads the files, so that they lie in the page cache."""
    buffer = bytearray(READ_SIZE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(files: list[Path]) -> None:
    """Drops the files from the page cache. Only clean pages can go, hence the sync."""
    os.sync()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached_fraction(files: list[Path]) -> float | None:
    """How much of the files lies in the page cache; None when nothing here can tell."""
    if shutil.which("fincore") is None:
        return None
    command = ["fincore", "--json", "--bytes", "--output", "RES", *map(str, files)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode != 0:
        return None
    resident = sum(int(row["res"]) for row in json.loads(done.stdout)["fincore"])
    return resident / sum(path.stat().st_size for path in files)


def forget_own_memory() -> None:
    """Gives freed heap back, so that children that start now do not inherit a larger peak."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
