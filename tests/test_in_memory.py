"""Merging in memory gives the bits that merging files gives, for every method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import oxmerge
import pytest
from test_same_bytes import METHODS, recipe_of, weights_of
from writers import random_arrays, read_tensors, tuned, write_file, write_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Stored = dict[str, tuple[str, tuple[int, ...], bytes]]

pytestmark = pytest.mark.slow

SEED = 7
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64"}


def stored(arrays: Mapping[str, Any]) -> Stored:
    """Return arrays as `read_tensors` returns a file."""
    found = {}
    for name, array in arrays.items():
        found[name] = (STORED[array.dtype.name], array.shape, array.tobytes())
    return found


#: Sums over the whole model are refused for arrays in memory.
ON_ARRAYS = [name for name in METHODS if name not in {"metagpt", "nan"}]


@pytest.fixture(scope="module", params=ON_ARRAYS)
def case(
    request: pytest.FixtureRequest, family: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Stored]:
    """A method's name here, its recipe, and what merging files makes of it."""
    folder = tmp_path_factory.mktemp("files")
    recipe = recipe_of(folder, family, request.param)
    oxmerge.merge(recipe, folder / "out", seed=SEED, memory="4GiB")
    return request.param, recipe, read_tensors(folder / "out" / "model.safetensors")


def call_of(name: str) -> tuple[str, str, bool, dict[str, Any]]:
    """Return the method, the models, whether there is a base, and the keyword arguments."""
    options = dict(METHODS[name])
    each = weights_of(options["method"]) | options.get("each", {})
    keywords = {**each, **options.get("shared", {}), "dtype": options.get("dtype")}
    return options["method"], options["models"], options.get("base", False), keywords


@pytest.mark.parametrize("threads", [1, 2, 5, None])
def test_state_dicts_give_the_bits_of_files(
    case: tuple[str, Path, Stored], family: Path, threads: int | None
) -> None:
    name, _, expected = case
    method, models, has_base, keywords = call_of(name)
    opened = [oxmerge.open(family / model) for model in models]
    base = oxmerge.open(family / "base") if has_base else None
    merged = oxmerge.merge_state_dicts(method, opened, base, seed=SEED, threads=threads, **keywords)
    assert stored(merged) == expected


def test_lazy_tensors_have_the_bits_of_files(case: tuple[str, Path, Stored]) -> None:
    _, recipe, expected = case
    lazy = oxmerge.lazy(recipe, seed=SEED)
    assert list(lazy) == list(expected)
    assert len(lazy) == len(expected)
    assert stored(lazy) == expected
    for name, (dtype, shape, _) in expected.items():
        assert (lazy.dtype_of(name), lazy.shape_of(name)) == (dtype, shape)


def test_tensors_and_functions_give_the_bits_of_files(
    case: tuple[str, Path, Stored], family: Path
) -> None:
    name, _, expected = case
    method, models, has_base, keywords = call_of(name)
    opened = [oxmerge.open(family / model) for model in models]
    base = oxmerge.open(family / "base")
    for tensor in expected:
        inputs = [checkpoint[tensor] for checkpoint in opened]
        arguments = (inputs, base[tensor]) if has_base else (inputs,)
        options = {**keywords, "seed": SEED, "name": tensor}
        merged = oxmerge.merge_tensors(method, *arguments, **options)
        again = getattr(oxmerge.kernels, method)(*arguments, **options)
        assert stored({tensor: merged})[tensor] == expected[tensor]
        assert stored({tensor: again})[tensor] == expected[tensor]


@pytest.fixture(scope="module")
def uniform() -> dict[str, dict[str, Any]]:
    """Models of one type, so that each of them can take the result."""
    shapes = {"w": (700, 311), "long": (2, 70_001), "b": (9,)}
    base = random_arrays(shapes, 0)
    models = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2), "c": tuned(base, 3)}
    as_bf16 = {
        name: {key: array.astype(ml_dtypes.bfloat16) for key, array in arrays.items()}
        for name, arrays in models.items()
    }
    steps = {"steps": np.arange(5)}
    return {name: {**arrays, **steps} for name, arrays in as_bf16.items()}


def copies(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array.copy() for name, array in arrays.items()}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", [name for name in ON_ARRAYS if name != "linear_in_f64"])
def test_any_input_may_take_the_result(
    uniform: dict[str, dict[str, Any]], name: str, threads: int
) -> None:
    method, models, has_base, keywords = call_of(name)
    keywords["dtype"] = None
    options = {**keywords, "seed": SEED, "threads": threads}
    dicts = [uniform[model] for model in models]
    base = uniform["base"] if has_base else None
    expected = stored(oxmerge.merge_state_dicts(method, dicts, base, **options))
    for index in range(len(dicts) + has_base):
        inputs = [copies(each) for each in [*dicts, *([base] if base else [])]]
        target = inputs[index]
        arrays = dict(target)
        result = oxmerge.merge_state_dicts(
            method,
            inputs[: len(dicts)],
            inputs[-1] if has_base else None,
            out=target,
            **options,
        )
        assert result is target
        assert all(target[key] is arrays[key] for key in arrays)
        assert stored(target) == expected
        others = [each for at, each in enumerate(inputs) if at != index]
        before = [each for at, each in enumerate([*dicts, base]) if at != index and each]
        assert [stored(each) for each in others] == [stored(each) for each in before]


def test_memory_that_was_overwritten_is_not_read() -> None:
    flat = np.arange(12, dtype=np.float32)
    views = {"a": flat[:4], "b": flat[3:8], "c": flat[8:]}
    apart = {name: array.copy() for name, array in views.items()}
    message = (
        "^tensor `b`: it shares memory with `a` of out, which is overwritten by then; "
        "give out arrays of its own, or leave one of the names out$"
    )
    with pytest.raises(ValueError, match=message):
        oxmerge.merge_state_dicts("linear", [views, apart], weight=0.5, out=views)
    fits = {"a": apart["a"], "b": apart["b"]}
    crossed = {"a": apart["b"][1:], "b": np.zeros(5, np.float32)}
    oxmerge.merge_state_dicts("linear", [fits, crossed], weight=0.5, out=fits)
    crossed = {"a": np.zeros(4, np.float32), "b": np.zeros(5, np.float32)}
    other = {"a": np.zeros(4, np.float32), "b": crossed["b"]}
    crossed["b"][1:] = 1
    swapped = {"a": crossed["b"][1:], "b": crossed["b"].copy()}
    with pytest.raises(ValueError, match=r"^tensor `b`: it shares memory with `a`"):
        oxmerge.merge_state_dicts("linear", [other, crossed], weight=0.5, out=swapped)


class Made(dict[str, Any]):
    """A mapping whose arrays are made when they are looked up, and freed after their use."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name).copy()


def test_arrays_that_are_freed_are_not_taken_for_each_other() -> None:
    tied, middle = np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    out = {"embed": tied, "mid": middle, "head": tied}
    made = Made({name: np.full(1000, at, np.float32) for at, name in enumerate(out)})
    with pytest.raises(ValueError, match=r"^tensor `head`: it shares memory with `embed` of out"):
        oxmerge.merge_state_dicts("linear", [made], weight=1, out=out)
    assert not tied.any()
    apart = {name: np.empty(1000, np.float32) for name in out}
    oxmerge.merge_state_dicts("linear", [made], weight=1, out=apart)
    assert [array[0] for array in apart.values()] == [0, 1, 2]


FIRST = np.array([1, 2], np.float32)
WRONG: dict[str, tuple[Any, Any, str]] = {
    "shape": (np.ones(2, np.float32), np.ones(3, np.float32), "has the shape"),
    "type": (np.ones(2, np.float32), np.ones(2, np.int32), "the types differ"),
    "no array": (np.ones(2, np.float32), [1, 2], "is no array"),
    "integers": (np.array([1, 2]), np.array([1, 3]), "must be the same in every model"),
    "out": (np.ones(4, np.float32)[::2], np.ones(2, np.float32), "do not follow each other"),
    "overlap": (np.ones(4, np.float32)[:2], None, "out overlaps an input"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_known_to_fail_fails_before_the_first_write(wrong: str) -> None:
    one, other, message = WRONG[wrong]
    other = one.base[1:3] if other is None else other
    average = {"a": FIRST.copy(), "b": one}
    with pytest.raises((ValueError, TypeError, oxmerge.PlanError), match=message) as caught:
        oxmerge.merge_state_dicts(
            "linear", [average, {"a": FIRST + 2, "b": other}], weight=0.5, out=average
        )
    assert "tensor `b`: " in str(caught.value)
    assert average["a"].tolist() == [1, 2]


def test_integers_of_the_first_may_be_taken() -> None:
    average = {"w": np.ones(1, np.float32), "num_batches_tracked": np.array(7)}
    latest = {"w": np.full(1, 3, np.float32), "num_batches_tracked": np.array(9)}
    options: dict[str, Any] = {"weight": 0.5, "integers": "first"}
    expected = {"w": [2], "num_batches_tracked": 9}
    merged = oxmerge.merge_state_dicts("linear", [latest, average], **options)
    assert {name: array.tolist() for name, array in merged.items()} == expected
    oxmerge.merge_state_dicts("linear", [latest, average], out=average, **options)
    assert {name: array.tolist() for name, array in average.items()} == expected
    odd: dict[str, Any] = {"w": latest["w"], "num_batches_tracked": np.array(2, np.int32)}
    oxmerge.merge_state_dicts("linear", [latest, odd], out=average, **options)
    assert average["num_batches_tracked"] == 9
    with pytest.raises(ValueError, match=r"^integers must be one of equal, first, not 'last'$"):
        oxmerge.merge_state_dicts("linear", [average], weight=1, integers="last")


@pytest.mark.parametrize("ending", ["_scale", "_scale_inv"])
def test_float8_beside_its_scale_is_refused(ending: str) -> None:
    weights = np.ones(3, ml_dtypes.float8_e4m3fn)
    quantised: dict[str, Any] = {"weight": weights, f"weight{ending}": np.ones(1, np.float32)}
    message = (
        f"^tensor `weight`: it is of float8, and `weight{ending}` would not be applied to it; "
        "dequantise it to bfloat16 first$"
    )
    with pytest.raises(TypeError, match=message):
        oxmerge.merge_state_dicts("linear", [quantised, quantised], weight=1)
    merged = oxmerge.merge_state_dicts("linear", [{"weight": weights}], weight=1)
    assert merged["weight"].dtype == ml_dtypes.bfloat16


def test_out_has_no_names_of_its_own() -> None:
    out = {"a": FIRST.copy(), "b": FIRST.copy()}
    with pytest.raises(ValueError, match=r"^the names differ: state_dicts\[0\] lacks `b`"):
        oxmerge.merge_state_dicts("linear", [{"a": FIRST}], weight=1, out=out)


def test_a_lazy_source_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = random_arrays({"x": (4,), "y": (5,)}, 0)
    write_model(tmp_path / "a", arrays, "F32")
    recipe = tmp_path / "r.yml"
    recipe.write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    lazy = oxmerge.lazy(recipe)
    computed = []
    real = oxmerge.LazyMerge.__getitem__

    def counted(self: oxmerge.LazyMerge, name: str) -> Any:
        computed.append(name)
        return real(self, name)

    monkeypatch.setattr(oxmerge.LazyMerge, "__getitem__", counted)
    assert "x" in lazy
    assert "z" not in lazy
    assert not computed
    out = {name: np.zeros_like(array) for name, array in arrays.items()}
    oxmerge.merge_state_dicts("linear", [lazy, out], weight=[1, 1], normalize=False, out=out)
    assert computed == ["x", "y"]
    assert stored(out) == stored(arrays)
    bad = {"x": out["x"], "y": out["y"][:3]}
    with pytest.raises(ValueError, match=r"^tensor `y`: state_dicts\[1\] has the shape"):
        oxmerge.merge_state_dicts("linear", [lazy, bad], weight=1, out=bad)
    assert computed == ["x", "y"]


def test_the_average_of_the_guide_is_right(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "x": np.array([[1, 2], [3, 4]], np.float32),
        "ids": np.arange(3, dtype=np.uint16),
    }
    for name in "ab":
        write_model(tmp_path / name, values, "BF16")
    opened = [oxmerge.open(tmp_path / name) for name in "ab"]
    x, y = (each["x"] for each in opened)
    assert x.dtype == ml_dtypes.bfloat16
    assert (x + y).tolist() == [[2, 4], [6, 8]]
    merged = oxmerge.merge_state_dicts("linear", opened, weight=[1, 2], normalize=False)
    assert merged["x"].dtype == ml_dtypes.bfloat16
    assert merged["x"].tolist() == (3 * values["x"]).tolist()
    assert merged["ids"].tolist() == [0, 1, 2]
    assert merged["ids"].dtype == np.uint16


def test_integers_of_a_file_are_not_taken_for_bfloat16(tmp_path: Path) -> None:
    ids = np.arange(7, dtype=np.uint16)
    file = write_file(tmp_path / "m.safetensors", {"ids": ids, "w": np.ones(3, np.float32)})
    held: dict[str, Any] = {"ids": ids.copy(), "w": np.full(3, 3, np.float32)}
    out: dict[str, Any] = {"ids": ids * 0, "w": np.zeros(3, ml_dtypes.bfloat16)}
    options: dict[str, Any] = {"weight": 0.75, "normalize": False, "dtype": "bfloat16"}
    opened = oxmerge.open(file)
    for sources in ([opened, held], [held, dict(opened)]):
        merged = oxmerge.merge_state_dicts("linear", sources, **options)
        assert merged["ids"].tolist() == ids.tolist()
        oxmerge.merge_state_dicts("linear", sources, out=out, **options)
        assert out["ids"].tolist() == ids.tolist()
        assert out["w"].tolist() == merged["w"].tolist() == [3, 3, 3]


def test_lazy_reads_only_what_is_asked_for(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, random_arrays({"x": (4,), "y": (5,)}, seed), "F32")
    recipe = tmp_path / "r.yml"
    models = "".join(f"- {{model: {n}, parameters: {{weight: 1}}}}\n" for n in "ab")
    recipe.write_text(f"merge_method: linear\nmodels:\n{models}")
    lazy = oxmerge.lazy(recipe)
    assert repr(lazy) == "<LazyMerge by 'linear': 2 tensors>"
    assert {lazy, lazy} == {lazy}
    assert lazy != oxmerge.lazy(recipe)
    assert "x" in lazy
    assert "z" not in lazy
    with pytest.raises(KeyError):
        lazy["z"]
    assert lazy["x"].shape == (4,)
    file = tmp_path / "a" / "model.safetensors"
    write_file(file, {"x": np.zeros(4, np.float32), "y": np.ones(5, np.float32)})
    with pytest.raises(oxmerge.InputChangedError):
        lazy["y"]


def test_lazy_checks_what_it_is_asked(tmp_path: Path) -> None:
    message = "^framework must be one of np, numpy, pt, torch, pytorch, not 'jax'$"
    acts: tuple[Any, ...] = (oxmerge.lazy, oxmerge.open)
    for act in acts:
        with pytest.raises(ValueError, match=message):
            act(tmp_path / "r.yml", framework="jax")
    with pytest.raises(ValueError, match=r"^threads must be at least 1, not 0$"):
        oxmerge.lazy(tmp_path / "r.yml", threads=0)
    with pytest.raises(FileNotFoundError):
        oxmerge.lazy(tmp_path / "r.yml")


def test_names_that_differ_are_few_and_name_near_ones() -> None:
    one = {f"model.layers.{at}.weight": np.zeros(1, np.float32) for at in range(100)}
    other = {f"module.{name}": array for name, array in one.items()}
    with pytest.raises(ValueError, match="the names differ") as caught:
        oxmerge.merge_state_dicts("linear", [one, other], weight=1)
    assert str(caught.value) == (
        "the names differ: state_dicts[0] lacks `module.model.layers.0.weight`, "
        "`module.model.layers.1.weight`, `module.model.layers.2.weight` and 97 more (it has "
        "`model.layers.0.weight`); state_dicts[1] lacks `model.layers.0.weight`, "
        "`model.layers.1.weight`, `model.layers.2.weight` and 97 more (it has "
        "`module.model.layers.0.weight`); pass mappings with the same names"
    )


def test_sums_over_the_model_are_refused_on_arrays(family: Path) -> None:
    with oxmerge.open(family / "a") as a, oxmerge.open(family / "base") as base:
        for method in ("metagpt", "nan"):
            with pytest.raises(oxmerge.UnsupportedError, match="a sum over the whole model"):
                oxmerge.merge_state_dicts(method, [a], base)
