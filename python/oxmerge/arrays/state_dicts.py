"""Merging dicts of tensors, name by name: into a new dict, or in place."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from typing import overload

from oxmerge.arrays.in_memory import MethodCall, check_options, check_out
from oxmerge.arrays.views import (
    View,
    check_same_shape,
    element_type,
    is_narrow,
    listed,
    output,
    view,
)
from oxmerge.problems import SHOWN_TENSORS, near, printable, shorten
from oxmerge.schema import is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, MutableMapping, Sequence
    from typing import Any, TypeVar

    from numpy.typing import NDArray

    from oxmerge.arrays.views import Place, Tensor
    from oxmerge.python_methods import PythonMethod

    Out = TypeVar("Out", bound=MutableMapping[str, Any])

__all__ = ["check_mapping", "merge_state_dicts"]

_INTEGERS = ("equal", "first")
#: Endings of what quantised weights are to be multiplied by.
_SCALES = ("_scale", "_scale_inv")


@overload
def merge_state_dicts(
    method: str | PythonMethod,
    state_dicts: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any] | None = None,
    *,
    out: Out,
    dtype: Any = None,
    integers: str = "equal",
    seed: int = 0,
    threads: int | None = None,
    **parameters: Any,
) -> Out: ...
@overload
def merge_state_dicts(
    method: str | PythonMethod,
    state_dicts: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    *,
    out: None = None,
    dtype: Any = None,
    integers: str = "equal",
    seed: int = 0,
    threads: int | None = None,
    **parameters: Any,
) -> dict[str, Tensor]: ...
@overload
def merge_state_dicts(
    method: str | PythonMethod,
    state_dicts: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any] | None = None,
    *,
    out: None = None,
    dtype: Any = None,
    integers: str = "equal",
    seed: int = 0,
    threads: int | None = None,
    **parameters: Any,
) -> dict[str, NDArray[Any]]: ...
def merge_state_dicts(
    method: str | PythonMethod,
    state_dicts: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any] | None = None,
    *,
    out: MutableMapping[str, Any] | None = None,
    dtype: Any = None,
    integers: str = "equal",
    seed: int = 0,
    threads: int | None = None,
    **parameters: Any,
) -> Any:
    """Merge dicts of arrays, tensor by tensor: the same bits as a merge of files.

    Parameters
    ----------
    method : str or PythonMethod
        A merge method: its name, of which ``oxmerge methods`` lists those there are, or what
        `oxmerge.method` made.
    state_dicts : sequence of mapping
        Arrays by name, as `merge_tensors` takes them: a model's ``state_dict()``, or a checkpoint
        that `oxmerge.open` opened, whose tensors are read when their turn comes. All have the same
        names.
    base : mapping, optional
        The base model, for methods that have one.
    out : mutable mapping, optional
        Whose arrays take the result, in place: one of the inputs, say, to average into it. It has
        the same names. Before the first write all names, types, shapes, outputs and integers are
        checked, and an error leaves `out` as it was. After that only what happens meanwhile can
        stop the merge (Ctrl-C, a mapping that fails to give a tensor): then the tensor in work is
        undefined, earlier ones are merged and later ones are not.
    integers : {"equal", "first"}
        What becomes of tensors of integers or bool: they must be equal, or those of
        ``state_dicts[0]`` are taken, such as ``num_batches_tracked`` of batch norms.
    dtype, seed, threads, **parameters
        As for `merge_tensors`; `dtype` acts on floats only.

    Returns
    -------
    dict
        Merged arrays by name, in the order of the base, else of the first; `out` if it was given.

    Raises
    ------
    ValueError
        With the names that one of them lacks; and as `merge_tensors` does, with the tensor's name.
    TypeError, PlanError
        As `merge_tensors` does.

    Notes
    -----
    With `out` each tensor is looked up twice, the first time for the check. Those of
    `oxmerge.lazy` are computed once, except integers, since the check takes their shapes and types
    from the headers; those of `oxmerge.open` are read once.

    Examples
    --------
    >>> import numpy as np
    >>> import oxmerge
    >>> average = {"w": np.float32([1, 2]), "step": np.int64([10])}
    >>> latest = {"w": np.float32([3, 6]), "step": np.int64([10])}
    >>> _ = oxmerge.merge_state_dicts(
    ...     "linear", [average, latest], weight=[0.75, 0.25], out=average
    ... )
    >>> average["w"]
    array([1.5, 3. ], dtype=float32)
    """
    sources = listed(state_dicts, "state_dicts", "mappings")
    labels = [f"state_dicts[{at}]" for at in range(len(sources))]
    if base is not None:
        sources.append(base)
        labels.append("base")
    has_base = base is not None
    call = MethodCall(method, len(sources) - has_base, parameters, has_base=has_base)
    call.names = labels
    if integers not in _INTEGERS:
        raise ValueError(f"integers must be one of {', '.join(_INTEGERS)}, not {integers!r}")
    check_options(seed, threads)
    for source, label in zip([*sources, out], [*labels, "out"], strict=True):
        check_mapping(source, label)
    donor = sources[-1] if has_base else sources[0]
    _check_names(donor, sources, labels, out)
    dicts = _Dicts(call, sources, element_type(dtype), takes_first=integers == "first")
    if out is None:
        return {name: dicts.merge(name, None, seed, threads) for name in donor}
    for name, target in dicts.checked(donor, out).items():
        dicts.merge(name, target, seed, threads)
    return out


class _Dicts:
    """Mappings that are merged name by name."""

    def __init__(
        self,
        call: MethodCall,
        sources: Sequence[Mapping[str, Any]],
        dtype: str | None,
        *,
        takes_first: bool,
    ) -> None:
        self._call = call
        self._copy = MethodCall("passthrough", 1, {}, has_base=False)
        self._sources = sources
        self._dtype = dtype
        self._takes_first = takes_first

    def merge(self, name: str, target: View | None, seed: int, threads: int | None) -> Any:
        """Merge the tensors of a name."""
        with _naming(name):
            call, inputs = self._chosen(self._views(name))
            return call.run(inputs, target, self._dtype, seed=seed, name=name, threads=threads)

    def checked(self, donor: Iterable[str], out: Mapping[str, Any]) -> dict[str, View]:
        """Return where the results go, without the names that share all arrays with earlier ones.

        Everything that is known before the first write is checked here.
        """
        targets: dict[str, View] = {}
        for name in donor:
            with _naming(name):
                targets[name] = output(out[name])
        written = _Written(targets.values())
        found = {}
        for name, target in targets.items():
            with _naming(name):
                call, inputs = self._chosen(self._views(name, only_headers=True))
                code = call.result_type(inputs, target, self._dtype)
                check_out(target, inputs[0].shape, code)
                if written.is_done(name, inputs, target):
                    continue
            if not is_float(code):
                self.merge(name, None, 0, None)  # raises where they differ
            found[name] = target
        return found

    def _chosen(self, inputs: list[View]) -> tuple[MethodCall, list[View]]:
        """Return what merges these tensors, and which of them it takes."""
        check_same_shape(inputs, self._call.names)
        if self._takes_first and not any(is_float(each.code) for each in inputs):
            return self._copy, inputs[:1]
        return self._call, inputs

    def _views(self, name: str, *, only_headers: bool = False) -> list[View]:
        return [
            (_header(source, name) if only_headers else None)
            or view(_unscaled(source, name), label)
            for source, label in zip(self._sources, self._call.names, strict=True)
        ]


def _unscaled(source: Mapping[str, Any], name: str) -> Any:
    """Return an array; raise TypeError where it means nothing without a scale beside it."""
    array = source[name]
    scale = next((name + each for each in _SCALES if name + each in source), None)
    if scale is not None and is_narrow(array):
        advice = "dequantise it to bfloat16 first"
        raise TypeError(f"it is of float8, and `{scale}` would not be applied to it; {advice}")
    return array


def _header(source: Any, name: str) -> View | None:
    """Return the shape and type of a tensor that would have to be computed, else None."""
    if not getattr(source, "is_computed", False):
        return None
    return View(None, source.dtype_of(name), source.shape_of(name), "numpy")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the name of a tensor before what is wrong with it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):  # knows the tensor already
            raise
        raise type(error)(f"tensor `{name}`: {error}") from None


class _Written:
    """What was written in place: tensors that share their memory must not be merged twice."""

    def __init__(self, targets: Iterable[View]) -> None:
        counts = Counter((*target.place, target.code) for target in targets)
        self._shared = {place for place, count in counts.items() if count > 1}
        # Holds the inputs: the memory of a temporary one would be handed out again.
        self._done: dict[tuple[int, int, str], list[View]] = {}
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._names: list[str] = []

    def is_done(self, name: str, inputs: list[View], target: View) -> bool:
        """Tell whether an earlier name had the same arrays; else note this one.

        Raises
        ------
        ValueError
            If the output or an input has memory that was overwritten, or they overlap.
        """
        place = start, length = target.place
        key = (*place, target.code)
        earlier = self._done.get(key)
        if earlier is not None and all(map(_is_same, earlier, inputs)):
            return True
        places = [each.place for each in inputs if each.array is not None]
        for each in (place, *places):
            self._check(each)
        for each in places:
            _check_overlap(each, place)
        if length:
            if key in self._shared:
                self._done[key] = inputs
            at = bisect_left(self._starts, start)
            self._starts.insert(at, start)
            self._ends.insert(at, start + length)
            self._names.insert(at, name)
        return False

    def _check(self, place: Place) -> None:
        start, length = place
        at = bisect_left(self._starts, start + length)
        if length and at and self._ends[at - 1] > start:
            raise ValueError(
                f"it shares memory with `{self._names[at - 1]}` of out, which is overwritten by "
                "then; give out arrays of its own, or leave one of the names out"
            )


def _is_same(one: View, other: View) -> bool:
    if one.array is None or other.array is None:
        return False
    return one.place == other.place and one.code == other.code


def _check_overlap(one: Place, out: Place) -> None:
    """Raise ValueError as the engine does, but before the first write."""
    start, end = max(one[0], out[0]), min(one[0] + one[1], out[0] + out[1])
    if start < end and one != out:
        raise ValueError(
            "out overlaps an input without being the same array; pass another out, or the input "
            "itself to overwrite it"
        )


def _some(missing: Sequence[str], source: Iterable[str]) -> str:
    """Return the first of the names that a mapping lacks, and what it may have instead."""
    names = ", ".join(f"`{shorten(name)}`" for name in missing[:SHOWN_TENSORS])
    more = len(missing) - SHOWN_TENSORS
    closest = near(missing[0], source, most=1)
    has = f" (it has `{shorten(closest[0])}`)" if closest else ""
    return printable(f"{names}{f' and {more} more' if more > 0 else ''}{has}")


def check_mapping(source: object, label: str) -> None:
    """Raise TypeError unless it is a mapping, or None."""
    if source is not None and not isinstance(source, Mapping):
        hint = "; pass its `state_dict()`" if hasattr(source, "state_dict") else ""
        hint = "; open it with `oxmerge.open`" if isinstance(source, str | os.PathLike) else hint
        kind = type(source).__name__
        raise TypeError(f"{label} must be a mapping of names to arrays, not a {kind}{hint}")


def _check_names(
    donor: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    out: Mapping[str, Any] | None,
) -> None:
    mappings = [donor, *sources, *([] if out is None else [out])]
    everything = dict.fromkeys(name for source in mappings for name in source)
    for name in everything:
        if not isinstance(name, str):
            raise TypeError(f"a name is {name!r}; names of tensors must be text")
    lacking = [
        f"{label} lacks {_some(missing, source)}"
        for source, label in zip([*sources, out], [*labels, "out"], strict=True)
        if source is not None and (missing := [name for name in everything if name not in source])
    ]
    if lacking:
        advice = "pass mappings with the same names"
        raise ValueError(f"the names differ: {'; '.join(lacking)}; {advice}")
