"""Merge methods written in Python.

A method is a function that says what an element of the output is, in the language of
`oxmerge.formula`. It runs on arrays (`merge_tensors`, `merge_state_dicts`) as the built-in methods
do: in blocks, on every core, to the bit. Recipes do not take it yet.

>>> from oxmerge import method, per_model, shared
>>> from oxmerge.formula import norm, weighted_sum
>>> @method(base="required")
... def damped(base, models, *, weight=per_model(1.0), damping=shared(0.1, min=0)):
...     '''Task vectors, each shortened by how long it is.'''
...     vectors = [model - base for model in models]
...     factors = [w / (1 + damping * norm(v)) for w, v in zip(weight, vectors, strict=True)]
...     return base + weighted_sum(factors, vectors)
>>> import numpy as np, oxmerge
>>> oxmerge.merge_tensors("damped", [np.float32([1, 2])], np.float32([1, 1]))
array([1.      , 1.909091], dtype=float32)
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

from oxmerge import _core
from oxmerge.errors import PlanError
from oxmerge.formula import Value, as_nodes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Literal, TypeVar

    Function = TypeVar("Function", bound=Callable[..., Any])

__all__ = ["PythonMethod", "method", "per_model", "registered", "shared"]

_REQUIRED = object()
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_METHODS: dict[str, PythonMethod] = {}


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter as `shared` or `per_model` declares it: its default, its range."""

    per: str
    default: Any = None
    required: bool = True
    least: float | None = None
    most: float | None = None
    help: str = ""

    def row(self, name: str) -> dict[str, Any]:
        """Return the parameter as the engine describes those of its own methods."""
        kind = {bool: "bool", int: "int"}.get(type(self.default), "float")
        return {
            "name": name.removesuffix("_"),
            "kind": kind,
            "default": self.default,
            "required": self.required,
            "per": self.per,
            "limits": (self.least, self.most),
            "usual": (None, None),
            "acts": True,
            "help": self.help,
        }


def shared(
    default: Any = _REQUIRED,
    *,
    min: float | None = None,  # noqa: A002 - reads as what it is in a signature
    max: float | None = None,  # noqa: A002
    help: str = "",  # noqa: A002
) -> Any:
    """Declare a parameter that has one value for a tensor.

    Parameters
    ----------
    default : float, int or bool, optional
        Also says of what kind it is; without it, it is a number that recipes must give.
    min, max : float, optional
        The least and the greatest value it may have.
    help : str
        A line about what it does.
    """
    return _spec("shared", default, min, max, help)


def per_model(
    default: Any = _REQUIRED,
    *,
    min: float | None = None,  # noqa: A002
    max: float | None = None,  # noqa: A002
    help: str = "",  # noqa: A002
) -> Any:
    """Declare a parameter that has one value for each model but the base; see `shared`."""
    return _spec("other", default, min, max, help)


def _spec(
    per: str, default: Any, least: float | None, most: float | None, text: str
) -> ParameterSpec:
    if default is _REQUIRED:
        return ParameterSpec(per, None, required=True, least=least, most=most, help=text)
    if not isinstance(default, bool | int | float):
        raise TypeError(f"the default of a parameter is a number or a truth value, not {default!r}")
    return ParameterSpec(per, default, required=False, least=least, most=most, help=text)


@dataclass(frozen=True, slots=True)
class PythonMethod:
    """A merge method that a Python function is.

    Attributes
    ----------
    name : str
        In recipes.
    function : callable
        Returns the formula, from values and parameters.
    base : str
        ``required``, ``optional`` or ``ignored``.
    models : tuple of int
        Fewest and most models besides the base; None for no limit.
    parameters : dict of str to ParameterSpec
        By the name of the function's argument.
    """

    name: str
    function: Callable[..., Any]
    base: str
    models: tuple[int, int | None]
    parameters: Mapping[str, ParameterSpec] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return the method as the engine describes its own."""
        least, most = self.models
        has_base = int(self.base == "required")
        inputs = (least + has_base, None if most is None else most + (self.base != "ignored"))
        text = inspect.getdoc(self.function) or self.name
        title, _, rest = text.partition("\n")
        return {
            "name": self.name,
            "title": title.rstrip("."),
            "formula": " ".join(rest.split()) or title,
            "class": "python",
            "cost": "what its formula takes",
            "paper": f"{self.function.__module__}.{self.function.__qualname__}",
            "contract": {
                "base": self.base,
                "inputs": inputs,
                "others": (0, None) if self.base == "ignored" else self.models,
            },
            "parameters": [spec.row(name) for name, spec in self.parameters.items()],
        }

    def formula(
        self,
        inputs: int,
        base: int | None,
        shared: Mapping[str, Any],
        own: Sequence[Mapping[str, Any]],
    ) -> tuple[str, list[tuple[Callable[..., Any], int | None]]]:
        """Return the formula for these parameters, as the engine reads it.

        Parameters
        ----------
        inputs : int
            How many there are.
        base : int, optional
            Which of them is the base.
        shared : mapping
            The shared parameters, by the name that recipes use.
        own : sequence of mapping
            Those of each input.
        """
        values = [Value("input", index=index) for index in range(inputs)]
        others = [at for at in range(inputs) if at != base]
        arguments: dict[str, Any] = {}
        for name, spec in self.parameters.items():
            key = name.removesuffix("_")
            if spec.per == "shared":
                arguments[name] = shared.get(key)
            else:
                arguments[name] = [own[at].get(key) for at in others]
        models = [values[at] for at in others]
        if self.base == "ignored":
            returned = self.function(models, **arguments)
        else:
            first = None if base is None else values[base]
            returned = self.function(first, models, **arguments)
        try:
            return as_nodes(returned)
        except TypeError as error:
            raise PlanError(
                f"the merge method `{self.name}` returned no formula",
                expected="a value of `oxmerge.formula`",
                found=type(returned).__name__,
                advice=f"mend {self._place()}",
            ) from error

    def _place(self) -> str:
        code = self.function.__code__
        return f"`{self.function.__qualname__}` in {code.co_filename}, line {code.co_firstlineno}"


def method(
    *,
    base: Literal["required", "optional", "ignored"] = "ignored",
    models: tuple[int, int | None] = (1, None),
    name: str | None = None,
) -> Callable[[Function], Function]:
    """Make a merge method of a function.

    The function gets the base (None if there is none; no such argument with ``base="ignored"``),
    the list of models, which never has the base in it, and its parameters by keyword; it returns
    the formula of an output element. Its docstring documents it: the first line is the title.

    Parameters
    ----------
    base : str
        Whether a base model is required, optional, or ignored (then there is none).
    models : tuple of int
        Fewest and most models besides the base.
    name : str, optional
        What callers name it by, if not by the function's name.

    Raises
    ------
    TypeError, ValueError
        If the function cannot be a method, or the name is taken by a built-in one.
    """
    if base not in {"required", "optional", "ignored"}:
        raise ValueError(f'base must be "required", "optional" or "ignored", not {base!r}')

    def register(function: Function) -> Function:
        chosen = function.__name__ if name is None else name
        if not _NAME.fullmatch(chosen):
            raise ValueError(f"a method's name is a word, not {chosen!r}")
        if any(row["name"] == chosen for row in _core.methods()):
            raise ValueError(f"there is a built-in merge method `{chosen}`; choose another name")
        parameters = _parameters(function, has_base=base != "ignored")
        _METHODS[chosen] = PythonMethod(chosen, function, base, models, parameters)
        return function

    return register


def _parameters(function: Callable[..., Any], *, has_base: bool) -> dict[str, ParameterSpec]:
    arguments = list(inspect.signature(function).parameters.values())
    positional = [each for each in arguments if each.kind is not each.KEYWORD_ONLY]
    wanted = ["base", "models"] if has_base else ["models"]
    if len(positional) != len(wanted):
        raise TypeError(
            f"the method `{function.__name__}` takes ({', '.join(wanted)}, *, parameters), not "
            f"{inspect.signature(function)}"
        )
    specs = {}
    for each in arguments[len(wanted) :]:
        default = each.default
        if isinstance(default, ParameterSpec):
            specs[each.name] = default
        else:
            specs[each.name] = shared() if default is each.empty else shared(default)
    return specs


def registered() -> Mapping[str, PythonMethod]:
    """Return the methods that are registered in this process, by name."""
    return _METHODS
