"""The manifest says what an output is and how it came to be; what came out odd is told."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from blake3 import blake3
from oxmerge.cli import main
from oxmerge.errors import PlanError
from writers import (
    Array,
    directory_bytes,
    from_bf16,
    random_arrays,
    read_tensors,
    tuned,
    write_file,
    write_model,
    write_recipe,
)

if TYPE_CHECKING:
    from pathlib import Path

#: Below a cell of 1024 elements and above, below a block of 65,536 and above.
SHAPES = {"embed": (301, 307), "layers.0.w": (33, 40), "layers.0.b": (1025,), "scale": (1,)}
IDS = {"ids": np.arange(9, dtype=np.int64)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base and two fine-tunes of it, one of them in f32."""
    base = random_arrays(SHAPES, seed=0)
    write_model(tmp_path / "base", {**base, **IDS}, "BF16")
    write_model(tmp_path / "a", {**tuned(base, 1, 1e-3), **IDS}, "BF16")
    write_model(tmp_path / "b", {**tuned(base, 2, 1e-3), **IDS}, "F32")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def manifest_of(directory: Path | str) -> dict[str, Any]:
    with open(f"{directory}/oxmerge.json", "rb") as file:
        manifest: dict[str, Any] = json.load(file)
    return manifest


def ties(folder: Path, **more: Any) -> Path:
    each = {"weight": 0.6, "density": 0.3}
    return write_recipe(folder / "ties.yml", "ties", ["a", "b"], base="base", each=each, **more)


def values(dtype: str, data: bytes) -> Array:
    if dtype == "BF16":
        return from_bf16(np.frombuffer(data, np.uint16)).astype(np.float64)
    return np.frombuffer(data, {"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float64)


def test_each_tensor_has_the_hash_of_its_bytes_and_is_compared_with_the_base(folder: Path) -> None:
    oxmerge.merge(ties(folder, dtype="float16"), "out", shard_size="50kB")
    base = read_tensors(folder / "base/model.safetensors")
    manifest = manifest_of("out")
    written = {
        name: (file["name"], *tensor)
        for file in manifest["files"]
        for name, tensor in read_tensors(folder / "out" / file["name"]).items()
    }
    assert [tensor["name"] for tensor in manifest["tensors"]] == list(base)
    assert len(manifest["files"]) > 1
    for tensor in manifest["tensors"]:
        file, dtype, shape, data = written[tensor["name"]]
        assert (file, dtype, list(shape)) == (tensor["file"], tensor["dtype"], tensor["shape"])
        assert blake3(data).hexdigest() == tensor["blake3"]
        if tensor["name"] == "ids":
            assert "statistics" not in tensor
            continue
        out = values(dtype, data)
        reference = values(*(base[tensor["name"]][at] for at in (0, 2)))  # type: ignore[arg-type]
        reference = reference.astype(np.float16).astype(np.float64)
        found = tensor["statistics"]
        assert found["changed"] == np.count_nonzero(out != reference)
        change = np.linalg.norm(out - reference) / np.linalg.norm(reference)
        assert found["relative_change"] == pytest.approx(change, rel=4e-6)  # as NUMERICS.md has it
        assert (found["nan"], found["infinite"], found["saturated"]) == (0, 0, 0)
    assert any(tensor.get("statistics", {}).get("changed") for tensor in manifest["tensors"])


def test_it_says_how_the_output_came_to_be(folder: Path) -> None:
    recipe = ties(folder)
    oxmerge.merge(recipe, "out", seed=5, hash_inputs=True)
    manifest = manifest_of("out")
    assert manifest["oxmerge_manifest"] == 1
    assert manifest["oxmerge"] == oxmerge.__version__
    assert manifest["method"] == {"name": "ties", "source": None}
    assert (manifest["seed"], manifest["shard_size"]) == (5, 5_000_000_000)
    assert manifest["recipe"] == recipe.read_text()
    settings = manifest["settings"]
    assert settings[manifest["tensors"][0]["settings"]]["own"][1]["density"] == 0.3
    assert [each["model"] for each in manifest["inputs"]] == ["a", "b", "base"]
    assert (manifest["donor"], manifest["base"]) == ("base", "base")
    for each in manifest["inputs"]:
        assert {file["name"] for file in each["files"]} == {"model.safetensors", "config.json"}
        for file in each["files"]:
            data = (folder / each["model"] / file["name"]).read_bytes()
            assert file["size"] == len(data)
            assert file["sha256"] == hashlib.sha256(data).hexdigest()


def test_it_is_the_same_on_another_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oxmerge.merge(ties(folder), "out")
    for name in ("base", "a", "b"):
        shutil.copytree(folder / name, folder / "elsewhere" / name, copy_function=shutil.copyfile)
    monkeypatch.chdir(folder / "elsewhere")
    oxmerge.merge(ties(folder / "elsewhere"), "out", threads=1)
    assert str(folder) not in (folder / "out/oxmerge.json").read_text()
    assert directory_bytes(folder / "out") == directory_bytes(folder / "elsewhere/out")


def test_the_plan_tells_what_decides_the_weights(folder: Path) -> None:
    recipe = ties(folder)
    oxmerge.merge(recipe, "out")
    recipe.write_text("# a comment moves every line\n" + recipe.read_text())
    oxmerge.merge(recipe, "commented")
    oxmerge.merge(recipe, "seeded", seed=1)
    same, commented, seeded = (manifest_of(name) for name in ("out", "commented", "seeded"))
    assert same["plan"] == commented["plan"] != seeded["plan"]


def test_a_hub_snapshot_is_known_by_its_commit_and_names(folder: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = folder / "hub/models--org--b/snapshots" / commit
    snapshot.mkdir(parents=True)
    blobs = folder / "hub/models--org--b/blobs"
    blobs.mkdir()
    sha256 = hashlib.sha256((folder / "b/model.safetensors").read_bytes()).hexdigest()
    shutil.copyfile(folder / "b/model.safetensors", blobs / sha256)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{sha256}")
    shutil.copyfile(folder / "b/config.json", snapshot / "config.json")
    recipe = write_recipe(folder / "r.yml", "linear", ["a", str(snapshot)], each={"weight": 0.5})
    oxmerge.merge(recipe, "out")
    local, cached = manifest_of("out")["inputs"]
    assert (local["pinned"], cached["pinned"]) == (None, f"org/b@{commit}")
    known = {file["name"]: file["sha256"] for file in cached["files"]}
    assert known == {"model.safetensors": sha256, "config.json": None}


def test_an_adapter_is_among_the_files_of_its_model(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    write_model(folder / "p", random_arrays({f"{name}.weight": (40, 33)}, seed=4), "BF16")
    shapes = {"lora_A": (2, 33), "lora_B": (40, 2)}
    parts = {f"base_model.model.{name}.{part}.weight": shape for part, shape in shapes.items()}
    (folder / "adapter").mkdir()
    write_file(folder / "adapter/adapter_model.safetensors", random_arrays(parts, seed=5), "F32")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    recipe = write_recipe(folder / "r.yml", "linear", ["p", "p+adapter"], each={"weight": 0.5})
    oxmerge.merge(recipe, "out")
    manifest = manifest_of("out")
    plain, adapted = manifest["inputs"]
    assert (plain["model"], adapted["model"]) == ("p", "p+adapter")
    known = [{file["name"] for file in each["files"]} for each in (plain, adapted)]
    assert "adapter_model.safetensors" in known[1] - known[0]
    (tensor,) = manifest["tensors"]
    assert tensor["statistics"]["changed"] > 0


def test_without_digests_it_lists_the_tensors_only(folder: Path) -> None:
    assert main(["merge", str(ties(folder)), "out", "--no-digests", "-q"]) == 0
    manifest = manifest_of("out")
    assert {key for tensor in manifest["tensors"] for key in tensor} == {
        "name", "file", "dtype", "shape", "settings",
    }  # fmt: skip
    oxmerge.merge(ties(folder), "other")
    assert directory_bytes(folder / "out").keys() == directory_bytes(folder / "other").keys()
    assert manifest["plan"] == manifest_of("other")["plan"]


def test_each_merge_of_a_sweep_has_the_manifest_that_it_would_have_alone(folder: Path) -> None:
    # Where `a` has no weight alone, it is not read, and is no reference.
    each = [{"weight": 0.5}, {"weight": 1.0}]
    recipe = write_recipe(folder / "r.yml", "linear", ["a", "b"], each=each)
    reports = oxmerge.sweep(recipe, "swept/{n}", {"models[0].parameters.weight": "0.0,0.5"})
    for report in reports:
        oxmerge.merge(f"{report.directory}/oxmerge_recipe.yml", f"alone/{report.directory}")
        alone = manifest_of(f"alone/{report.directory}")
        assert manifest_of(report.directory) == alone
    changed = [manifest_of(f"swept/{n}")["tensors"][0]["statistics"]["changed"] for n in (0, 1)]
    assert changed[0] == 0 < changed[1]


def test_the_last_of_several_merges_has_one_that_names_the_earlier(folder: Path) -> None:
    text = """\
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
name: mixed
---
merge_method: slerp
base_model: base
models: [{model: base}, {model: mixed}]
parameters: {t: 0.5}
"""
    oxmerge.merge(text, "out")
    manifest = manifest_of("out")
    assert [each["model"] for each in manifest["inputs"]] == ["base", "mixed"]
    assert all(tensor["blake3"] for tensor in manifest["tensors"])


def test_the_manifest_of_a_donor_is_not_copied(folder: Path) -> None:
    oxmerge.merge(ties(folder), "out")
    recipe = write_recipe(folder / "r.yml", "passthrough", ["out"])
    report = oxmerge.merge(recipe, "again")
    assert manifest_of("again")["method"]["name"] == "passthrough"
    assert not report.warnings  # a copy is no merge that changes nothing
    assert all(
        tensor.get("statistics", {}).get("changed", 0) == 0
        for tensor in manifest_of("again")["tensors"]
    )


def write_large(folder: Path, name: str, largest: float) -> None:
    """Write a model in f16 with some elements of that magnitude."""
    arrays = random_arrays(SHAPES, seed=3)
    arrays["embed"][7, :5] = largest
    arrays["embed"][8, 0] = -largest
    arrays["layers.0.b"][-1] = largest
    write_model(folder / name, arrays, "F16")


def overflowing(folder: Path, largest: float = 60_000.0) -> Path:
    for name in ("x", "y"):
        write_large(folder, name, largest)
    options: dict[str, Any] = {"each": {"weight": 1.0}, "shared": {"normalize": False}}
    return write_recipe(folder / "sum.yml", "linear", ["x", "y"], **options)


def test_values_that_are_not_finite_stop_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = overflowing(folder)
    with pytest.raises(PlanError) as caught:
        oxmerge.merge(recipe, "out")
    (problem,) = caught.value.problems
    assert (problem.code, problem.count, problem.found) == ("non-finite", 2, "0 NaN, 7 infinite")
    assert set(problem.tensors) == {"embed", "layers.0.b"}
    assert "float16 ends at 65504" in (problem.advice or "")
    assert not (folder / "out").exists()
    assert main(["merge", str(recipe), "out"]) == 1
    assert "--allow-nonfinite" in capsys.readouterr().err
    assert main(["merge", str(recipe), "out", "--allow-nonfinite"]) == 0
    assert "2 tensors: `embed`, `layers.0.b`" in capsys.readouterr().err
    manifest = manifest_of("out")
    assert [warning["code"] for warning in manifest["warnings"]] == ["non-finite"]
    found = {each["name"]: each["statistics"]["infinite"] for each in manifest["tensors"]}
    assert found == {"embed": 6, "layers.0.b": 1, "layers.0.w": 0, "scale": 0}
    # Without digests nobody looks.
    assert not oxmerge.merge(recipe, "unseen", digests=False).warnings


def test_values_that_the_inputs_had_are_a_warning(folder: Path) -> None:
    recipe = overflowing(folder, np.inf)
    report = oxmerge.merge(recipe, "out")
    (warning,) = report.warnings
    assert "as some of the inputs are not" in warning
    assert "`embed`, `layers.0.b`" in warning
    with pytest.raises(PlanError, match="as some of the inputs are not"):
        oxmerge.merge(recipe, "strict", strict=True)
    assert not (folder / "strict").exists()


def test_the_largest_values_are_counted(folder: Path) -> None:
    oxmerge.merge(overflowing(folder, 65_504.0 / 2), "out")
    found = {each["name"]: each["statistics"] for each in manifest_of("out")["tensors"]}
    assert (found["embed"]["saturated"], found["layers.0.b"]["saturated"]) == (6, 1)
    assert found["scale"]["saturated"] == 0


def test_other_outputs_of_a_sweep_are_finished(folder: Path) -> None:
    axes = {"models[0].parameters.weight": "0.01,1.0"}
    with pytest.raises(PlanError, match="not finite"):
        oxmerge.sweep(overflowing(folder), "swept/{n}", axes)
    assert manifest_of("swept/0")["tensors"]
    assert not (folder / "swept/1").exists()


@pytest.mark.parametrize("why", ["equal models", "weights of zero"])
def test_a_merge_that_changes_nothing_is_told(folder: Path, why: str) -> None:
    if why == "equal models":
        shutil.copytree(folder / "a", folder / "same")
        recipe = write_recipe(folder / "r.yml", "linear", ["a", "same"], each={"weight": 0.5})
    else:
        each, base = {"weight": 0.0}, "base"
        recipe = write_recipe(folder / "r.yml", "task_arithmetic", ["a"], base=base, each=each)
    report = oxmerge.merge(recipe, "out")
    assert any("the merge changes nothing" in warning for warning in report.warnings)
    assert "no-change" in {warning["code"] for warning in manifest_of("out")["warnings"]}
    with pytest.raises(PlanError, match="changes nothing"):
        oxmerge.merge(recipe, "strict", strict=True)
    assert not (folder / "strict").exists()


def test_zeros_of_another_sign_are_no_change(folder: Path) -> None:
    zeros = np.zeros(5000, np.float32)
    for name, sign in (("p", -1.0), ("q", 1.0)):
        write_model(folder / name, {"w": zeros * np.float32(sign)}, "F32")
    recipe = write_recipe(folder / "r.yml", "linear", ["p", "q"], each={"weight": 0.5})
    oxmerge.merge(recipe, "out")
    (tensor,) = manifest_of("out")["tensors"]
    assert tensor["statistics"]["changed"] == 0
    assert tensor["statistics"]["relative_change"] is None  # of nothing there is no part
