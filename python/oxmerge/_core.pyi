import os
from collections.abc import Callable, Sequence
from typing import Any, final

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "build_info",
    "check_plan",
    "check_unchanged",
    "execute",
    "index_json",
    "lay_out",
    "methods",
    "open_checkpoint",
    "predict",
]

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
def check_plan(plan: str) -> list[dict[str, Any]]: ...
def check_unchanged(files: str) -> None: ...
def predict(plans: Sequence[str], memory: int, threads: int | None) -> dict[str, Any]: ...
def execute(
    merges: Sequence[tuple[str, str | os.PathLike[str]]],
    *,
    memory: int,
    threads: int | None = None,
    read_path: str = "auto",
    direct: bool = True,
    largest_piece: int | None = None,
    progress: Callable[[int, int, int, str, int], None] | None = None,
) -> dict[str, Any]: ...
