"""What a merge would do, told before it is done."""

from __future__ import annotations

from dataclasses import dataclass

from oxmerge.problems import printable
from oxmerge.sizes import format_duration, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from oxmerge.devices import Choice
    from oxmerge.planning.plans import Plan

__all__ = ["Prediction", "as_dict", "summary"]

#: What a common disk moves in a second, and a fast one.
_RATES = (1e9, 3e9)


@dataclass(frozen=True, slots=True)
class Prediction:
    """How a merge would run.

    Attributes
    ----------
    memory : int
        Predicted high-water mark of the process's resident set, bytes.
    threads : int
        Threads that will work.
    reread_bytes : int, optional
        Bytes of tensors that are read several times and do not fit the memory that is free now: the
        disk gives them again each time. None if nothing is read several times.
    device : str
        Where it would compute.
    fastest : Choice
        The device that is expected to be the fastest, and why.
    spool, fetched : int, optional
        Bytes of the spool, and that are fetched through it at the most; None if nothing is.
    """

    memory: int
    threads: int
    reread_bytes: int | None
    device: str
    fastest: Choice
    spool: int | None = None
    fetched: int | None = None


def cost(plan: Plan) -> str:
    """Return how often the inputs are read, and from where again."""
    reread_bytes = plan.prediction.reread_bytes
    often = plan.about.cost
    if reread_bytes is None:
        return often
    if reread_bytes == 0:
        return f"{often}, again from the page cache"
    size = format_size(reread_bytes)
    return f"{often}, {size} again from the disk each time: more than the free memory"


def bytes_moved(plan: Plan) -> int:
    """Return the bytes that the disk moves at the least, if no input is in the page cache."""
    return plan.bytes_read + (plan.prediction.reread_bytes or 0) + plan.bytes_written


def fates(plan: Plan) -> dict[str, int]:
    """Return how many input tensors are merged, copied, dropped."""
    return {
        "merged": sum(len(model.merged) for model in plan.accounting),
        "copied": sum(len(model.copied) for model in plan.accounting),
        "dropped": sum(model.dropped_count for model in plan.accounting),
    }


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the summary as data; ``inputs`` has every tensor of every model."""
    prediction = plan.prediction
    return {
        "stages": [stage.as_dict() for stage in plan.stages],
        "method": plan.method,
        "models": [
            {"reference": model, "pinned": pin}
            for model, pin in zip(plan.models, plan.pinned, strict=True)
        ],
        "bytes_to_fetch": _away(plan) if prediction.fetched is None else prediction.fetched,
        "spool": prediction.spool,
        "source": plan.table.source,
        "cost": cost(plan),
        "tensors": len(plan.tensors),
        "files": len(plan.shards),
        "bytes_read": plan.bytes_read,
        "reread_bytes": prediction.reread_bytes,
        "bytes_written": plan.bytes_written,
        "disk": plan.disk,
        "memory": prediction.memory,
        "tokenizer_memory": plan.tokenizer_memory,
        "threads": prediction.threads,
        "device": prediction.device,
        "fastest": {"device": prediction.fastest.device, "reason": prediction.fastest.reason},
        "accounting": fates(plan),
        "inputs": [account.as_dict() for account in plan.accounting],
        "left_out": list(plan.left_out),
        "notes": list(plan.notes),
        "warnings": [warning.as_dict() for warning in plan.warnings],
    }


def summary(plan: Plan) -> str:
    """Return the plan as people read it."""
    return "\n".join(map(printable, _lines(plan)))


def _lines(plan: Plan) -> Iterator[str]:
    prediction = plan.prediction
    files = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"
    fastest = f"{prediction.fastest.device}: {prediction.fastest.reason}"
    for stage in plan.stages:
        writes = f"writes {format_size(stage.bytes_written)}, which are removed again"
        what = f"{stage.method}, {len(stage.tensors)} tensors, {writes}"
        yield f"first     `{stage.recipe.name}`: {what}"
    yield f"method    {plan.method}{_source(plan)}"
    pins = (pin for pin in zip(plan.models, plan.pinned, strict=True) if pin[1])
    for at, (model, pin) in enumerate(pins):
        yield f"{' ' if at else 'commits':<10}{model}: {pin}"
    yield f"tensors   {len(plan.tensors)} in {files}"
    yield f"reads     {format_size(plan.bytes_read)}: {cost(plan)}"
    if prediction.spool is not None and prediction.fetched is not None:
        spool = f"a spool of {format_size(prediction.spool)}, of which nothing stays"
        yield f"fetches   {format_size(prediction.fetched)} at the most, through {spool}"
    elif plan.absent:
        where = "1 file" if len(plan.absent) == 1 else f"{len(plan.absent)} files"
        yield f"fetches   {format_size(_away(plan))} in {where}, which stay in the Hub's cache"
    yield f"writes    {format_size(plan.bytes_written)}"
    yield f"memory    {format_size(prediction.memory, binary=True)} at the peak"
    if plan.tokenizer_memory is not None:
        size = format_size(plan.tokenizer_memory, binary=True)
        yield f"tokenizer built from several, in a process of its own that took {size}"
    yield f"threads   {prediction.threads}"
    yield f"device    {prediction.device}; the fastest should be {fastest}"
    yield f"disk      {format_size(plan.disk + (prediction.spool or 0))} needed"
    yield f"time      {_time(plan)}"
    yield from (f"note      {note}" for note in plan.notes)
    yield from (f"not copied  {name}" for name in plan.left_out)
    lines = (line for account in plan.accounting for line in account.summary())
    yield from (f"{' ' if at else 'inputs':<10}{line}" for at, line in enumerate(lines))


def _away(plan: Plan) -> int:
    """Return the bytes of the files that have to be fetched."""
    return sum(int(file["size"]) for file in plan.absent)


def _source(plan: Plan) -> str:
    """Say which function a method written in Python is."""
    if plan.table.source is None:
        return ""
    module, function, digest = plan.table.source
    return f": `{function}` of `{module}`, whose source has the digest {digest[:16]}"


def _time(plan: Plan) -> str:
    """Say how long the bytes take, on a common disk and on a fast one."""
    slow, fast = (format_duration(bytes_moved(plan) / rate) for rate in _RATES)
    least = "at least " if plan.prediction.reread_bytes else ""
    return f"{least}{slow} where the disk moves 1 GB/s, {fast} at 3 GB/s"
