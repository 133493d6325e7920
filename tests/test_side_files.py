"""Side files: which go along, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import stat
from typing import TYPE_CHECKING

import oxmerge
import pytest
from oxmerge.side_files import copy_bytes, find_side_files, is_index, is_loadable_weight
from writers import directory_bytes

if TYPE_CHECKING:
    from pathlib import Path

COPIED = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "modeling_custom.py",
    "LICENSE",
    "something_new.xyz",
    "1_Pooling/config.json",
    "additional_chat_templates/tool.jinja",
    "deep/er/file.txt",
    ".gitattributes",
    "adapter_config.json",
    "original/params.json",
    "onnx/config.json",
]
LEFT_OUT = {
    "model-00001-of-00002.safetensors": "written anew",
    "model.safetensors.index.json": "written anew",
    "MODEL.SAFETENSORS": "weights",
    "pytorch_model.bin": "weights",
    "adapter_model.safetensors": "weights",
    "original/consolidated.00.pth": "weights",
    "original/model.safetensors.index.json": "an index of weights",
    "original/model-00001-of-00002.safetensors": "weights",
    "onnx/sub/model.onnx": "weights",
    "onnx/sub/model.onnx_data_1": "weights",
    "rust_model.ot": "weights",
    "pytorch_model.bin.index.json": "an index of weights",
    "consolidated.00.pth": "weights",
    "model.gguf": "weights",
    "model.onnx": "weights",
    "tf_model.h5": "weights",
    "flax_model.msgpack": "weights",
    "optimizer.pt": "training state",
    "scheduler.pt": "training state",
    "rng_state_0.pth": "training state",
    "trainer_state.json": "training state",
    "training_args.bin": "training state",
    "events.out.tfevents.1.host": "training state",
    "README.md": "written anew",
    "config.json": "written anew",
    "mergekit_config.yml": "of an earlier merge",
    "oxmerge_recipe.yml": "of an earlier merge",
    ".model.safetensors.oxmerge-partial": "of an earlier merge",
}
FOLDERS = {
    ".cache/": ("hidden", ".cache/x.json"),
    "checkpoint-500/": ("training state", "checkpoint-500/notes.txt"),
    "out/": ("of an earlier merge", "out/oxmerge_report.json"),
}
MERGED = frozenset({"model-00001-of-00002.safetensors", "model.safetensors.index.json"})


def put(root: Path, name: str, data: bytes = b"x") -> None:
    """Write a file, with its folders."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_every_file_has_a_fate(tmp_path: Path) -> None:
    for name in [*COPIED, *LEFT_OUT, *(name for _, name in FOLDERS.values())]:
        put(tmp_path, name, name.encode())
    found = find_side_files(tmp_path, MERGED)
    assert [file.name for file in found.copied] == sorted(COPIED)
    assert found.total_bytes == sum(len(name) for name in COPIED)
    reasons = {entry.name: entry.reason for entry in found.left_out}
    assert reasons == {**LEFT_OUT, **{name: reason for name, (reason, _) in FOLDERS.items()}}


def test_a_config_in_a_folder_is_not_ours(tmp_path: Path) -> None:
    put(tmp_path, "1_Pooling/config.json")
    put(tmp_path, "1_Pooling/README.md")
    names = [file.name for file in find_side_files(tmp_path).copied]
    assert names == ["1_Pooling/README.md", "1_Pooling/config.json"]


def test_parts_of_a_pipeline_come_whole(tmp_path: Path) -> None:
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../x"}]
    put(tmp_path, "modules.json", json.dumps(modules).encode())
    put(tmp_path, "2_Dense/model.safetensors")
    put(tmp_path, "2_Dense/config.json")
    put(tmp_path, "2_Dense/optimizer.pt")
    put(tmp_path, "3_Other/model.safetensors")
    put(tmp_path, "3_Other/config.json")
    names = [file.name for file in find_side_files(tmp_path).copied]
    assert names == [
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "3_Other/config.json",
        "modules.json",
    ]


@pytest.mark.parametrize("text", [b"{", b"{}", b"[1]", b'[{"path": 3}]', b"\xff"])
def test_odd_modules_files_do_no_harm(tmp_path: Path, text: bytes) -> None:
    put(tmp_path, "modules.json", text)
    assert [file.name for file in find_side_files(tmp_path).copied] == ["modules.json"]


def test_links(tmp_path: Path) -> None:
    donor, blobs = tmp_path / "donor", tmp_path / "blobs"
    donor.mkdir()
    put(blobs, "abc", b"content")
    (donor / "tokenizer.json").symlink_to(blobs / "abc")
    (donor / "broken.json").symlink_to(blobs / "none")
    (donor / "folder").symlink_to(blobs)
    os.mkfifo(donor / "pipe")
    found = find_side_files(donor)
    assert [(file.name, file.state.size) for file in found.copied] == [("tokenizer.json", 7)]
    assert {entry.name: entry.reason for entry in found.left_out} == {
        "broken.json": "a link to nowhere",
        "folder/": "a link to a folder",
        "pipe": "not a regular file",
    }


def test_a_single_file_has_none(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors")
    put(tmp_path, "tokenizer.json")
    assert find_side_files(tmp_path / "model.safetensors").copied == ()


def test_what_is_left_out_is_told(tmp_path: Path, twins: Path) -> None:
    shutil.copytree(twins, tmp_path, dirs_exist_ok=True)
    donor = tmp_path / "a"
    put(donor, "adapter_config.json")
    put(donor, "original/params.json", b"{}")
    put(donor, "original/model.safetensors")
    for shard in range(1, 10):
        put(donor, f"pytorch_model-{shard}-of-9.bin")
    outlook = oxmerge.plan(tmp_path / "linear.yml", memory="4GiB")
    shards = [f"pytorch_model-{shard}-of-9.bin: weights" for shard in range(1, 10)]
    assert list(outlook.left_out) == ["original/model.safetensors: weights", *shards]
    assert f"not copied  {shards[8]}\n" in str(outlook)
    report = oxmerge.merge(tmp_path / "linear.yml", donor / "out", memory="4GiB")
    assert report.notes[-2].startswith("not copied from the donor: `original/model.safetensors`, ")
    assert report.notes[-2].endswith("`pytorch_model-7-of-9.bin` and 2 more")
    assert "`adapter_config.json` is copied, but no adapter's weights" in report.notes[-1]
    written = json.loads((donor / "out" / "oxmerge_report.json").read_text())
    assert written["left_out"] == list(outlook.left_out)
    names = set(directory_bytes(donor / "out"))
    assert names >= {"model.safetensors", "adapter_config.json", "original/params.json"}
    oxmerge.merge(tmp_path / "linear.yml", donor / "out", memory="4GiB", overwrite=True)
    assert set(directory_bytes(donor / "out")) == names


@pytest.mark.parametrize("in_kernel", [True, False])
@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000])
def test_copies_are_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, *, in_kernel: bool
) -> None:
    if not in_kernel:

        def refuse(*_: object) -> int:
            raise OSError

        monkeypatch.setattr(os, "copy_file_range", refuse)
    put(tmp_path, "source", data)
    (tmp_path / "source").chmod(0o755)
    (tmp_path / "link").symlink_to("source")
    with (tmp_path / "link").open("rb") as reader, (tmp_path / "copy").open("xb") as writer:
        copy_bytes(reader, writer.fileno())
    status = (tmp_path / "copy").lstat()
    assert (tmp_path / "copy").read_bytes() == data
    assert stat.S_ISREG(status.st_mode)
    assert not status.st_mode & stat.S_IXUSR


@pytest.mark.parametrize(
    ("name", "loadable"),
    [
        ("model-00001-of-00009.safetensors", True),
        ("pytorch_model.bin", True),
        ("model.safetensors.index.json", True),
        ("adapter_model.safetensors", True),
        ("my-notes.bin", False),
        ("model-q4.gguf", False),
        ("tokenizer.json", False),
    ],
)
def test_what_a_loader_may_pick_up(name: str, *, loadable: bool) -> None:
    assert is_loadable_weight(name) is loadable
    assert is_index(name) is name.endswith(".index.json")
