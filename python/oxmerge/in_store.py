"""Merges whose outputs are in an object store, by one run or in parts.

Each weight file is made in a folder of this machine, as a part of its own (`oxmerge.parts`), then
uploaded and removed: so a machine needs disk for two of them, one that is made and one that is on
its way. Runs leave for each other, as objects in a folder of the output,

- ``3of16.HASH.key``, what a run is a part of, called by a hash of that, so that runs of different
  merges never write over each other's; ``plan``, which `oxmerge.finish` reads;
- for each weight file ``2of11.numbers``, what was found in a sweep over its tensors,
  ``2of11.journal``, their digests, and ``2of11.done``, once it is uploaded.

Nothing is locked, which stores cannot do: two runs of one part write the same bytes. In a sweep
each output has such a folder, and a weight file is made for all of them at once. What merges that
come first make lies in the same folder, as outputs that are made the same way.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event

from oxmerge import _core
from oxmerge._core import partial_name
from oxmerge.cli.progress import watched
from oxmerge.errors import (
    InputChangedError,
    OutputError,
    PlanError,
    ProblemsError,
    UnsupportedError,
    WaitsForOthersError,
)
from oxmerge.json_files import parse_json
from oxmerge.merging import finish_all, open_device
from oxmerge.output.card import REPORT_NAME
from oxmerge.output.claims import BusyError, claimed
from oxmerge.output.contents import contents_of
from oxmerge.output.manifest import MANIFEST_NAME, plan_digest
from oxmerge.output.objects import MOST_BYTES, RESIDENT, Objects, Uploads
from oxmerge.output.part_files import (
    KEY,
    PLAN_NAME,
    PartFiles,
    Purpose,
    join,
    read_done,
    seal_of,
    shards_of_parts,
)
from oxmerge.output.publish import (
    PARTS_NAME,
    NoPartsError,
    close,
    discard,
    last_names,
    no_parts,
    prepare_output,
    stage,
)
from oxmerge.output.resume import RESUME_NAME, how_to_go_on
from oxmerge.parts import (
    Patience,
    after_earlier,
    check_of_plan,
    check_parts,
    complete_each,
    kept_of,
    make,
    nothing_left,
    opened_folder,
    planned_in_turn,
    report_of_part,
    together,
)
from oxmerge.planning.plan_files import load_plan
from oxmerge.problems import UNSUPPORTED, Problem
from oxmerge.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from oxmerge.merging import MergeReport, Snapshot
    from oxmerge.models.remote import RemoteFile
    from oxmerge.options import PlanOptions, RunOptions
    from oxmerge.planning.plans import Plan
    from oxmerge.torch_backend import Backend

    PathLike = str | os.PathLike[str]
    #: What is there, by names.
    Files = Mapping[str, RemoteFile]

__all__ = [
    "clean_in_store",
    "complete_in_store",
    "finish_in_store",
    "is_complete_in_store",
    "merge_in_store",
]

_RECORDS = f"{PARTS_NAME}/"
#: Records that are read at a time.
_AT_ONCE = 8


def merge_in_store(
    merges: Sequence[tuple[Plan, PathLike]],
    planning: PlanOptions,
    running: RunOptions,
    started: float,
) -> list[MergeReport]:
    """Make outputs in a store, or the part of them that `running` names; see `oxmerge.merge`."""
    plans = [plan for plan, _ in merges]
    stores = [Objects.at(address) for _, address in merges]
    for plan, objects in zip(plans, stores, strict=True):
        _check(plan, objects.address, running)
    _check_sweep(plans)
    check_parts(plans, (running.part or (1, 1))[1])
    together_with = plans if len(plans) > 1 else ()
    purposes = [Purpose.of(plan, len(plan.shards), together_with) for plan in plans]
    all_of_them = list(zip(plans, stores, purposes, strict=True))

    def are_complete() -> list[bool]:
        # A whole merge is asked for once; a part is begun again by whoever places it.
        is_asked = running.part is not None and not running.fresh
        return [is_asked and is_complete_in_store(*each) for each in all_of_them]

    while True:
        complete = are_complete()
        left = [each for each, is_done in zip(all_of_them, complete, strict=True) if not is_done]
        try:
            made = iter(_merge_in_store(left, planning, running, started) if left else ())
        except (OutputError, InputChangedError):  # unless another run has completed one meanwhile
            if complete == are_complete():
                raise
        else:
            return [
                nothing_left(objects.address) if is_done else next(made)
                for objects, is_done in zip(stores, complete, strict=True)
            ]


def is_complete_in_store(plan: Plan, objects: Objects, purpose: Purpose) -> bool:
    """Tell whether this merge has been made and completed at an address."""
    there = objects.files()
    report = there.get(REPORT_NAME)
    sizes = {name: there[name].size for name, _ in plan.shards if name in there}
    if report is None or _last_name(plan) not in there or sizes != dict(plan.shards):
        return False
    return purpose.is_sealed(_parsed(objects.read(report)).get("parts"))


def _merge_in_store(
    merges: Sequence[tuple[Plan, Objects, Purpose]],
    planning: PlanOptions,
    running: RunOptions,
    started: float,
) -> list[MergeReport]:
    """Make outputs that are not complete; see `merge_in_store`."""
    plans, stores = [plan for plan, _, _ in merges], [objects for _, objects, _ in merges]
    number, parts = running.part or (1, 1)
    shards = shards_of_parts([size for _, size in plans[0].shards], parts)[number - 1]
    backend = open_device(plans, running)
    run = f"{number}of{parts}"
    with contextlib.ExitStack() as stack:
        outputs = []
        for plan, objects, purpose in merges:
            outputs.append(stack.enter_context(_opened(plan, objects, run, purpose.key)))
            outputs[-1].join(run, purpose)
        made = [{} if running.fresh else output.made(output.objects.files()) for output in outputs]
        is_made = set.intersection(*map(set, made))
        todo = [shard for shard in shards if shard not in is_made]
        _check_space(outputs[0].place, [size for _, size in plans[0].shards], todo, len(plans))
        try:
            if todo:
                outputs = [output.after_earlier(planning, running) for output in outputs]
            done = _make_all(outputs, todo, run, running, backend)
        except BaseException as error:
            _tell_how_to_go_on(error, stores)
            raise
        left = [output.left() for output in outputs]
    kept = len(shards) - len(todo)
    note = f"part {number} of {parts} is made" + (" already" if not todo else "")
    lacking = max((count for count in left if count is not None), default=None)
    completes = lacking == 0 and (running.finish or running.part is None)
    if lacking is None:
        note += "; another run has completed the output"
    elif lacking:
        note += f", but not yet {lacking} of {len(plans[0].shards)} weight files"
    elif not completes:
        note += ", and all others: `oxmerge finish` completes the output"
    before = f"{kept} weight files were made before" if kept else None
    reports = [
        report_of_part(
            plan,
            shards,
            together(list(({at: own[at] for at in shards if at in own} | done).values()), before),
            objects.address,
            note,
            started,
        )
        for plan, objects, own in zip(plans, stores, made, strict=True)
    ]
    if not completes:
        return reports
    return complete_each(
        plans,
        reports,
        lambda plan, address: complete_in_store(plan, address, planning, running, started),
    )


def _tell_how_to_go_on(error: BaseException, stores: Sequence[Objects]) -> None:
    # What the inputs or the recipe are to blame for would be so again.
    is_again = isinstance(error, InputChangedError | ProblemsError)
    if not is_again and not getattr(error, "__notes__", ()):
        error.add_note(how_to_go_on([objects.address for objects in stores]))


def complete_in_store(
    plan: Plan, address: PathLike, planning: PlanOptions, running: RunOptions, started: float
) -> MergeReport:
    """Write what makes a model of weight files that are all in a store, and remove the records.

    NoPartsError if another run has.
    """
    objects = Objects.at(address)
    there = objects.files()
    if _last_name(plan) in there:
        raise no_parts(objects.address)
    key = _key_of(plan, objects, there)
    with _opened(plan, objects, "finish", key) as output:
        place, there = output.place, objects.files()
        made = output.made(there)
        left = len(plan.shards) - len(made)
        if left and _last_name(plan) in objects.files():
            raise no_parts(objects.address)
        if left:
            raise OutputError(
                "not all parts of the merge are made",
                file=objects.address,
                expected=f"{len(plan.shards)} weight files of this plan and version of oxmerge",
                found=f"not yet {left} of them",
                advice="run their parts with `--part`, then finish",
            )
        try:
            folders = output.fetch_journals(there)
        except InputChangedError:  # they go when it is complete
            raise no_parts(objects.address) from None
        plan = planned_in_turn(plan, f"{objects.address}/{PARTS_NAME}", planning)
        contents = contents_of(plan)
        weights = sum(size for _, size in plan.shards)
        shutil.rmtree(place / "out", ignore_errors=True)
        local = prepare_output(
            place / "out",
            overwrite=False,
            input_files=plan.input_files,
            needed_bytes=plan.disk - weights,
            names=contents.names,
            purpose=plan_digest(plan),
        )
        local.address = objects.address
        try:
            stage(local, contents)
            digests = _core.Digests.of_parts(plan.table, folders, key)
            seal = seal_of(output.stories(there), key)
            hosts = len({done["host"] for done in made.values()})
            note = f"made on {hosts} machine{'' if hosts == 1 else 's'}, file by file"
            done = together(list(made.values()), note) | {"files": [[]], "digests": [digests]}
            done |= {"seal": seal}
            (report,) = finish_all([(plan, local)], done, planning, running, started)
        except BaseException:
            discard(local)
            raise
        close(local)
        last = last_names(replace(contents, shards=()))
        with Uploads() as uploads:
            names = [str(path.relative_to(local.path)) for path in sorted(local.path.rglob("*"))]
            for name in sorted(names, key=lambda name: last.index(name) if name in last else -1):
                if (local.path / name).is_file():
                    uploads.begin(partial(objects.upload, name, local.path / name, uploads.stopped))
        # Also of runs that have joined meanwhile. Later ones see the model, and remove their own.
        output.leave_nothing_beside_a_model(objects.files())
    return replace(report, total_seconds=time.perf_counter() - started)


def finish_in_store(
    address: PathLike,
    planning: PlanOptions,
    running: RunOptions,
    allow_methods: Iterable[str],
    started: float,
) -> MergeReport:
    """Complete an output in a store of which all parts are made; see `oxmerge.finish`."""
    objects = Objects.at(address)
    if running.overwrite:
        raise _no_overwrite(objects.address)
    there = objects.files()
    saved = there.get(_RECORDS + PLAN_NAME)
    if saved is None:
        if _is_sealed(objects, there):
            return nothing_left(objects.address)
        raise no_parts(objects.address, is_model=MANIFEST_NAME in there)
    with _scratch(objects.address, "plan", "") as place:
        objects.fetch(saved, place / PLAN_NAME)
        plan = load_plan(place / PLAN_NAME, allow_methods=allow_methods)
        try:
            return complete_in_store(plan, objects.address, planning, running, started)
        except NoPartsError:  # another run has completed it
            if not _is_sealed(objects, objects.files()):
                raise
    return nothing_left(objects.address)


def _is_sealed(objects: Objects, there: Files) -> bool:
    """Tell whether there is the report of an output that was made in parts."""
    report = there.get(REPORT_NAME)
    return report is not None and bool(_parsed(objects.read(report)).get("parts"))


def clean_in_store(address: PathLike) -> bool:
    """Remove what parts have left in a store, and here; see `oxmerge.clean`."""
    objects = Objects.at(address)
    left_here = list(_scratch_root().glob(f"{_scratch_name(objects.address)}-*"))
    with contextlib.ExitStack() as claims:
        # Before anything is removed: BusyError if a run is making something here.
        for place in left_here:
            claims.enter_context(claimed(place))
        there = objects.files()
        records = [name for name in there if name.startswith(_RECORDS)]
        names: set[str] = set()
        for name in filter(_is_key, records):
            story = _parsed(objects.read(there[name]))
            files, last = story.get("files"), story.get("last")
            # What is complete is a model, whose parts were not removed any more. Of a damaged
            # record nobody knows whether that is so.
            if isinstance(files, list) and isinstance(last, str) and last not in there:
                names |= {name for name in files if isinstance(name, str)}
        objects.remove([*sorted(names & there.keys()), *records])
        for place in left_here:
            shutil.rmtree(place)
    return bool(records or left_here)


def _check(plan: Plan, address: str, running: RunOptions) -> None:
    """Raise what stands against writing a plan to a store."""
    if running.overwrite:
        raise _no_overwrite(address)
    if not running.keeps:
        raise OutputError(
            "an output in a store needs digests and resume: it is made file by file",
            file=address,
            advice="leave out `--no-digests` and `--no-resume`",
        )
    name, size = max(plan.shards, key=lambda shard: shard[1])
    if size > MOST_BYTES:
        raise OutputError(
            f"`{name}` is larger than an upload can be",
            file=address,
            expected=f"at most {format_size(MOST_BYTES)}",
            found=format_size(size),
            advice="make smaller files with `--shard-size`",
        )


def _check_sweep(plans: Sequence[Plan]) -> None:
    if plans[0].stages and len(plans) > 1:
        message = "a sweep over a recipe of several merges cannot be made in a store"
        advice = (
            "sweep in one run, into directories; or make the earlier merges first, and name their "
            "outputs"
        )
        problem = Problem(UNSUPPORTED, message, advice=advice)
        raise PlanError.of("cannot sweep", [problem])


def _last_name(plan: Plan) -> str:
    """Return the file that is written last: when it is there, the output is complete."""
    return last_names(replace(contents_of(plan), shards=()))[-1]


def _no_overwrite(address: str) -> UnsupportedError:
    return UnsupportedError(
        "a model in an object store cannot be replaced: stores rename nothing",
        file=address,
        advice="name another address; or remove the model first, with the store's own tool such as "
        "`aws s3 rm --recursive`, and leave out `--overwrite`",
    )


def _key_of(plan: Plan, objects: Objects, there: Files) -> str:
    """Return what the runs that made an output say they are parts of.

    It is that of the plan if nothing is made. Of a sweep this plan knows nothing.
    """
    record = there.get(f"{_RECORDS}1of{len(plan.shards)}.done")
    key = _parsed(None if record is None else objects.read(record)).get("key")
    if not isinstance(key, str):
        return Purpose.of(plan, len(plan.shards)).key
    check_of_plan(key, plan_digest(plan), 1, objects.address)
    return key


def _lacks(
    plan: Plan, part: tuple[int, int], address: str, planning: PlanOptions, running: RunOptions
) -> tuple[str, list[int]]:
    """Return what an earlier merge lacks, and which parts are free; see `after_earlier`."""
    number, parts = part
    objects = Objects.at(address)
    there = objects.files()
    if _last_name(plan) in there:
        # Later merges must not take them for files of the model.
        objects.remove(name for name in there if name.startswith(_RECORDS))
        return "", []
    count = len(plan.shards)
    left = {at for at in range(count) if f"{_RECORDS}{at + 1}of{count}.done" not in there}
    if left:
        begun = {int(match[1]) for name in there if (match := _is_key(name))} - {number}
        shards = enumerate(shards_of_parts([size for _, size in plan.shards], parts), start=1)
        free = [at for at, own in shards if at not in begun and left.intersection(own)]
        return f"{len(left)} of {count} weight files", free
    with contextlib.suppress(BusyError, NoPartsError):
        complete_in_store(plan, address, planning, running, time.perf_counter())
    is_complete = _last_name(plan) in objects.files()
    return "" if is_complete else "the end, which another run makes", []


def _make_all(
    outputs: Sequence[_Output],
    shards: list[int],
    run: str,
    running: RunOptions,
    backend: Backend | None,
) -> dict[int, dict[str, Any]]:
    """Make shards one by one, and upload each while the next is made; say how each was made.

    Each is made for all outputs at once.
    """
    made: dict[int, dict[str, Any]] = {}
    sizes = [size for _, size in outputs[0].plan.shards]
    total = sum(sizes[shard] for shard in shards) * len(outputs)
    before: Counter[str] = Counter()
    with Uploads() as uploads, watched(running.progress) as callback:
        running = replace(running, progress=callback or False)
        progress = None if callback is None else partial(_show, callback, before, total)
        here = replace(running, wait=0, beside=RESIDENT, progress=progress)

        def make_some(shards: list[int]) -> None:
            for shard in shards:
                done = _make(outputs, shard, run, here, backend, uploads)
                if done is not None:
                    made[shard] = done
                    before.update({name: done[name] for name in ("bytes_read", "tensors")})
                    before["bytes_done"] += sizes[shard] * len(outputs)

        make_some(shards)
        waiting = [shard for shard in shards if shard not in made]
        if waiting:
            if running.wait > 0:
                _sweep_for_others(outputs, here, backend, uploads)
            uploads.wait()
            outputs[0].wait_for_numbers(running)  # where those of a sweep are, too
            make_some(waiting)
    return made


def _sweep_for_others(
    outputs: Sequence[_Output], running: RunOptions, backend: Backend | None, uploads: Uploads
) -> None:
    """Sweep the tensors of weight files that no run has begun."""
    plans, keys = [output.plan for output in outputs], [output.key for output in outputs]
    for shard in range(len(plans[0].shards)):
        if shard in outputs[0].unswept(outputs[0].objects.files()):
            files = [output.part(shard) for output in outputs]
            with contextlib.suppress(WaitsForOthersError):
                make(plans, [shard], files, keys, running, backend, sweeps_only=True)
            uploads.begin(partial(outputs[0].upload, shard, None, uploads.stopped))


def _make(
    outputs: Sequence[_Output],
    shard: int,
    run: str,
    running: RunOptions,
    backend: Backend | None,
    uploads: Uploads,
) -> dict[str, Any] | None:
    """Make a weight file and begin to upload it; None if numbers of others are lacking."""
    plans, keys = [output.plan for output in outputs], [output.key for output in outputs]
    kept = None
    with contextlib.suppress(WaitsForOthersError):
        files = [output.part(shard) for output in outputs]
        kept = kept_of(make(plans, [shard], files, keys, running, backend)) | {"run": run}

    def upload() -> None:
        for output in outputs:
            output.upload(shard, kept, uploads.stopped)

    uploads.begin(upload)
    return kept


def _show(
    progress: Callable[[Snapshot], None],
    before: Mapping[str, int],
    total: int,
    snapshot: Snapshot,
) -> None:
    """Show how far a run is with all of its weight files, of which it hears one by one."""
    names = ("bytes_read", "tensors", "bytes_done")
    sums = {name: before[name] + getattr(snapshot, name) for name in names}
    progress(replace(snapshot, **sums, bytes_total=total))


@dataclass(frozen=True, slots=True)
class _Output:
    """The output of a plan in a store, and a folder here where weight files are made for it.

    In the folder each weight file is a part of its own of a merge in as many parts as files. The
    `key` says what they are parts of.
    """

    plan: Plan
    objects: Objects
    key: str
    place: Path
    folder: int

    @property
    def directory(self) -> str:
        """The address; see `Keys`."""
        return self.objects.address

    def part(self, shard: int) -> PartFiles:
        """Return the files here of the part that a weight file is."""
        return PartFiles(shard + 1, len(self.plan.shards), self.folder, self.place)

    def record(self, shard: int, kind: str) -> str:
        """Return the name of what is left of a weight file for others."""
        return f"{_RECORDS}{self.part(shard).name}.{kind}"

    def join(self, run: str, purpose: Purpose) -> None:
        """Write down what a run is a part of; OutputError if others are parts of something else."""
        story = purpose.story()
        story |= {"files": contents_of(self.plan).names, "last": _last_name(self.plan)}
        # What it is called by is what it says: so nobody writes over what says something else.
        known = hashlib.sha256(json.dumps(story).encode()).hexdigest()[:16]
        join(self, f"{_RECORDS}{run}.{known}.key", purpose, story)
        there = self.objects.files()
        if _RECORDS + PLAN_NAME not in there:
            self.plan.save(self.place / PLAN_NAME)
            self.objects.upload(_RECORDS + PLAN_NAME, self.place / PLAN_NAME, Event())
        self._fetch_numbers(there)

    def keys(self) -> dict[str, tuple[int, Mapping[str, Any]]]:
        """Return what runs have written down; OutputError if something else lies there."""
        there, last = self.objects.files(), _last_name(self.plan)
        records = {name for name in there if name.startswith(_RECORDS)}
        own = {*records, *contents_of(self.plan).names} if records else set()
        others = there.keys() - own
        if others or last in there:
            raise OutputError(
                "something lies where the output goes",
                file=self.objects.address,
                found=", ".join(f"`{name}`" for name in sorted(others or {last})[:3]),
                advice="name another address, or remove it first: a store cannot replace a model "
                "at once",
            )
        return self.stories(there)

    def stories(self, there: Files) -> dict[str, tuple[int, Mapping[str, Any]]]:
        """Return what runs have written down, of what is there."""
        names = {name: match for name in there if (match := _is_key(name))}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(lambda name: self.objects.read(there[name]), names))
        # Who gave way meanwhile is none of the others any more.
        return {
            name: (int(match[1]), _parsed(story))
            for (name, match), story in zip(names.items(), found, strict=True)
            if story is not None
        }

    def write_key(self, name: str, story: Mapping[str, Any]) -> None:
        """Write down what a run is a part of; see `Keys`."""
        self.objects.put(name, json.dumps(story).encode())

    def remove_key(self, name: str) -> None:
        """Take that back; see `Keys`."""
        self.objects.remove([name])

    def after_earlier(self, planning: PlanOptions, running: RunOptions) -> _Output:
        """Return it with a plan that can be run, when the merges that come first are made."""
        folder = f"{self.objects.address}/{PARTS_NAME}"
        return replace(self, plan=after_earlier(self.plan, folder, planning, running, _lacks))

    def left(self) -> int | None:
        """Return how many weight files are not made; None if the output is complete."""
        there = self.objects.files()
        self.leave_nothing_beside_a_model(there)
        is_complete = _last_name(self.plan) in there
        return None if is_complete else len(self.plan.shards) - len(self.made(there))

    def made(self, there: Files) -> dict[int, dict[str, Any]]:
        """Return how each weight file was made that is there as it was uploaded."""

        def read(shard: int) -> dict[str, Any] | None:
            name, size = self.plan.shards[shard]
            record, weights = there.get(self.record(shard, "done")), there.get(name)
            if record is None or weights is None or self.record(shard, "journal") not in there:
                return None
            story = _parsed(self.objects.read(record))
            is_this = (story.get("key"), story.get("etag")) == (self.key, weights.etag)
            return read_done(story.get("done")) if is_this and weights.size == size else None

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(read, range(len(self.plan.shards))))
        return {shard: done for shard, done in enumerate(found) if done is not None}

    def upload(self, shard: int, done: Mapping[str, Any] | None, stopped: Event) -> None:
        """Upload what was found for a weight file; if it is `done`, the file and its record too."""
        files = self.part(shard)
        numbers = self.record(shard, "numbers")
        if (self.place / numbers).exists():
            self.objects.upload(numbers, self.place / numbers, stopped)
        if done is not None:
            name = self.plan.shards[shard][0]
            self.objects.upload(name, files.path / partial_name(name), stopped)
            self.objects.upload(self.record(shard, "journal"), files.path / RESUME_NAME, stopped)
            # As a list has it, by which it is looked for later: stores may answer an upload
            # otherwise.
            weights = self.objects.files().get(name)
            if weights is None:
                raise OutputError(
                    "what was uploaded is not there any more: something else has removed it",
                    file=f"{self.objects.address}/{name}",
                    expected=format_size(self.plan.shards[shard][1]),
                    found="no object",
                    advice="see that nothing cleans the address meanwhile, such as `oxmerge clean` "
                    "or a rule of the bucket; then run it again",
                )
            story = {"key": self.key, "etag": weights.etag, "done": done}
            self.objects.put(self.record(shard, "done"), json.dumps(story).encode())
            shutil.rmtree(files.path)
        self.leave_nothing_beside_a_model(self.objects.files())

    def leave_nothing_beside_a_model(self, there: Files) -> None:
        """Remove the records if the output is complete: another run may have completed it."""
        if _last_name(self.plan) in there:
            self.objects.remove(name for name in there if name.startswith(_RECORDS))

    def unswept(self, there: Files) -> set[int]:
        """Return the weight files whose tensors are not swept, and that no run has begun."""
        sizes = [size for _, size in self.plan.shards]
        runs = [(int(match[1]), int(match[2])) for name in there if (match := _is_key(name))]
        begun = {
            shard
            for part, parts in runs
            if part <= parts <= len(sizes)
            for shard in shards_of_parts(sizes, parts)[part - 1]
        }
        swept = {at for at in range(len(sizes)) if self.record(at, "numbers") in there}
        return set(range(len(sizes))) - begun - swept

    def wait_for_numbers(self, running: RunOptions) -> None:
        """Wait until all have swept their tensors, and have what they found here."""
        patience = Patience(running, self.plan.bytes_written)
        while lacking := self._fetch_numbers(self.objects.files()):
            if not patience.wait(f"the sweeps of {lacking} weight files"):
                raise WaitsForOthersError(
                    "numbers over the whole model are needed, and other parts lack theirs",
                    file=self.objects.address,
                    expected="the sweeps of all parts",
                    found=f"none over {lacking} of {len(self.plan.shards)} weight files",
                    advice="run this part again when the others have run: it goes on from here",
                )

    def _fetch_numbers(self, there: Files) -> int:
        """Fetch what was found in sweeps, as far as it is there; return of how many it is not."""
        here = {
            self.record(shard, "numbers"): self.place / self.record(shard, "numbers")
            for shard in range(len(self.plan.shards))
        }
        left = {name: path for name, path in here.items() if not path.exists()}
        found = [name for name in left if name in there]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda name: self.objects.fetch(there[name], left[name]), found))
        return len(left) - len(found)

    def fetch_journals(self, there: Files) -> list[Path]:
        """Have the journals of all weight files here, each in a folder of its own."""

        def fetch(shard: int) -> Path:
            folder = self.part(shard).path
            folder.mkdir(exist_ok=True)
            self.objects.fetch(there[self.record(shard, "journal")], folder / RESUME_NAME)
            return folder

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(fetch, range(len(self.plan.shards))))


@contextlib.contextmanager
def _opened(plan: Plan, objects: Objects, run: str, key: str) -> Iterator[_Output]:
    with _scratch(objects.address, run, key) as place:
        (place / PARTS_NAME).mkdir(exist_ok=True)
        with opened_folder(place / PARTS_NAME) as folder:
            yield _Output(plan, objects, key, place, folder)


def _is_key(name: str) -> re.Match[str] | None:
    return KEY.fullmatch(name.removeprefix(_RECORDS)) if name.startswith(_RECORDS) else None


def _parsed(text: bytes | None) -> dict[str, Any]:
    try:
        story = parse_json(text or b"")
    except ValueError:
        return {}
    return story if isinstance(story, dict) else {}


# The folder here.


def _scratch_root() -> Path:
    """Return where weight files are made: not `/tmp`, which may be memory, unless that is named."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108 - it is asked whose it is


def _scratch_name(address: str) -> str:
    """Return how folders for an output begin, with those of the merges that come first."""
    address = address.partition(f"/{_RECORDS}")[0]
    return f"oxmerge-{os.getuid()}-{hashlib.sha256(address.encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def _scratch(address: str, run: str, key: str) -> Iterator[Path]:
    """Own a folder for a run; it stays if the same run can go on with what is in it."""
    about = hashlib.sha256(f"{run} {key}".encode()).hexdigest()[:16]
    place = _scratch_root() / f"{_scratch_name(address)}-{about}"
    with contextlib.suppress(FileExistsError):
        place.mkdir(0o700)
    status = place.lstat()
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_ours or status.st_mode & 0o077:
        raise OutputError(
            "the folder for weight files in work is someone else's",
            file=str(place),
            advice="remove it, or set `TMPDIR` to another folder",
        )
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(claimed(place))
        except BusyError:
            raise BusyError(
                f"another run on {os.uname().nodename} makes the same",
                file=address,
                found=f"its files in work in `{place}`",
                advice="wait for it, or make another part",
            ) from None
        try:
            yield place
        except BaseException as error:
            left = [*place.rglob(RESUME_NAME), *place.rglob("*.numbers")]
            if not left or isinstance(error, InputChangedError | ProblemsError):
                shutil.rmtree(place, ignore_errors=True)
            else:
                host = os.uname().nodename  # of a cluster, whoever reads it may be elsewhere
                error.add_note(f"what is made of files in work stays in `{place}` on {host}")
            raise
        shutil.rmtree(place, ignore_errors=True)


def _check_space(place: Path, sizes: Sequence[int], shards: list[int], outputs: int) -> None:
    """Raise OSError if there is no room for the weight file in work and the one on its way."""
    needed = sum(sorted(sizes[shard] for shard in shards)[-2:]) * outputs
    free = shutil.disk_usage(place).free
    if needed > free:
        of_each = "" if outputs == 1 else f" of each of {outputs} outputs"
        message = (
            f"not enough space for two weight files{of_each} on their way to the store: "
            f"{format_size(needed)} needed, {format_size(free)} free; name a larger disk in "
            "`TMPDIR`, or make smaller files with `--shard-size`"
        )
        raise OSError(errno.ENOSPC, message, str(place))
