"""End to end: merges of checkpoints on the disk, beside the floor and beside other programs.

Every merge is a process of its own, so its peak memory is that of the merge alone. The engine's
seconds go from the first read to the last flush; those of its process are kept too. Other programs
have only the latter, and what they leave unflushed is flushed on their clock.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from oxmerge.bench.cases import cases
from oxmerge.bench.floor import Floor
from oxmerge.bench.machine import cores
from oxmerge.bench.measure import Job, Taken, UnavailableError
from oxmerge.bench.process import run_process
from oxmerge.bench.record import Row
from oxmerge.bench.storage import check_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from oxmerge.bench.cases import Case
    from oxmerge.bench.others import Mergekit

COLD_METHODS = ("linear", "ties")
"""Methods that are measured with cold inputs too; warm ones are for all."""


class Merges:
    """The merges of a base and its fine-tunes.

    Parameters
    ----------
    folder
        Where recipes and outputs go.
    models
        Directories of the models, the base first.
    methods
        The engine's table of methods.
    mergekit
        Who else does the same.
    say
        Told what is done now.
    """

    def __init__(
        self,
        folder: Path,
        models: Sequence[Path],
        methods: Iterable[Mapping[str, Any]],
        mergekit: Mergekit | None,
        say: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.models = models
        self.cases = list(cases(methods))
        self.mergekit = mergekit
        self.say = say
        self.notes: list[str] = []

    def jobs(self) -> Iterator[Job]:
        """Yield every merge with warm inputs, and some with cold ones."""
        for state in ("warm", "cold"):
            floors: dict[int, list[Job]] = {}
            for case in self.cases:
                if state == "cold" and case.method not in COLD_METHODS:
                    continue
                if case.models not in floors:
                    floors[case.models] = self._floor(case, state)
                yield from self._of(case, state, floors[case.models])

    def _of(self, case: Case, state: str, floor: list[Job]) -> Iterator[Job]:
        recipe = self.folder / f"{case.method}.yml"
        recipe.write_text(case.recipe([str(path) for path in self._models(case)]), encoding="utf-8")
        files = self._files(case)
        read = sum(path.stat().st_size for path in files)
        row = Row("merge", case.method, "oxmerge", state, read, read // case.models)
        for job in floor:
            yield replace(job, row=replace(job.row, name=case.method))
        yield Job(row, lambda: self._merge(recipe), self._preparing(files, state))
        if self.mergekit is not None and state == "warm":
            yield self._mergekit_job(self.mergekit, recipe, row, files)

    def _merge(self, recipe: Path) -> Taken:
        command = [
            sys.executable,
            "-m",
            "oxmerge",
            "merge",
            recipe.name,
            "out",
            "--json",
        ]
        done = run_process(command, self.folder)
        report = json.loads(done.output)
        return Taken(
            report["seconds"], done.seconds, done.peak_memory, report["threads"], report["simd"]
        )

    def _mergekit_job(self, mergekit: Mergekit, recipe: Path, row: Row, files: list[Path]) -> Job:
        return Job(
            replace(row, by="mergekit"),
            lambda: mergekit.run(recipe, self.folder / "out"),
            self._preparing(files, row.state),
            rounds=1,
        )

    def _floor(self, case: Case, state: str) -> list[Job]:
        files = self._files(case)
        count = len(files) // case.models
        models = [files[start : start + count] for start in range(0, len(files), count)]
        floor = Floor(models, self.folder / "floor")
        prepare = self._preparing(files, state)
        try:
            way = floor.best_way(prepare, cores(), cold=state == "cold", say=self.say)
        except UnavailableError as reason:
            self.notes.append(f"merge, {state}: no floor: {reason}")
            return []
        self.notes.append(f"floor of {case.models} models, {state}: {way.words}")
        row = Row("merge", "", "floor", state, floor.bytes_read, floor.bytes_written, way.threads)

        def run() -> Taken:
            floor.clear()
            return floor.run(way)

        return [Job(row, run, prepare)]

    def _preparing(self, files: Sequence[Path], state: str) -> Callable[[], None]:
        def prepare() -> None:
            shutil.rmtree(self.folder / "out", ignore_errors=True)
            os.sync()
            check_state(files, cached=state == "warm")

        return prepare

    def _models(self, case: Case) -> Sequence[Path]:
        """Return the models of a case; without a base, only fine-tunes are merged."""
        first = 0 if case.has_base else 1
        return self.models[first : first + case.models]

    def _files(self, case: Case) -> list[Path]:
        """Return the weight files of all models of a case."""
        return [
            path for model in self._models(case) for path in sorted(model.glob("*.safetensors"))
        ]
