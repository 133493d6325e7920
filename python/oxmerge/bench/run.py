"""One go of the bench: every part that is asked for, and the record of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oxmerge.bench import PARTS
from oxmerge.bench.crew import Crew
from oxmerge.bench.kernels import Arrays, kernel_jobs, simd_jobs, thread_jobs
from oxmerge.bench.machine import cores, describe
from oxmerge.bench.measure import UnavailableError, measure
from oxmerge.bench.memory import copy_jobs
from oxmerge.bench.merges import Merges
from oxmerge.bench.record import Record, Row
from oxmerge.bench.storage import storage_jobs
from oxmerge.demo import make_demo, model_bytes
from oxmerge.errors import OxmergeError
from oxmerge.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oxmerge.bench.others import Mergekit

_IN_MEMORY = frozenset({"memory", "kernels", "threads", "simd"})
_FINE_TUNES = 2
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, and how.

    Attributes
    ----------
    directory
        Files are made in a new folder there, which is removed afterwards.
    parts
        Which of `PARTS`.
    size
        Of the models that are merged: a key of `oxmerge.demo.SIZES`.
    rounds
        Runs of each thing.
    elements
        Of each array in memory.
    storage_bytes
        Of the file that is read and written.
    """

    directory: str = "."
    parts: tuple[str, ...] = PARTS
    size: str = "tiny"
    rounds: int = 5
    elements: int = 64 << 20
    storage_bytes: int = 256 << 20


Methods = Sequence[Mapping[str, Any]]
Say = Callable[[str], None]
Found = tuple[list[Row], list[str]]


def run(settings: Settings, methods: Methods, mergekit: Mergekit | None, say: Say) -> Record:
    """Measure.

    Parameters
    ----------
    settings
        What, and how.
    methods
        The engine's table of methods.
    mergekit
        Does the same merges, if it is there.
    say
        Told what is measured now.

    Raises
    ------
    OxmergeError
        If the directory is none, or its disk too small.
    OSError
        If files cannot be written there.
    """
    _check_disk(settings)
    machine = describe(settings.directory)
    mergekit, remarks = _ready(settings, mergekit, say)
    results: list[Found] = [
        ([], remarks),
        _in_memory(settings, methods, say),
        _storage(settings, say),
        _merges(settings, methods, mergekit, say),
    ]
    rows = [row for found, _ in results for row in found]
    notes = [
        *_first_notes(settings, max(machine["caches"].values(), default=None)),
        *(note for _, remarks in results for note in remarks),
    ]
    rows.sort(key=lambda row: PARTS.index(row.part))
    asked = {
        "size": settings.size,
        "rounds": settings.rounds,
        "elements": settings.elements,
        "storage_bytes": settings.storage_bytes,
    }
    if mergekit is not None:
        asked["mergekit"] = mergekit.version
        notes.append(
            "mergekit: once for each merge, with warm inputs and default flags; its seconds are "
            "those of its process and of an fsync of its files, which it leaves out"
        )
    return Record(machine, asked, tuple(rows), tuple(dict.fromkeys(notes)))


def _ready(
    settings: Settings, mergekit: Mergekit | None, say: Say
) -> tuple[Mergekit | None, list[str]]:
    """Return mergekit if it runs at all: seen before anything is measured, not minutes later."""
    if mergekit is None:
        return None, []
    say("starting mergekit")
    try:
        mergekit.prepare(Path(settings.directory))
    except UnavailableError as reason:
        return None, [f"mergekit {mergekit.version}: not measured: {reason}"]
    return mergekit, []


def _in_memory(settings: Settings, methods: Methods, say: Say) -> Found:
    wanted = _IN_MEMORY & set(settings.parts)
    if not wanted:
        return [], []
    say("making arrays")
    arrays = Arrays.draw(settings.elements)
    counts = thread_counts() if "threads" in wanted else list(dict.fromkeys((1, cores())))
    with ExitStack() as stack:
        crews = [stack.enter_context(Crew(count)) for count in counts]
        # The copy is the yardstick of the others, so it is always there.
        jobs = list(copy_jobs(arrays.inputs[0], arrays.output, crews))
        if "kernels" in wanted:
            jobs += kernel_jobs(arrays, methods)
        if "threads" in wanted:
            jobs += thread_jobs(arrays, methods, thread_counts())
        if "simd" in wanted:
            jobs += simd_jobs(arrays, methods)
        return measure(jobs, settings.rounds, say)


def _storage(settings: Settings, say: Say) -> Found:
    if "storage" not in settings.parts:
        return [], []
    with _folder(settings) as name, ExitStack() as stack:
        crews = [stack.enter_context(Crew(count)) for count in (1, cores() + 6)]
        say("making a file")
        jobs = list(storage_jobs(Path(name), settings.storage_bytes, crews))
        return measure(jobs, settings.rounds, say)


def _merges(settings: Settings, methods: Methods, mergekit: Mergekit | None, say: Say) -> Found:
    if "merge" not in settings.parts:
        return [], []
    with _folder(settings) as name:
        say(f"making models of size {settings.size}")
        models = make_demo(Path(name) / "models", settings.size, tuned=_FINE_TUNES).models
        merges = Merges(Path(name), models, methods, mergekit, say)
        rows, notes = measure(list(merges.jobs()), settings.rounds, say)
        return rows, merges.notes + notes


def thread_counts() -> list[int]:
    """Return 1, 2, 4, ... and the number of cores."""
    most = cores()
    return sorted({*(1 << power for power in range(most.bit_length()) if 1 << power < most), most})


def _folder(settings: Settings) -> tempfile.TemporaryDirectory[str]:
    """Make a folder for files, to be removed on exit."""
    return tempfile.TemporaryDirectory(
        prefix="oxmerge-bench-", dir=os.path.abspath(settings.directory)
    )


def _check_disk(settings: Settings) -> None:
    """Refuse a disk that is too small for what will be written at the same time."""
    needed = 0
    if "storage" in settings.parts:
        needed = 2 * settings.storage_bytes
    if "merge" in settings.parts:
        # The base, its fine-tunes, and the outputs of a merge and of the floor.
        needed = max(needed, (_FINE_TUNES + 3) * model_bytes(settings.size))
    status = os.statvfs(settings.directory)
    free = status.f_bavail * status.f_frsize
    if needed and free < needed + _SPARE_BYTES:
        raise OxmergeError(
            f"{format_size(needed + _SPARE_BYTES)} of disk are needed, "
            f"{format_size(free)} are free",
            file=settings.directory,
            advice="name a directory on another disk, or measure less: `--size tiny`, `--only`",
        )


def _first_notes(settings: Settings, largest_cache: int | None) -> Iterator[str]:
    yield "GB/s: every input byte once and every output byte once, by the median; GB are 10^9 bytes"
    if _IN_MEMORY & set(settings.parts):
        size = 2 * settings.elements
        if largest_cache is None:
            beside = "with caches of unknown size"
        else:
            beside = f"{'larger' if size > largest_cache else 'not larger'} than the largest cache"
        yield (
            f"in memory: arrays of {format_size(size, binary=True)}, {beside}; output into an "
            "array that is there; the copy is NumPy's"
        )
    if "storage" in settings.parts:
        yield (
            "storage: writes are timed to the end of fsync, into a new file; cold: dropped from "
            "the page cache and checked to be gone from it; a host or a disk may still hold it"
        )
    if "merge" in settings.parts:
        yield (
            "merge: floor and oxmerge from the first open or read to the last fsync, process "
            "seconds from start to exit; each merge is a process of its own, and its peak too"
        )
