"""One go of the bench: every part that is asked for, and the record of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oxmerge.bench import PARTS, USUAL
from oxmerge.bench.arrays import Arrays, copy_jobs, kernel_jobs, simd_jobs, thread_jobs
from oxmerge.bench.cases import SPREADS, cases
from oxmerge.bench.crew import Crews
from oxmerge.bench.machine import Others, cores, describe, warnings_of
from oxmerge.bench.measure import Job, UnavailableError, measure
from oxmerge.bench.merges import EXPERTS, LARGER, SHARD, SWEEP_OUTPUTS, Merges
from oxmerge.bench.programs import LIMIT
from oxmerge.bench.record import Record
from oxmerge.bench.storage import storage_jobs
from oxmerge.demo import model_bytes
from oxmerge.errors import OxmergeError
from oxmerge.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oxmerge.bench.programs import Mergekit

_IN_MEMORY = frozenset({"memory", "kernels", "threads", "simd"})
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
    methods
        Names of the methods that are measured; all of them if None.
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
    parts: tuple[str, ...] = USUAL
    methods: tuple[str, ...] | None = None
    size: str = "tiny"
    rounds: int = 5
    elements: int = 64 << 20
    storage_bytes: int = 256 << 20


Methods = Sequence[Mapping[str, Any]]
Say = Callable[[str], None]


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
    notes = list(_first_notes(settings, max(machine["caches"].values(), default=None)))
    others = Others()
    if mergekit is not None:
        # Seen before anything is measured, not minutes later.
        say("starting mergekit")
        try:
            mergekit.prepare(Path(settings.directory))
        except UnavailableError as reason:
            notes.append(f"mergekit {mergekit.version}: not measured: {reason}")
            mergekit = None
    with (
        tempfile.TemporaryDirectory(
            prefix="oxmerge-bench-", dir=os.path.abspath(settings.directory)
        ) as name,
        Crews() as crews,
    ):
        found = cases(methods, settings.methods)
        merges = Merges(Path(name), found, mergekit, crews, say)
        jobs = list(_jobs(settings, merges))
        rows, remarks = measure(jobs, settings.rounds, say)
    asked: dict[str, Any] = {
        name: getattr(settings, name) for name in ("size", "rounds", "elements", "storage_bytes")
    }
    if mergekit is not None:
        asked["mergekit"] = mergekit.version
        notes.append(
            "mergekit: once for each merge, with warm inputs and default flags, stopped after "
            f"{LIMIT:g} s; its seconds are those of its process and of an fsync of its files, "
            "which it leaves out"
        )
    machine |= others.busy()
    notes = [*warnings_of(machine), *notes, *merges.notes, *remarks]
    rows.sort(key=lambda row: PARTS.index(row.part))
    return Record(machine, asked, tuple(rows), tuple(dict.fromkeys(notes)))


def _jobs(settings: Settings, merges: Merges) -> Iterator[Job]:
    """Yield the jobs of all parts that are asked for, and make what they work on."""
    wanted, crews, say = set(settings.parts), merges.crews, merges.say
    if wanted & _IN_MEMORY:
        say("making arrays")
        arrays = Arrays.draw(settings.elements, crews.of(cores()))
        counts = thread_counts() if "threads" in wanted else list(dict.fromkeys((1, cores())))
        # The copies are the yardsticks of the others, so they are always there.
        yield from copy_jobs(arrays, counts, crews)
        if "kernels" in wanted:
            yield from kernel_jobs(arrays, merges.cases)
        if "threads" in wanted:
            yield from thread_jobs(arrays, merges.cases, counts)
        if "simd" in wanted:
            yield from simd_jobs(arrays, merges.cases)
    if "storage" in wanted:
        say("making a file")
        yield from storage_jobs(merges.folder, settings.storage_bytes, crews)
    if "merge" in wanted:
        yield from merges.of_methods(settings.size)
    if "sweep" in wanted:
        yield from merges.of_sweeps(settings.size)
    if "digests" in wanted:
        yield from merges.of_digests(settings.size)
    if "tensors" in wanted:
        yield from merges.of_many_tensors()
    if "fuse" in wanted:
        yield from merges.of_adapters(settings.size)


def thread_counts() -> list[int]:
    """Return 1, 2, 4, ... and the number of cores."""
    most = cores()
    return sorted({*(1 << power for power in range(most.bit_length()) if 1 << power < most), most})


def _check_disk(settings: Settings) -> None:
    """Refuse a disk that is too small for what will be written."""
    needed, parts = 0, settings.parts
    if "storage" in parts:
        needed += 2 * settings.storage_bytes
    if {"merge", "sweep", "digests"} & set(parts):
        # The base and its fine-tunes, and outputs: of the engine, the floor and mergekit.
        outputs = 2 * SWEEP_OUTPUTS if "sweep" in parts else 3
        needed += (1 + len(SPREADS) + outputs) * model_bytes(settings.size)
    if "tensors" in parts:
        needed += sum(10 * model_bytes(size) for size in EXPERTS)
    if "fuse" in parts:
        # The base, and outputs of the engine, the floor and another program, which writes two.
        needed += max(5 * model_bytes(settings.size), 3 * SHARD * (settings.size in LARGER))
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
    wanted = set(settings.parts)
    yield "GB/s: every input byte once and every output byte once, by the median; GB are 10^9 bytes"
    if _IN_MEMORY & wanted:
        size = 2 * settings.elements
        if largest_cache is None:
            beside = "with caches of unknown size"
        else:
            beside = f"{'larger' if size > largest_cache else 'not larger'} than the largest cache"
        yield (
            f"in memory: arrays of {format_size(size, binary=True)}, {beside}; output into an "
            "array that is there; memcpy: the fastest of several ways to copy, to read (into the "
            "cache) and to write (from the cache); shares are of as many bytes read and written"
        )
    if "storage" in wanted:
        yield (
            "storage: writes are timed to the end of fsync, into a new file; cold: dropped from "
            "the page cache and checked to be gone from it; a host or a disk may still hold it"
        )
    if {"merge", "sweep", "digests", "tensors", "fuse"} & wanted:
        yield (
            "merges: floor and oxmerge from the first open to the last fsync, process seconds "
            "from start to exit; each merge is a process of its own, and its peak too"
        )
    if "merge" in wanted:
        yield (
            f"fine-tunes are their base and noise of N(0, {SPREADS[0]:g}); "
            f"far ones of N(0, {SPREADS[-1]:g})"
        )
    if "tensors" in wanted:
        yield "tensors: DeepSeek-V3's layout with tiny matrices, three models, at most 3 rounds"
