from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

_A = TypeVar("_A")
# One number for all tensors, or one for each.
_Each: TypeAlias = float | Sequence[float]

__all__ = [
    "dare_linear",
    "dare_ties",
    "linear",
    "nuslerp",
    "passthrough",
    "slerp",
    "task_arithmetic",
    "ties",
]

def linear(
    tensors: Sequence[_A],
    *,
    weight: _Each,
    normalize: bool = True,
    out: _A | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> _A: ...
def slerp(
    tensors: Sequence[_A],
    base: _A,
    *,
    t: float,
    out: _A | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> _A: ...
def nuslerp(
    tensors: Sequence[_A],
    base: _A | None = None,
    *,
    weight: _Each,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    out: _A | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> _A: ...
def task_arithmetic(
    tensors: Sequence[_A],
    base: _A,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: _A | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> _A: ...
def ties(
    tensors: Sequence[_A],
    base: _A,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: _A | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> _A: ...
def dare_linear(
    tensors: Sequence[_A],
    base: _A,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: _A | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> _A: ...
def dare_ties(
    tensors: Sequence[_A],
    base: _A,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: _A | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> _A: ...
def passthrough(
    tensors: Sequence[_A],
    *,
    scale: _Each | None = None,
    out: _A | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> _A: ...
