"""A mount that does not answer stops the call that reads from it, and no other Python thread."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from writers import random_arrays, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Calls `act` while the mount gives no answer; another thread lets it go on. If that does not get
#: to run, since the call holds the GIL while it waits, this waits for ever.
PROGRAM = """
import pathlib, sys, threading, time
import numpy, ml_dtypes
import oxmerge
from oxmerge import kernels
mount, gate = map(pathlib.Path, sys.argv[1:3])
waiting = gate.with_suffix(".waiting")

def release():
    while not waiting.exists():
        time.sleep(0.002)
    gate.unlink()

def stalled(act):
    waiting.unlink(missing_ok=True)
    thread = threading.Thread(target=release)
    thread.start()
    gate.touch()
    result = act()
    thread.join()
    return result

{body}
print("done")
"""

BODIES = {
    "open": "stalled(lambda: oxmerge.open(mount / 'a'))",
    "look up": "m = oxmerge.open(mount / 'a'); stalled(lambda: m['x'])",
    "use a small array": "x = oxmerge.open(mount / 'a')['x']; stalled(lambda: kernels.norm(x))",
    "use small arrays": (
        "x = oxmerge.open(mount / 'a')['x']\n"
        "stalled(lambda: kernels.lerp([x], [numpy.zeros_like(x)], 0.5))"
    ),
    "merge opened models": (
        "models = [oxmerge.open(mount / name) for name in 'ab']\n"
        "stalled(lambda: oxmerge.merge_state_dicts('linear', models, weight=1))"
    ),
    "lazy": "stalled(lambda: oxmerge.lazy(mount / 'r.yml'))",
    "look up lazily": "m = oxmerge.lazy(mount / 'r.yml'); stalled(lambda: m['x'])",
    "plan": "stalled(lambda: oxmerge.plan(mount / 'r.yml'))",
    "save": "m = oxmerge.open(mount / 'a'); stalled(lambda: oxmerge.save(m, sys.argv[3]))",
}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A mount with two small models and their recipe."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("to mount a file system, the tests have to run as root, with /dev/fuse")
    served, mount, gate = (tmp_path / name for name in ("served", "mount", "gate"))
    for seed, name in enumerate("ab"):
        write_model(served / name, random_arrays({"x": (40, 3), "y": (7,)}, seed), "F32")
    models = "".join(f"- {{model: {name}, parameters: {{weight: 1}}}}\n" for name in "ab")
    (served / "r.yml").write_text(f"merge_method: linear\nmodels:\n{models}")
    mount.mkdir()
    command: list[Any] = [
        sys.executable,
        Path(__file__).with_name("stalling_mount.py"),
        served,
        mount,
        gate,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        if server.stdout.readline() != "mounted\n":
            pytest.skip("no file system can be mounted here")
        yield mount
        gate.unlink(missing_ok=True)
        ctypes.CDLL(None).umount2(os.fsencode(mount), 2)
        server.terminate()


@pytest.mark.parametrize("name", BODIES)
def test_other_threads_go_on(mount: Path, tmp_path: Path, name: str) -> None:
    program = PROGRAM.replace("{body}", BODIES[name])
    command: list[Any] = [sys.executable, "-c", program, mount, tmp_path / "gate", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            (tmp_path / "gate").unlink(missing_ok=True)
            process.kill()
            pytest.fail("no other thread could run while the mount stalled")
    assert (process.returncode, out) == (0, "done\n")
