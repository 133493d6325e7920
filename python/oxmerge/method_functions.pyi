from collections.abc import Sequence
from typing import Any, TypeAlias, overload

from numpy.typing import NDArray

from oxmerge.arrays import Tensor

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

@overload
def linear(
    tensors: Sequence[Tensor],
    *,
    weight: _Each,
    normalize: bool = True,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def linear(
    tensors: Sequence[Any],
    *,
    weight: _Each,
    normalize: bool = True,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def slerp(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    t: float,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def slerp(
    tensors: Sequence[Any],
    base: Any,
    *,
    t: float,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def nuslerp(
    tensors: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    weight: _Each,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def nuslerp(
    tensors: Sequence[Any],
    base: Any = None,
    *,
    weight: _Each,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def task_arithmetic(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def task_arithmetic(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def ties(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def ties(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def dare_linear(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def dare_linear(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def dare_ties(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def dare_ties(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each,
    density: _Each = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def passthrough(
    tensors: Sequence[Tensor],
    *,
    scale: _Each | None = None,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def passthrough(
    tensors: Sequence[Any],
    *,
    scale: _Each | None = None,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
