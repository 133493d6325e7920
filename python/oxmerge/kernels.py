"""The merge methods and what they are made of, on arrays: NumPy, torch and others.

Every method is a function of its name (``kernels.ties(tensors, base, weight=..., density=...)``);
beside them stand the pieces, for analysis and for methods of one's own. All run on the engine that
merges files: multithreaded, the GIL released, exact to the bit.

What counts as an array is told in `oxmerge.arrays.views`. A result is an array of the kind of the
first input, or `out`, which may be one of the inputs. Common arguments:

out : array, optional
    Where the result goes: contiguous, of the result's shape and type.
dtype : str or dtype, optional
    The result's type: float16, bfloat16, float32 or float64; unless given, that of `out`, or the
    smallest that holds all inputs.
threads : int, optional
    As many as there are cores, unless given. Never changes a bit of the result.

Where one array is wanted, `lerp`, `weighted_sum`, `task_vector`, `sign_consensus` and `convert`
also take a list of them, such as the parameters of a model: then all of their arrays are lists of
one length, the result is a list, and so is `out`, whose arrays must not share memory. That is one
call, and costs little besides the arithmetic, however small the arrays are.

Arithmetic is in float32, in float64 if an input or the result is, and is rounded once to the
result's type. All functions raise TypeError for what is no array or of no fitting type, and
ValueError for shapes that differ, arrays that are not on the CPU, and an `out` that cannot take the
result.

>>> import numpy as np
>>> from oxmerge import kernels
>>> base, tuned = np.float32([0, 1, 2]), np.float32([3, 1, 1])
>>> kernels.ties([tuned], base, weight=1, density=0.5)
array([3., 1., 2.], dtype=float32)
"""

from __future__ import annotations

from contextlib import suppress
from typing import overload

from oxmerge import _core
from oxmerge.arrays import measures, method_functions
from oxmerge.arrays.in_memory import check_options, check_out, finite
from oxmerge.arrays.measures import *  # noqa: F403 - what goes from arrays to numbers
from oxmerge.arrays.method_functions import *  # noqa: F403 - every merge method
from oxmerge.arrays.views import (
    MASKS,
    View,
    check_same_shape,
    element_type,
    empty,
    float_view,
    listed,
    mark_overwritten,
    output,
    promoted,
)
from oxmerge.options import whole
from oxmerge.schema import is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, TypeVar

    from numpy.typing import NDArray

    from oxmerge.arrays.views import Tensor

    Out = TypeVar("Out")

__all__ = [
    "convert",
    "lerp",
    "random_mask",
    "random_mask_by_rank",
    "row_top_k_mask",
    "sign_consensus",
    "task_vector",
    "top_k_mask",
    "weighted_sum",
]
__all__ += measures.__all__
__all__ += method_functions.__all__


def __dir__() -> list[str]:
    """List the public names alone."""
    return sorted(__all__)


@overload
def lerp(
    a: list[Tensor],
    b: list[Tensor],
    t: float,
    *,
    out: list[Tensor] | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> list[Tensor]: ...
@overload
def lerp(
    a: Tensor,
    b: Tensor,
    t: float,
    *,
    out: Tensor | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Tensor: ...
@overload
def lerp(
    a: Any,
    b: Any,
    t: float,
    *,
    out: Any = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Any: ...
def lerp(
    a: Any,
    b: Any,
    t: float,
    *,
    out: Any = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Any:
    """Return what lies between two arrays: ``a + t * (b - a)``.

    With ``out=a`` it is a step of an exponential moving average, in place.

    Parameters
    ----------
    a, b : array or list of array
        Of one shape.
    t : float
        Where between them: 0 gives `a`, and 1 gives `b`. Beyond, it goes on in a line.
    out, dtype, threads
        As for all kernels, see `oxmerge.kernels`.

    Returns
    -------
    array or list of array
        Of the same shape.

    Notes
    -----
    One read of both and one write, at the speed of the memory, in place too. From 0.5 on it is
    computed from the other end, ``b + (1 - t) * (a - b)``, each step rounded: both ends are exact,
    and where both are equal, so is the result. The average of weights over training:
    https://arxiv.org/abs/1803.05407.

    Examples
    --------
    >>> import numpy as np
    >>> lerp(np.float32([1, 2]), np.float32([3, 6]), 0.25)
    array([1.5, 3. ], dtype=float32)
    >>> averages = [np.float32([1]), np.float32([2, 2])]
    >>> _ = lerp(averages, [np.float32([3]), np.float32([6, 4])], 0.5, out=averages)
    >>> averages
    [array([2.], dtype=float32), array([4., 3.], dtype=float32)]
    """
    numbers = [finite(t, "t")]
    return _fill("lerp", [a, b], numbers, out=out, dtype=dtype, threads=threads, names=("a", "b"))


@overload
def weighted_sum(
    tensors: Sequence[list[Tensor]],
    weights: Sequence[float],
    *,
    out: list[Tensor] | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> list[Tensor]: ...
@overload
def weighted_sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    out: Tensor | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Tensor: ...
@overload
def weighted_sum(
    tensors: Sequence[Any],
    weights: Sequence[float],
    *,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> NDArray[Any]: ...
def weighted_sum(
    tensors: Sequence[Any],
    weights: Sequence[float],
    *,
    out: Any = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Any:
    """Return the sum of ``weights[i] * tensors[i]``.

    Parameters
    ----------
    tensors : sequence of array, or of lists of arrays
        Of one shape; lists, of one length and of the same shapes in order.
    weights : sequence of float
        One finite number for each. A tensor with weight 0 is not read.
    out, dtype, threads
        As for all kernels, see `oxmerge.kernels`.

    Returns
    -------
    array or list of array
        Of the shape of the tensors.

    Notes
    -----
    One read of each tensor and one write, at the speed of the memory. Products and sums are
    rounded one by one, in the order given. With weights that sum to 1 it is the average of "Model
    soups", https://arxiv.org/abs/2203.05482.

    Examples
    --------
    >>> import numpy as np
    >>> weighted_sum([np.float32([1, 2]), np.float32([3, 5])], [0.5, 0.5])
    array([2. , 3.5], dtype=float32)
    """
    tensors = listed(tensors)
    numbers = _weights(weights, len(tensors))
    return _fill("weighted_sum", tensors, numbers, out=out, dtype=dtype, threads=threads)


@overload
def task_vector(
    tensor: Tensor,
    base: Tensor,
    *,
    out: Tensor | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Tensor: ...
@overload
def task_vector(
    tensor: Any,
    base: Any,
    *,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> NDArray[Any]: ...
def task_vector(
    tensor: Any,
    base: Any,
    *,
    out: Any = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Any:
    """Return ``tensor - base``: what fine-tuning has changed.

    Parameters
    ----------
    tensor, base : array
        Of one shape.
    out, dtype, threads
        As for all kernels, see `oxmerge.kernels`. Where bfloat16 arrays are close, as fine-tunes
        are, their difference is exact in float32, but is rounded in bfloat16.

    Returns
    -------
    array
        Of the same shape.

    Notes
    -----
    One read of both and one write, at the speed of the memory. From "Editing Models with Task
    Arithmetic", https://arxiv.org/abs/2212.04089.

    Examples
    --------
    >>> import numpy as np
    >>> task_vector(np.float32([1, 2]), np.float32([1, 5]))
    array([ 0., -3.], dtype=float32)
    """
    names = ("tensor", "base")
    return _fill(
        "task_vector", [tensor, base], [], out=out, dtype=dtype, threads=threads, names=names
    )


@overload
def top_k_mask(
    tensor: Tensor,
    k: int,
    *,
    out: Tensor | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Tensor: ...
@overload
def top_k_mask(
    tensor: Any,
    k: int,
    *,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> NDArray[Any]: ...
def top_k_mask(
    tensor: Any,
    k: int,
    *,
    out: Any = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Any:
    """Return where the `k` elements of largest magnitude are, exactly.

    Of equal magnitudes those of lowest index are taken. NaN counts as the largest.

    Parameters
    ----------
    tensor : array
        Of floats.
    k : int
        From 0 to the number of elements.
    out, dtype, threads
        As for all kernels, see `oxmerge.kernels`; but the mask is of bool unless asked otherwise.

    Returns
    -------
    array
        True (1) for `k` elements, False (0) for the others.

    Notes
    -----
    Two to four reads, no sort, and no memory but for a few histograms. What TIES trims with:
    https://arxiv.org/abs/2306.01708.

    Examples
    --------
    >>> import numpy as np
    >>> top_k_mask(np.float32([0.5, -3, 2, -0.5]), 3)
    array([ True,  True,  True, False])
    """
    source = float_view(tensor, "tensor")
    if not 0 <= (k := whole(k, "k")) <= source.count:
        raise ValueError(f"k must be from 0 to {source.count}, the number of elements, not {k}")
    return _mask("top_k_mask", [source], [float(k)], out=out, dtype=dtype, threads=threads)


@overload
def row_top_k_mask(
    tensor: Tensor,
    k: int,
    *,
    every: int | None = None,
    out: Tensor | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Tensor: ...
@overload
def row_top_k_mask(
    tensor: Any,
    k: int,
    *,
    every: int | None = None,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> NDArray[Any]: ...
def row_top_k_mask(
    tensor: Any,
    k: int,
    *,
    every: int | None = None,
    out: Any = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Any:
    """Return where the `k` elements of largest magnitude of each row are, exactly.

    Of equal magnitudes those of lowest index are taken. NaN counts as the largest.

    Parameters
    ----------
    tensor : array
        Of floats. Rows are along the last dimension; an array of one dimension is one row.
    k : int
        At least 0; all of a row that has no more.
    every : int, optional
        Take the `k` largest of each so many elements of a row, counted from its first, instead of
        the whole row: n:m sparsity. The last elements of a row may be fewer.
    out, dtype, threads
        As for all kernels, see `oxmerge.kernels`; but the mask is of bool unless asked otherwise.

    Returns
    -------
    array
        True (1) for the elements taken, False (0) for the others.

    Notes
    -----
    One read; two where rows are longer than 65536. Each row is sorted once. The balanced sparsity
    of CABS: https://arxiv.org/abs/2503.01874.

    Examples
    --------
    >>> import numpy as np
    >>> row_top_k_mask(np.float32([0.5, -3, 2, -0.5]), 1, every=2)
    array([False,  True,  True, False])
    """
    source = float_view(tensor, "tensor")
    if (k := whole(k, "k")) < 0:
        raise ValueError(f"k must be at least 0, not {k}")
    numbers = [float(min(k, source.count)), _every(every, source)]
    return _mask("row_top_k_mask", [source], numbers, out=out, dtype=dtype, threads=threads)


@overload
def sign_consensus(
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    out: Tensor | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Tensor: ...
@overload
def sign_consensus(
    tensors: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> NDArray[Any]: ...
def sign_consensus(
    tensors: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    out: Any = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Any:
    """Return the sign that the tensors elect, element by element.

    Parameters
    ----------
    tensors : sequence of array
        Of one shape; task vectors, as a rule.
    weights : sequence of float, optional
        One finite number for each; 1 unless given.
    out, dtype, threads
        As for all kernels, see `oxmerge.kernels`.

    Returns
    -------
    array
        1 or -1: the sign of the weighted sum, zero counting as positive. NaN where the sum is.

    Notes
    -----
    One read of each tensor. The vote of TIES: https://arxiv.org/abs/2306.01708.

    Examples
    --------
    >>> import numpy as np
    >>> sign_consensus([np.float32([1, -2, 0]), np.float32([1, 1, 0])])
    array([ 1., -1.,  1.], dtype=float32)
    """
    tensors = listed(tensors)
    numbers = _weights([1] * len(tensors) if weights is None else weights, len(tensors))
    return _fill("sign_consensus", tensors, numbers, out=out, dtype=dtype, threads=threads)


@overload
def random_mask(
    shape: int | Sequence[int],
    density: float,
    *,
    seed: int = 0,
    name: str = "",
    position: int = 0,
    out: None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def random_mask(
    shape: int | Sequence[int],
    density: float,
    *,
    seed: int = 0,
    name: str = "",
    position: int = 0,
    out: Out,
    dtype: Any = None,
    threads: int | None = None,
) -> Out: ...
def random_mask(
    shape: int | Sequence[int],
    density: float,
    *,
    seed: int = 0,
    name: str = "",
    position: int = 0,
    out: Any = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Any:
    """Return a mask that keeps each element with probability `density`.

    The same arguments give the same mask on every machine: the one that DARE draws in a merge with
    this seed, for the tensor of this name and the model at this position.

    Parameters
    ----------
    shape : int or sequence of int
        Of the mask.
    density : float
        From 0 to 1.
    seed : int
        From 0 to 2**64 - 1.
    name : str
        The tensor's name.
    position : int
        The model's position among those that are not the base, from 0.
    out, dtype, threads
        As for all kernels, see `oxmerge.kernels`; but the mask is of bool unless asked otherwise,
        and a NumPy array unless `out` is another.

    Returns
    -------
    array
        True (1) where an element is kept, else False (0).

    Notes
    -----
    One write, no read, and no memory besides. Philox4x32-10, a counter-based generator ("Parallel
    Random Numbers: As Easy as 1, 2, 3", https://doi.org/10.1145/2063384.2063405), drawn as in
    "Language Models are Super Mario", https://arxiv.org/abs/2311.03099.

    Examples
    --------
    >>> random_mask(8, 0.5, seed=3, name="w")
    array([False,  True, False, False,  True,  True, False, False])
    """
    if not 0 <= (density := finite(density, "density")) <= 1:
        raise ValueError(f"density must be from 0 to 1, not {density}")
    position = _position(position)
    shape = _shape(shape)
    check_options(seed, threads, name)
    code = element_type(dtype, MASKS)
    target = None if out is None else output(out)
    if target is None:
        target = empty(shape, code or "BOOL", "numpy")
    check_out(target, shape, code or _mask_type(target))
    numbers = [density, float(position)]
    mark_overwritten(target.array)
    _core.fill_array("random_mask", [], target.exporter, shape, numbers, name, seed, threads)
    return target.given


@overload
def random_mask_by_rank(
    tensor: Tensor,
    probabilities: tuple[float, float],
    *,
    seed: int = 0,
    name: str = "",
    position: int = 0,
    out: Tensor | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Tensor: ...
@overload
def random_mask_by_rank(
    tensor: Any,
    probabilities: tuple[float, float],
    *,
    seed: int = 0,
    name: str = "",
    position: int = 0,
    out: NDArray[Any] | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> NDArray[Any]: ...
def random_mask_by_rank(
    tensor: Any,
    probabilities: tuple[float, float],
    *,
    seed: int = 0,
    name: str = "",
    position: int = 0,
    out: Any = None,
    dtype: Any = None,
    threads: int | None = None,
) -> Any:
    """Return a mask that keeps large elements of a row with a higher probability than small ones.

    The probability rises in even steps from the smallest magnitude to the largest; of equal ones
    that of lowest index is the largest. The same arguments give the same mask on every machine: the
    one that DELLA draws in a merge with this seed, for the tensor of this name and the model at
    this position, where `tensor` is its task vector in float32.

    Parameters
    ----------
    tensor : array
        Of floats. Rows are along the last dimension; an array of one dimension is one row.
    probabilities : pair of float
        Those of the smallest and of the largest of a row, from 0 to 1. An element that is alone has
        the mean of both. For DELLA they are density - epsilon and density + epsilon.
    seed, name, position
        As for `random_mask`.
    out, dtype, threads
        As for all kernels, see `oxmerge.kernels`; but the mask is of bool unless asked otherwise.

    Returns
    -------
    array
        True (1) where an element is kept, else False (0).

    Notes
    -----
    One read; two where rows are longer than 65536. Each row is sorted once. From "DELLA-Merging",
    https://arxiv.org/abs/2406.11617.

    Examples
    --------
    >>> import numpy as np
    >>> random_mask_by_rank(np.float32([[3, 1, -2], [1, 2, 3]]), (0, 1), seed=1)
    array([[ True, False, False],
           [False, False,  True]])
    """
    source = float_view(tensor, "tensor")
    lowest, highest = (finite(each, "probabilities") for each in probabilities)
    if not (0 <= lowest <= 1 and 0 <= highest <= 1):
        raise ValueError(f"probabilities must be from 0 to 1, not {lowest} and {highest}")
    numbers = [lowest, highest, float(_position(position))]
    options = {"out": out, "dtype": dtype, "threads": threads}
    return _mask("random_mask_by_rank", [source], numbers, draws=(name, seed), **options)


@overload
def convert(
    tensor: Tensor, dtype: Any, *, out: Tensor | None = None, threads: int | None = None
) -> Tensor: ...
@overload
def convert(
    tensor: Any, dtype: Any, *, out: NDArray[Any] | None = None, threads: int | None = None
) -> NDArray[Any]: ...
def convert(tensor: Any, dtype: Any, *, out: Any = None, threads: int | None = None) -> Any:
    """Return the array in another float type, rounded to nearest even.

    Parameters
    ----------
    tensor : array
        Of floats.
    dtype : str or dtype
        float16, bfloat16, float32 or float64.
    out, threads
        As for all kernels, see `oxmerge.kernels`.

    Returns
    -------
    array
        Of the same shape. NaN becomes the canonical NaN, unless the type stays the same.

    Notes
    -----
    One read and one write, at the speed of the memory. Rounded once as IEEE 754 has it, also from
    float64.

    Examples
    --------
    >>> import numpy as np
    >>> convert(np.float32([1, 65520]), "float16")
    array([ 1., inf], dtype=float16)
    >>> convert(np.float16([1, 0.1]), "float64")
    array([1.        , 0.09997559])
    """
    code = element_type(dtype)
    if code is None:
        raise TypeError("dtype must be given")
    return _fill("convert", [tensor], [], out=out, dtype=code, threads=threads, names=("tensor",))


def _weights(weights: Sequence[float], count: int) -> list[float]:
    given = listed(weights, "weights", "numbers")
    if len(given) != count:
        raise ValueError(f"there are {len(given)} weights for {count} tensors; give one for each")
    return [finite(weight, f"weights[{at}]") for at, weight in enumerate(given)]


def _position(position: int) -> int:
    if not 0 <= (position := whole(position, "position")) < 1 << 32:
        raise ValueError(f"position must be from 0 to 2**32 - 1, not {position}")
    return position


def _every(every: int | None, source: View) -> float:
    """Return how many elements of a row are ranked together; 0 for all."""
    if every is None:
        return 0.0
    if (every := whole(every, "every")) < 1:
        raise ValueError(f"every must be at least 1, not {every}")
    return float(min(every, max(source.count, 1)))


def _shape(shape: Any) -> tuple[int, ...]:
    lengths = [shape] if hasattr(shape, "__index__") and not hasattr(shape, "__len__") else shape
    return tuple(whole(length, "shape") for length in listed(lengths, "shape", "whole numbers"))


def _fill(
    piece: str,
    tensors: Sequence[Any],
    numbers: list[float],
    *,
    out: Any,
    dtype: Any,
    threads: int | None,
    names: Sequence[str] = (),
) -> Any:
    if not tensors:
        raise ValueError("there is no tensor")
    names = names or [f"tensors[{at}]" for at in range(len(tensors))]
    if isinstance(tensors[0], list | tuple):
        return _Lists(piece, tensors, names, numbers, threads).fill(out, element_type(dtype))
    inputs = [float_view(each, name) for each, name in zip(tensors, names, strict=True)]
    target = None if out is None else output(out)
    code = _result_type(inputs, names, target, element_type(dtype))
    return _run(piece, inputs, numbers, target, code, threads)


def _result_type(
    inputs: Sequence[View],
    names: Sequence[str],
    target: View | None,
    code: str | None,
    what: str = "out",
) -> str:
    """Return the type of the result of inputs, which must be of one shape."""
    check_same_shape(inputs, names)
    if code is None:
        code = promoted(inputs) if target is None else target.code
        if not is_float(code):
            raise TypeError(f"{what} is of {code}; pass one of floats")
    return code


class _Lists:
    """A piece of many arrays in one call: a list for each of its inputs."""

    def __init__(
        self,
        piece: str,
        lists: Sequence[Any],
        names: Sequence[str],
        numbers: list[float],
        threads: int | None,
    ) -> None:
        check_options(0, threads)
        count = len(lists[0])
        for each, name in zip(lists, names, strict=True):
            self._check(each, name, names[0], count)
        self._lists = [list(each) for each in lists]
        self._names = names
        self._call = piece
        self._rest = (numbers, threads)

    def fill(self, out: Any, code: str | None) -> Any:
        """Compute it into `out`, or into a new list."""
        if out is None:
            return self._fill_one_by_one([None] * len(self._lists[0]), code)
        self._check(out, "out", self._names[0], len(self._lists[0]))
        outs = list(out)
        if code is None:
            # Nearly always all is as the engine takes it, and looked at there.
            mark_overwritten(*outs)
            with suppress(BufferError, TypeError, ValueError):
                _core.fill_arrays(self._call, self._lists, outs, *self._rest)
                return out
        self._fill_one_by_one(outs, code)
        return out

    def _check(self, each: Any, name: str, first: str, count: int) -> None:
        if not isinstance(each, list | tuple):
            kind = type(each).__name__
            raise TypeError(f"{name} is a {kind}, and {first} a list of arrays; pass lists for all")
        if len(each) != count:
            message = f"{name} has {len(each)} arrays, and {first} {count}"
            raise ValueError(f"{message}; give lists of one length")

    def _fill_one_by_one(self, outs: Sequence[Any], code: str | None) -> list[Any]:
        """Look at each array for itself: to convert it, or to say what is wrong with it."""
        exporters: list[list[Any]] = [[] for _ in self._lists]
        targets = []
        for at, (out, *arrays) in enumerate(zip(outs, *self._lists, strict=True)):
            names = [f"{name}[{at}]" for name in self._names]
            inputs = [float_view(each, name) for each, name in zip(arrays, names, strict=True)]
            what = f"out[{at}]"
            target = None if out is None else output(out, what)
            wanted = _result_type(inputs, names, target, code, what)
            first = inputs[0]
            if target is None:
                target = empty(first.shape, wanted, first.kind)
            check_out(target, first.shape, wanted, what)
            targets.append(target)
            for exporter, each in zip(exporters, inputs, strict=True):
                exporter.append(each.exporter)
        mark_overwritten(*(target.array for target in targets))
        _core.fill_arrays(self._call, exporters, [each.exporter for each in targets], *self._rest)
        return [target.given for target in targets]


def _mask(
    piece: str,
    inputs: list[View],
    numbers: list[float],
    *,
    out: Any,
    dtype: Any,
    threads: int | None,
    draws: tuple[str, int] = ("", 0),
) -> Any:
    code = element_type(dtype, MASKS)
    target = None if out is None else output(out)
    if code is None:
        code = "BOOL" if target is None else _mask_type(target)
    return _run(piece, inputs, numbers, target, code, threads, draws)


def _mask_type(target: View) -> str:
    if target.code not in MASKS:
        raise TypeError(f"out is of {target.code}; pass one of bool or floats")
    return target.code


def _run(
    piece: str,
    inputs: list[View],
    numbers: list[float],
    target: View | None,
    code: str,
    threads: int | None,
    draws: tuple[str, int] = ("", 0),
) -> Any:
    name, seed = draws
    check_options(seed, threads, name)
    first = inputs[0]
    if target is None:
        target = empty(first.shape, code, first.kind)
    check_out(target, first.shape, code)
    exporters = [each.exporter for each in inputs]
    mark_overwritten(target.array)
    _core.fill_array(piece, exporters, target.exporter, first.shape, numbers, name, seed, threads)
    return target.given
