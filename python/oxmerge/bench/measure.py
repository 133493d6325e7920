"""Jobs and how they are measured: in rounds, interleaved, so that a slow moment falls on all."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from oxmerge.bench.record import Row


class UnavailableError(Exception):
    """Something cannot be measured here; the message says what and why."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What one run took.

    Attributes
    ----------
    seconds
        By the clock of whoever knows best when the work began and ended.
    process_seconds, peak_memory
        Of the whole process, where the run was one.
    threads, simd
        What it said of itself, where it did.
    """

    seconds: float
    process_seconds: float | None = None
    peak_memory: int | None = None
    threads: int | None = None
    simd: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """Something to measure.

    Attributes
    ----------
    row
        What it is; its seconds are still to come.
    run
        Does it once.
    prepare
        Brings the machine into the state that the row tells of. Not on the clock.
    warm_up
        Whether to run it once before it counts.
    rounds
        At most so many, where each takes long.
    """

    row: Row
    run: Callable[[], Taken]
    prepare: Callable[[], None] | None = None
    warm_up: bool = False
    rounds: int | None = None


def timed(work: Callable[[], object]) -> Callable[[], Taken]:
    """Return `work` with a clock around it."""

    def run() -> Taken:
        started = time.perf_counter()
        work()
        return Taken(time.perf_counter() - started)

    return run


def measure(
    jobs: Iterable[Job], rounds: int, say: Callable[[str], None]
) -> tuple[list[Row], list[str]]:
    """Run every job `rounds` times, one after the other in each round.

    Parameters
    ----------
    jobs
        In the order of the rows to come.
    rounds
        Runs of each that count.
    say
        Told what is measured now.

    Returns
    -------
    rows, notes
        A row for each job, and a note for each that cannot run here.
    """
    waiting = list(jobs)
    taken: dict[int, list[Taken]] = {}
    notes: list[str] = []
    for number in range(-1, rounds):
        for job in list(waiting):
            if number >= (rounds if job.rounds is None else job.rounds):
                continue
            if number < 0 and not job.warm_up:
                continue
            turn = "warm-up" if number < 0 else f"round {number + 1} of {rounds}"
            say(f"{job.row.title} ({turn})")
            try:
                if job.prepare is not None:
                    job.prepare()
                done = job.run()
            except UnavailableError as reason:
                notes.append(f"{job.row.title}: not measured: {reason}")
                waiting.remove(job)
                continue
            if number >= 0:
                taken.setdefault(id(job), []).append(done)
    return [_filled(job.row, taken[id(job)]) for job in waiting if id(job) in taken], notes


def _filled(row: Row, runs: list[Taken]) -> Row:
    processes = tuple(run.process_seconds for run in runs if run.process_seconds is not None)
    return replace(
        row,
        seconds=tuple(run.seconds for run in runs),
        process_seconds=processes,
        peak_memory=max((run.peak_memory for run in runs if run.peak_memory), default=None),
        threads=row.threads or runs[0].threads,
        simd=row.simd or runs[0].simd,
    )
