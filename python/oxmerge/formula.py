"""The language that merge methods are written in: elements, and numbers about them.

A `Value` is one number for each element of the output tensor; a `Scalar` is one number about a
whole tensor (or row, column or model). Arithmetic on them computes nothing: it builds an
expression, which the engine runs in blocks, on every core, to the bit the same everywhere.

Three rules give the numbers their meaning:

1. A value is computed in the working type (float32; float64 where an input or the output is), one
   rounding an operation, in the order that is written.
2. A scalar is float64. Where it meets values it is rounded once to the working type.
3. In `weighted_sum` a coefficient of zero skips its term, and a lone coefficient of exactly one is
   the term itself.

>>> from oxmerge import formula
>>> from oxmerge.formula import norm, weighted_sum
>>> def shortened(base, models):
...     vectors = [model - base for model in models]
...     return base + weighted_sum([1 / (1 + norm(v)) for v in vectors], vectors)
"""

from __future__ import annotations

import json
from numbers import Real

from oxmerge.options import whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, Literal, NoReturn, TypeAlias, overload

    Over: TypeAlias = Literal["tensor", "row", "column", "model"]
    Number: TypeAlias = "float | Scalar"
    Anything: TypeAlias = "float | Scalar | Value"

__all__ = [
    "Scalar",
    "Value",
    "absolute_sum",
    "compute",
    "count",
    "dot",
    "exp",
    "largest",
    "largest_in_row",
    "log",
    "maximum",
    "mean",
    "minimum",
    "norm",
    "order_statistic",
    "random_mask",
    "random_mask_by_rank",
    "reduce_max",
    "reduce_min",
    "reduce_sum",
    "sign",
    "sqrt",
    "vote",
    "weighted_sum",
    "where",
]

_SCOPES = ("tensor", "row", "column", "model")
#: What stands here for functions of NumPy whose names differ.
_INSTEAD = {
    "absolute": "abs",
    "sum": "reduce_sum",
    "max": "reduce_max",
    "amax": "reduce_max",
    "min": "reduce_min",
    "amin": "reduce_min",
    "clip": "maximum",
}


class _Expression:
    """What values and scalars have in common."""

    __slots__ = ("_fields", "_op")

    def __init__(self, op: str, **fields: Any) -> None:
        self._op = op
        self._fields = fields

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a formula has no truth value: its numbers are known only when the merge runs; "
            "use `where` for a choice, `maximum` and `minimum` for max and min, and one comparison "
            "at a time"
        )

    def __float__(self) -> NoReturn:
        raise TypeError(
            "a formula is no number: it is computed when the merge runs; use `formula.sqrt`, "
            "`formula.exp` and so on in place of those of `math`, or `formula.compute`"
        )

    __int__ = __index__ = __complex__ = __float__

    def __iter__(self) -> NoReturn:
        raise TypeError("the elements of a formula cannot be gone through one by one")

    def __add__(self, other: Anything) -> Any:
        return _binary("add", self, other)

    def __radd__(self, other: Anything) -> Any:
        # `sum()` begins with 0, which is to add nothing, not a zero to each element.
        return self if type(other) is int and other == 0 else _binary("add", other, self)

    def __sub__(self, other: Anything) -> Any:
        return _binary("sub", self, other)

    def __rsub__(self, other: Anything) -> Any:
        return _binary("sub", other, self)

    def __mul__(self, other: Anything) -> Any:
        return _binary("mul", self, other)

    def __rmul__(self, other: Anything) -> Any:
        return _binary("mul", other, self)

    def __truediv__(self, other: Anything) -> Any:
        return _binary("div", self, other)

    def __rtruediv__(self, other: Anything) -> Any:
        return _binary("div", other, self)

    def __pow__(self, power: int) -> Any:
        if type(power) is not int or power < 1:
            return NotImplemented
        product: Any = self
        for _ in range(power - 1):
            product = product * self
        return product

    def __neg__(self) -> Any:
        return _unary("neg", self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return _unary("abs", self)

    def __gt__(self, other: Anything) -> Any:
        return _binary("greater", self, other)

    def __lt__(self, other: Anything) -> Any:
        return _binary("greater", other, self)

    def __ge__(self, other: Anything) -> Any:
        return _binary("greater_equal", self, other)

    def __le__(self, other: Anything) -> Any:
        return _binary("greater_equal", other, self)

    def __eq__(self, other: object) -> Any:
        return _binary("equal", self, other)

    def __ne__(self, other: object) -> Any:
        return 1 - _binary("equal", self, other)

    __hash__ = object.__hash__

    def __array_ufunc__(self, ufunc: Any, way: str, *inputs: Any, **options: Any) -> Any:
        """Do arithmetic with NumPy's numbers; raise TypeError for all else."""
        # Comparisons bring numbers as arrays without dimensions.
        inputs = tuple(each.item() if getattr(each, "ndim", 1) == 0 else each for each in inputs)
        operation = _UFUNCS.get(ufunc.__name__)
        are_fit = all(isinstance(each, _Expression) or _is_number(each) for each in inputs)
        if operation is None or way != "__call__" or options or not are_fit:
            raise _no_array(ufunc.__name__)
        return operation(*inputs)

    def __array_function__(
        self, function: Any, _types: Any, _arguments: Any, _options: Any
    ) -> NoReturn:
        """Raise TypeError: NumPy computes with arrays."""
        raise _no_array(function.__name__)

    def __array__(self, *_arguments: Any, **_options: Any) -> NoReturn:
        """Raise TypeError: there is no array yet."""
        raise _no_array("asarray")

    def __repr__(self) -> str:
        """Return the expression in prefix form."""
        return _shown(self, _SHOWN_LEVELS)


class Value(_Expression):
    """One number for each element of the output tensor: an input, or what is computed of it."""

    __slots__ = ()


class Scalar(_Expression):
    """One number about a tensor, row, column or the model, in float64."""

    __slots__ = ()


def _no_array(name: str) -> TypeError:
    """Return the error for a function of NumPy, with what does the same for a formula."""
    instead = _INSTEAD.get(name, name)
    known = "`abs`" if instead == "abs" else f"`formula.{instead}`" if instead in __all__ else None
    advice = f"use {known}" if known else "see `oxmerge.formula` for what can be said"
    return TypeError(
        f"NumPy's `{name}` needs arrays, and a formula is computed when the merge runs; {advice}"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, Real)


def _scalar(value: Any, what: str) -> Scalar:
    if isinstance(value, Scalar):
        return value
    if _is_number(value):
        return Scalar("number", value=repr(float(value)))
    raise TypeError(f"{what} must be a number or a `Scalar`, not {_kind(value)}")


def _value(value: Any, what: str) -> Value:
    if isinstance(value, Value):
        return value
    if isinstance(value, Scalar) or _is_number(value):
        return Value("spread", of=_scalar(value, what))
    raise TypeError(f"{what} must be a `Value`, a `Scalar` or a number, not {_kind(value)}")


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _unary(name: str, value: Any) -> Any:
    if isinstance(value, Value):
        return Value("unary", name=name, of=value)
    return Scalar("scalar_unary", name=name, of=_scalar(value, "the argument"))


def _binary(name: str, left: Any, right: Any) -> Any:
    for side in (left, right):
        if not isinstance(side, _Expression) and not _is_number(side):
            return NotImplemented
    if isinstance(left, Value) or isinstance(right, Value):
        return Value("binary", name=name, left=_value(left, "left"), right=_value(right, "right"))
    return Scalar("scalar_binary", name=name, left=_scalar(left, ""), right=_scalar(right, ""))


#: What NumPy calls the operators, where its number stands on the left.
_UFUNCS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda left, right: _binary("add", left, right),
    "subtract": lambda left, right: _binary("sub", left, right),
    "multiply": lambda left, right: _binary("mul", left, right),
    "divide": lambda left, right: _binary("div", left, right),
    "greater": lambda left, right: _binary("greater", left, right),
    "greater_equal": lambda left, right: _binary("greater_equal", left, right),
    "less": lambda left, right: _binary("greater", right, left),
    "less_equal": lambda left, right: _binary("greater_equal", right, left),
    "equal": lambda left, right: _binary("equal", left, right),
    "not_equal": lambda left, right: 1 - _binary("equal", left, right),
}


def _both(name: str, left: Anything, right: Anything) -> Any:
    result = _binary(name, left, right)
    if result is NotImplemented:
        raise TypeError(f"a formula needs numbers here, not {_kind(left)} and {_kind(right)}")
    return result


# Functions of elements and numbers.


def sqrt(value: Anything) -> Any:
    """Return the square root, correctly rounded."""
    return _unary("sqrt", value)


def exp(value: Anything) -> Any:
    """Return e to the power of `value`."""
    return _unary("exp", value)


def log(value: Anything) -> Any:
    """Return the natural logarithm."""
    return _unary("ln", value)


def sign(value: Anything) -> Any:
    """Return -1, 0 or 1; NaN for NaN."""
    return _unary("sign", value)


def maximum(left: Anything, right: Anything) -> Any:
    """Return the greater of two; NaN if either is."""
    return _both("max", left, right)


def minimum(left: Anything, right: Anything) -> Any:
    """Return the lesser of two; NaN if either is."""
    return _both("min", left, right)


def where(condition: Anything, yes: Anything, no: Anything) -> Any:
    """Return `yes` where the condition is not 0, else `no`. Comparisons give 1 or 0."""
    parts = (condition, yes, no)
    if any(isinstance(part, Value) for part in parts):
        values = [_value(part, "an argument of `where`") for part in parts]
        return Value("select", mask=values[0], yes=values[1], no=values[2])
    scalars = [_scalar(part, "an argument of `where`") for part in parts]
    return Scalar("scalar_select", mask=scalars[0], yes=scalars[1], no=scalars[2])


def weighted_sum(weights: Iterable[Number], values: Iterable[Anything]) -> Value:
    """Return the sum of weight times value: multiplied, then added, in the given order.

    A weight of zero skips its term, known before the merge or found in it; a lone weight of one
    leaves the value as it is.
    """
    return Value("weighted_sum", terms=_terms(weights, values))


def vote(weights: Iterable[Number], values: Iterable[Anything], *, average: bool = False) -> Value:
    """Return the sum of those weight times value that have the sign that their sum has.

    This is the sign election of TIES; a sum of zero counts as positive. With `average`, the result
    is divided by the sum of the weights of those that agree.
    """
    return Value("vote", terms=_terms(weights, values), average=bool(average))


def _terms(weights: Iterable[Number], values: Iterable[Anything]) -> list[tuple[Scalar, Value]]:
    weights, values = list(weights), list(values)
    if len(weights) != len(values):
        raise ValueError(f"there are {len(weights)} weights for {len(values)} values")
    return [
        (_scalar(weight, "a weight"), _value(value, "a term"))
        for weight, value in zip(weights, values, strict=True)
    ]


def random_mask(density: float, stream: int) -> Value:
    """Return 1 with probability `density`, else 0, by seed, tensor name, stream and element.

    Parameters
    ----------
    density : float
        From 0 to 1.
    stream : int
        Which of the independent masks of a tensor; DARE takes the model's position for it.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must be from 0 to 1, not {density!r}")
    return Value("random", density=float(density), stream=int(stream))


# Numbers about a tensor, row, column or model.


def reduce_sum(value: Value, over: Over = "tensor") -> Scalar:
    """Return the sum of the elements, in float64 and in an order that never changes."""
    return _reduce("sum", value, None, over)


def absolute_sum(value: Value, over: Over = "tensor") -> Scalar:
    """Return the sum of the magnitudes (the L1 norm)."""
    return _reduce("absolute_sum", value, None, over)


def dot(left: Value, right: Value, over: Over = "tensor") -> Scalar:
    """Return the inner product; products and sums are float64."""
    return _reduce("dot", left, right, over)


def norm(value: Value, over: Over = "tensor") -> Scalar:
    """Return the Euclidean length."""
    return Scalar("scalar_unary", name="sqrt", of=dot(value, value, over))


def reduce_max(value: Value, over: Over = "tensor") -> Scalar:
    """Return the largest element."""
    return _reduce("max", value, None, over)


def reduce_min(value: Value, over: Over = "tensor") -> Scalar:
    """Return the smallest element."""
    smallest = -reduce_max(-_value(value, "the argument"), over)
    assert isinstance(smallest, Scalar)
    return smallest


def count(over: Over = "tensor") -> Scalar:
    """Return how many elements there are."""
    return reduce_sum(_value(1.0, ""), over)


def mean(value: Value, over: Over = "tensor") -> Scalar:
    """Return the mean of the elements."""
    average = reduce_sum(value, over) / count(over)
    assert isinstance(average, Scalar)
    return average


def largest(value: Value, count: Number) -> Value:
    """Return 1 for the `count` largest elements of the tensor, else 0.

    Exact, without sorting. Of equal elements those of the lowest index are among the largest.
    """
    return Value("largest", of=_value(value, "the argument"), count=_scalar(count, "count"))


def largest_in_row(value: Value, count: int, *, every: int | None = None) -> Value:
    """Return 1 for the `count` largest elements of each row (along the last dimension), else 0.

    Of equal elements those of the lowest index are among the largest.

    Parameters
    ----------
    value : Value
        What to rank.
    count : int
        How many are kept; all of a row that has no more.
    every : int, optional
        Rank each so many elements of a row among themselves, counted from its first, instead of the
        whole row: the n:m sparsity of ``largest_in_row(value, n, every=m)``.
    """
    if (count := whole(count, "count")) < 0:
        raise ValueError(f"count must be at least 0, not {count}")
    of = _value(value, "the argument")
    return Value("largest_in_row", of=of, count=count, every=_every(every))


def random_mask_by_rank(
    value: Value, lowest: float, highest: float, stream: int, *, every: int | None = None
) -> Value:
    """Return 1 at random, likelier for large elements of a row than for small ones, else 0.

    The probability rises in even steps from the smallest element to the largest. What DELLA keeps
    of a task vector is this mask of its magnitudes.

    Parameters
    ----------
    value : Value
        What to rank.
    lowest, highest : float
        The probabilities of the smallest and of the largest, from 0 to 1; an element that is alone
        has the mean of both.
    stream : int
        Which of the independent masks of a tensor, see `random_mask`.
    every : int, optional
        As for `largest_in_row`.
    """
    for name, probability in (("lowest", lowest), ("highest", highest)):
        if not 0 <= probability <= 1:
            raise ValueError(f"{name} must be from 0 to 1, not {probability!r}")
    return Value(
        "random_by_rank",
        of=_value(value, "the argument"),
        lowest=float(lowest),
        highest=float(highest),
        stream=int(stream),
        every=_every(every),
    )


def _every(every: int | None) -> int | None:
    if every is not None and (every := whole(every, "every")) < 1:
        raise ValueError(f"every must be at least 1, not {every}")
    return every


def order_statistic(value: Value, rank: Number) -> Scalar:
    """Return the element of that rank of the tensor, counted from the largest, which is 1."""
    return Scalar("order_statistic", of=_value(value, "the argument"), count=_scalar(rank, "rank"))


def _reduce(name: str, left: Any, right: Any, over: str) -> Scalar:
    if over not in _SCOPES:
        raise ValueError(f"over must be one of {', '.join(_SCOPES)}, not {over!r}")
    left = _value(left, "the argument")
    right = None if right is None else _value(right, "the argument")
    return Scalar("reduce", name=name, left=left, right=right, over=over)


if TYPE_CHECKING:

    @overload
    def compute(function: Callable[..., Any], *arguments: Number) -> Scalar: ...
    @overload
    def compute(
        function: Callable[..., Any], *arguments: Number, results: int
    ) -> tuple[Scalar, ...]: ...


def compute(
    function: Callable[..., Any], *arguments: Number, results: int | None = None
) -> Scalar | tuple[Scalar, ...]:
    """Return what a Python function gives for some numbers, once they are known.

    Parameters
    ----------
    function : callable
        Gets a float for each of `arguments`, and returns a number, or a sequence of `results`
        numbers. It runs once for each tensor (row or column), on any thread, in any order; it must
        give the same for the same numbers.
    *arguments : float or Scalar
        The numbers.
    results : int, optional
        How many numbers it returns, if it returns a sequence.

    Returns
    -------
    Scalar or tuple of Scalar
        As many as `results` says.
    """
    if not callable(function):
        raise TypeError(f"compute takes a function of numbers, not {_kind(function)}")
    call = _Call(function, [_scalar(each, "an argument") for each in arguments], results)
    if results is None:
        return Scalar("result", of=call, index=0)
    return tuple(Scalar("result", of=call, index=index) for index in range(results))


class _Call(_Expression):
    """A call of a Python function, which has several results."""

    __slots__ = ()

    def __init__(
        self, function: Callable[..., Any], arguments: Sequence[Scalar], results: int | None
    ) -> None:
        super().__init__("compute", function=function, arguments=arguments, results=results)


# From an expression to the list of nodes that the engine reads (rust/formula/listing.rs).


def as_nodes(value: Any) -> tuple[str, list[tuple[Callable[..., Any], int | None]]]:
    """Return an expression as JSON, with the functions that its `compute` nodes call.

    Nodes come before those that use them, and each stands there once, however often it is used.
    """
    nodes: list[dict[str, Any]] = []
    functions: list[tuple[Callable[..., Any], int | None]] = []
    index: dict[int, int] = {}
    waiting: list[tuple[_Expression, bool]] = [(_value(value, "a formula"), False)]
    while waiting:
        node, is_ready = waiting.pop()
        if id(node) in index:
            continue
        if not is_ready:
            waiting.append((node, True))
            waiting.extend((part, False) for part in reversed(_parts(node)))
            continue
        fields = {name: _indexed(field, index) for name, field in node._fields.items()}
        if node._op == "compute":  # noqa: SLF001
            functions.append((fields["function"], fields["results"]))
            fields["function"] = len(functions) - 1
            fields["results"] = 1 if fields["results"] is None else fields["results"]
        index[id(node)] = len(nodes)
        nodes.append({"op": node._op, **fields})  # noqa: SLF001
    return json.dumps(nodes), functions


def _parts(node: _Expression) -> list[_Expression]:
    parts: list[_Expression] = []
    for field in node._fields.values():
        if isinstance(field, _Expression):
            parts.append(field)
        elif isinstance(field, list):
            for item in field:
                parts += item if isinstance(item, tuple) else [item]
    return parts


def _indexed(field: Any, index: dict[int, int]) -> Any:
    if isinstance(field, _Expression):
        return index[id(field)]
    if isinstance(field, list | tuple):
        return [_indexed(item, index) for item in field]
    return field


#: How deep an expression is shown.
_SHOWN_LEVELS = 4


def _shown(part: Any, levels: int) -> str:
    if isinstance(part, list | tuple):
        return "[" + ", ".join(_shown(item, levels) for item in part) + "]"
    if not isinstance(part, _Expression):
        return getattr(part, "__name__", None) or str(part)
    fields = part._fields
    if part._op == "input":  # noqa: SLF001
        return f"x{fields['index']}"
    if part._op in {"number", "spread"}:  # noqa: SLF001
        return _shown(next(iter(fields.values())), levels)
    if not levels:
        return "…"
    name = fields.get("name", part._op)  # noqa: SLF001
    shown = [
        _shown(field, levels - 1)
        for key, field in fields.items()
        if key != "name" and field is not None
    ]
    return f"{name}({', '.join(shown)})"
