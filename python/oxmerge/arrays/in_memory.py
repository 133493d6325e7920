"""Merging tensors in memory, by the engine of files: methods, their parameters, their options."""

from __future__ import annotations

from typing import overload

from oxmerge import _core
from oxmerge.arrays.views import (
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
from oxmerge.methods import find_method, plain_name
from oxmerge.options import check_seed, check_threads
from oxmerge.planning.parameters import KINDS, convert, limits_advice, plain_number
from oxmerge.problems import Place, Problem, did_you_mean
from oxmerge.schema import is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, TypeVar

    from numpy.typing import NDArray

    from oxmerge.arrays.views import Tensor
    from oxmerge.methods import Method, Parameter
    from oxmerge.python_methods import PythonMethod

    Out = TypeVar("Out")
    Parameters = Mapping[str, Any]

__all__ = [
    "MethodCall",
    "check_options",
    "check_out",
    "finite",
    "merge_tensors",
]

#: What a call takes besides the parameters, by name.
_OPTIONS = ("base", "dtype", "name", "out", "seed", "threads")


@overload
def merge_tensors(
    method: str | PythonMethod,
    tensors: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    out: Tensor | None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
    **parameters: Any,
) -> Tensor: ...
@overload
def merge_tensors(
    method: str | PythonMethod,
    tensors: Sequence[Any],
    base: Any = None,
    *,
    out: None = None,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
    **parameters: Any,
) -> NDArray[Any]: ...
@overload
def merge_tensors(
    method: str | PythonMethod,
    tensors: Sequence[Any],
    base: Any = None,
    *,
    out: Out,
    dtype: Any = None,
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
    **parameters: Any,
) -> Out: ...
def merge_tensors(
    method: str | PythonMethod,
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
    method : str or PythonMethod
        A merge method: its name, of which ``oxmerge methods`` lists those there are, or what
        `oxmerge.method` made.
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
        smallest that holds all inputs. It acts on floats only: arrays of integers or bool stay what
        they are.
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
        If shapes differ, an array is not on the CPU, a parameter is beyond its limits, or `out`
        cannot take the result.
    PlanError
        If the method cannot make sense of the parameters: weights to divide by that sum to zero.

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
    call = MethodCall(method, len(tensors), parameters, has_base=base is not None)
    code = element_type(dtype)
    inputs = [view(each, f"tensors[{at}]") for at, each in enumerate(tensors)]
    if base is not None:
        inputs.append(view(base, "base"))
    target = None if out is None else output(out)
    return call.run(inputs, target, code, seed=seed, name=name, threads=threads)


class MethodCall:
    """A method with its parameters, ready to be run on any number of tensors.

    Parameters
    ----------
    method : str or PythonMethod
        Its name, or one written in Python.
    others : int
        How many inputs there are besides the base.
    parameters : mapping
        As the caller gave them.
    has_base : bool
        Whether there is a base; it comes last among the inputs.
    """

    __slots__ = ("_base", "_method", "_own", "_shared", "names")

    def __init__(
        self,
        method: str | PythonMethod,
        others: int,
        parameters: Parameters,
        *,
        has_base: bool,
    ) -> None:
        found = _found(method)
        _check_counts(found, others, has_base=has_base)
        self._method = found
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
        check_options(seed, threads, name)
        first = inputs[0]
        code = self.result_type(inputs, out, code)
        if out is None:
            out = empty(first.shape, code, first.kind)
        check_out(out, first.shape, code)
        mark_overwritten(out.array)
        method: Any = self._method.name
        if (written := self._method.written) is not None:
            tensor = (name, first.shape, code)
            method = written.formula(len(inputs), self._base, self._shared, self._own, tensor)
        _core.merge_arrays(
            method,
            [each.exporter for each in inputs],
            self._base,
            out.exporter,
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
        types = {each.code for each in inputs}
        floats = {each for each in types if is_float(each)}
        if len(floats) < len(types) and len(types) > 1:
            return self._refuse_types(inputs)
        if not floats:
            return inputs[0].code
        if code is not None:
            return code
        # An `out` of integers asks for nothing: `check_out` will refuse it.
        asked = None if out is None or not is_float(out.code) else out.code
        return asked or promoted(inputs)

    def _refuse_types(self, inputs: list[View]) -> str:
        types = (f"{name} of {each.code}" for name, each in zip(self.names, inputs, strict=True))
        message = "only floats can be converted, and the types differ"
        raise TypeError(f"{message}: {', '.join(types)}; convert one of them first")


def check_options(seed: int, threads: int | None, name: str = "") -> None:
    """Raise TypeError or ValueError unless seed and threads are in range, and the name is text."""
    if not isinstance(name, str):
        raise TypeError(f"name must be text, the tensor's in its model, not {name!r}")
    check_seed(seed)
    check_threads(threads)


def finite(value: Any, what: str) -> float:
    """Return a number of any package as a parameter takes it; raise ValueError for others."""
    try:
        return float(convert(value, "float"))
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be a finite number, not {value!r}") from None


def check_out(out: View, shape: tuple[int, ...], code: str, what: str = "out") -> None:
    """Raise ValueError unless `out` is of that shape and element type."""
    if out.shape != shape:
        advice = "pass one of that shape"
        raise ValueError(f"{what} has the shape {out.shape}, and the result {shape}; {advice}")
    if out.code != code:
        advice = f"pass one of {code}, or another dtype"
        raise ValueError(f"{what} is of {out.code}, and the result of {code}; {advice}")


def _found(method: str | PythonMethod) -> Method:
    """Return a method by its name, or one written in Python as it is."""
    if not isinstance(method, str):
        from oxmerge.python_methods import PythonMethod  # noqa: PLC0415 - seldom needed

        if not isinstance(method, PythonMethod):
            kind = type(method).__name__
            advice = "; make one of a function with `@oxmerge.method`" if callable(method) else ""
            raise TypeError(f"method must be a name, such as 'linear', not a {kind}{advice}")
        return method.described()
    found = find_method(method, Place("method"))
    if isinstance(found, Problem):
        advice = "" if found.advice is None else f"; {found.advice}"
        raise ValueError(found.message + advice)  # noqa: TRY004 - a name that is not there
    return found


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
    for alias in parameters:
        if (key := plain_name(alias)) != alias and key in parameters:
            raise TypeError(f"`{key}` and `{alias}` are one parameter; give one of them")
    given = {plain_name(key): value for key, value in parameters.items()}
    _check_known(method, given)
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in range(others + has_base)]
    for parameter in method.parameters:
        value = given.get(parameter.name)
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
    return shared, own


def _check_known(method: Method, given: Parameters) -> None:
    known = [parameter.name for parameter in method.parameters]
    for key in given:
        if key not in known:
            meant = did_you_mean(key, [*known, *_OPTIONS])
            advice = meant or f"its parameters: {', '.join(known)}"
            raise TypeError(f"{method.name} has no parameter `{key}`; {advice}")


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
        converted = convert(value, parameter.kind)
    except (TypeError, ValueError):
        message = f"`{parameter.name}` is {KINDS[parameter.kind]}, not {value!r}"
        raise ValueError(message) from None
    if not isinstance(converted, bool | str) and converted not in parameter.limits:
        message = f"`{parameter.name}` is {parameter.limits}, not {plain_number(converted)}"
        raise ValueError(f"{message}; {limits_advice(converted, parameter)}")
    return converted
