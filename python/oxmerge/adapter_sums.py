"""Adapters without a model: several of them as one.

A sum of products is a product of longer factors: w₁·s₁·B₁·A₁ + w₂·s₂·B₂·A₂ is
[w₁·s₁·B₁ w₂·s₂·B₂] times A₁ above A₂. That is exact but for the rounding of the scaled factors, and
its rank is the sum of the ranks. What compares or drops single elements of the products (TIES,
DARE) gives no low rank, so there is no such adapter: put each on the model, and merge those.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from oxmerge.arrays.saving import save
from oxmerge.arrays.views import numpy_dtype
from oxmerge.errors import OutputError, PlanError
from oxmerge.models.adapter_config import FILE_NAME
from oxmerge.models.adapters import kind_of, open_adapter
from oxmerge.models.checkpoints import OpenCheckpoint
from oxmerge.models.fetching import fetch
from oxmerge.models.references import resolve_reference, split_adapters
from oxmerge.problems import UNSUPPORTED, Findings, Problem, group_problems

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from oxmerge._core import TensorInfo
    from oxmerge.models.adapters import Adapter

    PathLike = str | os.PathLike[str]

__all__ = ["join_adapters"]

_WEIGHTS = "adapter_model.safetensors"
#: Kinds of factors: what their names end with, the axis along which they lie side by side, and
#: whether they carry the scale.
_FACTORS = {
    "A": (".lora_A.weight", 0, False),
    "B": (".lora_B.weight", 1, True),
    "embedding A": (".lora_embedding_A", 0, False),
    "embedding B": (".lora_embedding_B", 1, True),
}


@dataclass
class _Joined:
    """A tensor of the sum: its factors side by side, by adapter, tensor and scale."""

    kind: str
    parts: list[tuple[int, TensorInfo, float]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape; the factors have one but along the axis."""
        axis = _FACTORS[self.kind][1]
        shape = list(self.parts[0][1].shape)
        shape[axis] = sum(tensor.shape[axis] for _, tensor, _ in self.parts)
        return tuple(shape)


class _Sum(Mapping[str, Any]):
    """The tensors of the sum, each made when it is looked up."""

    def __init__(self, tensors: dict[str, _Joined], adapters: list[Adapter], dtype: str) -> None:
        self._tensors, self._dtype = tensors, dtype
        files = [adapter.checkpoint.files[0] for adapter in adapters]
        places = fetch([file for file in files if file.get("remote")])
        weights = [
            places[file["remote"]["label"]] if file.get("remote") else str(file["path"])
            for file in files
        ]
        self._opened = [OpenCheckpoint(path) for path in weights]
        self.files = [file for each in self._opened for file in each.files]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._tensors[name].shape

    def dtype_of(self, _: str) -> str:
        """Return the element type of a tensor by its safetensors name."""
        return self._dtype

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401
        """Make a tensor."""
        import numpy as np  # noqa: PLC0415 - heavy

        joined, dtype = self._tensors[name], numpy_dtype(self._dtype)
        _, axis, is_scaled = _FACTORS[joined.kind]
        parts = []
        for number, tensor, factor in joined.parts:
            values = self._opened[number][tensor.name]
            # One rounding: a product of two numbers of f32 is exact in f64.
            scaled = values.astype(np.float64) * np.float32(factor) if is_scaled else values
            parts.append(scaled.astype(dtype))
        return np.concatenate(parts, axis=axis)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._tensors)


def join_adapters(
    directory: PathLike, adapters: Iterable[PathLike], *, overwrite: bool = False
) -> list[str]:
    """Write several adapters of one model as one, whose product is the sum of theirs.

    Parameters
    ----------
    directory : path
        The folder of the new adapter: new or empty, unless `overwrite`.
    adapters : iterable of path
        LoRAs as PEFT saves them, each also with what it is multiplied by: ``"adapter=0.5"``.
    overwrite : bool
        Whether to replace an adapter that is there.

    Returns
    -------
    list of str
        The files that were written.

    Raises
    ------
    PlanError
        If an adapter is broken, or more than products of two factors: with magnitudes, biases,
        saved modules or trained tokens, or for parameters of experts.
    FileExistsError, OutputError
        If something is there.

    Notes
    -----
    Ranks add up. Factors are of the widest type that one of them has. Takes the memory of the
    factors of a module.

    Examples
    --------
    >>> import oxmerge
    >>> files = oxmerge.join_adapters("adapters/both", ["adapters/chat", "adapters/code=0.5"])
    """
    folder = os.fspath(directory)
    tensors, opened = _plan([os.fspath(each) for each in adapters])
    dtype = _common_type({tensor.dtype for each in tensors.values() for _, tensor, _ in each.parts})
    os.makedirs(folder, exist_ok=True)
    if os.listdir(folder) and not overwrite:
        raise FileExistsError(errno.EEXIST, "the output directory is not empty", folder)
    if os.path.exists(os.path.join(folder, "config.json")):
        message, advice = "a model is there, which an adapter must not replace", "name a new folder"
        raise OutputError(message, file=folder, advice=advice)
    path = os.path.join(folder, FILE_NAME)
    files = save(_Sum(tensors, opened, dtype), os.path.join(folder, _WEIGHTS), overwrite=overwrite)
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(_config(tensors, opened), file, indent=2)
        file.write("\n")
    os.replace(path + ".new", path)
    return [*files, path]


def _plan(names: list[str]) -> tuple[dict[str, _Joined], list[Adapter]]:
    """Return what each tensor is made of, and the adapters; raise with what is wrong."""
    findings = Findings()
    tensors: dict[str, _Joined] = {}
    opened: list[Adapter] = []
    # The first part of a reference is a model.
    for name, weight in split_adapters("+".join((os.curdir, *names)), (os.getcwd(),))[1]:
        located = resolve_reference(name, (os.getcwd(),))
        if isinstance(located, Problem):
            findings.problems.append(located)
            continue
        adapter = open_adapter(located, findings)
        if adapter is not None:
            _take(tensors, adapter, len(opened), weight, findings)
            opened.append(adapter)
    if not (tensors or findings.problems):
        findings.problems.append(Problem("missing-key", "there is no adapter", advice="name one"))
    for name, joined in tensors.items():
        axis = _FACTORS[joined.kind][1]
        kinds = {(*tensor.shape[:axis], *tensor.shape[axis + 1 :]) for _, tensor, _ in joined.parts}
        if len(kinds) > 1:
            found = ", ".join(str(list(tensor.shape)) for _, tensor, _ in joined.parts)
            message, advice = "adapters of other models cannot be one", "name those of one model"
            findings.problems.append(
                Problem("adapter", message, tensor=name, found=found, advice=advice)
            )
        if _adapters_of(tensors.get(_other_factor(name, joined))) != _adapters_of(joined):
            message = "a factor without the other"
            findings.problems.append(
                Problem("adapter", message, tensor=name, advice="save the adapter anew")
            )
    if findings.problems:
        raise PlanError.of("cannot join the adapters", group_problems(findings.problems))
    return tensors, opened


def _other_factor(name: str, joined: _Joined) -> str:
    """Return what the other factor of a pair is called."""
    other = joined.kind.replace("A", "#").replace("B", "A").replace("#", "B")
    return name.removesuffix(_FACTORS[joined.kind][0]) + _FACTORS[other][0]


def _adapters_of(joined: _Joined | None) -> list[int]:
    return [] if joined is None else [number for number, _, _ in joined.parts]


def _take(
    tensors: dict[str, _Joined], adapter: Adapter, number: int, weight: float, findings: Findings
) -> None:
    if adapter.config.targets:
        message = "not supported yet: joining adapters of parameters (`target_parameters`)"
        advice = "fuse it into the model"
        findings.problems.append(Problem(UNSUPPORTED, message, file=adapter.path, advice=advice))
        return
    for tensor in adapter.checkpoint.tensors:
        kind, module = kind_of(tensor.name)
        if kind not in _FACTORS or len(tensor.shape) < len(("rows", "columns")):
            message = "not supported yet: joining adapters that are more than pairs of factors"
            advice = "fuse it into the model"
            findings.problems.append(
                Problem(UNSUPPORTED, message, file=adapter.path, tensor=tensor.name, advice=advice)
            )
            continue
        ending, axis, _ = _FACTORS[kind]
        rank = adapter.config.rank_of(module)
        if tensor.shape[axis] != rank:
            message = "a factor has another rank than its config says, so its scale is unknown"
            found = f"{tensor.shape[axis]} in {list(tensor.shape)}"
            findings.problems.append(
                Problem(
                    "adapter",
                    message,
                    None,
                    adapter.path,
                    tensor.name,
                    f"rank {rank}",
                    found,
                    "save the adapter anew",
                )
            )
        factor = adapter.config.scale_of(module) * weight
        joined = tensors.setdefault(f"base_model.model.{module}{ending}", _Joined(kind, []))
        joined.parts.append((number, tensor, factor))


def _config(tensors: dict[str, _Joined], adapters: list[Adapter]) -> dict[str, Any]:
    """Return the config: what the first says of the model, and scales of one."""
    ranks: dict[str, int] = {}
    for name, joined in tensors.items():
        ending, axis, is_scaled = _FACTORS[joined.kind]
        if not is_scaled:
            module = name.removeprefix("base_model.model.").removesuffix(ending)
            ranks[module] = joined.shape[axis]
    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    first = adapters[0].config.raw
    kept = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "auto_mapping")
    return {
        "peft_type": "LORA",
        **{key: first[key] for key in kept if key in first},
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "use_rslora": False,
    }


def _common_type(types: set[str]) -> str:
    """Return the narrowest type that holds all of these."""
    if len(types) == 1:
        return next(iter(types))
    return "F64" if "F64" in types else "F32"
