"""Which merge of each method is measured.

It follows from the method's description, so a method that is new appears by itself: two models
beside the base where that is possible, and values for what must be given.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

WEIGHTS = (0.6, 0.4)
DENSITY = 0.5
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
    """

    method: str
    has_base: bool
    models: int
    shared: dict[str, float]
    each: tuple[dict[str, float], ...]

    @property
    def inputs(self) -> str:
        """The models, in words."""
        others = self.models - self.has_base
        if self.has_base:
            return f"base + {others}"
        return "1 model" if others == 1 else f"{others} models"

    def recipe(self, paths: Sequence[str]) -> str:
        """Return the recipe as YAML, for the base and then the other models at `paths`."""
        lines = [f"merge_method: {self.method}"]
        if self.has_base:
            # JSON strings are YAML strings, whatever the path is.
            lines.append(f"base_model: {json.dumps(paths[0])}")
        lines.append("models:")
        used = paths[self.has_base : self.models]
        for path, values in zip(used, self.each, strict=True):
            lines.append(f"  - model: {json.dumps(path)}")
            lines += _block("    ", values)
        lines += _block("", self.shared)
        return "\n".join([*lines, "dtype: bfloat16", ""])


def cases(methods: Iterable[Mapping[str, Any]]) -> Iterator[Case]:
    """Yield a case for each method of the engine's table."""
    for method in methods:
        yield case_of(method)


def case_of(method: Mapping[str, Any]) -> Case:
    """Return the case of a method, by its description."""
    contract = method["contract"]
    has_base = contract["base"] == "required"
    least, most = contract["others"] if has_base else contract["inputs"]
    others = max(least or 0, min(len(WEIGHTS), len(WEIGHTS) if most is None else most))
    if has_base and contract["inputs"][1] is not None:
        others = min(others, contract["inputs"][1] - 1)
    values = [_values(method, "shared", 0)]
    values += [
        _values(method, "input", number) | _values(method, "other", number)
        for number in range(others)
    ]
    return Case(method["name"], has_base, others + has_base, values[0], tuple(values[1:]))


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
            values[name] = WEIGHTS[number % len(WEIGHTS)] if name == "weight" else _given(name)
    return values


def _given(name: str) -> float:
    return _GIVEN.get(name, _OTHERWISE)


def _block(indent: str, values: Mapping[str, float]) -> list[str]:
    if not values:
        return []
    return [f"{indent}parameters:", *(f"{indent}  {key}: {value}" for key, value in values.items())]
