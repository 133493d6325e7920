"""Merges that meet a fault of the system at every call in turn, each of them gone on with.

Run as a program, with `faults.c` loaded before the C library, it tells on standard output what was
not as it should be.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import oxmerge
from oxmerge import _core
from writers import directory_bytes

#: As `faults.c` numbers them.
CALLS = {"read": 0, "write": 1, "flush": 2}
FAULTS = {
    "short": -1,
    "death": -2,
    "end": -3,
    "change": -4,
    "EIO": errno.EIO,
    "ENOSPC": errno.ENOSPC,
    "EINTR": errno.EINTR,
}
#: What the run goes on after, as if nothing had been.
HARMLESS = {"short", "EINTR"}
#: How a merge tells of the others.
ERRORS = (
    "OSError: ",
    "InputChangedError: ",
    "OutputError: ",
    "CheckpointError: ",
    "PlanError: ",
    "RecipeError: ",
)
#: Weights in several files load nowhere without an index.
LOADABLE = ("config.json", "model.safetensors", "model.safetensors.index.json")


def attempt(folder: Path, call: str, number: int, fault: str) -> tuple[int, str]:
    """Merge in a process of its own; how often it made that call, and how it ended."""
    options = json.loads((folder / "options.json").read_text())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        library = ctypes.CDLL(None)
        library.faults_arm(
            os.fsencode(folder), CALLS[call], ctypes.c_long(number), FAULTS.get(fault, 0)
        )
        outcome = "done"
        try:
            merge(folder, options)
        except BaseException as error:  # noqa: BLE001 - it is told
            outcome = f"{type(error).__name__}: {error}"
        count = library.faults_counted(CALLS[call])
        os.write(writer, json.dumps([count, outcome]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return number + 1, "death"
    count, outcome = json.loads(told)
    return int(count), str(outcome)


def merge(folder: Path, options: dict[str, Any]) -> None:
    oxmerge.merge(folder / "recipe.yml", folder / "out", **options)


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def faults_at(folder: Path, call: str, fault: str, step: int) -> int:
    """Let the first such call fail, then another one; how many were tried."""
    output, expected = folder / "out", directory_bytes(folder / "whole")
    number = 0
    while True:
        count, outcome = attempt(folder, call, number, fault)
        where = f"{fault} at {call} {number}: {outcome}"
        left = directory_bytes(output) if output.exists() else {}
        if outcome == "done":
            assert left == expected, f"{where}, and other bytes"
        else:
            assert fault not in HARMLESS, where
            assert fault == "death" or outcome.startswith(ERRORS), where
            loadable = [path.name for name in LOADABLE for path in output.glob(name)]
            assert not loadable or weights(left) == weights(expected), f"{where}, and {loadable}"
            after = attempt(folder, call, -1, "")[1]
            assert after == "done" or "not empty" in after, f"{where}, then {after}"
            found = directory_bytes(output)
            assert found == expected, f"{where}, then other bytes in {sorted(found)}"
        for path in sorted(output.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        output.rmdir()
        if number >= count:
            return number
        number += step


def main() -> None:
    folder, step, *pairs = sys.argv[1:]
    is_direct = pairs[0] == "direct"
    execute = functools.partial(_core.execute, journal_every=0.0, direct=is_direct)
    _core.execute = execute
    for pair in pairs[1:]:
        call, fault = pair.split(":")
        print(pair, faults_at(Path(folder), call, fault, int(step)))


if __name__ == "__main__":
    main()
