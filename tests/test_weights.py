"""Weights that sum to zero, exactly or but for rounding: nothing is divided by such a sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from oxmerge import kernels
from oxmerge.errors import PlanError
from writers import directory_bytes, random_arrays, tuned, write_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: Their sum is 5.6e-17, by which a normalised merge made values of 1e14.
NEARLY_ZERO = (0.1, 0.2, -0.3)
ZERO = (1.0, 0.5, -1.5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = random_arrays({"model.layers.0.w": (70, 33), "model.layers.1.w": (70, 33)}, seed=0)
    write_model(folder / "base", base, "F32")
    for seed, name in enumerate("abc", start=1):
        write_model(folder / name, tuned(base, seed), "F32")
    return folder


def recipe_of(folder: Path, models: Path, method: str, weights: Sequence[Any], **more: Any) -> Path:
    names = "abc"[: len(weights)]
    each = {name: {"weight": weight} for name, weight in zip(names, weights, strict=True)}
    listed = [{"model": str(models / name), "parameters": each[name]} for name in names]
    recipe = {"merge_method": method, "models": listed, "parameters": more}
    if method != "linear":
        recipe["base_model"] = str(models / "base")
    path = folder / f"{method}.yml"
    path.write_text(oxmerge.Recipe.from_mapping(recipe).text)
    return path


def merged(path: Path, out: Path, **options: Any) -> bytes:
    oxmerge.merge(path, out, memory="4GiB", **options)
    return directory_bytes(out)["model.safetensors"]


@pytest.mark.parametrize("weights", [NEARLY_ZERO, ZERO, (1e9, 1.0, -1e9), (0.0, 0.0, 0.0)])
def test_an_average_by_them_is_refused(tmp_path: Path, models: Path, weights: Any) -> None:
    recipe = recipe_of(tmp_path, models, "linear", weights)
    arrays = [np.ones(3, np.float32)] * 3
    dicts = [{"w": array} for array in arrays]
    for act in (
        lambda: oxmerge.plan(recipe),
        lambda: oxmerge.lazy(recipe),
        lambda: oxmerge.merge_tensors("linear", arrays, weight=weights),
        lambda: oxmerge.merge_state_dicts("linear", dicts, weight=weights, out=dicts[0]),
        lambda: kernels.linear(arrays, weight=list(weights)),
    ):
        with pytest.raises(PlanError, match="the weights sum to zero") as caught:
            act()
        # Warnings of a weight that is far off may follow.
        assert "change a weight, or set `normalize: false`" in str(caught.value)
    sum_of = oxmerge.merge_tensors("linear", arrays, weight=weights, normalize=False)
    assert np.all(np.abs(sum_of) <= 1)


def test_gradients_that_cancel_in_one_layer(models: Path) -> None:
    sources = [
        {"model": str(models / name), "layer_range": [0, 2], "parameters": {"weight": weight}}
        for name, weight in (("a", [0.1, 0.1]), ("b", [0.2, 0.2]), ("c", [0.5, -0.3]))
    ]
    for name in "abc":
        (models / name / "config.json").write_text('{"num_hidden_layers": 2}')
    sliced = oxmerge.Recipe.from_mapping(
        {"merge_method": "linear", "slices": [{"sources": sources}]}
    )
    with pytest.raises(PlanError, match="sum to zero") as caught:
        oxmerge.plan(sliced)
    assert [problem.tensor for problem in caught.value.problems] == ["model.layers.1.w"]


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "della_linear"])
@pytest.mark.parametrize("weights", [NEARLY_ZERO, ZERO])
def test_task_vectors_are_divided_by_one(
    tmp_path: Path, models: Path, method: str, weights: Any
) -> None:
    """As mergekit does."""
    plain = merged(recipe_of(tmp_path, models, method, weights), tmp_path / "plain")
    recipe = recipe_of(tmp_path, models, method, weights, normalize=True)
    assert merged(recipe, tmp_path / "normalised") == plain


def test_nuslerp_goes_half_of_the_way(tmp_path: Path, models: Path) -> None:
    """As mergekit does."""
    half = merged(recipe_of(tmp_path, models, "nuslerp", [1, 1]), tmp_path / "half")
    for weights in ([1, -1], [0.1 + 0.2, -0.3], [3e6, -3e6 - 1], [0, 0]):
        out = tmp_path / str(weights)
        assert merged(recipe_of(tmp_path, models, "nuslerp", weights), out) == half
    small = merged(recipe_of(tmp_path, models, "nuslerp", [1e-9, 3e-9]), tmp_path / "small")
    assert small == merged(recipe_of(tmp_path, models, "nuslerp", [1, 3]), tmp_path / "large")


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_votes_of_weights_that_cancel_are_divided_by_one(method: str, dtype: str) -> None:
    """By element: the weights of those that won."""
    base = np.zeros(3, dtype)
    weights = [0.7, 0.1, -0.8 * (1 + 1e-7)]
    # All three win the first element; the first two, and the last by itself, the others.
    tensors = [np.array(row, dtype) for row in ([2, 2, -1], [2, 2, -1], [-2, 1, -9])]
    out = oxmerge.merge_tensors(
        method, tensors, base, weight=weights, normalize=True, density=1.0, dtype=dtype
    )
    np.testing.assert_allclose(out, [3.2, 2, -9], rtol=1e-5)
    exact = oxmerge.merge_tensors(method, tensors, base, weight=[1, 1, -2], normalize=True)
    np.testing.assert_allclose(exact, [8, 2, -9], rtol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "task_arithmetic", "nuslerp"])
def test_torch_agrees(tmp_path: Path, models: Path, method: str) -> None:
    pytest.importorskip("torch", reason="not installed: torch")
    weights = (0.7, 0.1, -0.8 * (1 + 1e-7))[: 2 if method == "nuslerp" else 3]
    more = {} if method == "nuslerp" else {"normalize": True, "density": 0.6}
    recipe = recipe_of(tmp_path, models, method, weights, **more)
    expected = merged(recipe, tmp_path / "cpu")
    assert merged(recipe, tmp_path / "torch", device="torch") == expected
