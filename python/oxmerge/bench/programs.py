"""Programs that are run as processes of their own, what they took; mergekit, and PEFT beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from oxmerge.bench.measure import Taken, UnavailableError
from oxmerge.errors import OxmergeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LIMIT = 600.0
"""Seconds after which another program is stopped."""
_LAUNCHER = Path(__file__).with_name("launch.py")
_LAST_LINES = 2000
# Nothing is looked for on the network: all models are here.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_VERSION = (
    "import importlib.metadata as m, importlib.util as u, json\n"
    "print(json.dumps(m.version('mergekit') if u.find_spec('mergekit') else None))"
)


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that ended well, as seen from outside.

    Attributes
    ----------
    output
        What it wrote to its standard output.
    seconds
        From its start to its end.
    peak_memory
        Its largest resident set, in bytes.
    """

    output: str
    seconds: float
    peak_memory: int


def run_process(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> Finished:
    """Run a program in `folder`, for at most `limit` seconds.

    Raises
    ------
    UnavailableError
        If it cannot be started, fails (with the last that it said), or has to be stopped.
    """
    with tempfile.TemporaryDirectory(prefix="oxmerge-bench-") as place:
        report = Path(place) / "report.json"
        process = subprocess.Popen(  # noqa: S603 - the command is ours
            [sys.executable, "-I", "-S", str(_LAUNCHER), str(report), *command],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # to be stopped with all that it starts
        )
        name = Path(command[0]).name
        try:
            output, errors = process.communicate(timeout=limit)
        except BaseException as interruption:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(interruption, subprocess.TimeoutExpired):
                raise UnavailableError(f"{name} was stopped after {limit:g} s") from None
            raise
        if process.returncode != 0:
            raise UnavailableError(f"{command[0]} cannot be started: {_last_line(errors)}")
        found = json.loads(report.read_text(encoding="utf-8"))
    if found["code"] != 0:
        said = _error_of(output) or _last_line(errors or output)
        raise UnavailableError(f"{name} ended with {found['code']}: {said}")
    return Finished(output, found["seconds"], found["peak_memory"])


def oxmerge(folder: Path, *arguments: str) -> Finished:
    """Run this oxmerge as a process of its own, with its report as the output."""
    command = [sys.executable, "-m", "oxmerge", *arguments, "--json"]
    return run_process(command, folder, {"OXMERGE_NO_PROGRESS": "1"})


#: As its users put an adapter into a model: the base in bfloat16, on the CPU.
_PEFT = """
import sys, peft, torch, transformers
base, adapter, output = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


@dataclass(frozen=True, slots=True)
class Mergekit:
    """mergekit in an environment of its own, and PEFT, which it depends on.

    Attributes
    ----------
    python
        The interpreter that has it.
    program
        Its command.
    version
        Its version.
    """

    python: Path
    program: Path
    version: str

    @classmethod
    def find(cls, python: str) -> Self:
        """Return the mergekit of an interpreter.

        Raises
        ------
        OxmergeError
            If there is no such interpreter, or it has no mergekit.
        """
        # Not resolved: the interpreter of a virtual environment is a link.
        path = Path(python).absolute()
        advice = "name the Python of an environment with mergekit: `--against mergekit=PYTHON`"
        if not path.is_file():
            raise OxmergeError("there is no such interpreter", file=python, advice=advice)
        try:
            version = json.loads(run_process([str(path), "-c", _VERSION], Path.cwd()).output)
        except UnavailableError as reason:
            raise OxmergeError(str(reason), file=python, advice=advice) from None
        except ValueError:
            raise OxmergeError("this is no Python", file=python, advice=advice) from None
        program = path.with_name("mergekit-yaml")
        if version is None or not program.is_file():
            raise OxmergeError("this interpreter has no mergekit", file=python, advice=advice)
        return cls(path, program, version)

    def prepare(self, folder: Path) -> None:
        """Import everything once, so that no run pays for reading torch from the disk.

        Raises
        ------
        UnavailableError
            If it cannot even say how it is used.
        """
        run_process([str(self.program), "--help"], folder)

    def run(self, recipe: Path, output: Path, *flags: str) -> Taken:
        """Merge once, with default flags but for these, and flush what it wrote: it does not.

        Raises
        ------
        UnavailableError
            If it fails, takes longer than `LIMIT`, or leaves no model.
        """
        return _run_and_flush([str(self.program), str(recipe), str(output), *flags], output)

    def fuse(self, base: Path, adapter: Path, output: Path) -> Taken:
        """Put an adapter into a model by PEFT, and flush what it wrote.

        Raises
        ------
        UnavailableError
            If there is none, it fails, takes longer than `LIMIT`, or leaves no model.
        """
        command = [str(self.python), "-c", _PEFT, str(base), str(adapter), str(output)]
        return _run_and_flush(command, output)


def _run_and_flush(command: Sequence[str], output: Path) -> Taken:
    """Run another program, and flush the model that it wrote."""
    done = run_process(command, output.parent, _OFFLINE, LIMIT)
    if not any(output.glob("*.safetensors")):
        raise UnavailableError(f"{Path(command[0]).name} ended well, but left no model")
    started = time.perf_counter()
    for path in sorted(output.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = done.seconds + time.perf_counter() - started
    return Taken(seconds, seconds, done.peak_memory)


def _error_of(output: str) -> str | None:
    """Return the message of an error that oxmerge told as JSON."""
    try:
        return str(json.loads(output)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text[-_LAST_LINES:].splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
