"""Writes `method_functions.pyi` from what the engine says of its methods.

python tests/method_stub.py > python/oxmerge/arrays/method_functions.pyi
"""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

from oxmerge import _core, kernels

_HEAD = """\
# Written by tests/method_stub.py from the engine's description of its methods.
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

from numpy.typing import NDArray

from oxmerge.arrays.views import Tensor

# One number for all tensors, or one for each.
_Each: TypeAlias = float | Sequence[float]
"""
_OPTIONS = {"dtype": "Any", "seed": "int", "name": "str", "threads": "int | None"}


def stub() -> str:
    """Return the text of the stub file."""
    rows = {row["name"]: row for row in _core.methods()}
    names = ",\n    ".join(f'"{name}"' for name in sorted(rows))
    functions = [_overload(row, kind) for row in rows.values() for kind in ("Tensor", "Any")]
    return "\n".join([_HEAD, f"__all__ = [\n    {names},\n]\n", *functions]) + "\n"


def _overload(row: dict[str, Any], kind: str) -> str:
    types = {each["name"].replace("lambda", "lambda_"): _type(each) for each in row["parameters"]}
    types |= {"tensors": f"Sequence[{kind}]", **_OPTIONS}
    types["out"] = "Tensor | None" if kind == "Tensor" else "NDArray[Any] | None"
    arguments = []
    for argument in signature(getattr(kernels, row["name"])).parameters.values():
        required = argument.default is Parameter.empty
        if argument.name == "base":
            annotation = kind if required or kind == "Any" else f"{kind} | None"
        else:
            annotation = types[argument.name]
        if argument.kind is Parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        default = "" if required else f" = {_default(argument.default)}"
        arguments.append(f"{argument.name}: {annotation}{default}")
    result = "Tensor" if kind == "Tensor" else "NDArray[Any]"
    listed = "".join(f"    {argument},\n" for argument in arguments)
    return f"@overload\ndef {row['name']}(\n{listed}) -> {result}: ..."


def _type(parameter: dict[str, Any]) -> str:
    kind = parameter["kind"] if parameter["per"] == "shared" else "_Each"
    needs_none = not parameter["required"] and parameter["default"] is None
    return f"{kind} | None" if needs_none else kind


def _default(value: object) -> str:
    return '""' if value == "" else repr(value)


if __name__ == "__main__":
    print(stub(), end="")
