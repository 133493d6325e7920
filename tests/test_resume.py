"""What an interrupted merge keeps, and how the same command goes on with it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import counted
import numpy as np
import oxmerge
import pytest
from disks import small_disk
from faults import VERBS
from oxmerge import _core, cli
from oxmerge.demo_hub import HubServer, Model, serving
from oxmerge.output.resume import RESUME_NAME, check_same, keys_of
from range_server import serve
from writers import directory_bytes, random_arrays, tuned, write_model, write_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).parent
#: Five shards: tensors of more than a block, whose ends share pages, and small neighbours.
SHAPES = {f"t{k}.weight": (260, 257 + k) for k in range(4)} | {f"s{k}": (61, 33) for k in range(6)}
OPTIONS: dict[str, Any] = {"shard_size": "200KB", "threads": 2, "memory": "4GiB"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two fine-tunes of it, and recipes."""
    folder = tmp_path_factory.mktemp("models")
    base = random_arrays(SHAPES, 0)
    write_model(folder / "base", base, "BF16")
    for seed, name in enumerate("ab", start=1):
        write_model(folder / name, tuned(base, seed), "BF16")
    two = [folder / "a", folder / "b"]
    write_recipe(folder / "counted.yml", "counted:halved", two)
    each = {"weight": 0.5}
    write_recipe(folder / "task.yml", "task_arithmetic", two, base=folder / "base", each=each)
    write_recipe(folder / "metagpt.yml", "metagpt", two, base=folder / "base")
    first = (folder / "task.yml").read_text()
    second = write_recipe(folder / "two.yml", "linear", ["first", folder / "b"], each={"weight": 1})
    second.write_text(f"name: first\n{first}---\n{second.read_text()}")
    return folder


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let each tensor be written down as soon as it is finished."""
    monkeypatch.setattr(_core, "execute", functools.partial(_core.execute, journal_every=0.0))
    yield
    counted.last = 0


def merge(models: Path, output: Path, last: int = 0, **options: Any) -> int:
    """Merge by the counted method, which stops at its `last` call; how often it was called."""
    counted.calls, counted.last = 0, last
    recipe = options.pop("recipe", models / "counted.yml")
    options = {"shard_size": "200KB", "threads": 1, "memory": "4GiB", **options}
    oxmerge.merge(recipe, output, allow_methods=["counted"], **options)
    return counted.calls


def interrupt(models: Path, output: Path, last: int, **options: Any) -> str:
    """Interrupt the same at its `last` call; what the exception says besides."""
    with pytest.raises(counted.Stop) as caught:
        merge(models, output, last, **options)
    return "\n".join(getattr(caught.value, "__notes__", ()))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


def test_the_same_merge_goes_on(tmp_path: Path, models: Path, at_once: None) -> None:
    assert merge(models, tmp_path / "whole") == 10
    output = tmp_path / "new" / "out"
    note = interrupt(models, output, 3)
    assert "the same command goes on from there" in note
    assert f"`oxmerge clean {output}` removes it" in note
    # Two tensors are finished. They lie in two files; no other is left.
    assert len(hidden(output)) == 3
    assert RESUME_NAME in hidden(output)
    assert not [path for path in output.iterdir() if not path.name.startswith(".")]
    interrupt(models, output, 2)
    report = {}

    def progress(snapshot: Any) -> None:
        report["done"] = snapshot.bytes_done

    assert merge(models, output, threads=3, progress=progress) == 10 - 3
    assert directory_bytes(output) == directory_bytes(tmp_path / "whole")
    assert not hidden(output)
    told = json.loads((output / "oxmerge_report.json").read_text())["notes"]
    assert "an interrupted run had finished 3 of 10 tensors" in told


def test_what_no_longer_holds_is_made_again(tmp_path: Path, models: Path, at_once: None) -> None:
    merge(models, tmp_path / "whole")
    for damage in ("change", "cut", "remove", "replace"):
        output = tmp_path / damage
        interrupt(models, output, 4)
        path = next(output.glob(".model-00001*"))
        data = path.read_bytes()
        if damage == "change":
            path.write_bytes(data[:9000] + bytes([data[9000] ^ 1]) + data[9001:])
        elif damage == "cut":
            os.truncate(path, 4096)
        else:
            path.unlink()
            if damage == "replace":
                path.write_bytes(b"another")
        assert 10 - 3 < merge(models, output) <= 10
        assert directory_bytes(output) == directory_bytes(tmp_path / "whole")


def test_a_file_of_someone_else_is_not_written_to(
    tmp_path: Path, models: Path, at_once: None
) -> None:
    for link in (os.symlink, os.link):
        output, precious = tmp_path / link.__name__, tmp_path / f"precious {link.__name__}"
        interrupt(models, output, 4)
        precious.write_bytes(b"mine")
        path = next(output.glob(".model-00001*"))
        path.unlink()
        link(precious, path)
        with pytest.raises(oxmerge.OutputError, match="no file that an interrupted run left"):
            merge(models, output)
        assert precious.read_bytes() == b"mine"
        merge(models, output, fresh=True)
        assert precious.read_bytes() == b"mine"


def test_a_journal_that_is_a_link(
    tmp_path: Path, models: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told where it lies, also where the output is named by a relative path."""
    monkeypatch.chdir(tmp_path)
    interrupt(models, Path("out"), 4)
    Path("out", RESUME_NAME).rename("elsewhere")
    Path("out", RESUME_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(oxmerge.OutputError, match="no file that an interrupted run") as caught:
        merge(models, Path("out"))
    assert caught.value.file == f"out/{RESUME_NAME}"


def _seed(models: Path) -> dict[str, Any]:
    return {"seed": 1}


def _shard_size(models: Path) -> dict[str, Any]:
    return {"shard_size": "300KB"}


def _input(models: Path) -> dict[str, Any]:
    path = models / "a" / "model.safetensors"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    return {}


DIFFERENT = {
    _seed: "expected seed 1, found seed 0",
    _shard_size: "expected shard size 300000, found shard size 200000",
    _input: "expected `a/model.safetensors` as now, found another size, time",
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_another_merge_is_refused_with_what_differs(
    tmp_path: Path, models: Path, at_once: None, change: Any
) -> None:
    output = tmp_path / "out"
    interrupt(models, output, 4)
    before = directory_bytes(output)
    options = change(models)
    with pytest.raises(oxmerge.OutputError) as caught:
        merge(models, output, **options)
    assert "another merge was interrupted here, and what it finished is kept" in str(caught.value)
    assert DIFFERENT[change] in str(caught.value)
    assert "start over with `--fresh`" in str(caught.value)
    assert directory_bytes(output) == before
    assert merge(models, output, fresh=True, **options) == 10
    assert not hidden(output)


#: What is replaced in `task.yml`, and what a run then says that it expected, and found.
OTHER_RECIPES = {
    "weight": (
        ("b\n  parameters:\n    weight: 0.5", "b\n  parameters:\n    weight: 0.25"),
        "expected weight of `{0}/b` 0.25, found weight of `{0}/b` 0.5",
    ),
    "method": (
        ("task_arithmetic", "ties"),
        "expected method ties, found method task_arithmetic",
    ),
    "model": (
        ("/a\n", "/base\n"),
        "expected models {0}/base, {0}/b, found models {0}/a, {0}/b, {0}/base",
    ),
    "base": (
        ("base_model: {0}/base", "base_model: {0}/a"),
        "expected models {0}/a, {0}/b, base model {0}/a, found models {0}/a, {0}/b, {0}/base",
    ),
    "dtype": (
        ("models:", "dtype: float32\nmodels:"),
        "expected dtype F32, found dtype BF16",
    ),
    "filter": (
        (
            "b\n  parameters:\n    weight: 0.5",
            "b\n  parameters:\n    weight: [{{filter: s, value: 1}}, {{value: 0.5}}]",
        ),
        "expected weight of `{0}/b` 1.0 or 0.5, found weight of `{0}/b` 0.5",
    ),
}


@pytest.mark.parametrize("change", OTHER_RECIPES)
def test_another_recipe_is_refused_with_what_differs(
    tmp_path: Path, models: Path, at_once: None, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("oxmerge.merging._check_side_files", _raise(OSError("an error")))
        with pytest.raises(OSError, match="an error"):
            oxmerge.merge(models / "task.yml", tmp_path / "out", **OPTIONS)
    replaced, told = OTHER_RECIPES[change]
    text = (models / "task.yml").read_text()
    old, new = (each.format(models) for each in replaced)
    assert old in text
    with pytest.raises(oxmerge.OutputError) as caught:
        oxmerge.merge(text.replace(old, new), tmp_path / "out", **OPTIONS)
    assert told.format(models) in str(caught.value)


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (2, "found normalize 2 or 3"),
        (10_000, "expected the parameters, slices, tensors and tokens"),
    ],
)
def test_parameters_in_a_journal_are_told_if_a_run_writes_as_many(
    models: Path, count: int, told: str
) -> None:
    (key,) = keys_of([oxmerge.plan(models / "task.yml")])
    story = json.loads(key)
    settings = [story["settings"][0] | {"normalize": at + 2} for at in range(count)]
    journal = json.dumps(story | {"settings": settings, "plan": "another"})
    with pytest.raises(oxmerge.OutputError) as caught:
        check_same(journal, key, models)
    assert told in str(caught.value)


def test_a_recipe_is_another_by_where_its_parameters_act(
    tmp_path: Path, models: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (models / "task.yml").read_text()
    filtered = "weight: [{{filter: {}, value: 1}}, {{value: 0.5}}]"
    one, other = (text.replace("weight: 0.5", filtered.format(each)) for each in ("t0", "t1"))
    with monkeypatch.context() as patch:
        patch.setattr("oxmerge.merging._check_side_files", _raise(OSError("an error")))
        with pytest.raises(OSError, match="an error"):
            oxmerge.merge(one, tmp_path / "out", **OPTIONS)
    with pytest.raises(oxmerge.OutputError) as caught:
        oxmerge.merge(other, tmp_path / "out", **OPTIONS)
    assert "expected the parameters, slices, tensors and tokens of this recipe" in str(caught.value)


def test_no_resume_leaves_nothing_and_goes_on_with_nothing(
    tmp_path: Path, models: Path, at_once: None
) -> None:
    output = tmp_path / "new" / "out"
    for options in ({"resume": False}, {"digests": False}):
        assert not interrupt(models, output, 4, **options)
        assert not (tmp_path / "new").exists()
    interrupt(models, output, 4)
    assert merge(models, output, resume=False) == 10
    assert not hidden(output)


def test_clean_removes_what_is_left(
    tmp_path: Path, models: Path, at_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    old, output = tmp_path / "old", tmp_path / "out"
    write_model(old, {"x": np.ones(9, np.float32)})
    before = directory_bytes(old)
    interrupt(models, old, 4, overwrite=True)
    interrupt(models, output, 4)
    assert {name: data for name, data in directory_bytes(old).items() if name in before} == before
    assert cli.main(["clean", str(old), str(output)]) == 0
    told = capsys.readouterr().err
    assert told.count("removed what an interrupted merge had left") == 2
    assert directory_bytes(old) == before
    assert not output.exists()
    assert not oxmerge.clean(old)
    assert directory_bytes(old) == before
    assert cli.main(["clean", str(output)]) == 1
    assert not output.exists()


def test_an_old_model_stays_until_the_new_one_is_complete(
    tmp_path: Path, models: Path, at_once: None
) -> None:
    merge(models, tmp_path / "whole")
    output = tmp_path / "out"
    write_model(output, {"x": np.ones(9, np.float32)})
    before = directory_bytes(output)
    interrupt(models, output, 4, overwrite=True)
    assert before.items() <= directory_bytes(output).items()
    with pytest.raises(FileExistsError):
        merge(models, output)
    assert merge(models, output, overwrite=True) == 10 - 3
    assert directory_bytes(output) == directory_bytes(tmp_path / "whole")


def test_what_a_rerun_cannot_mend_leaves_nothing(
    tmp_path: Path, models: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    for error in (oxmerge.InputChangedError("changed"), oxmerge.PlanError("integers differ")):
        interrupt(models, output, 4)
        with monkeypatch.context() as patch:
            patch.setattr("oxmerge.merging._check_side_files", _raise(error))
            with pytest.raises(type(error)):
                merge(models, output)
        assert not output.exists() or not list(output.iterdir())


def _raise(error: Exception) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_journal_that_is_damaged_is_refused(tmp_path: Path, models: Path, at_once: None) -> None:
    output = tmp_path / "out"
    for last in (3, 2, 2):  # each run adds a record at the least
        interrupt(models, output, last)
    journal = output / RESUME_NAME
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    journal.write_bytes(b"".join([*lines[:2], b"x" + lines[2][1:], *lines[3:]]))
    with pytest.raises(oxmerge.OutputError, match=r"(?s)is damaged: .*start over with `--fresh`"):
        merge(models, output)
    assert journal.exists()
    # A last record that is not whole is what a death leaves.
    journal.write_bytes(b"".join([*lines[:3], lines[3][:20]]))
    assert 5 < merge(models, output) < 10


@pytest.mark.parametrize(
    "record",
    [
        '{"tensors":[[10,"HASH",null]]}',
        '{"tensors":[[-1,"HASH",null]]}',
        '{"tensors":[[0,"short",null]]}',
        '{"numbers":[[99,[]]]}',
        '{"numbers":[[0,[-1]]]}',
        '{"other":[]}',
        "[" * 100_000,
        "null",
    ],
)
def test_a_hostile_record_is_refused(
    tmp_path: Path, models: Path, at_once: None, record: str
) -> None:
    from blake3 import blake3

    output = tmp_path / "out"
    interrupt(models, output, 3)
    text = record.replace("HASH", "0" * 64)
    check = blake3(text.encode()).hexdigest()[:16]
    with (output / RESUME_NAME).open("a") as file:
        file.write(f"{check} {text}\n")
    with pytest.raises(oxmerge.OutputError, match="is damaged"):
        merge(models, output)


def test_numbers_over_the_whole_model_are_kept(
    tmp_path: Path, models: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, options = models / "metagpt.yml", OPTIONS
    whole = oxmerge.merge(recipe, tmp_path / "whole", **options)
    monkeypatch.setattr("oxmerge.merging._check_side_files", _raise(OSError("an error")))
    with pytest.raises(OSError, match="an error"):
        oxmerge.merge(recipe, tmp_path / "out", **options)
    monkeypatch.undo()
    journal = (tmp_path / "out" / RESUME_NAME).read_text().splitlines(keepends=True)
    assert any('{"numbers":' in line for line in journal)
    # As if it had died between the sweep over the model and the merge.
    numbers = [line for line in journal if '{"tensors":' not in line]
    (tmp_path / "out" / RESUME_NAME).write_text("".join(numbers))
    report = oxmerge.merge(recipe, tmp_path / "out", **options)
    assert report.bytes_read < 0.7 * whole.bytes_read
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "whole")


def test_earlier_merges_are_kept_too(
    tmp_path: Path, models: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, options = models / "two.yml", OPTIONS
    oxmerge.merge(recipe, tmp_path / "whole", **options)
    output = tmp_path / "out"
    check, calls = oxmerge.merging._check_side_files, []

    def fail_in_the_second(plans: Any) -> None:
        calls.append(plans)
        if len(calls) == 2:
            raise OSError("an error")
        check(plans)

    monkeypatch.setattr("oxmerge.merging._check_side_files", fail_in_the_second)
    with pytest.raises(OSError, match="an error") as caught:
        oxmerge.merge(recipe, output, **options)
    (note,) = caught.value.__notes__
    assert f"`oxmerge clean {output}` removes it" in note
    report = oxmerge.merge(recipe, output, **options)
    assert report.bytes_read == 0
    assert directory_bytes(output) == directory_bytes(tmp_path / "whole")
    assert not hidden(output)


def test_a_sweep_goes_on(
    tmp_path: Path, models: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"models[a].parameters.weight": "0.25,0.5"}

    def sweep(name: str) -> Sequence[oxmerge.MergeReport]:
        return oxmerge.sweep(models / "task.yml", tmp_path / name / "w{0}", axes, **OPTIONS)

    sweep("whole")
    with monkeypatch.context() as patch:
        patch.setattr("oxmerge.merging._check_side_files", _raise(OSError("an error")))
        with pytest.raises(OSError, match="an error") as caught:
            sweep("out")
    assert all(f"{tmp_path}/out/w{each}" in caught.value.__notes__[0] for each in ("0.25", "0.5"))
    (tmp_path / "out" / "w0.5" / ".model-00001-of-00004.safetensors.oxmerge-partial").unlink()
    reports = sweep("out")
    assert 0 < reports[0].bytes_read < 3 * 2 * 260 * 260 * 3
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "whole")


# Faults of the system.


@pytest.fixture(scope="module")
def faulty(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `faults.py` takes it, with `faults.c` as a library."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "options.json").write_text(json.dumps(OPTIONS))
    for name in ("base", "a", "b"):
        shutil.copytree(models / name, folder / name)
    two = [folder / "a", folder / "b"]
    each = {"weight": 0.5}
    write_recipe(folder / "recipe.yml", "task_arithmetic", two, base=folder / "base", each=each)
    oxmerge.merge(folder / "recipe.yml", folder / "whole", **OPTIONS)
    library = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(folder / "faults.so")]
    subprocess.run(["cc", *library, str(HERE / "faults.c"), "-ldl"], check=True)
    return folder


def meet(faulty: Path, step: int, how: str, *faults: str) -> None:
    """Let each `step`-th call fail, one in each merge; see `faults.py`."""
    paths = os.pathsep.join([str(HERE), *sys.path])
    environment = {**os.environ, "LD_PRELOAD": str(faulty / "faults.so"), "PYTHONPATH": paths}
    command = [sys.executable, str(HERE / "faults.py"), str(faulty), str(step), how, *faults]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(faults)


def test_some_calls_of_the_system_fail(faulty: Path) -> None:
    meet(faulty, 13, "direct", "write:death", "flush:EIO", "read:EIO")


FAULTS = {
    "read": ("EIO", "EINTR", "short", "end", "change"),
    "write": ("EIO", "ENOSPC", "EINTR", "short", "death"),
    "flush": ("EIO", "EINTR", "death"),
}
#: The same of calls that are few, whatever the merge writes by.
FEW = {
    "open": ("EIO", "EMFILE", "death"),
    "rename": ("EACCES", "death"),
    "remove": ("death",),  # what cannot be removed at the end is left: it does no harm
    "make": ("EACCES",),
    "size": ("ENOSPC",),
}


def test_some_calls_fail_of_a_verb_that_reads(faulty: Path) -> None:
    meet(faulty, 23, "verify", "read:EIO", "read:short")


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_call_fails_of_verbs_that_read(faulty: Path, verb: str) -> None:
    step = 1 if "OXMERGE_EVERY_CALL" in os.environ else 11
    meet(faulty, step, verb, *(f"read:{fault}" for fault in FAULTS["read"]))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["direct", "buffered", "begun"])
@pytest.mark.parametrize("call", FAULTS)
def test_every_call_of_the_system_fails(faulty: Path, how: str, call: str) -> None:
    step = 1 if "OXMERGE_EVERY_CALL" in os.environ else 7  # all take ten minutes
    meet(faulty, step, how, *(f"{call}:{fault}" for fault in FAULTS[call]))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["direct", "begun"])
def test_opening_renaming_removing_and_making_files_fails(faulty: Path, how: str) -> None:
    step = 1 if "OXMERGE_EVERY_CALL" in os.environ else 9
    pairs = [f"{call}:{fault}" for call, faults in FEW.items() for fault in faults]
    meet(faulty, step, how, *pairs)


# Real ones.


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for models of 64 tensors, and what it makes."""
    folder = tmp_path_factory.mktemp("long")
    base = random_arrays({f"t{k:02}": (512, 515) for k in range(64)}, 0)
    write_model(folder / "base", base, "BF16")
    for seed, name in enumerate("ab", start=1):
        write_model(folder / name, tuned(base, seed), "BF16")
    two = [folder / "a", folder / "b"]
    each = {"weight": 0.5, "density": 0.5}
    recipe = write_recipe(folder / "r.yml", "dare_ties", two, base=folder / "base", each=each)
    oxmerge.merge(recipe, folder / "whole", shard_size="8MB", memory="4GiB")
    return folder


OFTEN = """
import functools, sys
from oxmerge import _core, cli
_core.execute = functools.partial(_core.execute, journal_every=0.01)
sys.exit(cli.main(sys.argv[1:]))
"""


def started(long: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    arguments = ["merge", str(long / "r.yml"), str(output), "--shard-size=8MB", "-q", *options]
    command = [sys.executable, "-c", OFTEN, *arguments]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None or path.exists()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("times", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_again_and_again(tmp_path: Path, long: Path, times: int) -> None:
    """At moments that differ, from the first file on; each run goes on where the last one was."""
    output, generator = tmp_path / "out", np.random.default_rng(times)
    whole, ends = directory_bytes(long / "whole"), 0
    for _ in range(times):
        process = started(long, output, "--threads=2")
        wait_for(output, process)
        time.sleep(generator.uniform(0, 0.3))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            assert directory_bytes(output) == whole
            shutil.rmtree(output)
            ends += 1
        elif not (output / "config.json").exists():
            assert not list(output.glob("*.index.json"))
        else:  # it had only to let go of the directory
            shutil.rmtree(output)
    process = started(long, output)
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert directory_bytes(output) == whole


#: How often a run is killed; fifty take minutes.
KILLS = int(os.environ.get("OXMERGE_KILLS", "5"))


@contextmanager
def streamed(long: Path, _: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield where models are, and an environment: on a web server."""
    with serve(long) as server:
        yield server.address, {}


@contextmanager
def downloaded(long: Path, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the same: on the Hub, whose cache gets them."""
    names = ("base", "a", "b")
    models = {f"org/{name}": Model.of_folder(str(long / name)) for name in names}
    with serving(HubServer(models)) as hub:
        cache = str(folder / "cache")
        yield "org", {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "0"}


def made(folder: Path) -> dict[str, bytes]:
    """Return the weights, and what says where they are."""
    suffixes = (".safetensors", ".index.json")
    return {k: v for k, v in directory_bytes(folder).items() if k.endswith(suffixes)}


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [streamed, downloaded])
def test_killed_while_inputs_come(tmp_path: Path, long: Path, elsewhere: Any) -> None:
    with elsewhere(long, tmp_path) as (root, environment):
        recipe = tmp_path / "r.yml"
        recipe.write_text((long / "r.yml").read_text().replace(str(long), root))
        arguments = ["merge", str(recipe), str(tmp_path / "out"), "--shard-size=8MB", "-q"]
        options = ["--threads=2", "--spool=30MB"]
        survive([*arguments, *options], tmp_path / "out", made(long / "whole"), environment)


@pytest.mark.slow
def test_killed_on_a_small_disk_that_others_fill(tmp_path: Path, long: Path) -> None:
    with small_disk(tmp_path / "disk", 48 << 20) as disk:
        output = disk / "out"
        arguments = ["merge", str(long / "r.yml"), str(output), "--shard-size=8MB", "-q"]
        survive([*arguments, "--threads=2"], output, made(long / "whole"), {}, disk / "others")


def survive(
    arguments: Sequence[str],
    output: Path,
    expected: dict[str, bytes],
    environment: dict[str, str],
    others: Path | None = None,
) -> None:
    """Kill a merge at random, each time that it goes on; at last its output has to be as expected.

    With `others` half of the runs find the disk full instead, by a file of that name.
    """
    command = [sys.executable, "-c", OFTEN, *arguments]
    generator = np.random.default_rng(KILLS)

    def start() -> subprocess.Popen[str]:
        variables = {**os.environ, **environment}
        return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, env=variables)

    def begin_again() -> None:
        """Remove the output, and the inputs that were downloaded: the next run takes as long."""
        shutil.rmtree(output)
        if "HF_HUB_CACHE" in environment:
            shutil.rmtree(environment["HF_HUB_CACHE"])

    begun = time.monotonic()
    _, told = start().communicate()
    seconds = time.monotonic() - begun
    assert made(output) == expected, told
    begin_again()
    ended = 0
    for at in range(KILLS):
        process, begun = start(), time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0.2 * seconds, seconds))
            seconds = time.monotonic() - begun  # the machine has less to do by now
        if others is not None and at % 2:
            fill(others)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        process.kill()
        _, told = process.communicate()
        if others is not None:
            others.unlink(missing_ok=True)
        assert process.returncode in (0, -signal.SIGKILL) or "space" in told
        if (output / "config.json").exists():
            assert made(output) == expected
            begin_again()
            ended += 1
        elif output.exists():
            assert not list(output.glob("*.index.json"))
    assert ended < KILLS
    process = start()
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert made(output) == expected
    assert not hidden(output)


def fill(path: Path) -> None:
    """Write a file that takes all of the disk that is left."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def test_ctrl_c_tells_how_to_go_on(tmp_path: Path, long: Path) -> None:
    output = tmp_path / "out"
    process = started(long, output, "--threads=1")
    wait_for(output / RESUME_NAME, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 130
    kept = "what is finished is kept: the same command goes on from there"
    assert told == f"error: interrupted\nhint: {kept}; `oxmerge clean {output}` removes it\n"
    assert all(path.name.endswith("oxmerge-partial") for path in output.iterdir())
    _, told = started(long, output).communicate()
    assert told == ""
    assert directory_bytes(output) == directory_bytes(long / "whole")
