"""The plan as the engine reads it: the Python mirror of `rust/plan`, written as JSON.

Files and shards come from the engine and go back to it, so they stay the mappings that they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oxmerge.recipe import Scalar

__all__ = [
    "DTYPE_NAMES",
    "DTYPE_SIZES",
    "FLOATS",
    "PLAN_VERSION",
    "OutputTensor",
    "Plan",
    "SourceTensor",
    "is_float",
]

#: The version of the plan's schema.
PLAN_VERSION = 1

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
    """

    model: str
    name: str
    dtype: str
    file: int
    start: int
    parameters: dict[str, Scalar]

    def to_dict(self) -> dict[str, Any]:
        """Return it as it stands in the JSON."""
        return {
            "model": self.model,
            "name": self.name,
            "dtype": self.dtype,
            "file": self.file,
            "start": self.start,
            "parameters": self.parameters,
        }


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

    def placed(self, shard: int, start: int) -> OutputTensor:
        """Return it with its place in the output."""
        content = (self.name, self.shape, self.dtype, self.sources, self.base, self.parameters)
        return OutputTensor(*content, shard, start)

    def to_dict(self) -> dict[str, Any]:
        """Return it as it stands in the JSON."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "shard": self.shard,
            "start": self.start,
            "sources": [source.to_dict() for source in self.sources],
            "base": self.base,
            "parameters": self.parameters,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole merge: every output tensor, where its sources lie, and where it goes.

    Attributes
    ----------
    method : str
        The merge method's name.
    seed : int
        The seed of random masks.
    files : tuple of dict
        Every input file, as it was when it was first read: the weights of every model, and after
        them the configs and indexes.
    tensors : tuple of OutputTensor
        In the donor's order, which is that of the shards. Within a shard they lie otherwise where
        their sizes of element differ.
    shards : tuple of dict
        The output files, in order.
    in_f64 : bool
        Whether arithmetic is in f64 whatever the types are.
    version : int
        Of the schema.
    """

    method: str
    seed: int
    files: tuple[dict[str, Any], ...]
    tensors: tuple[OutputTensor, ...]
    shards: tuple[dict[str, Any], ...]
    in_f64: bool = False
    version: int = PLAN_VERSION

    @property
    def bytes_read(self) -> int:
        """Bytes of all sources."""
        return sum(tensor.source_bytes for tensor in self.tensors)

    @property
    def bytes_written(self) -> int:
        """Bytes of all output tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return it as it stands in the JSON."""
        return {
            "version": self.version,
            "method": self.method,
            "seed": self.seed,
            "files": list(self.files),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "shards": list(self.shards),
            "in_f64": self.in_f64,
        }

    def to_json(self) -> str:
        """Return the JSON that the engine reads."""
        return json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False)
