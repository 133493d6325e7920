"""What the verbs need from the rest of the package, as small protocols."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from oxmerge.cli.arguments import UsageError
from oxmerge.errors import OxmergeError
from oxmerge.problems import Problem
from oxmerge.references import resolve_reference


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
    device: str
    warnings: Sequence[object]
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data."""


class PlanSummary(Protocol):
    """What a merge would do; as text, for people."""

    @property
    def warnings(self) -> Sequence[object]:
        """What has no effect, and what is left out."""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data."""


class TensorEntry(Protocol):
    """A tensor of an open checkpoint."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> str:
        """Its element type, by its safetensors name."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""

    @property
    def file(self) -> int:
        """Index into the checkpoint's files."""

    @property
    def start(self) -> int:
        """First byte in that file."""


class OpenCheckpoint(Protocol):
    """A checkpoint, opened from its headers."""

    @property
    def tensors(self) -> Sequence[TensorEntry]:
        """Its tensors, in file order."""

    @property
    def files(self) -> Sequence[Mapping[str, Any]]:
        """Its files, each with a `path` at least."""

    @property
    def warnings(self) -> Sequence[object]:
        """What is odd about it, but harmless."""


Progress = Callable[[Snapshot], None]


class Engine(Protocol):
    """The functions of the package that the verbs call."""

    def merge(self, recipe: str, directory: str, **options: Any) -> MergeReport:  # noqa: ANN401
        """Merge, calling `options["progress"]` now and then."""

    def sweep(
        self,
        recipe: str,
        pattern: str,
        axes: Mapping[str, str],
        **options: Any,  # noqa: ANN401
    ) -> Sequence[MergeReport]:
        """Merge several times in one pass, calling `options["progress"]` now and then."""

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
        return cast("MergeReport", _package("oxmerge").merge(_file(recipe), directory, **options))

    def sweep(
        self,
        recipe: str,
        pattern: str,
        axes: Mapping[str, str],
        **options: Any,  # noqa: ANN401
    ) -> Sequence[MergeReport]:
        """Merge several times in one pass, calling `options["progress"]` now and then."""
        reports = _package("oxmerge").sweep(_file(recipe), pattern, axes, **options)
        return cast("Sequence[MergeReport]", reports)

    def plan(self, recipe: str, **options: Any) -> PlanSummary:  # noqa: ANN401
        """Plan without merging."""
        return cast("PlanSummary", _package("oxmerge").plan(_file(recipe), **options))

    def methods(self) -> Sequence[Mapping[str, Any]]:
        """Describe every merge method."""
        return cast("Sequence[Mapping[str, Any]]", _package("oxmerge._core").methods())

    def open_checkpoint(self, path: str) -> OpenCheckpoint:
        """Open a checkpoint from its headers."""
        found = resolve_reference(path, (os.curdir,))
        if isinstance(found, Problem):
            raise UsageError(found.message, found.advice)
        return cast("OpenCheckpoint", _package("oxmerge._core").open_checkpoint(path))


def _file(recipe: str) -> Path:
    """Return the path of a recipe, which is no text here, whatever it looks like."""
    path = Path(recipe)
    if path.is_dir() or not path.exists():
        what = "it is a directory" if path.is_dir() else "there is no such file"
        advice = "name a recipe file; `oxmerge demo` makes one to start from"
        raise UsageError(f"cannot read the recipe `{recipe}`: {what}", advice)
    return path


def _package(name: str) -> Any:  # noqa: ANN401
    try:
        return import_module(name)
    except ImportError as error:
        raise OxmergeError(
            f"the compiled part of oxmerge cannot be loaded: {error}",
            advice="install the package anew: `pip install --force-reinstall oxmerge`",
        ) from error
