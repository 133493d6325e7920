"""Jobs and how they are measured: in rounds, interleaved, so that a slow moment falls on all."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from oxmerge.sizes import format_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    threads, simd, predicted_memory
        What it said of itself, where it did.
    """

    seconds: float
    process_seconds: float | None = None
    peak_memory: int | None = None
    threads: int | None = None
    simd: str | None = None
    predicted_memory: int | None = None


@dataclass(slots=True, eq=False)
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
        At most so many, the last ones, where each takes long.
    """

    row: Row
    run: Callable[[], Taken]
    prepare: Callable[[], None] | None = None
    warm_up: bool = False
    rounds: int | None = None
    taken: list[Taken] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    def runs_in(self, number: int, rounds: int) -> bool:
        """Return whether it runs in a round; the one before the first is for warming up."""
        return self.warm_up if number < 0 else number >= rounds - (self.rounds or rounds)

    def once(self, *, counts: bool) -> None:
        """Prepare and run it."""
        started = time.perf_counter()
        if self.prepare is not None:
            self.prepare()
        done = self.run()
        self.busy.append(time.perf_counter() - started)
        if counts:
            self.taken.append(done)

    def filled(self) -> Row:
        """Return the row with what was measured."""
        runs = self.taken
        processes = tuple(run.process_seconds for run in runs if run.process_seconds is not None)
        return replace(
            self.row,
            seconds=tuple(run.seconds for run in runs),
            process_seconds=processes,
            peak_memory=max((run.peak_memory for run in runs if run.peak_memory), default=None),
            predicted_memory=runs[0].predicted_memory,
            threads=self.row.threads or runs[0].threads,
            simd=self.row.simd or runs[0].simd,
        )


def timed(work: Callable[[], object]) -> Callable[[], Taken]:
    """Return `work` with a clock around it."""

    def run() -> Taken:
        started = time.perf_counter()
        work()
        return Taken(time.perf_counter() - started)

    return run


def measure(
    jobs: Sequence[Job], rounds: int, say: Callable[[str], None]
) -> tuple[list[Row], list[str]]:
    """Run every job `rounds` times, one after the other in each round.

    Parameters
    ----------
    jobs
        In the order of the rows to come.
    rounds
        Runs of each that count.
    say
        Told what is measured now, and how long the rest will take.

    Returns
    -------
    rows, notes
        A row for each job, and a note for each that cannot run here.
    """
    turns = [
        (number, job) for number in range(-1, rounds) for job in jobs if job.runs_in(number, rounds)
    ]
    notes: dict[int, str] = {}
    for at, (number, job) in enumerate(turns):
        if id(job) in notes:
            continue
        turn = "warm-up" if number < 0 else f"round {number + 1} of {rounds}"
        ahead = [each for _, each in turns[at:] if id(each) not in notes]
        say(f"{turn}, {time_left(ahead)}: {job.row.title}")
        try:
            job.once(counts=number >= 0)
        except UnavailableError as reason:
            notes[id(job)] = f"{job.row.title}: not measured: {reason}"
    return [job.filled() for job in jobs if job.taken and id(job) not in notes], list(
        notes.values()
    )


def time_left(ahead: Sequence[Job]) -> str:
    """Return how long these runs take, by how long earlier ones of the same jobs took."""
    known = [sum(job.busy) / len(job.busy) for job in ahead if job.busy]
    first = len(ahead) - len(known)
    if not known or first > len(known):
        return f"{len(ahead)} runs left"
    return f"{'more than ' if first else 'about '}{format_duration(sum(known))} left"
