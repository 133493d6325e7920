"""The three that run: the floor, oxmerge and mergekit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oxmerge.bench import others, process
from oxmerge.bench.measure import UnavailableError
from oxmerge.errors import OxmergeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from oxmerge.bench.process import Finished

HERE = Path(__file__).resolve().parent
FLOOR_MANIFEST = HERE / "floor" / "Cargo.toml"
FLOOR_PROGRAM = HERE / "floor" / "target" / "release" / "floor"

# The keys of oxmerge's JSON report that the bench reads.
SECONDS, BYTES_READ, BYTES_WRITTEN, PEAK = "seconds", "bytes_read", "bytes_written", "peak_memory"

THREADS = (2, 3, 4, 6, 8)
PIECES = (4 << 20, 8 << 20, 16 << 20)
READS = {"warm": ("mmap", "pread"), "cold": ("mmap", "pread", "direct")}
WRITES = ("direct", "buffered")
PATHS_KEPT = 2  # paths whose whole grid is tried
FINALISTS = 4
FINAL_ROUNDS = 3


class BenchError(Exception):
    """A contender failed, or said something that the bench does not understand."""

    @property
    def summary(self) -> str:
        """The first line: what a record keeps, since the rest may hold paths."""
        return str(self).splitlines()[0]


@dataclass(frozen=True)
class Run:
    """One run of a contender. `seconds` is its own figure where it has one, else the process's."""

    seconds: float
    process_seconds: float
    peak: int
    bytes_read: int
    bytes_written: int


@contextmanager
def told() -> Iterator[None]:
    """Tells of a program that failed as the bench does."""
    try:
        yield
    except UnavailableError as error:
        # What the program said goes to a line of its own: it may hold paths.
        raise BenchError(str(error).replace(": ", ":\n", 1)) from error


def run_process(command: list[str], cwd: Path) -> Finished:
    """Runs a command and takes wall time and peak resident set from outside."""
    with told():
        return process.run_process(command, cwd)


@dataclass(frozen=True)
class FloorSettings:
    """How the floor runs."""

    read: str = "mmap"
    write: str = "direct"
    threads: int = 4
    piece: int = 8 << 20


def build_floor() -> None:
    """Builds the floor program."""
    command = ["cargo", "build", "--release", "--quiet", "--manifest-path", str(FLOOR_MANIFEST)]
    target = {"CARGO_TARGET_DIR": str(HERE / "floor" / "target")}
    subprocess.run(command, check=True, env={**os.environ, **target})


def floor(settings: FloorSettings, models: list[Path], out: Path) -> Run:
    """Runs the floor once. The clock is its own: from opening the output to the last fsync."""
    options = {key: str(value) for key, value in asdict(settings).items()}
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    command = [str(FLOOR_PROGRAM), *flags, str(out), *map(str, models)]
    done = run_process(command, out.parent)
    report: dict[str, Any] = json.loads(done.output)
    seconds, peak = report["seconds"], report["peak_rss"]
    return Run(seconds, done.seconds, peak, report["bytes_read"], report["bytes_written"])


def calibrate(state: str, time_one: Callable[[FloorSettings], float]) -> FloorSettings:
    """Finds the floor's best settings: paths, then threads and pieces, then the best few again."""

    def best(candidates: Iterable[FloorSettings], keep: int, rounds: int) -> list[FloorSettings]:
        pool = list(candidates)
        times: dict[FloorSettings, float] = {}
        for _ in range(rounds):  # interleaved, so that a slow moment falls on all
            for one in pool:
                times[one] = min(time_one(one), times.get(one, float("inf")))
        return sorted(pool, key=times.__getitem__)[:keep]

    paths = (FloorSettings(read, write) for read in READS[state] for write in WRITES)
    kept = best(paths, PATHS_KEPT, rounds=2)
    grid = [
        replace(path, threads=threads, piece=piece)
        for path in kept
        for threads in THREADS
        for piece in PIECES
    ]
    return best(best(grid, FINALISTS, rounds=1), 1, FINAL_ROUNDS)[0]


@dataclass(frozen=True)
class Oxmerge:
    """An interpreter that has oxmerge.

    The version does not tell one build from the next, so it carries the start of the SHA-256 of
    the compiled module.
    """

    python: Path
    version: str

    @classmethod
    def find(cls, python: Path, cwd: Path) -> Oxmerge | None:
        """Looks from `cwd`, so that a source tree is not mistaken for an installed package."""
        version = installed_version(python, "oxmerge", cwd)
        return cls(python, f"{version}, build {build_id(python, cwd)}") if version else None

    def run(self, recipe: Path, out: Path) -> Run:
        """Merges once. `seconds` is the engine's: from the first read to the last fsync."""
        command = [str(self.python), "-m", "oxmerge", "merge", str(recipe), str(out)]
        done = run_process([*command, "--json", "--quiet"], out.parent)
        try:
            report = json.loads(done.output)
            seconds, read, written = (report[k] for k in (SECONDS, BYTES_READ, BYTES_WRITTEN))
            peak = max(done.peak_memory, report[PEAK])
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(f"oxmerge's report lacks what the bench reads: {error!r}") from error
        return Run(seconds, done.seconds, peak, read, written)


@dataclass(frozen=True)
class Mergekit:
    """The mergekit of `oxmerge bench`, with what the bench here wants to know beside."""

    other: others.Mergekit

    @property
    def version(self) -> str:
        return self.other.version

    @classmethod
    def find(cls, python: Path | None) -> Mergekit | None:
        """None where there is no mergekit beside the interpreter."""
        if python is None:
            return None
        try:
            return cls(others.Mergekit.find(str(python)))
        except OxmergeError:
            return None

    def prepare(self, cwd: Path) -> None:
        """Imports everything once, so that no round pays for reading torch from the disk."""
        with told():
            self.other.prepare(cwd)

    def run(self, recipe: Path, out: Path, bytes_read: int) -> Run:
        """Merges once with default flags, and flushes what it wrote."""
        with told():
            done = self.other.run(recipe, out)
        peak = done.peak_memory or 0
        return Run(done.seconds, done.seconds, peak, bytes_read, weight_bytes(out))


def installed_version(python: Path, package: str, cwd: Path) -> str | None:
    """The version of an importable package, or None. Does not import it: mergekit takes seconds."""
    code = (
        "import sys, importlib.util as u, importlib.metadata as m\n"
        "name = sys.argv[1]\n"
        "print(m.version(name) if u.find_spec(name) else '')"
    )
    command = [str(python), "-c", code, package]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def build_id(python: Path, cwd: Path) -> str:
    """Names the compiled module of oxmerge by its content."""
    code = (
        "import importlib.util as u\n"
        "print(*u.find_spec('oxmerge').submodule_search_locations, sep='\\n')"
    )
    done = subprocess.run(
        [str(python), "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    found = sorted(p for line in done.stdout.splitlines() for p in Path(line).glob("*.so"))
    digest = hashlib.sha256()
    for path in found:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12] if found else "unknown"


def this_python() -> Path:
    return Path(sys.executable)


def shard_files(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def weight_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in shard_files(model))


def remove(directory: Path) -> None:
    """Removes an output and waits for the disk, so that no run pays for the one before it."""
    shutil.rmtree(directory, ignore_errors=True)
    os.sync()
