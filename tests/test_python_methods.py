"""Merge methods written in Python: the same bits as those in Rust, and what goes wrong in them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from oxmerge import formula, method, per_model, shared
from oxmerge.arrays import python_methods
from oxmerge.errors import PlanError
from oxmerge.formula import (
    compute,
    dot,
    largest,
    maximum,
    reduce_sum,
    sign,
    vote,
    weighted_sum,
    where,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = [(), (5,), (0, 3), (300, 301), (2, 70_001)]


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Methods that a test makes are gone after it."""
    before = dict(python_methods._METHODS)
    yield
    python_methods._METHODS.clear()
    python_methods._METHODS.update(before)


@method(base="required", models=(2, None))
def stock(base: Any, models: Any) -> Any:
    """Model stock, once more."""
    vectors = [model - base for model in models]
    count = len(vectors)
    cosines = 0
    for first in range(count):
        for second in range(first + 1, count):
            a, b = vectors[first], vectors[second]
            product = maximum(formula.norm(a) * formula.norm(b), 1e-6)
            cosine = formula.minimum(maximum(dot(a, b) / product, -1), 1)
            cosines = cosines + cosine
    cosine = cosines / (count * (count - 1) // 2)
    divisor = 1 + (count - 1) * cosine
    share = where(abs(divisor) < 1e-6, 0, cosine / divisor)
    return base + weighted_sum([share] * count, vectors)


@method(base="required")
def by_rank(base: Any, models: Any, *, weight: Any = per_model(1.0)) -> Any:
    """DELLA of density 0.5 without rescaling, once more."""
    vectors = [model - base for model in models]
    masks = [
        formula.random_mask_by_rank(abs(vector), 0.35, 0.65, position)
        for position, vector in enumerate(vectors)
    ]
    kept = [where(mask, vector, 0) for mask, vector in zip(masks, vectors, strict=True)]
    return base + weighted_sum(weight, kept)


@method(base="required")
def in_turn(base: Any, models: Any) -> Any:
    """CABS of 3:8, once more."""
    parts: list[Any] = []
    taken = 0
    for model in models:
        free = where(taken, 0, model - base)
        parts.append(where(formula.largest_in_row(abs(free), 3, every=8), free, 0))
        taken = taken + parts[-1]
    return base + weighted_sum([1] * len(parts), parts)


@method(base="required")
def crumbs(
    base: Any,
    models: Any,
    *,
    weight: Any = per_model(),
    density: Any = per_model(1.0, min=0, max=1),
    lambda_: Any = shared(1.0),
    elements: Any = shared(1),
) -> Any:
    """Breadcrumbs with votes, once more."""
    vectors = []
    for model, share in zip(models, density, strict=True):
        vector = model - base
        kept, dropped = int(share * elements), int(0.01 * elements)
        outer = largest(abs(vector), kept + dropped)
        inner = largest(abs(vector), dropped)
        vectors.append(where(where(inner, 0, outer), vector, 0))
    return base + weighted_sum([lambda_], [vote(weight, vectors)])


@method(base="required")
def selected(base: Any, models: Any, *, share: Any = shared(0.3)) -> Any:
    """SCE, once more."""
    vectors = [model - base for model in models]
    part = 1 / len(vectors)
    mean = weighted_sum([part] * len(vectors), vectors)
    squares = [(vector - mean) * (vector - mean) for vector in vectors]
    variance = weighted_sum([part] * len(vectors), squares)
    count = compute(lambda n: math.trunc(n * share), reduce_sum(variance > 0))
    mask = largest(variance, count)
    vectors = [where(mask, vector, 0) for vector in vectors]
    elements = formula.count()
    means = [dot(vector, vector) / elements for vector in vectors]
    total = 0.0
    for each in means:
        total = total + each
    weights = [where(abs(total) < 1e-6, part, each / total) for each in means]
    elected = where(weighted_sum([1] * len(vectors), vectors) >= 0, 1, -1)
    agree = [sign(vector) == elected for vector in vectors]
    kept = [where(yes, vector, 0) for yes, vector in zip(agree, vectors, strict=True)]
    divisor = maximum(weighted_sum(weights, agree), 1e-6)
    return base + weighted_sum(weights, kept) / divisor


def models(shape: tuple[int, ...], count: int = 3) -> tuple[Any, list[Any]]:
    random = np.random.default_rng(len(shape))
    base = random.normal(0, 0.5, shape).astype("f4")
    return base, [base + random.normal(0, 0.1, shape).astype("f4") for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_bits_are_those_of_the_methods_in_rust(shape: tuple[int, ...], threads: int) -> None:
    base, others = models(shape)
    options: dict[str, Any] = {"threads": threads, "name": "t"}
    pairs: list[Any] = [
        (("stock", {}), ("model_stock", {})),
        (("selected", {}), ("sce", {"select_topk": 0.3})),
        (("in_turn", {}), ("cabs", {"n": 3, "m": 8})),
        (("by_rank", {}), ("della_linear", {"weight": 1, "density": 0.5, "rescale": False})),
    ]
    if math.prod(shape) > 100:
        weights = {"weight": [0.5, -0.2, 0.7], "density": 0.6, "lambda_": 0.8}
        elements = {"elements": math.prod(shape)}
        pairs.append((("crumbs", weights | elements), ("breadcrumbs_ties", weights)))
    for (ours, given), (theirs, also) in pairs:
        if not math.prod(shape) and ours == "selected":
            continue
        merged = oxmerge.merge_tensors(ours, others, base, **given, **options)
        expected = oxmerge.merge_tensors(theirs, others, base, **also, **options)
        assert np.array_equal(merged, expected), (ours, shape)


def test_a_vote_by_numbers_that_cancel_divides_by_none_of_them() -> None:
    @method()
    def constant(models: Any) -> Any:
        return vote([0.5, -0.5, 0.3], models, average=True)

    @method()
    def found(models: Any) -> Any:
        nothing = 0 * formula.count()
        return vote([nothing + 0.5, nothing - 0.5, nothing + 0.3], models, average=True)

    # Of the elements agree: the first two models, all, the first and the last.
    stack = [np.array(values, "f4") for values in ([3, 3, 1], [-2, -2, 1], [-1, 1, 2])]
    expected = np.array([2.5, 2.8 / 0.3, 1.1 / 0.8], "f4")
    assert np.allclose(oxmerge.merge_tensors("constant", stack), expected)
    merged = oxmerge.merge_tensors("found", stack)
    assert np.array_equal(merged, oxmerge.merge_tensors("constant", stack))


def test_state_dicts_and_kinds_of_bases() -> None:
    @method()
    def plain(models: Any) -> Any:
        return sum(models) / len(models)

    @method(base="optional")
    def either(base: Any, models: Any) -> Any:
        return models[0] if base is None else models[0] - base

    base, others = models((3, 4))
    assert np.allclose(oxmerge.merge_tensors("plain", others), sum(others) / 3)
    assert np.array_equal(oxmerge.merge_tensors("either", others), others[0])
    assert np.array_equal(oxmerge.merge_tensors("either", others, base), others[0] - base)
    dicts = [{"w": other, "b": other[0]} for other in others]
    merged = oxmerge.merge_state_dicts("plain", dicts)
    assert np.allclose(merged["b"], sum(others)[0] / 3)


def test_sum_adds_no_zero() -> None:
    @method()
    def total(models: Any) -> Any:
        return sum(models)

    negative = np.array([-0.0], "f4")
    assert np.signbit(oxmerge.merge_tensors("total", [negative]))[0]


WRONG: Any = "rows"
x: Any = formula.Value("input", index=0)
n: Any = formula.norm(x)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda: max(x, 1), "maximum"),
        (lambda: 1 if n > 0 else 2, "where"),
        (lambda: 0 < x < 1, "where"),
        (lambda: math.sqrt(n), "formula.sqrt"),
        (lambda: float(n), "formula"),
        (lambda: list(x), "one by one"),
        (lambda: x + "1", "unsupported operand"),
        (lambda: weighted_sum([1], [x, x]), "1 weights for 2 values"),
        (lambda: weighted_sum([x], [x]), "a `Scalar`"),
        (lambda: formula.norm(x, over=WRONG), "over must be one of"),
        (lambda: formula.random_mask(1.5, 0), "density"),
        (lambda: formula.random_mask_by_rank(x, 0, 1.5, 0), "highest"),
        (lambda: formula.largest_in_row(x, -1), "count"),
        (lambda: formula.largest_in_row(x, 1, every=0), "every"),
        (lambda: formula.maximum(WRONG, 1), "numbers"),
        (lambda: compute(WRONG, n), "function"),
    ],
)
def test_what_cannot_be_said_is_told(wrong: Any, hint: str) -> None:
    with pytest.raises((TypeError, ValueError), match=hint):
        wrong()


def test_numpy_leaves_formulas_alone() -> None:
    assert isinstance(np.float32(2) * x, formula.Value)
    assert isinstance(np.float64(2) - n, formula.Scalar)
    with pytest.raises(TypeError):
        np.ones(3) * x


def test_an_exception_in_a_function_is_raised_as_it_is() -> None:
    class MineError(Exception):
        pass

    def fails(_: float) -> float:
        raise MineError("no")

    @method()
    def broken(models: Any) -> Any:
        return models[0] * compute(fails, formula.norm(models[0]))

    with pytest.raises(MineError, match="no"):
        oxmerge.merge_tensors("broken", [np.ones((400, 400), "f4")])

    @method()
    def miscounted(models: Any) -> Any:
        first, _ = compute(lambda _: [1.0], formula.norm(models[0]), results=2)
        return models[0] * first

    with pytest.raises(ValueError, match="returned 1 numbers, not 2"):
        oxmerge.merge_tensors("miscounted", [np.ones(3, "f4")])


def test_a_method_that_returns_no_formula_is_told_with_its_place() -> None:
    @method()
    def nothing(models: Any) -> Any:
        return None

    with pytest.raises(PlanError, match=r"`nothing` returned no formula.*NoneType") as caught:
        oxmerge.merge_tensors("nothing", [np.ones(3, "f4")])
    assert __file__ in str(caught.value)


def test_parameters_are_checked_as_those_of_built_in_methods() -> None:
    base, others = models((3,))
    with pytest.raises(ValueError, match=r"did you mean `0.53`"):
        oxmerge.merge_tensors("crumbs", others, base, weight=1, density=53)
    with pytest.raises(TypeError, match="did you mean `density`"):
        oxmerge.merge_tensors("crumbs", others, base, weight=1, desnity=0.5)
    with pytest.raises(TypeError, match="needs the parameter `weight`"):
        oxmerge.merge_tensors("crumbs", others, base)
    with pytest.raises(TypeError, match="stock takes at least 2 tensors besides the base"):
        oxmerge.merge_tensors("stock", others[:1], base)


def test_names_are_words_and_not_taken() -> None:
    with pytest.raises(ValueError, match="built-in merge method `ties`"):

        @method(name="ties")
        def other(models: Any) -> Any:
            return models[0]

    with pytest.raises(TypeError, match=r"takes \(base, models, \*, parameters\)"):

        @method(base="required")
        def wrong(models: Any) -> Any:
            return models[0]


def test_recipes_say_that_they_do_not_take_them_yet() -> None:
    recipe = {"merge_method": "stock", "models": [{"model": "a"}, {"model": "b"}]}
    with pytest.raises(PlanError, match="`stock` is written in Python"):
        oxmerge.plan(recipe)
