"""The demo checkpoints."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import yaml
from oxmerge import demo as demo_module
from oxmerge.demo import SIZES, Demo, describe, make_demo
from oxmerge.errors import OutputError
from safetensors import safe_open

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


SMALL = demo_module.Shape(64, 2, 96, 4, 2, 300, tied=True, shards=3, filled=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Make a tiny demo once."""
    return make_demo(tmp_path_factory.mktemp("demo") / "new" / "folder")


def tensor(model: Path, name: str) -> np.ndarray[Any, Any]:
    """Read a bfloat16 tensor by hand."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    data = (model / index["weight_map"][name]).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    entry = json.loads(data[8 : 8 + length])[name]
    start, end = (8 + length + offset for offset in entry["data_offsets"])
    bits = np.frombuffer(data[start:end], dtype=ml_dtypes.bfloat16)
    return bits.astype(np.float32).reshape(entry["shape"])


def digest(folder: Path) -> dict[str, str]:
    """Hash every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_each_model_is_complete(tiny: Demo) -> None:
    assert not tiny.sparse
    assert 30_000_000 < tiny.model_bytes < 60_000_000
    for model in tiny.models:
        index = json.loads((model / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == tiny.model_bytes
        files = sorted(set(index["weight_map"].values()))
        assert len(files) == 2
        for file in files:
            with safe_open(model / file, "np") as opened:
                assert opened.metadata() == {"format": "pt"}
                assert {n for n, f in index["weight_map"].items() if f == file} == set(
                    opened.keys()
                )
        assert sum((model / file).stat().st_size for file in files) > tiny.model_bytes
        config = json.loads((model / "config.json").read_text())
        assert config["num_hidden_layers"] == 8
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            json.loads((model / name).read_text())


def test_the_tokenizer_knows_every_byte(tiny: Demo) -> None:
    tokenizer = json.loads((tiny.models[0] / "tokenizer.json").read_text())
    assert sorted(tokenizer["model"]["vocab"].values()) == list(range(258))


def test_the_second_model_is_the_first_with_noise(tiny: Demo) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    base, tuned = (tensor(model, name) for model in tiny.models)
    assert base.shape == (512, 1408)
    assert np.std(base) == pytest.approx(0.02, rel=0.02)
    assert np.std(tuned - base) == pytest.approx(0.001, rel=0.02)
    norm = tensor(tiny.models[0], "model.norm.weight")
    assert np.mean(norm) == pytest.approx(1, abs=0.01)


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    bits = np.arange(0x3F7F_0000, 0x3F84_0000, 7, dtype=np.uint32)
    values = bits.view(np.float32)
    expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(demo_module._bfloat16(values), expected)


def test_the_recipe_names_its_neighbours(tiny: Demo) -> None:
    recipe = yaml.safe_load(tiny.recipe.read_text())
    assert recipe["merge_method"] == "slerp"
    names = [entry["model"] for entry in recipe["models"]]
    assert [tiny.recipe.parent / name for name in names] == list(tiny.models)


def test_the_seed_decides_every_byte(tiny: Demo, tmp_path: Path) -> None:
    same = make_demo(tmp_path / "same")
    other = make_demo(tmp_path / "other", seed=1)
    assert digest(same.recipe.parent) == digest(tiny.recipe.parent)
    assert digest(other.recipe.parent) != digest(tiny.recipe.parent)


def test_another_size_replaces_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "small", SMALL)
    make_demo(tmp_path)
    made = make_demo(tmp_path, "small")
    assert len(list(made.models[0].glob("*.safetensors"))) == 3
    index = json.loads((made.models[0] / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]


def test_big_models_are_sparse(tmp_path: Path) -> None:
    made = make_demo(tmp_path, "70b")
    assert made.sparse
    assert made.model_bytes == 2 * 70_553_706_496
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 60
    assert sum(file.stat().st_size for file in files) > 2 * made.model_bytes
    assert sum(file.stat().st_blocks * 512 for file in files) < 10_000_000
    assert describe(made).startswith("made two checkpoints of 141 GB each (sparse files of zeros")


def test_a_short_disk_makes_sparse_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "_has_space", lambda *_: False)
    assert make_demo(tmp_path).sparse


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name a size that takes no time to make."""
    monkeypatch.setitem(SIZES, "small", SMALL)
    return "small"


def test_what_was_interrupted_is_made_again(
    tmp_path: Path, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_module, "_write_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_demo(tmp_path, small)
    (tmp_path / "merged").mkdir()
    made = make_demo(tmp_path, small)
    assert len(list(made.models[1].glob("*.safetensors"))) == 3


def test_an_interruption_does_not_wait_for_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "large", replace(SMALL, vocabulary=1 << 18))
    whole = demo_module.model_bytes("large")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path, "large")
    written = sum(path.stat().st_size for path in (tmp_path / "demo-base").glob("*.safetensors"))
    assert written < whole / 2


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, small: str) -> None:
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(OutputError, match="it is a file"):
        make_demo(tmp_path / "demo", small)


@pytest.mark.parametrize(
    "names",
    [
        ["thesis.txt"],
        ["recipe.yml"],
        ["merged/config.json"],
        ["demo-base/thesis.txt"],
        ["merged/config.json", "recipe.yml"],
    ],
)
def test_a_folder_with_other_things_is_refused(
    tmp_path: Path, small: str, names: list[str]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = digest(tmp_path)
    with pytest.raises(OutputError, match="is not the demo's"):
        make_demo(tmp_path, small)
    assert digest(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.txt", "recipe.yml"])
def test_a_demo_that_someone_works_in_is_refused(tmp_path: Path, small: str, name: str) -> None:
    make_demo(tmp_path, small)
    (tmp_path / name).write_text("mine")
    before = digest(tmp_path)
    with pytest.raises(OutputError, match=f"`{name}`.* is not the demo's"):
        make_demo(tmp_path, small)
    assert digest(tmp_path) == before


def test_the_demo_ends_with_commands_that_work(tmp_path: Path) -> None:
    def demo() -> list[str]:
        command = [sys.executable, "-m", "oxmerge", "demo", "--directory", "my demo"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        _, _, commands = done.stderr.partition("what to try next:\n")
        return commands.splitlines()

    commands = demo()
    assert len(commands) == 5
    for _ in range(2):
        for command in commands:
            # Measuring would take a minute.
            shown = f"{command} --help" if "bench" in command else command
            subprocess.run(shown, cwd=tmp_path, shell=True, capture_output=True, check=True)
        assert demo() == commands
    assert len(list((tmp_path / "my demo/swept").iterdir())) == 3


def test_the_demo_of_the_hub_needs_nothing_but_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "oxmerge", "demo", "--kind", "hub", "--directory", "d"]
    for _ in range(2):  # again in the same place
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "serving them as `demo/base` and `demo/tuned` from http://127.0.0.1:" in done.stderr
        assert "commits   demo/base: demo/base@" in done.stderr
        assert "for the merge it sent 107 MB, kept in `d/hub-cache`" in done.stderr
    assert (tmp_path / "d" / "merged" / "model.safetensors").stat().st_size > 50_000_000
    done = subprocess.run([*command, "--size", "7b"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ask for `--size tiny` or `1b`" in done.stderr
