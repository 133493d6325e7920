"""Merges that meet a fault of the system at every call in turn, each of them gone on with.

Also merges that go on from an interruption, and verbs that only read.

Run as a program, with `faults.c` loaded before the C library, it tells on standard output what was
not as it should be.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import oxmerge
from oxmerge import _core, cli
from writers import directory_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    Work = Callable[[Path], str]

#: As `faults.c` numbers them.
CALLS = {
    "read": 0, "write": 1, "flush": 2, "open": 3, "rename": 4, "remove": 5, "make": 6, "size": 7,
}  # fmt: skip
FAULTS = {
    "short": -1,
    "death": -2,
    "end": -3,
    "change": -4,
    "EIO": errno.EIO,
    "ENOSPC": errno.ENOSPC,
    "EINTR": errno.EINTR,
    "EACCES": errno.EACCES,
    "EMFILE": errno.EMFILE,
}
#: What the run goes on after, as if nothing had been.
HARMLESS = {"short", "EINTR"}
#: How a merge tells of the others.
ERRORS = (
    "OSError: ",
    "PermissionError: ",
    "InputChangedError: ",
    "OutputError: ",
    "CheckpointError: ",
    "PlanError: ",
    "RecipeError: ",
)
#: Weights in several files load nowhere without an index.
LOADABLE = ("config.json", "model.safetensors", "model.safetensors.index.json")


def attempt(folder: Path, call: str, number: int, fault: str, work: Work) -> tuple[int, str]:
    """Work in a process of its own; how often it made that call, and how it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        library = ctypes.CDLL(None)
        library.faults_arm(
            os.fsencode(folder), CALLS[call], ctypes.c_long(number), FAULTS.get(fault, 0)
        )
        try:
            outcome = work(folder)
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


def merge(folder: Path, options: dict[str, Any]) -> str:
    oxmerge.merge(folder / "recipe.yml", folder / "out", **options)
    return "done"


#: Verbs that only read, what they say of an output that is whole, and what they are asked.
VERBS: dict[str, tuple[int, list[str]]] = {
    "verify": (0, ["verify", "whole"]),
    "recompute": (0, ["verify", "whole", "--recompute"]),
    "check": (0, ["check", "whole"]),
    "diff": (1, ["diff", "a", "b"]),
}


def answer(folder: Path, words: list[str]) -> str:
    """Return the exit code of a command, and what it said to people."""
    told = io.StringIO()
    verb, *others = words
    paths = [str(folder / each) if (folder / each).exists() else each for each in others]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        code = cli.main([verb, "-q", *paths, "--memory", "4GiB", "--threads", "2"])
    return f"{code} {told.getvalue()}"


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def _merge_of(folder: Path) -> Work:
    """Return the merge, whose options are read before calls are counted."""
    return functools.partial(merge, options=json.loads((folder / "options.json").read_text()))


def answers_at(folder: Path, call: str, fault: str, step: int, verb: str) -> int:
    """Let calls of a verb that only reads fail, one in each run; how many were tried."""
    expected, words = VERBS[verb]
    before = directory_bytes(folder / "whole")
    number = 0
    while True:
        work = functools.partial(answer, words=words)
        count, outcome = attempt(folder, call, number, fault, work)
        where = f"{fault} at {call} {number} of {verb}: {outcome}"
        code, _, told = outcome.partition(" ")
        if fault in HARMLESS or number >= count:
            assert code == str(expected), where
        elif fault == "EIO":  # the others may look like a file that is another
            assert code == "2", where
        if code == "2":
            assert told.startswith("error: "), where
            assert str(folder) in told, where
        else:
            assert (code, told) in {("0", ""), ("1", "")}, where
        assert directory_bytes(folder / "whole") == before, where
        if number >= count:
            return number
        number += step


def faults_at(folder: Path, call: str, fault: str, step: int) -> int:
    """Let the first such call fail, then another one; how many were tried.

    Where there is a folder `begun`, each merge goes on from that.
    """
    output, expected = folder / "out", directory_bytes(folder / "whole")
    work = _merge_of(folder)
    number = 0
    while True:
        if (folder / "begun").exists():
            shutil.copytree(folder / "begun", output)
        count, outcome = attempt(folder, call, number, fault, work)
        where = f"{fault} at {call} {number}: {outcome}"
        left = directory_bytes(output) if output.exists() else {}
        if outcome == "done":
            odd = sorted(set(left.items()) ^ set(expected.items()))
            assert left == expected, f"{where}, and other bytes in {[name for name, _ in odd]}"
        else:
            assert fault not in HARMLESS, where
            assert fault == "death" or outcome.startswith(ERRORS), where
            loadable = [path.name for name in LOADABLE for path in output.glob(name)]
            assert not loadable or weights(left) == weights(expected), f"{where}, and {loadable}"
            after = attempt(folder, call, -1, "", work)[1]
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
    folder, step, how, *pairs = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    if how in VERBS:
        for pair in pairs:
            call, fault = pair.split(":")
            print(pair, answers_at(folder, call, fault, step, how))
        return
    is_direct = how != "buffered"
    _core.execute = functools.partial(_core.execute, journal_every=0.0, direct=is_direct)
    for name in ("out", "begun"):  # of a run that failed
        shutil.rmtree(folder / name, ignore_errors=True)
    if how == "begun":  # by a merge that died half way
        work = _merge_of(folder)
        half = attempt(folder, "write", -1, "", work)[0] // 2
        shutil.rmtree(folder / "out")
        assert attempt(folder, "write", half, "death", work)[1] == "death"
        (folder / "out").rename(folder / "begun")
    for pair in pairs:
        call, fault = pair.split(":")
        print(pair, faults_at(folder, call, fault, step))


if __name__ == "__main__":
    main()
