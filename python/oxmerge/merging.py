"""The main job: plan a merge, run it, finish the output directory."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

from oxmerge import _core
from oxmerge.outcome import Outcome, method_description
from oxmerge.planning import DEFAULT_SHARD_SIZE, MergePlan, build_plan
from oxmerge.publish import OutputDirectory, commit, discard, prepare_output
from oxmerge.recipe import Recipe
from oxmerge.sizes import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from oxmerge.problems import Problem

    PathLike = str | os.PathLike[str]

__all__ = ["DEFAULT_MEMORY", "MergeReport", "Outlook", "Snapshot", "merge", "plan"]

#: How inputs can be read.
READ_PATHS = ("auto", "mapped", "positioned", "direct")
#: Bytes that the whole process may have resident.
DEFAULT_MEMORY = 256 << 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far a merge has come.

    Attributes
    ----------
    bytes_done, bytes_total : int
        Bytes of output tensors, written and in all.
    bytes_read : int
        Bytes of inputs read, re-reads included.
    tensors : int
        Output tensors finished.
    tensor : str
        The tensor that a worker took up last.
    peak_memory : int
        High-water mark of the process's resident set, bytes.
    """

    bytes_done: int
    bytes_total: int
    bytes_read: int
    tensors: int
    tensor: str
    peak_memory: int


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a merge would do.

    Attributes
    ----------
    merge_plan : MergePlan
        The plan itself, with the accounting of every tensor.
    disk : int
        Bytes that the output needs on the disk.
    memory : int
        Predicted high-water mark of the process's resident set, bytes.
    threads : int
        Threads that will work.
    left_out : tuple of str
        The donor's files that are not copied, with the reason.
    rereads_from_cache : bool, optional
        Whether what is read several times fits the free memory; None if nothing is.
    """

    merge_plan: MergePlan
    disk: int
    memory: int
    threads: int
    left_out: tuple[str, ...]
    rereads_from_cache: bool | None

    @property
    def cost(self) -> str:
        """How often the inputs are read, and from where again."""
        cost: str = method_description(self.method)["cost"]
        if self.rereads_from_cache is None:
            return cost
        again = "the page cache" if self.rereads_from_cache else "the disk: memory is short"
        return f"{cost}, again from {again}"

    @property
    def method(self) -> str:
        """The merge method."""
        return self.merge_plan.plan.method

    @property
    def tensors(self) -> int:
        """How many tensors the output has."""
        return len(self.merge_plan.plan.tensors)

    @property
    def files(self) -> int:
        """How many weight files the output has."""
        return len(self.merge_plan.plan.shards)

    @property
    def bytes_read(self) -> int:
        """Bytes of input tensors that are used."""
        return sum(tensor.source_bytes for tensor in self.merge_plan.plan.tensors)

    @property
    def bytes_written(self) -> int:
        """Bytes of output tensors."""
        return sum(tensor.bytes for tensor in self.merge_plan.plan.tensors)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What has no effect, and what is left out."""
        return self.merge_plan.warnings

    @property
    def accounting(self) -> dict[str, int]:
        """How many input tensors are merged, copied, dropped."""
        models = self.merge_plan.accounting.models
        return {
            "merged": sum(len(model.merged) for model in models),
            "copied": sum(len(model.copied) for model in models),
            "dropped": sum(model.dropped_count for model in models),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as data."""
        names = (
            "method",
            "cost",
            "tensors",
            "files",
            "bytes_read",
            "bytes_written",
            "disk",
            "memory",
        )
        return {
            **{name: getattr(self, name) for name in names},
            "threads": self.threads,
            "accounting": self.accounting,
            "left_out": list(self.left_out),
            "warnings": [str(warning) for warning in self.warnings],
        }


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did.

    Attributes
    ----------
    directory : str
        Where the merged model is.
    tensors, files : int
        Tensors and weight files written.
    bytes_read, bytes_written : int
        Bytes of tensors; re-reads are counted.
    seconds : float
        From the first read to the last flush of the weights.
    total_seconds : float
        From reading the recipe to the finished directory.
    peak_memory : int
        High-water mark of the process's resident set, bytes.
    predicted_memory, memory : int
        What had been predicted, and the budget.
    threads : int
        Threads that worked.
    simd : str
        The instruction set used.
    warnings : tuple of str
        What had no effect, and what was dropped.
    notes : tuple of str
        What was changed in the config, which files were not copied, which were left as they were.
    """

    directory: str
    tensors: int
    files: int
    bytes_read: int
    bytes_written: int
    seconds: float
    total_seconds: float
    peak_memory: int
    predicted_memory: int
    memory: int
    threads: int
    simd: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**data, "warnings": list(self.warnings), "notes": list(self.notes)}


def plan(
    recipe: PathLike | Recipe,
    *,
    memory: int | str = DEFAULT_MEMORY,
    threads: int | None = None,
    seed: int = 0,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    strict: bool = False,
) -> Outlook:
    """Return what a merge would do. Reads headers and configs only.

    Parameters
    ----------
    recipe : path or Recipe
        What to merge.
    memory : int or str
        Bytes that the whole process may have resident, such as ``"2GiB"``.
    threads : int, optional
        Six more than cores, unless given.
    seed : int
        Of the random masks that some methods draw.
    shard_size : int or str
        Bytes in an output file at most.
    strict : bool
        Whether warnings count as problems.

    Raises
    ------
    RecipeError, PlanError
        With every problem that the recipe and the headers show.
    MemoryBudgetError
        If the budget cannot hold one block of every input.
    """
    _check_options(threads, "auto")
    merge_plan, outcome = _prepare(recipe, shard_size=shard_size, seed=seed, strict=strict)
    predicted = _core.predict([merge_plan.to_json()], parse_size(memory), threads)
    return Outlook(
        merge_plan,
        disk=outcome.bytes,
        memory=predicted["predicted"],
        threads=predicted["workers"],
        left_out=outcome.left_out,
        rereads_from_cache=_fits_free_memory(merge_plan) if predicted["rereads"] else None,
    )


def merge(  # noqa: PLR0913 - the options of the command, keyword only
    recipe: PathLike | Recipe,
    directory: PathLike,
    *,
    memory: int | str = DEFAULT_MEMORY,
    threads: int | None = None,
    seed: int = 0,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    strict: bool = False,
    read_path: str = "auto",
    progress: Callable[[Snapshot], None] | None = None,
) -> MergeReport:
    """Merge checkpoints by a recipe, into a new model directory.

    The output depends on the recipe, the inputs, the seed and the shard size only: not on memory,
    threads or the read path.

    Parameters
    ----------
    recipe : path or Recipe
        What to merge; the dialect is mergekit's.
    directory : path
        The output: new or empty, unless `overwrite`.
    memory : int or str
        Bytes that the whole process may have resident, such as ``"2GiB"``.
    threads : int, optional
        Six more than cores, unless given.
    seed : int
        Of the random masks that some methods draw.
    shard_size : int or str
        Bytes in an output file at most.
    overwrite : bool
        Replace the model that is there, when the new one is complete.
    strict : bool
        Whether warnings count as problems.
    read_path : str
        ``auto``, ``mapped``, ``positioned`` or ``direct``: how inputs are read.
    progress : callable, optional
        Called with a `Snapshot` ten times a second.

    Raises
    ------
    RecipeError, PlanError
        With every problem that the recipe and the headers show, before any tensor is read.
    OutputError, FileExistsError
        If the output cannot go to `directory`.
    MemoryBudgetError
        If the budget cannot hold one block of every input.
    InputChangedError
        If an input changed while it was read; no output is left.
    OSError
        If a file cannot be read or written, or the disk is full; no output is left.
    """
    reports = merge_together(
        [(recipe, directory)],
        memory=memory,
        threads=threads,
        seed=seed,
        shard_size=shard_size,
        overwrite=overwrite,
        strict=strict,
        read_path=read_path,
        progress=progress,
    )
    return reports[0]


def merge_together(  # noqa: PLR0913 - the options of `merge`
    merges: Sequence[tuple[PathLike | Recipe, PathLike]],
    *,
    memory: int | str,
    threads: int | None,
    seed: int,
    shard_size: int | str,
    overwrite: bool,
    strict: bool,
    read_path: str = "auto",
    progress: Callable[[Snapshot], None] | None = None,
) -> list[MergeReport]:
    """Merge by several recipes that read the same tensors, in one pass over them.

    Parameters and errors are those of `merge`, for pairs of a recipe and a directory. Outputs that
    are finished when something fails are kept, the others leave nothing.
    """
    started = time.perf_counter()
    budget = parse_size(memory)
    _check_options(threads, read_path)
    prepared = [
        _prepare(recipe, shard_size=shard_size, seed=seed, strict=strict) for recipe, _ in merges
    ]
    needed = sum(outcome.bytes for _, outcome in prepared)
    outputs: list[OutputDirectory] = []
    try:
        for (merge_plan, _), (_, directory) in zip(prepared, merges, strict=True):
            files = merge_plan.plan.files
            output = prepare_output(
                directory, overwrite=overwrite, input_files=files, needed_bytes=needed
            )
            outputs.append(output)
        done = _core.execute(
            [
                (merge_plan.to_json(), output.path)
                for (merge_plan, _), output in zip(prepared, outputs, strict=True)
            ],
            memory=budget,
            threads=threads,
            read_path=read_path,
            progress=_reporter([merge_plan for merge_plan, _ in prepared], progress),
        )
        return [
            _finish(merge_plan, outcome, output, done, started)
            for (merge_plan, outcome), output in zip(prepared, outputs, strict=True)
        ]
    except BaseException:
        # Backwards: the first made the folders that they have in common.
        for output in reversed(outputs):
            discard(output)
        raise


def _prepare(
    recipe: PathLike | Recipe, *, shard_size: int | str, seed: int, strict: bool
) -> tuple[MergePlan, Outcome]:
    merge_plan = prepare(recipe, shard_size=shard_size, seed=seed, strict=strict)
    return merge_plan, Outcome.of(merge_plan)


def prepare(
    recipe: PathLike | Recipe,
    *,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    seed: int = 0,
    strict: bool = False,
) -> MergePlan:
    """Return the plan of a recipe, or of the recipe in a file."""
    if not isinstance(recipe, Recipe):
        recipe = Recipe.from_yaml(recipe)
    return build_plan(recipe, shard_size=parse_size(shard_size), seed=seed, strict=strict)


def _finish(
    merge_plan: MergePlan,
    outcome: Outcome,
    output: OutputDirectory,
    done: dict[str, Any],
    started: float,
) -> MergeReport:
    report = MergeReport(
        directory=os.fspath(output.path),
        tensors=len(merge_plan.plan.tensors),
        files=len(merge_plan.plan.shards),
        bytes_read=done["bytes_read"],
        bytes_written=_bytes_written(merge_plan),
        seconds=done["seconds"],
        total_seconds=time.perf_counter() - started,
        peak_memory=done["peak_memory"],
        predicted_memory=done["memory"]["predicted"],
        memory=done["memory"]["budget"],
        threads=done["memory"]["workers"],
        simd=done["simd"],
        warnings=tuple(map(str, merge_plan.warnings)),
        notes=outcome.notes,
    )
    leftovers = commit(output, outcome.contents(report.as_dict()))
    seconds = time.perf_counter() - started
    return replace(report, total_seconds=seconds, notes=(*report.notes, *leftovers))


def _check_options(threads: int | None, read_path: str) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    if read_path not in READ_PATHS:
        raise ValueError(f"read_path must be one of {', '.join(READ_PATHS)}, not {read_path!r}")


def _fits_free_memory(merge_plan: MergePlan) -> bool | None:
    """Return whether the tensor with the most input fits the memory that is free."""
    largest = max((tensor.source_bytes for tensor in merge_plan.plan.tensors), default=0)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(line for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return largest < int(available.split()[1]) * 1024


def _bytes_written(merge_plan: MergePlan) -> int:
    return sum(tensor.bytes for tensor in merge_plan.plan.tensors)


def _reporter(
    merge_plans: Sequence[MergePlan], progress: Callable[[Snapshot], None] | None
) -> Callable[[int, int, int, str, int], None] | None:
    if progress is None:
        return None
    total = sum(map(_bytes_written, merge_plans))

    def report(read: int, written: int, tensors: int, current: str, peak: int) -> None:
        progress(Snapshot(written, total, read, tensors, current, peak))

    return report
