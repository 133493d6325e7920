"""What the tensors of an adapter are made of that is several as one: the factors of each.

Each is computed when it is looked up, so it takes the memory of the factors of one module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import copysign, prod, sqrt
from typing import Any

from oxmerge.adapter_methods import ADAPTER_METHODS
from oxmerge.arrays.in_memory import merge_tensors
from oxmerge.arrays.views import numpy_dtype
from oxmerge.errors import PlanError
from oxmerge.models.adapter_config import endings
from oxmerge.models.adapters import kind_of, open_adapter
from oxmerge.models.checkpoints import OpenCheckpoint
from oxmerge.models.fetching import fetch
from oxmerge.problems import UNSUPPORTED, Problem
from oxmerge.schema import DTYPE_SIZES, is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from oxmerge._core import TensorInfo
    from oxmerge.models.adapters import Adapter
    from oxmerge.models.references import Located
    from oxmerge.problems import Findings

    #: Weight and density for a tensor of the model, by its name.
    Share = tuple[float, float]

__all__ = ["FactorPlan", "JoinedTensors"]

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
#: The key of a config that names the model which the adapter was trained on.
_BASE = "base_model_name_or_path"
#: Keys that say which of the modules that are listed are adapted.
_NARROWING = ("exclude_modules", "layers_to_transform")
#: A factor is a matrix, or of a convolution more.
_FEWEST_DIMENSIONS = 2
_ANEW = "save the adapter anew"
_FUSE = "fuse it into the model"


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor of one adapter: which, the tensor, its scale, and what the method is told."""

    number: int
    tensor: TensorInfo
    scale: float
    weight: float = 1.0
    density: float = 1.0


@dataclass
class JoinedFactor:
    """A tensor of the output, and the factors that it is made of."""

    kind: str
    parts: list[Factor] = field(default_factory=list)
    is_sum: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape; the factors of a sum have one but along the axis."""
        shape = list(self.parts[0].tensor.shape)
        if self.is_sum and self.kind != _COPY:
            axis = _FACTORS[self.kind][1]
            shape[axis] = sum(part.tensor.shape[axis] for part in self.parts)
        return tuple(shape)

    @property
    def stored(self) -> int:
        """Bytes of its factors, as they lie in files."""
        return sum(prod(p.tensor.shape) * DTYPE_SIZES[p.tensor.dtype] for p in self.parts)

    def bytes(self, dtype: str) -> int:
        """Bytes that making it takes, copies of its factors included."""
        wide = DTYPE_SIZES["F64"] * max(prod(part.tensor.shape) for part in self.parts)
        return self.stored + wide + 2 * prod(self.shape) * DTYPE_SIZES[dtype]


class FactorPlan:
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
        self.tensors: dict[str, JoinedFactor] = {}
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
                joined = self.tensors.setdefault(f"base_model.model.{module}", JoinedFactor(_COPY))
                joined.parts.append(Factor(number, tensor, 1.0))
                continue
            if kind not in _FACTORS or len(tensor.shape) < _FEWEST_DIMENSIONS:
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
            joined = self.tensors.setdefault(name, JoinedFactor(kind, is_sum=self.method is None))
            if number in _numbers_of(joined):
                self._fault("two tensors of the adapter are for the same", tensor.name, adapter)
                continue
            weight, density = share(f"{module}.weight")
            scale = config.scale_of(module)
            joined.parts.append(Factor(number, tensor, scale, weight, density))

    def finish(self) -> None:
        """Report what does not go together."""
        if not (self.adapters or self.findings.problems):
            problem = Problem("missing-key", "there is no adapter", advice="name one")
            self.findings.problems.append(problem)
        has_pairs = any(joined.kind != _COPY for joined in self.tensors.values())
        if not (has_pairs or self.findings.problems):
            files = ", ".join(f"`{adapter.path}`" for adapter in self.adapters)
            message, advice = "the adapters have no pair of factors", "name adapters that have"
            problem = Problem(
                "adapter",
                message,
                expected="`lora_A` and `lora_B` of a module",
                found=f"none in {files}",
                advice=advice,
            )
            self.findings.problems.append(problem)
        self._compare_bases()
        for name, joined in self.tensors.items():
            if joined.kind == _COPY:
                continue
            if _numbers_of(self.tensors.get(_other_factor(name, joined))) != _numbers_of(joined):
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

    def bases(self) -> dict[str, str]:
        """Return the models that adapters say they are of, each with the first config that does."""
        found: dict[str, str] = {}
        for config in (adapter.config for adapter in self.adapters):
            base = config.raw.get(_BASE)
            if isinstance(base, str) and base:
                found.setdefault(base.rstrip("/"), config.path)
        return found

    def _compare_bases(self) -> None:
        """Warn of adapters that say they are of other models: shapes alone do not tell."""
        first, *others = self.bases() or [""]
        for base in others:
            message = "an adapter says that it is of another base model than the first"
            advice = "join adapters of one model; if the two names are of one, all is well"
            problem = Problem(
                "config-differs",
                message,
                file=self.bases()[base],
                expected=f"`{first}`",
                found=f"`{base}`",
                advice=advice,
            )
            self.findings.warnings.append(problem)

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
            _BASE, "revision", "task_type", "fan_in_fan_out", "auto_mapping",
        )  # fmt: skip
        return {
            "peft_type": "LORA",
            **{key: first[key] for key in kept if key in first},
            "r": most,
            "lora_alpha": most,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(self._targets(ranks)),
            "bias": "none",
            "lora_dropout": 0.0,
            "inference_mode": True,
            "use_rslora": False,
        }

    def _targets(self, modules: Iterable[str]) -> set[str]:
        """Return what says which modules are adapted: PEFT adds a pair to all that it fits.

        The adapters' own lists fit those of each and no others. What is not a list, or is narrowed
        by other keys, is about the layers of one of them: then each module is named in full.
        """
        targets: set[str] = set()
        for raw in (adapter.config.raw for adapter in self.adapters):
            listed = raw.get("target_modules")
            # One layer may be named by its number alone, which may be 0.
            is_narrowed = any(raw.get(key) not in (None, []) for key in _NARROWING)
            if is_narrowed or not isinstance(listed, list):
                return set(modules)
            targets.update(each for each in listed if isinstance(each, str))
        fit = all(not targets.isdisjoint(endings(module)) for module in modules)
        return targets if fit else set(modules)

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


def _other_factor(name: str, joined: JoinedFactor) -> str:
    """Return what the other factor of a pair is called."""
    other = joined.kind.replace("A", "#").replace("B", "A").replace("#", "B")
    return name.removesuffix(_FACTORS[joined.kind][0]) + _FACTORS[other][0]


def _numbers_of(joined: JoinedFactor | None) -> list[int]:
    return [] if joined is None else [part.number for part in joined.parts]


class JoinedTensors(Mapping[str, Any]):
    """The tensors of the output, each made when it is looked up; `watch` is told which."""

    def __init__(
        self,
        plan: FactorPlan,
        dtype: str,
        seed: int = 0,
        *,
        allow_nonfinite: bool = False,
        watch: Callable[[str], None] | None = None,
    ) -> None:
        self._plan, self._dtype, self._seed, self._watch = plan, dtype, seed, watch
        self._allow_nonfinite = allow_nonfinite
        #: Tensors that were made with NaN or infinity in them.
        self.nonfinite: list[str] = []
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
        if self._watch is not None:
            self._watch(name)
        arrays = [self._opened[part.number][part.tensor.name] for part in joined.parts]
        if joined.kind == _COPY:
            return self._copy(name, arrays)
        # A number that is too large for its type is told below.
        with np.errstate(over="ignore"):
            made = self._sum(joined, arrays) if joined.is_sum else self._merge(name, joined, arrays)
        if np.isfinite(made).all():
            return made
        if self._allow_nonfinite or not all(np.isfinite(each).all() for each in arrays):
            self.nonfinite.append(name)
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

    def _sum(self, joined: JoinedFactor, arrays: list[NDArray[Any]]) -> NDArray[Any]:
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

    def _merge(self, name: str, joined: JoinedFactor, arrays: list[NDArray[Any]]) -> NDArray[Any]:
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
