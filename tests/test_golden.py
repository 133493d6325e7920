"""The golden merges: what mergekit 0.1.5 gives for the same recipes and models."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import oxmerge
import pytest
import yaml
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in (GOLDEN / "cases").iterdir())


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    difference = np.linalg.norm((ours.astype(np.float64) - theirs.astype(np.float64)).ravel())
    size = np.linalg.norm(theirs.astype(np.float64).ravel())
    return float(difference / size) if size else float(difference)


@pytest.fixture(scope="module", params=CASES)
def merged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    case = request.param
    output = tmp_path_factory.mktemp("golden") / case
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(GOLDEN)
        oxmerge.merge(f"cases/{case}/recipe.yml", output)
    return case, output


def test_weights(merged: tuple[str, Path]) -> None:
    case, output = merged
    ours = load_file(output / "model.safetensors")
    theirs = load_file(GOLDEN / "cases" / case / "expected.safetensors")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        clear = np.broadcast_to(~at_threshold(case, name), expected.shape)
        assert relative_error(ours[name][clear], expected[clear]) <= 1e-6, name


def at_threshold(case: str, name: str) -> Any:
    """Elements at the threshold between what is kept and what is dropped.

    With bf16 differences many magnitudes are equal, and mergekit keeps an arbitrary few of them;
    variances and importances there depend on the order in which they are summed.
    """
    recipe = yaml.safe_load((GOLDEN / "cases" / case / "recipe.yml").read_text())
    method = recipe["merge_method"]
    unclear = THRESHOLDS.get(method)
    if unclear is None:
        return np.False_
    base = load(recipe["base_model"])[name]
    vectors = [load(entry["model"])[name] - base for entry in recipe["models"]]
    return unclear(recipe, base, vectors)


def ties_in_magnitude(recipe: dict[str, Any], base: Any, vectors: list[Any]) -> Any:
    unclear = np.zeros(base.shape, bool)
    for entry, vector in zip(recipe["models"], vectors, strict=True):
        magnitude = np.abs(vector)
        sizes = np.sort(magnitude, axis=None)
        parameters = entry["parameters"]
        kept = int(parameters["density"] * magnitude.size)
        dropped = min(int(parameters.get("gamma", 0) * magnitude.size), magnitude.size - kept)
        for rank in (dropped, dropped + kept):
            if 0 < rank < magnitude.size:
                unclear |= magnitude == sizes[-rank]
                unclear |= magnitude == sizes[-rank - 1]
    return unclear


def near_variance(recipe: dict[str, Any], base: Any, vectors: list[Any]) -> Any:
    share = recipe.get("parameters", {}).get("select_topk", 1)
    variance = np.var(np.array(vectors, np.float64), axis=0)
    kept = int(np.count_nonzero(variance) * share)
    if share >= 1 or not kept:
        return np.zeros(base.shape, bool)
    ordered = np.sort(variance, axis=None)
    if ordered[-kept] == ordered[-kept - 1] and np.sum(np.square(vectors)) / base.size > 1e-6:
        # Which of the equal ones is kept decides the weights, and with them every element.
        return np.ones(base.shape, bool)
    return np.isclose(variance, ordered[-kept], rtol=1e-4)


def near_importance(_recipe: dict[str, Any], base: Any, vectors: list[Any]) -> Any:
    def softmax(values: Any) -> Any:
        exponential = np.exp(values - values.max(-1, keepdims=True))
        return exponential / exponential.sum(-1, keepdims=True) + 1e-8

    vector = vectors[0].astype(np.float64)
    p, q = softmax(base + vector), softmax(base.astype(np.float64))
    importance = np.abs(vector) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(importance, axis=None)
    low, middle, high = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.isclose(importance, middle + 1.5 * (high - low), rtol=1e-2)


THRESHOLDS = {
    "ties": ties_in_magnitude,
    "breadcrumbs": ties_in_magnitude,
    "breadcrumbs_ties": ties_in_magnitude,
    "sce": near_variance,
    "arcee_fusion": near_importance,
}


@cache
def load(model: str) -> dict[str, np.ndarray]:
    with oxmerge.open(GOLDEN / model) as checkpoint:
        return {name: np.asarray(array, np.float32) for name, array in checkpoint.items()}


def test_config(merged: tuple[str, Path]) -> None:
    case, output = merged
    ours = json.loads((output / "config.json").read_text())
    theirs = json.loads((GOLDEN / "cases" / case / "expected_config.json").read_text())
    donor = json.loads((GOLDEN / "models" / "a" / "config.json").read_text())
    spelling = {"torch_dtype": "dtype"}
    for key in donor:
        assert ours[key] == theirs[spelling.get(key, key)], key
