"""The record: what was measured, as data and as a table."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cases import CASES, PEAK_LIMIT, REST_LIMIT

if TYPE_CHECKING:
    from pathlib import Path

    from contenders import FloorSettings, Run

HEAD = (
    "case",
    "state",
    "floor s",
    "oxmerge s",
    "process s",
    "mergekit s",
    "× floor",
    "mergekit ×",
    "floor GB/s",
    "oxmerge GB/s",
    "peak MiB floor / oxmerge / mergekit",
    "targets",
)
MIB, GIB = 1 << 20, 1 << 30
NONE = "–"


@dataclass
class Row:
    """All runs of one case in one state."""

    case: str
    state: str
    moved_bytes: int  # every input byte once, every output byte once
    settings: FloorSettings | None = None
    runs: dict[str, list[Run]] = field(default_factory=dict)
    agreement: dict[str, float] | None = None
    failed: dict[str, str] = field(default_factory=dict)  # who, and what it said
    notes: list[str] = field(default_factory=list)

    def seconds(self, who: str) -> float | None:
        """A contender's best."""
        return min((run.seconds for run in self.runs.get(who, [])), default=None)

    def peak(self, who: str) -> int | None:
        return max((run.peak for run in self.runs.get(who, [])), default=None)

    def times_floor(self) -> float | None:
        return ratio(self.seconds("oxmerge"), self.seconds("floor"))

    def times_mergekit(self) -> float | None:
        return ratio(self.seconds("mergekit"), self.seconds("oxmerge"))

    def rest(self) -> float | None:
        """The least time that an oxmerge process spent outside the engine."""
        runs = self.runs.get("oxmerge", [])
        return min((run.process_seconds - run.seconds for run in runs), default=None)

    def misses(self, *, only_memory: bool) -> list[str] | None:
        """The targets that oxmerge missed; None where it did not run."""
        if "oxmerge" in self.failed:
            return ["oxmerge failed"]
        peak, rest = self.peak("oxmerge"), self.rest()
        if peak is None or rest is None:
            return None
        found = [f"peak > {PEAK_LIMIT // MIB} MiB"] if peak > PEAK_LIMIT else []
        if only_memory:
            return found
        if rest > REST_LIMIT:
            found.append(f"rest of the process {rest:.2f} s > {REST_LIMIT} s")
        return found + self.slow()

    def slow(self) -> list[str]:
        target = CASES[self.case].targets.get(self.state)
        if target is None:
            return []
        found = []
        floor, kit = self.times_floor(), self.times_mergekit()
        if floor is not None and floor > target.floor:
            found.append(f"> {target.floor} × floor")
        if kit is not None and target.mergekit is not None and kit < target.mergekit:
            found.append(f"mergekit < {target.mergekit:g} ×")
        return found


@dataclass
class Record:
    """One go of the bench."""

    date: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    size: str
    notes: list[str]
    rows: list[Row] = field(default_factory=list)

    def save(self, directory: Path, name: str) -> None:
        """Writes the record as data and as a table."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        (directory / f"{name}.md").write_text(self.page())

    def page(self) -> str:
        memory = f"{int(self.machine['memory_bytes']) / GIB:.1f} GiB"
        about = {**self.machine, "memory_bytes": memory, **self.versions}
        parts = [
            f"# End to end, {self.size}, {self.date}",
            "\n".join(
                f"- {key.removesuffix('_bytes').replace('_', ' ')}: {value}"
                for key, value in about.items()
            ),
            self.table(),
            "\n".join(f"- {note}" for note in self.all_notes()),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def table(self) -> str:
        lines = [HEAD, ("---",) * len(HEAD), *(self.cells(row) for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def cells(self, row: Row) -> tuple[str, ...]:
        only_memory = self.size != "1b"
        misses = row.misses(only_memory=only_memory)
        met = "met (peak only)" if only_memory else "met"
        return (
            row.case,
            row.state,
            times([run.seconds for run in row.runs.get("floor", [])]),
            times([run.seconds for run in row.runs.get("oxmerge", [])]),
            times([run.process_seconds for run in row.runs.get("oxmerge", [])]),
            times([run.seconds for run in row.runs.get("mergekit", [])]),
            number(row.times_floor()),
            number(row.times_mergekit(), digits=1),
            rate(row.moved_bytes, row.seconds("floor")),
            rate(row.moved_bytes, row.seconds("oxmerge")),
            " / ".join(mebibytes(row.peak(who)) for who in ("floor", "oxmerge", "mergekit")),
            NONE if misses is None else "; ".join(misses) or met,
        )

    def all_notes(self) -> list[str]:
        notes = list(self.notes)
        for row in self.rows:
            here = f"{row.case} {row.state}"
            notes += [f"{here}: {note}" for note in row.notes]
            notes += [f"{here}: {who} failed: {why}" for who, why in row.failed.items()]
            if row.settings is not None:
                notes.append(f"{here}: floor at {describe(row.settings)}")
            if row.agreement is not None:
                notes.append(f"{here}: {agreement_line(row.agreement)}")
        return notes


def describe(settings: FloorSettings) -> str:
    return (
        f"{settings.threads} threads, {settings.piece // MIB} MiB pieces, "
        f"{settings.read} reads, {settings.write} writes"
    )


def agreement_line(found: dict[str, Any]) -> str:
    return (
        f"of {found['elements']:,} elements {found['equal']:.4%} equal mergekit's bit for bit, "
        f"{found['beyond_two_steps']:.4%} lie more than two bfloat16 steps off, "
        f"the furthest by {found['largest_difference']:.2g}"
    )


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def times(seconds: list[float]) -> str:
    """Best and median, or the one there is."""
    if not seconds:
        return NONE
    if len(seconds) == 1:
        return f"{seconds[0]:.2f}"
    return f"{min(seconds):.2f} ({statistics.median(seconds):.2f})"


def number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def rate(moved: int, seconds: float | None) -> str:
    return NONE if not seconds else f"{moved / seconds / 1e9:.2f}"


def mebibytes(value: int | None) -> str:
    return NONE if value is None else f"{value / MIB:.0f}"
