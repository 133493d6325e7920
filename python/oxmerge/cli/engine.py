"""What the verbs need from the rest of the package, as small protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast


class Snapshot(Protocol):
    """How far a merge has come."""

    @property
    def bytes_done(self) -> int:
        """Bytes of output written."""

    @property
    def bytes_total(self) -> int:
        """Bytes of output in all."""

    @property
    def bytes_read(self) -> int:
        """Bytes of input read."""

    @property
    def tensor(self) -> str:
        """The tensor that a worker took up last."""

    @property
    def peak_memory(self) -> int:
        """High-water mark of the process, in bytes."""


class MergeReport(Protocol):
    """What a merge did."""

    directory: Any
    tensors: int
    files: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory: int
    memory: int
    threads: int
    simd: str
    warnings: Sequence[object]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data."""


class PlanSummary(Protocol):
    """What a merge would do."""

    method: str
    tensors: int
    files: int
    bytes_read: int
    bytes_written: int
    disk: int
    memory: int
    warnings: Sequence[object]
    accounting: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data."""


class TensorEntry(Protocol):
    """A tensor of an open checkpoint."""

    name: str
    dtype: str
    shape: Sequence[int]
    file: Any
    start: int


class OpenCheckpoint(Protocol):
    """A checkpoint, opened from its headers."""

    tensors: Sequence[TensorEntry]
    files: Sequence[Any]
    warnings: Sequence[object]


Progress = Callable[[Snapshot], None]


class Engine(Protocol):
    """The functions of the package that the verbs call."""

    def merge(self, recipe: str, directory: str, **options: Any) -> MergeReport:  # noqa: ANN401
        """Merge, calling `options["progress"]` now and then."""

    def plan(self, recipe: str, **options: Any) -> PlanSummary:  # noqa: ANN401
        """Plan without merging."""

    def methods(self) -> Sequence[Mapping[str, Any]]:
        """Describe every merge method."""

    def open_checkpoint(self, path: str) -> OpenCheckpoint:
        """Open a checkpoint from its headers."""


class InstalledEngine:
    """The engine of the installed package, imported when first used."""

    def merge(self, recipe: str, directory: str, **options: Any) -> MergeReport:  # noqa: ANN401
        """Merge, calling `options["progress"]` now and then."""
        return cast("MergeReport", _package("oxmerge").merge(recipe, directory, **options))

    def plan(self, recipe: str, **options: Any) -> PlanSummary:  # noqa: ANN401
        """Plan without merging."""
        return cast("PlanSummary", _package("oxmerge").plan(recipe, **options))

    def methods(self) -> Sequence[Mapping[str, Any]]:
        """Describe every merge method."""
        return cast("Sequence[Mapping[str, Any]]", _package("oxmerge._core").methods())

    def open_checkpoint(self, path: str) -> OpenCheckpoint:
        """Open a checkpoint from its headers."""
        return cast("OpenCheckpoint", _package("oxmerge._core").open_checkpoint(path))


def _package(name: str) -> Any:  # noqa: ANN401
    return import_module(name)
