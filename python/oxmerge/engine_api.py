"""What planning and `inspect` ask of the engine, as types: of `_core`, or of a double in tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["Checkpoint", "Engine", "TensorInfo"]


class TensorInfo(Protocol):
    """A tensor as a checkpoint's header describes it."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> str:
        """Its element type, by its safetensors name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def file(self) -> int:
        """Index into the checkpoint's files."""

    @property
    def start(self) -> int:
        """First byte in that file."""


class Checkpoint(Protocol):
    """A checkpoint of which the headers have been read."""

    @property
    def path(self) -> str:
        """The directory or file it was opened at."""

    @property
    def files(self) -> Sequence[dict[str, Any]]:
        """Its files, as a plan lists them."""

    @property
    def index(self) -> dict[str, Any] | None:
        """Its index, as a plan lists files; None if it is a single file."""

    @property
    def tensors(self) -> Sequence[TensorInfo]:
        """Its tensors, in file order."""

    @property
    def warnings(self) -> Sequence[str]:
        """What is odd about it, but harmless."""


class Engine(Protocol):
    """The functions of the compiled module that planning calls."""

    def open_checkpoint(self, path: str) -> Checkpoint:
        """Read the headers of the checkpoint at `path`."""

    def methods(self) -> Sequence[dict[str, Any]]:
        """Describe every merge method."""

    def lay_out(
        self, tensors: list[tuple[str, str, list[int]]], shard_size: int
    ) -> tuple[Sequence[dict[str, Any]], Sequence[tuple[int, int]]]:
        """Group tensors of a name, element type and shape into shards; place each."""

    def check_plan(self, plan_json: str) -> Sequence[dict[str, Any]]:
        """Return what the method finds wrong with a plan."""
