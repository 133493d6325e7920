"""The golden merges: what mergekit 0.1.5 gives for the same recipes and models."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import oxmerge
import pytest
import yaml
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"
#: Merged in Rust tests only: these methods are not in the release.
NOT_RELEASED = {"arcee_fusion"}
CASES = sorted(path.name for path in (GOLDEN / "cases").iterdir() if path.name not in NOT_RELEASED)


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


def at_threshold(case: str, name: str) -> np.ndarray | np.bool_:
    """Elements whose magnitude ties with the smallest that is kept.

    With bf16 differences many do, and mergekit keeps an arbitrary few of them.
    """
    recipe = yaml.safe_load((GOLDEN / "cases" / case / "recipe.yml").read_text())
    if recipe["merge_method"] != "ties":
        return np.False_
    base = load(recipe["base_model"])[name]
    ties = np.zeros(base.shape, bool)
    for entry in recipe["models"]:
        magnitude = np.abs(load(entry["model"])[name] - base)
        kept = int(entry["parameters"]["density"] * magnitude.size)
        if kept < magnitude.size:
            ties |= magnitude == np.sort(magnitude, axis=None)[-max(kept, 1)]
    return ties


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
