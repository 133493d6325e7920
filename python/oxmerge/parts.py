"""A merge in parts, each made by a run of its own, on other machines perhaps; and its end.

A part is some of the plan's shards. Every run plans the whole merge, which reads headers only, and
makes its shards in a directory of its own within the output (`oxmerge.output.part_files`). When all
parts are made, one process completes the output as any merge does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time

from oxmerge import __version__, _core
from oxmerge.errors import InputChangedError, OutputError, PlanError, ProblemsError
from oxmerge.file_state import FileState
from oxmerge.merging import MergeReport, execute, finish_all, open_device, report_of
from oxmerge.models.streaming import is_streamed
from oxmerge.options import PlanOptions, RunOptions
from oxmerge.output.claims import BusyError, locked_file, named
from oxmerge.output.contents import contents_of
from oxmerge.output.manifest import plan_digest
from oxmerge.output.part_files import (
    PLAN_NAME,
    Made,
    PartFiles,
    Purpose,
    missing_parts,
    parts_in,
    shards_of_parts,
    shown,
)
from oxmerge.output.publish import (
    PARTS_NAME,
    NoPartsError,
    OutputDirectory,
    close,
    discard,
    no_parts,
    prepare_output,
    share_output,
    stage,
)
from oxmerge.output.resume import parsed
from oxmerge.planning.plan_files import load_plan
from oxmerge.problems import UNSUPPORTED, Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import Any

    from oxmerge.planning.plans import Plan
    from oxmerge.torch_backend import Backend

    PathLike = str | os.PathLike[str]

__all__ = ["WaitsForOthersError", "check_parts", "complete", "finish", "merge_part"]


class WaitsForOthersError(OutputError):
    """Other parts have not swept their tensors in the time that was given; the own one has."""


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def merge_part(
    plan: Plan, directory: PathLike, planning: PlanOptions, running: RunOptions, started: float
) -> MergeReport:
    """Make the part of a plan that `running` names; see `oxmerge.merge`."""
    number, parts = running.part or (1, 1)
    check_parts(plan, parts, stream=running.stream)
    sizes = [size for _, size in plan.shards]
    shards = shards_of_parts(sizes, parts)[number - 1]
    purpose = Purpose.of(plan, parts)
    backend = open_device([plan], running)
    output = share_output(
        directory,
        overwrite=running.overwrite,
        input_files=plan.input_files,
        names=contents_of(plan).names,
    )
    try:
        with _shared_folder(output.path, number, parts) as files, files.locked():
            files.join(purpose)
            files.save(plan)
            made = None if running.fresh else files.made()
            is_made = made is not None and files.find(output, made) is not None
            if made is None or not is_made:
                files.forget_made()
                done = _make(plan, shards, files, purpose, running, backend)
                states = [FileState(**state) for state in done["files"][0]]
                names = [plan.shards[shard][0] for shard in shards]
                kept = {name: done[name] for name in _KEPT} | {"host": socket.gethostname()}
                made = Made(purpose.key, dict(zip(names, states, strict=True)), kept)
                files.write_made(made)
            left = missing_parts(files)
    finally:
        output.claim.release()
    note = f"part {number} of {parts} is made" + (" already" if is_made else "")
    if not left and running.finish:
        with contextlib.suppress(BusyError, NoPartsError):
            return complete(plan, parts, output.path, planning, running, started)
        note += "; another run completes the output"
    elif left:
        note += f", but not yet {shown(left)}"
    else:
        note += ", and all others: `oxmerge finish` completes the output"
    return report_of(
        made.done,
        directory=os.fspath(output.path),
        tensors=made.done["tensors"],
        files=len(shards),
        bytes_written=sum(sizes[shard] for shard in shards),
        input_bytes=made.done["input_bytes"],
        total_seconds=time.perf_counter() - started,
        warnings=tuple(map(str, plan.warnings)),
        notes=(*made.done["notes"], note),
    )


#: What is written down of how a part was made; see `_core.execute`.
_KEPT = (
    "bytes_read", "bytes_written", "seconds", "peak_memory", "memory", "simd", "device", "notes",
    "kept", "tensors", "input_bytes",
)  # fmt: skip


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
    directory : path
        The output of the parts.
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

    Raises
    ------
    OutputError
        If a part is not made, or a run makes one now; or if there are none.
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
    parts = parts_in(path)
    if parts:  # told before another run that makes one
        with _shared_folder(path, 1, parts) as files:
            _made_by_all(files)
    else:
        raise no_parts(path)
    plan = load_plan(path / PARTS_NAME / PLAN_NAME, allow_methods=allow_methods)
    planning = PlanOptions(strict=strict)
    running = RunOptions(
        overwrite=overwrite, hash_inputs=hash_inputs, allow_nonfinite=allow_nonfinite
    )
    return complete(plan, parts, path, planning, running, started)


def check_parts(plan: Plan, parts: int, *, stream: bool) -> None:
    """Raise PlanError for a plan that cannot be made in so many parts."""
    if plan.stages:
        advice = "merge without `--part`; or write each merge into a file of its own"
        message = "a recipe of several merges cannot be made in parts"
        problem = Problem(UNSUPPORTED, message, advice=advice)
        raise PlanError.of("cannot merge in parts", [problem])
    if any(is_streamed(file, stream=stream) for file in plan.absent):
        # A spool has room for what comes next in the plan, and a part would leave most of that.
        advice = "fetch the models first; of the Hub, leave `--stream` out"
        message = "a merge that streams its inputs cannot be made in parts yet"
        raise PlanError.of("cannot merge in parts", [Problem(UNSUPPORTED, message, advice=advice)])
    shards = len(plan.shards)
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


@contextlib.contextmanager
def _shared_folder(directory: Path, part: int, parts: int) -> Iterator[PartFiles]:
    """Yield the files of a part, in the folder that the parts of an output share."""
    folder = os.open(directory / PARTS_NAME, _FOLDER)
    try:
        yield PartFiles(part, parts, folder, directory)
    finally:
        os.close(folder)


def _make(
    plan: Plan,
    shards: list[int],
    files: PartFiles,
    purpose: Purpose,
    running: RunOptions,
    backend: Backend | None,
) -> dict[str, Any]:
    """Write the shards of a part, into its own directory, and say how it went."""
    names = [plan.shards[shard][0] for shard in shards]
    size = sum(plan.shards[shard][1] for shard in shards)
    own = prepare_output(
        files.path,
        overwrite=False,
        input_files=(),
        needed_bytes=size,
        names=names,
        purpose=purpose.key,
        resume=True,
        fresh=running.fresh,
    )
    part = {
        "shards": shards,
        "bytes": size,
        "descriptor": files.folder,
        "folder": files.path.parent,
        "names": [f"{files.of(at + 1).name}.numbers" for at in range(files.parts)],
        "own": files.part - 1,
        "wait": running.wait,
    }
    try:
        try:
            done = execute([plan], [own], running, backend, 0, part)
        except OutputError as error:
            raise (_as_waiting(error) if files.waits() else error) from None
    except BaseException as error:
        if discard(own, keep=not isinstance(error, InputChangedError | ProblemsError)):
            error.add_note("what is finished is kept: the same command goes on from there")
        raise
    close(own, keep=True)
    return done


def _as_waiting(error: OutputError) -> OutputError:
    parts = ("file", "expected", "found", "advice")
    return WaitsForOthersError(error.message, **{part: getattr(error, part) for part in parts})


def complete(
    plan: Plan,
    parts: int,
    path: Path,
    planning: PlanOptions,
    running: RunOptions,
    started: float,
) -> MergeReport:
    """Complete an output; BusyError or NoPartsError if another run does, or has."""
    contents = contents_of(plan)
    weights = sum(size for _, size in plan.shards)
    with _only_one(path, parts) as files:
        output = prepare_output(
            path,
            overwrite=running.overwrite,
            input_files=plan.input_files,
            needed_bytes=plan.disk - weights,
            names=contents.names,
            purpose=plan_digest(plan),
            resume=True,
            parts=True,
        )
        try:
            made = _made_by_all(files)
            states = _find_all(plan, files, made, output)
            stage(output, contents)
            folders = [files.of(at).path for at in made]
            digests = _core.Digests.of_parts(plan.table, folders, made[1].key)
            done = _together([each.done for each in made.values()])
            done |= {"files": [[state._asdict() for state in states]], "digests": [digests]}
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
            files = stack.enter_context(_shared_folder(path, 1, parts))
            stack.enter_context(locked_file("finish.lock", files.folder))
        except FileNotFoundError:
            raise no_parts(path) from None
        except BlockingIOError:
            raise BusyError("another run completes the output", file=str(path)) from None
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
    plan: Plan, files: PartFiles, made: dict[int, Made], output: OutputDirectory
) -> list[FileState]:
    """Return the state of each weight file of a plan, and have the output know where it waits."""
    states = {}
    for at, each in made.items():
        key = parsed(each.key)
        if (key.get("plan"), key.get("oxmerge")) != (plan_digest(plan), __version__):
            raise OutputError(
                f"part {at} is of another plan, or was made by another version of oxmerge",
                file=str(files.directory),
                expected=f"plan {plan_digest(plan)[:16]}, oxmerge {__version__}",
                found=f"plan {str(key.get('plan'))[:16]}, oxmerge {str(key.get('oxmerge'))[:40]}",
                advice="make all parts anew: `oxmerge clean` removes them",
            )
        found = files.of(at).find(output, each)
        if found is None:
            message = f"the weight files of part {at} are not as it left them"
            raise OutputError(message, file=str(files.directory), advice=_AGAIN)
        for name, (place, state) in found.items():
            output.places[name] = place
            states[name] = state
    return [states[name] for name, _ in plan.shards]


def _together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how a merge went whose parts went so."""
    most = max(parts, key=lambda done: done["peak_memory"])
    hosts = len({done["host"] for done in parts})
    note = f"made in {len(parts)} parts on {hosts} machine{'' if hosts == 1 else 's'}"
    return {
        **most,
        "bytes_read": sum(done["bytes_read"] for done in parts),
        "bytes_written": sum(done["bytes_written"] for done in parts),
        "seconds": max(done["seconds"] for done in parts),
        "kept": sum(done["kept"] for done in parts),
        "notes": (note, *dict.fromkeys(each for done in parts for each in done["notes"])),
    }
