"""Killed, interrupted, out of space, or over its own inputs: nothing half-done is left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from oxmerge import _core, publish
from writers import directory_bytes, write_model, write_recipe, write_sparse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Process = subprocess.Popen[str]

CONFIG = '{"model_type": "test"}'
LOADABLE = ("config.json", "model.safetensors", "model.safetensors.index.json")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that one thread merges in seconds: 256 MiB, from holes."""
    folder = tmp_path_factory.mktemp("slow")
    models = [folder / name for name in ("base", "a", "b")]
    for model in models:
        write_sparse(model / "model.safetensors", {"x": (32 << 10, 4096)})
        (model / "config.json").write_text(CONFIG)
    each = {"weight": 0.5, "density": 0.5}
    return write_recipe(folder / "slow.yml", "ties", models[1:], base=models[0], each=each)


#: The command line, on a file system that takes no direct writes.
BUFFERED = """
import functools, sys
from oxmerge import _core, cli
_core.execute = functools.partial(_core.execute, direct=False)
sys.exit(cli.main(sys.argv[1:]))
"""


def start(recipe: Path, output: Path, *options: str, buffered: bool = False) -> Process:
    """Start a merge in a process of its own, and wait until it writes weights."""
    arguments = ["merge", str(recipe), str(output), "--threads=1", "--quiet", *options]
    program = ["-c", BUFFERED] if buffered else ["-m", "oxmerge"]
    command = [sys.executable, *program, *arguments]
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(output.glob(".model*.oxmerge-partial")):
        assert process.poll() is None, "it ended before it wrote anything"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def stop(process: Process, number: signal.Signals) -> str:
    """Send a signal to a process that still works; what it says."""
    assert process.poll() is None
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    return text


def loadable(folder: Path) -> list[str]:
    return [name for name in LOADABLE if (folder / name).exists()]


def test_killed_half_way(tmp_path: Path, slow: Path) -> None:
    output = tmp_path / "out"
    process = start(slow, output)
    stop(process, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not loadable(output)
    assert list(output.iterdir())
    report = oxmerge.merge(slow, output, memory="4GiB")
    assert report.tensors == 1
    assert set(loadable(output)) == {"config.json", "model.safetensors"}
    assert not list(output.glob(".*"))
    shutil.rmtree(output)


def test_killed_half_way_over_an_old_model(tmp_path: Path, slow: Path, twins: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(twins / "a", output)
    old = directory_bytes(output)
    process = start(slow, output, "--overwrite")
    stop(process, signal.SIGKILL)
    left = {name: data for name, data in directory_bytes(output).items() if name in old}
    assert left == old
    oxmerge.merge(twins / "linear.yml", output, overwrite=True, memory="4GiB")
    assert not list(output.glob(".*"))
    assert directory_bytes(output)["model.safetensors"] != old["model.safetensors"]


@pytest.mark.parametrize("buffered", [False, True])
def test_ctrl_c_ends_the_program_soon(tmp_path: Path, slow: Path, *, buffered: bool) -> None:
    output = tmp_path / "new" / "out"
    process = start(slow, output, buffered=buffered)
    sent = time.monotonic()
    text = stop(process, signal.SIGINT)
    # It takes a second at the most; another is for machines that have more to do.
    assert time.monotonic() - sent < 2
    assert process.returncode == 130
    assert text == "error: interrupted\n"
    assert not (tmp_path / "new").exists()


def test_ctrl_c_over_an_old_model(tmp_path: Path, slow: Path, twins: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(twins / "a", output)
    old = directory_bytes(output)
    process = start(slow, output, "--overwrite")
    stop(process, signal.SIGINT)
    assert process.returncode == 130
    assert directory_bytes(output) == old


def test_ctrl_c_from_python(tmp_path: Path, slow: Path) -> None:
    def interrupt(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        oxmerge.merge(slow, tmp_path / "out", threads=1, memory="4GiB", progress=interrupt)
    assert not (tmp_path / "out").exists()


# Full disks.


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of so many bytes."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root and `mount`")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting a small file system is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path: Path, slow: Path) -> None:
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        with pytest.raises(OSError, match=r"not enough space: 269 MB needed, 16\.8 MB free") as e:
            oxmerge.merge(slow, disk / "out", memory="4GiB")
        assert e.value.errno == errno.ENOSPC
        assert not list(disk.iterdir())


def test_a_disk_that_others_fill_first(
    tmp_path: Path, slow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_check_space", lambda *_: None)
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        with pytest.raises(OSError, match="No space left on device") as caught:
            oxmerge.merge(slow, disk / "out", memory="4GiB")
        assert caught.value.errno == errno.ENOSPC
        assert str(caught.value.filename).endswith("model.safetensors.oxmerge-partial")
        assert not list(disk.iterdir())


def test_a_disk_that_others_fill_meanwhile(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = _core.execute

    def fill(*args: Any, **options: Any) -> dict[str, Any]:
        done = execute(*args, **options)
        others = (disk / "others").open("wb", buffering=0)
        with others, contextlib.suppress(OSError):
            while True:
                others.write(bytes(4096))
        return done

    monkeypatch.setattr(_core, "execute", fill)
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        with pytest.raises(OSError, match="No space left on device") as caught:
            oxmerge.merge(twins / "linear.yml", disk / "out", memory="4GiB")
        assert caught.value.errno == errno.ENOSPC
        assert [path.name for path in disk.iterdir()] == ["others"]


# Inputs.


def _same(model: Path) -> Path:
    return model


def _linked(model: Path) -> Path:
    link = model.parent / "link"
    link.symlink_to(model, target_is_directory=True)
    return link


def _hard_links(model: Path) -> Path:
    folder = model.parent / "links"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG)
    (folder / "model.safetensors").hardlink_to(model / "model.safetensors")
    return folder


@pytest.mark.parametrize("alias", [_same, _linked, _hard_links])
def test_an_output_over_an_input_is_refused(
    tmp_path: Path, twins: Path, alias: Callable[[Path], Path]
) -> None:
    for name in "ab":
        shutil.copytree(twins / name, tmp_path / name)
    shutil.copy(twins / "linear.yml", tmp_path)
    output = alias(tmp_path / "b")
    before = directory_bytes(tmp_path)
    with pytest.raises(oxmerge.OutputError, match=r"`.*`, which is an input of the merge"):
        oxmerge.merge(tmp_path / "linear.yml", output, overwrite=True, memory="4GiB")
    assert directory_bytes(tmp_path) == before


def test_what_stands_in_the_way_is_found_before_any_work(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("it worked for nothing")

    monkeypatch.setattr(_core, "execute", work)
    output = tmp_path / "out"
    (output / "README.md").mkdir(parents=True)
    (output / "config.json").write_text(CONFIG)
    with pytest.raises(oxmerge.OutputError, match=r"`README\.md` has to be written here"):
        oxmerge.merge(twins / "linear.yml", output, overwrite=True, memory="4GiB")
    assert (output / "config.json").read_text() == CONFIG


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")


def _replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.rename(path)


@pytest.mark.parametrize("change", [_touch, _append, _rewrite, _replace])
@pytest.mark.parametrize("read_path", ["mapped", "positioned"])
def test_an_input_that_changes_meanwhile(
    tmp_path: Path, change: Callable[[Path], None], read_path: str
) -> None:
    models = [tmp_path / name for name in "abc"]
    for model in models:
        write_sparse(model / "model.safetensors", {"x": (16 << 10, 4096)})
    each = {"weight": 0.5, "density": 0.5}
    recipe = write_recipe(tmp_path / "r.yml", "ties", models[1:], base=models[0], each=each)
    changed = models[1] / "model.safetensors"
    seen: list[object] = []

    def progress(snapshot: object) -> None:
        if not seen:
            change(changed)
        seen.append(snapshot)

    options: dict[str, Any] = {"read_path": read_path, "threads": 1, "memory": "4GiB"}
    with pytest.raises(oxmerge.InputChangedError) as caught:
        oxmerge.merge(recipe, tmp_path / "out", progress=progress, **options)
    assert seen
    assert caught.value.file == str(changed)
    assert not (tmp_path / "out").exists()


def test_an_input_that_changed_between_plan_and_run(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        shutil.copytree(twins / name, tmp_path / name)
    shutil.copy(twins / "linear.yml", tmp_path)
    execute = _core.execute

    def change(*args: Any, **options: Any) -> dict[str, Any]:
        _touch(tmp_path / "b" / "model.safetensors")
        return execute(*args, **options)

    monkeypatch.setattr(_core, "execute", change)
    with pytest.raises(oxmerge.InputChangedError):
        oxmerge.merge(tmp_path / "linear.yml", tmp_path / "out", memory="4GiB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("change", [_touch, _append, _replace, Path.unlink])
def test_a_config_or_an_index_that_changes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Path], None]
) -> None:
    models = [tmp_path / name for name in "ab"]
    for model in models:
        write_model(model, {"x": np.ones(9, np.float32)})
        (model / "config.json").write_text(CONFIG)
        index = {"metadata": {}, "weight_map": {"x": "model.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe = write_recipe(tmp_path / "r.yml", "linear", models, each={"weight": 1})
    execute = _core.execute

    def change_and_execute(*args: Any, **options: Any) -> dict[str, Any]:
        change(models[1] / name)
        return execute(*args, **options)

    monkeypatch.setattr(_core, "execute", change_and_execute)
    with pytest.raises(oxmerge.InputChangedError) as caught:
        oxmerge.merge(recipe, tmp_path / "out", memory="4GiB")
    assert caught.value.file == str(models[1] / name)
    assert not (tmp_path / "out").exists()


def test_an_error_over_an_old_model_leaves_it(tmp_path: Path, twins: Path) -> None:
    integers = {"x": np.arange(3)}
    write_model(tmp_path / "a", integers)
    write_model(tmp_path / "b", {"x": integers["x"] + 1})
    recipe = write_recipe(
        tmp_path / "r.yml", "linear", [tmp_path / "a", tmp_path / "b"], each={"weight": 1}
    )
    shutil.copytree(twins / "a", tmp_path / "out")
    before = directory_bytes(tmp_path / "out")
    with pytest.raises(oxmerge.PlanError, match="must be the same in every model"):
        oxmerge.merge(recipe, tmp_path / "out", overwrite=True, memory="4GiB")
    assert directory_bytes(tmp_path / "out") == before
