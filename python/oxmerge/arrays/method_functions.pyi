# Written by tests/method_stub.py from the engine's description of its methods.
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

from numpy.typing import NDArray

from oxmerge.arrays.views import Tensor

# One number for all tensors, or one for each.
_Each: TypeAlias = float | Sequence[float]

__all__ = [
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "cabs",
    "consensus_ta",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "ema",
    "emr",
    "expo",
    "geometric_median",
    "karcher",
    "linear",
    "magmax",
    "metagpt",
    "model_stock",
    "multislerp",
    "nan",
    "nearswap",
    "nuslerp",
    "passthrough",
    "pcb",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
    "soup",
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
def della(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each,
    density: _Each = 1.0,
    epsilon: _Each = 0.15,
    normalize: bool = True,
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
def della(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each,
    density: _Each = 1.0,
    epsilon: _Each = 0.15,
    normalize: bool = True,
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
def della_linear(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each,
    density: _Each = 1.0,
    epsilon: _Each = 0.15,
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
def della_linear(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each,
    density: _Each = 1.0,
    epsilon: _Each = 0.15,
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
def breadcrumbs(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each,
    density: _Each = 1.0,
    gamma: _Each = 0.01,
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
def breadcrumbs(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each,
    density: _Each = 1.0,
    gamma: _Each = 0.01,
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
def breadcrumbs_ties(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each,
    density: _Each = 1.0,
    gamma: _Each = 0.01,
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
def breadcrumbs_ties(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each,
    density: _Each = 1.0,
    gamma: _Each = 0.01,
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
def multislerp(
    tensors: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    weight: _Each,
    normalize_weights: bool = True,
    eps: float = 1e-08,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def multislerp(
    tensors: Sequence[Any],
    base: Any = None,
    *,
    weight: _Each,
    normalize_weights: bool = True,
    eps: float = 1e-08,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def karcher(
    tensors: Sequence[Tensor],
    *,
    max_iter: int = 10,
    tol: float = 1e-05,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def karcher(
    tensors: Sequence[Any],
    *,
    max_iter: int = 10,
    tol: float = 1e-05,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def model_stock(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    filter_wise: bool = False,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def model_stock(
    tensors: Sequence[Any],
    base: Any,
    *,
    filter_wise: bool = False,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def sce(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    select_topk: float = 1.0,
    int8_mask: bool = False,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def sce(
    tensors: Sequence[Any],
    base: Any,
    *,
    select_topk: float = 1.0,
    int8_mask: bool = False,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def nearswap(
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
def nearswap(
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
def arcee_fusion(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def arcee_fusion(
    tensors: Sequence[Any],
    base: Any,
    *,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def ram(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    epsilon: float = 1e-05,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def ram(
    tensors: Sequence[Any],
    base: Any,
    *,
    epsilon: float = 1e-05,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def ramplus_tl(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    epsilon: float = 1e-05,
    r: float = 0.1,
    alpha: float = 0.2,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def ramplus_tl(
    tensors: Sequence[Any],
    base: Any,
    *,
    epsilon: float = 1e-05,
    r: float = 0.1,
    alpha: float = 0.2,
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
@overload
def soup(
    tensors: Sequence[Tensor],
    *,
    weight: _Each = 1.0,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def soup(
    tensors: Sequence[Any],
    *,
    weight: _Each = 1.0,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def ema(
    tensors: Sequence[Tensor],
    *,
    decay: float = 0.9,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def ema(
    tensors: Sequence[Any],
    *,
    decay: float = 0.9,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def geometric_median(
    tensors: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    weight: _Each = 1.0,
    max_iter: int = 100,
    tol: float = 1e-09,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def geometric_median(
    tensors: Sequence[Any],
    base: Any = None,
    *,
    weight: _Each = 1.0,
    max_iter: int = 100,
    tol: float = 1e-09,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def consensus_ta(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each = 1.0,
    tall: _Each = 0.4,
    k: int = 2,
    lambda_: float = 1.0,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def consensus_ta(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each = 1.0,
    tall: _Each = 0.4,
    k: int = 2,
    lambda_: float = 1.0,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def magmax(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each = 1.0,
    lambda_: float = 1.0,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def magmax(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each = 1.0,
    lambda_: float = 1.0,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def emr(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each = 1.0,
    lambda_: float = 1.0,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def emr(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each = 1.0,
    lambda_: float = 1.0,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def metagpt(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    lambda_: float = 1.0,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def metagpt(
    tensors: Sequence[Any],
    base: Any,
    *,
    lambda_: float = 1.0,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def nan(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    lambda_: float = 1.0,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def nan(
    tensors: Sequence[Any],
    base: Any,
    *,
    lambda_: float = 1.0,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def expo(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    alpha: float = 0.3,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def expo(
    tensors: Sequence[Any],
    base: Any,
    *,
    alpha: float = 0.3,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def pcb(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each = 1.0,
    density: _Each = 0.2,
    lambda_: float = 1.0,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def pcb(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each = 1.0,
    density: _Each = 0.2,
    lambda_: float = 1.0,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def cabs(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weight: _Each = 1.0,
    n: _Each = 64,
    m: int = 256,
    lambda_: float = 1.0,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> Tensor: ...
@overload
def cabs(
    tensors: Sequence[Any],
    base: Any,
    *,
    weight: _Each = 1.0,
    n: _Each = 64,
    m: int = 256,
    lambda_: float = 1.0,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
) -> NDArray[Any]: ...
