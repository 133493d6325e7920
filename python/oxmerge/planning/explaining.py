"""Explanations: where a tensor's inputs lie, and where each of its parameters comes from."""

from __future__ import annotations

from oxmerge.errors import PlanError
from oxmerge.problems import did_you_mean, printable
from oxmerge.schema import is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from oxmerge.planning.plans import Plan
    from oxmerge.recipe.recipe import Scalar
    from oxmerge.schema import OutputTensor

__all__ = ["explain"]


def explain(plan: Plan, tensor: str | OutputTensor) -> str:
    """Return a line for each input of a tensor and each of its parameters; see `Plan.explain`."""
    if isinstance(tensor, str):
        found = plan.tensors.find(tensor)
        if found is None:
            advice = did_you_mean(tensor, plan.tensors.names)
            raise PlanError(f"the output has no tensor `{tensor}`", advice=advice)
        tensor = found
    return "\n".join(map(printable, _lines(plan, tensor)))


def _lines(plan: Plan, tensor: OutputTensor) -> Iterator[str]:
    origin = tensor.origin or {}
    shard, _ = plan.shards[tensor.shard]
    what = f"{tensor.dtype} {list(tensor.shape)}, `{shard}` from byte {tensor.start}"
    where = origin.get("slice")
    yield f"{tensor.name}: {what}" + (f", of {where}" if where else "")
    if not is_float(tensor.dtype):
        yield "  copied as it is: no parameters"
    yield from _parameters("  ", tensor.parameters, origin.get("shared") or {})
    files = plan.input_files
    owns = origin.get("own") or [{} for _ in tensor.sources]
    for at, (source, own) in enumerate(zip(tensor.sources, owns, strict=True)):
        role = " (base)" if at == tensor.base else ""
        place = f"`{files[source.file]['path']}` from byte {source.start}"
        rows = ", rows by token" if source.by_token else ""
        yield f"  {source.model}{role}: {source.name}, {source.dtype}, {place}{rows}"
        yield from _parameters("    ", source.parameters, own)


def _parameters(
    indent: str, values: Mapping[str, Scalar], origins: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    for name, value in values.items():
        yield f"{indent}{name} = {_scalar(value)}: {_origin(origins.get(name) or {})}"


def _origin(origin: Mapping[str, Any]) -> str:
    if "where" not in origin:
        return "default"
    words = [str(origin["where"])]
    if "filter" in origin:
        words.append(f"filter `{origin['filter']}`")
    if "gradient" in origin:
        points = ", ".join(map(_scalar, origin["gradient"]))
        words.append(f"gradient [{points}] at position {origin['position']:.6g}")
    return ", ".join(words)


def _scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
