"""One owner of an output directory, of however many runs that begin at once."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
from oxmerge import _core
from oxmerge.errors import OutputError
from oxmerge.output import claims
from oxmerge.output.claims import Claim, claim, claimed
from writers import directory_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow

FORK = multiprocessing.get_context("fork")


def flow(recipe: Path, output: Path, results: Any, start: Any, fails: bool) -> None:
    """Merge when all are ready, in a process of its own; tell how it went."""
    if fails:

        def fail(*_: object, **__: object) -> None:
            raise OSError("injected")

        _core.execute = fail  # type: ignore[assignment]
    start.wait()
    try:
        oxmerge.merge(recipe, output, memory="4GiB", threads=1)
    except (OutputError, OSError) as error:
        results.put(str(error))
    except BaseException as error:  # noqa: BLE001
        results.put(f"unexpected: {error!r}")
    else:
        results.put("done")


def race(recipe: Path, outputs: list[Path], failing: int = 0) -> list[str]:
    """Merge into the outputs at once; what came of each."""
    results, start = FORK.SimpleQueue(), FORK.Barrier(len(outputs))
    runs = [
        FORK.Process(target=flow, args=(recipe, output, results, start, number < failing))
        for number, output in enumerate(outputs)
    ]
    for run in runs:
        run.start()
    told = [results.get() for _ in runs]
    for run in runs:
        run.join()
    return told


@pytest.fixture(scope="module")
def whole(twins: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that a merge of the twins gives."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    oxmerge.merge(twins / "linear.yml", folder, memory="4GiB")
    return directory_bytes(folder)


@pytest.mark.parametrize("made", ["nothing", "parent", "output"])
def test_of_runs_at_once_exactly_one_succeeds(
    tmp_path: Path, twins: Path, whole: dict[str, bytes], made: str
) -> None:
    for number in range(12):
        output = tmp_path / str(number) / "out"
        if made != "nothing":
            (output.parent if made == "parent" else output).mkdir(parents=True)
        told = race(twins / "linear.yml", [output] * 6)
        assert told.count("done") == 1, told
        refused = [text for text in told if text != "done"]
        assert all("another run is writing here" in t or "not empty" in t for t in refused), told
        assert directory_bytes(output) == whole


def test_runs_that_fail_harm_no_other(tmp_path: Path, twins: Path, whole: dict[str, bytes]) -> None:
    for number in range(12):
        output = tmp_path / str(number) / "out"
        told = race(twins / "linear.yml", [output] * 6, failing=3)
        assert told.count("done") <= 1, told
        assert not [text for text in told if text.startswith("unexpected")]
        if "done" in told:
            assert directory_bytes(output) == whole
        else:
            assert not output.exists() or not list(output.iterdir())


def test_runs_beside_each_other(tmp_path: Path, twins: Path, whole: dict[str, bytes]) -> None:
    """They share the folders that the first makes, and those that fail remove."""
    for number in range(12):
        new = tmp_path / str(number) / "a" / "b"
        outputs = [new / "x", new / "y", new / "z", new / "w"]
        told = race(twins / "linear.yml", outputs, failing=2)
        assert sorted(told) == ["done", "done", "injected", "injected"]
        finished = [output for output in outputs if (output / "config.json").exists()]
        assert len(finished) == 2
        for output in finished:
            assert directory_bytes(output) == whole
        assert len(list(new.iterdir())) == 2


def test_commands_at_once(tmp_path: Path, twins: Path, whole: dict[str, bytes]) -> None:
    output = tmp_path / "new" / "out"
    command = [sys.executable, "-m", "oxmerge", "merge", str(twins / "linear.yml"), str(output)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    told = [run.communicate(timeout=600)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1, 1, 1], told
    assert directory_bytes(output) == whole


def test_sweeps_at_once(tmp_path: Path, twins: Path) -> None:
    """In opposite orders: neither may have what the other needs."""
    program = (
        "import sys, oxmerge; oxmerge.sweep(sys.argv[1], sys.argv[2] + '/w{0}', "
        "{'models[0].parameters.weight': sys.argv[3]}, memory='4GiB')"
    )
    for number in range(3):
        folder = tmp_path / str(number)
        command = [sys.executable, "-c", program, str(twins / "linear.yml"), str(folder)]
        runs = [
            subprocess.Popen([*command, values], stderr=subprocess.PIPE, text=True)
            for values in ("1,2,3,4,5", "5,4,3,2,1")
        ]
        told = [run.communicate(timeout=600)[1] for run in runs]
        assert sorted(run.returncode for run in runs) == [0, 1], told
        assert len(list(folder.glob("w*/config.json"))) == 5


def test_a_run_that_does_not_get_the_lock_leaves_the_directory(
    tmp_path: Path, twins: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A makes it; B locks it and works; A fails; C comes and fails; B goes on."""
    output = tmp_path / "new" / "out"
    make, execute = claims._make, _core.execute
    made_by_a = Claim(output, -1, is_locked=False)
    make(made_by_a)
    assert len(made_by_a.created) == 2

    def merge_meanwhile() -> None:
        with pytest.raises(OutputError, match="another run is writing here"):
            oxmerge.merge(twins / "linear.yml", output, memory="4GiB")
        assert output.is_dir()

    def work_of_b(*args: Any, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(_core, "execute", execute)
        with monkeypatch.context() as patch:
            patch.setattr(claims, "_make", lambda held: held.created.extend(made_by_a.created))
            merge_meanwhile()  # A
        merge_meanwhile()  # C
        return execute(*args, **options)

    monkeypatch.setattr(_core, "execute", work_of_b)
    oxmerge.merge(twins / "linear.yml", output, memory="4GiB")
    assert directory_bytes(output) == whole


def test_a_parent_that_another_run_uses_is_left(tmp_path: Path) -> None:
    inner = claim(tmp_path / "new" / "out")
    with claimed(tmp_path / "new"):
        inner.give_up()
        assert (tmp_path / "new").is_dir()
        assert not (tmp_path / "new" / "out").exists()
    assert not (tmp_path / "other").exists()


def test_a_directory_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = tmp_path / "a" / "out", claims._lock
    removals = iter([path.parent, path, None])

    def lock_late(held: Claim, *, shared: bool) -> bool:
        if (folder := next(removals)) is not None:
            shutil.rmtree(folder)
            if folder == path:
                folder.mkdir()
        return lock(held, shared=shared)

    monkeypatch.setattr(claims, "_lock", lock_late)
    held = claim(path)
    status = os.fstat(held.descriptor)
    assert (status.st_dev, status.st_ino) == (path.stat().st_dev, path.stat().st_ino)
    held.give_up()


def test_what_the_name_has_come_to_mean_is_left_alone(
    tmp_path: Path, twins: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything goes into the directory that was locked, whatever its name is given to."""
    output, execute = tmp_path / "out", _core.execute

    def swap(*args: Any, **options: Any) -> dict[str, Any]:
        output.rename(tmp_path / "moved")
        output.mkdir()
        (output / "config.json").write_text("mine")
        return execute(*args, **options)

    monkeypatch.setattr(_core, "execute", swap)
    oxmerge.merge(twins / "linear.yml", output, memory="4GiB")
    assert directory_bytes(output) == {"config.json": b"mine"}
    assert directory_bytes(tmp_path / "moved") == whole


def test_a_file_system_that_cannot_lock(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    report = oxmerge.merge(twins / "linear.yml", tmp_path / "a" / "out", memory="4GiB")
    assert any("cannot be locked" in note for note in report.notes)
    monkeypatch.setattr(_core, "execute", refuse)
    with pytest.raises(OSError, match="Bad file"):
        oxmerge.merge(twins / "linear.yml", tmp_path / "b" / "out", memory="4GiB")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["", " ", Path(" ")])
def test_no_name_is_refused(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch, name: str | Path
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, axes = twins / "linear.yml", {"models[0].parameters.weight": "1,2"}
    merges: list[Callable[[], object]] = [
        lambda: oxmerge.merge(recipe, name),
        lambda: oxmerge.merge(recipe, name, overwrite=True),
        lambda: oxmerge.sweep(recipe, name, axes),
    ]
    for merge in merges:
        with pytest.raises(OutputError, match=r"has no name\n.* a variable, that is not"):
            merge()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "RECIPE", ""),
        ("sweep", "RECIPE", "", "--set", "models[0].parameters.weight=1,2"),
        ("demo", "--directory", ""),
        ("demo", "--directory="),
    ],
)
def test_no_name_on_the_command_line(
    tmp_path: Path, twins: Path, arguments: tuple[str, ...]
) -> None:
    words = [str(twins / "linear.yml") if word == "RECIPE" else word for word in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "oxmerge", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: the output directory has no name" in done.stderr
    assert not list(tmp_path.iterdir())
