"""The cases: a recipe each, and what the engine promises for it on a 2-core machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Target:
    """Limits for the engine: at most so many times the floor, at least so many times faster."""

    floor: float
    mergekit: float | None


@dataclass(frozen=True)
class Case:
    """A merge of the bench's models. `parameters` are those of each listed model."""

    method: str
    parameters: tuple[dict[str, float], ...]
    base: str | None = None
    shared: dict[str, float] = field(default_factory=dict)
    deterministic: bool = True
    targets: dict[str, Target] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The models that a merge must read."""
        tunes = ["tune_a", "tune_b"]
        return ["base", *tunes] if self.base == "base" else tunes

    def recipe(self, data: Path) -> str:
        """The recipe as YAML; paths are quoted as JSON strings, which YAML accepts."""
        lines = [f"merge_method: {self.method}"]
        if self.base:
            lines.append(f'base_model: "{data / self.base}"')
        lines.append("models:")
        for name, values in zip(["tune_a", "tune_b"], self.parameters, strict=True):
            lines.append(f'  - model: "{data / name}"')
            lines += block("    parameters:", values, "      ")
        lines += block("parameters:", self.shared, "  ")
        lines.append("dtype: bfloat16")
        return "\n".join(lines) + "\n"


def block(title: str, values: dict[str, float], indent: str) -> list[str]:
    return [title, *(f"{indent}{key}: {value}" for key, value in values.items())] if values else []


WEIGHTS = ({"weight": 0.6}, {"weight": 0.4})
DENSE_HALF = ({"weight": 0.6, "density": 0.5}, {"weight": 0.4, "density": 0.5})

CASES = {
    "linear": Case(
        "linear", WEIGHTS, targets={"warm": Target(1.15, 10), "cold": Target(1.15, None)}
    ),
    "slerp": Case("slerp", ({}, {}), "tune_a", {"t": 0.4}, targets={"warm": Target(1.5, 15)}),
    "task_arithmetic": Case("task_arithmetic", WEIGHTS, "base", targets={"warm": Target(1.15, 10)}),
    "ties": Case("ties", DENSE_HALF, "base", targets={"warm": Target(3, 40)}),
    "dare_ties": Case(
        "dare_ties", DENSE_HALF, "base", deterministic=False, targets={"warm": Target(3, 25)}
    ),
}

PEAK_LIMIT = 256 << 20
REST_LIMIT = 0.3
