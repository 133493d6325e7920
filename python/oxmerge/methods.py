"""The table of merge methods as the engine describes it, read into typed rows.

The engine is the only place that knows a method. What stands here besides is the list of names
that the dialect has and this release does not, so that a message can tell a name that is not there
yet from a typing error.
"""

from __future__ import annotations

from dataclasses import dataclass

from oxmerge.problems import UNSUPPORTED, Place, Problem, did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

__all__ = [
    "Count",
    "Method",
    "Parameter",
    "Range",
    "explain_parameter",
    "find_method",
    "read_methods",
    "read_modifiers",
]

#: Every method of the dialect.
DIALECT_METHODS = frozenset((
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "passthrough", "model_stock",
    "arcee_fusion", "nearswap", "sce", "ram", "ramplus_tl", "task_arithmetic", "ties",
    "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear",
))  # fmt: skip
#: Parameters of the dialect's methods, so that those of a later one are known for what they are.
DIALECT_PARAMETERS = frozenset((
    "weight", "normalize", "t", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights", "eps",
    "max_iter", "tol", "density", "gamma", "epsilon", "int8_mask", "rescale", "lambda",
    "filter_wise", "select_topk", "r", "alpha", "scale",
))  # fmt: skip
#: Parameters that no method reads, but recipes have: of old releases, and of other tools.
IDLE_PARAMETERS = {
    "embed_slerp": "embeddings are merged as other tensors are",
    "smooth": "it belongs to `mergekit-evolve`; write a gradient as a list of values",
    "allow_negative_weights": "it belongs to `mergekit-evolve`; weights may be negative",
}


@dataclass(frozen=True, slots=True)
class Range:
    """The values from a least to a greatest one, both included.

    Attributes
    ----------
    least, most : float, optional
        None for no bound.
    """

    least: float | None = None
    most: float | None = None

    def __contains__(self, value: float) -> bool:
        """Tell whether a value is within the bounds."""
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )

    def __str__(self) -> str:
        """Return the bounds in words, ``from 0 to 1``; nothing if there are none."""
        if self.most is None:
            return "" if self.least is None else f"at least {self.least:g}"
        least = "at most" if self.least is None else f"from {self.least:g} to"
        return f"{least} {self.most:g}"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method.

    Attributes
    ----------
    name : str
        As recipes write it.
    kind : str
        ``float``, ``int`` or ``bool``.
    default : bool, int, float or None
        What it is when no one says; None for nothing.
    required : bool
        Whether someone has to say.
    per : str
        ``shared`` by a tensor's inputs, one for each ``input``, or one for each ``other`` input
        than the base.
    limits : Range
        What it may be.
    usual : Range
        What it is where it is meant: other values are warned about in recipes.
    acts : bool
        Whether it changes any number.
    """

    name: str
    kind: str
    default: float | None
    required: bool
    per: str
    limits: Range = Range()
    usual: Range = Range()
    acts: bool = True


@dataclass(frozen=True, slots=True)
class Count:
    """How many of something a method takes.

    Attributes
    ----------
    least : int
        At least so many.
    most : int, optional
        At most so many; None for no limit.
    """

    least: int = 0
    most: int | None = None

    def allows(self, count: int) -> bool:
        """Tell whether `count` is within the bounds."""
        return count >= self.least and (self.most is None or count <= self.most)

    def of(self, noun: str) -> str:
        """Return the bounds in words: ``exactly 2 models``."""
        words = f"{self.least} to {self.most}"
        if self.most is None:
            words = f"at least {self.least}"
        elif self.most == self.least:
            words = f"exactly {self.least}"
        return f"{words} {noun}" if words.endswith(" 1") else f"{words} {noun}s"


@dataclass(frozen=True, slots=True)
class Method:
    """What planning needs to know of a merge method.

    Attributes
    ----------
    name : str
        As recipes write it.
    base : str
        Whether a base is ``required``, ``optional``, or ``ignored`` (an input like any other).
    inputs : Count
        How many inputs it takes, the base included.
    others : Count
        How many it takes besides the base.
    parameters : tuple of Parameter
        Everything it can be told.
    """

    name: str
    base: str = "optional"
    inputs: Count = Count()
    others: Count = Count()
    parameters: tuple[Parameter, ...] = ()

    def parameters_of(self, *, base: bool) -> tuple[Parameter, ...]:
        """Return the parameters that an input has, be it the base or another."""
        per = ("input",) if base else ("input", "other")
        return tuple(parameter for parameter in self.parameters if parameter.per in per)

    def shared_parameters(self) -> tuple[Parameter, ...]:
        """Return the parameters that the inputs of a tensor share."""
        return tuple(parameter for parameter in self.parameters if parameter.per == "shared")


def read_methods(table: Iterable[Mapping[str, Any]]) -> dict[str, Method]:
    """Return the engine's table of methods by name."""
    return {row["name"]: _read_method(row) for row in table}


def read_modifiers(table: Iterable[Mapping[str, Any]]) -> dict[str, Parameter]:
    """Return the parameters that every method has besides its own, by name."""
    return {row["name"]: _read_parameter(row) for row in table}


def _read_method(row: Mapping[str, Any]) -> Method:
    contract = row["contract"]
    return Method(
        name=row["name"],
        base=contract["base"],
        inputs=_read_count(contract["inputs"]),
        others=_read_count(contract["others"]),
        parameters=tuple(_read_parameter(parameter) for parameter in row["parameters"]),
    )


def _read_count(bounds: Sequence[int | None]) -> Count:
    least, most = bounds
    return Count(least or 0, most)


def _read_parameter(row: Mapping[str, Any]) -> Parameter:
    named = {name: row[name] for name in ("name", "kind", "default", "required", "per", "acts")}
    return Parameter(**named, limits=Range(*row["limits"]), usual=Range(*row["usual"]))


def explain_parameter(row: Mapping[str, Any]) -> str:
    """Return what a parameter does and what it may be, in words, from the engine's table."""
    usual = str(Range(*row["usual"]))
    effect = "" if row["acts"] else "has no effect"
    facts = (row["help"], str(Range(*row["limits"])), usual and f"usually {usual}", effect)
    return "; ".join(fact for fact in facts if fact)


def find_method(name: str, methods: Mapping[str, Method], where: Place) -> Method | Problem:
    """Return the method called `name`, or why there is none; `where` is its place."""
    if name in methods:
        return methods[name]
    from oxmerge.arrays.python_methods import registered  # noqa: PLC0415 - needed only for an error

    if name in registered():
        message = f"method `{name}` is written in Python, and merges arrays only"
        advice = "call `oxmerge.merge_tensors` or `oxmerge.merge_state_dicts`"
        return Problem("unknown-method", message, where, advice=advice)
    known = "use one of " + ", ".join(f"`{each}`" for each in methods)
    if name in DIALECT_METHODS:
        message = f"method `{name}` is not in this release"
        return Problem(UNSUPPORTED, message, where, advice=known)
    message = f"there is no merge method `{name}`"
    advice = did_you_mean(name, methods.keys() | DIALECT_METHODS) or known
    return Problem("unknown-method", message, where, advice=advice)
