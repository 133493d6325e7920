"""Merging what is in memory: tensors, and dicts of tensors. The engine is that of files."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from contextlib import contextmanager
from functools import cache

from oxmerge import _core
from oxmerge.arrays import (
    View,
    check_same_shape,
    element_type,
    empty,
    listed,
    mark_overwritten,
    output,
    promoted,
    view,
)
from oxmerge.methods import find_method, read_methods
from oxmerge.option_names import check_seed, check_threads
from oxmerge.parameters import KINDS, convert
from oxmerge.problems import Problem, did_you_mean
from oxmerge.schema import is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
    from typing import Any

    from oxmerge.arrays import Place
    from oxmerge.methods import Method, Parameter

    Parameters = Mapping[str, Any]

__all__ = ["merge_state_dicts", "merge_tensors"]

#: How Python writes a parameter whose name is a keyword.
_ALIASES = {"lambda_": "lambda"}
_INTEGERS = ("equal", "first")


def merge_tensors(
    method: str,
    tensors: Sequence[Any],
    base: Any = None,
    *,
    out: Any = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
    **parameters: Any,
) -> Any:
    """Merge arrays in memory: the same bits as a merge of files with these tensors.

    Parameters
    ----------
    method : str
        A merge method; ``oxmerge methods`` lists them.
    tensors : sequence of array
        NumPy arrays, torch tensors on the CPU, or what has the buffer protocol or DLPack; all of
        the same shape. Contiguous ones are used where they are, others are copied first. Floats of
        different types may be mixed; arrays of integers or bool must be equal, and are copied.
    base : array, optional
        The base model's tensor, for methods that have one.
    out : array, optional
        Where the result goes: contiguous, of the same shape. It may be one of the inputs, which is
        then overwritten, but must not overlap one otherwise. After an error its content is
        undefined.
    dtype : str or dtype, optional
        The result's type: float16, bfloat16, float32 or float64. Otherwise that of `out`, or the
        smallest that holds all inputs. With bfloat16, ``uint16`` arrays are taken for raw bfloat16.
    seed : int
        Of the random masks that some methods draw, from 0 to 2**64 - 1.
    name : str
        The tensor's name in its model. **It chooses the random masks, together with `seed`**: where
        several tensors are merged with the same name, or with none, a method that draws at random
        (``dare_*``) drops the same elements of each. Give every tensor its own, or use
        `merge_state_dicts`, which does.
    threads : int, optional
        As many as there are cores, unless given; a small array takes one. Never changes a bit.
    **parameters
        The method's parameters: one value, or for those of each input one for each of `tensors`
        in a sequence. ``lambda`` is written ``lambda_``.

    Returns
    -------
    array
        `out`, or a new array of the first input's kind.

    Raises
    ------
    TypeError
        If something is no array, of a type without arithmetic, or the method has no such parameter.
    ValueError
        If shapes differ, an array is not on the CPU, or `out` cannot take the result.
    PlanError
        If the method cannot make sense of the parameters.

    Notes
    -----
    Costs one read of each input and one write for most methods; ``oxmerge methods NAME`` tells
    what else. The GIL is released, and Ctrl-C acts within a moment.

    Examples
    --------
    >>> import numpy as np
    >>> import oxmerge
    >>> a, b = np.float32([1, 2]), np.float32([3, 6])
    >>> oxmerge.merge_tensors("linear", [a, b], weight=[0.75, 0.25])
    array([1.5, 3. ], dtype=float32)
    >>> oxmerge.merge_tensors("task_arithmetic", [a, b], np.float32([1, 1]), weight=0.5, out=a)
    array([2., 4.], dtype=float32)
    """
    tensors = listed(tensors)
    plan = MethodCall(method, len(tensors), parameters, has_base=base is not None)
    code = element_type(dtype)
    inputs = [view(each, f"tensors[{at}]", code) for at, each in enumerate(tensors)]
    if base is not None:
        inputs.append(view(base, "base", code))
    target = None if out is None else output(out, code)
    return plan.run(inputs, target, code, seed=seed, name=name, threads=threads)


class MethodCall:
    """A method with its parameters, ready to be run on any number of tensors.

    Parameters
    ----------
    method : str
        Its name.
    others : int
        How many inputs there are besides the base.
    parameters : mapping
        As the caller gave them.
    has_base : bool
        Whether there is a base; it comes last among the inputs.
    """

    __slots__ = ("_base", "_method", "_own", "_shared", "names")

    def __init__(self, method: str, others: int, parameters: Parameters, *, has_base: bool) -> None:
        found = find_method(method, methods())
        if isinstance(found, Problem):
            raise _unknown(found)
        _check_counts(found, others, has_base=has_base)
        self._method = method
        self._base = others if has_base else None
        self._shared, self._own = _share_out(found, others, parameters, has_base=has_base)
        self.names = [f"tensors[{at}]" for at in range(others)]
        if has_base:
            self.names.append("base")

    def run(
        self,
        inputs: list[View],
        out: View | None,
        code: str | None,
        *,
        seed: int,
        name: str,
        threads: int | None,
    ) -> Any:
        """Merge one tensor; the arguments are those of `merge_tensors`."""
        check_same_shape(inputs, self.names)
        check_options(seed, threads)
        first = inputs[0]
        code = self.result_type(inputs, out, code)
        if out is None:
            out = empty(first.shape, code, first.kind, first.array)
        check_out(out, first.shape, code)
        mark_overwritten(out)
        _core.merge_arrays(
            self._method,
            [each.place for each in inputs],
            self._base,
            out.place,
            first.shape,
            self._shared,
            self._own,
            name,
            seed,
            threads,
        )
        return out.given

    def result_type(self, inputs: list[View], out: View | None, code: str | None) -> str:
        """Return the element type of the result."""
        types = {each.place[2] for each in inputs}
        floats = {each for each in types if is_float(each)}
        if len(floats) < len(types) and len(types) > 1:
            return self._refuse_types(inputs)
        if not floats:
            return inputs[0].place[2]
        if code is None:
            code = promoted(inputs) if out is None else out.place[2]
        return code

    def _refuse_types(self, inputs: list[View]) -> str:
        types = (
            f"{name} of {each.place[2]}" for name, each in zip(self.names, inputs, strict=True)
        )
        message = "only floats can be converted, and the types differ"
        raise TypeError(f"{message}: {', '.join(types)}; convert one of them first")


def check_options(seed: int, threads: int | None) -> None:
    """Raise TypeError or ValueError unless seed and threads are whole numbers in range."""
    check_seed(seed)
    check_threads(threads)


def check_out(out: View, shape: tuple[int, ...], code: str) -> None:
    """Raise ValueError unless `out` is of that shape and element type."""
    if out.shape != shape:
        raise ValueError(f"out has the shape {out.shape}, and the result {shape}")
    if out.place[2] != code:
        raise ValueError(f"out is of {out.place[2]}, and the result of {code}; pass another dtype")


@cache
def methods() -> dict[str, Method]:
    """Return every method by name."""
    return read_methods(_core.methods())


def _unknown(problem: Problem) -> ValueError:
    advice = "" if problem.advice is None else f"; {problem.advice}"
    return ValueError(problem.message + advice)


def _check_counts(method: Method, others: int, *, has_base: bool) -> None:
    name, count = method.name, others + has_base
    if has_base and method.base == "ignored":
        raise TypeError(f"{name} takes no base; put it among the tensors if it is to be merged")
    if not has_base and method.base == "required":
        raise TypeError(f"{name} needs a base: the tensor that the others were made from")
    if not method.others.allows(others):
        counts = method.others.of("tensor")
        raise TypeError(f"{name} takes {counts} besides the base, not {others}")
    if not method.inputs.allows(count):
        raise TypeError(f"{name} takes {method.inputs.of('tensor')}, not {count}")


def _share_out(
    method: Method, others: int, parameters: Parameters, *, has_base: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the parameters that the inputs share, and those of each."""
    for alias, key in _ALIASES.items():
        if alias in parameters and key in parameters:
            raise TypeError(f"`{key}` and `{alias}` are one parameter; give one of them")
    given = {_ALIASES.get(key, key): value for key, value in parameters.items()}
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in range(others + has_base)]
    for parameter in method.parameters:
        value = given.pop(parameter.name, None)
        if value is None:
            value = parameter.default
        if value is None:
            if parameter.required:
                raise TypeError(f"{method.name} needs the parameter `{parameter.name}`")
        elif parameter.per == "shared":
            shared[parameter.name] = _converted(parameter, value)
        else:
            count = others + (has_base and parameter.per == "input")
            for values, each in zip(own, _spread(parameter, value, count), strict=False):
                values[parameter.name] = each
    for key in given:
        known = [parameter.name for parameter in method.parameters]
        advice = did_you_mean(key, known) or f"its parameters: {', '.join(known)}"
        raise TypeError(f"{method.name} has no parameter `{key}`; {advice}")
    return shared, own


def _spread(parameter: Parameter, value: Any, count: int) -> list[Any]:
    """Return a value for each of `count` inputs."""
    if isinstance(value, int | float | str):
        return [_converted(parameter, value)] * count
    try:
        values = list(value)
    except TypeError:  # a number of another package
        return [_converted(parameter, value)] * count
    if len(values) != count:
        raise ValueError(
            f"`{parameter.name}` has {len(values)} values for {count} tensors; "
            "give one for each, or one number for all"
        )
    return [_converted(parameter, each) for each in values]


def _converted(parameter: Parameter, value: Any) -> Any:
    try:
        return convert(value, parameter.kind)
    except (TypeError, ValueError):
        message = f"`{parameter.name}` is {KINDS[parameter.kind]}, not {value!r}"
        raise ValueError(message) from None


def merge_state_dicts(
    method: str,
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
    method : str
        A merge method; ``oxmerge methods`` lists them.
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
                targets[name] = output(out[name], self._dtype)
        written = Written(targets.values())
        found = {}
        for name, known in targets.items():
            target = known
            with _naming(name):
                call, inputs = self._chosen(self._views(name, only_headers=True))
                code = call.result_type(inputs, target, self._dtype)
                if code == "U16":  # no raw bfloat16, whatever was asked for
                    target = output(out[name])
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
        if self._takes_first and not any(is_float(each.place[2]) for each in inputs):
            return self._copy, inputs[:1]
        return self._call, inputs

    def _views(self, name: str, *, only_headers: bool = False) -> list[View]:
        def views(dtype: str | None) -> list[View]:
            return [
                (_header(source, name) if only_headers else None)
                or view(source[name], label, dtype)
                for source, label in zip(self._sources, self._call.names, strict=True)
            ]

        found = views(self._dtype)
        if any(each.place[2] == "U16" for each in found):  # one knows that they are integers
            return views(None)
        return found


def _header(source: Any, name: str) -> View | None:
    """Return the shape and type of a tensor that would have to be computed, else None."""
    if not hasattr(source, "dtype_of"):
        return None
    return View(None, (0, 0, source.dtype_of(name)), source.shape_of(name), "numpy")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the name of a tensor before what is wrong with it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):  # knows the tensor already
            raise
        raise type(error)(f"tensor `{name}`: {error}") from None


class Written:
    """What was written in place: tensors that share their memory must not be merged twice."""

    def __init__(self, targets: Iterable[View]) -> None:
        counts = Counter(target.place for target in targets)
        self._shared = {place for place, count in counts.items() if count > 1}
        # Holds the inputs: the memory of a temporary one would be handed out again.
        self._done: dict[Place, list[View]] = {}
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
        earlier = self._done.get(target.place)
        if earlier is not None and all(map(_is_same, earlier, inputs)):
            return True
        for each in (target, *inputs):
            self._check(each.place)
        for each in inputs:
            _check_overlap(each.place, target.place)
        start, length, _ = target.place
        if length:
            if target.place in self._shared:
                self._done[target.place] = inputs
            at = bisect_left(self._starts, start)
            self._starts.insert(at, start)
            self._ends.insert(at, start + length)
            self._names.insert(at, name)
        return False

    def _check(self, place: Place) -> None:
        start, length, _ = place
        at = bisect_left(self._starts, start + length)
        if length and at and self._ends[at - 1] > start:
            raise ValueError(
                f"it shares memory with `{self._names[at - 1]}` of out, which is overwritten by "
                "then; give out arrays of its own, or leave one of the names out"
            )


def _is_same(one: View, other: View) -> bool:
    return one.array is not None and one.place == other.place


def _check_overlap(one: Place, out: Place) -> None:
    """Raise ValueError as the engine does, but before the first write."""
    start, end = max(one[0], out[0]), min(one[0] + one[1], out[0] + out[1])
    if start < end and one[:2] != out[:2]:
        raise ValueError(
            "out overlaps an input without being the same array; pass another out, or the input "
            "itself to overwrite it"
        )


def _check_names(
    donor: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    out: Mapping[str, Any] | None,
) -> None:
    mappings = [donor, *sources, *([] if out is None else [out])]
    everything = dict.fromkeys(name for source in mappings for name in source)
    lacking = [
        f"{label} lacks {', '.join(f'`{name}`' for name in missing)}"
        for source, label in zip([*sources, out], [*labels, "out"], strict=True)
        if source is not None and (missing := [name for name in everything if name not in source])
    ]
    if lacking:
        advice = "pass mappings with the same names"
        raise ValueError(f"the names differ: {'; '.join(lacking)}; {advice}")
