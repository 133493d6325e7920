"""The pieces of methods on arrays: against simple oracles, and what they say of bad arguments."""

from __future__ import annotations

import array
import inspect
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any, cast

import ml_dtypes
import numpy as np
import oxmerge
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oxmerge import _core, kernels

BF16 = ml_dtypes.bfloat16
DTYPES: list[Any] = [np.float16, BF16, np.float32, np.float64]
X = np.array([1, 2, 3], np.float32)
WIDE = np.zeros(8, np.float32)
READ_ONLY = np.zeros(3, np.float32)
READ_ONLY.setflags(write=False)
LENGTHS = st.sampled_from([1, 2, 15, 2048, 2049, 65_536, 65_537, 140_000, 400_001])


@st.composite
def tensors(draw: st.DrawFn, count: int = 1, dtypes: list[Any] = DTYPES) -> list[Any]:
    """Arrays of one type and length, as weights are, with zeros and ties."""
    length, dtype = draw(LENGTHS), draw(st.sampled_from(dtypes))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1e-3, 1.0, 100.0]))
    found = []
    for _ in range(count):
        values = generator.standard_normal(length) * scale
        values[generator.random(length) < 0.1] = 0
        found.append(values.astype(dtype))
    return found


def working(values: Any) -> Any:
    """Widen as the engine does."""
    return values.astype(np.float64 if values.dtype == np.float64 else np.float32)


threads = st.sampled_from([None, 1, 2, 4])


# Against oracles.


@given(tensors(count=3), st.lists(st.floats(-2, 2), min_size=3, max_size=3), threads)
@settings(deadline=None, max_examples=60)
def test_weighted_sum(inputs: list[Any], weights: list[float], workers: int | None) -> None:
    kept = [(w, x) for w, x in zip(weights, inputs, strict=True) if w != 0]
    wide = working(inputs[0]).dtype.type
    total = np.zeros(inputs[0].shape, wide)
    for at, (weight, values) in enumerate(kept):
        product = wide(weight) * working(values)
        total = product if at == 0 else total + product
    if len(kept) == 1 and kept[0][0] == 1:
        total = kept[0][1]
    found = kernels.weighted_sum(inputs, weights, threads=workers)
    assert found.dtype == inputs[0].dtype
    assert found.tobytes() == total.astype(found.dtype).tobytes()


@given(tensors(count=2), threads)
@settings(deadline=None, max_examples=30)
def test_task_vector(inputs: list[Any], workers: int | None) -> None:
    tuned, base = inputs
    found = kernels.task_vector(tuned, base, threads=workers)
    expected = (working(tuned) - working(base)).astype(tuned.dtype)
    assert found.tobytes() == expected.tobytes()


@given(tensors(), st.floats(0, 1), threads)
@settings(deadline=None, max_examples=60)
def test_top_k_mask_and_kth_magnitude(inputs: list[Any], share: float, workers: int | None) -> None:
    (values,) = inputs
    k = round(share * values.size)
    magnitudes = np.abs(working(values))
    order = np.argsort(-magnitudes, kind="stable")
    expected = np.zeros(values.size, bool)
    expected[order[:k]] = True
    mask = kernels.top_k_mask(values, k, threads=workers)
    assert mask.dtype == bool
    assert np.array_equal(mask, expected)
    as_floats = kernels.top_k_mask(values, k, dtype="float16", threads=workers)
    assert np.array_equal(as_floats, expected.astype(np.float16))
    if k:
        assert kernels.kth_magnitude(values, k, threads=workers) == magnitudes[order[k - 1]]


def test_a_nan_of_float64_is_the_largest() -> None:
    values = np.random.default_rng(0).standard_normal(300_000)
    values[0] = math.nan
    assert math.isnan(kernels.kth_magnitude(values, 1))
    assert kernels.kth_magnitude(values, 2) == np.abs(values[1:]).max()
    assert np.flatnonzero(kernels.top_k_mask(values, 1)).tolist() == [0]


@given(tensors(count=3), st.lists(st.floats(-2, 2), min_size=3, max_size=3), threads)
@settings(deadline=None, max_examples=30)
def test_sign_consensus(inputs: list[Any], weights: list[float], workers: int | None) -> None:
    total = working(kernels.weighted_sum(inputs, weights, dtype=working(inputs[0]).dtype))
    expected = np.where(total >= 0, 1, -1)
    assert np.array_equal(kernels.sign_consensus(inputs, weights, threads=workers), expected)


def test_a_vote_without_a_number_elects_none() -> None:
    found = kernels.sign_consensus([np.array([math.nan, -0.0, -math.inf], np.float32)])
    np.testing.assert_array_equal(found, np.array([math.nan, 1, -1], np.float32))


@given(st.integers(0, 2**64 - 1), st.floats(0.01, 0.99), st.integers(0, 3), LENGTHS, threads)
@settings(deadline=None, max_examples=30)
def test_random_masks_are_those_of_dare(
    seed: int, density: float, position: int, length: int, workers: int | None
) -> None:
    zeros, ones = np.zeros(length, np.float32), np.ones(length, np.float32)
    inputs = [zeros] * position + [ones]
    options: dict[str, Any] = {"weight": 1, "density": density, "rescale": False}
    drawn = kernels.dare_linear(inputs, zeros, seed=seed, name="layer", **options)
    mask = kernels.random_mask(
        length, density, seed=seed, name="layer", position=position, threads=workers
    )
    assert mask.dtype == bool
    assert np.array_equal(mask, drawn == 1)


@given(tensors(), st.integers(0, 300), st.integers(1, 400), st.integers(1, 70_000), threads)
@settings(deadline=None, max_examples=40)
def test_the_largest_of_each_few_elements_of_a_row(
    arrays: list[Any], k: int, every: int, width: int, workers: int | None
) -> None:
    values = arrays[0]
    width = min(width, values.size)
    rows = values[: values.size // width * width].reshape(-1, width)
    padded = np.pad(np.abs(rows), ((0, 0), (0, -width % every)), constant_values=-1)
    order = np.argsort(-padded.reshape(-1, every), axis=1, kind="stable")
    place = np.argsort(order, axis=1).reshape(padded.shape)[:, :width]
    mask = kernels.row_top_k_mask(rows, k, every=every, threads=workers)
    assert np.array_equal(mask, place < k)


@given(st.integers(0, 2**64 - 1), st.floats(0.2, 0.8), st.integers(0, 3), LENGTHS, threads)
@settings(deadline=None, max_examples=30)
def test_masks_by_rank_are_those_of_della(
    seed: int, density: float, position: int, length: int, workers: int | None
) -> None:
    vector = np.random.default_rng(length).normal(size=(2, length)).astype(np.float32)
    zeros = np.zeros_like(vector)
    options: dict[str, Any] = {"weight": 1, "density": density, "epsilon": 0.125, "rescale": False}
    inputs = [zeros] * position + [vector]
    drawn = kernels.della_linear(inputs, zeros, seed=seed, name="layer", **options)
    bounds = (density - 0.125, density + 0.125)
    mask = kernels.random_mask_by_rank(
        vector, bounds, seed=seed, name="layer", position=position, threads=workers
    )
    assert np.array_equal(np.where(mask, vector, 0), drawn)


def test_random_masks_have_shape_and_density() -> None:
    mask = kernels.random_mask((300, 400), 0.25, dtype="float32")
    assert mask.shape == (300, 400)
    assert mask.dtype == np.float32
    assert abs(mask.mean() - 0.25) < 0.01
    assert kernels.random_mask(7, 1).all()
    assert not kernels.random_mask(7, 0).any()


@given(tensors(count=2), threads)
@settings(deadline=None, max_examples=40)
def test_numbers_of_arrays(inputs: list[Any], workers: int | None) -> None:
    a, b = (values.astype(np.float64) for values in inputs)
    options: dict[str, Any] = {"threads": workers}
    x, y = inputs

    def near(found: float, terms: Any) -> bool:
        return math.isclose(
            found, math.fsum(terms), rel_tol=0, abs_tol=1e-13 * math.fsum(np.abs(terms)) + 1e-300
        )

    assert near(kernels.norm(x, 1, **options), np.abs(a))
    assert near(kernels.norm(x, **options) ** 2, a * a)
    assert kernels.norm(x, math.inf, **options) == np.abs(a).max()
    assert near(kernels.dot(x, y, **options), a * b)
    products = kernels.gram(inputs, **options)
    assert products.dtype == np.float64
    assert near(products[0, 1], a * b)
    assert products[1, 0] == products[0, 1] == kernels.dot(x, y)
    assert products[0, 0] == kernels.dot(x, x)
    differences = [working(values) - working(y) for values in inputs]
    wide = [values.astype(np.float64) for values in differences]
    found = kernels.gram([x, x], base=y, **options)
    assert near(found[0, 1], wide[0] * wide[0])


def test_numbers_do_not_depend_on_threads() -> None:
    values = np.random.default_rng(0).standard_normal(700_001).astype(np.float32)
    for call in (kernels.norm, lambda x, **o: kernels.dot(x, x[::-1].copy(), **o)):
        assert len({call(values, threads=count) for count in (1, 2, 3, 7)}) == 1


def test_numbers_of_nothing() -> None:
    nothing = np.empty((0, 3), np.float32)
    assert kernels.norm(nothing) == kernels.norm(nothing, 1) == kernels.norm(nothing, math.inf) == 0
    assert kernels.dot(nothing, nothing) == 0
    assert kernels.top_k_mask(nothing, 0).shape == (0, 3)
    assert kernels.weighted_sum([nothing], [2]).shape == (0, 3)
    assert kernels.ulp_distance(nothing, nothing) == (0, 0)


@given(
    hnp.arrays(np.uint32, st.integers(1, 200)).map(lambda bits: bits.view(np.float32)),
    st.sampled_from(DTYPES),
)
@settings(deadline=None)
def test_convert(values: Any, dtype: Any) -> None:
    with np.errstate(all="ignore"):
        expected = values.astype(dtype)
    found = kernels.convert(values, dtype)
    assert found.dtype == dtype
    numbers = ~np.isnan(values)
    assert found[numbers].tobytes() == expected[numbers].tobytes()
    assert np.isnan(found[~numbers]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp_distance(dtype: Any) -> None:
    bits: Any = {2: np.uint16, 4: np.uint32, 8: np.uint64}[np.dtype(dtype).itemsize]
    one = int(np.ones(1, dtype).view(bits)[0])
    infinity = int(np.array([math.inf], dtype).view(bits)[0])

    def of(*values: int) -> Any:
        return np.array(values, bits).view(dtype)

    zero, sign = 0, 1 << (8 * np.dtype(dtype).itemsize - 1)
    assert kernels.ulp_distance(of(one, one), of(one, one)) == (0, 0)
    assert kernels.ulp_distance(of(one, one, one), of(one + 3, one, one - 7)) == (7, 2)
    assert kernels.ulp_distance(of(zero), of(sign)) == (0, 0)
    assert kernels.ulp_distance(of(2), of(sign | 3)) == (5, 1)
    assert kernels.ulp_distance(of(infinity | 1), of(sign | infinity | 5)) == (0, 0)
    assert kernels.ulp_distance(of(infinity), of(infinity | 1)) == (1, 1)
    assert kernels.ulp_distance(of(infinity), of(sign | infinity)) == (2 * infinity, 1)
    many = np.full(300_000, one, bits)
    other = many.copy()
    other[[5, 299_999]] += np.array([1, 9], bits)
    assert kernels.ulp_distance(many.view(dtype), other.view(dtype), threads=3) == (9, 2)


# Lists.


SHAPES = [(64, 64), (1,), (), (0, 3), (70_001,), (3, 5, 7), (2, 40_000), (8192,), (8193,)]


def lists_of(dtype: Any, count: int = 2) -> list[list[Any]]:
    generator = np.random.default_rng(3)
    return [
        [np.asarray(generator.standard_normal(shape)).astype(dtype) for shape in SHAPES]
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, BF16])
@pytest.mark.parametrize("threads", [1, 3, None])
def test_lists_give_what_single_arrays_give(dtype: Any, threads: int | None) -> None:
    a, b, c = lists_of(dtype, 3)
    calls: list[tuple[Any, Any]] = [
        (lambda x, **k: kernels.lerp(x(a), x(b), 0.3, **k), a),
        (lambda x, **k: kernels.lerp(x(a), x(b), 0.3, **k), b),
        (lambda x, **k: kernels.lerp(x(a), x(b), 0.7, **k), b),
        (lambda x, **k: kernels.lerp(x(a), x(a), 0.7, **k), a),
        (lambda x, **k: kernels.weighted_sum([x(a), x(b)], [0.2, 0.9], **k), a),
        (lambda x, **k: kernels.weighted_sum([x(a), x(b)], [0.2, 0.9], **k), b),
        (lambda x, **k: kernels.weighted_sum([x(a), x(b), x(c)], [0.2, 0, 0.9], **k), c),
        (lambda x, **k: kernels.task_vector(x(a), x(b), **k), b),
        (lambda x, **k: kernels.sign_consensus([x(a), x(b)], [1, 2], **k), a),
        (lambda x, **k: kernels.convert(x(a), "float32", **k), None),
        (lambda x, **k: kernels.convert(x(a), dtype, **k), a),
    ]
    for call, target in calls:
        single = [call(lambda arrays, at=at: arrays[at]) for at in range(len(SHAPES))]
        expected = [each.tobytes() for each in single]
        for many in (call(list, threads=threads), call(tuple, threads=threads)):
            assert [each.dtype for each in many] == [each.dtype for each in single]
            assert [each.tobytes() for each in many] == expected
        out = [np.empty_like(each) for each in single]
        assert call(list, out=out, threads=threads) is out
        assert [each.tobytes() for each in out] == expected
        if target is not None:
            before = [each.copy() for each in target]
            call(list, out=target, threads=threads)
            assert [each.tobytes() for each in target] == expected
            target[:] = before


def test_lists_of_any_arrays() -> None:
    odd = np.arange(12, dtype=np.float32).reshape(3, 4).T
    narrow = np.ones(3, ml_dtypes.float8_e4m3fn)
    mixed = [odd, narrow, array.array("f", [1, 2]), np.array([1, 2], np.float64)]
    found = kernels.weighted_sum([mixed, mixed], [1, 1])
    assert [each.tolist() for each in found] == [(2 * odd).tolist(), [2, 2, 2], [2, 4], [2, 4]]
    assert [each.dtype.name for each in found] == ["float32", "bfloat16", "float32", "float64"]
    assert kernels.lerp([], [], 0.5) == []
    single = kernels.weighted_sum([[X, X]], [2], dtype="float16")
    assert [each.dtype.name for each in single] == ["float16", "float16"]


def test_lerp_is_exact_at_the_ends_and_where_both_are_equal() -> None:
    a, b = (np.random.default_rng(at).standard_normal(999).astype(np.float32) for at in range(2))
    assert np.array_equal(kernels.lerp(a, b, 0), a)
    assert np.array_equal(kernels.lerp(a, b, 1), b)
    for t in (0.1, 0.5, 0.9, 0.999):
        assert np.array_equal(kernels.lerp(a, a, t), a)
        near, far, share = (a, b, t) if t < 0.5 else (b, a, 1 - t)
        assert np.array_equal(kernels.lerp(a, b, t), near + np.float32(share) * (far - near))
    assert kernels.lerp(a, b, -1).tolist() == (a - (b - a)).tolist()


def overlapping_lists() -> Any:
    flat = np.arange(8, dtype=np.float32)
    return kernels.lerp([flat[:4], X[:2]], [flat[2:6], X[1:]], 0.5, out=[flat[:4], flat[6:]])


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            lambda: kernels.lerp([X], [X, X], 0.5),
            ValueError,
            "b has 2 arrays, and a 1; give lists of one length",
        ),
        (
            lambda: kernels.lerp([X], X, 0.5),
            TypeError,
            "b is a ndarray, and a a list of arrays; pass lists for all",
        ),
        (
            lambda: kernels.weighted_sum([[X, X], [X, X[:2]]], [1, 1]),
            ValueError,
            (
                "tensors[1][1] has the shape (2,), and tensors[0][1] (3,); all must be equal: "
                "reshape one, or leave it out"
            ),
        ),
        (
            lambda: kernels.lerp([X], [X], 0.5, out=X),
            TypeError,
            "out is a ndarray, and a a list of arrays; pass lists for all",
        ),
        (
            lambda: kernels.lerp([X, X], [X, X], 0.5, out=[np.empty(3, np.float32), READ_ONLY]),
            ValueError,
            "out[1] is read-only; pass an array that may be written to",
        ),
        (
            lambda: kernels.lerp([X], [X], 0.5, out=[np.empty(6, np.float32)[::2]]),
            ValueError,
            (
                "the elements of out[0] do not follow each other in memory; write into a "
                "contiguous one, such as `numpy.ascontiguousarray(out[0])`, and copy from there"
            ),
        ),
        (
            lambda: kernels.lerp([X], [X], 0.5, out=[np.empty(3, np.float16)], dtype="float32"),
            ValueError,
            "out[0] is of F16, and the result of F32; pass one of F32, or another dtype",
        ),
        (
            lambda: kernels.lerp([X], [[1, 2, 3]], 0.5),
            TypeError,
            (
                "b[0] is no array but a list; pass a NumPy array, a torch tensor, or something "
                "with a buffer or DLPack"
            ),
        ),
        (
            lambda: kernels.lerp([X, X], [X, X], 0.5, out=[WIDE[:3], WIDE[1:4]]),
            ValueError,
            "two of out share memory; pass arrays of their own, or leave one of them out",
        ),
        (
            overlapping_lists,
            ValueError,
            (
                "out overlaps an input without being the same array; pass another out, or the "
                "input itself to overwrite it"
            ),
        ),
    ],
)
def test_errors_of_lists_say_which(act: Any, kind: type[Exception], message: str) -> None:
    before = WIDE.copy()
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        act()
    assert np.array_equal(WIDE, before)


# What an array is.


def test_what_is_not_contiguous_is_copied() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for odd in (values.T, values[:, ::2], values[::-1], np.asfortranarray(values)):
        found = kernels.weighted_sum([odd], [2])
        assert found.flags.c_contiguous
        assert np.array_equal(found, 2 * odd)


def test_other_arrays() -> None:
    buffer = array.array("f", [1, 2, 3])
    found = kernels.weighted_sum([buffer, memoryview(buffer)], [1, 1])
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [2, 4, 6]

    class Capsule:
        def __init__(self) -> None:
            self.array = np.array([1, 2, 3], np.float32)

        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.array.__dlpack_device__()

    assert kernels.weighted_sum([Capsule()], [3]).tolist() == [3, 6, 9]
    out: Any = array.array("f", [0, 0, 0])
    assert kernels.weighted_sum([buffer], [5], out=out) is out
    assert out.tolist() == [5, 10, 15]
    assert oxmerge.merge_tensors("linear", [buffer], weight=1, out=out) is out
    assert out.tolist() == [1, 2, 3]


def test_tensors_come_in_any_iterable() -> None:
    stacked: Any = np.arange(6, dtype=np.float32).reshape(2, 3)
    weights: Any = np.ones(2)
    rows: Any = (row for row in stacked)
    expected = [3, 5, 7]
    assert kernels.weighted_sum(stacked, weights).tolist() == expected
    assert kernels.weighted_sum(rows, (1, 1)).tolist() == expected
    assert kernels.sign_consensus(stacked).tolist() == [1, 1, 1]
    assert kernels.gram(stacked).tolist() == [[5, 14], [14, 50]]
    options: dict[str, Any] = {"weight": 1, "normalize": False}
    assert oxmerge.merge_tensors("linear", stacked, **options).tolist() == expected
    dicts: Any = ({"x": row} for row in stacked)
    merged = oxmerge.merge_state_dicts("linear", dicts, **options)
    assert merged["x"].tolist() == expected


def test_numbers_of_numpy_are_numbers() -> None:
    one: Any = np.int64(1)
    shape: Any = np.array([2, 3])
    assert kernels.random_mask(shape[0], 1, position=one).shape == (2,)
    assert kernels.random_mask(shape, 1).shape == (2, 3)
    assert kernels.top_k_mask(X, one, threads=one).tolist() == [0, 0, 1]


def test_a_mask_of_bfloat16_goes_to_out() -> None:
    out = np.empty(5, BF16)
    assert kernels.random_mask(5, 1, out=out) is out
    assert out.tolist() == [1] * 5


def test_results_go_to_out() -> None:
    values = np.array([1, 2, 3], np.float32)
    out = np.empty(3, np.float16)
    assert kernels.weighted_sum([values], [2], out=out) is out
    assert out.tolist() == [2, 4, 6]
    assert kernels.convert(values, "float16", out=out) is out
    assert out.tolist() == [1, 2, 3]
    mask = np.empty(3, np.float32)
    assert kernels.top_k_mask(values, 1, out=mask) is mask
    assert mask.tolist() == [0, 0, 1]
    assert kernels.weighted_sum([values], [2], out=values) is values
    assert values.tolist() == [2, 4, 6]


def test_integers_are_copied_where_equal() -> None:
    ids = np.arange(5)
    merged = oxmerge.merge_tensors("linear", [ids, ids.copy()], weight=1)
    assert merged is not ids
    assert np.array_equal(merged, ids)
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.merge_tensors("linear", [ids, ids + 1], weight=1, name="ids")
    assert str(caught.value) == (
        "tensor `ids`: integer and bool tensors are copied, and so must be the same in every "
        "model: expected the bytes of input 0, found others in input 1\n"
        "  hint: leave one of the models out, or make the tensors equal first"
    )


# The functions of methods.


def test_only_public_names_are_listed() -> None:
    assert dir(kernels) == sorted(kernels.__all__)


def test_every_method_is_a_function() -> None:
    for row in _core.methods():
        function = getattr(kernels, row["name"])
        assert row["name"] in kernels.__all__
        assert function.__doc__.startswith(f"{row['title']}: ")
        signature = inspect.signature(function)
        for parameter in row["parameters"]:
            name = "lambda_" if parameter["name"] == "lambda" else parameter["name"]
            default = signature.parameters[name].default
            required = default is inspect.Parameter.empty
            assert required == parameter["required"]
            assert required or default == parameter["default"]


def test_parameters_are_for_all_or_for_each() -> None:
    a, b, base = (np.array([at, 2 * at, -at], np.float32) for at in (1, 2, 3))
    same = oxmerge.merge_tensors("task_arithmetic", [a, b], base, weight=0.5)
    halves: list[Any] = [[0.5, 0.5], (0.5, 0.5), np.float32(0.5), np.full(2, 0.5)]
    for weight in halves:
        assert np.array_equal(kernels.task_arithmetic([a, b], base, weight=weight), same)
    scaled = kernels.task_arithmetic([a, b], base, weight=0.5, lambda_=0.5)
    keyword: dict[str, Any] = {"lambda": 0.5}
    again = oxmerge.merge_tensors("task_arithmetic", [a, b], base, weight=0.5, **keyword)
    assert np.array_equal(scaled, again)
    assert not np.array_equal(scaled, same)


# Errors.


def call(method: str, *arguments: Any, **options: Any) -> Any:
    return lambda: oxmerge.merge_tensors(method, *arguments, **options)


def sums(*arguments: Any, **options: Any) -> Any:
    return lambda: kernels.weighted_sum(*arguments, **options)


OVERLAP = (
    "out overlaps an input without being the same array; pass another out, or the input itself "
    "to overwrite it"
)


class Module:
    """What is given in place of its state dict."""

    def state_dict(self) -> dict[str, Any]:
        return {"x": X}


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            call("tie", [X], X, weight=1),
            ValueError,
            "there is no merge method `tie`; did you mean `ties`?",
        ),
        (
            call("ties", [X], X, weight=1, densty=0.5),
            TypeError,
            "ties has no parameter `densty`; did you mean `density`?",
        ),
        (
            call("slerp", [X], X, t=0, zzz=0.5),
            TypeError,
            "slerp has no parameter `zzz`; its parameters: t",
        ),
        (
            call("slerp", [X], X, t=0, thread=2),
            TypeError,
            "slerp has no parameter `thread`; did you mean `threads`?",
        ),
        (call("ties", [X], X), TypeError, "ties needs the parameter `weight`"),
        (
            call("ties", [X], X, weights=1),
            TypeError,
            "ties has no parameter `weights`; did you mean `weight`?",
        ),
        *(
            (
                call("linear", [X, X], weight=1, out=np.zeros(3, kind)),
                ValueError,
                f"out is of {code}, and the result of F32; pass one of F32, or another dtype",
            )
            for kind, code in ((np.int32, "I32"), (np.int64, "I64"), (np.uint16, "U16"))
        ),
        (
            call("ties", [X], weight=1),
            TypeError,
            "ties needs a base: the tensor that the others were made from",
        ),
        (
            call("linear", [X], X, weight=1),
            TypeError,
            "linear takes no base; put it among the tensors if it is to be merged",
        ),
        (call("linear", [], weight=1), TypeError, "linear takes at least 1 tensor, not 0"),
        (
            call("slerp", [X, X], X, t=1),
            TypeError,
            "slerp takes exactly 1 tensor besides the base, not 2",
        ),
        (
            call("linear", [X, X], weight=[1, 2, 3]),
            ValueError,
            "`weight` has 3 values for 2 tensors; give one for each, or one number for all",
        ),
        (
            call("linear", [X], weight="much"),
            ValueError,
            "`weight` is a finite number, not 'much'",
        ),
        (
            call("linear", [X], weight=1, normalize=2),
            ValueError,
            "`normalize` is true or false, not 2",
        ),
        (
            call("linear", [X, X[:2]], weight=1),
            ValueError,
            (
                "tensors[1] has the shape (2,), and tensors[0] (3,); all must be equal: "
                "reshape one, or leave it out"
            ),
        ),
        (
            call("linear", [X, np.arange(3)], weight=1),
            TypeError,
            (
                "only floats can be converted, and the types differ: tensors[0] of F32, "
                "tensors[1] of I64; convert one of them first"
            ),
        ),
        (
            call("linear", [[1, 2]], weight=1),
            TypeError,
            (
                "tensors[0] is no array but a list; pass a NumPy array, a torch tensor, or "
                "something with a buffer or DLPack"
            ),
        ),
        (
            call("linear", [X.astype(">f4")], weight=1),
            TypeError,
            "tensors[0] is of >f4, which is not supported; convert it to float32 or bfloat16",
        ),
        (
            call("linear", [X.astype(complex)], weight=1),
            TypeError,
            (
                "tensors[0] is of complex128, which is not supported; convert it to float32 or "
                "bfloat16"
            ),
        ),
        (
            call("linear", [X], weight=1, seed=-1),
            ValueError,
            "seed must be from 0 to 2**64 - 1, not -1",
        ),
        (
            call("linear", [X], weight=1, threads=0),
            ValueError,
            "threads must be at least 1, not 0",
        ),
        (
            call("linear", [X], weight=1, dtype="bfloat"),
            TypeError,
            "dtype cannot be 'bfloat'; did you mean `bfloat16`?",
        ),
        (
            call("linear", [X], weight=1, dtype="int8"),
            TypeError,
            "dtype cannot be 'int8'; use one of float16, bfloat16, float32, float64",
        ),
        (
            sums([X, X], [1]),
            ValueError,
            "there are 1 weights for 2 tensors; give one for each",
        ),
        (
            sums([X, X], [1, math.nan]),
            ValueError,
            "weights[1] must be a finite number, not nan",
        ),
        (
            lambda: kernels.sign_consensus([X], [-math.inf]),
            ValueError,
            "weights[0] must be a finite number, not -inf",
        ),
        (
            lambda: kernels.random_mask(3, "a"),  # type: ignore[call-overload]
            ValueError,
            "density must be a finite number, not 'a'",
        ),
        (
            lambda: kernels.random_mask(3, 0.5, name=3),  # type: ignore[call-overload]
            TypeError,
            "name must be text, the tensor's in its model, not 3",
        ),
        (
            call("linear", [X], weight=1, name=3),
            TypeError,
            "name must be text, the tensor's in its model, not 3",
        ),
        (
            lambda: oxmerge.merge_tensors([X], "linear", weight=1),  # type: ignore[call-overload]
            TypeError,
            "method must be a name, such as 'linear', not a list",
        ),
        (
            lambda: oxmerge.merge_state_dicts("linear", cast("Any", [{3: X}]), weight=1),
            TypeError,
            "a name is 3; names of tensors must be text",
        ),
        (sums([], []), ValueError, "there is no tensor"),
        (
            sums([X.view(np.uint16)], [1]),
            TypeError,
            (
                "tensors[0] is of U16; convert it to floats first, or view its bits as what they "
                "are (`.view(ml_dtypes.bfloat16)`)"
            ),
        ),
        (
            sums([np.arange(3)], [1]),
            TypeError,
            "tensors[0] is of I64; convert it to floats first",
        ),
        (
            sums([X], [1], out=np.empty(4, np.float32)),
            ValueError,
            "out has the shape (4,), and the result (3,); pass one of that shape",
        ),
        (
            sums([X], [1], out=np.empty(3, np.float16), dtype="float32"),
            ValueError,
            "out is of F16, and the result of F32; pass one of F32, or another dtype",
        ),
        (
            sums([X], [1], out=np.empty(3, np.int32)),
            TypeError,
            "out is of I32; pass one of floats",
        ),
        (
            sums([X], [1], out=np.empty(6, np.float32)[::2]),
            ValueError,
            (
                "the elements of out do not follow each other in memory; write into a contiguous "
                "one, such as `numpy.ascontiguousarray(out)`, and copy from there"
            ),
        ),
        (
            sums([X], [1], out=READ_ONLY),
            ValueError,
            "out is read-only; pass an array that may be written to",
        ),
        (sums([WIDE[:4]], [2], out=WIDE[2:6]), ValueError, OVERLAP),
        (
            lambda: kernels.convert(WIDE[:4], "float16", out=WIDE.view(np.float16)[:4]),
            ValueError,
            OVERLAP,
        ),
        (
            lambda: kernels.top_k_mask(X, 4),
            ValueError,
            "k must be from 0 to 3, the number of elements, not 4",
        ),
        (
            lambda: kernels.kth_magnitude(X, 0),
            ValueError,
            "k must be from 1 to 3, the number of elements, not 0",
        ),
        (
            lambda: kernels.top_k_mask(X, 1, out=np.empty(3, np.int8)),
            TypeError,
            "out is of I8; pass one of bool or floats",
        ),
        (
            lambda: kernels.top_k_mask(X, 2.7),  # type: ignore[call-overload]
            TypeError,
            "k must be a whole number, not 2.7",
        ),
        (
            lambda: kernels.random_mask(3, 0.5, position=1.5),  # type: ignore[call-overload]
            TypeError,
            "position must be a whole number, not 1.5",
        ),
        (
            lambda: kernels.random_mask(2.5, 0.5),  # type: ignore[call-overload]
            TypeError,
            "shape must be a sequence of whole numbers, not a float",
        ),
        (
            sums([X, X], 0.5),
            TypeError,
            "weights must be a sequence of numbers, not a float",
        ),
        (
            sums({"x": X}, [1]),
            TypeError,
            "tensors must be a sequence of arrays, not a dict",
        ),
        (
            lambda: oxmerge.merge_state_dicts("linear", {"x": X}, weight=1),  # type: ignore[call-overload]
            TypeError,
            "state_dicts must be a sequence of mappings, not a dict",
        ),
        (
            lambda: oxmerge.merge_state_dicts("linear", ["models/a"], weight=1),  # type: ignore[arg-type]
            TypeError,
            (
                "state_dicts[0] must be a mapping of names to arrays, not a str; open it with "
                "`oxmerge.open`"
            ),
        ),
        (
            lambda: oxmerge.merge_state_dicts("linear", [Module()], weight=1),  # type: ignore[arg-type]
            TypeError,
            (
                "state_dicts[0] must be a mapping of names to arrays, not a Module; pass its "
                "`state_dict()`"
            ),
        ),
        (
            lambda: oxmerge.merge_state_dicts("linear", [{"x": X}], weight=1, out=[]),  # type: ignore[call-overload]
            TypeError,
            "out must be a mapping of names to arrays, not a list",
        ),
        (
            sums([X], [1], threads=10**30),
            ValueError,
            f"threads must be at most 4294967295, not {10**30}",
        ),
        (
            call("linear", [X], weight=1, seed=1.5),
            TypeError,
            "seed must be a whole number, not 1.5",
        ),
        (
            call("task_arithmetic", [X], X, weight=1, lambda_=1, **{"lambda": 1}),
            TypeError,
            "`lambda` and `lambda_` are one parameter; give one of them",
        ),
        (
            sums([np.ma.masked_array(X, X > 1)], [1]),
            TypeError,
            "tensors[0] is a masked array; fill it first (`.filled()`)",
        ),
        (
            call("linear", [np.arange(2), np.arange(1, 3)], weight=1),
            oxmerge.PlanError,
            (
                "integer and bool tensors are copied, and so must be the same in every model: "
                "expected the bytes of input 0, found others in input 1\n"
                "  hint: leave one of the models out, or make the tensors equal first"
            ),
        ),
        (lambda: kernels.norm(X, 3), ValueError, "order must be 1, 2 or inf, not 3"),
        (
            lambda: kernels.dot(X, X[:2]),
            ValueError,
            "b has the shape (2,), and a (3,); all must be equal: reshape one, or leave it out",
        ),
        (
            lambda: kernels.random_mask(3, 1.5),
            ValueError,
            "density must be from 0 to 1, not 1.5",
        ),
        (
            lambda: kernels.random_mask(3, 0.5, position=-1),
            ValueError,
            "position must be from 0 to 2**32 - 1, not -1",
        ),
        (
            lambda: kernels.ulp_distance(X, X.astype(np.float16)),
            TypeError,
            "a is of F32 and b of F16; convert one of them first",
        ),
        (
            lambda: oxmerge.merge_state_dicts("linear", [{"x": X, "y": X}, {"y": X}], weight=1),
            ValueError,
            "the names differ: state_dicts[1] lacks `x`; pass mappings with the same names",
        ),
        (
            lambda: oxmerge.merge_state_dicts(
                "ties", [{"x": X, "z": X}], {"x": X, "y": X}, weight=1, out={"x": X}
            ),
            ValueError,
            (
                "the names differ: state_dicts[0] lacks `y`; base lacks `z`; out lacks `y`, `z`; "
                "pass mappings with the same names"
            ),
        ),
        (
            lambda: oxmerge.merge_state_dicts("linear", [{"x": X}, {"x": X[:2]}], weight=1),
            ValueError,
            (
                "tensor `x`: state_dicts[1] has the shape (2,), and state_dicts[0] (3,); "
                "all must be equal: reshape one, or leave it out"
            ),
        ),
        (
            lambda: oxmerge.merge_state_dicts("linear", [{"x": X}], weight=1, out={"x": X[:2]}),
            ValueError,
            "tensor `x`: out has the shape (2,), and the result (3,); pass one of that shape",
        ),
    ],
)
def test_errors_say_what_to_do(act: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        act()


def test_an_unknown_method_is_answered_with_where_they_are() -> None:
    with pytest.raises(ValueError, match="there is no merge method `xyzzy`; `oxmerge methods`"):
        oxmerge.merge_tensors("xyzzy", [X])


# Threads, signals, time.


def test_other_threads_run_meanwhile() -> None:
    values = np.zeros(8 << 20, np.float32)
    counted, done = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not done.wait(0.0005):
            counted += 1

    counter = threading.Thread(target=count)
    counter.start()
    for _ in range(5):
        kernels.ties([values, values], values, weight=1, density=0.5, threads=1)
    done.set()
    counter.join()
    assert counted > 3


def test_an_interrupt_stops_a_long_call() -> None:
    values = np.random.default_rng(0).standard_normal(8 << 20).astype(np.float32)
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    started = time.process_time()

    def merge() -> None:
        for _ in range(200):
            kernels.dare_ties([values] * 4, values, weight=1, density=0.5, threads=1)

    with pytest.raises(KeyboardInterrupt):
        merge()
    assert time.process_time() - started < 5
    timer.join()


def test_importing_needs_neither_numpy_nor_torch() -> None:
    program = (
        "import sys, oxmerge; from oxmerge import kernels; kernels.ties; oxmerge.merge_tensors; "
        "oxmerge.lazy; print([n for n in ('numpy', 'torch', 'ml_dtypes') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
