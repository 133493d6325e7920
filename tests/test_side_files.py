"""Side files: which go along, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
from oxmerge import _core
from oxmerge._core import partial_name
from oxmerge.output import publish
from oxmerge.output.side_files import copy_bytes, find_side_files, is_index, is_loadable_weight
from writers import directory_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
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
    plan = oxmerge.plan(tmp_path / "linear.yml", memory="4GiB")
    shards = [f"pytorch_model-{shard}-of-9.bin: weights" for shard in range(1, 10)]
    assert list(plan.left_out) == ["original/model.safetensors: weights", *shards]
    assert f"not copied  {shards[8]}\n" in str(plan)
    report = oxmerge.merge(tmp_path / "linear.yml", donor / "out", memory="4GiB")
    assert report.notes[-2].startswith("not copied from the donor: `original/model.safetensors`, ")
    assert report.notes[-2].endswith("`pytorch_model-7-of-9.bin` and 2 more")
    assert "`adapter_config.json` is copied, but no adapter's weights" in report.notes[-1]
    written = json.loads((donor / "out" / "oxmerge_report.json").read_text())
    assert written["left_out"] == list(plan.left_out)
    names = set(directory_bytes(donor / "out"))
    assert names >= {"model.safetensors", "adapter_config.json", "original/params.json"}
    oxmerge.merge(tmp_path / "linear.yml", donor / "out", memory="4GiB", overwrite=True)
    assert set(directory_bytes(donor / "out")) == names


def make_unreadable(donor: Path) -> list[str]:
    """Put side files there that cannot be copied; what a report says of them."""
    put(donor, "secret.json")
    (donor / "secret.json").chmod(0)
    put(donor, "deep/sub/x")
    (donor / "deep" / "sub").chmod(0)
    (donor / "loop1").symlink_to("loop2")
    (donor / "loop2").symlink_to("loop1")
    os.close(os.open(os.fsencode(donor) + b"/\xff.txt", os.O_CREAT | os.O_WRONLY))
    return [
        "`secret.json` cannot be read: found permission denied",
        "`deep/sub/` cannot be read: found permission denied",
        "`loop1` cannot be read: found too many levels of symbolic links",
        "`loop2` cannot be read: found too many levels of symbolic links",
        "the name of `\\xff.txt` is not UTF-8",
    ]


@pytest.mark.parametrize("verb", ["plan", "merge", "sweep"])
def test_what_cannot_be_copied_is_told_with_all_that_is_wrong(
    tmp_path: Path, twins: Path, verb: str
) -> None:
    shutil.copytree(twins, tmp_path, dirs_exist_ok=True)
    expected = make_unreadable(tmp_path / "a")
    recipe = tmp_path / "linear.yml"
    recipe.write_text(recipe.read_text() + "- {model: nowhere, parameters: {weight: 1}}\n")
    more = {
        "plan": [],
        "merge": [str(tmp_path / "out")],
        "sweep": [str(tmp_path / "out{0}"), "--set", "models[0].parameters.weight=1,2"],
    }
    command = [sys.executable, "-m", "oxmerge", verb, str(recipe), *more[verb]]
    done = subprocess.run(
        [*without_privileges(), *command], capture_output=True, text=True, check=False
    )
    assert done.returncode in {1, 2}
    for text in [*expected, "nowhere"]:
        assert text in done.stderr
    assert not list(tmp_path.glob("out*"))


def without_privileges() -> list[str]:
    """Return what a command begins with that root's permissions must not help."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root can read everything, and there is no `setpriv`")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


def test_lazy_merges_need_no_side_files(tmp_path: Path, twins: Path) -> None:
    shutil.copytree(twins, tmp_path, dirs_exist_ok=True)
    (tmp_path / "a" / "loop").symlink_to("loop")
    assert list(oxmerge.lazy(tmp_path / "linear.yml")) == ["x", "y"]
    with pytest.raises(oxmerge.PlanError, match="`loop` cannot be read"):
        oxmerge.plan(tmp_path / "linear.yml", memory="4GiB")


def test_weights_of_odd_names_are_left_out_and_told(tmp_path: Path, twins: Path) -> None:
    shutil.copytree(twins, tmp_path, dirs_exist_ok=True)
    (tmp_path / "a" / "loop.bin").symlink_to("loop.bin")
    os.close(os.open(os.fsencode(tmp_path / "a") + b"/\xff.bin", os.O_CREAT | os.O_WRONLY))
    report = oxmerge.merge(tmp_path / "linear.yml", tmp_path / "out", memory="4GiB")
    assert "`\\xff.bin`, `loop.bin`" in report.notes[-1]
    written = json.loads((tmp_path / "out" / "oxmerge_report.json").read_text())
    assert written["left_out"] == ["\\xff.bin: weights", "loop.bin: weights"]


def test_folders_without_end(tmp_path: Path) -> None:
    put(tmp_path, "d/" * 200 + "x")
    found = find_side_files(tmp_path)
    assert "nested deeper than 128 levels" in str(found.problems[0])


def test_long_names_and_names_that_look_alike(tmp_path: Path, twins: Path) -> None:
    """No temporary name of one is too long, or another's."""
    shutil.copytree(twins, tmp_path, dirs_exist_ok=True)
    names = ["x" * 255, "a/" + "y" * 255, "b/c.txt", "b%c.txt", "0", "probe", "journal"]
    for name in names:
        put(tmp_path / "a", name, name.encode())
    oxmerge.merge(tmp_path / "linear.yml", tmp_path / "out", memory="4GiB")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == name.encode()


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.rename(path)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [_touch, _append, _replace, os.unlink, _pipe])
@pytest.mark.parametrize("when", ["before it is copied", "after"])
def test_a_side_file_that_changes_meanwhile(
    tmp_path: Path,
    twins: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    when: str,
) -> None:
    shutil.copytree(twins, tmp_path, dirs_exist_ok=True)
    put(tmp_path / "a", "blob")
    (tmp_path / "a" / "tokenizer.json").symlink_to("blob")
    execute, prepare_output = _core.execute, publish.prepare_output
    worked = []

    def change_and_prepare(*args: Any, **options: Any) -> Any:
        change(tmp_path / "a" / "blob")
        return prepare_output(*args, **options)

    def execute_and_change(*args: Any, **options: Any) -> dict[str, Any]:
        worked.append(args)
        done = execute(*args, **options)
        change(tmp_path / "a" / "blob")
        return done

    if when == "after":
        monkeypatch.setattr(_core, "execute", execute_and_change)
    else:
        monkeypatch.setattr("oxmerge.merging.prepare_output", change_and_prepare)
    with pytest.raises(oxmerge.InputChangedError):
        oxmerge.merge(tmp_path / "linear.yml", tmp_path / "out", memory="4GiB")
    assert bool(worked) == (when == "after")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_an_unfinished_merge_is_no_side_file(tmp_path: Path) -> None:
    put(tmp_path, "out/" + partial_name("model.safetensors"))
    put(tmp_path, "out/tokenizer.json")
    found = find_side_files(tmp_path)
    assert not found.copied
    assert [entry.reason for entry in found.left_out] == ["of an earlier merge"]


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
