"""The output directory: all at once or not at all, whatever fails."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from oxmerge._core import partial_name
from oxmerge.errors import OutputError
from oxmerge.file_state import FileState
from oxmerge.output.journal import JOURNAL_NAME
from oxmerge.output.publish import (
    INDEX_NAME,
    Contents,
    OutputDirectory,
    close,
    commit,
    discard,
    prepare_output,
    stage,
)
from oxmerge.output.side_files import SideFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OLD = {
    "config.json": "old config",
    INDEX_NAME: json.dumps({"weight_map": {"x": SHARDS[0], "y": "model-old.safetensors"}}),
    SHARDS[0]: "old weights 1",
    "model-old.safetensors": "old weights 2",
    "tokenizer.json": "old tokenizer",
    "my notes.txt": "mine",
}
SYSTEM_CALLS = ("rename", "unlink", "fsync", "open", "mkdir", "copy_file_range", "stat", "scandir")
REPORT = {"oxmerge_report.json": "{}"}


def identity(path: Path) -> dict[str, int]:
    """Return a plan's entry for an input file."""
    status = path.stat()
    return {"device": status.st_dev, "inode": status.st_ino}


def prepare(
    directory: Path, *, overwrite: bool = False, inputs: tuple[Path, ...] = (), needed: int = 0
) -> OutputDirectory:
    """Prepare an output with few words."""
    return prepare_output(
        directory,
        overwrite=overwrite,
        input_files=[identity(path) for path in inputs],
        needed_bytes=needed,
    )


def write_all(directory: Path, files: dict[str, str]) -> None:
    """Write files."""
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


def read_all(directory: Path) -> dict[str, str]:
    """Read every file under a directory."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_text() for path in paths}


def new_contents(folder: Path) -> tuple[Contents, dict[str, str]]:
    """Return what to commit, and the files that should come of it."""
    donor = folder / "donor"
    (donor / "1_Pooling").mkdir(parents=True)
    write_all(donor, {"tokenizer.json": "tokenizer"})
    (donor / "1_Pooling" / "config.json").write_text("pooling")
    names = ("1_Pooling/config.json", "tokenizer.json")
    texts = {"README.md": "card", "oxmerge_recipe.yml": "recipe"}
    contents = Contents(
        shards=SHARDS,
        index=json.dumps({"weight_map": {"x": SHARDS[0], "y": SHARDS[1]}}),
        config="new config",
        side_files=[SideFile(name, donor / name, state_of(donor / name)) for name in names],
        texts=texts,
        late=tuple(REPORT),
    )
    expected = {
        **{name: f"new {name}" for name in SHARDS},
        INDEX_NAME: str(contents.index),
        "config.json": "new config",
        "tokenizer.json": "tokenizer",
        "1_Pooling/config.json": "pooling",
        **texts,
        **REPORT,
    }
    return contents, expected


def state_of(path: Path) -> FileState:
    """Return the state of a file."""
    return FileState.of(path.stat())


def partial(output: OutputDirectory, name: str) -> Path:
    """Return where the engine writes a shard."""
    return output.path / partial_name(name)


def write_shards(output: OutputDirectory, contents: Contents) -> list[FileState]:
    """Do what comes before a commit; the states of the shards."""
    stage(output, contents)
    for name in contents.shards:
        partial(output, name).write_text(f"new {name}")
    return [state_of(partial(output, name)) for name in contents.shards]


def write_and_commit(output: OutputDirectory, contents: Contents) -> list[str]:
    """Do everything after the preparations."""
    notes = commit(output, contents, write_shards(output, contents), REPORT)
    close(output)
    return notes


def loads(directory: Path) -> bool:
    """Tell whether a loader would take the directory for a model, whole or not."""
    return (directory / "config.json").exists() or (directory / INDEX_NAME).exists()


def test_a_new_directory(tmp_path: Path) -> None:
    contents, expected = new_contents(tmp_path)
    output = prepare(tmp_path / "a" / "b")
    assert write_and_commit(output, contents) == []
    discard(output)
    assert read_all(tmp_path / "a" / "b") == expected


def test_an_empty_directory_is_fine(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    output = prepare(tmp_path / "out")
    discard(output)
    assert (tmp_path / "out").is_dir()


def test_overwriting_a_model(tmp_path: Path) -> None:
    contents, expected = new_contents(tmp_path)
    write_all(tmp_path / "out", OLD)
    output = prepare(tmp_path / "out", overwrite=True)
    shards = write_shards(output, contents)
    assert read_all(tmp_path / "out").items() >= OLD.items()
    notes = commit(output, contents, shards, REPORT)
    close(output)
    assert read_all(tmp_path / "out") == {**expected, "my notes.txt": "mine"}
    assert notes == ["`my notes.txt` was in the output directory before and is still there"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_directory_that_is_moved_meanwhile(tmp_path: Path, *, replaced: bool) -> None:
    contents, expected = new_contents(tmp_path)
    output = prepare(tmp_path / "out")
    shards = write_shards(output, contents)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    if replaced:
        (tmp_path / "out").mkdir()
    notes = commit(output, contents, shards, REPORT)
    close(output)
    moved = f"`{tmp_path}/out` was moved meanwhile: the output is in `{tmp_path}/elsewhere`"
    assert notes == [moved]
    assert read_all(tmp_path / "elsewhere") == expected


def test_a_lone_shard_without_config_comes_last_and_needs_no_index(tmp_path: Path) -> None:
    contents = Contents(shards=("model.safetensors",), texts={"README.md": "card"})
    output = prepare(tmp_path / "out")
    write_and_commit(output, contents)
    assert set(read_all(tmp_path / "out")) == {"model.safetensors", "README.md", *REPORT}


def test_the_config_is_the_last_rename_and_the_index_comes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents, _ = new_contents(tmp_path)
    renamed: list[str] = []
    rename = os.rename

    def record(source: str, target: str, **folders: int) -> None:
        renamed.append(target)
        rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", record)
    output = prepare(tmp_path / "out")
    write_and_commit(output, contents)
    assert renamed[:3] == [JOURNAL_NAME, *SHARDS]
    assert renamed[-2:] == [INDEX_NAME, "config.json"]


# Refusals.


def test_a_directory_that_holds_something(tmp_path: Path) -> None:
    write_all(tmp_path / "out", OLD)
    with pytest.raises(FileExistsError, match="not empty"):
        prepare(tmp_path / "out")
    assert read_all(tmp_path / "out") == OLD


def test_overwriting_needs_a_model(tmp_path: Path) -> None:
    write_all(tmp_path / "out", {"thesis.txt": "mine", "other.safetensors": "mine"})
    with pytest.raises(OutputError, match="no model that could be replaced"):
        prepare(tmp_path / "out", overwrite=True)


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    write_all(tmp_path, {"out": "mine"})
    with pytest.raises(OutputError, match="this is a file"):
        prepare(tmp_path / "out", overwrite=True)


def test_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("none")
    with pytest.raises(OutputError, match="a link to nowhere\n  hint: name a new directory"):
        prepare(tmp_path / "out")


def _same(model: Path) -> Path:
    return model


def _linked_folder(model: Path) -> Path:
    link = model.parent / "link"
    link.symlink_to(model)
    return link


def _folder_of_links(model: Path) -> Path:
    folder = model.parent / "links"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def _folder_of_hard_links(model: Path) -> Path:
    folder = model.parent / "links"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).hardlink_to(path)
    return folder


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("alias", [_same, _linked_folder, _folder_of_links, _folder_of_hard_links])
def test_an_input_is_never_replaced_under_any_name(
    tmp_path: Path, alias: Callable[[Path], Path], *, overwrite: bool
) -> None:
    model = tmp_path / "model"
    write_all(model, OLD)
    directory = alias(model)
    with pytest.raises(OutputError, match="which is an input"):
        prepare(directory, overwrite=overwrite, inputs=(model / SHARDS[0],))
    assert read_all(model) == OLD


def test_a_folder_beside_or_inside_an_input_is_fine(tmp_path: Path) -> None:
    write_all(tmp_path / "model", OLD)
    inputs = (tmp_path / "model" / SHARDS[0],)
    discard(prepare(tmp_path / "model" / "out", inputs=inputs))
    assert read_all(tmp_path / "model") == OLD
    assert not (tmp_path / "model" / "out").exists()


def test_too_little_space_is_told_in_numbers(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"1000 TB needed, .* free") as caught:
        prepare(tmp_path / "out", needed=10**15)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: int, **folder: int) -> int:
        if flags & os.O_WRONLY:
            raise PermissionError(errno.EACCES, "no", str(path))
        return real(path, flags, *rest, **folder)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError) as caught:
        prepare(tmp_path / "a" / "out")
    assert Path(caught.value.filename).parent == tmp_path / "a" / "out"
    assert not (tmp_path / "a").exists()


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    first = prepare(tmp_path / "out")
    partial(first, "x").write_text("precious")
    with pytest.raises(OutputError, match="another run"):
        prepare(tmp_path / "out")
    assert partial(first, "x").read_text() == "precious"
    discard(first)
    discard(prepare(tmp_path / "out"))


def test_leftovers_of_a_crash_are_removed_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_all(out, {partial_name("model.safetensors"): "torn"})
    (out / "keep.oxmerge-partial").mkdir()
    output = prepare(out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["keep.oxmerge-partial"]
    discard(output)


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_what_stands_in_the_way_is_found_before_the_switch(tmp_path: Path, kind: str) -> None:
    contents, _ = new_contents(tmp_path)
    out = tmp_path / "out"
    write_all(out, {name: text for name, text in OLD.items() if name != "tokenizer.json"})
    if kind == "link":
        (out / "1_Pooling").symlink_to(tmp_path / "donor" / "1_Pooling")
    elif kind == "file":
        (out / "1_Pooling").write_text("mine")
    else:
        (out / "tokenizer.json").mkdir()
    before = read_all(out)
    output = prepare(out, overwrite=True)
    with pytest.raises(OutputError, match="something else is in its place"):
        write_and_commit(output, contents)
    discard(output)
    assert read_all(out) == before


def test_folders_are_on_the_disk_before_the_config_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents, _ = new_contents(tmp_path)
    calls: list[Path] = []
    rename, fsync = os.rename, os.fsync

    def path_of(descriptor: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))

    def record_rename(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        calls.append(path_of(dst_dir_fd) / target)
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    def record_fsync(descriptor: int) -> None:
        calls.append(path_of(descriptor))
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "fsync", record_fsync)
    out = tmp_path / "new" / "out"
    output = prepare(out)
    assert calls[:2] == [tmp_path, tmp_path / "new"]
    write_and_commit(output, contents)
    pooling = out / "1_Pooling"
    placed, config = calls.index(pooling / "config.json"), calls.index(out / "config.json")
    assert placed < calls.index(pooling) < config


def test_a_handler_of_another_program_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an interpreter inside a program that had set one: Python does not know it."""

    def set_handler(_: int, handler: object) -> None:
        assert handler is not None, "Python cannot put a handler back that it does not know"

    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    monkeypatch.setattr(signal, "signal", set_handler)
    contents, expected = new_contents(tmp_path)
    output = prepare(tmp_path / "out")
    write_and_commit(output, contents)
    assert read_all(tmp_path / "out") == expected


def test_discard_removes_only_its_own(tmp_path: Path) -> None:
    write_all(tmp_path / "out", OLD)
    output = prepare(tmp_path / "out", overwrite=True)
    write_shards(output, Contents(shards=SHARDS))
    discard(output)
    assert read_all(tmp_path / "out") == OLD
    discard(output)


# Failure at every system call.


class Fault:
    """Lets system calls of the process pass until one, or all from one on, fails."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, *, lasting: bool) -> None:
        self.left = -1
        self.lasting = lasting
        self.struck = False
        self.root = str(root)
        for name in SYSTEM_CALLS:
            patch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0 and (self.lasting or not self.struck):
                self.struck = True
                raise OSError(errno.EIO, "injected")
            if self.left > 0:
                self.left -= 1
            return call(*args, **kwargs)

        return guarded


def run_with_fault(folder: Path, fault_at: int, *, old: bool, lasting: bool) -> bool:
    """Merge into `out` with a failure at the given call; whether it came to that call."""
    contents, expected = new_contents(folder)
    out = folder / "out"
    if old:
        write_all(out, OLD)
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, folder, lasting=lasting)
        output = prepare(out, overwrite=old)
        shards = write_shards(output, contents)
        fault.left = fault_at
        try:
            commit(output, contents, shards, REPORT)
            close(output)
        except OSError:
            discard(output)
    check_outcome(out, expected, output, old=old, struck=fault.struck)
    return fault.struck


def check_outcome(
    out: Path, expected: dict[str, str], output: OutputDirectory, *, old: bool, struck: bool
) -> None:
    """Check that what is there is the old model, the new one, or plainly none."""
    files = read_all(out) if out.exists() else {}
    files.pop(JOURNAL_NAME, None)  # it does no harm, and the next run removes it
    if output.finished or not struck:
        kept = {"my notes.txt": "mine"} if old else {}
        assert files == {**expected, **kept}
    elif old and loads(out):
        assert files.items() >= OLD.items() or not (out / "config.json").exists()
    else:
        assert not (out / "config.json").exists()
    if old:
        assert files["my notes.txt"] == "mine"


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("lasting", [False, True])
def test_no_failure_leaves_half_a_model(tmp_path: Path, *, old: bool, lasting: bool) -> None:
    struck_before_the_end = 0
    for fault_at in itertools.count():
        folder = tmp_path / str(fault_at)
        folder.mkdir()
        if not run_with_fault(folder, fault_at, old=old, lasting=lasting):
            break
        struck_before_the_end += 1
    assert struck_before_the_end > 20


@pytest.mark.parametrize("call", ["rename", "unlink"])
def test_a_new_directory_is_gone_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    contents, _ = new_contents(tmp_path)
    output = prepare(tmp_path / "a" / "out")
    shards = write_shards(output, contents)
    real = os.rename

    def interrupt(source: str, target: str, **folders: int) -> None:
        if target == "config.json" and folders["dst_dir_fd"] == output.descriptor:
            if call == "unlink":
                real(source, target, **folders)
            raise KeyboardInterrupt
        real(source, target, **folders)

    monkeypatch.setattr(os, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        commit(output, contents, shards, REPORT)
    discard(output)
    assert not (tmp_path / "a").exists()


def test_a_crash_in_the_switch_can_be_repeated(tmp_path: Path, crash_points: Iterator[int]) -> None:
    for point in crash_points:
        folder = tmp_path / str(point)
        folder.mkdir()
        contents, expected = new_contents(folder)
        write_all(folder / "out", OLD)
        first = prepare(folder / "out", overwrite=True)
        shards = write_shards(first, contents)
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, folder, lasting=True)
            fault.left = point
            with pytest.raises(OSError, match="injected"):
                commit(first, contents, shards, REPORT)
        first.claim.release()  # As the end of the process does; nothing else is cleaned up.
        second = prepare(folder / "out", overwrite=True)
        write_and_commit(second, contents)
        files = read_all(folder / "out")
        assert files == {**expected, "my notes.txt": "mine"}


@pytest.fixture
def crash_points() -> Iterator[int]:
    """Numbers of system calls that lie before, in and after the switch."""
    return iter(range(0, 60, 3))
