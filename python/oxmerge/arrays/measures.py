"""Numbers of arrays: ranks, norms, inner products, distances. Part of `oxmerge.kernels`."""

from __future__ import annotations

import math
from typing import overload

from oxmerge import _core
from oxmerge.arrays.in_memory import check_options
from oxmerge.arrays.views import View, check_same_shape, empty, float_view, listed
from oxmerge.options import whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from oxmerge.arrays.views import Tensor

__all__ = ["dot", "gram", "kth_magnitude", "norm", "ulp_distance"]


def kth_magnitude(tensor: Any, k: int, *, threads: int | None = None) -> float:
    """Return the `k`-th largest magnitude, exactly.

    Parameters
    ----------
    tensor : array
        Of floats.
    k : int
        From 1, the largest, to the number of elements.
    threads
        As for all kernels, see `oxmerge.kernels`.

    Returns
    -------
    float
        The magnitude. NaN counts as the largest.

    Notes
    -----
    One to three reads, no sort, and no memory but for a few histograms. The threshold of
    `top_k_mask`, at which TIES trims: https://arxiv.org/abs/2306.01708.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.float32([0.5, -3, 2])
    >>> kth_magnitude(x, 1), kth_magnitude(x, 2)
    (3.0, 2.0)
    """
    source = float_view(tensor, "tensor")
    if not 1 <= (k := whole(k, "k")) <= source.count:
        raise ValueError(f"k must be from 1 to {source.count}, the number of elements, not {k}")
    return _numbers("kth_magnitude", [source], threads, k)[0]


def norm(tensor: Any, order: float = 2, *, threads: int | None = None) -> float:
    """Return a norm of the whole array, in float64.

    Parameters
    ----------
    tensor : array
        Of floats.
    order : {1, 2, inf}
        The sum of magnitudes, the Euclidean norm, or the largest magnitude.
    threads
        As for all kernels, see `oxmerge.kernels`.

    Returns
    -------
    float
        The norm; of no elements 0, and NaN if any element is.

    Notes
    -----
    One read. Sums are taken in a fixed order, that of ``rust/kernels/NUMERICS.md``, so the result
    does not depend on `threads`. The ratio of two sums of magnitudes is what DARE can rescale by:
    https://arxiv.org/abs/2311.03099.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.float32([3, -4])
    >>> norm(x), norm(x, 1), norm(x, float("inf"))
    (5.0, 7.0, 4.0)
    """
    source = float_view(tensor, "tensor")
    if order not in (1, 2, math.inf):
        raise ValueError(f"order must be 1, 2 or inf, not {order}")
    if order == 1:
        return _numbers("absolute_sum", [source], threads)[0]
    if order == math.inf:
        return _numbers("largest_magnitude", [source], threads)[0]
    return math.sqrt(_numbers("gram", [source], threads)[0])


def dot(a: Any, b: Any, *, threads: int | None = None) -> float:
    """Return the inner product of two arrays, in float64.

    Parameters
    ----------
    a, b : array
        Of floats, of one shape.
    threads
        As for all kernels, see `oxmerge.kernels`.

    Returns
    -------
    float
        The sum of products, each taken in float64.

    Notes
    -----
    One read of each. Sums are taken in a fixed order, that of ``rust/kernels/NUMERICS.md``, so the
    result does not depend on `threads`. SLERP takes its angle from it: Shoemake, "Animating
    Rotation with Quaternion Curves", https://doi.org/10.1145/325334.325242.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.float32([1, 2]), np.float32([3, 4])
    >>> dot(a, b)
    11.0
    >>> round(dot(a, b) / (norm(a) * norm(b)), 3)  # the cosine
    0.984
    """
    views = [float_view(a, "a"), float_view(b, "b")]
    check_same_shape(views, ("a", "b"))
    return _numbers("dot", views, threads)[0]


@overload
def gram(
    tensors: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    threads: int | None = None,
) -> Tensor: ...
@overload
def gram(
    tensors: Sequence[Any], base: Any = None, *, threads: int | None = None
) -> NDArray[np.float64]: ...
def gram(tensors: Sequence[Any], base: Any = None, *, threads: int | None = None) -> Any:
    """Return the inner products of every two of the tensors: their Gram matrix.

    Parameters
    ----------
    tensors : sequence of array
        Of floats, of one shape.
    base : array, optional
        Is subtracted from each first: the products are those of task vectors.
    threads
        As for all kernels, see `oxmerge.kernels`.

    Returns
    -------
    array of float64
        Symmetric, of shape (n, n) for n tensors; of NumPy, or of torch for torch tensors.

    Notes
    -----
    One read of each tensor, and no task vector is ever stored. The angles between task vectors are
    what "Model Stock" goes by: https://arxiv.org/abs/2403.19522.

    Examples
    --------
    >>> import numpy as np
    >>> gram([np.float32([2, 1]), np.float32([1, 3])], base=np.float32([1, 1]))
    array([[1., 0.],
           [0., 4.]])
    """
    views = [float_view(each, f"tensors[{at}]") for at, each in enumerate(listed(tensors))]
    if not views:
        raise ValueError("there is no tensor")
    count, names = len(views), [f"tensors[{at}]" for at in range(len(views))]
    if base is not None:
        views.append(float_view(base, "base"))
        names.append("base")
    check_same_shape(views, names)
    piece = "gram" if base is None else "gram_of_differences"
    products = iter(_numbers(piece, views, threads))
    matrix = empty((count, count), "F64", views[0].kind).array
    for row in range(count):
        for column in range(row, count):
            matrix[row, column] = matrix[column, row] = next(products)
    return matrix


def ulp_distance(a: Any, b: Any, *, threads: int | None = None) -> tuple[int, int]:
    """Return how far apart two arrays are, in steps between neighbouring floats of their type.

    Parameters
    ----------
    a, b : array
        Of the same float type and shape.
    threads
        As for all kernels, see `oxmerge.kernels`.

    Returns
    -------
    tuple of int
        The largest distance of two elements, and how many elements differ. Both zeros are the same
        number, any two NaNs are, and a NaN is one step beyond infinity.

    Notes
    -----
    One read of each. Floats of one type are counted from zero on, up or down, as by Dawson,
    "Comparing Floating Point Numbers",
    https://randomascii.wordpress.com/2012/02/25/comparing-floating-point-numbers-2012-edition/.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.float32([1, 2, 0])
    >>> ulp_distance(x, np.float32([np.nextafter(x[0], x[1]), 2, -0.0]))
    (1, 1)
    >>> ulp_distance(x, x)
    (0, 0)
    """
    views = [float_view(a, "a"), float_view(b, "b")]
    check_same_shape(views, ("a", "b"))
    check_options(0, threads)
    one, other = views[0].code, views[1].code
    if one != other:
        raise TypeError(f"a is of {one} and b of {other}; convert one of them first")
    return _core.ulp_distance(views[0].exporter, views[1].exporter, threads)


def _numbers(piece: str, inputs: list[View], threads: int | None, k: int = 0) -> list[float]:
    check_options(0, threads)
    exporters = [each.exporter for each in inputs]
    return _core.numbers_of_arrays(piece, exporters, inputs[0].count, k, threads)
