"""How adapters are merged with adapters, factor by factor: PEFT's `add_weighted_adapter`.

The factors of a LoRA are merged as tensors are, A with A and B with B: what is kept is chosen in
the factors, since in their product it would have another rank. A weight is what a factor is
multiplied by: the root of the adapter's weight times its scale, on both factors of a pair.

Signs are elected by what is kept, without the weights, and a sum of zero counts as positive. The
sum of those that agree is divided by how many they are: weights are scales here, which stay.
"""

from __future__ import annotations

from oxmerge import formula
from oxmerge.python_methods import PythonMethod, per_model

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from oxmerge.formula import Value
    from oxmerge.python_methods import TensorInfo

    Values = Sequence[Value]
    Numbers = Sequence[float]

__all__ = ["ADAPTER_METHODS"]

_WEIGHT = per_model(1.0)
_DENSITY = per_model(1.0, min=0, max=1)
#: What is drawn is divided by it.
_DRAWN_DENSITY = per_model(1.0, min=0.001, max=1)


def _largest(models: Values, density: Numbers, tensor: TensorInfo) -> Values:
    """Return the `density` share of each of largest magnitude, and 0 elsewhere."""

    def of(value: Value, share: float) -> Value:
        count = int(share * tensor.elements)
        kept: Value = formula.where(formula.largest(abs(value), count), value, 0.0)
        return value if share == 1 else kept

    return [of(value, share) for value, share in zip(models, density, strict=True)]


def _drawn(models: Values, density: Numbers) -> Values:
    """Return a `density` share of each, drawn at random and divided by it."""

    def of(at: int, value: Value, share: float) -> Value:
        kept: Value = formula.where(formula.random_mask(share, at), value / share, 0.0)
        return value if share == 1 else kept

    pairs = zip(models, density, strict=True)
    return [of(at, value, share) for at, (value, share) in enumerate(pairs)]


def _elected(weight: Numbers, kept: Values) -> Value:
    """Return the mean of the weighted elements that have the sign of the sum."""
    ones = [1.0] * len(kept)
    total = formula.weighted_sum(ones, kept)
    agree = [formula.where(total >= 0, each > 0, each < 0) for each in kept]
    terms = [formula.where(does, each, 0.0) for does, each in zip(agree, kept, strict=True)]
    count = formula.maximum(formula.weighted_sum(ones, agree), 1.0)
    mean: Value = formula.weighted_sum(weight, terms) / count
    return mean


def _ties(
    models: Values, *, tensor: TensorInfo, weight: Numbers = _WEIGHT, density: Numbers = _DENSITY
) -> Value:
    """TIES of adapters."""
    return _elected(weight, _largest(models, density, tensor))


def _magnitude_prune(
    models: Values, *, tensor: TensorInfo, weight: Numbers = _WEIGHT, density: Numbers = _DENSITY
) -> Value:
    """Sum of the largest elements of adapters."""
    return formula.weighted_sum(weight, _largest(models, density, tensor))


def _dare_linear(
    models: Values, *, weight: Numbers = _WEIGHT, density: Numbers = _DRAWN_DENSITY
) -> Value:
    """Linear DARE of adapters."""
    return formula.weighted_sum(weight, _drawn(models, density))


def _dare_ties(
    models: Values, *, weight: Numbers = _WEIGHT, density: Numbers = _DRAWN_DENSITY
) -> Value:
    """DARE TIES of adapters."""
    return _elected(weight, _drawn(models, density))


#: The methods by the names that recipes and PEFT have for them.
ADAPTER_METHODS = {
    function.__name__[1:]: PythonMethod(
        function, function.__name__[1:], base="ignored", models=(1, None), sees="elements",
        framework="np",
    )
    for function in (_ties, _magnitude_prune, _dare_linear, _dare_ties)
}  # fmt: skip
