"""The machine: what it is, and the state of its page cache. Most of it is `oxmerge bench`'s own."""

from __future__ import annotations

import os
import platform
import re
from typing import TYPE_CHECKING

from oxmerge.bench.cache import cached_share, drop, warm
from oxmerge.bench.machine import cores, cpu_model, file_system

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["cached_share", "describe", "drop", "label", "load_average", "warm"]


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


def load_average() -> float:
    return os.getloadavg()[0]
