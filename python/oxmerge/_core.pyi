import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

from oxmerge.torch_backend import Backend

__all__ = [
    "Checkpoint",
    "OnDemand",
    "TensorInfo",
    "build_info",
    "check_plan",
    "check_unchanged",
    "execute",
    "fill_array",
    "index_json",
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

# Address, bytes, element type by its safetensors name.
# A formula: its nodes as JSON, and the functions that they call.
_Written: TypeAlias = tuple[str, list[tuple[Callable[..., Any], int | None]]]
_Array: TypeAlias = tuple[int, int, str]

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

def build_info() -> dict[str, Any]: ...
def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint: ...
def methods() -> list[dict[str, Any]]: ...
def lay_out(
    tensors: Sequence[tuple[str, str, list[int]]], shard_size: int
) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]: ...
def index_json(tensors: Sequence[tuple[str, str, int]]) -> str: ...
def partial_name(file_name: str) -> str: ...
def check_plan(plan: str) -> list[dict[str, Any]]: ...
def check_unchanged(files: str) -> None: ...
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
