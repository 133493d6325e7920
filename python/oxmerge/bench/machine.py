"""What machine this is: processor, caches, memory, kernel, file system, versions."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np

from oxmerge import build_info

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
#: The mount options that bear on speed. The others can name users, servers and folders.
_MOUNT_OPTIONS = (
    "ro", "rw", "sync", "dirsync", "dax", "discard", "ssd", "nossd", "barrier", "nobarrier",
    "noatime", "relatime", "nodiratime", "strictatime", "lazytime", "data", "commit", "compress",
    "compress-force", "nodatacow", "nodatasum", "cache", "hard", "soft", "proto", "vers", "rsize",
    "wsize", "nconnect",
)  # fmt: skip
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def describe(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a record says of the machine. No names of hosts, users or folders.

    Parameters
    ----------
    directory
        Where files are measured: its file system is described.
    """
    engine = build_info()
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "virtual": "hypervisor" in _cpu_flags(),
        "caches": caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": file_system(directory),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "oxmerge": engine["version"],
        "simd": engine["simd"],
        "simd_available": list(engine["simd_available"]),
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """Return the processor's name."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def caches() -> dict[str, int]:
    """Return the bytes of each cache that the first core sees, such as ``{"L2": 1048576}``."""
    found = {}
    for entry in sorted(_CACHES.glob("index*")):
        level, kind, size = (_text(entry / name).strip() for name in ("level", "type", "size"))
        match = re.fullmatch(r"(\d+)([KMG])", size)
        if match and kind != "Instruction":
            found[f"L{level}"] = int(match[1]) * _UNITS[match[2]]
    return found


def file_system(directory: str | os.PathLike[str]) -> str:
    """Return the type of the file system that holds `directory`, and how it is mounted."""
    here = Path(directory).resolve()
    best, found = "", "unknown"
    for line in _text("/proc/self/mounts").splitlines():
        _, mount, kind, options, *_ = line.split()
        mount = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount)
        if here.is_relative_to(mount) and len(mount) >= len(best):
            best, found = mount, f"{kind} ({_told(options)})"
    return found


def _told(options: str) -> str:
    """Return those of a mount's options that bear on speed."""
    named = options.split(",")
    return ",".join(each for each in named if each.partition("=")[0] in _MOUNT_OPTIONS)


def _cpu_flags() -> set[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return set(found[1].split()) if found else set()


def _text(path: str | Path) -> str:
    """Return a file of the kernel's, or nothing where it is not there."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
