"""Merging what is in memory: tensors, and dicts of tensors. The engine is that of files."""

from __future__ import annotations

from bisect import bisect_left
from contextlib import contextmanager
from functools import cache

from oxmerge import _core
from oxmerge.arrays import View, check_same_shape, element_type, empty, output, promoted, view
from oxmerge.checkpoints import OpenCheckpoint
from oxmerge.methods import find_method, read_methods
from oxmerge.parameters import KINDS, convert
from oxmerge.problems import Problem, did_you_mean
from oxmerge.schema import is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping, Sequence
    from typing import Any

    from oxmerge.arrays import Place
    from oxmerge.methods import Method, Parameter

    Parameters = Mapping[str, Any]

__all__ = ["merge_state_dicts", "merge_tensors"]

_MOST_SEED = (1 << 64) - 1
#: How Python writes a parameter whose name is a keyword.
_ALIASES = {"lambda_": "lambda"}


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
        The tensor's name in its model, which chooses the random masks as well.
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
    plan = MethodCall(method, len(tensors), parameters, has_base=base is not None)
    code = element_type(dtype)
    inputs = [view(each, f"tensors[{index}]", code) for index, each in enumerate(tensors)]
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
        self.names = [f"tensors[{index}]" for index in range(others)]
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
        return out.array

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
    """Raise ValueError if a seed or a number of threads is out of range."""
    if not 0 <= seed <= _MOST_SEED:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, not {seed}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")


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
        the same names.
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
    labels = [f"state_dicts[{index}]" for index in range(len(state_dicts))]
    sources = list(state_dicts)
    if base is not None:
        sources.append(base)
        labels.append("base")
    call = MethodCall(method, len(state_dicts), parameters, has_base=base is not None)
    call.names = labels
    code = element_type(dtype)
    check_options(seed, threads)
    donor = sources[-1] if base is not None else sources[0]
    _check_names(donor, sources, labels, out)
    merged: dict[str, Any] = {}
    written = Written()
    for name in donor:
        with _naming(name):
            inputs = [
                view(source[name], label, _stored_type(source, name) or code)
                for source, label in zip(sources, labels, strict=True)
            ]
            target = None
            if out is not None:
                target = output(out[name], _stored_type(out, name) or code)
                if written.is_done(name, inputs, target):
                    continue
            merged[name] = call.run(inputs, target, code, seed=seed, name=name, threads=threads)
    return merged if out is None else out


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

    def __init__(self) -> None:
        self._done: dict[Place, tuple[str, list[Place]]] = {}
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._names: list[str] = []

    def is_done(self, name: str, inputs: Sequence[View], target: View) -> bool:
        """Tell whether an earlier name had the same arrays; else note this one.

        Raises
        ------
        ValueError
            If the output or an input has memory that was overwritten.
        """
        places = [each.place for each in inputs]
        earlier = self._done.get(target.place)
        if earlier is not None and earlier[1] == places:
            return True
        for place in (target.place, *places):
            self._check(place)
        start, length, _ = target.place
        if length:
            self._done[target.place] = (name, places)
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


def _stored_type(source: Mapping[str, Any], name: str) -> str | None:
    """Return the element type of a file's tensor, which its array may not show."""
    return source.tensor_info(name).dtype if isinstance(source, OpenCheckpoint) else None


def _check_names(
    donor: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    out: Mapping[str, Any] | None,
) -> None:
    everything = dict.fromkeys(name for source in [donor, *sources] for name in source)
    lacking = [
        f"{label} lacks {', '.join(f'`{name}`' for name in missing)}"
        for source, label in zip([*sources, out], [*labels, "out"], strict=True)
        if source is not None and (missing := [name for name in everything if name not in source])
    ]
    if lacking:
        advice = "pass mappings with the same names"
        raise ValueError(f"the names differ: {'; '.join(lacking)}; {advice}")
