"""Merges of checkpoints on the disk, beside the floor and beside other programs.

Every merge is a process of its own, so its peak memory is that of the merge alone. The engine's
seconds go from the first open to the last fsync, as the floor's do; those of its process are kept
too. Other programs have only the latter, and what they leave unflushed is flushed on their clock.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

import oxmerge
from oxmerge.bench import cache
from oxmerge.bench.cases import COLD, DIGESTED, LEFT_OUT, MANY, SPREADS, SWEPT, Case, with_far
from oxmerge.bench.measure import Job, Taken, UnavailableError
from oxmerge.bench.programs import oxmerge as run_oxmerge
from oxmerge.bench.record import Row
from oxmerge.bench.storage import Floor
from oxmerge.bench.transfer import Transfer
from oxmerge.demo import LINEAR, SIZES, make_adapter, make_demo
from oxmerge.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from oxmerge.bench.crew import Crews
    from oxmerge.bench.programs import Mergekit
    from oxmerge.bench.transfer import Way

SWEEP_OUTPUTS = 9
EXPERTS = ("experts", "experts-twice")
SPARSE = "experts-671b"
_MANY_ROUNDS = 3
RANK = 16
LARGER = {"1b": "70b"}
"""Sizes that are too large for most disks, beside others: a part is made of them."""
SHARD = 4 << 30
"""Bytes of that part."""
_FUSED = Case("passthrough", has_base=False, models=1, shared={}, each=({},))


@dataclass
class Merges:
    """Makes jobs of merges.

    Attributes
    ----------
    folder
        Where models, recipes and outputs go.
    cases
        One of each method.
    mergekit
        Who else does the same.
    crews
        Whose threads are the floor's.
    say
        Told what is done now.
    notes
        What a reader of the record should know; more of them when the jobs have run.
    """

    folder: Path
    cases: Sequence[Case]
    mergekit: Mergekit | None
    crews: Crews
    say: Callable[[str], None]
    notes: list[str] = field(default_factory=list)
    _models: dict[str, Sequence[Path]] = field(default_factory=dict)
    _ways: dict[str, Way | None] = field(default_factory=dict)

    def of_methods(self, size: str) -> Iterator[Job]:
        """Yield a merge by each method, some with cold inputs and with far fine-tunes too."""
        models = self._made(size)
        found = list(with_far(self.cases))
        for state in ("warm", "cold"):
            for case in found:
                if state == "warm" or case.method in COLD:
                    yield from self._of(_Merge(self, case, case.name, case.of(models), state))

    def of_sweeps(self, size: str) -> Iterator[Job]:
        """Yield sweeps: several outputs in one pass."""
        models = self._made(size)
        for case in self.cases:
            if case.method in SWEPT:
                name = f"{case.method}, {SWEEP_OUTPUTS} outputs"
                swept = f"{SWEPT[case.method]}=0.1:0.9:{SWEEP_OUTPUTS}"
                merge = _Merge(self, case, name, case.of(models), "warm", swept=swept)
                yield from self._of(merge, part="sweep")

    def of_digests(self, size: str) -> Iterator[Job]:
        """Yield merges as they are, and without their digests, or their journal."""
        models = self._made(size)
        for state in ("warm", "cold"):
            for case in self.cases:
                for left_out, options in LEFT_OUT.items():
                    if case.method in DIGESTED:
                        name = f"{case.name}{left_out}"
                        merge = _Merge(self, case, name, case.of(models), state, options=options)
                        yield from self._of(merge, part="digests")

    def of_many_tensors(self) -> Iterator[Job]:
        """Yield plans and merges of the layout of DeepSeek-V3, and a plan of its real sizes."""
        for size in (*EXPERTS, SPARSE):
            models = self._made(size, SPREADS[:2])
            tensors = sum(1 for _ in SIZES[size].tensors())
            for case in self.cases:
                if case.method not in MANY:
                    continue
                # Three models in all, with or without a base.
                given = replace(case, models=3, each=(*case.each, *case.each)[: 3 - case.has_base])
                name = (
                    f"{case.method}, {'real sizes' if size == SPARSE else f'{tensors:,} tensors'}"
                )
                merge = _Merge(self, given, name, models, "warm", tensors=tensors)
                recipe = merge.recipe()
                yield Job(
                    replace(merge.row("tensors"), name=f"plan of {name}"),
                    lambda recipe=recipe: self._plan(recipe),  # type: ignore[misc]
                    rounds=_MANY_ROUNDS,
                )
                if size != SPARSE:
                    for job in self._of(merge, part="tensors"):
                        job.rounds = job.rounds or _MANY_ROUNDS
                        yield job

    def of_adapters(self, size: str) -> Iterator[Job]:
        """Yield a model with an adapter of all its linear layers, written as a model."""
        base, adapter = self._adapted(size)
        merge = _Merge(self, _FUSED, f"rank {RANK} into {size}", [base], "warm", adapter=adapter)
        yield from self._of(merge, part="fuse")
        if self.mergekit is not None:
            row = replace(merge.row("fuse"), by="peft")
            yield Job(row, merge.by_peft, lambda: merge.prepare(merge.theirs), rounds=1)
        if size in LARGER:
            base, adapter = self._adapted(LARGER[size])
            name = f"rank {RANK} into a part of {LARGER[size]}"
            part = _Part(self, _FUSED, name, [base], "sparse", adapter=adapter)
            yield from self._of(part, part="fuse")

    def _adapted(self, size: str) -> tuple[Path, Path]:
        """Make a base and an adapter."""
        self.say(f"making a model of size {size} and an adapter")
        demo = make_demo(self.folder / f"{size}-adapted", size, spreads=())
        return demo.models[0], make_adapter(demo, size, rank=RANK, modules=LINEAR)

    def _of(self, merge: _Merge, part: str = "merge") -> Iterator[Job]:
        row = merge.row(part)
        yield from self._floor(merge, row)
        yield Job(row, merge.by_oxmerge, lambda: merge.prepare(merge.output))
        is_alike = merge.swept is None and part != "digests"
        if self.mergekit is not None and is_alike and merge.state == "warm":
            yield Job(
                replace(row, by="mergekit"),
                merge.by_mergekit,
                lambda: merge.prepare(merge.theirs),
                rounds=1,
            )

    def _floor(self, merge: _Merge, row: Row) -> Iterator[Job]:
        """Yield the floor of a merge, unless it has none; one that is alike has the same way."""
        first = merge.files_of(merge.models[0])
        sizes = [path.stat().st_size for path in first]
        outputs = [
            [self.folder / f"floor-{number}-{path.name}" for path in first]
            for number in range(merge.outputs)
        ]
        transfer = Transfer(sizes, [merge.files_of(model) for model in merge.models], outputs)
        floor = Floor(transfer, lambda: merge.prepare(merge.output), self.crews)
        count, outputs_in = len(merge.models), f", {merge.outputs} outputs" * (merge.outputs > 1)
        words = f"{count} x {format_size(sum(sizes))}, {merge.state}{outputs_in}"
        if words not in self._ways:
            try:
                way = floor.best_way(cold=merge.state == "cold", say=self.say)
                self.notes.append(f"floor of {words}: {way.words}")
                self._ways[words] = way
            except UnavailableError as reason:
                self.notes.append(f"no floor of {words}: {reason}")
                self._ways[words] = None
        found = self._ways[words]
        if found is not None:
            made = replace(row, by="floor", threads=found.threads)
            yield Job(made, floor.ready(found), floor.prepare)

    def _made(self, size: str, spreads: Sequence[float] = SPREADS) -> Sequence[Path]:
        """Return the models of a size, made when they are first asked for."""
        if size not in self._models:
            self.say(f"making models of size {size}")
            self._models[size] = make_demo(self.folder / size, size, spreads=spreads).models
        return self._models[size]

    def _plan(self, recipe: Path) -> Taken:
        done = run_oxmerge(self.folder, "plan", recipe.name)
        said = json.loads(done.output)
        return Taken(done.seconds, done.seconds, done.peak_memory, said["threads"])


@dataclass(frozen=True)
class _Merge:
    """One merge: what it reads and writes, and who does it."""

    bench: Merges
    case: Case
    name: str
    models: Sequence[Path]
    state: str
    swept: str | None = None
    tensors: int | None = None
    options: tuple[str, ...] = ()
    adapter: Path | None = None

    @property
    def outputs(self) -> int:
        return 1 if self.swept is None else SWEEP_OUTPUTS

    @property
    def output(self) -> Path:
        return self.bench.folder / "out"

    @property
    def theirs(self) -> Path:
        return self.bench.folder / "theirs"

    def files_of(self, model: Path) -> list[Path]:
        return sorted(model.glob("*.safetensors"))

    def row(self, part: str) -> Row:
        size = sum(path.stat().st_size for path in self.files_of(self.models[0]))
        row = Row(part, self.name, "oxmerge", self.state, size * len(self.models), size)
        return replace(row, bytes_written=size * self.outputs, tensors=self.tensors)

    def recipe(self) -> Path:
        """Write the recipe, and return where it is."""
        path = self.bench.folder / f"{self.name.replace(' ', '-')}.yml"
        models = [str(each) for each in self.models]
        if self.adapter is not None:
            models = [f"{each}+{self.adapter}" for each in models]
        path.write_text(self.case.recipe(models), encoding="utf-8")
        return path

    def prepare(self, output: Path) -> None:
        """Remove what the run before left, and bring the inputs into their state."""
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        files = [path for model in self.models for path in self.files_of(model)]
        cache.bring(files, cached=self.state == "warm")

    def by_oxmerge(self) -> Taken:
        recipe = self.recipe().name
        if self.swept is None:
            done = run_oxmerge(self.bench.folder, "merge", recipe, "out", *self.options)
            report = json.loads(done.output)
        else:
            words = ("sweep", recipe, "out/{n}", "--set", self.swept)
            done = run_oxmerge(self.bench.folder, *words)
            report = json.loads(done.output)["merges"][0]
        return Taken(
            report["seconds"],
            done.seconds,
            done.peak_memory,
            report["threads"],
            report["simd"],
            report["predicted_memory"],
        )

    @property
    def options(self) -> tuple[str, ...]:
        """What else the command line has."""
        return ()

    def by_peft(self) -> Taken:
        assert self.bench.mergekit is not None
        assert self.adapter is not None
        taken = self.bench.mergekit.fuse(self.models[0], self.adapter, self.theirs)
        said = _agreement(self.output, self.theirs)
        self.bench.notes.append(f"{self.name}: beside PEFT, {said}")
        shutil.rmtree(self.theirs)
        return taken

    def by_mergekit(self) -> Taken:
        assert self.bench.mergekit is not None
        # It writes a model with its adapter first, and merges that.
        written = self.bench.folder / "with-adapters"
        flags = () if self.adapter is None else ("--lora-merge-cache", str(written))
        taken = self.bench.mergekit.run(self.recipe(), self.theirs, *flags)
        shutil.rmtree(written, ignore_errors=True)
        if not self.case.is_random:
            said = _agreement(self.output, self.theirs)
            self.bench.notes.append(f"{self.name}: beside mergekit, {said}")
        shutil.rmtree(self.theirs)
        return taken


class _Part(_Merge):
    """A merge of sparse files, of which one shard is made: others are left to other runs.

    All of the model is planned, and the shard is made as one of all. Nothing is brought into the
    page cache: the files have no bytes.
    """

    @cached_property
    def shards(self) -> list[int]:
        return [size for _, size in oxmerge.plan(self.recipe(), shard_size=SHARD).shards]

    @property
    def options(self) -> tuple[str, ...]:
        return ("--shard-size", str(SHARD), "--part", f"1/{len(self.shards)}")

    def files_of(self, model: Path) -> list[Path]:
        """Return a file of as many bytes, as sparse as the model's: the floor reads whole files."""
        path = self.bench.folder / f"{model.parent.name}-part"
        path.touch()
        os.truncate(path, max(self.shards))
        return [path]

    def prepare(self, output: Path) -> None:
        shutil.rmtree(output, ignore_errors=True)
        os.sync()


def _agreement(ours: Path, theirs: Path) -> str:
    """Return how far two merged models of bfloat16 are from each other.

    mergekit rounds within its formulas, and oxmerge once, so some elements differ.
    """
    equal = total = 0
    largest = 0.0
    try:
        with oxmerge.open(ours) as one, oxmerge.open(theirs) as other:
            for name in one:
                bits = [each[name][...].view(np.uint16) for each in (one, other)]
                first, second = ((each.astype(np.uint32) << 16).view(np.float32) for each in bits)
                largest = max(largest, float(np.abs(first - second).max()))
                equal, total = equal + int(np.sum(bits[0] == bits[1])), total + bits[0].size
    except (oxmerge.OxmergeError, LookupError, TypeError, ValueError) as error:
        return f"the outputs could not be compared: {error}"
    return f"{equal / total:.4%} of the elements are equal, the largest difference {largest:.2g}"
