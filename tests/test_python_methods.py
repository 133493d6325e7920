"""Merge methods written in Python: the same bits as those in Rust, and what goes wrong in them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
import written_methods
from oxmerge import formula, method, per_model, python_methods, shared
from oxmerge.errors import PlanError
from oxmerge.formula import compute, vote, weighted_sum

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
        pairs.append((("crumbs", weights), ("breadcrumbs_ties", weights)))
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
    again = oxmerge.merge_state_dicts(plain, dicts)
    assert all(np.array_equal(again[name], merged[name]) for name in merged)


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


def test_numbers_of_numpy_are_numbers() -> None:
    assert isinstance(np.float32(2) * x, formula.Value)
    assert isinstance(np.float64(2) - n, formula.Scalar)
    shown = "greater(x0, 2.0) greater_equal(2.0, x0) sub(1.0, equal(3.0, x0))"
    compared = (np.float32(2) < x, np.float64(2) >= x, np.float32(3) != x)
    assert " ".join(map(repr, compared)) == shown


@pytest.mark.parametrize(
    ("call", "instead"),
    [
        (lambda: np.maximum(x, 1), "`formula.maximum`"),
        (lambda: np.sqrt(n), "`formula.sqrt`"),
        (lambda: np.where(x, 1, 2), "`formula.where`"),
        (lambda: np.sum(x), "`formula.reduce_sum`"),
        (lambda: np.linalg.norm(x), "`formula.norm`"),
        (lambda: np.abs(x), "`abs`"),
        (lambda: np.asarray(x), "see `oxmerge.formula`"),
        (lambda: np.ones(3) * x, "needs arrays"),
        (lambda: x < np.ones(3), "needs arrays"),
    ],
)
def test_functions_of_numpy_are_told_what_to_use_instead(call: Any, instead: str) -> None:
    with pytest.raises(TypeError, match=instead):
        call()


def test_an_exception_in_a_function_is_told_with_method_and_line() -> None:
    class MineError(Exception):
        pass

    def fails(_: float) -> float:
        raise MineError("no")

    @method
    def broken(models: Any) -> Any:
        return models[0] * compute(fails, formula.norm(models[0]))

    stack = [np.ones((400, 400), "f4")]
    with pytest.raises(PlanError, match=r"`broken` failed in line \d+: MineError: no") as caught:
        oxmerge.merge_tensors(broken, stack)
    assert isinstance(caught.value.__cause__, MineError)
    assert caught.value.file == __file__

    @method
    def fails_at_once(models: Any) -> Any:
        return models[0] * compute(lambda one: 1 / (one - 1), 1.0)

    with pytest.raises(PlanError, match=r"`fails_at_once` failed in line \d+: ZeroDivision"):
        oxmerge.merge_tensors(fails_at_once, stack)

    @method
    def cannot(models: Any) -> Any:
        return models[0] / 0 + models[1]

    with pytest.raises(PlanError, match=r"`cannot` failed in line \d+: IndexError"):
        oxmerge.merge_tensors(cannot, stack)


@pytest.mark.parametrize(
    ("function", "results", "told"),
    [
        (lambda _: None, None, "TypeError"),
        (lambda _: "1", None, "TypeError"),
        (lambda _: 1.0, 2, "TypeError"),
        (lambda _: [1.0], 2, "another number of results.*expected 2, found 1"),
        (lambda _: [1.0, 2.0, 3.0], 2, "another number of results.*expected 2, found 3"),
    ],
)
def test_what_is_no_number_is_told(function: Any, results: int | None, told: str) -> None:
    @method
    def wrong(models: Any) -> Any:
        given = compute(function, formula.norm(models[0]), results=results)  # type: ignore[arg-type]
        return models[0] * (given if results is None else given[0])

    with pytest.raises(PlanError, match=told) as caught:
        oxmerge.merge_tensors(wrong, [np.ones(3, "f4")])
    assert "`wrong`" in str(caught.value)


@pytest.mark.parametrize(
    ("formula_of", "told"),
    [
        (lambda v: v / formula.norm(v / formula.norm(v), over="model"), "over the model depends"),
        (lambda v: formula.largest(v, formula.count(over="row")), "one number for the whole"),
        (lambda v: v * (formula.count("row") * formula.count("column")), "of a row and of a col"),
        (lambda v: deep(v, 5000), "nested too deep: expected at most 1000"),
    ],
)
def test_what_no_pass_can_give_is_told_before(formula_of: Any, told: str) -> None:
    @method
    def impossible(models: Any) -> Any:
        return formula_of(models[0])

    with pytest.raises(PlanError, match=told):
        oxmerge.merge_tensors(impossible, [np.ones((3, 3), "f4")])


def deep(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = value + 1
    return value


def test_as_deep_as_it_may_be() -> None:
    @method
    def sums(models: Any) -> Any:
        return deep(models[0], 990)

    for threads in (1, 2):
        merged = oxmerge.merge_tensors(sums, [np.zeros((300, 300), "f4")], threads=threads)
        assert (merged == 990).all()


def test_a_parameter_takes_any_number_unless_it_is_of_another_kind() -> None:
    @method
    def scaled(
        models: Any,
        *,
        strength: Any = shared(1, min=0),
        count: Any = shared(1, kind=int),
        plain: Any = 1,
        is_on: Any = shared(True),
        weight: Any = per_model(kind=int),
    ) -> Any:
        assert [type(each) for each in (strength, count, is_on, *weight)] == [float, int, bool, int]
        return models[0] * (strength * count * plain)

    kinds = [(each.name, each.kind) for each in scaled.described().parameters]
    assert kinds == [
        ("strength", "float"), ("count", "int"), ("plain", "float"), ("is_on", "bool"),
        ("weight", "int"),
    ]  # fmt: skip
    array = np.ones(2, "f4")
    merged = oxmerge.merge_tensors(scaled, [array], strength=0.5, count=3, plain=0.5, weight=1)
    assert (merged == 0.75).all()
    assert (oxmerge.merge_tensors(scaled, [array], weight=1) == 1).all()
    with pytest.raises(ValueError, match=r"`count` is a whole number, not 0\.5"):
        oxmerge.merge_tensors(scaled, [array], count=0.5, weight=1)
    for default, kind in ((1.5, int), (True, int), (True, float), (1, bool), ("1", None)):
        with pytest.raises(TypeError, match="of its kind"):
            shared(default, kind=kind)
    with pytest.raises(TypeError, match="the kind of a parameter is"):
        shared(1, kind=str)  # type: ignore[arg-type]


def test_a_method_is_called_with_values_and_has_its_defaults() -> None:
    @method(base="required")
    def twice(base: Any, models: Any) -> Any:
        return 2 * written_methods.sharpened(base, models, weight=0.1)

    @method(base="required")
    def once(
        base: Any, models: Any, *, weight: Any = per_model(0.25), least: Any = shared(0)
    ) -> Any:
        return base + weighted_sum(weight, models) * least

    base, others = formula.Value("input", index=0), [formula.Value("input", index=1)]
    assert isinstance(twice(base, others), formula.Value)
    assert repr(once(base, others, least=2)) == repr(base + weighted_sum([0.25], others) * 2)
    array = np.ones(3, "f4")
    with pytest.raises(TypeError, match=r"oxmerge.merge_tensors\(once, ...\)"):
        once(array, [array])
    with pytest.raises(TypeError, match=r"called with \(base, models, ...\)"):
        once(others)
    with pytest.raises(TypeError, match="needs the parameter `weight`"):
        written_methods.crumbs(base, others)
    with pytest.raises(TypeError, match="make one of a function"):
        oxmerge.merge_tensors(deep, [array])  # type: ignore[call-overload]
    assert once.__doc__ is None
    assert written_methods.stock.__doc__ == "Model stock, once more."
    assert repr(written_methods.stock) == "<merge method 'stock': written_methods:stock>"


@pytest.mark.parametrize("sees", ["by_row", "turned", "in_torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_functions_of_arrays(sees: str, shape: tuple[int, ...]) -> None:
    base, others = models(shape)
    vectors = [np.atleast_1d(other - base) for other in others]
    axis = 0 if sees == "turned" else -1
    total = base.reshape(vectors[0].shape)
    parts = [np.float32(0.3) * np.sort(vector, axis=axis) for vector in vectors]
    expected = (total + sum(parts)).reshape(shape)
    for threads in (1, 2):
        merged = oxmerge.merge_tensors(sees, others, base, weight=0.3, threads=threads)
        assert np.array_equal(merged, expected)
    into = np.array(others[0])
    oxmerge.merge_tensors(sees, [into, *others[1:]], base, weight=0.3, out=into)
    assert np.array_equal(into, expected)


@pytest.mark.parametrize(
    "result",
    [None, 1.0, np.ones(3), np.ones((2, 2)), "text", np.ones((2, 3), "c8"), np.full((2, 3), "1")],
)
def test_a_function_of_arrays_that_returns_another_shape_is_told(result: Any) -> None:
    @method(sees="tensor")
    def wrong(models: Any) -> Any:
        return result

    with pytest.raises(PlanError, match=r"`wrong` .*no array of the shape .*expected \(2, 3\)"):
        oxmerge.merge_tensors(wrong, [np.ones((2, 3), "f4")])

    @method(sees="rows")
    def ragged(models: Any) -> Any:
        return [[1.0], [1.0, 2.0]]

    with pytest.raises(PlanError, match="`ragged` failed in line"):
        oxmerge.merge_tensors(ragged, [np.ones((2, 3), "f4")])


def test_a_method_that_returns_no_formula_is_told_with_its_place() -> None:
    @method
    def nothing(models: Any) -> Any:
        return None

    with pytest.raises(PlanError, match=r"`nothing` .line \d+. returned no formula") as caught:
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
    with pytest.raises(ValueError, match="merge method `ties` already"):

        @method(name="ties")
        def other(models: Any) -> Any:
            return models[0]

    with pytest.raises(TypeError, match=r"takes \(base, models, \*, parameters\)"):

        @method(base="required")
        def wrong(models: Any) -> Any:
            return models[0]

    with pytest.raises(TypeError, match=r'for a base write `@method\(base="required"\)`'):

        @method
        def also_wrong(base: Any, models: Any) -> Any:
            return models[0]

    with pytest.raises(TypeError, match="cannot have a parameter `seed`"):

        @method
        def seeded(models: Any, *, seed: Any = shared(1)) -> Any:
            return models[0]

    # What recipes may ask of any method goes by its name.
    with pytest.raises(TypeError, match="cannot have a parameter `keep`: every method has one"):

        @method
        def keeping(models: Any, *, keep: Any = shared(0.5)) -> Any:
            return models[0]

    with pytest.raises(TypeError, match="a merge method is a function"):
        method(name="one")(print)
    with pytest.raises(ValueError, match="is not from 0 to 1"):
        shared(2.0, min=0, max=1)
    with pytest.raises(ValueError, match="sees must be"):
        method(sees="columns")  # type: ignore[call-overload]
