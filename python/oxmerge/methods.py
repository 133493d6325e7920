"""The table of merge methods as the engine describes it, read into typed rows.

The engine knows its own methods, `python_methods` those that are written in Python; here is the one
place where a name is looked up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from keyword import iskeyword

from oxmerge import _core
from oxmerge.problems import Place, Problem, did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from typing import Any

    from oxmerge.python_methods import PythonMethod

__all__ = [
    "Count",
    "Method",
    "Parameter",
    "Range",
    "built_in_methods",
    "explain_parameter",
    "find_method",
    "modifiers",
    "plain_name",
    "read_method",
]

#: Parameters of the dialect's methods, so that those of another one are known for what they are.
DIALECT_PARAMETERS = frozenset((
    "weight", "normalize", "t", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights", "eps",
    "max_iter", "tol", "density", "gamma", "epsilon", "int8_mask", "rescale", "lambda",
    "filter_wise", "select_topk", "r", "alpha", "scale",
))  # fmt: skip
#: Parameters that no method reads, but recipes have: of old releases, and of other tools.
IDLE_PARAMETERS = {
    "embed_slerp": "embeddings are merged as other tensors are",
    "smooth": "it belongs to `mergekit-evolve`; write a gradient as a list of values",
    "geodesic": "`slerp` and `nuslerp` go along the arc, whatever it says",
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
    title, cost, paper : str
        What model cards call it, how often it reads the inputs, and where it comes from.
    written : PythonMethod, optional
        The function that it is, if it is written in Python.
    takes_anything : bool
        Whether it stands for a method that is not known, of any parameters.
    """

    name: str
    base: str = "optional"
    inputs: Count = Count()
    others: Count = Count()
    parameters: tuple[Parameter, ...] = ()
    title: str = ""
    cost: str = ""
    paper: str = ""
    written: PythonMethod | None = None
    takes_anything: bool = False

    def parameters_of(self, *, base: bool) -> tuple[Parameter, ...]:
        """Return the parameters that an input has, be it the base or another."""
        per = ("input",) if base else ("input", "other")
        return tuple(parameter for parameter in self.parameters if parameter.per in per)

    def shared_parameters(self) -> tuple[Parameter, ...]:
        """Return the parameters that the inputs of a tensor share."""
        return tuple(parameter for parameter in self.parameters if parameter.per == "shared")


@cache
def built_in_methods() -> dict[str, Method]:
    """Return the engine's own methods by name."""
    return {row["name"]: read_method(row) for row in _core.methods()}


@cache
def modifiers() -> dict[str, Parameter]:
    """Return the parameters that every method has besides its own, by name."""
    return {row["name"]: _read_parameter(row) for row in _core.modifiers()}


def read_method(row: Mapping[str, Any]) -> Method:
    """Return a method from its description."""
    contract = row["contract"]
    return Method(
        name=row["name"],
        base=contract["base"],
        inputs=_read_count(contract["inputs"]),
        others=_read_count(contract["others"]),
        parameters=tuple(_read_parameter(parameter) for parameter in row["parameters"]),
        title=row["title"],
        cost=row["cost"],
        paper=row["paper"],
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


def plain_name(argument: str) -> str:
    """Return what recipes call an argument: a word of Python's has an underscore behind it there.

    Examples
    --------
    >>> plain_name("lambda_"), plain_name("weight")
    ('lambda', 'weight')
    """
    word = argument.removesuffix("_")
    return word if iskeyword(word) else argument


def find_method(name: str, where: Place, allowed: Collection[str] = ()) -> Method | Problem:
    """Return the method called `name`, or why there is none.

    Parameters
    ----------
    name : str
        As recipes write it.
    where : Place
        The place that names it.
    allowed : collection of str
        The modules that may be imported for a method ``package.module:name``.
    """
    methods = built_in_methods()
    if name in methods:
        return methods[name]
    from oxmerge.python_methods import find_written, names  # noqa: PLC0415 - seldom needed

    written = find_written(name, allowed)
    if isinstance(written, Problem):
        return replace(written, where=where)
    if written is not None:
        return written.described()
    message = f"there is no merge method `{name}`"
    advice = did_you_mean(name, {*methods, *names()}) or "`oxmerge methods` lists those there are"
    return Problem("unknown-method", message, where, advice=advice)
