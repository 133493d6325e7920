"""Arrays of other packages: what counts as one, what the engine takes, what a result looks like.

- NumPy arrays of bool, integers, float16, float32 and float64, and of ``ml_dtypes.bfloat16``.
- torch tensors on the CPU, of the same types; those that require a gradient too, past autograd.
- float8 of ml_dtypes and of torch, as the bfloat16 of the same value: a copy, exact, since bfloat16
  has all of their numbers. Results are bfloat16 at least, and `out` cannot be float8. Scales kept
  beside quantised weights are not applied: in a dict, such weights are refused.
- Anything else with the buffer protocol or DLPack; results for it are NumPy arrays.

Contiguous arrays (in C order, as both packages make them) are used where they are. Others are
copied first, but an ``out`` is refused: the result would go to the copy.

Neither numpy nor torch is imported before an array shows that it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache
from math import prod

from oxmerge.problems import did_you_mean
from oxmerge.schema import DTYPE_NAMES, FLOATS, is_float, promote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, Literal, Protocol, TypeVar

    import numpy as np

    T = TypeVar("T")

    class _OfTorch(Protocol):
        def data_ptr(self) -> int: ...

    #: Tensors of torch, whose results are such; it need not be installed. Others' are of NumPy.
    Tensor = TypeVar("Tensor", bound=_OfTorch)

    Kind = Literal["numpy", "torch"]
    #: What safetensors calls them too.
    Framework = Literal["np", "numpy", "pt", "torch", "pytorch"]
    #: Address and bytes.
    Place = tuple[int, int]

__all__ = [
    "MASKS",
    "View",
    "check_same_shape",
    "element_type",
    "empty",
    "float_view",
    "is_narrow",
    "kind_of",
    "listed",
    "mark_overwritten",
    "numpy_dtype",
    "output",
    "promoted",
    "view",
]

#: Element types by the names that NumPy and torch give them.
_CODES = {name: code for code, name in DTYPE_NAMES.items()}
#: Types whose every number is one of bfloat16. (Not so: float8_e8m0fnu, which is for scales alone.)
_NARROW = frozenset(
    f"float8_{name}"
    for name in ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")
)
_FRAMEWORKS: dict[str, Kind] = {
    "np": "numpy", "numpy": "numpy", "pt": "torch", "torch": "torch", "pytorch": "torch",
}  # fmt: skip
#: What a mask may be of.
MASKS = ("BOOL", *FLOATS)
#: Devices of DLPack whose memory is the CPU's; two are page-locked for GPUs.
_ON_CPU = frozenset((1, 3, 11))


class View:
    """An array, and what the engine takes for it.

    Attributes
    ----------
    array : object
        The array itself, or the contiguous copy of it; holds on to the memory.
    exporter : object
        What the engine gets the memory from: a contiguous object with the buffer protocol, or a
        tensor of torch; or a pair of that and an element type, where its own is another.
    code : str
        Its element type, by its safetensors name.
    shape : tuple of int
        Its shape.
    kind : str
        ``numpy`` or ``torch``: what a result for it is.
    given : object
        The array as the caller gave it: an `out` is handed back as it came.
    """

    __slots__ = ("array", "code", "exporter", "given", "kind", "shape")

    def __init__(
        self, array: Any, code: str, shape: tuple[int, ...], kind: Kind, exporter: Any = None
    ) -> None:
        self.array = self.given = array
        self.exporter = array if exporter is None else exporter
        self.code = code
        self.shape = shape
        self.kind: Kind = kind

    @property
    def count(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def place(self) -> Place:
        """Where its elements lie: to tell what shares memory, never to reach it."""
        array = self.array
        is_tensor = hasattr(array, "data_ptr")
        address = array.data_ptr() if is_tensor else array.__array_interface__["data"][0]
        return address, array.nbytes


def view(array: object, what: str) -> View:
    """Return what the engine takes for an input.

    Parameters
    ----------
    array : array
        Of any of the kinds above.
    what : str
        What to call it in a message, such as ``tensors[0]``.

    Raises
    ------
    TypeError
        If it is no array, or of a type that has no arithmetic here.
    ValueError
        If it is on another device than the CPU.
    """
    return _view(array, what, is_out=False)


def output(array: object, what: str = "out") -> View:
    """Return what the engine takes for an `out`, which must be writable and contiguous.

    Raises
    ------
    TypeError
        If it is no array.
    ValueError
        If it cannot be written to, or its elements do not follow each other.
    """
    return _view(array, what, is_out=True)


def _view(array: Any, what: str, *, is_out: bool) -> View:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(array, numpy.ndarray):
        return _numpy_view(array, what, is_out)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _torch_view(array, what, is_out)
    imported = _imported(array, what, is_out=is_out)
    is_torch = torch is not None and isinstance(imported, torch.Tensor)
    found = (_torch_view if is_torch else _numpy_view)(imported, what, is_out)
    found.given, found.kind = array, "numpy"
    return found


@lru_cache(64)
def _name_of(dtype: np.dtype[Any]) -> str:
    """Return what NumPy calls a type; it puts the name together anew each time."""
    return dtype.name if dtype.isnative else dtype.str


def _numpy_view(array: Any, what: str, is_out: bool) -> View:  # noqa: FBT001
    import numpy as np  # noqa: PLC0415

    name = _name_of(array.dtype)
    if name in _NARROW:
        if is_out:
            raise TypeError(_narrow_out(what, name))
        array = array.astype(numpy_dtype("BF16"))
        name = "bfloat16"
    code = _CODES.get(name)  # ml_dtypes calls its type bfloat16 too
    if code is None:
        raise TypeError(_unknown_type(what, name))
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array; fill it first (`.filled()`)")
    flags = array.flags
    if not flags.c_contiguous:
        if is_out:
            raise ValueError(_not_contiguous(what, f"numpy.ascontiguousarray({what})"))
        array = array.copy("C")
    if is_out and not flags.writeable:
        raise ValueError(f"{what} is read-only; pass an array that may be written to")
    return View(array, code, array.shape, "numpy", _numpy_exporter(array, code))


def _numpy_exporter(array: Any, code: str) -> Any:
    """Return what exports an array; of bfloat16 NumPy exports only the bits."""
    flat = array if array.shape else array.reshape(1)
    return (flat.view("u2"), code) if code == "BF16" else flat


@cache
def _torch_name(dtype: object) -> str:
    """Return what torch calls a type, which it too puts together anew."""
    return str(dtype).removeprefix("torch.")


def _torch_view(array: Any, what: str, is_out: bool) -> View:  # noqa: FBT001
    torch = sys.modules["torch"]
    code = _torch_codes().get(array.dtype)
    name = _torch_name(array.dtype)
    if array.device.type != "cpu":
        advice = "copy it to the CPU first (`.cpu()`), or merge files with `oxmerge merge`"
        raise ValueError(f"{what} is on the device `{array.device}`; {advice}")
    if code is None:
        raise TypeError(_unknown_type(what, name))
    _check_memory(array, what)
    if name in _NARROW:
        if is_out:
            raise TypeError(_narrow_out(what, name))
        array = array.detach().to(torch.bfloat16)
    if not is_out:
        array = array.resolve_neg().contiguous()
    elif array.is_neg():
        raise ValueError(f"{what} is a negated view; pass a tensor of its own, not negated")
    elif not array.is_contiguous():
        raise ValueError(_not_contiguous(what, f"{what}.contiguous()"))
    # A class of its own could say anything of its memory.
    plain = array if type(array) in _torch_classes() else array.as_subclass(torch.Tensor)
    return View(array, code, tuple(array.shape), "torch", plain)


@cache
def _torch_classes() -> tuple[type, type]:
    torch = sys.modules["torch"]
    return torch.Tensor, torch.nn.Parameter


def _check_memory(tensor: Any, what: str) -> None:
    """Raise an error unless every element lies in memory, which torch does not promise.

    A tensor may be many, sparse, fake, a wrapper around others, or have lost its storage.
    """
    if tensor.is_nested:
        raise TypeError(f"{what} is nested; merge its parts one by one (`.unbind()`)")
    if tensor.layout is not sys.modules["torch"].strided:
        raise TypeError(f"{what} is sparse; make it dense first (`.to_dense()`)")
    span = tensor.numel()
    if not span:
        return
    if not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((length - 1) * stride for length, stride in steps)
    try:
        held = tensor.untyped_storage().nbytes() if tensor.data_ptr() else 0
    except (RuntimeError, Warning):  # fake tensors warn, and warnings may be errors
        held = 0
    if held < (tensor.storage_offset() + span) * tensor.itemsize:
        raise ValueError(f"{what} has no memory of its own for its elements; materialise it first")


def mark_overwritten(*outs: Any) -> None:
    """Tell torch that arrays change: its backward passes refuse what was overwritten."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    increment = torch.autograd.graph.increment_version
    # By class, of which there are few: to ask each tensor takes longer than to change it.
    classes = set(map(type, outs))
    of_torch = {each for each in classes if issubclass(each, torch.Tensor)}
    if not of_torch:
        return
    is_all = len(of_torch) == len(classes)
    tensors = outs if is_all else [out for out in outs if type(out) in of_torch]
    try:
        increment(tensors)
    except TypeError:  # older ones take one at a time
        for tensor in tensors:
            increment(tensor)


def listed(tensors: Iterable[T], what: str = "tensors", item: str = "arrays") -> list[T]:
    """Return a sequence, a generator or a stacked array as a list.

    Raises
    ------
    TypeError
        If it is none of them, or a mapping.
    """
    kind = type(tensors).__name__
    if isinstance(tensors, Mapping):
        raise TypeError(f"{what} must be a sequence of {item}, not a {kind}")
    try:
        return list(tensors)
    except TypeError:
        raise TypeError(f"{what} must be a sequence of {item}, not a {kind}") from None


def _imported(array: Any, what: str, *, is_out: bool) -> Any:
    """Return an array of another package as one of NumPy or torch, without a copy."""
    import numpy as np  # noqa: PLC0415 - a buffer is looked at with it

    if hasattr(array, "__dlpack__"):
        return _over_dlpack(array, what, is_out=is_out)
    try:
        return np.asarray(memoryview(array))
    except (TypeError, ValueError):
        advice = "pass a NumPy array, a torch tensor, or something with a buffer or DLPack"
        raise TypeError(f"{what} is no array but a {type(array).__name__}; {advice}") from None


def _over_dlpack(array: Any, what: str, *, is_out: bool) -> Any:
    import numpy as np  # noqa: PLC0415 - knows DLPack

    if array.__dlpack_device__()[0] not in _ON_CPU:
        raise ValueError(f"{what} is not on the CPU; copy it there first")
    try:
        found = np.from_dlpack(array)
    except (BufferError, RuntimeError) as error:
        # torch knows bfloat16 there, but does not say what may be written to.
        torch = None if is_out else sys.modules.get("torch")
        if torch is not None:
            with suppress(BufferError, RuntimeError):
                return torch.from_dlpack(array)
        advice = "pass an array of NumPy or of torch"
        raise TypeError(f"{what} cannot be taken over DLPack: {error} {advice}") from error
    if is_out and not found.flags.writeable:
        advice = "which one older than 1.0 always is; pass an array of NumPy or of torch"
        raise ValueError(f"{what} is read-only over its DLPack, {advice}")
    return found


def _unknown_type(what: str, name: str) -> str:
    return f"{what} is of {name}, which is not supported; convert it to float32 or bfloat16"


def _narrow_out(what: str, name: str) -> str:
    return f"{what} is of {name}, and the result of bfloat16 at least; pass one of bfloat16"


def _not_contiguous(what: str, call: str) -> str:
    advice = f"write into a contiguous one, such as `{call}`, and copy from there"
    return f"the elements of {what} do not follow each other in memory; {advice}"


@cache
def _torch_codes() -> dict[Any, str]:
    torch = sys.modules["torch"]
    names = {**_CODES, **dict.fromkeys(_NARROW, "BF16")}
    # Older ones lack uint16 and the like.
    types = ((getattr(torch, name, None), code) for name, code in names.items())
    return {dtype: code for dtype, code in types if dtype is not None}


def element_type(dtype: Any, allowed: Sequence[str] = FLOATS) -> str | None:
    """Return the safetensors name of an element type that is asked for; None for None.

    Parameters
    ----------
    dtype : str or dtype, optional
        A name (``bfloat16``), or a type of NumPy, ml_dtypes or torch.
    allowed : sequence of str
        What it may be, by safetensors names.

    Raises
    ------
    TypeError
        If it is no element type, or none of those.

    Examples
    --------
    >>> import numpy as np
    >>> element_type("bfloat16"), element_type(np.float32)
    ('BF16', 'F32')
    """
    if dtype is None:
        return None
    if not isinstance(dtype, str):
        name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
        dtype = name.removeprefix("torch.")
    code = dtype if dtype in allowed else _CODES.get(dtype)
    if code in allowed:
        return code
    names = [DTYPE_NAMES[each] for each in allowed]
    advice = did_you_mean(dtype, names) or f"use one of {', '.join(names)}"
    raise TypeError(f"dtype cannot be {dtype!r}; {advice}")


def promoted(views: Sequence[View]) -> str:
    """Return the smallest type that holds the elements of all; of integers, the first one's."""
    code = views[0].code
    for each in views:
        if each.code != code:
            code = promote(code, each.code)
    return code


def is_narrow(array: Any) -> bool:
    """Tell whether an array is of a float8 that is taken as bfloat16."""
    name = str(getattr(array, "dtype", ""))  # of ml_dtypes and torch alike, but for the package
    return name.removeprefix("torch.") in _NARROW


def float_view(array: object, what: str) -> View:
    """Return what the engine takes for an input; raise TypeError unless it is of floats."""
    found = view(array, what)
    if is_float(found.code):
        return found
    advice = "convert it to floats first"
    if found.code == "U16":
        advice += ", or view its bits as what they are (`.view(ml_dtypes.bfloat16)`)"
    raise TypeError(f"{what} is of {found.code}; {advice}")


def check_same_shape(views: Sequence[View], names: Sequence[str]) -> None:
    """Raise ValueError unless all arrays have the shape of the first."""
    shape = views[0].shape
    for each, name in zip(views, names, strict=True):
        if each.shape != shape:
            advice = "all must be equal: reshape one, or leave it out"
            raise ValueError(f"{name} has the shape {each.shape}, and {names[0]} {shape}; {advice}")


def kind_of(framework: str) -> Kind:
    """Return what arrays are to be, by a name that safetensors has for it.

    Raises
    ------
    ValueError
        If there is no such framework here.
    ImportError
        If it is torch, and that is not installed.
    """
    kind = _FRAMEWORKS.get(framework) if isinstance(framework, str) else None
    if kind is None:
        names = ", ".join(_FRAMEWORKS)
        raise ValueError(f"framework must be one of {names}, not {framework!r}")
    if kind == "torch":
        try:
            import torch  # noqa: F401, PLC0415
        except ImportError as error:
            message = (
                f"framework={framework!r} needs torch, which is not installed: pip install torch"
            )
            raise ImportError(message) from error
    return kind


def empty(shape: tuple[int, ...], code: str, kind: Kind) -> View:
    """Return a new array of NumPy or of torch."""
    if kind == "torch":
        import torch  # noqa: PLC0415

        dtype = getattr(torch, DTYPE_NAMES[code])
        # On the CPU, whatever the default is.
        return View(torch.empty(shape, dtype=dtype, device="cpu"), code, shape, "torch")
    import numpy as np  # noqa: PLC0415

    array: Any = np.empty(shape, numpy_dtype(code))
    return View(array, code, shape, "numpy", _numpy_exporter(array, code))


@cache
def numpy_dtype(code: str) -> Any:
    """Return the NumPy type for a safetensors name.

    Examples
    --------
    >>> numpy_dtype("F32"), numpy_dtype("BF16")
    (dtype('float32'), dtype(bfloat16))
    """
    import numpy as np  # noqa: PLC0415

    if code == "BF16":
        import ml_dtypes  # noqa: PLC0415 - as heavy as NumPy

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(DTYPE_NAMES[code])
