"""A merge in parts, each made by a run of its own, on other machines perhaps; and its end.

A part is some of the plan's shards. Every run plans the whole merge, which reads headers only, and
makes its shards in a directory of its own within the output (`oxmerge.output.part_files`). When all
parts are made, one process completes the output as any merge does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import time
from collections import Counter
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from oxmerge import __version__, _core
from oxmerge.cli.progress import watched
from oxmerge.errors import (
    InputChangedError,
    OutputError,
    PlanError,
    ProblemsError,
    WaitsForOthersError,
)
from oxmerge.file_state import FileState
from oxmerge.json_files import read_object
from oxmerge.merging import (
    MergeReport,
    Snapshot,
    claiming_order,
    execute,
    finish_all,
    open_device,
    prepare,
    report_of,
)
from oxmerge.models.stores import is_address
from oxmerge.options import PlanOptions, RunOptions
from oxmerge.output.card import REPORT_NAME
from oxmerge.output.claims import BusyError, locked_file, named
from oxmerge.output.contents import contents_of
from oxmerge.output.manifest import MANIFEST_NAME, plan_digest
from oxmerge.output.part_files import (
    DONE,
    PLAN_NAME,
    Made,
    PartFiles,
    Purpose,
    missing_parts,
    parts_in,
    seal_of,
    shards_of_parts,
    shown,
)
from oxmerge.output.publish import (
    PARTS_NAME,
    NoPartsError,
    OutputDirectory,
    clean,
    close,
    discard,
    is_just_complete,
    last_names,
    no_parts,
    prepare_output,
    share_output,
    stage,
)
from oxmerge.output.resume import parsed
from oxmerge.planning.plan_files import load_plan
from oxmerge.problems import UNSUPPORTED, Problem
from oxmerge.stages import Order

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, TypeVar

    from oxmerge.planning.plans import Plan
    from oxmerge.torch_backend import Backend

    T = TypeVar("T")
    PathLike = str | os.PathLike[str]
    #: What a merge in parts lacks, of which a run is to make one, and which parts no run makes.
    Lacks = Callable[
        [Plan, tuple[int, int], str, PlanOptions, RunOptions], tuple[str, Sequence[int]]
    ]

__all__ = [
    "after_earlier",
    "check_of_plan",
    "check_parts",
    "complete",
    "complete_each",
    "finish",
    "is_complete",
    "merge_parts",
    "nothing_left",
    "planned_in_turn",
]


_KEPT = "what is finished is kept: the same command goes on from there"
#: Where below the shared folder earlier merges are made.
EARLIER_NAME = "earlier"
_SECONDS_BETWEEN_LOOKS = 0.5
#: How long a run waits for sweeps before it looks again whether there are some that no run makes.
_SECONDS_BETWEEN_HELP = 30.0
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def merge_parts(
    merges: Sequence[tuple[Plan, PathLike]],
    planning: PlanOptions,
    running: RunOptions,
    started: float,
) -> list[MergeReport]:
    """Make the part that `running` names of a merge, or of each merge of a sweep.

    Each output has a shared folder of its own; what they find together in a sweep over the tensors
    lies in that of the first. See `oxmerge.merge`.
    """
    if any(is_address(os.fspath(path)) for _, path in merges):
        from oxmerge.in_store import merge_in_store  # noqa: PLC0415 - it needs this module

        return merge_in_store(merges, planning, running, started)
    _, parts = running.part or (1, 1)
    check_parts([plan for plan, _ in merges], parts)
    shared = _Shared(merges, parts)
    while True:
        complete = shared.are_complete(running)
        left = [at for at, is_done in enumerate(complete) if not is_done]
        try:
            with watched(running.progress) as callback:
                options = replace(running, progress=callback or False)
                made = iter(_merge_parts(shared.only(left), planning, options, started))
        except (FileExistsError, BusyError):  # unless another run has completed one meanwhile
            if complete == shared.are_complete(running):
                raise
        else:
            return [
                nothing_left(directory) if is_done else next(made)
                for (_, directory), is_done in zip(merges, complete, strict=True)
            ]


def _merge_parts(
    shared: _Shared, planning: PlanOptions, running: RunOptions, started: float
) -> list[MergeReport]:
    """Make a part of outputs that are not complete; see `merge_parts`."""
    number, parts = running.part or (1, 1)
    plans, shards = shared.plans, shared.shards[number - 1]
    if not plans:
        return []
    backend = open_device(plans, running)
    with contextlib.ExitStack() as stack:
        outputs, all_files = shared.join(stack, number, running)
        made = [] if running.fresh else _made_before(outputs, all_files)
        is_made = bool(made)
        if not is_made:
            for files in all_files:
                files.forget_made()
            folders = [f"{output.path / PARTS_NAME}" for output in outputs]
            names = [plans[0].shards[shard][0] for shard in shards]
            one_by_one: dict[int, Made] = {}
            for group, ready in _in_turn(plans, folders, planning, running):
                theirs = [all_files[at] for at in group]
                done = _make_with_help(shared.only(group), ready, theirs, running, backend)
                for at, written in zip(group, done["files"], strict=True):
                    states = [FileState(**state) for state in written]
                    found = dict(zip(names, states, strict=True))
                    one_by_one[at] = Made(shared.purposes[at].key, found, kept_of(done))
                    all_files[at].write_made(one_by_one[at])
            made = [one_by_one[at] for at in range(len(plans))]
        left = sorted({part for files in all_files for part in missing_parts(files)})
    note = f"part {number} of {parts} is made" + (" already" if is_made else "")
    if left:
        note += f", but not yet {shown(left)}"
    elif not running.finish:
        note += ", and all others: `oxmerge finish` completes the output"
    reports = [
        report_of_part(plan, shards, each.done, os.fspath(output.path), note, started)
        for plan, output, each in zip(plans, outputs, made, strict=True)
    ]
    if left or not running.finish:
        return reports
    return complete_each(
        plans,
        reports,
        lambda plan, folder: complete(plan, parts, Path(folder), planning, running, started),
    )


def _in_turn(
    plans: Sequence[Plan], folders: Sequence[str], planning: PlanOptions, running: RunOptions
) -> Iterator[tuple[list[int], list[Plan]]]:
    """Yield which plans are run in one pass, and they as they can be run: what they read is made.

    In a sweep, what comes first and is equal for several is made for one, and linked for the
    others: so each output can be completed by itself.
    """
    if len(plans) == 1:
        yield [0], [after_earlier(plans[0], folders[0], planning, running, _lacks)]
        return
    order, first = Order(plans), dict[int, str]()
    ready = []
    for plan, folder, stages in zip(plans, folders, order.stages, strict=True):
        places = [f"{folder}/{EARLIER_NAME}/{at}" for at in range(1, len(stages) + 1)]
        equal = {
            place: first.setdefault(id(stage), place)
            for stage, place in zip(stages, places, strict=True)
        }
        ready.append(after_earlier(plan, folder, planning, running, _lacks, equal))
    for group in order.groups:
        one, *others = group  # which read what the first of them reads, by the same paths
        same = [planned_in_turn(plans[at], folders[one], planning) for at in others]
        yield group, [ready[one], *same]


def _link_all(source: str, place: str) -> None:
    """Have the output of an earlier merge at another place too, if files can be linked there."""
    coming = f"{place}.{socket.gethostname()}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        shutil.copytree(source, coming, copy_function=os.link, ignore=shutil.ignore_patterns(".*"))
        os.rename(coming, place)  # unless another run was faster
    except OSError:
        shutil.rmtree(coming, ignore_errors=True)


def _helping(running: RunOptions, part: tuple[int, int]) -> RunOptions:
    """Return the options with which a run makes another part than its own: it does not wait."""
    return replace(
        running,
        part=part,
        wait=0,
        finish=False,
        fresh=False,
        hash_inputs=False,
        allow_nonfinite=False,
    )


class _Shared:
    """What parts make together: the output of one merge, or those of a sweep.

    Parameters
    ----------
    merges : sequence of (Plan, path)
        The plans, and where their outputs go.
    parts : int
        In how many parts.
    """

    def __init__(self, merges: Sequence[tuple[Plan, PathLike]], parts: int) -> None:
        plans = [plan for plan, _ in merges]
        together = plans if len(plans) > 1 else ()
        self._merges, self._parts = merges, parts
        self.purposes = [Purpose.of(plan, parts, together) for plan in plans]
        self.shards = shards_of_parts([size for _, size in plans[0].shards], parts)

    @property
    def plans(self) -> list[Plan]:
        """The plans of the outputs."""
        return [plan for plan, _ in self._merges]

    def are_complete(self, running: RunOptions) -> list[bool]:
        """Tell of each output whether it is complete and stays: made of this, by parts."""
        return [
            not running.fresh and is_complete(plan, Path(directory), purpose)
            for (plan, directory), purpose in zip(self._merges, self.purposes, strict=True)
        ]

    def only(self, numbers: Sequence[int]) -> _Shared:
        """Return some of it; each part of that is still one of the whole sweep."""
        some = copy(self)
        some._merges = [self._merges[at] for at in numbers]  # noqa: SLF001 - its own
        some.purposes = [self.purposes[at] for at in numbers]
        return some

    def join(
        self, stack: contextlib.ExitStack, part: int, running: RunOptions
    ) -> tuple[list[OutputDirectory], list[PartFiles]]:
        """Share the outputs with the other parts until the stack ends, as the only run of one."""
        joined: dict[int, tuple[OutputDirectory, PartFiles]] = {}
        for at in claiming_order([directory for _, directory in self._merges]):
            one = (part, self._parts)
            joined[at] = _join(stack, self._merges[at], one, self.purposes[at], running)
        outputs, files = zip(*(joined[at] for at in sorted(joined)), strict=True)
        return list(outputs), list(files)

    def make(
        self,
        plans: Sequence[Plan],
        files: Sequence[PartFiles],
        running: RunOptions,
        backend: Backend | None,
        *,
        sweeps_only: bool = False,
    ) -> dict[str, Any]:
        """Make a part, which has been joined; see `make`."""
        shards = self.shards[files[0].part - 1]
        keys = [purpose.key for purpose in self.purposes]
        return make(plans, shards, files, keys, running, backend, sweeps_only=sweeps_only)


def is_complete(plan: Plan, directory: Path, purpose: Purpose) -> bool:
    """Tell whether parts of this merge have been made and completed in a directory."""
    sizes = dict(plan.shards)
    try:
        found = {name: os.stat(directory / name).st_size for name in sizes}
        last = (directory / last_names(contents_of(plan))[-1]).exists()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (
        last
        and found == sizes
        and purpose.is_sealed(read_object(directory / REPORT_NAME).get("parts"))
    )


def nothing_left(directory: PathLike) -> MergeReport:
    """Return the report of a run that found the output complete.

    What a run has left that died just after it had completed that is removed.
    """
    if is_address(os.fspath(directory)) or is_just_complete(Path(directory)):
        with contextlib.suppress(BusyError):
            clean(directory)
    done: dict[str, Any] = {
        "bytes_read": 0, "bytes_written": 0, "seconds": 0.0, "peak_memory": _core.peak_memory(),
        "memory": {"predicted": 0, "budget": 0, "workers": 0},
        "simd": _core.build_info()["simd"], "device": "cpu",
    }  # fmt: skip
    return report_of(
        done,
        directory=os.fspath(directory),
        tensors=0,
        files=0,
        bytes_written=0,
        input_bytes=0,
        total_seconds=0.0,
        warnings=(),
        notes=(f"`{os.fspath(directory)}` is complete: nothing is left to do",),
    )


class Patience:
    """How long a run waits for others, and that it says so.

    Parameters
    ----------
    running : RunOptions
        Says how long, and who is told.
    total : int
        Bytes that the run is about.
    """

    def __init__(self, running: RunOptions, total: int) -> None:
        self._until = time.monotonic() + running.wait
        self._progress = running.progress if callable(running.progress) else None
        self._total = total

    def until_free(
        self, call: Callable[[], T], what: str, is_worth_it: Callable[[], bool] = lambda: True
    ) -> T:
        """Return what a call returns once it finds no other run there; wait for `what` till then.

        BusyError if it was waited long enough, or is not worth it.
        """
        while True:
            try:
                return call()
            except BusyError:
                if not is_worth_it() or not self.wait(what):
                    raise

    def wait(self, what: str) -> bool:
        """Wait a moment for `what`; False if it was waited long enough."""
        if time.monotonic() >= self._until:
            return False
        if self._progress is not None:
            waiting = f"waiting for {what}"
            self._progress(Snapshot(0, self._total, 0, 0, waiting, _core.peak_memory()))
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        return True


def _make_with_help(
    shared: _Shared,
    plans: Sequence[Plan],
    files: Sequence[PartFiles],
    running: RunOptions,
    backend: Backend | None,
) -> dict[str, Any]:
    """Make a part. Before it waits for sweeps, make those that no run has begun."""
    until = time.monotonic() + running.wait
    try:
        return shared.make(plans, files, replace(running, wait=0), backend)
    except WaitsForOthersError:
        if running.wait <= 0:
            raise
    while True:
        at_once = replace(running, wait=0, fresh=False)
        for other in files[0].unswept():
            with (
                contextlib.suppress(BusyError, WaitsForOthersError),
                contextlib.ExitStack() as stack,
            ):
                _, theirs = shared.join(stack, other, at_once)
                if not theirs[0].is_swept():  # by a run that has ended meanwhile
                    shared.make(plans, theirs, at_once, backend, sweeps_only=True)
        left = until - time.monotonic()
        wait = max(min(left, _SECONDS_BETWEEN_HELP), 0)
        try:
            again = replace(running, wait=wait, fresh=False)
            return shared.make(plans, files, again, backend)
        except WaitsForOthersError:
            if left <= _SECONDS_BETWEEN_HELP:
                raise


def complete_each(
    plans: Sequence[Plan],
    parts_made: Sequence[MergeReport],
    complete_one: Callable[[Plan, str], MergeReport],
) -> list[MergeReport]:
    """Complete each output, whatever becomes of the others; then raise the first error."""
    reports: list[MergeReport] = []
    failed: dict[str, Exception] = {}
    for plan, part in zip(plans, parts_made, strict=True):
        folder = part.directory
        try:
            reports.append(complete_one(plan, folder))
        except (BusyError, NoPartsError):
            *others, note = part.notes
            note += "; another run completes the output, "
            note += f"and if that run fails `oxmerge finish {folder}` does"
            reports.append(replace(part, notes=(*others, note)))
        except Exception as error:  # noqa: BLE001 - it is raised below
            failed[folder] = error
    if failed:
        first = next(iter(failed.values()))
        if len(plans) > 1:
            for folder in failed:
                first.add_note(f"not complete: `oxmerge finish {folder}` completes it")
        raise first
    return reports


def _join(
    stack: contextlib.ExitStack,
    merge: tuple[Plan, PathLike],
    part: tuple[int, int],
    purpose: Purpose,
    running: RunOptions,
) -> tuple[OutputDirectory, PartFiles]:
    """Share an output with the other parts until the stack ends, as the only run of this one."""
    plan, directory = merge
    patience = Patience(running, plan.bytes_written)
    # A merge that is not in parts has no such folder, and takes longer than anyone waits.
    has_parts = Path(directory, PARTS_NAME).exists

    def share() -> OutputDirectory:
        # Who completes it may have done so since it was looked, or while this run waited.
        if not running.fresh and not has_parts() and is_complete(plan, Path(directory), purpose):
            raise FileExistsError(errno.EEXIST, "a model that is complete", os.fspath(directory))
        return share_output(
            directory,
            overwrite=running.overwrite,
            input_files=plan.all_input_files,
            names=contents_of(plan).names,
        )

    output = patience.until_free(share, "the run that completes the output", has_parts)
    stack.callback(output.claim.release)
    files = stack.enter_context(shared_folder(output.path, *part))
    patience.until_free(
        lambda: stack.enter_context(files.locked()), f"another run of part {files.part}"
    )
    files.join(purpose)
    files.save(plan)
    return output, files


def after_earlier(
    plan: Plan,
    folder: str,
    planning: PlanOptions,
    running: RunOptions,
    lacks: Lacks,
    equal: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Return a plan of the last merge, when the outputs of those before it are all there.

    Of each of these this run makes a part. Then it makes what no other run has begun, so that it
    waits for none that has no node to run on, and waits for the rest; with no time to wait it does
    neither. `lacks` says what a merge still lacks, at its place below `folder`, and which of its
    parts no run makes; it completes the merge if it lacks nothing but its end. `equal` says by
    place where the output of an equal merge lies.
    """
    number, parts = running.part or (1, 1)
    here = replace(running, part=None, overwrite=False, finish=False, hash_inputs=False)

    def make_one(earlier: Plan, place: str) -> None:
        count = min(parts, len(earlier.shards))
        if equal.get(place, place) != place and not os.path.exists(place):
            _link_all(equal[place], place)
        patience = Patience(running, earlier.bytes_written)
        while True:
            found, free = lacks(earlier, (number, count), place, planning, here)
            if not found:
                return
            if free and (number in free or running.wait > 0):
                is_own = number in free
                part = (number if is_own else free[0], count)
                wait = running.wait if is_own else 0
                options = replace(_helping(here, part), wait=wait, fresh=is_own and here.fresh)
                if _make_earlier(earlier, place, planning, options, is_own=is_own):
                    continue
            name = f"the merge `{earlier.recipe.name}`"
            try:
                is_over = not patience.wait(f"{found} of {name}")
            except KeyboardInterrupt as error:
                error.add_note(_KEPT)
                raise
            if is_over:
                raise WaitsForOthersError(
                    f"{name} comes first, and other parts have not made theirs of it",
                    file=folder.removesuffix(f"/{PARTS_NAME}"),
                    expected="all of its parts",
                    found=f"not yet {found}",
                    advice="run this part again when those have run: it goes on from here",
                )

    return planned_in_turn(plan, folder, planning, make_one)


def _make_earlier(
    plan: Plan, place: str, planning: PlanOptions, running: RunOptions, *, is_own: bool
) -> bool:
    """Make a part of an earlier merge; whether that could be done just now."""
    try:
        merge_parts([(plan, place)], planning, running, time.perf_counter())
    except WaitsForOthersError:
        if is_own:
            raise
        return False
    except (BusyError, FileExistsError):  # another run is about to complete it, or has
        return False
    return True


def _lacks(
    plan: Plan, part: tuple[int, int], place: str, planning: PlanOptions, running: RunOptions
) -> tuple[str, list[int]]:
    """Return what an earlier merge lacks, and which parts are free; see `after_earlier`."""
    number, parts = part
    path = Path(place)
    last = path / last_names(contents_of(plan))[-1]
    if last.exists():
        return "", []
    try:
        with shared_folder(path, 1, parts) as files:
            left = missing_parts(files)
            free = [at for at in left if files.of(at).is_free(own=at == number)]
    except FileNotFoundError:
        return "any of them", list(range(1, parts + 1))
    if left:
        return shown(left), free
    with contextlib.suppress(BusyError, NoPartsError):
        complete(plan, parts, path, planning, replace(running, wait=0), time.perf_counter())
    return "" if last.exists() else "the end, which another run makes", []


def planned_in_turn(
    plan: Plan,
    folder: str,
    planning: PlanOptions,
    make_one: Callable[[Plan, str], None] = lambda _, __: None,
) -> Plan:
    """Return a plan of the last merge that reads what the ones before it have made.

    `make_one` is called with the plan of each of those, and where it goes: below `folder`.
    """
    if not plan.stages:
        return plan
    # A plan has its own seed and sizes, and which models may differ was settled when it was made.
    options = replace(planning, seed=plan.seed, shard_size=plan.shard_size, allow_mismatch=True)
    places: dict[str, str | None] = {}
    for at, earlier in enumerate(plan.stages, start=1):
        place = f"{folder}/{EARLIER_NAME}/{at}"
        make_one(prepare(earlier.recipe, options, places), place)
        places[earlier.recipe.name or ""] = place
    return prepare(plan.recipe, options, places)


def _made_before(outputs: Sequence[OutputDirectory], all_files: Sequence[PartFiles]) -> list[Made]:
    """Return what an earlier run has made of the part in each output; nothing if one lacks some."""
    made = []
    for output, files in zip(outputs, all_files, strict=True):
        each = files.made()
        if each is None or files.find(output, each) is None:
            return []
        made.append(each)
    return made


def kept_of(done: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written down of how a part was made."""
    return {name: done[name] for name in DONE if name in done} | {"host": socket.gethostname()}


def report_of_part(
    plan: Plan,
    shards: Sequence[int],
    done: Mapping[str, Any],
    directory: str,
    note: str,
    started: float,
) -> MergeReport:
    """Return the report of a part, of which `done` is kept."""
    return report_of(
        done,
        directory=directory,
        tensors=done["tensors"],
        files=len(shards),
        bytes_written=sum(plan.shards[shard][1] for shard in shards),
        input_bytes=done["input_bytes"],
        total_seconds=time.perf_counter() - started,
        warnings=tuple(map(str, plan.warnings)),
        notes=(*done["notes"], note),
    )


def finish(
    directory: PathLike,
    *,
    overwrite: bool = False,
    strict: bool = False,
    hash_inputs: bool = False,
    allow_nonfinite: bool = False,
    allow_methods: Iterable[str] = (),
) -> MergeReport:
    """Complete an output of which all parts are made, as `merge` completes one.

    The files beside the weights are written as the run that began first has planned them; so the
    inputs must lie here where they lay there. Where they do not, run one of the parts again, with
    ``finish=True``: it has nothing else to do.

    Parameters
    ----------
    directory : path or str
        The output of the parts: a directory, or the address of one in an object store.
    overwrite : bool
        Replace a model that is there.
    strict : bool
        Whether warnings count as problems.
    hash_inputs, allow_nonfinite : bool
        As in `merge`.
    allow_methods : iterable of str
        Modules that a method written in Python may come from, as in `merge`.

    Returns
    -------
    MergeReport
        Bytes are those of all parts together; `seconds` and memory those of the part with the most.
        It has no files if the output is complete already.

    Raises
    ------
    OutputError
        If a part is not made, or a run makes one now, which is not waited for; or if there are
        none.
    PlanError
        If elements of the output are not finite though all inputs are.
    InputChangedError, OSError
        If an input or a file beside the weights is not what it was, or cannot be read or written.

    Examples
    --------
    >>> import oxmerge
    >>> oxmerge.merge("recipe.yml", "in-parts/", part=(1, 1)).files
    1
    >>> oxmerge.finish("in-parts/").files
    1
    """
    started = time.perf_counter()
    path = named(directory)
    planning = PlanOptions(strict=strict)
    running = RunOptions(
        overwrite=overwrite, hash_inputs=hash_inputs, allow_nonfinite=allow_nonfinite, wait=0
    )
    if is_address(os.fspath(directory)):
        from oxmerge.in_store import finish_in_store  # noqa: PLC0415 - it needs this module

        return finish_in_store(directory, planning, running, allow_methods, started)
    if _is_finished(path):
        return nothing_left(directory)
    try:
        parts = parts_in(path)
        if not parts:
            raise no_parts(path, is_model=(path / MANIFEST_NAME).exists())
        with shared_folder(path, 1, parts) as files:  # told before another run that makes one
            _made_by_all(files)
        plan = load_plan(path / PARTS_NAME / PLAN_NAME, allow_methods=allow_methods)
        return complete(plan, parts, path, planning, running, started)
    except (OutputError, OSError):  # unless another run has completed it meanwhile
        if not _is_finished(path):
            raise
    return nothing_left(directory)


def _is_finished(path: Path) -> bool:
    """Tell whether an output was made in parts, and has nothing left of them to complete."""
    if not read_object(path / REPORT_NAME).get("parts"):
        return False
    # What says the first goes last: so one of both holds while the parts are removed.
    return is_just_complete(path) or (not parts_in(path) and (path / MANIFEST_NAME).exists())


def check_parts(plans: Sequence[Plan], parts: int) -> None:
    """Raise PlanError for plans of the same tensors that cannot be made in so many parts."""
    first, *others = plans
    shards = len(first.shards)
    if parts > shards:
        found = f"{shards} file{'' if shards == 1 else 's'} of weights, none of which is split"
        problem = Problem(
            "part-count",
            "there are more parts than the output has files",
            expected=f"at most {shards} part{'' if shards == 1 else 's'}",
            found=found,
            advice="make fewer parts, or more files with a smaller `--shard-size`",
        )
        raise PlanError.of("cannot merge in parts", [problem])
    for other in others:
        # A part is the same files of every output: only so it reads what it needs once.
        if other.shards != first.shards:
            message = "the outputs of this sweep are not cut into files alike"
            advice = "sweep in one run; or leave out of the sweep what changes types of tensors"
            problem = Problem(UNSUPPORTED, message, advice=advice)
            raise PlanError.of("cannot sweep in parts", [problem])


@contextlib.contextmanager
def shared_folder(directory: Path, part: int, parts: int) -> Iterator[PartFiles]:
    """Yield the files of a part, in the folder that the parts of an output share."""
    with opened_folder(directory / PARTS_NAME) as folder:
        yield PartFiles(part, parts, folder, directory)


@contextlib.contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """Yield a folder, open."""
    folder = os.open(path, _FOLDER)
    try:
        yield folder
    finally:
        os.close(folder)


def make(
    plans: Sequence[Plan],
    shards: Sequence[int],
    all_files: Sequence[PartFiles],
    keys: Sequence[str],
    running: RunOptions,
    backend: Backend | None,
    *,
    sweeps_only: bool = False,
) -> dict[str, Any]:
    """Write some shards of each plan, into the directory of a part, and say how it went.

    With `sweeps_only` it ends with `WaitsForOthersError` when their tensors are swept.
    """
    names = [plans[0].shards[shard][0] for shard in shards]
    size = sum(plans[0].shards[shard][1] for shard in shards)
    first = all_files[0]
    part = {
        "shards": shards,
        "bytes": size * len(plans),
        "descriptor": first.folder,
        "folder": first.path.parent,
        # Nobody leaves those of a part that there is not.
        "names": [f"{first.of(at + 1).name}.numbers" for at in range(first.parts + sweeps_only)],
        "own": first.part - 1,
        "wait": running.wait,
    }
    own: list[OutputDirectory] = []
    try:
        for files, key in zip(all_files, keys, strict=True):
            output = prepare_output(
                files.path,
                overwrite=False,
                input_files=(),
                needed_bytes=size * len(plans),
                names=names,
                purpose=key,
                resume=True,
                fresh=running.fresh,
            )
            own.append(output)
        done = execute(plans, own, running, backend, 0, part)
    except BaseException as error:
        keep = not isinstance(error, InputChangedError | ProblemsError)
        kept = [discard(output, keep=keep) for output in own]
        if any(kept):
            error.add_note(_KEPT)
        raise
    for output in own:
        close(output, keep=True)
    return done


def complete(
    plan: Plan,
    parts: int,
    path: Path,
    planning: PlanOptions,
    running: RunOptions,
    started: float,
) -> MergeReport:
    """Complete an output; BusyError or NoPartsError if another run does, or has."""
    digest = plan_digest(plan)
    with _only_one(path, parts) as files:
        plan = planned_in_turn(plan, f"{path / PARTS_NAME}", planning)
        contents = contents_of(plan)
        weights = sum(size for _, size in plan.shards)
        patience = Patience(running, plan.bytes_written)
        take = partial(
            prepare_output,
            path,
            overwrite=running.overwrite,
            input_files=plan.input_files,
            needed_bytes=plan.disk - weights,
            names=contents.names,
            purpose=digest,
            resume=True,
            parts=True,
        )
        # Runs of parts that are about to end share it.
        output = patience.until_free(take, "runs of parts to end")
        try:
            made = _made_by_all(files)
            states = _find_all(plan, digest, files, made, output)
            stage(output, contents)
            folders = [files.of(at).path for at in made]
            digests = _core.Digests.of_parts(plan.table, folders, made[1].key)
            hosts = len({each.done["host"] for each in made.values()})
            note = f"made in {parts} parts on {hosts} machine{'' if hosts == 1 else 's'}"
            done = together([each.done for each in made.values()], note)
            done |= {"files": [[state._asdict() for state in states]], "digests": [digests]}
            done |= {"seal": seal_of(files.keys(), made[1].key)}
            (report,) = finish_all([(plan, output)], done, planning, running, started)
        except BaseException as error:
            if discard(output, keep=True):
                error.add_note("the parts are kept: `oxmerge finish` goes on from there")
            raise
    # NFS keeps a file that is open, as that of the lock was, and its folder.
    shutil.rmtree(path / PARTS_NAME, ignore_errors=True)
    close(output)
    return report


@contextlib.contextmanager
def _only_one(path: Path, parts: int) -> Iterator[PartFiles]:
    """Yield the files of the first part, to the only run that completes the output."""
    with contextlib.ExitStack() as stack:
        try:
            files = stack.enter_context(shared_folder(path, 1, parts))
            stack.enter_context(locked_file("finish.lock", files.folder))
        except FileNotFoundError:
            raise no_parts(path) from None
        except BlockingIOError:
            message, advice = "another run completes the output", "wait for it"
            raise BusyError(message, file=str(path), advice=advice) from None
        yield files


#: What to do where something of a part does not hold.
_AGAIN = "run that part again: it goes on with what holds"


def _made_by_all(files: PartFiles) -> dict[int, Made]:
    """Return what each part has made; OutputError if one is not made, or of something else."""
    made = {at: files.of(at).made() for at in range(1, files.parts + 1)}
    left = [at for at, each in made.items() if each is None]
    if left:
        raise OutputError(
            "not all parts of the merge are made",
            file=str(files.directory),
            expected=f"{files.parts} parts",
            found=f"not yet {shown(left)}",
            advice="run those with `--part`, then finish",
        )
    return {at: each for at, each in made.items() if each is not None}


def _find_all(
    plan: Plan, digest: str, files: PartFiles, made: dict[int, Made], output: OutputDirectory
) -> list[FileState]:
    """Return the state of each weight file of a plan, and have the output know where it waits.

    The `digest` is that of the plan which parts were begun with: of several merges, before those
    that come first are made.
    """
    states = {}
    for at, each in made.items():
        check_of_plan(each.key, digest, at, str(files.directory))
        found = files.of(at).find(output, each)
        if found is None:
            files.of(at).forget_made()
            message = f"the weight files of part {at} are not as it left them"
            raise OutputError(message, file=str(files.directory), advice=_AGAIN)
        for name, (place, state) in found.items():
            output.places[name] = place
            states[name] = state
    return [states[name] for name, _ in plan.shards]


def check_of_plan(key: str, digest: str, part: int, directory: str) -> None:
    """Raise OutputError unless a part that is called so is one of the plan of that digest."""
    found = parsed(key)
    if (found.get("plan"), found.get("oxmerge")) != (digest, __version__):
        raise OutputError(
            f"part {part} is of another plan, or was made by another version of oxmerge",
            file=directory,
            expected=f"plan {digest[:16]}, oxmerge {__version__}",
            found=f"plan {str(found.get('plan'))[:16]}, oxmerge {str(found.get('oxmerge'))[:40]}",
            advice="make all parts anew: `oxmerge clean` removes them",
        )


def together(parts: list[dict[str, Any]], note: str | None) -> dict[str, Any]:
    """Return how a merge went whose parts went so, as they have written down.

    What one run has made one after the other took the sum of their seconds.
    """
    most = max(parts, key=lambda done: done["peak_memory"])
    seconds: Counter[tuple[str, str]] = Counter()
    for at, done in enumerate(parts):
        seconds[done["host"], done.get("run", str(at))] += done["seconds"]
    notes = dict.fromkeys(each for done in parts for each in done["notes"])
    sums = ("bytes_read", "bytes_written", "kept", "tensors", "input_bytes")
    return {
        **most,
        **{name: sum(done[name] for done in parts) for name in sums},
        "seconds": max(seconds.values()),
        "notes": (*notes,) if note is None else (note, *notes),
    }
