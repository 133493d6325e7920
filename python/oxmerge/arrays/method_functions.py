"""Every merge method as a function of its name, made from what the engine says of it.

A new method is here without further ado; for type checkers it is declared in the stub beside this
file, which is checked against these functions.
"""

from __future__ import annotations

from inspect import Parameter as Argument
from inspect import Signature

from oxmerge import _core
from oxmerge.arrays.in_memory import merge_tensors
from oxmerge.methods import built_in_methods, explain_parameter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from oxmerge.methods import Method

__all__: list[str] = []


def _function(method: Method, row: dict[str, Any]) -> Callable[..., Any]:
    name = method.name

    def function(tensors: Sequence[Any], base: Any = None, **options: Any) -> Any:
        return merge_tensors(name, tensors, base, **options)

    function.__name__ = function.__qualname__ = name
    function.__module__ = __name__
    function.__doc__ = _docstring(method, row)
    function.__signature__ = _signature(method)  # type: ignore[attr-defined]
    return function


def _python_name(name: str) -> str:
    return f"{name}_" if name == "lambda" else name


def _signature(method: Method) -> Signature:
    keyword, either = Argument.KEYWORD_ONLY, Argument.POSITIONAL_OR_KEYWORD
    arguments = [Argument("tensors", either)]
    if method.base != "ignored":
        default = Argument.empty if method.base == "required" else None
        arguments.append(Argument("base", either, default=default))
    for parameter in method.parameters:
        default = Argument.empty if parameter.required else parameter.default
        arguments.append(Argument(_python_name(parameter.name), keyword, default=default))
    common = {"out": None, "dtype": None, "seed": 0, "name": "", "threads": None}
    arguments += [Argument(each, keyword, default=default) for each, default in common.items()]
    return Signature(arguments)


def _docstring(method: Method, row: dict[str, Any]) -> str:
    lines = [f"{row['title']}: {row['formula']}.", "", "Parameters", "----------"]
    counts = (method.inputs if method.base == "ignored" else method.others).of("tensor")
    counts = "any number of tensors" if counts == "at least 0 tensors" else counts
    lines += ["tensors : sequence of array", f"    {counts[0].upper()}{counts[1:]}, of one shape."]
    if method.base != "ignored":
        kind = "array" if method.base == "required" else "array, optional"
        lines += [f"base : {kind}", "    The tensor that the others were made from."]
    for parameter, described in zip(method.parameters, row["parameters"], strict=True):
        each = "" if parameter.per == "shared" else ", or one for each tensor in a sequence"
        kind = parameter.kind + each
        kind += "" if parameter.required else f", default {parameter.default}"
        text = explain_parameter(described)
        lines += [
            f"{_python_name(parameter.name)} : {kind}",
            f"    {text[0].upper()}{text[1:]}.",
        ]
    lines += ["out, dtype, seed, name, threads", "    As for `oxmerge.merge_tensors`.", ""]
    lines += ["Returns", "-------", "array", "    `out`, or an array of the first one's kind.", ""]
    lines += ["Notes", "-----", f"Costs {row['cost']}. From {row['paper']}.", ""]
    if row["class"] == "model":
        # One tensor does not tell them.
        lines += ["Needs sums over the whole model, so it merges files only, with `oxmerge.merge`."]
    else:
        lines += ["Examples", "--------", *_example(method), ""]
    return "\n".join(lines)


def _example(method: Method) -> list[str]:
    has_base = method.base == "required"
    count = max(1, method.others.least, method.inputs.least - has_base)
    tensors = ", ".join(["np.float32([1, 2])", "np.float32([3, 4])", "np.float32([5, 6])"][:count])
    values = {"float": "0.5", "int": "1", "bool": "True"}
    arguments = [f"[{tensors}]", *(["np.float32([1, 1])"] if has_base else [])]
    arguments += [
        f"{_python_name(parameter.name)}={values[parameter.kind]}"
        for parameter in method.parameters
        if parameter.required
    ]
    call = f"kernels.{method.name}({', '.join(arguments)})"
    return [
        ">>> import numpy as np",
        ">>> from oxmerge import kernels",
        f">>> {call}.shape",
        "(2,)",
    ]


__all__ += [row["name"] for row in _core.methods()]
globals().update(
    (row["name"], _function(built_in_methods()[row["name"]], row)) for row in _core.methods()
)
