"""Programs that are run as processes of their own, and what they took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oxmerge.bench.measure import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LAUNCHER = Path(__file__).with_name("launch.py")
_LAST_LINES = 2000


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
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run a program in `folder`.

    Raises
    ------
    UnavailableError
        If it cannot be started or fails; with the last that it said.
    """
    with tempfile.TemporaryDirectory(prefix="oxmerge-bench-") as place:
        report = Path(place) / "report.json"
        done = subprocess.run(  # noqa: S603 - the command is ours
            [sys.executable, "-I", "-S", str(_LAUNCHER), str(report), *command],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            raise UnavailableError(f"{command[0]} cannot be started: {_last_line(done.stderr)}")
        found = json.loads(report.read_text(encoding="utf-8"))
    if found["code"] != 0:
        name = Path(command[0]).name
        said = _last_line(done.stderr or done.stdout)
        raise UnavailableError(f"{name} ended with {found['code']}: {said}")
    return Finished(done.stdout, found["seconds"], found["peak_memory"])


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text[-_LAST_LINES:].splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
