"""What machine this is: processor, caches, memory, kernel, file system, versions."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oxmerge import build_info

if TYPE_CHECKING:
    from collections.abc import Mapping

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
#: The mount options that bear on speed. The others can name users, servers and folders.
_MOUNT_OPTIONS = (
    "ro", "rw", "sync", "dirsync", "dax", "discard", "ssd", "nossd", "barrier", "nobarrier",
    "noatime", "relatime", "nodiratime", "strictatime", "lazytime", "data", "commit", "compress",
    "compress-force", "nodatacow", "nodatasum", "cache", "hard", "soft", "proto", "vers", "rsize",
    "wsize", "nconnect",
)  # fmt: skip
_LOAD, _STOLEN = 0.25, 0.05  # shares of all cores from which others are in the way
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


class Others:
    """What other programs take of the processor while something is measured.

    The kernel counts the time of all cores; that of this process and of those that it waited for is
    taken off. What the kernel does for them by itself, such as writing back, counts as others'.
    """

    def __init__(self) -> None:
        self._before = self._counted()

    def busy(self) -> dict[str, float]:
        """Return how many cores other programs, and other virtual machines, kept busy so far.

        The keys are those of a record's machine; nothing where the kernel does not tell.
        """
        before, now = self._before, self._counted()
        if before is None or now is None or now[0] <= before[0]:
            return {}
        seconds, all_busy, own, stolen = (b - a for a, b in zip(before, now, strict=True))
        return {
            "busy_elsewhere": round(max(all_busy - own, 0) / seconds, 2),
            "stolen": round(max(stolen, 0) / seconds, 2),
        }

    def _counted(self) -> tuple[float, float, float, float] | None:
        """Return seconds: by the clock, of all, of this process and its children, stolen."""
        found = re.search(r"^cpu +([\d ]+)$", _text("/proc/stat"), re.MULTILINE)
        if found is None:
            return None
        user, nice, system, _, _, irq, soft, stolen, *_ = (
            int(each) / os.sysconf("SC_CLK_TCK") for each in found[1].split()
        )
        own = sum(os.times()[:4])
        return time.monotonic(), user + nice + system + irq + soft, own, stolen


def warnings_of(machine: Mapping[str, Any]) -> list[str]:
    """Return what about the load of a machine makes its numbers doubtful."""
    load, others = machine["load_average"], machine.get("busy_elsewhere", 0.0)
    stolen, all_cores = machine.get("stolen", 0.0), machine["cores"]
    told = []
    if load > _LOAD * all_cores:
        told.append(f"the load average was {load:.2f} at the start, on {all_cores} cores")
    if others > _LOAD * all_cores:
        told.append(f"other programs kept {others:.2f} of {all_cores} cores busy")
    if stolen > _STOLEN * all_cores:
        told.append(f"the host took {stolen:.2f} of {all_cores} cores away")
    if told:
        told[-1] += "; times are too long and uneven: measure again when it is quiet"
    return told


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
