"""Opening models, and having the engine find numbers about their tensors."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from oxmerge import _core
from oxmerge.cli.progress import watched
from oxmerge.errors import PlanError
from oxmerge.merging import Snapshot, room
from oxmerge.models.fetching import fetch
from oxmerge.models.inputs import Inputs
from oxmerge.models.places import size_of
from oxmerge.options import RunOptions
from oxmerge.schema import DTYPE_SIZES
from oxmerge.sizes import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from oxmerge.models.inputs import InputModel
    from oxmerge.problems import Findings

    Progress = Callable[[Snapshot], None] | bool | None
    Report = Callable[[int, int, int, str, int], None]
    #: Of each model the number of a tensor, or none.
    Row = tuple[int | None, ...]

__all__ = ["BROKEN", "Running", "measure", "open_models", "reported"]


#: Codes of what is wrong with a model that is there, but cannot be opened.
BROKEN = frozenset(("unreadable-checkpoint", "unreadable-config"))


@dataclass(frozen=True, slots=True)
class Running:
    """How a pass over models runs; the parameters of `oxmerge.diff` of these names."""

    memory: int | str | None = None
    threads: int | None = None
    progress: Progress = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Raise `TypeError` or `ValueError` for what is out of range."""
        RunOptions(threads=self.threads, progress=self.progress)

    @property
    def room(self) -> int:
        """Bytes that the whole process may have resident."""
        return room(None if self.memory is None else parse_size(self.memory))


def open_models(references: Sequence[str], findings: Findings, failure: str) -> list[InputModel]:
    """Open models; the tensors of all have the names that they have in the first.

    Parameters
    ----------
    references : sequence of str
        What a recipe may name as a model.
    findings : Findings
        Takes what is odd about them.
    failure : str
        What cannot be done, for the error.

    Raises
    ------
    PlanError
        If some cannot be opened, with the reason of each.
    """
    inputs = Inputs((os.getcwd(),), {}, findings, references[0])
    models = [inputs.open(reference) for reference in references]
    opened = [model for model in models if model is not None]
    if len(opened) < len(models) or findings.problems:
        raise PlanError.of(failure, findings.problems, findings.warnings)
    return opened


def measure(
    what: str, models: Sequence[InputModel], rows: Sequence[Row], running: Running
) -> NDArray[np.float64]:
    """Return numbers about tensors, in one pass over them.

    Parameters
    ----------
    what : str
        The measure, one of those in ``rust/methods/measures.rs``.
    models : sequence of InputModel
        The models.
    rows : sequence of tuple of int or None
        For each thing to be measured, the number that the tensor has in each model.
    running : Running
        Memory, threads, progress.

    Returns
    -------
    array of float64
        Of shape (rows, numbers of the measure).

    Raises
    ------
    MemoryBudgetError
        If the budget cannot hold one block of every input.
    InputChangedError
        If a file changed meanwhile.
    OSError
        If a file cannot be read.
    """
    if not rows:
        return np.empty((0, 0))
    models = [_fetched(model) for model in models]
    with reported(running, partial(_bytes_of, models, rows)) as report:
        numbers = _core.measure(
            what,
            [(model.reference, model.checkpoint) for model in models],
            rows,
            memory=running.room,
            threads=running.threads,
            progress=report,
        )
    return np.frombuffer(numbers, np.float64).reshape(len(rows), -1)


def _fetched(model: InputModel) -> InputModel:
    """Return a model with its weights here: what is not is fetched into the Hub's cache."""
    absent = [file for file in model.checkpoint.files if file.get("remote")]
    if not absent:
        return model
    return replace(model, checkpoint=model.checkpoint.placed(fetch(absent)))


@contextmanager
def reported(running: Running, bytes_of_all: Callable[[], int]) -> Iterator[Report | None]:
    """Yield what the engine is to call, if anyone looks at progress: of the bytes of all inputs."""
    with watched(running.progress) as callback:
        total = 0 if callback is None else bytes_of_all()

        def report(read: int, _: int, tensors: int, current: str, peak: int) -> None:
            assert callback is not None
            # What is done is what was read; nothing else moves.
            callback(Snapshot(min(read, total), total, 0, tensors, current, peak))

        yield None if callback is None else report


def _bytes_of(models: Sequence[InputModel], rows: Sequence[Row]) -> int:
    total = 0
    for row in rows:
        for model, at in zip(models, row, strict=True):
            if at is not None:
                tensor = model.checkpoint.tensor(at)
                total += size_of(tensor) * DTYPE_SIZES[tensor.dtype]
    return total
