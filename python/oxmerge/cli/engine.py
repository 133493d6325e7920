"""What the verbs call: the rest of the package, loaded when it is first needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import oxmerge
from oxmerge import _core
from oxmerge.cli.arguments import UsageError
from oxmerge.models.inputs import open_model
from oxmerge.models.references import (
    Located,
    error_of,
    open_located,
    resolve_reference,
    split_adapters,
)
from oxmerge.problems import Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import IO, Any

    from oxmerge._core import Checkpoint
    from oxmerge.checking.differences import Difference
    from oxmerge.checking.soundness import Soundness
    from oxmerge.checking.verification import Verification
    from oxmerge.merging import MergeReport, Snapshot
    from oxmerge.planning.plans import Plan

    Progress = Callable[[Snapshot], None]


class Engine:
    """The functions of the package that the verbs call, for paths as a command line has them."""

    def merge(self, recipe: str, directory: str, **options: Any) -> MergeReport:  # noqa: ANN401
        """Merge, calling `options["progress"]` now and then."""
        return oxmerge.merge(_recipe(recipe), directory, **options)

    def fuse(
        self,
        model: str,
        directory: str,
        adapters: Sequence[str],
        **options: Any,  # noqa: ANN401
    ) -> MergeReport:
        """Put adapters into a model, calling `options["progress"]` now and then."""
        return oxmerge.fuse(model, directory, adapters, **options)

    def join_adapters(self, directory: str, adapters: Sequence[str], **options: Any) -> list[str]:  # noqa: ANN401
        """Write several adapters as one."""
        return oxmerge.join_adapters(directory, adapters, **options)

    def sweep(
        self,
        recipe: str,
        pattern: str,
        axes: Mapping[str, str],
        **options: Any,  # noqa: ANN401
    ) -> Sequence[MergeReport]:
        """Merge several times in one pass, calling `options["progress"]` now and then."""
        return oxmerge.sweep(_recipe(recipe), pattern, axes, **options)

    def clean(self, directory: str) -> bool:
        """Remove what an interrupted merge has left; whether there was something."""
        return oxmerge.clean(directory)

    def plan(self, recipe: str, **options: Any) -> Plan:  # noqa: ANN401
        """Plan without merging."""
        return oxmerge.plan(_recipe(recipe), **options)

    def methods(self) -> Sequence[Mapping[str, Any]]:
        """Describe the built-in merge methods."""
        return _core.methods()

    def installed_methods(self) -> Sequence[Mapping[str, Any] | Problem]:
        """Describe the methods that installed packages offer; or say why one cannot be had."""
        from oxmerge.python_methods import installed  # noqa: PLC0415 - seldom needed

        return [each if isinstance(each, Problem) else each.row() for each in installed()]

    def find_method(self, name: str, allowed: Sequence[str]) -> Mapping[str, Any] | Problem | None:
        """Describe the method written in Python that is called so; or say why it cannot be had."""
        from oxmerge.python_methods import find_written  # noqa: PLC0415 - seldom needed

        found = find_written(name, allowed)
        return found if found is None or isinstance(found, Problem) else found.row()

    def diff(self, a: str, b: str, **options: Any) -> Difference:  # noqa: ANN401
        """Compare two models, calling `options["progress"]` now and then."""
        return oxmerge.diff(a, b, **options)

    def check(self, model: str, **options: Any) -> Soundness:  # noqa: ANN401
        """Look at a model, calling `options["progress"]` now and then."""
        return oxmerge.check(model, **options)

    def verify(self, directory: str, recipe: str | None, **options: Any) -> Verification:  # noqa: ANN401
        """Check an output, calling `options["progress"]` now and then."""
        given = None if recipe is None else _recipe(recipe)
        return oxmerge.verify(directory, recipe=given, **options)

    def locate(self, reference: str) -> Located:
        """Return where a model lies."""
        found = resolve_reference(reference, (os.curdir,))
        if not isinstance(found, Problem):
            return found
        if found.code == "unreachable-model":
            raise error_of(found)
        raise UsageError(found.message, found.advice)

    def open_checkpoint(self, reference: str) -> tuple[Located, Checkpoint]:
        """Open a checkpoint from its headers; also tell where it lies."""
        if split_adapters(reference, (os.curdir,))[1]:
            model = open_model(reference)
            return model.located, model.checkpoint
        located = self.locate(reference)
        return located, open_located(located)


def _recipe(recipe: str) -> Path | IO[bytes]:
    """Return the path of a recipe, which is no text here, whatever it looks like; - is a file."""
    if recipe == "-":
        if sys.stdin is None:
            raise UsageError("there is no standard input", "name a recipe file")
        return sys.stdin.buffer
    path = Path(recipe)
    if path.is_dir() or not path.exists():
        what = "it is a directory" if path.is_dir() else "there is no such file"
        advice = "name a recipe file; `oxmerge demo` makes one to start from"
        raise UsageError(f"cannot read the recipe `{recipe}`: {what}", advice)
    return path
