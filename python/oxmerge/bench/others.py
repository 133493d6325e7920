"""Other programs that do the same merges."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from oxmerge.bench.measure import Taken, UnavailableError
from oxmerge.bench.process import run_process
from oxmerge.errors import OxmergeError

# Nothing is looked for on the network: all models are here.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_VERSION = (
    "import importlib.metadata as m, importlib.util as u, json\n"
    "print(json.dumps(m.version('mergekit') if u.find_spec('mergekit') else None))"
)


@dataclass(frozen=True, slots=True)
class Mergekit:
    """mergekit in an environment of its own.

    Attributes
    ----------
    program
        Its command.
    version
        Its version.
    """

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
        return cls(program, version)

    def prepare(self, folder: Path) -> None:
        """Import everything once, so that no run pays for reading torch from the disk.

        Raises
        ------
        UnavailableError
            If it cannot even say how it is used.
        """
        run_process([str(self.program), "--help"], folder)

    def run(self, recipe: Path, output: Path) -> Taken:
        """Merge once with default flags, and flush what it wrote: it does not.

        Raises
        ------
        UnavailableError
            If it fails, or leaves no model.
        """
        done = run_process([str(self.program), str(recipe), str(output)], recipe.parent, _OFFLINE)
        if not any(output.glob("*.safetensors")):
            raise UnavailableError("mergekit-yaml ended well, but left no model")
        started = time.perf_counter()
        for path in sorted(output.iterdir()):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        seconds = done.seconds + time.perf_counter() - started
        return Taken(seconds, seconds, done.peak_memory)
