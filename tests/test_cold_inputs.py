"""Inputs that are not in the page cache are read past it, whoever they belong to."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from writers import random_arrays, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534
#: Another user may not be able to read the package, so all of it is loaded before.
MERGE = """
import os, sys, oxmerge
user, recipe, first, out = sys.argv[1:]
oxmerge.merge(first, out + "-first")
os.setgroups([])
os.setgid(int(user))
os.setuid(int(user))
oxmerge.merge(recipe, out, threads=2)
"""


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Statistics(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "a", "b", "c", "d"))


def cached_share(path: Path) -> float:
    """Return how much of a file is in the page cache. Only its owner is told."""
    with path.open("rb") as file:
        asked, found = _Range(0, 0), _Statistics()
        arguments = (file.fileno(), ctypes.byref(asked), ctypes.byref(found), 0)
        if ctypes.CDLL(None).syscall(451, *arguments) != 0:
            pytest.skip("the kernel has no cachestat (Linux 6.5)")
    return float(found.cached * 4096 / path.stat().st_size)


def make_cold(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(path) > 0.05:
        pytest.skip("the file system keeps all in the page cache")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody can reach, with two models that are root's."""
    if os.geteuid() != 0:
        pytest.skip("to become another user, the tests have to run as root")
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("OXMERGE_TEST_DISK", "/var/tmp")))
    folder.chmod(0o755)
    for seed, name in enumerate("ab"):
        arrays = random_arrays({f"x{at}": (2048, 2048) for at in range(4)}, seed)
        write_model(folder / name, arrays, "F32")
    models = "".join(f"- {{model: {name}, parameters: {{weight: 1}}}}\n" for name in "ab")
    (folder / "r.yml").write_text(f"merge_method: linear\nmodels:\n{models}")
    write_model(folder / "small", random_arrays({"x": (2, 3)}, 0), "F32")
    one = "{model: small, parameters: {weight: 1}}"
    (folder / "first.yml").write_text(f"merge_method: linear\nmodels: [{one}]\n")
    (folder / "home").mkdir()
    (folder / "home").chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def merge_as(user: int, place: Path, out: str) -> None:
    files = (place / "r.yml", place / "first.yml", place / "home" / out)
    command: list[Any] = [sys.executable, "-c", MERGE, str(user), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("user", [0, NOBODY])
def test_cold_inputs_of_anyone_are_read_past_the_page_cache(place: Path, user: int) -> None:
    inputs = [place / name / "model.safetensors" for name in "ab"]
    merged = []
    for again in range(2):  # what was asked the first time is no answer the second time
        for path in inputs:
            make_cold(path) if again == 0 else None
        merge_as(user, place, f"out{again}")
        merged.append((place / "home" / f"out{again}" / "model.safetensors").read_bytes())
        assert all(cached_share(path) < 0.1 for path in inputs)
    for path in inputs:
        path.read_bytes()  # warm now, and to be found so
    merge_as(user, place, "warm")
    merged.append((place / "home" / "warm" / "model.safetensors").read_bytes())
    assert merged[0] == merged[1] == merged[2]
