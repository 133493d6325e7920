"""How two models differ: `oxmerge.diff`.

The engine finds the same numbers about each pair of tensors, in one pass over the files
(`rust/methods/measures.rs`). They are sums, so those of a layer, a module and the whole model are
sums of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from oxmerge.checking.measuring import Running, measure, open_models
from oxmerge.models.places import layout_of, place_of, size_of
from oxmerge.problems import Findings
from oxmerge.schema import is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from numpy.typing import NDArray

    from oxmerge._core import TensorInfo
    from oxmerge.checking.measuring import Progress, Row
    from oxmerge.models.inputs import InputModel

    PathLike = str | os.PathLike[str]
    Key = TypeVar("Key", str, tuple[str, str])

__all__ = ["Difference", "Numbers", "TensorDifference", "Unlike", "diff"]

#: Of the JSON form: it changes when a key goes or means something else.
SCHEMA = 1
#: Numbers that the engine finds about a pair of tensors.
_WIDTH = 9
#: Where in `Numbers` the elements of other bits stand, and the largest difference.
_STORED, _LARGEST = 1, 9


@dataclass(frozen=True, slots=True)
class Numbers:
    """How far tensors differ: of one, or of all of a layer, a module, a model.

    Differences are taken in float32 (in float64 if a tensor has it), and summed up in float64. One
    that is not finite, since an element is not, is left out and counted.

    Attributes
    ----------
    elements : int
        How many there are, floats and others.
    stored : int
        How many are stored as other bits; where types differ, how many have another number.
    changed : int
        How many have another number; 0 and -0 are one. Those left out are not among them.
    compared, left_out : int
        Of how many floats the difference is finite, and of how many it is not.
    squares : float
        The sum of squared differences.
    squares_of_a, squares_of_b, products : float
        The inner products of a with a, b with b, and a with b; with a base, of their task vectors.
    largest : float
        The largest difference, without its sign.
    flips : int
        How many elements have opposite signs in both; with a base, in their task vectors.
    """

    elements: int
    stored: int
    changed: int
    compared: int
    left_out: int
    squares: float
    squares_of_a: float
    squares_of_b: float
    products: float
    largest: float
    flips: int

    @property
    def rms(self) -> float:
        """The root of the mean squared difference; 0 where there is nothing to compare."""
        return math.sqrt(self.squares / self.compared) if self.compared else 0.0

    @property
    def relative(self) -> float | None:
        """The norm of the difference by that of a; None where a is zero and b is not.

        None also where something differs and nothing is a finite float, or where squares are beyond
        float64.
        """
        if self.squares == 0:
            return None if self.changed and not self.compared else 0.0
        return _finite(math.sqrt(self.squares / self.squares_of_a)) if self.squares_of_a else None

    @property
    def cosine(self) -> float | None:
        """The cosine between a and b; None where one is zero, or squares are beyond float64."""
        if self.squares == 0:
            return 1.0 if self.squares_of_a else None
        norms = math.sqrt(self.squares_of_a) * math.sqrt(self.squares_of_b)
        cosine = _finite(self.products / norms) if norms else None
        return None if cosine is None else max(-1.0, min(1.0, cosine))

    def as_dict(self) -> dict[str, Any]:
        """Return what people ask for, as data."""
        return {
            "elements": self.elements,
            "stored_differently": self.stored,
            "changed": self.changed,
            "left_out": self.left_out,
            "largest": _finite(self.largest),
            "rms": _finite(self.rms),
            "relative": _finite(self.relative),
            "cosine": _finite(self.cosine),
            "sign_flips": self.flips,
        }


class _Table:
    """The `Numbers` of many tensors, an array for each of their fields."""

    def __init__(self, elements: Sequence[int], found: NDArray[np.float64]) -> None:
        """Read what the engine found about pairs of tensors of so many elements."""
        stored, same, compared, squares, aa, bb, ab, largest, flips = found.T
        count = np.array(elements, np.int64)
        others = np.isnan(compared)  # no floats: only the bits can be compared
        is_read = ~others & (count > 0)
        left_out = np.where(is_read, count - _whole(compared), 0)
        changed = np.where(is_read, count - _whole(same), 0)
        bits = np.where(np.isnan(stored), changed + left_out, _whole(stored))
        changed = np.where(others, _whole(stored), changed)
        self._fields = [
            count,
            np.where(is_read | others, bits, 0),
            changed,
            np.where(is_read, _whole(compared), 0),
            left_out,
            *(np.where(is_read, each, 0.0) for each in (squares, aa, bb, ab, largest)),
            np.where(is_read, _whole(flips), 0),
        ]

    def __getitem__(self, index: int) -> Numbers:
        return Numbers(*(each[index].item() for each in self._fields))

    def changed(self, is_same_type: Sequence[bool]) -> int:
        """Return how many tensors have another type or other bits."""
        is_equal = np.array(is_same_type, bool) & (self._fields[_STORED] == 0)
        return int(np.count_nonzero(~is_equal))

    def by_group(self, groups: Sequence[int], count: int) -> list[Numbers]:
        """Return those of so many groups, given the group of each tensor; none is empty.

        The order of the tensors has no effect.
        """
        if not count:
            return []
        order = np.argsort(groups, kind="stable")
        ends = np.searchsorted(np.array(groups)[order], range(count), side="right")
        begins = np.concatenate([[0], ends[:-1]])
        parts = list(zip(begins.tolist(), ends.tolist(), strict=True))
        totals: list[list[Any]] = []
        for at, each in enumerate(self._fields):
            ordered = each[order]
            if at == _LARGEST:
                totals.append(np.maximum.reduceat(ordered, begins).tolist())
            elif each.dtype == np.int64:
                totals.append(np.add.reduceat(ordered, begins).tolist())
            else:
                values = ordered.tolist()
                totals.append([_exact_sum(values[begin:end]) for begin, end in parts])
        return [Numbers(*row) for row in zip(*totals, strict=True)]


def _whole(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.nan_to_num(values).astype(np.int64)


def _exact_sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # float64 whose squares are beyond it
        return float(sum(values))


_NOTHING = Numbers(0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How far one tensor differs.

    Attributes
    ----------
    name : str
        Its name in a.
    layer, module : str
        Where it is.
    dtypes : tuple of str
        Its element type in a and in b.
    shape : tuple of int
        Its shape.
    numbers : Numbers
        How far it differs.
    """

    name: str
    layer: str
    module: str
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    numbers: Numbers

    @property
    def is_equal(self) -> bool:
        """Whether all bits are the same."""
        return self.numbers.stored == 0 and self.dtypes[0] == self.dtypes[1]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data."""
        place = {"name": self.name, "layer": self.layer, "module": self.module}
        types = {"dtypes": list(self.dtypes), "shape": list(self.shape)}
        return {**place, **types, "equal": self.is_equal, **self.numbers.as_dict()}


class _Tensors(Sequence[TensorDifference]):
    """The tensors of both models: made when asked for, since there may be 100,000."""

    def __init__(self, models: Sequence[InputModel], pairs: _Pairs, table: _Table) -> None:
        self._checkpoints = [model.checkpoint for model in models]
        self._layout = layout_of(models[0])
        self._rows, self._table = pairs.rows, table

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TensorDifference: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TensorDifference]: ...
    def __getitem__(self, index: int | slice) -> TensorDifference | Sequence[TensorDifference]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at_a, at_b, *_ = self._rows[index]
        assert at_a is not None
        assert at_b is not None
        a, b = self._checkpoints[0].tensor(at_a), self._checkpoints[1].tensor(at_b)
        place, types = place_of(a.name, self._layout), (a.dtype, b.dtype)
        return TensorDifference(a.name, *place, types, tuple(a.shape), self._table[index])


@dataclass(frozen=True, slots=True)
class Unlike:
    """A tensor of both models that cannot be compared: its shape or its kind of type differs."""

    name: str
    a: tuple[str, tuple[int, ...]]
    b: tuple[str, tuple[int, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data."""
        sides = {"a": self.a, "b": self.b}
        described = {
            side: {"dtype": dtype, "shape": list(shape)} for side, (dtype, shape) in sides.items()
        }
        return {"name": self.name, **described}


@dataclass(frozen=True, slots=True)
class Difference:
    """How two models differ.

    Attributes
    ----------
    a, b : str
        The models, as they were named.
    base : str or None
        What is subtracted from both.
    tensors : sequence of TensorDifference
        The tensors that both have, in the order of a's files; not those in `not_in_base`.
    only_in_a, only_in_b : tuple of str
        Names of tensors that the other one lacks.
    unlike : tuple of Unlike
        Tensors of other shapes, or of types that cannot be compared.
    not_in_base : tuple of str
        Names of tensors of both that the base lacks, or has in another shape: they have no task
        vectors, so only `tensors` of a difference without a base has them.
    total : Numbers
        Of all `tensors`.
    layers, modules : dict of str to Numbers
        Of the tensors of each layer, and of each module in all layers.
    cells : dict of (str, str) to Numbers
        Of each module of each layer.
    changed : int
        How many `tensors` differ in a bit or in their type.
    is_equal : bool
        Whether both have the same tensors, bit for bit.
    warnings : tuple of Problem
        What is odd about the models.
    """

    a: str
    b: str
    base: str | None
    tensors: Sequence[TensorDifference]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    unlike: tuple[Unlike, ...]
    not_in_base: tuple[str, ...]
    total: Numbers
    layers: dict[str, Numbers]
    modules: dict[str, Numbers]
    cells: dict[tuple[str, str], Numbers]
    changed: int
    is_equal: bool
    warnings: tuple[object, ...]

    @property
    def has_equal_numbers(self) -> bool:
        """Whether both have the same tensors, number for number; types may differ."""
        whole = not (self.only_in_a or self.only_in_b or self.unlike or self.not_in_base)
        return self.is_equal or (whole and not self.total.changed and not self.total.left_out)

    @property
    def verdict(self) -> str:
        """What it comes to, in one line."""
        if self.is_equal:
            return "equal: the same tensors, bit for bit"
        if self.has_equal_numbers:
            return "the same numbers, stored as other bits"
        total = self.total
        share = total.changed / total.elements if total.elements else 0.0
        where = f"{self.changed} of {len(self.tensors)} tensors"
        return f"different: {where}, {share:.3g} of all elements" if self.changed else "different"

    def as_dict(self) -> dict[str, Any]:
        """Return everything but `tensors` as data."""
        return {
            "schema": SCHEMA,
            "a": self.a,
            "b": self.b,
            "base": self.base,
            "equal": self.is_equal,
            "equal_numbers": self.has_equal_numbers,
            "verdict": self.verdict,
            "total": self.total.as_dict(),
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "unlike": [each.as_dict() for each in self.unlike],
            "not_in_base": list(self.not_in_base),
            "layers": {name: numbers.as_dict() for name, numbers in self.layers.items()},
            "modules": {name: numbers.as_dict() for name, numbers in self.modules.items()},
            "warnings": [str(warning) for warning in self.warnings],
        }

    def __str__(self) -> str:
        """Return the verdict."""
        return f"{self.a} and {self.b}: {self.verdict}"


def diff(
    a: PathLike,
    b: PathLike,
    *,
    base: PathLike | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> Difference:
    """Return how two models differ, from one pass over their files.

    Parameters
    ----------
    a, b : path
        The models: whatever a recipe may name as one. Names that differ by a known conversion are
        matched as in a merge.
    base : path, optional
        A model whose tensors are subtracted from both: cosines, norms and sign flips are then of
        task vectors.
    memory : int or str, optional
        Bytes that the whole process may have resident, as for `oxmerge.merge`.
    threads : int, optional
        Six more than cores, unless given. No number depends on it.
    progress : callable or bool, optional
        As for `oxmerge.merge`; ``bytes_done`` are bytes of inputs.

    Returns
    -------
    Difference
        By tensor, layer and module.

    Raises
    ------
    PlanError
        If a model cannot be opened.
    MemoryBudgetError
        If the budget cannot hold one block of each model.
    InputChangedError, OSError
        If a file changes, or cannot be read.

    Examples
    --------
    >>> import oxmerge
    >>> found = oxmerge.diff("models/base", "models/base")  # doctest: +SKIP
    >>> found.is_equal, found.total.cosine  # doctest: +SKIP
    (True, 1.0)
    """
    running = Running(memory, threads, progress)
    findings = Findings()
    references = [os.fspath(each) for each in (a, b, base) if each is not None]
    models = open_models(references, findings, "cannot compare")
    pairs = _Pairs(models[0], models[1], models[2] if base is not None else None)
    found = measure("difference", models, pairs.rows, running)
    table = _Table(pairs.elements, found.reshape(len(pairs.rows), -1 if pairs.rows else _WIDTH))
    changed = table.changed(pairs.is_same_type)
    is_whole = not (pairs.only_in_a or pairs.only_in_b or pairs.unlike or pairs.not_in_base)
    layout = layout_of(models[0])
    places = [place_of(name, layout) for name in pairs.names]
    total = table.by_group([0] * len(places), 1)[0] if places else _NOTHING
    return Difference(
        a=references[0],
        b=references[1],
        base=references[2] if base is not None else None,
        tensors=_Tensors(models, pairs, table),
        only_in_a=tuple(pairs.only_in_a),
        only_in_b=tuple(pairs.only_in_b),
        unlike=tuple(pairs.unlike),
        not_in_base=tuple(pairs.not_in_base),
        total=total,
        layers=_grouped(table, [layer for layer, _ in places]),
        modules=_grouped(table, [module for _, module in places]),
        cells=_grouped(table, places),
        changed=changed,
        is_equal=is_whole and not changed,
        warnings=tuple(findings.warnings),
    )


def _grouped(table: _Table, keys: Sequence[Key]) -> dict[Key, Numbers]:
    """Return the numbers of all tensors that have a key, by keys in the order of the first."""
    numbers = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    groups = table.by_group([numbers[key] for key in keys], len(numbers))
    return dict(zip(numbers, groups, strict=True))


def _finite(number: float | None) -> float | None:
    """Return a number that JSON has: float64 may have squares that are beyond it."""
    return number if number is not None and math.isfinite(number) else None


class _Pairs:
    """Which tensors of two models belong together.

    Attributes
    ----------
    rows : list of tuple of int or None
        The number of each pair in a, in b and in the base.
    names : list of str
        What each is called in a.
    elements : list of int
        How many elements each pair has.
    is_same_type : list of bool
        Whether both have one element type.
    """

    def __init__(self, a: InputModel, b: InputModel, base: InputModel | None) -> None:
        self.rows: list[Row] = []
        self.names: list[str] = []
        self.elements: list[int] = []
        self.is_same_type: list[bool] = []
        self.only_in_a: list[str] = []
        self.unlike: list[Unlike] = []
        self.not_in_base: list[str] = []
        numbers = {name: at for at, name in enumerate(b.checkpoint.names())}
        of_base = {}
        if base is not None:
            of_base = {name: at for at, name in enumerate(base.checkpoint.names())}
        for at, name in enumerate(a.checkpoint.names()):
            other = numbers.pop(name, None)
            if other is None:
                self.only_in_a.append(name)
                continue
            pair = a.checkpoint.tensor(at), b.checkpoint.tensor(other)
            if not _can_compare(*pair):
                self.unlike.append(Unlike(name, _described(pair[0]), _described(pair[1])))
            elif base is None:
                self._add((at, other), *pair)
            elif not is_float(pair[0].dtype):
                self._add((at, other, None), *pair)
            elif self._is_in(base, of_base.get(name), pair[0]):
                self._add((at, other, of_base[name]), *pair)
            else:
                self.not_in_base.append(name)
        self.only_in_b = list(numbers)

    def _add(self, row: Row, a: TensorInfo, b: TensorInfo) -> None:
        self.rows.append(row)
        self.names.append(a.name)
        self.elements.append(size_of(a))
        self.is_same_type.append(a.dtype == b.dtype)

    @staticmethod
    def _is_in(base: InputModel, at: int | None, like: TensorInfo) -> bool:
        return at is not None and _can_compare(like, base.checkpoint.tensor(at))


def _can_compare(a: TensorInfo, b: TensorInfo) -> bool:
    is_alike = a.dtype == b.dtype or (is_float(a.dtype) and is_float(b.dtype))
    return is_alike and tuple(a.shape) == tuple(b.shape)


def _described(tensor: TensorInfo) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)
