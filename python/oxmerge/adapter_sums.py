"""Adapters without a model: several of them as one.

A sum of products is a product of longer factors: w₁·s₁·B₁·A₁ + w₂·s₂·B₂·A₂ is
[w₁·s₁·B₁ w₂·s₂·B₂] times A₁ above A₂. That is exact but for the rounding of the scaled factors, and
its rank is the sum of the ranks.

What keeps or drops single elements of the products (TIES, DARE) gives no low rank. So it is done to
the factors instead, as PEFT does (`adapter_methods.py`): ranks have to be equal, and the product is
not what the method would make of the products. Where that is wanted, the adapters are put on their
model, and those are merged.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import copysign, prod, sqrt
from typing import Any

from oxmerge import _core
from oxmerge.adapter_methods import ADAPTER_METHODS
from oxmerge.arrays.in_memory import merge_tensors
from oxmerge.arrays.saving import save
from oxmerge.arrays.views import numpy_dtype
from oxmerge.errors import MemoryBudgetError, OutputError, PlanError, RecipeError
from oxmerge.methods import built_in_methods
from oxmerge.models.adapter_config import FILE_NAME
from oxmerge.models.adapters import WEIGHTS, kind_of, open_adapter
from oxmerge.models.checkpoints import OpenCheckpoint
from oxmerge.models.fetching import fetch
from oxmerge.models.references import resolve_reference, split_adapters
from oxmerge.options import RunOptions
from oxmerge.output.card import RECIPE_NAME, pinned_recipe
from oxmerge.planning.parameters import Resolver, SettingReader, check_settings
from oxmerge.problems import UNSUPPORTED, Findings, Problem, group_problems
from oxmerge.schema import DTYPE_SIZES, is_float
from oxmerge.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from oxmerge._core import TensorInfo
    from oxmerge.methods import Method
    from oxmerge.models.adapters import Adapter
    from oxmerge.models.references import Located
    from oxmerge.recipe.recipe import Recipe

    PathLike = str | os.PathLike[str]
    #: Weight and density for a tensor of the model, by its name.
    Share = tuple[float, float]

__all__ = ["AdapterRun", "join_adapters", "merge_adapters"]

#: Kinds of factors: what their names end with, the axis along which they lie side by side, and
#: whether a sum of products has the scale in them.
_FACTORS = {
    "A": (".lora_A.weight", 0, False),
    "B": (".lora_B.weight", 1, True),
    "embedding A": (".lora_embedding_A", 0, False),
    "embedding B": (".lora_embedding_B", 1, True),
}
#: Tensors of the model that PEFT saves beside a pair for an embedding.
_COPY = "copy"
#: Methods that are sums of products, by what they are called; PEFT calls them `cat`.
_SUMS = ("linear", "task_arithmetic", "cat")
_ANEW = "save the adapter anew"
_FUSE = "fuse it into the model"
#: Bytes of what is loaded on the way, NumPy above all.
_BESIDE = 24 << 20
#: Options that say nothing about a merge of adapters.
_IDLE = (
    "device", "vram", "read_path", "hash_inputs", "stream", "spool", "part", "finish", "ray",
    "parts", "fresh",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """How a merge of adapters went; `merging.py` makes a report of it."""

    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    predicted: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """A factor of one adapter: which, the tensor, its scale, and what the method is told."""

    number: int
    tensor: TensorInfo
    scale: float
    weight: float = 1.0
    density: float = 1.0


@dataclass
class _Joined:
    """A tensor of the output, and the factors that it is made of."""

    kind: str
    parts: list[_Part] = field(default_factory=list)
    is_sum: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape; the factors of a sum have one but along the axis."""
        shape = list(self.parts[0].tensor.shape)
        if self.is_sum and self.kind != _COPY:
            axis = _FACTORS[self.kind][1]
            shape[axis] = sum(part.tensor.shape[axis] for part in self.parts)
        return tuple(shape)

    def bytes(self, dtype: str) -> int:
        """Bytes that making it takes, copies of its factors included."""
        stored = sum(prod(p.tensor.shape) * DTYPE_SIZES[p.tensor.dtype] for p in self.parts)
        wide = DTYPE_SIZES["F64"] * max(prod(part.tensor.shape) for part in self.parts)
        return stored + wide + 2 * prod(self.shape) * DTYPE_SIZES[dtype]


class _Merged(Mapping[str, Any]):
    """The tensors of the output, each made when it is looked up."""

    def __init__(self, plan: _Plan, dtype: str, seed: int, *, allow_nonfinite: bool) -> None:
        self._plan, self._dtype, self._seed = plan, dtype, seed
        self._allow_nonfinite = allow_nonfinite
        files = [adapter.checkpoint.files[0] for adapter in plan.adapters]
        places = fetch([file for file in files if file.get("remote")])
        weights = [
            places[file["remote"]["label"]] if file.get("remote") else str(file["path"])
            for file in files
        ]
        self._opened = [OpenCheckpoint(path) for path in weights]
        self.files = [file for each in self._opened for file in each.files]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._plan.tensors[name].shape

    def dtype_of(self, name: str) -> str:
        """Return the element type of a tensor by its safetensors name."""
        joined = self._plan.tensors[name]
        return joined.parts[0].tensor.dtype if joined.kind == _COPY else self._dtype

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Make a tensor."""
        import numpy as np  # noqa: PLC0415 - heavy

        joined = self._plan.tensors[name]
        arrays = [self._opened[part.number][part.tensor.name] for part in joined.parts]
        if joined.kind == _COPY:
            return self._copy(name, arrays)
        # A number that is too large for its type is told below.
        with np.errstate(over="ignore"):
            made = self._sum(joined, arrays) if joined.is_sum else self._merge(name, joined, arrays)
        is_sound = self._allow_nonfinite or np.isfinite(made).all()
        if is_sound or not all(np.isfinite(each).all() for each in arrays):
            return made
        problem = Problem(
            "non-finite",
            "the merged factor has NaN or infinity, and no adapter has",
            tensor=name,
            advice="write it with `dtype: float32`, or give the adapters smaller weights",
        )
        raise PlanError("the merge is not finished", problems=[problem])

    def _copy(self, name: str, arrays: list[NDArray[Any]]) -> NDArray[Any]:
        first = arrays[0]
        for other in arrays[1:]:
            if other.dtype != first.dtype or other.tobytes() != first.tobytes():
                problem = Problem(
                    "adapter",
                    "the adapters have different tensors of their model",
                    tensor=name,
                    advice=_FUSE,
                )
                raise PlanError("cannot merge the adapters", problems=[problem])
        return first

    def _sum(self, joined: _Joined, arrays: list[NDArray[Any]]) -> NDArray[Any]:
        import numpy as np  # noqa: PLC0415 - heavy

        dtype = numpy_dtype(self._dtype)
        _, axis, is_scaled = _FACTORS[joined.kind]
        parts = []
        for part, values in zip(joined.parts, arrays, strict=True):
            # One rounding: a product of two numbers of f32 is exact in f64.
            factor = np.float32(part.scale * part.weight)
            scaled = values.astype(np.float64) * factor if is_scaled else values
            parts.append(scaled.astype(dtype))
        return np.concatenate(parts, axis=axis)

    def _merge(self, name: str, joined: _Joined, arrays: list[NDArray[Any]]) -> NDArray[Any]:
        is_first = joined.kind.endswith("A")
        weights = []
        for part in joined.parts:
            both = part.scale * part.weight
            root = sqrt(abs(both))
            # One factor of a pair has the sign: with both the product would have none.
            weights.append(copysign(root, both) if is_first else root)
        assert self._plan.method is not None
        merged: NDArray[Any] = merge_tensors(
            self._plan.method,
            arrays,
            dtype=numpy_dtype(self._dtype),
            seed=self._seed,
            name=name,
            weight=weights,
            density=[part.density for part in joined.parts],
        )
        return merged

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._plan.tensors)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._plan.tensors)


def join_adapters(
    directory: PathLike, adapters: Iterable[PathLike], *, overwrite: bool = False
) -> list[str]:
    """Write several adapters of one model as one, whose product is the sum of theirs.

    A recipe whose models are adapters does the same, and TIES and DARE; see `oxmerge.merge`.

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
    names = [os.fspath(each) for each in adapters]
    findings = Findings()
    plan = _Plan("cat", findings)
    # The first part of a reference is a model.
    for name, weight in split_adapters("+".join((os.curdir, *names)), (os.getcwd(),))[1]:
        located = resolve_reference(name, (os.getcwd(),))
        if isinstance(located, Problem):
            findings.problems.append(located)
        else:
            plan.add(located, partial(_whole, weight))
    plan.finish()
    if findings.problems:
        raise PlanError.of("cannot join the adapters", group_problems(findings.problems))
    merged = _Merged(plan, plan.dtype, 0, allow_nonfinite=False)
    return _write(os.fspath(directory), merged, plan.config(), {}, overwrite=overwrite)


def _whole(weight: float, _: str) -> Share:
    return weight, 1.0


# A recipe of adapters.


def merge_adapters(
    recipe: Recipe,
    located: Sequence[Located],
    findings: Findings,
    directory: PathLike,
    running: RunOptions,
    *,
    seed: int,
    strict: bool,
    memory: int,
) -> AdapterRun:
    """Merge the adapters of a recipe into an adapter.

    Parameters
    ----------
    recipe : Recipe
        What to merge, whose models are adapters.
    located : sequence of Located
        Where the adapters lie.
    findings : Findings
        What is wrong with the recipe, to which everything else is added.
    directory : path
        The folder of the new adapter.
    running : RunOptions
        Of which `overwrite` and `allow_nonfinite` count.
    seed : int
        Of random masks.
    strict : bool
        Whether warnings count as problems.
    memory : int
        Bytes that the process may have resident.

    Raises
    ------
    RecipeError, PlanError
        With all that is wrong.
    MemoryBudgetError
        If the factors of a module do not fit the memory.
    FileExistsError, OutputError
        If something is there.
    """
    started = time.perf_counter()
    error = RecipeError if findings.problems else PlanError
    findings.warnings[:0] = recipe.warnings
    _check_options(running, findings)
    _check_keys(recipe, findings)
    plan = _planned(recipe, located, findings)
    plan.finish()
    if findings.problems or (strict and findings.warnings):
        odd = findings.warnings if strict else []
        raise error.of("cannot merge the adapters", group_problems(findings.problems + odd))
    dtype = recipe.out_dtype or recipe.dtype or plan.dtype
    needed = _core.peak_memory() + _BESIDE
    needed += max(each.bytes(dtype) for each in plan.tensors.values())
    if needed > memory:
        raise MemoryBudgetError(
            "the factors of a module do not fit the memory budget",
            expected=f"at most {format_size(memory, binary=True)} resident",
            found=format_size(needed, binary=True),
            advice=f"give it `--memory {needed // (1 << 20) + 1}MiB`",
        )
    merged = _Merged(plan, dtype, seed, allow_nonfinite=running.allow_nonfinite)
    pairs = zip(recipe.models, located, strict=True)
    pinned = {each.model: where.pinned for each, where in pairs if where.pinned}
    texts = {RECIPE_NAME: pinned_recipe(recipe.text, pinned)}
    _write(os.fspath(directory), merged, plan.config(), texts, overwrite=running.overwrite)
    parts = [part for each in plan.tensors.values() for part in each.parts]
    return AdapterRun(
        tensors=len(plan.tensors),
        bytes_read=sum(prod(p.tensor.shape) * DTYPE_SIZES[p.tensor.dtype] for p in parts),
        bytes_written=sum(prod(each.shape) for each in plan.tensors.values()) * DTYPE_SIZES[dtype],
        seconds=time.perf_counter() - started,
        predicted=needed,
        warnings=tuple(map(str, group_problems(findings.warnings))),
    )


def _check_options(running: RunOptions, findings: Findings) -> None:
    """Report options of a merge that one of adapters does not have."""
    usual = {each.name: each.default for each in fields(RunOptions)}
    for name in _IDLE:
        if getattr(running, name) != usual[name]:
            message = f"the option `{name}` has no effect on a merge of adapters"
            problem = Problem("no-effect", message, advice="leave it out")
            findings.problems.append(problem)


def _check_keys(recipe: Recipe, findings: Findings) -> None:
    """Report keys of a recipe that are about models."""
    given = {
        "tokenizer": recipe.tokenizer, "chat_template": recipe.chat_template,
        "oxmerge": None if recipe.extensions == type(recipe.extensions)() else recipe.extensions,
    }  # fmt: skip
    for name in (name for name, value in given.items() if value is not None):
        message = f"`{name}` is for models, and this is a merge of adapters"
        problem = Problem("no-effect", message, recipe.place(name), advice="leave it out")
        findings.problems.append(problem)


def _method(recipe: Recipe, findings: Findings) -> Method:
    """Return the method, or the sum after reporting that there is no such method for adapters."""
    known, name = built_in_methods(), recipe.method
    if name in ADAPTER_METHODS:
        return ADAPTER_METHODS[name].described()
    if name not in _SUMS and name:
        message = f"not supported for adapters: the method `{name}`"
        if name.endswith("svd"):
            message = f"not supported yet: `{name}`, which cuts the rank of a sum"
        listed = ", ".join(f"`{each}`" for each in (*_SUMS, *ADAPTER_METHODS))
        advice = f"use one of {listed}; or put each on the model, `model+adapter`, and merge those"
        where = recipe.place("merge_method")
        findings.problems.append(Problem(UNSUPPORTED, message, where, advice=advice))
    return known["linear"] if name == "linear" else replace(known["task_arithmetic"], name=name)


def _planned(recipe: Recipe, located: Sequence[Located], findings: Findings) -> _Plan:
    """Return the adapters of a recipe with the parameters that it gives to each."""
    method, reader = _method(recipe, findings), SettingReader(findings)
    known = [each.name for one in built_in_methods().values() for each in one.parameters]
    check_settings(recipe.parameters, method, known, findings, level="all")
    shared = Resolver(method.shared_parameters(), (recipe.parameters,), reader, "")
    own = []
    for source in recipe.models:
        check_settings(source.parameters, method, known, findings, level="input")
        levels = (source.parameters, recipe.parameters)
        whose = f" for adapter `{source.model}`"
        parameters = method.parameters_of(base=False)
        own.append(Resolver(parameters, levels, reader, whose))

    def weight_in_sum(at: int, name: str) -> float:
        weights = [float((each.resolve(name, 0) or {}).get("weight", 1)) for each in own]
        settings = shared.resolve(name, 0) or {}
        if method.name != "linear":
            return weights[at] * float(settings.get("lambda", 1))
        total = sum(weights) if settings.get("normalize", True) else 1.0
        if total == 0:
            return _report_sum(findings)
        return weights[at] / total

    def share(at: int, name: str) -> Share:
        if method.written is None:
            return weight_in_sum(at, name), 1.0
        values = own[at].resolve(name, 0) or {}
        return float(values.get("weight", 1)), float(values.get("density", 1))

    plan = _Plan(recipe.method, findings)
    for at, where in enumerate(located):
        plan.add(where, partial(share, at))
    if reader.has_gradients():
        message = "not supported yet: gradients over the layers of adapters"
        advice = "give one number, or numbers with filters"
        findings.problems.append(Problem(UNSUPPORTED, message, advice=advice))
    findings.warnings += reader.unused_filters()
    return plan


def _report_sum(findings: Findings) -> float:
    message, advice = "the weights sum to zero", "give others, or `normalize: false`"
    problem = Problem("unfit-formula", message, advice=advice)
    if problem not in findings.problems:
        findings.problems.append(problem)
    return 0.0


# What each tensor is made of.


class _Plan:
    """The tensors of the output, and the adapters that they are made of.

    Parameters
    ----------
    method : str
        What makes one of several.
    findings : Findings
        Takes what is wrong with the adapters.
    """

    def __init__(self, method: str, findings: Findings) -> None:
        self.method = ADAPTER_METHODS.get(method)
        self.findings = findings
        self.tensors: dict[str, _Joined] = {}
        self.adapters: list[Adapter] = []

    @property
    def dtype(self) -> str:
        """The narrowest type that holds those of all factors."""
        pairs = [each for each in self.tensors.values() if each.kind != _COPY]
        types = {part.tensor.dtype for each in pairs for part in each.parts}
        if len(types) == 1:
            return next(iter(types))
        return "F64" if "F64" in types else "F32"

    def add(self, located: Located, share: Callable[[str], Share]) -> None:
        """Open an adapter; `share` tells its weight and density by the name of a tensor."""
        adapter = open_adapter(located, self.findings)
        if adapter is None:
            return
        number, config = len(self.adapters), adapter.config
        self.adapters.append(adapter)
        if config.targets:
            message = "not supported yet: joining adapters of parameters (`target_parameters`)"
            problem = Problem(UNSUPPORTED, message, file=adapter.path, advice=_FUSE)
            self.findings.problems.append(problem)
            return
        for tensor in adapter.checkpoint.tensors:
            kind, module = kind_of(tensor.name)
            if kind is None and ".base_layer." in module:
                joined = self.tensors.setdefault(f"base_model.model.{module}", _Joined(_COPY))
                joined.parts.append(_Part(number, tensor, 1.0))
                continue
            if kind not in _FACTORS or len(tensor.shape) < len(("rows", "columns")):
                message = "not supported yet: joining adapters that are more than pairs of factors"
                self._fault(message, tensor.name, adapter, code=UNSUPPORTED, advice=_FUSE)
                continue
            ending, axis, _ = _FACTORS[kind]
            rank, found = config.rank_of(module), tensor.shape[axis]
            if found != rank:
                message = "a factor has another rank than its config says, so its scale is unknown"
                found_rank = f"{found} in {list(tensor.shape)}"
                self._fault(message, tensor.name, adapter, f"rank {rank}", found_rank)
                continue
            if not is_float(tensor.dtype) or 0 in tensor.shape:
                expected, shown = "floats", f"{tensor.dtype} {list(tensor.shape)}"
                self._fault("a factor holds no numbers", tensor.name, adapter, expected, shown)
                continue
            name = f"base_model.model.{module}{ending}"
            joined = self.tensors.setdefault(name, _Joined(kind, is_sum=self.method is None))
            if number in _adapters_of(joined):
                self._fault("two tensors of the adapter are for the same", tensor.name, adapter)
                continue
            weight, density = share(f"{module}.weight")
            scale = config.scale_of(module)
            joined.parts.append(_Part(number, tensor, scale, weight, density))

    def finish(self) -> None:
        """Report what does not go together."""
        if not (self.tensors or self.findings.problems):
            problem = Problem("missing-key", "there is no adapter", advice="name one")
            self.findings.problems.append(problem)
        for name, joined in self.tensors.items():
            if joined.kind == _COPY:
                continue
            if _adapters_of(self.tensors.get(_other_factor(name, joined))) != _adapters_of(joined):
                self._fault("a factor without the other", name)
            axis = _FACTORS[joined.kind][1]
            shapes = [part.tensor.shape for part in joined.parts]
            found = ", ".join(str(list(shape)) for shape in shapes)
            if len({(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}) > 1:
                message, advice = (
                    "adapters of other models cannot be one",
                    "name those of one model",
                )
                self._fault(message, name, found=found, advice=advice)
            elif not joined.is_sum and len({*shapes}) > 1:
                message = "the method takes factors of one rank"
                advice = "use `linear` or `task_arithmetic`, which add up ranks"
                self._fault(message, name, found=found, advice=advice)

    def config(self) -> dict[str, Any]:
        """Return the config: what the first adapter says of the model, and scales of one."""
        ranks: dict[str, int] = {}
        for name, joined in self.tensors.items():
            ending, axis, is_scaled = _FACTORS.get(joined.kind, ("", 0, True))
            if not is_scaled:
                module = name.removeprefix("base_model.model.").removesuffix(ending)
                ranks[module] = joined.shape[axis]
        most = max(ranks.values())
        others = {module: rank for module, rank in ranks.items() if rank != most}
        first = self.adapters[0].config.raw
        kept = (
            "base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "auto_mapping",
        )  # fmt: skip
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

    def _fault(
        self,
        message: str,
        name: str,
        adapter: Adapter | None = None,
        expected: str | None = None,
        found: str | None = None,
        *,
        code: str = "adapter",
        advice: str = _ANEW,
    ) -> None:
        file = None if adapter is None else adapter.path
        self.findings.problems.append(
            Problem(code, message, None, file, name, expected, found, advice)
        )


def _other_factor(name: str, joined: _Joined) -> str:
    """Return what the other factor of a pair is called."""
    other = joined.kind.replace("A", "#").replace("B", "A").replace("#", "B")
    return name.removesuffix(_FACTORS[joined.kind][0]) + _FACTORS[other][0]


def _adapters_of(joined: _Joined | None) -> list[int]:
    return [] if joined is None else [part.number for part in joined.parts]


# Writing.


def _write(
    folder: str,
    merged: _Merged,
    config: Mapping[str, Any],
    texts: Mapping[str, str],
    *,
    overwrite: bool,
) -> list[str]:
    """Write an adapter; return its files. The config comes last: without it nothing loads."""
    os.makedirs(folder, exist_ok=True)
    if os.listdir(folder) and not overwrite:
        raise FileExistsError(errno.EEXIST, "the output directory is not empty", folder)
    if os.path.exists(os.path.join(folder, "config.json")):
        message, advice = "a model is there, which an adapter must not replace", "name a new folder"
        raise OutputError(message, file=folder, advice=advice)
    if any(os.path.samefile(os.path.dirname(str(f["path"])), folder) for f in merged.files):
        message = "the output would replace an adapter that is read"
        raise OutputError(message, file=folder, advice="name another folder")
    contents = {**texts, FILE_NAME: json.dumps(config, indent=2) + "\n"}
    parts = {name: os.path.join(folder, f".{name}.oxmerge-part") for name in contents}
    parts[WEIGHTS[0]] = os.path.join(folder, f".oxmerge-part-{WEIGHTS[0]}")
    try:
        save(merged, parts[WEIGHTS[0]], overwrite=True)
        for name, text in contents.items():
            with open(parts[name], "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, FILE_NAME))
        for name in (WEIGHTS[0], *contents):
            os.replace(parts[name], os.path.join(folder, name))
    finally:
        for part in parts.values():
            with suppress(FileNotFoundError):
                os.unlink(part)
    return [os.path.join(folder, name) for name in (WEIGHTS[0], *contents)]
