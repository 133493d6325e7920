import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

from oxmerge.torch_backend import Backend

__all__ = [
    "Checkpoint",
    "FileMap",
    "OnDemand",
    "Shard",
    "TensorInfo",
    "build_info",
    "check_plan",
    "check_unchanged",
    "compare_vocabularies",
    "execute",
    "fill_array",
    "fill_arrays",
    "formulas",
    "index_json",
    "is_remote",
    "lay_out",
    "merge_arrays",
    "methods",
    "numbers_of_arrays",
    "open_checkpoint",
    "partial_name",
    "predict",
    "rehearse",
    "ulp_distance",
]

# A contiguous object with the buffer protocol, or a tensor of torch; or a pair of that and an
# element type by its safetensors name, where its own is another of the same size.
_Array: TypeAlias = Any
# A formula: its nodes as JSON, and the functions that they call.
_Written: TypeAlias = tuple[str, list[tuple[Callable[..., Any], int | None]]]

@final
class TensorInfo:
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> int: ...
    @property
    def start(self) -> int: ...

@final
class Checkpoint:
    @property
    def path(self) -> str: ...
    @property
    def files(self) -> list[dict[str, Any]]: ...
    @property
    def index(self) -> dict[str, Any] | None: ...
    @property
    def tensors(self) -> list[TensorInfo]: ...
    @property
    def warnings(self) -> list[str]: ...
    def map(self, file: int, writable: bool) -> FileMap: ...

# Has the buffer protocol, which classes show from Python 3.12 on.
@final
class FileMap:
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Shard:
    def __new__(
        cls,
        descriptor: int,
        path: str | os.PathLike[str],
        name: str,
        header: str,
        size: int,
    ) -> Shard: ...
    def write(self, start: int, array: _Array) -> None: ...
    def finish(self) -> tuple[int, int, int, int]: ...

def build_info() -> dict[str, Any]: ...
def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint: ...
def compare_vocabularies(
    one: Sequence[str | os.PathLike[str]], other: Sequence[str | os.PathLike[str]], rows: int
) -> dict[str, Any] | None: ...
def methods() -> list[dict[str, Any]]: ...
def lay_out(
    tensors: Sequence[tuple[str, str, list[int]]], shard_size: int
) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]: ...
def index_json(tensors: Sequence[tuple[str, str, int]]) -> str: ...
def partial_name(file_name: str) -> str: ...
def check_plan(plan: str) -> list[dict[str, Any]]: ...
def check_unchanged(files: str) -> None: ...
def is_remote(path: str | os.PathLike[str]) -> bool: ...
def formulas(plan: str) -> list[str]: ...
def predict(
    plans: Sequence[str], memory: int, threads: int | None, device: Backend | None = None
) -> dict[str, Any]: ...
def rehearse(plan: str, threads: int | None, device: Backend | None) -> float: ...
def execute(
    merges: Sequence[tuple[str, str | os.PathLike[str]]],
    *,
    memory: int,
    threads: int | None = None,
    read_path: str = "auto",
    direct: bool = True,
    largest_piece: int | None = None,
    progress: Callable[[int, int, int, str, int], None] | None = None,
    device: Backend | None = None,
    descriptors: Sequence[int] | None = None,
) -> dict[str, Any]: ...
def merge_arrays(
    method: str | _Written,
    inputs: Sequence[_Array],
    base: int | None,
    out: _Array,
    shape: Sequence[int],
    shared: dict[str, Any],
    own: Sequence[dict[str, Any]],
    name: str,
    seed: int,
    threads: int | None,
) -> None: ...
def fill_array(
    piece: str,
    inputs: Sequence[_Array],
    out: _Array,
    shape: Sequence[int],
    numbers: Sequence[float],
    name: str,
    seed: int,
    threads: int | None,
) -> None: ...
def fill_arrays(
    piece: str,
    inputs: Sequence[Sequence[_Array]],
    outs: Sequence[_Array],
    numbers: Sequence[float],
    threads: int | None,
) -> None: ...
def numbers_of_arrays(
    piece: str,
    inputs: Sequence[_Array],
    elements: int,
    count: int,
    threads: int | None,
) -> list[float]: ...
def ulp_distance(a: _Array, b: _Array, threads: int | None) -> tuple[int, int]: ...

@final
class OnDemand:
    def __new__(cls, plan: str) -> OnDemand: ...
    def compute(self, index: int, out: _Array, threads: int | None) -> None: ...
