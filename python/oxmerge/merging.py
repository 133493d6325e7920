"""The main job: plan a merge, run it, finish the output directory."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from oxmerge import _core
from oxmerge.cli.progress import watched
from oxmerge.devices import UNTRIED, choose, open_backend
from oxmerge.errors import InputChangedError, PlanError, ProblemsError, UnsupportedError, all_of
from oxmerge.file_state import FileState
from oxmerge.models.adapters import is_adapter
from oxmerge.models.fetching import check_space, fetch
from oxmerge.models.references import resolve_reference, split_adapters
from oxmerge.models.stores import is_address
from oxmerge.models.streaming import RESIDENT, is_streamed, spool_bytes, streamed
from oxmerge.options import DEFAULT_SHARD_SIZE, PlanOptions, RunOptions, sort_options
from oxmerge.output.claims import named
from oxmerge.output.contents import contents_of, disk_bytes, late_texts
from oxmerge.output.manifest import manifest_writer
from oxmerge.output.outcome import outcome_of
from oxmerge.output.publish import (
    STAGES_NAME,
    OutputDirectory,
    close,
    commit,
    discard,
    prepare_output,
    stage,
    stages_folder,
)
from oxmerge.output.resume import how_to_go_on, keys_of
from oxmerge.planning.plan_files import is_saved_plan, load_plan
from oxmerge.planning.planner import build_plan
from oxmerge.planning.plans import Plan
from oxmerge.planning.summary import Prediction
from oxmerge.problems import Findings, Problem
from oxmerge.recipe.recipe import Recipe
from oxmerge.sizes import format_size, parse_size
from oxmerge.stages import Order, places_of, plan_stages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import IO, Any

    from oxmerge.models.references import Located
    from oxmerge.stages import Stage
    from oxmerge.torch_backend import Backend

    PathLike = str | os.PathLike[str]
    #: What a merge may be asked for with.
    Request = PathLike | Mapping[str, object] | Recipe | Plan | IO[bytes]

__all__ = ["DEFAULT_MEMORY", "MergeReport", "Snapshot", "claiming_order", "merge", "plan"]

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
    bytes_fetched, bytes_to_fetch : int
        Bytes of inputs that were not on this machine: fetched, and in all of those that are
        downloaded before the merge. Until all of these are here, `tensor` is the file that comes.
    """

    bytes_done: int
    bytes_total: int
    bytes_read: int
    tensors: int
    tensor: str
    peak_memory: int
    bytes_fetched: int = 0
    bytes_to_fetch: int = 0


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
    input_bytes : int
        Bytes of the tensors that were read, each once.
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
    input_bytes: int
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


def plan(  # noqa: PLR0913 - the options of the command, keyword only
    recipe: Request,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    vram: int | str | None = None,
    stream: bool = False,
    spool: int | str | None = None,
    seed: int | None = None,
    shard_size: int | str | None = None,
    strict: bool = False,
    allow_mismatch: bool = False,
    ignore_unknown: bool = False,
    allow_methods: Iterable[str] = (),
) -> Plan:
    """Return what a merge would do.

    Reads headers, configs and tokenizers only; of a recipe of several merges it writes what the
    earlier ones will look like, without weights, into the temporary directory. Where there is a
    GPU, measures the CPU and the disk for some milliseconds too; with ``device="auto"``, the GPU,
    if it could be worth it.

    Parameters
    ----------
    recipe : path, str, mapping, Recipe or Plan
        What to merge: a file, YAML text, its keys and values, or a recipe; or a plan, or the
        file of one, which then is planned no more.
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
    stream : bool
        Whether weights of the Hub that are not on this machine are read as they are needed, and not
        kept in its cache. Those of other stores always are.
    spool : int or str, optional
        Bytes on the output's disk for what was fetched and is still needed. Unless given, 20 GB, or
        half of what the output leaves free there, if that is less.
    seed : int, optional
        Of the random masks that some methods draw; 0 unless given. A plan has its own.
    shard_size : int or str, optional
        Bytes in an output file at most; 5 GB unless given. A plan has its own.
    strict : bool
        Whether warnings count as problems.
    allow_mismatch : bool
        Whether models may be of another type than the one whose config the output has.
    ignore_unknown : bool
        Whether keys and parameters of the recipe that are not known are warnings.
    allow_methods : iterable of str
        Modules whose functions a recipe may name as ``merge_method: package.module:name``: they
        are imported, which runs their code.

    Raises
    ------
    RecipeError, PlanError
        With every problem that the recipe and the headers show.
    MemoryBudgetError
        If the budget, or `vram`, cannot hold one block of every input.
    DeviceError
        If there is no such device, or torch is not installed.
    """
    planning, _ = sort_options(locals())
    _bytes(memory), _bytes(vram)
    asked = _read(recipe, planning)
    if isinstance(asked, Asked) and _located_adapters(asked) is not None:
        message = "not supported yet: to plan a merge of adapters without a model"
        advice = "`oxmerge merge` makes an adapter of them, in seconds"
        raise UnsupportedError(message, advice=advice)
    options = {
        "memory": memory, "threads": threads, "device": device, "vram": vram, "stream": stream,
        "spool": spool,
    }  # fmt: skip
    planned = prepare(asked, planning).with_options(options)
    for each in (*planned.stages, planned):
        each.prediction  # noqa: B018 - what cannot fit is told now
    return planned


def predict(
    plan: Plan,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    vram: int | str | None = None,
    stream: bool = False,
    spool: int | str | None = None,
) -> Prediction:
    """Return how a plan would run with these options of `merge`."""
    # Which checks them.
    RunOptions(memory=memory, threads=threads, device=device, vram=vram, stream=stream, spool=spool)
    budget, vram = _bytes(memory), _bytes(vram)
    fastest = choose([plan], threads, vram, load=device == "auto")
    backend = open_backend(fastest.device if device == "auto" else device, vram)
    is_any = any(is_streamed(file, stream=stream) for file in plan.absent)
    spooled, fetched = (
        _core.Spool.predict([plan.table], spool_bytes(_bytes(spool))) if is_any else (None, None)
    )
    beside = RESIDENT if is_any else 0
    predicted = _core.predict([plan.table], room(budget), threads, backend, beside)
    rereads = predicted["rereads"]
    return Prediction(
        memory=predicted["predicted"],
        threads=predicted["workers"],
        reread_bytes=plan.table.bytes_of_sources_above(_free_memory()) if rereads else None,
        device=_name(backend),
        fastest=fastest,
        spool=spooled,
        fetched=fetched,
    )


def merge(  # noqa: PLR0913 - the options of the command, keyword only
    recipe: Request,
    directory: PathLike,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    vram: int | str | None = None,
    stream: bool = False,
    spool: int | str | None = None,
    seed: int | None = None,
    shard_size: int | str | None = None,
    overwrite: bool = False,
    strict: bool = False,
    allow_mismatch: bool = False,
    ignore_unknown: bool = False,
    allow_methods: Iterable[str] = (),
    read_path: str = "auto",
    progress: Callable[[Snapshot], None] | bool | None = None,
    digests: bool = True,
    hash_inputs: bool = False,
    allow_nonfinite: bool = False,
    resume: bool = True,
    fresh: bool = False,
    part: tuple[int, int] | None = None,
    finish: bool = False,
    wait: float = 600,
    ray: str | bool | None = None,
    parts: int | None = None,
) -> MergeReport:
    """Merge checkpoints by a recipe, into a new model directory.

    The output depends on the recipe, the inputs, the seed and the shard size only: not on memory,
    threads, the device or the read path. Of adapters alone (LoRA, without a base) it is an adapter,
    and options that would do nothing then are errors.

    Parameters
    ----------
    recipe : path, str, mapping, Recipe or Plan
        What to merge: a file, YAML text, its keys and values, or a recipe; the dialect is
        mergekit's. Or a plan, or the file of one; it has its seed and its shard size.
    directory : path or str
        The output: new or empty, unless `overwrite`; or an address in an object store,
        ``s3://bucket/path`` or ``gs://``.
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
    stream : bool
        Whether weights of the Hub that are not on this machine are read as they are needed, and not
        kept in its cache. Those of other stores always are.
    spool : int or str, optional
        Bytes on the output's disk for what was fetched and is still needed. Unless given, 20 GB, or
        half of what the output leaves free there, if that is less.
    seed : int, optional
        Of the random masks that some methods draw; 0 unless given. A plan has its own.
    shard_size : int or str, optional
        Bytes in an output file at most; 5 GB unless given. A plan has its own.
    overwrite : bool
        Replace the model that is there, when the new one is complete.
    strict : bool
        Whether warnings count as problems.
    allow_mismatch : bool
        Whether models may be of another type than the one whose config the output has.
    ignore_unknown : bool
        Whether keys and parameters of the recipe that are not known are warnings.
    allow_methods : iterable of str
        Modules whose functions a recipe may name as ``merge_method: package.module:name``: they
        are imported, which runs their code.
    read_path : str
        ``auto``, ``mapped``, ``positioned`` or ``direct``: how inputs are read.
    progress : callable or bool, optional
        Whether to show a bar, on standard error or below a notebook's cell; unless given, only
        there. Or what is called ten times a second with a `Snapshot`: ``bytes_done``,
        ``bytes_total`` and so on; what it raises ends the merge.
    digests : bool
        Whether the manifest, ``oxmerge.json``, has the BLAKE3 hash and statistics of each tensor,
        by which non-finite values and a merge that changes nothing are told.
    hash_inputs : bool
        Whether the manifest has the SHA-256 of every input file: they are read once more.
    allow_nonfinite : bool
        Whether NaN or infinity in an output whose inputs have none is a warning, not an error.
    resume : bool
        Keep finished tensors if the merge is interrupted, and go on with those that are there. What
        is kept never loads as a model; the exception has a note on it. Not without `digests`.
    fresh : bool
        Remove what an interrupted merge has kept there, instead of going on with it.
    part : tuple of int, optional
        ``(3, 16)`` makes the third of sixteen parts, and leaves the others to other runs, on other
        machines perhaps, with the same `directory`. `oxmerge.finish` completes it. Where it is
        complete, nothing is made, and the report has no files.
    finish : bool
        Complete the directory, if this part is the last one that is made.
    wait : float
        Seconds to wait for other parts, where a method needs numbers over the whole model, or of
        several merges one comes first.
    ray : str or bool, optional
        Make the parts on a Ray cluster: the one of this address; or, with True, the one that this
        process is connected to, or that Ray finds. Its nodes share the file system of `directory`,
        or that is in an object store.
    parts : int, optional
        How many parts to make on Ray; two for each node unless given.

    Raises
    ------
    RecipeError, PlanError
        With every problem that the recipe and the headers show, before any tensor is read. And when
        integer tensors, which can only be copied, turn out to differ, or if elements of the output
        are not finite though all inputs are; no output is left.
    OutputError, FileExistsError
        If the output cannot go to `directory`; or if another merge was interrupted there, and
        `fresh` is not set; or if other parts there are not of this merge, or have not left what
        this one needs within `wait`.
    MemoryBudgetError
        If the budget, or `vram`, cannot hold one block of every input.
    DeviceError
        If there is no such device, or torch is not installed.
    InputChangedError
        If an input, its config or index changed while the merge ran; no output is left.
    RemoteError
        If weights that are not on this machine cannot be had.
    OSError
        If a file cannot be read or written, or the disk is full.
    """
    planning, running = sort_options(locals())
    _bytes(memory), _bytes(vram)  # What is no size is told before anything is read.
    asked = _read(recipe, planning)
    if isinstance(asked, Asked):
        report = _merge_adapters(asked, directory, planning, running)
        if report is not None:
            return report
    if running.ray is not None:
        from oxmerge.on_ray import merge_on_ray  # noqa: PLC0415 - it needs this module

        return merge_on_ray(asked, directory, planning, running)
    (report,) = merge_together([(asked, directory)], planning, running)
    return report


def _located_adapters(asked: Asked) -> list[Located] | None:
    """Return where the models of a recipe lie, if they are adapters without a model."""
    recipe, found = asked.recipe, []
    folders = tuple(filter(None, (os.getcwd(), recipe.folder)))
    for source in () if recipe.base_model or recipe.stages else recipe.models:
        if split_adapters(source.model, folders)[1]:
            return None
        located = resolve_reference(source.model, folders)
        if isinstance(located, Problem) or not is_adapter(located):
            return None
        found.append(located)
    return found or None


def _merge_adapters(
    asked: Asked, directory: PathLike, planning: PlanOptions, running: RunOptions
) -> MergeReport | None:
    """Merge adapters, if that is what a recipe has; they need no plan."""
    located = _located_adapters(asked)
    if located is None:
        return None
    from oxmerge.adapter_sums import merge_adapters  # noqa: PLC0415 - seldom needed

    if is_address(os.fspath(directory)):
        message = "not supported yet: to write an adapter to a store"
        raise UnsupportedError(message, advice="name a folder here, and copy it")
    named(directory)
    memory = room(_bytes(running.memory))
    run = merge_adapters(
        asked.recipe, located, asked.findings, directory, planning, running, memory=memory
    )
    moved = {"bytes_read": run.bytes_read, "bytes_written": run.bytes_written}
    done = {
        **moved, "seconds": run.seconds, "peak_memory": _core.peak_memory(), "device": "cpu",
        "simd": _core.build_info()["simd"],
        "memory": {"predicted": run.predicted, "budget": memory, "workers": 1},
    }  # fmt: skip
    return report_of(
        done,
        directory=os.fspath(directory),
        tensors=run.tensors,
        files=1,
        bytes_written=run.bytes_written,
        input_bytes=run.bytes_read,
        total_seconds=run.seconds,
        warnings=run.warnings,
        notes=("the output is an adapter, as its models are",),
    )


def merge_together(
    merges: Sequence[tuple[Request | Asked, PathLike]],
    planning: PlanOptions,
    running: RunOptions,
    *,
    check: Callable[[list[Plan]], None] | None = None,
    stages: Mapping[str, str | None] | None = None,
    owned: Sequence[OutputDirectory] = (),
    purposes: Sequence[str] = (),
) -> list[MergeReport]:
    """Merge by several recipes that read the same tensors, in one pass over them.

    Errors are those of `merge`, for pairs of a recipe and a directory. Outputs that are complete
    when something fails stay, the others keep what is finished, if the same merge can go on with
    it. `check` is called with the plans before anything is made. `stages` says where the outputs of
    earlier merges lie. `owned` are the directories, if this run owns them already. `purposes` says
    what is made, if later merges will read it.
    """
    started = time.perf_counter()
    for _, directory in merges:
        named(directory)
    _bytes(running.memory), _bytes(running.vram)
    before = _core.peak_memory()
    plans = all_of(partial(prepare, recipe, planning, stages) for recipe, _ in merges)
    in_store = any(is_address(os.fspath(directory)) for _, directory in merges)
    if in_store or running.part is not None:
        from oxmerge.parts import merge_parts  # noqa: PLC0415 - it needs this module

        if check is not None:
            check(plans)
        directories = [directory for _, directory in merges]
        return merge_parts(list(zip(plans, directories, strict=True)), planning, running, started)
    if check is not None:
        check(plans)
    if any(plan.stages for plan in plans):
        made = list(zip(plans, (directory for _, directory in merges), strict=True))
        return _merge_stages(made, planning, running)
    backend = open_device(plans, running)
    needed = sum(plan.disk for plan in plans)
    peak = _core.peak_memory()
    planned = peak if peak > before else 0
    keys = purposes or keys_of(plans)
    claimed: dict[int, OutputDirectory] = {}
    try:
        for at in claiming_order([directory for _, directory in merges]):
            claimed[at] = (
                owned[at]
                if owned
                else prepare_output(
                    merges[at][1],
                    overwrite=running.overwrite,
                    input_files=plans[at].input_files,
                    needed_bytes=needed,
                    names=contents_of(plans[at]).names,
                    purpose=keys[at],
                    resume=running.keeps,
                    fresh=running.fresh,
                )
            )
        outputs = [claimed[at] for at in range(len(merges))]
        done = execute(plans, outputs, running, backend, planned)
        _check_side_files(plans)
        reports = finish_all(
            list(zip(plans, outputs, strict=True)), done, planning, running, started
        )
    except BaseException as error:
        # Backwards: the first made the folders that they have in common.
        _give_up(list(reversed(claimed.values())), error)
        raise
    for output in outputs:
        close(output, keep=bool(purposes))
    return reports


def open_device(plans: Sequence[Plan], running: RunOptions) -> Backend | None:
    """Open what computes, if it is not the engine itself."""
    device, vram = running.device, _bytes(running.vram)
    if device == "auto":
        device = choose(plans, running.threads, vram, load=True).device
    return open_backend(device, vram)


def execute(
    plans: Sequence[Plan],
    outputs: Sequence[OutputDirectory],
    running: RunOptions,
    backend: Backend | None,
    planned: int,
    part: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write plans' outputs under partial names, and say how it went; see `_core.execute`.

    Only the weights are written of the `part` of plans; its `bytes` says how many they are.
    """
    total = sum(plan.bytes_written for plan in plans) if part is None else part["bytes"]
    needed = sum(plan.disk for plan in plans) if part is None else total
    shards = None if part is None else part["shards"]
    with backend or nullcontext(), watched(running.progress) as callback:
        allowed = room(_bytes(running.memory))
        tables = _with_absent(plans, outputs, running, (allowed, backend), callback)
        for plan, output in zip(plans, outputs, strict=True):
            if part is None:
                stage(output, contents_of(plan))
        folder = os.fspath(outputs[0].path)
        size = spool_bytes(_bytes(running.spool), folder, needed)
        with streamed(tables, size, folder, shards=shards) as fetcher:
            spool = None if fetcher is None else fetcher.spool
            done = _core.execute(
                [(table, output.path) for table, output in zip(tables, outputs, strict=True)],
                memory=allowed,
                threads=running.threads,
                read_path=running.read_path,
                progress=_reporter(total, callback, spool),
                device=backend,
                descriptors=[output.descriptor for output in outputs],
                planned=planned,
                digests=running.digests,
                keys=[output.purpose for output in outputs] if running.keeps else None,
                spool=spool,
                beside=running.beside + (0 if spool is None else RESIDENT),
                part=part,
            )
    return done | {"device": _name(backend), "notes": _notes(backend)}


def _merge_stages(
    made: Sequence[tuple[Plan, PathLike]], planning: PlanOptions, running: RunOptions
) -> list[MergeReport]:
    """Merge what plans of several merges say: those that come first, then the last ones."""
    started = time.perf_counter()
    plans = [plan for plan, _ in made]
    # A plan has its own seed and sizes, and which models may differ was settled when it was made.
    planning = replace(
        planning, seed=plans[0].seed, shard_size=plans[0].shard_size, allow_mismatch=True
    )
    order = Order(plans)
    earlier = [stage for each in order.passes for stage in each]
    needed = sum(map(disk_bytes, [*(stage.plan for stage in earlier), *plans]))
    keys = keys_of([*(stage.plan for stage in earlier), *plans])[-len(plans) :]
    inputs = [file for plan in plans for each in (*plan.stages, plan) for file in each.input_files]
    outputs: dict[int, OutputDirectory] = {}
    reports: dict[int, MergeReport] = {}
    try:
        for at in claiming_order([directory for _, directory in made]):
            outputs[at] = prepare_output(
                made[at][1],
                overwrite=running.overwrite,
                input_files=inputs,
                needed_bytes=needed,
                names=contents_of(plans[at]).names,
                purpose=keys[at],
                resume=running.keeps,
                fresh=running.fresh,
            )
        _merge_earlier(order, lambda stage: stages_folder(outputs[stage.host]), planning, running)
        for group in order.groups:
            lasts = [(plans[at].recipe, made[at][1]) for at in group]
            owned = [outputs[at] for at in group]
            places = places_of(order.needs[group[0]])
            done = merge_together(lasts, planning, running, stages=places, owned=owned)
            reports.update(zip(group, done, strict=True))
    except BaseException as error:
        _give_up([each for each in outputs.values() if each.claim.is_held], error)
        raise
    seconds = time.perf_counter() - started
    return [_with_stages(reports[at], order.stages[at], seconds) for at in range(len(made))]


def _with_stages(report: MergeReport, stages: Iterable[Stage], seconds: float) -> MergeReport:
    """Return the report of a merge with what those before it have told."""
    first = [(stage.plan.recipe.name, stage.report) for stage in stages if stage.report is not None]
    notes = (
        f"`{name}` was merged first: {format_size(each.bytes_written)}, which are removed again"
        for name, each in first
    )
    warnings = (warning for _, each in first for warning in each.warnings)
    return replace(
        report,
        notes=(*notes, *report.notes),
        warnings=(*warnings, *report.warnings),
        total_seconds=seconds,
    )


def _merge_earlier(
    order: Order,
    folder_of: Callable[[Stage], PathLike],
    planning: PlanOptions,
    running: RunOptions,
) -> None:
    """Make what the earlier merges make, each in a folder of its own below that of `folder_of`."""
    earlier = [stage for each in order.passes for stage in each]
    for number, one in enumerate(earlier, start=1):
        one.place = os.path.join(folder_of(one), str(number))
    for each in order.passes:
        merges = [(stage.plan.recipe, stage.place) for stage in each]
        keys = [stage.key for stage in each]
        done = merge_together(merges, planning, running, stages=each[0].places, purposes=keys)
        for one, report in zip(each, done, strict=True):
            one.report = report


def merge_stages(
    plan: Plan, folder: PathLike, planning: PlanOptions, running: RunOptions
) -> tuple[dict[str, str | None], list[MergeReport]]:
    """Make what the earlier merges of a plan make, below `folder`.

    Returns
    -------
    (dict of str to str, list of MergeReport)
        Where the output of each lies by its name, as `prepare` takes it; and how each merge went.
    """
    order = Order([plan])
    _merge_earlier(order, lambda _: folder, planning, running)
    stages = order.stages[0]
    places = places_of({stage.plan.recipe.name or "": stage for stage in stages})
    return places, [stage.report for stage in stages if stage.report is not None]


def _give_up(outputs: Sequence[OutputDirectory], error: BaseException) -> None:
    """Leave outputs unfinished because of `error`, which gets a note on how to go on, if one can.

    What the inputs or the recipe are to blame for would be so again: nothing of it is kept. But
    values that are not finite may be allowed the next time.
    """
    problems = error.problems if isinstance(error, ProblemsError) else ()
    keep = not isinstance(error, InputChangedError | ProblemsError)
    keep |= any(problem.code == "non-finite" for problem in problems)
    kept = [output.path for output in outputs if discard(output, keep=keep)]
    # Of merges that come first only the last one tells: theirs are no outputs that users know.
    if kept and kept[0].parent.name != STAGES_NAME:
        error.add_note(how_to_go_on(reversed(kept)))


def claiming_order(directories: Sequence[PathLike]) -> list[int]:
    """Return the order in which to claim directories: the same in every run, by their real paths.

    Else two sweeps over the same ones could each have one that the other needs, and both fail.
    """
    return sorted(
        range(len(directories)), key=lambda at: os.fsencode(os.path.realpath(directories[at]))
    )


def _check_side_files(plans: Iterable[Plan]) -> None:
    """Raise InputChangedError if a copied file is no longer what it was when it was planned."""
    files = {
        str(file.source): file.state.as_input(str(file.source))
        for plan in plans
        for file in plan.side_files.copied
    }
    _core.check_unchanged(json.dumps(list(files.values())))


def prepare(
    recipe: Request | Asked, options: PlanOptions, stages: Mapping[str, str | None] | None = None
) -> Plan:
    """Return the plan of what was asked for: a recipe, a file or text of one, or a plan.

    `stages` says where the outputs of earlier merges lie; unless given, they are planned too.
    """
    asked = _read(recipe, options)
    if isinstance(asked, Plan):
        return asked
    recipe, findings = asked.recipe, asked.findings

    def plan_one(one: Recipe, places: Mapping[str, str | None], found: Findings) -> Plan:
        return build_plan(
            one,
            shard_size=parse_size(
                DEFAULT_SHARD_SIZE if options.shard_size is None else options.shard_size
            ),
            seed=0 if options.seed is None else options.seed,
            strict=options.strict,
            # Later merges read those of earlier ones.
            with_side_files=options.with_side_files or one is not recipe,
            allow_mismatch=options.allow_mismatch,
            allow_methods=options.allow_methods,
            findings=found,
            stages=places,
        )

    if stages is not None or not recipe.stages:
        return plan_one(recipe, stages or {}, findings)
    *earlier, last = plan_stages(recipe, findings, plan_one)
    last.stages = tuple(earlier)
    return last


@dataclass(frozen=True, slots=True)
class Asked:
    """A recipe, as far as it could be read, and what is wrong with it."""

    recipe: Recipe
    findings: Findings


def _read(request: Request | Asked, options: PlanOptions) -> Plan | Asked:
    """Return the plan that was asked for, or the recipe."""
    if isinstance(request, Asked):
        return request
    if isinstance(request, str | os.PathLike) and is_saved_plan(request):
        request = load_plan(request, allow_methods=options.allow_methods)
    if isinstance(request, Plan):
        check_made(request, options)
        return request
    findings = Findings(ignore_unknown=options.ignore_unknown)
    if not isinstance(request, Recipe):
        return Asked(Recipe.read(request, findings), findings)
    if not request.sources:
        raise TypeError(
            "this recipe has neither models nor slices; make it with `Recipe.from_yaml` or "
            "`Recipe.from_mapping`"
        )
    return Asked(request, findings)


def check_made(plan: Plan, options: PlanOptions) -> None:
    """Refuse what a plan that is made cannot take any more."""
    size = None if options.shard_size is None else parse_size(options.shard_size)
    given = {"seed": (options.seed, plan.seed), "shard_size": (size, plan.shard_size)}
    for name, (value, own) in given.items():
        if value is not None and value != own:
            raise ValueError(f"the plan has its own {name}, {own}: make another for {value}")
    if options.strict and plan.warnings:
        raise PlanError("cannot merge", problems=plan.warnings)


def finish_all(
    merges: Sequence[tuple[Plan, OutputDirectory]],
    done: dict[str, Any],
    planning: PlanOptions,
    running: RunOptions,
    started: float,
) -> list[MergeReport]:
    """Finish the outputs that nothing stands against; raise PlanError if that is not all."""
    reports: list[MergeReport] = []
    problems: list[Problem] = []
    known = done.get("digests") or [None] * len(merges)
    for (plan, output), files, digests in zip(merges, done["files"], known, strict=True):
        against, odd = outcome_of(
            plan, digests, allow_nonfinite=running.allow_nonfinite, strict=planning.strict
        )
        problems += against
        if not against:
            warnings = [*plan.warnings, *odd]
            manifest = manifest_writer(
                plan, contents_of(plan), digests, warnings, hash_inputs=running.hash_inputs
            )
            told = done | {"files": files, "warnings": tuple(map(str, warnings))}
            reports.append(_finish(plan, output, told, manifest, started))
    if problems:
        raise PlanError("the merge is not finished", problems=problems)
    return reports


def _finish(
    plan: Plan,
    output: OutputDirectory,
    done: dict[str, Any],
    manifest: Callable[[int], None],
    started: float,
) -> MergeReport:
    contents = contents_of(plan)
    if output.address is not None:
        contents = replace(contents, shards=())
    report = report_of(
        done,
        directory=output.address or os.fspath(output.path),
        tensors=len(plan.tensors),
        files=len(plan.shards),
        bytes_written=plan.bytes_written,
        input_bytes=plan.bytes_read,
        total_seconds=time.perf_counter() - started,
        warnings=done["warnings"],
        notes=(*plan.changes, *done["notes"], *_kept(done["kept"], plan), *_notes_on(output)),
    )
    story = report.as_dict()
    story["seconds_before_commit"] = story.pop("total_seconds")
    story |= {"parts": done["seal"]} if done.get("seal") else {}
    states = [FileState(**state) for state in done["files"]]
    leftovers = commit(output, contents, states, late_texts(plan, story, manifest))
    seconds = time.perf_counter() - started
    return replace(report, total_seconds=seconds, notes=(*report.notes, *leftovers))


def report_of(done: Mapping[str, Any], **known: Any) -> MergeReport:  # noqa: ANN401
    """Return the report of a run, of which `execute` says what is not known otherwise."""
    return MergeReport(
        bytes_read=done["bytes_read"],
        seconds=done["seconds"],
        read_gb_per_second=_gb_per_second(done["bytes_read"], done["seconds"]),
        written_gb_per_second=_gb_per_second(done["bytes_written"], done["seconds"]),
        peak_memory=done["peak_memory"],
        predicted_memory=done["memory"]["predicted"],
        memory=done["memory"]["budget"],
        threads=done["memory"]["workers"],
        simd=done["simd"],
        device=done["device"],
        **known,
    )


def _gb_per_second(size: int, seconds: float) -> float:
    return size / max(seconds, 1e-9) / 1e9


def _bytes(size: int | str | None) -> int | None:
    return None if size is None else parse_size(size)


def room(budget: int | None) -> int:
    """Return the budget, or the usual one: that of a small process, or more than is resident."""
    return max(DEFAULT_MEMORY, resident() + DEFAULT_ROOM) if budget is None else budget


def resident() -> int:
    """Return how many bytes the process has resident now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _name(backend: Backend | None) -> str:
    return "cpu" if backend is None else backend.name


def _notes(backend: Backend | None) -> tuple[str, ...]:
    return () if backend is None or backend.is_host else (UNTRIED,)


def _kept(tensors: int, plan: Plan) -> tuple[str, ...]:
    if not tensors:
        return ()
    return (f"an interrupted run had finished {tensors} of {len(plan.tensors)} tensors",)


def _notes_on(output: OutputDirectory) -> tuple[str, ...]:
    if output.claim.is_locked:
        return ()
    note = f"`{output.path}` cannot be locked there: let no other run write to it at the same time"
    return (note,)


def _free_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(line for line in file if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024


def _with_absent(
    plans: Sequence[Plan],
    outputs: Sequence[OutputDirectory],
    running: RunOptions,
    room: tuple[int, Backend | None],
    progress: Callable[[Snapshot], None] | None,
) -> list[_core.Plan]:
    """Fetch the files that are to be kept; return the tables of the plans when they are here."""
    tables = [plan.table for plan in plans]
    absent = list(
        {
            each["remote"]["label"]: each
            for plan in plans
            for each in plan.absent
            if not is_streamed(each, stream=running.stream)
        }.values()
    )
    if not absent:
        return tables
    memory, backend = room
    _core.predict(
        tables, memory, running.threads, backend
    )  # what cannot fit is told before hours of downloads
    check_space(absent, os.fspath(outputs[0].path), sum(plan.disk for plan in plans))
    places = fetch(absent, _fetch_reporter(plans, progress))
    return [table.placed(places) for table in tables]


def _fetch_reporter(
    plans: Sequence[Plan], progress: Callable[[Snapshot], None] | None
) -> Callable[[int, int, str], None] | None:
    if progress is None:
        return None
    total, peak = sum(plan.bytes_written for plan in plans), _core.peak_memory()

    def report(fetched: int, to_fetch: int, current: str) -> None:
        progress(Snapshot(0, total, 0, 0, current, peak, fetched, to_fetch))

    return report


def _reporter(
    total: int,
    progress: Callable[[Snapshot], None] | None,
    spool: _core.Spool | None,
) -> Callable[[int, int, int, str, int], None] | None:
    if progress is None:
        return None

    def report(read: int, written: int, tensors: int, current: str, peak: int) -> None:
        fetched = 0 if spool is None else spool.fetched
        progress(Snapshot(written, total, read, tensors, current, peak, fetched))

    return report
