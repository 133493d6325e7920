"""Which merges are measured.

One of each method follows from the method's description, so a method that is new appears by itself:
two models beside the base where that is possible, and values for what must be given. Some are
measured in more ways: with cold inputs, and with fine-tunes that are far from their base.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

WEIGHTS = (0.6, 0.4)
DENSITY = 0.5
SPREADS = (1e-4, 1e-4, 2e-3, 2e-3)
"""How far the fine-tunes are from their base: the near ones, then the far ones."""
COLD = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")
"""Methods that are measured with cold inputs too; warm ones are for all."""
FAR = ("ties", "dare_ties")
"""Methods that are measured with fine-tunes far from their base too: their work depends on it."""
MANY = ("linear", "ties")
"""Methods that are measured with models of many tensors."""
DIGESTED = ("linear", "slerp", "ties", "dare_ties")
"""Methods that are measured with digests and a journal, and without."""
LEFT_OUT = {"": (), ", no digests": ("--no-digests",), ", no journal": ("--no-resume",)}
"""What those are called, and the options of each."""
SWEPT = {
    "linear": "models[0].parameters.weight",
    "slerp": "parameters.t",
    "task_arithmetic": "parameters.lambda",
    "ties": "parameters.lambda",
    "dare_ties": "parameters.lambda",
}
"""Methods of which several outputs are made in one pass, and what differs among those."""
_RANDOM = ("dare", "della")
_GIVEN = {"t": 0.4}
_OTHERWISE = 0.5  # for numbers that must be given and are not known here


@dataclass(frozen=True, slots=True)
class Case:
    """A merge by one method.

    Attributes
    ----------
    method
        Its name.
    has_base
        Whether there is a base model, the first of the models.
    models
        How many there are, the base included.
    shared
        Parameters of the whole.
    each
        Parameters of each model but the base.
    far
        Whether the fine-tunes are far from the base.
    """

    method: str
    has_base: bool
    models: int
    shared: dict[str, float]
    each: tuple[dict[str, float], ...]
    far: bool = False

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.method}, far" if self.far else self.method

    @property
    def is_random(self) -> bool:
        """Whether two programs cannot be expected to give the same numbers."""
        return self.method.startswith(_RANDOM)

    def of(self, models: Sequence[Any]) -> list[Any]:
        """Return its models, of a base and its fine-tunes in the order of `SPREADS`."""
        tuned = models[1 + len(SPREADS) // 2 :] if self.far else models[1:]
        return [*models[: self.has_base], *tuned[: self.models - self.has_base]]

    def recipe(self, paths: Sequence[str]) -> str:
        """Return the recipe as YAML, for the base and then the other models at `paths`."""
        lines = [f"merge_method: {self.method}"]
        if self.has_base:
            # JSON strings are YAML strings, whatever the path is.
            lines.append(f"base_model: {json.dumps(paths[0])}")
        lines.append("models:")
        for path, values in zip(paths[self.has_base :], self.each, strict=True):
            lines.append(f"  - model: {json.dumps(path)}")
            lines += _block("    ", values)
        lines += _block("", self.shared)
        return "\n".join([*lines, "dtype: bfloat16", ""])


def cases(methods: Iterable[Mapping[str, Any]], names: Sequence[str] | None = None) -> list[Case]:
    """Return a case for each method of the engine's table, or of those that are named."""
    return [case_of(method) for method in methods if names is None or method["name"] in names]


def with_far(found: Iterable[Case]) -> Iterator[Case]:
    """Yield cases, some of them with far fine-tunes too."""
    for case in found:
        yield case
        if case.method in FAR:
            yield replace(case, far=True)


def case_of(method: Mapping[str, Any]) -> Case:
    """Return the case of a method, by its description."""
    contract = method["contract"]
    has_base = contract["base"] == "required"
    least, most = contract["others"] if has_base else contract["inputs"]
    others = max(least or 0, min(len(WEIGHTS), len(WEIGHTS) if most is None else most))
    if has_base and contract["inputs"][1] is not None:
        others = min(others, contract["inputs"][1] - 1)
    shared = _values(method, "shared", 0)
    each = tuple(
        _values(method, "input", number) | _values(method, "other", number)
        for number in range(others)
    )
    return Case(method["name"], has_base, others + has_base, shared, each)


def _values(method: Mapping[str, Any], per: str, number: int) -> dict[str, float]:
    """Return values for what must be given, and for the density of methods that select."""
    values = {}
    for parameter in method["parameters"]:
        name = parameter["name"]
        if parameter["per"] != per:
            continue
        if name == "density" and method["class"] == "selection":
            values[name] = DENSITY
        elif parameter["required"]:
            weight = WEIGHTS[number % len(WEIGHTS)]
            values[name] = weight if name == "weight" else _GIVEN.get(name, _OTHERWISE)
    return values


def _block(indent: str, values: Mapping[str, float]) -> list[str]:
    if not values:
        return []
    return [f"{indent}parameters:", *(f"{indent}  {key}: {value}" for key, value in values.items())]
