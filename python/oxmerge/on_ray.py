"""A merge on a Ray cluster: a task for each part, on whichever node has room.

Ray places the tasks and starts those again whose node was lost; parts go on from their journals
(`oxmerge.parts`). The plan is made here, on the driver. A task plans too, which reads headers only,
since paths and inodes may be others on its node, and goes no further if its plan is another one.
The nodes share the file system that the output is on, or it is in a store.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from oxmerge.cli.progress import format_rate, watched
from oxmerge.errors import OutputError, OxmergeError, WaitsForOthersError
from oxmerge.in_store import complete_in_store, is_complete_in_store
from oxmerge.merging import DEFAULT_MEMORY, Snapshot, prepare
from oxmerge.models.stores import is_address
from oxmerge.output.claims import named
from oxmerge.output.manifest import plan_digest
from oxmerge.output.objects import Objects
from oxmerge.output.part_files import Purpose
from oxmerge.output.publish import NoPartsError
from oxmerge.parts import check_parts, complete, is_complete, merge_parts, nothing_left
from oxmerge.problems import shorten
from oxmerge.recipe.recipe import Recipe
from oxmerge.sizes import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from oxmerge.merging import Asked, MergeReport, Request
    from oxmerge.options import PlanOptions, RunOptions
    from oxmerge.planning.plans import Plan

__all__ = ["merge_on_ray", "resources_of"]

#: How often a part is begun again that failed, or whose node was lost.
_MOST_TRIES = 3
#: Parts for each node, unless their number is given: when a node is lost or slow, the others have
#: less to do for it.
_PARTS_A_NODE = 2
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_TRIES = 1.0
_SECONDS_TO_CONNECT = 20.0
#: Letters of an error of Ray's that are shown.
_LONGEST = 300
#: How long tasks may take to write down what is finished, when the driver is interrupted.
_SECONDS_TO_END = 30
#: How often a part may be told to wait for others in one merge: for their sweeps, for what they
#: make, and when it is begun.
_MOST_WAITS = 3


def merge_on_ray(
    recipe: Request | Asked,
    directory: str | os.PathLike[str],
    planning: PlanOptions,
    running: RunOptions,
) -> MergeReport:
    """Merge on a Ray cluster; see `oxmerge.merge`."""
    started = time.perf_counter()
    in_store = is_address(os.fspath(directory))
    place = os.fspath(directory) if in_store else str(named(directory).absolute())
    plan = prepare(recipe, planning)
    if not running.fresh and _is_complete(plan, place):  # a job is begun again by what placed it
        return nothing_left(place)
    ray = _ray()
    with _connected(ray, running.ray):
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        parts = running.parts or parts_for(len(plan.shards), len(nodes))
        check_parts([plan], parts)
        cpus = min((node["Resources"]["CPU"] for node in nodes), default=1)
        # Who completes the output hashes inputs and looks at values, and that is this process.
        part = replace(running, ray=None, parts=None, hash_inputs=False, allow_nonfinite=False)
        run = _Run(ray, plan, place, parts, planning, part, cpus)
        with watched(running.progress) as callback:
            run.make_all(callback)
    try:
        if in_store:
            report = complete_in_store(plan, place, planning, running, started)
        else:
            report = complete(plan, parts, Path(place), planning, running, started)
    except NoPartsError:  # another driver has completed it
        if not _is_complete(plan, place):
            raise
        report = nothing_left(place)
    return replace(report, notes=(*report.notes, *run.failures()))


def _is_complete(plan: Plan, place: str) -> bool:
    try:
        purpose = Purpose.of(plan, 1)
    except OSError:  # an input is gone: the nodes say whether they have it
        return False
    if is_address(place):
        return is_complete_in_store(plan, Objects.at(place), purpose)
    return is_complete(plan, Path(place), purpose)


def parts_for(files: int, nodes: int) -> int:
    """Return how many parts a merge has: at least one, also if nodes come only when it asks."""
    return max(min(files, _PARTS_A_NODE * nodes), 1)


def _ray() -> Any:  # noqa: ANN401 - a module, which need not be installed
    try:
        import ray  # noqa: PLC0415 - optional, and heavy
    except ImportError as error:
        raise OxmergeError(
            "a merge on Ray needs Ray", advice="install it: `pip install 'oxmerge[ray]'`"
        ) from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str | bool | None) -> Iterator[None]:  # noqa: ANN401, FBT001
    """Be connected to a cluster: as it is, or to the one of that address for so long."""
    if ray.is_initialized():
        yield
        return
    options = {"address": address} if isinstance(address, str) else {}
    if isinstance(address, str):
        _check_address(address)
    try:
        ray.init(log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:  # also for another version
        raise OxmergeError(
            "there is no Ray cluster that this Ray can connect to",
            found=shorten(" ".join(str(error).split()), _LONGEST),
            advice="check the address, and that all nodes have the same versions of Ray and Python",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise OxmergeError if nobody listens at a host and port, for which Ray asks for minutes."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        where = parts.hostname, parts.port
    except ValueError:
        return  # which Ray refuses
    if None not in where:
        try:
            socket.create_connection(where, timeout=_SECONDS_TO_CONNECT).close()
        except (OSError, ValueError) as error:  # the latter for what cannot be a host's name
            raise OxmergeError(
                "there is no Ray cluster at this address",
                found=f"{address}: {getattr(error, 'strerror', None) or error}",
                advice="name the head node of the cluster and its port, 6379 unless "
                "`ray start --head` was told another",
            ) from error


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a task is to do."""

    text: str
    folder: str | None
    cwd: str
    directory: str
    digest: str
    planning: PlanOptions
    running: RunOptions


@dataclass(frozen=True, slots=True)
class _Told:
    """How a task ended: with an error, or since others have to make something first."""

    node: str
    host: str
    error: Exception | None
    waits: bool = False


def _work(asked: _Asked, board: Any) -> _Told:  # noqa: ANN401 - an actor
    """Make a part, on a node."""
    import ray  # noqa: PLC0415 - as above

    node = ray.get_runtime_context().get_node_id()
    part = asked.running.part
    host, told = os.uname().nodename, 0.0

    def report(snapshot: Snapshot) -> None:
        nonlocal told
        if time.monotonic() - told >= _SECONDS_BETWEEN_LOOKS:
            told = time.monotonic()
            board.put.remote(part, host, snapshot)

    try:
        os.chdir(asked.cwd)
        plan = prepare(Recipe.from_text(asked.text, folder=asked.folder), asked.planning)
        _check_plan(plan, asked.digest)
        running = replace(asked.running, progress=report)
        merge = (plan, asked.directory)
        (made,) = merge_parts([merge], asked.planning, running, time.perf_counter())
    except WaitsForOthersError:
        return _Told(node, host, None, waits=True)
    except Exception as error:  # noqa: BLE001 - what it means is for the driver to say
        return _Told(node, host, _sendable(error))
    size = made.bytes_written
    whole = Snapshot(size, size, made.bytes_read, made.tensors, "", made.peak_memory)
    ray.get(board.put.remote(part, host, whole))
    return _Told(node, host, None)


def _node(told: _Told) -> str:
    """Return what a message calls a node: hosts may have several."""
    return f"{told.host} (node {told.node[:8]})" if told.node else "a node that Ray lost"


def _check_plan(plan: Plan, expected: str) -> None:
    found = plan_digest(plan)
    if found != expected:
        raise OutputError(
            "the plan on a node is not that of the driver",
            expected=expected[:16],
            found=found[:16],
            advice="see to it that all nodes have the same models and version of oxmerge",
        )


def _check_none_waits(waiting: Sequence[int], directory: str) -> None:
    if waiting:
        raise OutputError(
            "what parts have left for each other is gone",
            file=directory,
            advice="see to it that nothing else writes to this directory, and merge again",
        )


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - of our own making
    except Exception:  # noqa: BLE001 - then it is told as text
        return OxmergeError(str(error))
    return error


def resources_of(running: RunOptions, cpus: float) -> dict[str, Any]:
    """Return what a task asks Ray for, on nodes with so many CPUs."""
    return {
        "num_cpus": min(running.threads or cpus, cpus),
        "num_gpus": 1 if running.device.startswith("cuda") else 0,
        "memory": DEFAULT_MEMORY if running.memory is None else parse_size(running.memory),
        "max_retries": _MOST_TRIES,
    }


class _Board:
    """Where tasks write how far they are; an actor."""

    def __init__(self) -> None:
        self._snapshots: dict[Any, tuple[str, Snapshot]] = {}

    def put(self, part: tuple[int, int], host: str, snapshot: Snapshot) -> None:
        self._snapshots[part] = (host, snapshot)

    def get(self) -> dict[Any, tuple[str, Snapshot]]:
        return self._snapshots


class _Run:
    """The parts of one merge, until all are made."""

    def __init__(
        self,
        ray: Any,  # noqa: ANN401
        plan: Plan,
        place: str,
        parts: int,
        planning: PlanOptions,
        running: RunOptions,
        cpus: float,
    ) -> None:
        self._ray = ray
        self._plan = plan
        self._started = time.monotonic()
        self._parts = parts
        # Numbers over the model: none waits for another, which perhaps has no node to run on.
        running = replace(running, finish=False, wait=0, progress=None)
        if running.device.startswith("cuda"):
            running = replace(running, device="cuda")  # Ray shows a task its own GPU alone
        self._asked = _Asked(
            plan.recipe_text,
            plan.recipe_folder,
            os.getcwd(),
            place,
            plan_digest(plan),
            replace(planning, seed=plan.seed, shard_size=plan.shard_size),
            running,
        )
        self._resources = resources_of(running, cpus)
        here = ray.get_runtime_context().get_node_id()
        self._board = ray.remote(_Board).options(**self._on(here), num_cpus=0).remote()
        self._failed: dict[int, list[_Told]] = {part: [] for part in range(1, parts + 1)}
        self._tasks: dict[Any, int] = {}

    def _on(self, node: str) -> dict[str, Any]:
        from ray.util.scheduling_strategies import (  # noqa: PLC0415 - as above
            NodeAffinitySchedulingStrategy,
        )

        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}

    def make_all(self, progress: Callable[[Snapshot], None] | None) -> None:
        """Make all parts; raise what stands against one of them."""
        try:
            waiting: Sequence[int] = range(1, self._parts + 1)
            # Where all wait for each other, all have swept, or made their part of an earlier merge.
            # So none waits the next time: of each merge it is told to at most so often.
            for _ in range(_MOST_WAITS * (len(self._plan.stages) + 1)):
                waiting = self._make(waiting, progress)
            _check_none_waits(waiting, self._asked.directory)
        except BaseException as error:
            self._cancel()
            error.add_note("the parts that are made are kept: the same command goes on from there")
            raise

    def failures(self) -> list[str]:
        """Tell of parts that failed on a node and were made elsewhere."""
        return [
            f"part {part} failed on {_node(told)} and was made elsewhere: {told.error}"
            for part, failed in self._failed.items()
            for told in failed
        ]

    def _make(self, parts: Sequence[int], progress: Callable[[Snapshot], None] | None) -> list[int]:
        """Run a task for each part; return those that were told to wait for the others."""
        for part in parts:
            self._begin(part)
        waiting = []
        while self._tasks:
            ready, _ = self._ray.wait(list(self._tasks), timeout=_SECONDS_BETWEEN_LOOKS)
            if progress is not None:
                self._show(progress)
            for task in ready:
                part = self._tasks.pop(task)
                told = self._told(task)
                if told.waits:
                    waiting.append(part)
                elif told.error is not None:
                    self._failed[part].append(told)
                    self._begin_elsewhere(part)
        return waiting

    def _told(self, task: Any) -> _Told:  # noqa: ANN401
        try:
            told: _Told = self._ray.get(task)
        except self._ray.exceptions.RayError as error:  # its node or its process was lost too often
            return _Told("", "", OxmergeError("Ray lost a part", found=str(error)))
        return told

    def _begin(self, part: int, **where: Any) -> None:  # noqa: ANN401
        where = where or {"scheduling_strategy": "SPREAD"}
        running = replace(self._asked.running, part=(part, self._parts))
        work = self._ray.remote(_work).options(**self._resources, **where)
        self._tasks[work.remote(replace(self._asked, running=running), self._board)] = part

    def _begin_elsewhere(self, part: int) -> None:
        """Begin a part again that failed, on a node where it did not; raise if there is none."""
        failed = self._failed[part]
        tried = {told.node for told in failed}
        nodes = [node["NodeID"] for node in self._ray.nodes() if node["Alive"]]
        others = [node for node in nodes if node not in tried]
        if len(failed) >= _MOST_TRIES or not others:
            error = failed[-1].error or OutputError("a part failed")
            where = ", ".join(dict.fromkeys(map(_node, failed)))
            error.add_note(f"part {part} failed on {len(tried)} of {len(nodes)} nodes: {where}")
            raise error
        # A process that is about to end may still have the part's lock.
        time.sleep(_SECONDS_BETWEEN_TRIES)
        self._begin(part, **self._on(others[part % len(others)]))

    def _show(self, progress: Callable[[Snapshot], None]) -> None:
        """Show what all parts have done together, and the rate of each node."""
        told = self._ray.get(self._board.get.remote()).values()
        moved: Counter[str] = Counter()
        for host, each in told:
            moved[host] += each.bytes_read + each.bytes_done
        seconds = time.monotonic() - self._started
        rates = [f"{host} {format_rate(size, seconds)}" for host, size in sorted(moved.items())]
        total = self._plan.bytes_written
        progress(
            Snapshot(
                bytes_done=min(sum(each.bytes_done for _, each in told), total),
                bytes_total=total,
                bytes_read=sum(each.bytes_read for _, each in told),
                tensors=sum(each.tensors for _, each in told),
                tensor=", ".join(rates),
                peak_memory=max((each.peak_memory for _, each in told), default=0),
            )
        )

    def _cancel(self) -> None:
        """Stop all tasks, and give them time to write down what is finished."""
        if not self._tasks:
            return
        for task in self._tasks:
            self._ray.cancel(task, force=False)
        self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=_SECONDS_TO_END)
