"""The end-to-end bench: the floor, oxmerge and mergekit on the same files, interleaved.

    python benches/end_to_end.py --data DIR --mergekit PYTHON [--cold] [--record]

What the numbers mean is in benches/README.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import machine
from cases import CASES, Case
from checkpoints import TUNE_STD
from contenders import (
    BenchError,
    FloorSettings,
    Mergekit,
    Oxmerge,
    build_floor,
    calibrate,
    floor,
    remove,
    shard_files,
    this_python,
    weight_bytes,
)
from table import Record, Row, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from contenders import Run

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "record"
SPARSE = "7b"
SPARE_BYTES = 1 << 30
WARM_ENOUGH, COLD_ENOUGH = 0.99, 0.01


@dataclass
class Bench:
    """One go: where it works, who runs and how often."""

    root: Path
    size: str
    rounds: int
    mergekit_rounds: int
    recalibrate: bool
    oxmerge: Oxmerge | None
    mergekit: Mergekit | None

    def row(self, name: str, state: str) -> Row:
        """Measures one case in one state."""
        case = CASES[name]
        inputs = self.inputs(case)
        moved = sum(path.stat().st_size for path in inputs) + weight_bytes(self.root / "tune_a")
        row = Row(name, state, moved)
        if self.size != SPARSE:
            row.settings = self.floor_settings(case, state)
        recipe = self.root / f"{name}.yml"
        recipe.write_text(case.recipe(self.root))
        for number in range(self.rounds):
            self.round(row, case, recipe, number)
        for who in ("floor", "oxmerge", "mergekit"):
            remove(self.out(who))
        return row

    def round(self, row: Row, case: Case, recipe: Path, number: int) -> None:
        """Everyone once."""
        settings, oxmerge, mergekit = row.settings, self.oxmerge, self.mergekit
        if settings is not None:
            models = [self.root / model for model in case.models]
            self.attempt(row, case, "floor", lambda out: floor(settings, models, out))
        if oxmerge:
            self.attempt(row, case, "oxmerge", lambda out: oxmerge.run(recipe, out))
        if mergekit and number < self.mergekit_rounds:
            read = sum(path.stat().st_size for path in self.inputs(case))
            self.attempt(row, case, "mergekit", lambda out: mergekit.run(recipe, out, read))
            self.compare(row, case)

    def attempt(self, row: Row, case: Case, who: str, run: Callable[[Path], Run]) -> None:
        """Runs a contender once. One that fails is out for the rest of the row, not of the go."""
        if who in row.failed:
            return
        self.prepare(who, case, row.state, row)
        try:
            done = run(self.out(who))
        except BenchError as error:
            say(f"{row.case} {row.state}: {error}")
            row.failed[who] = error.summary
            return
        row.runs.setdefault(who, []).append(done)
        say(f"{row.case} {row.state}: {who} {done.seconds:.2f} s, peak {done.peak >> 20} MiB")

    def compare(self, row: Row, case: Case) -> None:
        """Holds the outputs against each other, once a row."""
        both = {"oxmerge", "mergekit"} <= row.runs.keys() and not row.failed
        if both and case.deterministic and row.agreement is None:
            row.agreement = agreement(self.out("oxmerge"), self.out("mergekit"))

    def prepare(self, who: str, case: Case, state: str, row: Row | None = None) -> None:
        """Removes the contender's last output and brings the page cache into the state."""
        remove(self.out(who))
        files = self.inputs(case)
        if state == "warm":
            machine.warm(files)
        else:
            machine.drop(files)
        cached = machine.cached_share(files)
        wrong = state_fault(state, cached)
        if row is not None and wrong and wrong not in row.notes:
            row.notes.append(wrong)

    def floor_settings(self, case: Case, state: str) -> FloorSettings:
        """The floor's best settings: from the file that remembers them, or found now."""
        memory = self.root / "floor.json"
        key = f"{machine.label()}, {len(case.models)} models, {state}"
        known = json.loads(memory.read_text()) if memory.exists() else {}
        if key in known and not self.recalibrate:
            return FloorSettings(**known[key])
        say(f"calibrating the floor: {len(case.models)} models, {state}")
        models = [self.root / model for model in case.models]

        def time_one(settings: FloorSettings) -> float:
            self.prepare("floor", case, state)
            seconds = floor(settings, models, self.out("floor")).seconds
            say(f"  {seconds:.3f} s: {describe(settings)}")
            return seconds

        settings = calibrate(state, time_one)
        say(f"calibrated: {describe(settings)}")
        memory.write_text(json.dumps({**known, key: asdict(settings)}, indent=2) + "\n")
        return settings

    def inputs(self, case: Case) -> list[Path]:
        return [path for model in case.models for path in shard_files(self.root / model)]

    def out(self, who: str) -> Path:
        return self.root / f"out-{who}"


def state_fault(state: str, cached: float | None) -> str | None:
    """What is wrong with the state of the page cache, if anything."""
    if cached is None:
        return "the state of the page cache could not be verified"
    if state == "warm" and cached < WARM_ENOUGH:
        return f"only {cached:.0%} of the inputs were in the page cache"
    if state == "cold" and cached > COLD_ENOUGH:
        return f"{cached:.0%} of the inputs were still in the page cache"
    return None


def agreement(ours: Path, theirs: Path) -> dict[str, float]:
    """Compares the outputs in a process of its own."""
    command = [sys.executable, str(HERE / "agreement.py"), str(ours), str(theirs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"the outputs could not be compared:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def ensure_models(root: Path, size: str, step: float) -> None:
    """Makes the models where they are missing; a model's index is its last file."""
    if (root / "tune_b" / "model.safetensors.index.json").exists():
        return
    say(f"making the {size} models")
    what = ["--size", size, "--step", str(step)]
    subprocess.run([sys.executable, str(HERE / "checkpoints.py"), str(root), *what], check=True)


def check_disk(root: Path, size: str) -> None:
    """The contenders' outputs may lie side by side."""
    outputs = 1 if size == SPARSE else 3
    need = outputs * weight_bytes(root / "tune_a") + SPARE_BYTES
    free = shutil.disk_usage(root).free
    if free < need:
        raise BenchError(f"{need / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free")


def find_contenders(
    options: argparse.Namespace, root: Path
) -> tuple[Oxmerge | None, Mergekit | None]:
    """Who can run; who cannot is named."""
    oxmerge = Oxmerge.find(options.oxmerge, root)
    if oxmerge is None:
        say("oxmerge not installed: its columns stay empty")
    mergekit = None if options.size == SPARSE else Mergekit.find(options.mergekit)
    if mergekit is None:
        say("no mergekit (see --mergekit): its column stays empty")
    else:
        mergekit.prepare(root)
    return oxmerge, mergekit


def start_record(options: argparse.Namespace, bench: Bench) -> Record:
    notes = [
        (
            f"best of {options.rounds} rounds, interleaved, with the median in brackets; "
            f"mergekit: {options.mergekit_rounds}"
        ),
        (
            "floor and oxmerge seconds: from the first open or read to the last fsync; process "
            "seconds: from start to exit; mergekit seconds: the process and an fsync of its files"
        ),
        "GB/s: every input byte once and every output byte once, by the seconds",
        f"load average at the start: {machine.load_average():.2f}",
    ]
    if options.size == SPARSE:
        notes.append("the inputs are sparse: only the peaks say anything")
    versions = {}
    if bench.oxmerge:
        versions["oxmerge"] = bench.oxmerge.version
    if bench.mergekit:
        versions["mergekit"] = f"{bench.mergekit.version}, default flags"
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d")
    return Record(now, machine.describe(bench.root), versions, kind(options), notes)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Floor, oxmerge and mergekit, interleaved.")
    parser.add_argument("--data", type=Path, required=True, help="where inputs and outputs go")
    parser.add_argument("--size", choices=("1b", "tiny", SPARSE), default="1b")
    parser.add_argument("--step", type=float, default=TUNE_STD, help="how far fine-tunes are away")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--cases", type=case_list, default=list(CASES), help="comma-separated")
    parser.add_argument(
        "--cold",
        type=case_list,
        nargs="?",
        const=["linear"],
        default=[],
        metavar="CASES",
        help="also run these cases with the inputs dropped from the page cache (bare: linear)",
    )
    parser.add_argument("--oxmerge", type=Path, default=this_python(), metavar="PYTHON")
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON")
    parser.add_argument("--mergekit-rounds", type=int, default=1)
    parser.add_argument("--recalibrate", action="store_true", help="find the floor's best anew")
    parser.add_argument("--record", action="store_true", help="write to benches/record/")
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def case_list(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(CASES)}")
    return names


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def kind(options: argparse.Namespace) -> str:
    """What the models are called: their size, and how far they are away if not as usual."""
    return options.size if options.step == TUNE_STD else f"{options.size}-{options.step:g}"


def run(options: argparse.Namespace) -> Record:
    root = options.data.resolve() / kind(options)
    root.mkdir(parents=True, exist_ok=True)
    ensure_models(root, options.size, options.step)
    check_disk(root, options.size)
    build_floor()
    oxmerge, mergekit = find_contenders(options, root)
    bench = Bench(
        root,
        options.size,
        options.rounds,
        options.mergekit_rounds,
        options.recalibrate,
        oxmerge,
        mergekit,
    )
    record = start_record(options, bench)
    states = [(name, "warm") for name in options.cases] + [(name, "cold") for name in options.cold]
    for name, state in states:
        record.rows.append(bench.row(name, state))
    return record


def main() -> int:
    options = parse()
    try:
        record = run(options)
    except BenchError as error:
        say(f"bench: {error}")
        return 1
    print(record.page(), end="")
    if options.record:
        suffix = "" if kind(options) == "1b" else f"-{kind(options)}"
        record.save(RECORDS, f"{record.date}-{machine.label()}{suffix}")
    return 1 if any(row.failed for row in record.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
