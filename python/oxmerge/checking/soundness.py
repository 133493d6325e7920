"""Whether a model is sound: `oxmerge.check`.

What headers and files show is in `headers.py`. The rest comes of one pass over the weights, which
finds a few numbers about each tensor (`rust/methods/measures.rs`), and of comparing the few tensors
whose numbers are equal.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from statistics import median

import numpy as np

from oxmerge.checking.headers import Found, about, embedding_of, head_of, look
from oxmerge.checking.measuring import BROKEN, Running, measure, open_models
from oxmerge.errors import PlanError, UnsupportedError
from oxmerge.models.places import layout_of, size_of
from oxmerge.output.config import says_tied
from oxmerge.problems import Findings, Problem, group_problems
from oxmerge.schema import is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from numpy.typing import NDArray

    from oxmerge.checking.measuring import Progress
    from oxmerge.models.inputs import InputModel

    PathLike = str | os.PathLike[str]

__all__ = ["Soundness", "check"]

#: Of the JSON form: it changes when a key goes or means something else.
SCHEMA = 1
#: Layers on either side that a norm is compared with, and how many there must be.
_AROUND = 4
_LEAST_AROUND = 4
#: How many times larger or smaller a norm may be: of matrices, and of vectors, which vary more.
_USUAL_MATRIX, _USUAL_VECTOR = 4.0, 16.0
#: And how many times farther off than the layers around it are among themselves.
_SPREAD = 6.0
_MATRIX = 2
#: Numbers that the engine finds about a tensor, and where the sum of squares is among them.
_WIDTH, _SQUARES = 7, 4


@dataclass(frozen=True, slots=True)
class Soundness:
    """What is wrong or odd about a model.

    Attributes
    ----------
    model : str
        The model, as it was named.
    errors : tuple of Problem
        It does not load, or gives no sense.
    warnings : tuple of Problem
        It is probably not as it was meant to be, or could do harm.
    notes : tuple of Problem
        It is unusual.
    tensors : int
        How many tensors it has.
    weights_read : bool
        Whether weights were looked at, and not only headers.
    """

    model: str
    errors: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    notes: tuple[Problem, ...]
    tensors: int
    weights_read: bool

    @property
    def is_sound(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    @property
    def verdict(self) -> str:
        """What it comes to, in one line."""
        counts = (("error", self.errors), ("warning", self.warnings), ("note", self.notes))
        found = [
            f"{len(problems)} {word}{'s' if len(problems) > 1 else ''}"
            for word, problems in counts
            if problems
        ]
        what = "sound" if self.is_sound else "not sound"
        where = "" if self.weights_read else "; weights were not read"
        return f"{what}: {', '.join(found) or 'nothing to tell'}{where}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data."""
        lists = {"errors": self.errors, "warnings": self.warnings, "notes": self.notes}
        return {
            "schema": SCHEMA,
            "model": self.model,
            "sound": self.is_sound,
            "verdict": self.verdict,
            "tensors": self.tensors,
            "weights_read": self.weights_read,
            **{name: [each.as_dict() for each in problems] for name, problems in lists.items()},
        }

    def __str__(self) -> str:
        """Return the verdict."""
        return f"{self.model}: {self.verdict}"


def check(
    model: PathLike,
    *,
    quick: bool = False,
    memory: int | str | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> Soundness:
    """Return what is wrong or odd about a model, from one pass over its files.

    Parameters
    ----------
    model : path
        The model: whatever a recipe may name as one.
    quick : bool
        Whether to look at headers and the files beside them only.
    memory : int or str, optional
        Bytes that the whole process may have resident, as for `oxmerge.merge`.
    threads : int, optional
        Six more than cores, unless given.
    progress : callable or bool, optional
        As for `oxmerge.merge`; ``bytes_done`` are bytes of the model.

    Returns
    -------
    Soundness
        Errors, warnings and notes. A checkpoint that is broken is an error among them.

    Raises
    ------
    PlanError
        If there is no such model; `UnsupportedError` if it is of a kind that cannot be read.
    MemoryBudgetError
        If the budget cannot hold one block of it.
    InputChangedError, OSError
        If a file changes, or cannot be read.
    """
    running = Running(memory, threads, progress)
    reference, findings = os.fspath(model), Findings()
    try:
        (opened,) = open_models([reference], findings, "cannot check")
    except PlanError as error:
        is_broken = error.problems and all(p.code in BROKEN for p in error.problems)
        if isinstance(error, UnsupportedError) or not is_broken:
            raise
        warnings = tuple(findings.warnings)
        return Soundness(reference, error.problems, warnings, (), tensors=0, weights_read=False)
    found = Found(warnings=list(findings.warnings))
    look(opened, found)
    if not quick:
        _Weights(opened, running).look(found)
    return Soundness(
        model=reference,
        errors=group_problems(found.errors),
        warnings=group_problems(found.warnings),
        notes=group_problems(found.notes),
        tensors=len(opened.checkpoint),
        weights_read=not quick,
    )


class _Weights:
    """Looks at numbers about every tensor of floats that has elements.

    Attributes
    ----------
    _tensors : list of TensorInfo
        Those tensors; the arrays have a number for each.
    _rows : array of float64
        What the engine has found about each.
    """

    def __init__(self, model: InputModel, running: Running) -> None:
        self._model, self._running = model, running
        self._checkpoint = model.checkpoint
        self._layout = layout_of(model)
        every = (self._checkpoint.tensor(at) for at in range(len(self._checkpoint)))
        floats = [
            (at, each) for at, each in enumerate(every) if is_float(each.dtype) and size_of(each)
        ]
        self._at = [at for at, _ in floats]
        self._tensors = [tensor for _, tensor in floats]

    def look(self, found: Found) -> None:
        """Add what is wrong or odd."""
        self._rows = np.empty((0, _WIDTH))
        if self._at:
            self._rows = measure(
                "soundness", [self._model], [(at,) for at in self._at], self._running
            )
        self._elements = np.array([size_of(tensor) for tensor in self._tensors], np.float64)
        numbers, finite, *_ = self._rows.T
        self._is_finite = finite == self._elements
        self._look_for(found, "NaN", self._elements - numbers)
        self._look_for(found, "infinite numbers", numbers - finite)
        self._look_at_constants(found)
        self._look_at_norms(found)
        self._look_for_copies(found)

    def _names(self, which: NDArray[np.bool_]) -> list[str]:
        return [self._tensors[at].name for at in np.flatnonzero(which)]

    def _look_for(self, found: Found, what: str, counts: NDArray[np.float64]) -> None:
        """Add that there are numbers that none should be, if so: of each tensor a count."""
        names = self._names(counts > 0)
        if names:
            advice = "the model gives nonsense: it was trained, merged or saved wrongly"
            of_them = f"{int(counts.sum())} of them"
            problem = about("non-finite", f"there are {what}", names, advice, found=of_them)
            found.errors.append(problem)

    def _look_at_constants(self, found: Found) -> None:
        *_, largest, negated = self._rows.T
        self._is_constant = largest == -negated
        constant = (self._elements > 1) & self._is_constant
        is_matrix = np.zeros(len(constant), bool)
        for at in np.flatnonzero(constant):
            shape = self._tensors[at].shape  # more than one row or column
            is_matrix[at] = sum(length > 1 for length in shape) >= _MATRIX
        advice = "if it is no fresh model, it was probably never trained, or got lost"
        for of_kind, told in ((is_matrix, found.warnings), (~is_matrix, found.notes)):
            zeros = self._names(constant & of_kind & (largest == 0))
            others = self._names(constant & of_kind & (largest != 0))
            if zeros:
                told.append(about("constant-tensor", "all zeros", zeros, advice))
            if others:
                message = "all elements are the same number"
                told.append(about("constant-tensor", message, others, advice))

    def _look_at_norms(self, found: Found) -> None:
        squares = self._rows[:, _SQUARES]
        is_known = self._is_finite & (squares > 0) & np.isfinite(squares)
        stacks: dict[tuple[str, str, bool], dict[int, int]] = {}
        for at in np.flatnonzero(is_known).tolist():
            tensor = self._tensors[at]
            place = self._layout.place(tensor.name)
            if place is not None and not place.is_extra:
                key = (place.stack.prefix, place.rest, len(tensor.shape) >= _MATRIX)
                stacks.setdefault(key, {})[place.layer] = at
        for (_, _, is_matrix), layers in stacks.items():
            sizes = {
                layer: math.log(squares[at] / self._elements[at]) / 2
                for layer, at in layers.items()
            }
            usual = math.log(_USUAL_MATRIX if is_matrix else _USUAL_VECTOR)
            if max(sizes.values()) - min(sizes.values()) <= usual:
                continue  # none is farther than that from those around it
            for layer, size in sizes.items():
                around = [
                    sizes[other]
                    for other in range(layer - _AROUND, layer + _AROUND + 1)
                    if other != layer and other in sizes
                ]
                if len(around) < _LEAST_AROUND:
                    continue
                middle = median(around)
                spread = median(abs(other - middle) for other in around)
                if abs(size - middle) > max(usual, _SPREAD * spread):
                    name = self._tensors[layers[layer]].name
                    found.warnings.append(self._odd_norm(name, size, middle))

    def _odd_norm(self, name: str, size: float, middle: float) -> Problem:
        return Problem(
            "odd-norm",
            "its numbers are far larger or smaller than in the layers around it",
            file=self._model.path,
            tensor=name,
            expected=f"about {math.exp(middle):.3g} (root of their mean square)",
            found=f"{math.exp(size):.3g}",
            advice="compare the model with the one it was made from: `oxmerge diff`",
        )

    # Copies: equal numbers are a hint, equal bits are the proof.

    def _look_for_copies(self, found: Found) -> None:
        pairs = list(self._layers_alike())
        heads = self._heads()
        candidates = [pair for _, _, pairs_of in pairs for pair in pairs_of] + heads
        if not candidates:
            return
        both = [self._model, self._model]
        rows = measure("difference", both, candidates, self._running)
        equal = {pair for pair, row in zip(candidates, rows, strict=True) if row[0] == 0}
        copies: dict[str, list[str]] = {}
        for layer, copy, pairs_of in pairs:
            if equal.issuperset(pairs_of):
                copies.setdefault(layer, []).append(copy)
        for layer, names in copies.items():
            problem = Problem(
                "equal-layers",
                f"layers are copies of `{layer}`: every tensor is the same, bit for bit",
                file=self._model.path,
                found=", ".join(f"`{name}`" for name in names),
                advice="if layers were not doubled by design, the model was put together wrongly",
            )
            found.warnings.append(problem)
        for head, embedding in heads:
            self._tell_of_head(head, embedding, found, is_equal=(head, embedding) in equal)

    def _layers_alike(self) -> Iterator[tuple[str, str, list[tuple[int, int]]]]:
        """Yield layers with the same numbers: both names, and the pairs of their tensors."""
        layers: dict[str, dict[str, int]] = {}
        for at, name in enumerate(self._checkpoint.names()):
            place = self._layout.place(name)
            if place is not None and not place.is_extra:
                layers.setdefault(f"{place.stack.prefix}.{place.layer}", {})[place.rest] = at
        numbers = {at: row for row, at in enumerate(self._at)}
        seen: dict[bytes, tuple[str, dict[str, int]]] = {}
        for name, parts in layers.items():
            # Layers that nothing has changed since they were begun are alike: norms of ones.
            if all(self._is_constant[numbers[at]] for at in parts.values() if at in numbers):
                continue
            first, like = seen.setdefault(self._print(parts, numbers), (name, parts))
            if first != name:
                yield first, name, [(like[rest], at) for rest, at in parts.items()]

    def _print(self, parts: dict[str, int], numbers: dict[int, int]) -> bytes:
        """Return what equal layers have in common: names, types, shapes and numbers."""
        digest = hashlib.sha256()
        for rest, at in sorted(parts.items()):
            info = self._checkpoint.tensor(at)
            digest.update(repr((rest, info.dtype, info.shape)).encode(errors="surrogatepass"))
            digest.update(self._rows[numbers[at]].tobytes() if at in numbers else b"")
        return digest.digest()

    def _heads(self) -> list[tuple[int, int]]:
        """Return head and embedding, if they could be equal."""
        head, embedding = head_of(self._model), embedding_of(self._model)
        if head is None or embedding is None:
            return []
        if (head.dtype, tuple(head.shape)) != (embedding.dtype, tuple(embedding.shape)):
            return []
        names = self._checkpoint.names()
        return [(names.index(head.name), names.index(embedding.name))]

    def _tell_of_head(self, head: int, embedding: int, found: Found, *, is_equal: bool) -> None:
        name, like = (self._checkpoint.tensor(at).name for at in (head, embedding))
        is_tied = says_tied(self._model.config)
        if is_equal and not is_tied:
            message = f"the head equals `{like}`, and the config does not tie them"
            advice = "`tie_word_embeddings: true` would save the bytes of one"
            found.notes.append(Problem("equal-head", message, tensor=name, advice=advice))
        if is_tied and not is_equal:
            message = f"a head is stored that the config ties to `{like}`, which is another"
            advice = "loaders use the embedding instead: set `tie_word_embeddings` to false"
            found.warnings.append(Problem("ignored-head", message, tensor=name, advice=advice))
