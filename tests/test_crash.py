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
from disks import small_disk
from oxmerge import _core, cli
from oxmerge.file_state import FileState
from oxmerge.output import publish
from oxmerge.output.journal import JOURNAL_NAME, mark
from oxmerge.signals import Ended, ending
from writers import directory_bytes, write_model, write_recipe, write_sparse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Process = subprocess.Popen[str]

pytestmark = pytest.mark.slow

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


def start(
    recipe: Path, output: Path, *options: str, buffered: bool = False, before: Sequence[str] = ()
) -> Process:
    """Start a merge in a process of its own, and wait until it writes weights."""
    arguments = ["merge", str(recipe), str(output), "--threads=1", "--quiet", *options]
    program = ["-c", BUFFERED] if buffered else ["-m", "oxmerge"]
    return launch([*before, sys.executable, *program, *arguments], output)


def launch(command: Sequence[str], output: Path) -> Process:
    """Start a command, and wait until it writes weights to an output, or below it."""
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600
    while not list(output.rglob(".model*.oxmerge-partial")):
        assert process.poll() is None, "it ended before it wrote anything"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def stop(process: Process, number: signal.Signals) -> str:
    """Send a signal to a process that still works; what it says."""
    assert process.poll() is None
    process.send_signal(number)
    _, text = process.communicate(timeout=600)
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
def test_ctrl_c_ends_the_program(tmp_path: Path, slow: Path, *, buffered: bool) -> None:
    output = tmp_path / "new" / "out"
    process = start(slow, output, buffered=buffered)
    text = stop(process, signal.SIGINT)
    assert process.returncode == 130
    assert text == "error: interrupted\n"
    assert not (tmp_path / "new").exists()


OTHERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@pytest.mark.parametrize("number", OTHERS)
def test_other_signals_end_like_ctrl_c(tmp_path: Path, slow: Path, number: signal.Signals) -> None:
    output = tmp_path / "new" / "out"
    process = start(slow, output)
    assert stop(process, number) == f"error: ended by {number.name}\n"
    assert process.returncode == 128 + number
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", OTHERS)
def test_a_signal_in_a_sweep(tmp_path: Path, slow: Path, number: signal.Signals) -> None:
    pattern = tmp_path / "new" / "w{0}"
    axes = "models[0].parameters.weight=1,2,3"
    arguments = [str(slow), str(pattern), "--set", axes, "--threads=1", "--quiet"]
    process = launch([sys.executable, "-m", "oxmerge", "sweep", *arguments], tmp_path)
    stop(process, number)
    assert process.returncode == 128 + number
    assert not (tmp_path / "new").exists()


def test_signals_that_come_together_do_not_stop_the_cleaning_up(tmp_path: Path, slow: Path) -> None:
    for _ in range(5):
        process = start(slow, tmp_path / "new" / "out")
        for number in (*OTHERS, signal.SIGINT, *OTHERS):
            process.send_signal(number)
        process.communicate(timeout=600)
        assert process.returncode in {130, *(128 + number for number in OTHERS)}
        assert not (tmp_path / "new").exists()


#: A merge that sends itself a signal while a class is made in a module that it imports.
IN_A_CLASS = """
import dataclasses, os, signal, sys
from oxmerge import cli
made = dataclasses.Field.__set_name__

def strike(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    made(*arguments)

dataclasses.Field.__set_name__ = strike
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_signal_while_a_class_is_made(tmp_path: Path, twins: Path) -> None:
    command = [sys.executable, "-c", IN_A_CLASS, "merge", str(twins / "linear.yml"), "out"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "error: ended by SIGTERM\n"
    assert not (tmp_path / "out").exists()


def test_an_error_on_the_way_out_does_not_hide_the_signal() -> None:
    def end() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise ValueError("what others do when they are stopped")

    with pytest.raises(Ended), ending():
        end()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path, slow: Path) -> None:
    process = start(slow, tmp_path / "out", before=["nohup"])
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    stop(process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM


def test_the_command_line_leaves_handlers_as_they_were() -> None:
    before = [signal.getsignal(number) for number in OTHERS]
    assert cli.main(["--version"]) == 0
    assert [signal.getsignal(number) for number in OTHERS] == before


def test_a_handler_of_the_program_that_merges(tmp_path: Path, slow: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def handle(*_: object) -> None:
        raise Stop

    def end(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(Stop):
            oxmerge.merge(slow, tmp_path / "out", threads=1, memory="4GiB", progress=end)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "out").exists()


#: A merge that sends itself signals, or dies, at its so-many-th rename.
STRUCK = """
import os, signal, sys
from oxmerge import cli
left, number = int(sys.argv[1]), int(sys.argv[2])
rename = os.rename

def strike(source, target, **folders):
    global left
    if left == 0:
        os.kill(os.getpid(), number)
    left -= 1
    rename(source, target, **folders)

os.rename = strike
sys.exit(cli.main(sys.argv[3:]))
"""


def run_struck(
    at: int, number: int, *arguments: object, verb: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STRUCK, str(at), str(int(number))]
    words = verb or ["merge", "-q", *map(str, arguments)]
    return subprocess.run([*command, *words], text=True, capture_output=True, check=False)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for two models of three tensors, with a side file in a folder."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, value in (("a", 1.0), ("b", 2.0)):
        model = write_model(folder / name, {x: np.full(2000, value, np.float32) for x in "xyz"})
        (model / "1_Pooling").mkdir()
        (model / "1_Pooling" / "config.json").write_text("pooling")
        (model / "tokenizer.json").write_text("tokenizer")
    each = {"weight": 1}
    return write_recipe(folder / "r.yml", "linear", [folder / "a", folder / "b"], each=each)


SHARDED = ("--shard-size", "8KB")


@pytest.mark.parametrize("number", [signal.SIGINT, *OTHERS])
def test_a_signal_between_the_renames_waits(
    tmp_path: Path, sharded: Path, number: signal.Signals
) -> None:
    for at in (0, 2, 9):
        output = tmp_path / str(at)
        done = run_struck(at, number, sharded, output, *SHARDED)
        assert done.returncode == 128 + number
        assert len(list(output.glob("*.safetensors"))) == 3
        assert set(loadable(output)) == {"config.json", "model.safetensors.index.json"}
        assert not list(output.glob(".*"))


OLD = {
    "config.json": "old",
    "model.safetensors": "old weights",
    "model-00001-of-00003.safetensors": "old weights",
    "tokenizer.json": "old tokenizer",
    "notes.txt": "mine",
    "1_Pooling/notes.txt": "mine",
}


@pytest.mark.parametrize("old", [False, True])
def test_a_death_between_the_renames_needs_no_permission_to_go_on(
    tmp_path: Path, sharded: Path, *, old: bool
) -> None:
    """Nor does a permission that is given change anything."""
    whole = tmp_path / "whole"
    oxmerge.merge(sharded, whole, shard_size="8KB", memory="4GiB")
    expected = directory_bytes(whole)
    for at in range(1, 20):
        output = tmp_path / str(at)
        for name, text in OLD.items() if old else ():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_text(text)
        first = ("--overwrite",) if old else ()
        died = run_struck(at, signal.SIGKILL, sharded, output, *SHARDED, *first)
        if died.returncode == 0:
            break
        assert died.returncode == -signal.SIGKILL
        assert "config.json" not in loadable(output)
        oxmerge.merge(sharded, output, shard_size="8KB", memory="4GiB", overwrite=at % 2 == 0)
        kept = dict.fromkeys(("notes.txt", "1_Pooling/notes.txt"), b"mine") if old else {}
        assert directory_bytes(output) == {**expected, **kept}
        assert not list(output.glob(".*"))
    assert at > 9


def test_a_death_in_a_sweep_needs_no_permission_to_go_on(tmp_path: Path, sharded: Path) -> None:
    """Also for the outputs that are complete by then; but only for that sweep."""
    pattern, axes = tmp_path / "w{0}", "models[0].parameters.weight=1,2"
    sweep = ["sweep", "-q", str(sharded), str(pattern), "--set", axes, *SHARDED]
    died = run_struck(15, signal.SIGKILL, verb=sweep)
    assert died.returncode == -signal.SIGKILL
    assert [bool(loadable(tmp_path / name)) for name in ("w1", "w2")] == [True, False]
    whole = directory_bytes(tmp_path / "w1")
    assert run_struck(-1, 0, sharded, tmp_path / "w1", *SHARDED, "--seed=1").returncode == 1
    assert directory_bytes(tmp_path / "w1") == whole
    del whole[JOURNAL_NAME]
    died = run_struck(15, signal.SIGKILL, verb=sweep)
    assert died.returncode == -signal.SIGKILL
    done = run_struck(-1, 0, verb=sweep)
    assert done.returncode == 0, done.stderr
    assert directory_bytes(tmp_path / "w1") == whole
    assert len(loadable(tmp_path / "w2")) == 2
    assert not list(tmp_path.rglob(".*"))
    assert run_struck(-1, 0, verb=sweep).returncode == 1


def test_an_output_whose_name_is_no_text(tmp_path: Path, twins: Path) -> None:
    output = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    report = oxmerge.merge(twins / "linear.yml", output, memory="4GiB")
    assert report.directory == output
    written = json.loads((Path(output) / "oxmerge_report.json").read_text())
    assert written["directory"] == output


def test_a_death_does_not_give_others_files_away(tmp_path: Path, sharded: Path) -> None:
    for at, name in enumerate(("config.json", "README.md", "model.bin", "new.safetensors"), 2):
        output = tmp_path / str(at)
        run_struck(at, signal.SIGKILL, sharded, output, *SHARDED)
        (output / name).write_text("mine")
        before = directory_bytes(output)
        done = run_struck(-1, 0, sharded, output, *SHARDED)
        assert done.returncode == 1
        assert "not empty" in done.stderr
        assert directory_bytes(output) == before
        (output / name).unlink()
        assert run_struck(-1, 0, sharded, output, *SHARDED).returncode == 0


def test_a_file_of_ours_that_was_changed_is_no_longer_ours(tmp_path: Path, sharded: Path) -> None:
    output = tmp_path / "out"
    run_struck(6, signal.SIGKILL, sharded, output, *SHARDED)
    _append(output / "tokenizer.json")
    assert run_struck(-1, 0, sharded, output, *SHARDED).returncode == 1


def test_a_second_run_may_fail_or_die_too(
    tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("stopped")

    output = tmp_path / "out"
    shutil.copytree(sharded.parent / "a", output)
    (output / "tokenizer.json").write_text("old")
    run_struck(3, signal.SIGKILL, sharded, output, *SHARDED, "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(_core, "execute", fail)
        with pytest.raises(ValueError, match="stopped"):
            oxmerge.merge(sharded, output, shard_size="8KB", memory="4GiB")
    run_struck(4, signal.SIGKILL, sharded, output, *SHARDED)
    assert run_struck(-1, 0, sharded, output, *SHARDED).returncode == 0
    assert (output / "tokenizer.json").read_text() == "tokenizer"


def test_a_model_that_is_still_whole_is_not_given_away(tmp_path: Path, sharded: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(sharded.parent / "a", output)
    before = directory_bytes(output)
    run_struck(0, signal.SIGKILL, sharded, output, *SHARDED, "--overwrite")
    assert run_struck(-1, 0, sharded, output, *SHARDED).returncode == 1
    assert {n: d for n, d in directory_bytes(output).items() if n in before} == before


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', "{", '{"version": 1, "ours": 3}'])
def test_a_journal_that_says_nothing(tmp_path: Path, sharded: Path, text: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / JOURNAL_NAME).write_text(text)
    (output / "tokenizer.json").write_text("mine")
    assert run_struck(-1, 0, sharded, output).returncode == 1
    (output / "tokenizer.json").unlink()
    assert run_struck(-1, 0, sharded, output).returncode == 0


def test_a_journal_does_not_lead_out_of_the_output(tmp_path: Path, sharded: Path) -> None:
    output, other = tmp_path / "out", tmp_path / "precious"
    output.mkdir()
    other.write_text("mine")
    marks = {name: list(mark(FileState.of(other.stat()))) for name in ("../precious", str(other))}
    parts = {"last": "../precious", "ours": marks, "old": marks, "folders": ["..", "../x"]}
    for last in ("../precious", "config.json"):
        (output / JOURNAL_NAME).write_text(json.dumps({"version": 1, **parts, "last": last}))
        assert run_struck(-1, 0, sharded, output, "--overwrite").returncode == 0
        assert other.read_text() == "mine"


# What is put in place is what was written.


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("which", [".model-00002*", ".0.*"])
@pytest.mark.parametrize("change", ["replace", "same size", "write", "link", "remove"])
def test_a_partial_file_that_others_touch(
    tmp_path: Path,
    sharded: Path,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    change: str,
    *,
    overwrite: bool,
) -> None:
    output, execute = tmp_path / "out", _core.execute
    if overwrite:
        shutil.copytree(sharded.parent / "a", output)
    before = directory_bytes(output)

    def touch(*args: Any, **options: Any) -> dict[str, Any]:
        done = execute(*args, **options)
        (path,) = output.glob(which)
        data = path.read_bytes()
        if change == "write":
            time.sleep(0.02)  # a file system's clock may tick slowly
            path.write_bytes(data[:-1] + b"?")
        else:
            path.unlink()
        if change == "replace":
            path.write_bytes(b"another")
        elif change == "same size":
            time.sleep(0.02)
            path.write_bytes(data[:-1] + b"?")
        elif change == "link":
            (tmp_path / "elsewhere").write_bytes(data)
            path.symlink_to(tmp_path / "elsewhere")
        return done

    monkeypatch.setattr(_core, "execute", touch)
    with pytest.raises(oxmerge.OutputError, match="no longer there as it was written"):
        oxmerge.merge(sharded, output, shard_size="8KB", overwrite=overwrite, memory="4GiB")
    assert directory_bytes(output) == before


def test_a_file_that_others_put_there_meanwhile_is_not_replaced(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, execute = tmp_path / "out", _core.execute

    def put(*args: Any, **options: Any) -> dict[str, Any]:
        (output / "README.md").write_text("mine")
        return execute(*args, **options)

    monkeypatch.setattr(_core, "execute", put)
    with pytest.raises(FileExistsError, match="another program has put a file there"):
        oxmerge.merge(twins / "linear.yml", output, memory="4GiB")
    assert directory_bytes(output) == {"README.md": b"mine"}


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


# Limits of the process.


@pytest.mark.parametrize("mib", [*range(25, 60, 5), *range(60, 300, 40), 600])
def test_a_limit_of_memory_is_an_error_or_fewer_threads(
    tmp_path: Path, twins: Path, mib: int
) -> None:
    command = [sys.executable, "-m", "oxmerge", "merge", str(twins / "linear.yml"), "out"]
    done = subprocess.run(
        ["prlimit", f"--as={mib << 20}", *command, "--threads=32", "--json"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode == 0:
        assert mib > 100
        assert (tmp_path / "out" / "config.json").exists()
        assert mib > 500 or json.loads(done.stdout)["threads"] < 32
    else:
        assert mib < 300
        assert done.returncode == 1, done.stderr
        assert not (tmp_path / "out").exists()


def test_no_thread_to_be_had_is_an_error(tmp_path: Path, twins: Path) -> None:
    """As an ordinary user, for whom alone there is such a limit."""
    for command in (["merge", str(twins / "linear.yml"), "out"], ["demo", "--directory=out"]):
        done = subprocess.run(
            [*ordinary_user(), "prlimit", "--nproc=1", sys.executable, "-m", "oxmerge", *command],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 1
        assert "thread" in done.stderr
        assert "hint: allow more threads and processes" in done.stderr
        assert not list(tmp_path.rglob("*.safetensors*"))


def ordinary_user() -> list[str]:
    """Return what a command begins with that root starts as someone else, who may read all."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root has no such limit, and there is no `setpriv`")
    kept = "+dac_read_search,+dac_override"
    kept_only = ["--bounding-set=-sys_resource,-sys_admin", f"--inh-caps={kept}"]
    return ["setpriv", "--reuid=12345", *kept_only, f"--ambient-caps={kept}"]


# Full disks.


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


@pytest.mark.parametrize(
    ("change", "read_path"),
    [(_touch, "mapped"), (_append, "positioned"), (_rewrite, "mapped"), (_replace, "positioned")],
)
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
