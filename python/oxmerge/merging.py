"""The main job: plan a merge, run it, finish the output directory."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

from oxmerge import _core
from oxmerge.devices import UNTRIED, choose, open_backend
from oxmerge.options import READ_PATHS, check_device, check_threads
from oxmerge.outcome import Outcome
from oxmerge.outlook import Outlook
from oxmerge.planning import DEFAULT_SHARD_SIZE, build_plan
from oxmerge.publish import OutputDirectory, commit, discard, prepare_output
from oxmerge.recipe import Recipe
from oxmerge.schema import Plan
from oxmerge.sizes import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from oxmerge.torch_backend import Backend

    PathLike = str | os.PathLike[str]

__all__ = ["DEFAULT_MEMORY", "MergeReport", "Outlook", "Snapshot", "merge", "plan"]

#: Bytes that the whole process may have resident; or so many more than it has, in a process that
#: has loaded torch, say.
DEFAULT_MEMORY = 256 << 20
DEFAULT_ROOM = 192 << 20


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
class MergeReport:
    """What a merge did.

    ``oxmerge_report.json``, beside the weights, says the same but for `total_seconds`: being one of
    the files, it cannot know when all are in place. Instead it has ``seconds_before_commit``, from
    reading the recipe to when the other files are copied and everything is renamed.

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
    read_gb_per_second, written_gb_per_second : float
        Bytes of tensors (10**9) by `seconds`; of everything that was merged together.
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
    device : str
        What computed.
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
    read_gb_per_second: float
    written_gb_per_second: float
    total_seconds: float
    peak_memory: int
    predicted_memory: int
    memory: int
    threads: int
    simd: str
    device: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**data, "warnings": list(self.warnings), "notes": list(self.notes)}


def plan(
    recipe: PathLike | Recipe,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    vram: int | str | None = None,
    seed: int = 0,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    strict: bool = False,
) -> Outlook:
    """Return what a merge would do.

    Reads headers and configs only. Where there is a GPU, measures the CPU and the disk for some
    milliseconds too; with ``device="auto"``, the GPU, if it could be worth it.

    Parameters
    ----------
    recipe : path, str or Recipe
        What to merge: a file, YAML text, or a recipe.
    memory : int or str, optional
        Bytes that the whole process may have resident, such as ``"2GiB"``. Unless given, 256 MiB,
        or 192 MiB more than are resident already, if that is more: torch alone takes several 100.
    threads : int, optional
        Six more than cores, unless given.
    device : str
        What computes: ``cpu``; ``cuda`` (every visible GPU) or ``cuda:0`` and so on; ``torch``, the
        same way on torch's CPU; or ``auto``, the one that measures the fastest. The bytes of the
        output are the same. `cuda` is not yet run on a GPU.
    vram : int or str, optional
        Bytes that the tensors on each device may take; 4 GiB unless given. Not for ``cpu``.
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
        If the budget, or `vram`, cannot hold one block of every input.
    DeviceError
        If there is no such device, or torch is not installed.
    """
    _check_options(threads, "auto", device, vram)
    budget, vram = _bytes(memory), _bytes(vram)
    merge_plan, outcome = _prepare(recipe, shard_size=shard_size, seed=seed, strict=strict)
    fastest = choose([merge_plan], threads, vram, load=device == "auto")
    backend = open_backend(fastest.device if device == "auto" else device, vram)
    predicted = _core.predict([merge_plan.table], _room(budget), threads, backend)
    return Outlook(
        merge_plan,
        disk=outcome.bytes,
        memory=predicted["predicted"],
        threads=predicted["workers"],
        left_out=outcome.left_out,
        reread_bytes=_bytes_reread(merge_plan) if predicted["rereads"] else None,
        device=_name(backend),
        fastest=fastest,
    )


def merge(  # noqa: PLR0913 - the options of the command, keyword only
    recipe: PathLike | Recipe,
    directory: PathLike,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    vram: int | str | None = None,
    seed: int = 0,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    strict: bool = False,
    read_path: str = "auto",
    progress: Callable[[Snapshot], None] | None = None,
) -> MergeReport:
    """Merge checkpoints by a recipe, into a new model directory.

    The output depends on the recipe, the inputs, the seed and the shard size only: not on memory,
    threads, the device or the read path.

    Parameters
    ----------
    recipe : path, str or Recipe
        What to merge: a file, YAML text, or a recipe; the dialect is mergekit's.
    directory : path
        The output: new or empty, unless `overwrite`.
    memory : int or str, optional
        Bytes that the whole process may have resident, such as ``"2GiB"``. Unless given, 256 MiB,
        or 192 MiB more than are resident already, if that is more: torch alone takes several 100.
    threads : int, optional
        Six more than cores, unless given.
    device : str
        What computes: ``cpu``; ``cuda`` (every visible GPU) or ``cuda:0`` and so on; ``torch``, the
        same way on torch's CPU; or ``auto``, the one that measures the fastest. The bytes of the
        output are the same. `cuda` is not yet run on a GPU.
    vram : int or str, optional
        Bytes that the tensors on each device may take; 4 GiB unless given. Not for ``cpu``.
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
        Called ten times a second with a `Snapshot`: ``bytes_done``, ``bytes_total`` and so on. What
        it raises ends the merge.

    Raises
    ------
    RecipeError, PlanError
        With every problem that the recipe and the headers show, before any tensor is read. And when
        integer tensors, which can only be copied, turn out to differ; no output is left.
    OutputError, FileExistsError
        If the output cannot go to `directory`.
    MemoryBudgetError
        If the budget, or `vram`, cannot hold one block of every input.
    DeviceError
        If there is no such device, or torch is not installed.
    InputChangedError
        If an input, its config or index changed while the merge ran; no output is left.
    OSError
        If a file cannot be read or written, or the disk is full; no output is left.
    """
    reports = merge_together(
        [(recipe, directory)],
        memory=memory,
        threads=threads,
        device=device,
        vram=vram,
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
    memory: int | str | None,
    threads: int | None,
    device: str,
    vram: int | str | None,
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
    _check_options(threads, read_path, device, vram)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function of a snapshot, not {progress!r}")
    budget, vram = _bytes(memory), _bytes(vram)
    prepared = [
        _prepare(recipe, shard_size=shard_size, seed=seed, strict=strict) for recipe, _ in merges
    ]
    if device == "auto":
        merge_plans = [merge_plan for merge_plan, _ in prepared]
        device = choose(merge_plans, threads, vram, load=True).device
    backend = open_backend(device, vram)
    needed = sum(outcome.bytes for _, outcome in prepared)
    outputs: list[OutputDirectory] = []
    try:
        for (merge_plan, outcome), (_, directory) in zip(prepared, merges, strict=True):
            output = prepare_output(
                directory,
                overwrite=overwrite,
                input_files=merge_plan.files,
                needed_bytes=needed,
                names=outcome.file_names,
            )
            outputs.append(output)
        with backend or nullcontext():
            done = _core.execute(
                [
                    (merge_plan.table, output.path)
                    for (merge_plan, _), output in zip(prepared, outputs, strict=True)
                ],
                memory=_room(budget),
                threads=threads,
                read_path=read_path,
                progress=_reporter([merge_plan for merge_plan, _ in prepared], progress),
                device=backend,
            )
        done |= {"device": _name(backend), "notes": _notes(backend)}
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
) -> tuple[Plan, Outcome]:
    merge_plan = prepare(recipe, shard_size=shard_size, seed=seed, strict=strict)
    return merge_plan, Outcome.of(merge_plan)


def prepare(
    recipe: PathLike | Recipe,
    *,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    seed: int = 0,
    strict: bool = False,
) -> Plan:
    """Return the plan of a recipe, or of the recipe in a file."""
    if not isinstance(recipe, Recipe):
        recipe = Recipe.from_yaml(recipe)
    if not recipe.models and not recipe.slices:
        raise TypeError(
            "this recipe has neither models nor slices; make it with `Recipe.from_yaml` or "
            "`Recipe.from_mapping`"
        )
    return build_plan(recipe, shard_size=parse_size(shard_size), seed=seed, strict=strict)


def _finish(
    merge_plan: Plan,
    outcome: Outcome,
    output: OutputDirectory,
    done: dict[str, Any],
    started: float,
) -> MergeReport:
    report = MergeReport(
        directory=os.fspath(output.path),
        tensors=len(merge_plan.tensors),
        files=len(merge_plan.shards),
        bytes_read=done["bytes_read"],
        bytes_written=merge_plan.bytes_written,
        seconds=done["seconds"],
        read_gb_per_second=_gb_per_second(done["bytes_read"], done["seconds"]),
        written_gb_per_second=_gb_per_second(done["bytes_written"], done["seconds"]),
        total_seconds=time.perf_counter() - started,
        peak_memory=done["peak_memory"],
        predicted_memory=done["memory"]["predicted"],
        memory=done["memory"]["budget"],
        threads=done["memory"]["workers"],
        simd=done["simd"],
        device=done["device"],
        warnings=tuple(map(str, merge_plan.warnings)),
        notes=(*outcome.notes, *done["notes"]),
    )
    story = report.as_dict()
    story["seconds_before_commit"] = story.pop("total_seconds")
    leftovers = commit(output, outcome.contents(story))
    seconds = time.perf_counter() - started
    return replace(report, total_seconds=seconds, notes=(*report.notes, *leftovers))


def _gb_per_second(size: int, seconds: float) -> float:
    return size / max(seconds, 1e-9) / 1e9


def _bytes(size: int | str | None) -> int | None:
    return None if size is None else parse_size(size)


def _room(budget: int | None) -> int:
    """Return the budget, or the usual one: that of a small process, or more than is resident."""
    return max(DEFAULT_MEMORY, _resident() + DEFAULT_ROOM) if budget is None else budget


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _name(backend: Backend | None) -> str:
    return "cpu" if backend is None else backend.name


def _notes(backend: Backend | None) -> tuple[str, ...]:
    return () if backend is None or backend.is_host else (UNTRIED,)


def _check_options(
    threads: int | None, read_path: str, device: str, vram: int | str | None
) -> None:
    check_threads(threads)
    check_device(device)
    if vram is not None and device == "cpu":
        raise ValueError('vram has no effect on the CPU; pass device="cuda", or leave vram out')
    if read_path not in READ_PATHS:
        raise ValueError(f"read_path must be one of {', '.join(READ_PATHS)}, not {read_path!r}")


def _bytes_reread(merge_plan: Plan) -> int:
    """Return the bytes of tensors that the page cache cannot hold until they are read again."""
    return merge_plan.table.bytes_of_sources_above(_free_memory())


def _free_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(line for line in file if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024


def _reporter(
    merge_plans: Sequence[Plan], progress: Callable[[Snapshot], None] | None
) -> Callable[[int, int, int, str, int], None] | None:
    if progress is None:
        return None
    total = sum(merge_plan.bytes_written for merge_plan in merge_plans)

    def report(read: int, written: int, tensors: int, current: str, peak: int) -> None:
        progress(Snapshot(written, total, read, tensors, current, peak))

    return report
