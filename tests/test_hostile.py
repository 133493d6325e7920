"""Broken inputs as Python meets them: the class, its attributes, the exact words.

The table of all headers is in the Rust tests; these rows show that they arrive.
"""

from __future__ import annotations

import json
import os
import re
import struct
from typing import TYPE_CHECKING

import numpy as np
import oxmerge
import pytest
from oxmerge.cli import main
from oxmerge.errors import CheckpointError, OxmergeError, UnsupportedError
from snapshot import check_told
from writers import random_arrays, write_file, write_model, write_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DAMAGED = "the file is damaged: download it again, or save the model anew"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header: object, data: int = 8) -> bytes:
    """Return a safetensors file of this header, with so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


#: File contents, the class, and the parts of the error.
FILES: dict[str, tuple[bytes, type[OxmergeError], dict[str, str]]] = {
    "empty": (
        b"",
        CheckpointError,
        {
            "message": "the file is too short to be a safetensors file",
            "expected": "at least 8 bytes",
            "found": "0",
            "advice": DAMAGED,
        },
    ),
    "web page": (
        b"<!DOCTYPE html>",
        CheckpointError,
        {
            "message": "not a safetensors file",
            "found": "a web page, not the weights",
            "advice": "download it again",
        },
    ),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\n",
        CheckpointError,
        {
            "message": "not a safetensors file",
            "found": "a Git LFS pointer, not the weights",
            "advice": "fetch the weights with `git lfs pull`",
        },
    ),
    "truncated header": (
        b"\x00\x01\x00\x00\x00\x00\x00\x00{}",
        CheckpointError,
        {
            "message": "the file ends inside its header",
            "expected": "at least 264 bytes",
            "found": "10 bytes",
            "advice": "it looks like a truncated download: download it again",
        },
    ),
    "no json": (
        raw(b"{", 0),
        CheckpointError,
        {
            "message": (
                "the header is not valid JSON: EOF while parsing an object at line 1 column 1"
            ),
            "advice": DAMAGED,
        },
    ),
    "no utf-8": (
        raw(b"\xff\xfe", 0),
        CheckpointError,
        {"message": "the header is not valid UTF-8", "advice": DAMAGED},
    ),
    "too long": (
        raw({"a": ENTRY}, 9),
        CheckpointError,
        {
            "message": "the file is longer than its header says",
            "expected": "77 bytes",
            "found": "78 bytes",
            "advice": DAMAGED,
        },
    ),
    "too short": (
        raw({"a": ENTRY}, 3),
        CheckpointError,
        {
            "message": "the file is shorter than its header says",
            "expected": "77 bytes",
            "found": "72 bytes",
            "advice": "it looks like a truncated download: download it again",
        },
    ),
    "fp8": (
        raw({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}),
        UnsupportedError,
        {
            "message": "8-bit float weights (FP8) cannot be merged",
            "tensor": "a",
            "found": "`F8_E4M3`",
            "advice": "dequantise it to BF16 first",
        },
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file(tmp_path: Path, name: str) -> None:
    data, kind, parts = FILES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(OxmergeError) as caught:
        oxmerge.open(path)
    error = caught.value
    assert type(error) is kind
    found = {part: getattr(error, part) for part in parts}
    assert found == parts
    assert "advice" in parts
    assert error.file == str(path)
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [tmp_path])
    with pytest.raises(oxmerge.PlanError) as planned:
        oxmerge.plan(recipe)
    (problem,) = planned.value.problems
    assert {part: getattr(problem, part) for part in parts} == parts


def _nothing(folder: Path) -> None:
    folder.mkdir()


def _piece(folder: Path) -> None:
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def _missing_shard(folder: Path) -> None:
    folder.mkdir()
    write_file(folder / "1.safetensors", random_arrays({"a": (2,)}, 0))
    names = {"a": "1.safetensors", "b": "2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _missing_tensor(folder: Path) -> None:
    folder.mkdir()
    write_file(folder / "1.safetensors", random_arrays({"a": (2,)}, 0))
    names = {"a": "1.safetensors", "b": "1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _escaping_index(folder: Path) -> None:
    folder.mkdir()
    names = {"a": "../secret.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _quantised(folder: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    write_model(folder, random_arrays({"a": (2,)}, 0), config=config)


def _dangling_link(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("gone")


def _pipe(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / "model.safetensors")


def _pipe_for_a_config(folder: Path) -> None:
    folder.mkdir()
    write_file(folder / "model.safetensors", random_arrays({"a": (2,)}, 0))
    os.mkfifo(folder / "config.json")


def _broken_config(folder: Path) -> None:
    write_model(folder, random_arrays({"a": (2,)}, 0))
    (folder / "config.json").write_text("{")


#: How the folder is made, which has one problem.
FOLDERS: dict[str, Callable[[Path], None]] = {
    "empty": _nothing,
    "a piece of a torch file": _piece,
    "missing shard": _missing_shard,
    "missing tensor": _missing_tensor,
    "escaping index": _escaping_index,
    "quantised": _quantised,
    "dangling link": _dangling_link,
    "pipe": _pipe,
    "pipe for a config": _pipe_for_a_config,
    "broken config": _broken_config,
}


def text_of(error: oxmerge.PlanError, folder: Path) -> str:
    (problem,) = error.problems
    assert problem.advice
    return str(problem).replace(str(folder), "DIR")


def test_broken_folders(tmp_path: Path) -> None:
    told = []
    for number, (name, make) in enumerate(FOLDERS.items()):
        folder = tmp_path / str(number)
        make(folder)
        recipe = write_recipe(tmp_path / "r.yml", "passthrough", [folder])
        with pytest.raises(oxmerge.PlanError) as caught:
            oxmerge.plan(recipe)
        text = text_of(caught.value, folder)
        told.append((name, [re.sub('(?<=python -c ").*?(?=")', "COMMAND", text)]))
    check_told("broken_folders", told)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [tmp_path / "none"])
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(recipe)
    text = text_of(caught.value, tmp_path / "none")
    assert text.startswith(f"models[0] ({recipe}:3:3): no model `DIR`: there is no `DIR`")
    assert text.endswith("\n  hint: name the folder of a model, or a safetensors file")
    with pytest.raises(FileNotFoundError):
        oxmerge.open(tmp_path / "none")


@pytest.mark.parametrize("target", ["gone", "none"])
def test_a_link_that_leads_nowhere(tmp_path: Path, target: str) -> None:
    """To what is gone, or to itself."""
    (tmp_path / "none").symlink_to(target)
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [tmp_path / "none"])
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(recipe)
    text = text_of(caught.value, tmp_path / "none")
    assert f"there is no `DIR`: found a link to `{target}`\n  hint: put the model where" in text


#: Names of tensors, and how they are shown.
NAMES = {
    f"layers.{'9' * 5000}.x": f"layers.{'9' * 52}...{'9' * 56}.x",
    "a\x1b[2J\nerror: forged\u202e": r"a\x1b[2J\nerror: forged\u202e",
}


@pytest.mark.parametrize("name", NAMES, ids=["digits", "controls"])
def test_names_of_tensors_do_no_harm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write_model(tmp_path / "a", random_arrays({name: (2,)}, 0), config={"n_layer": 1})
    write_model(tmp_path / "b", random_arrays({name: (3,)}, 0))
    recipe = write_recipe(tmp_path / "r.yml", "linear", ["a", "b"], each={"weight": 1})
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert main(["plan", str(recipe)]) == 1
    shown = capsys.readouterr()
    assert f"  {name if name.isprintable() else NAMES[name]} " in shown.out
    assert f"tensor `{NAMES[name]}`: `b` has a tensor of another shape" in shown.err
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(recipe)
    assert caught.value.problems[0].tensor == name


@pytest.fixture(params=["a pipe", "a device", "long", 600, 3000])
def unreadable(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Return what makes a file of JSON that cannot be read: it has no end, or is too much."""

    def nested(path: Path) -> None:
        path.write_text('{"a":' * request.param + "1" + "}" * request.param)

    def long(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(1 << 40)

    others = {
        "a pipe": os.mkfifo,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "long": long,
    }
    return others.get(request.param, nested)


def test_a_config_that_cannot_be_read_beside_a_file(
    tmp_path: Path, unreadable: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_file(tmp_path / "model.safetensors", random_arrays({"x": (4,)}, 0))
    unreadable(tmp_path / "config.json")
    recipe = write_recipe(tmp_path / "r.yml", "linear", [path], each={"weight": 1})
    with pytest.raises(oxmerge.PlanError, match=r"config\.json`: cannot be read"):
        oxmerge.plan(recipe)
    assert main(["inspect", str(path)]) == 0
    assert "tensors     1" in capsys.readouterr().out


def test_modules_that_cannot_be_read(tmp_path: Path, unreadable: Callable[[Path], None]) -> None:
    models = [tmp_path / "a", tmp_path / "b"]
    for model in models:
        write_model(model, random_arrays({"x": (4,)}, 0))
    unreadable(models[0] / "modules.json")
    oxmerge.plan(write_recipe(tmp_path / "r.yml", "linear", models, each={"weight": 1}))


def test_a_path_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    write_model(folder / "model", random_arrays({"a": (2,)}, 0))
    with pytest.raises(UnsupportedError, match="the path is not valid UTF-8") as caught:
        oxmerge.open(folder / "model")
    assert caught.value.file == str(folder / "model")
    recipe = write_recipe(folder / "r.yml", "passthrough", ["model"])
    assert main(["plan", str(recipe)]) == 1
    assert main(["inspect", str(folder / "model")]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\\udcff/model`: the path is not valid UTF-8") == 2
    assert shown.count("hint: rename what it names") == 2


def test_an_output_may_have_a_path_that_is_not_utf8(tmp_path: Path, twins: Path) -> None:
    models = [twins / "a", twins / "b"]
    recipe = write_recipe(tmp_path / "r.yml", "linear", models, each={"weight": 1})
    out = tmp_path / os.fsdecode(b"\xffout")
    assert oxmerge.merge(recipe, out).directory == str(out)
    report = json.loads((out / "oxmerge_report.json").read_text())
    assert report["directory"] == str(out)


def test_all_broken_inputs_are_reported_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(FILES)
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(FILES[name][0])
    write_model(tmp_path / "sound", random_arrays({"a": (2,)}, 0))
    _missing_shard(tmp_path / "shards")
    models = [tmp_path / name for name in ("sound", *names, "shards")]
    recipe = write_recipe(tmp_path / "r.yml", "linear", models, each={"weight": 1})
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(recipe)
    problems = caught.value.problems
    assert [problem.message for problem in problems[:-1]] == [
        FILES[name][2]["message"] for name in names
    ]
    assert problems[-1].file is not None
    assert "shards" in problems[-1].file
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    for name in names:
        assert FILES[name][2]["message"] in shown
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit_are_reported_together(tmp_path: Path) -> None:
    one = {**random_arrays({"x": (2, 3), "y": (4,), "z": (5,)}, 0), "n": np.arange(3)}
    other = {**random_arrays({"x": (3, 2), "y": (4,)}, 0), "n": np.arange(4)}
    write_model(tmp_path / "one", one)
    write_model(tmp_path / "other", other)
    models = [tmp_path / "one", tmp_path / "other"]
    recipe = write_recipe(tmp_path / "r.yml", "linear", models, each={"weight": 1})
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(recipe)
    assert {problem.tensor for problem in caught.value.problems} == {"x", "z", "n"}
