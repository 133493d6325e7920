"""`dtype` beside `out_dtype`: the one says how precise arithmetic is, the other what is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from oxmerge.cli import main
from writers import directory_bytes, random_arrays, read_tensors, write_model, write_recipe

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        write_model(folder / name, random_arrays({"w": (300, 401)}, seed), "F32")
    return folder


def recipe_of(folder: Path, models: Path, **types: Any) -> Path:
    each = {"weight": 1.0}
    path = folder / "r.yml"
    shared = {"normalize": False}
    return write_recipe(
        path, "linear", [models / "a", models / "b"], each=each, shared=shared, **types
    )


def test_float64_is_what_arithmetic_is_in(tmp_path: Path, models: Path) -> None:
    """The sum of two in float64, rounded once to float16, differs from one rounded twice."""
    recipe = recipe_of(tmp_path, models, dtype="float64", out_dtype="float16")
    oxmerge.merge(recipe, tmp_path / "out", memory="4GiB")
    [a, b] = (
        np.frombuffer(read_tensors(models / name / "model.safetensors")["w"][2], np.float32)
        for name in "ab"
    )
    merged = np.frombuffer(read_tensors(tmp_path / "out" / "model.safetensors")["w"][2], np.float16)
    np.testing.assert_array_equal(merged, (a.astype(np.float64) + b).astype(np.float16))
    assert not np.array_equal(merged, (a + b).astype(np.float16))
    assert oxmerge.lazy(recipe)["w"].tobytes() == merged.tobytes()
    weights = directory_bytes(tmp_path / "out")["model.safetensors"]
    ways: dict[str, dict[str, Any]] = {"small": {"threads": 1}, "torch": {"device": "torch"}}
    for name, options in ways.items():
        if name == "torch":
            pytest.importorskip("torch", reason="not installed: torch")
        oxmerge.merge(recipe, tmp_path / name, memory="4GiB", **options)
        assert directory_bytes(tmp_path / name)["model.safetensors"] == weights


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_dtype_rounds_nothing_and_a_note_says_so(
    tmp_path: Path, models: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, models, dtype=dtype, out_dtype="float32")
    report = oxmerge.merge(recipe, tmp_path / "out", memory="4GiB")
    note = (
        f"`dtype: {dtype}` rounds nothing: arithmetic is in float32, or in float64 where inputs or "
        "output are; the output is float32, by `out_dtype`"
    )
    assert note in report.notes
    assert note in oxmerge.plan(recipe).notes
    assert main(["plan", str(recipe)]) == 0
    assert f"note      {note}" in capsys.readouterr().out
    alone = recipe_of(tmp_path, models, out_dtype="float32")
    oxmerge.merge(alone, tmp_path / "alone", memory="4GiB")
    weights = [directory_bytes(tmp_path / name)["model.safetensors"] for name in ("out", "alone")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "types",
    [
        {},
        {"dtype": "bfloat16"},
        {"out_dtype": "float16"},
        {"dtype": "float32", "out_dtype": "bfloat16"},
    ],
)
def test_without_need_there_is_no_note(tmp_path: Path, models: Path, types: Any) -> None:
    assert oxmerge.plan(recipe_of(tmp_path, models, **types)).notes == ()


def test_sweeps_over_what_is_written(tmp_path: Path, models: Path) -> None:
    recipe = recipe_of(tmp_path, models, dtype="float64")
    types = ["float16", "float32", "float64"]
    oxmerge.sweep(recipe, str(tmp_path / "{n}"), {"out_dtype": types}, memory="4GiB")
    oxmerge.merge(
        recipe_of(tmp_path, models, dtype="float64", out_dtype="float16"),
        tmp_path / "single",
        memory="4GiB",
    )
    [swept, single] = (
        directory_bytes(tmp_path / name)["model.safetensors"] for name in ("0", "single")
    )
    assert swept == single
