"""Element types, and the rows of a plan's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import overload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oxmerge import _core
    from oxmerge.recipe.recipe import Scalar

__all__ = [
    "DTYPE_NAMES",
    "DTYPE_SIZES",
    "FLOATS",
    "OutputTensor",
    "SourceTensor",
    "Tensors",
    "is_float",
]

#: Element types: by their safetensors names, what NumPy, torch and recipes call them.
DTYPE_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16",
    "BF16": "bfloat16", "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64",
    "I64": "int64", "F64": "float64",
}  # fmt: skip
#: Bytes an element.
DTYPE_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
#: Those on which arithmetic is done.
FLOATS = ("F16", "BF16", "F32", "F64")


def is_float(dtype: str) -> bool:
    """Tell whether arithmetic is done on an element type. Others are copied when identical."""
    return dtype in FLOATS


def promote(one: str, other: str) -> str:
    """Return the smallest float type that holds both exactly (``BF16`` with ``F16``: ``F32``)."""
    if one == other:
        return one
    return "F64" if "F64" in (one, other) else "F32"


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One input of an output tensor.

    Attributes
    ----------
    model : str
        The model it belongs to, as the recipe writes it.
    name : str
        The name it has there.
    dtype : str
        Its element type.
    file : int
        Index into the plan's files.
    start : int
        First byte in that file.
    parameters : dict
        The method's parameters for this input.
    by_token : bool
        Whether its rows are taken by token, some perhaps from other inputs; then `file` and `start`
        are those of its own tensor, and `dtype` is the type of the rows that are taken.
    is_adapted : bool
        Whether an adapter changes it.
    """

    model: str
    name: str
    dtype: str
    file: int
    start: int
    parameters: dict[str, Scalar]
    by_token: bool = False
    is_adapted: bool = False


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One output tensor.

    Attributes
    ----------
    name : str
        Its name.
    shape : tuple of int
        Its shape, which is also that of every source.
    dtype : str
        Its element type.
    sources : tuple of SourceTensor
        What it is made of, in listed order.
    base : int, optional
        Which source is the base model's.
    parameters : dict
        The method's shared parameters.
    origin : dict, optional
        Where in the recipe the parameters come from: ``slice``, ``shared`` and ``own``.
    shard : int
        Index into the plan's shards.
    start : int
        First byte in the shard file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[SourceTensor, ...]
    base: int | None
    parameters: dict[str, Scalar]
    origin: dict[str, Any] | None = None
    shard: int = 0
    start: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the output."""
        return self.elements * DTYPE_SIZES[self.dtype]

    @property
    def source_bytes(self) -> int:
        """Bytes of all sources."""
        return self.elements * sum(DTYPE_SIZES[source.dtype] for source in self.sources)


class Tensors(Sequence[OutputTensor]):
    """The output tensors of a plan. Each is made when it is looked at.

    They are in the donor's order, which is that of the shards. Within a shard they lie otherwise
    where their sizes of element differ.
    """

    def __init__(self, table: _core.Plan) -> None:
        self._table = table

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> OutputTensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[OutputTensor]: ...
    def __getitem__(self, index: int | slice) -> OutputTensor | Sequence[OutputTensor]:
        """Return one, or several as a tuple."""
        if isinstance(index, slice):
            return tuple(self[at] for at in range(*index.indices(len(self))))
        row = self._table.row(range(len(self))[index])
        name, shape, dtype, shard, start, base, parameters, origin, sources = row
        return OutputTensor(
            name,
            shape,
            dtype,
            tuple(SourceTensor(*source) for source in sources),
            base,
            parameters,
            origin,
            shard,
            start,
        )

    def __repr__(self) -> str:
        """Tell what they are."""
        return f"<{len(self)} output tensors>"

    @property
    def names(self) -> list[str]:
        """Their names."""
        return self._table.names()

    def by_place(self) -> dict[str, int]:
        """Return the place here of each name, in file order."""
        return self._table.by_place()

    def find(self, name: str) -> OutputTensor | None:
        """Return the one of that name, if there is one."""
        at = self._table.find(name)
        return None if at is None else self[at]
