"""The Python interface and the program, as others use them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import oxmerge
import pytest
from oxmerge import errors
from oxmerge.problems import Problem
from writers import (
    directory_bytes,
    random_arrays,
    to_bf16,
    write_file,
    write_model,
    write_recipe,
    write_sparse,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def python(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the interpreter."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def program(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m oxmerge`."""
    return python("-m", "oxmerge", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that takes one thread some tenths of a second."""
    folder = tmp_path_factory.mktemp("long")
    for name in ("base", "a"):
        write_sparse(folder / name / "model.safetensors", {"x": (32 << 10, 4096)})
    each = {"weight": 0.5, "density": 0.5}
    return write_recipe(folder / "r.yml", "ties", [folder / "a"], base=folder / "base", each=each)


# An instruction set that this machine lacks.

NO_LEVEL = "error: the SIMD level `foo` is not available: expected one that this CPU has ("


@pytest.mark.parametrize(
    "line", ["merge linear.yml {out}", "bench --quick --only memory", "bench {out} --only merge"]
)
def test_a_wrong_instruction_set_is_one_plain_line(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setenv("OXMERGE_SIMD", "foo")
    done = program(*line.format(out=tmp_path).split(), cwd=twins)
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith(NO_LEVEL)
    assert hint == "hint: unset OXMERGE_SIMD to use the best one"


def test_what_needs_no_instruction_set_works_with_a_wrong_one(
    twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OXMERGE_SIMD", "foo")
    for line in ("--version", "methods", "plan linear.yml", "inspect a", "bench --help"):
        done = program(*line.split(), cwd=twins)
        assert (done.returncode, done.stderr) == (0, ""), line
    done = python("-c", "import oxmerge; print(oxmerge.__version__)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


# Threads, forks, signals.


def test_other_threads_run_while_it_merges(tmp_path: Path, long: Path) -> None:
    counted, done = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not done.wait(0.001):
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counted
    oxmerge.merge(long, tmp_path / "out", threads=1, memory="4GiB")
    during = counted - before
    done.set()
    thread.join()
    # Each round needs the GIL. Had the merge held it, there would be none but at its ends.
    assert during > 20


def test_merges_in_several_threads(tmp_path: Path, family: Path) -> None:
    recipes = []
    for index in range(6):
        each = {"weight": 0.3, "density": 0.1 + 0.1 * index}
        models = [family / "a", family / "b"]
        path = tmp_path / f"{index}.yml"
        recipes.append(write_recipe(path, "ties", models, base=family / "base", each=each))

    def merge(job: tuple[str, Path]) -> dict[str, bytes]:
        name, recipe = job
        oxmerge.merge(recipe, tmp_path / name, memory="4GiB")
        return directory_bytes(tmp_path / name)

    alone = [merge((f"alone{recipe.stem}", recipe)) for recipe in recipes]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(merge, [(f"both{recipe.stem}", recipe) for recipe in recipes]))
    assert together == alone
    assert len({files["model.safetensors"] for files in alone}) == 6


def test_one_failure_beside_others(tmp_path: Path, long: Path, twins: Path) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(
            oxmerge.merge, long, tmp_path / "a", threads=1, memory="4GiB", progress=fail
        )
        report = oxmerge.merge(twins / "linear.yml", tmp_path / "b", memory="4GiB")
        assert isinstance(failing.exception(), ZeroDivisionError)
    assert report.tensors == 2
    assert not (tmp_path / "a").exists()


FORK = """
import os, sys
import oxmerge
recipe, out = sys.argv[1:]
oxmerge.merge(recipe, out + "/parent")
child = os.fork()
if child == 0:
    oxmerge.merge(recipe, out + "/child")
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
oxmerge.merge(recipe, out + "/again")
"""


def test_a_fork_can_merge_again(tmp_path: Path, twins: Path) -> None:
    done = python("-W", "error", "-c", FORK, twins / "linear.yml", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    results = [directory_bytes(tmp_path / name) for name in ("parent", "child", "again")]
    assert results[0] == results[1] == results[2]


# Progress.


def test_progress_goes_up_to_the_end(tmp_path: Path, long: Path) -> None:
    seen: list[oxmerge.merging.Snapshot] = []
    report = oxmerge.merge(long, tmp_path / "out", threads=1, memory="4GiB", progress=seen.append)
    assert seen
    assert {snapshot.bytes_total for snapshot in seen} == {report.bytes_written}
    assert {snapshot.tensor for snapshot in seen} == {"x"}
    read = [snapshot.bytes_read for snapshot in seen]
    assert read == sorted(read)
    assert 0 < read[-1] <= report.bytes_read
    # The system counts pages a thread, and adds them up now and then.
    assert seen[-1].peak_memory <= report.peak_memory + (1 << 20)


def test_progress_that_cannot_be_called_is_refused_first(tmp_path: Path, twins: Path) -> None:
    with pytest.raises(TypeError, match=r"^progress must be a function of a snapshot, not 3$"):
        oxmerge.merge(twins, tmp_path / "out", progress=3)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_exception_of_progress_ends_the_merge(tmp_path: Path, long: Path) -> None:
    class Enough(Exception):  # noqa: N818
        pass

    calls = []

    def stop(snapshot: object) -> None:
        calls.append(snapshot)
        raise Enough("of it")

    with pytest.raises(Enough, match="of it"):
        oxmerge.merge(long, tmp_path / "new" / "out", threads=1, memory="4GiB", progress=stop)
    assert len(calls) == 1
    assert not (tmp_path / "new").exists()


# Arrays.


def test_arrays_outlive_the_checkpoint(tmp_path: Path) -> None:
    arrays = random_arrays({"x": (100, 33), "empty": (0, 3)}, 0)
    path = write_file(tmp_path / "m.safetensors", {**arrays, "n": np.arange(5)})
    with oxmerge.open(path) as checkpoint:
        views = dict(checkpoint)
        assert list(checkpoint) == ["x", "empty", "n"]
        assert len(checkpoint) == 3
        assert "y" not in checkpoint
    path.unlink()
    del checkpoint
    np.testing.assert_array_equal(views["x"], arrays["x"])
    np.testing.assert_array_equal(views["n"], np.arange(5))
    assert views["empty"].shape == (0, 3)
    with pytest.raises(ValueError, match="read-only"):
        views["x"][0] = 1


def test_looking_for_a_name_maps_no_file(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.safetensors", random_arrays({"x": (4,)}, 0))
    with oxmerge.open(path) as checkpoint:
        path.unlink()
        assert "x" in checkpoint
        assert "y" not in checkpoint


def test_a_file_that_was_replaced_is_not_mapped(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.safetensors", random_arrays({"x": (4,)}, 0))
    mapped, late, cut = (oxmerge.open(path) for _ in range(3))
    before = mapped["x"].copy()
    other = write_file(tmp_path / "other", {"longer.name": np.zeros(9, np.float32)})
    other.replace(path)
    with pytest.raises(oxmerge.InputChangedError, match="changed after it was first read") as now:
        late["x"]
    assert now.value.file == str(path)
    path.write_bytes(b"")
    with pytest.raises(oxmerge.InputChangedError, match="found 0 bytes"):
        cut["x"]
    assert np.array_equal(mapped["x"], before)


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.safetensors", random_arrays({"x": (4,)}, 0))
    checkpoint = oxmerge.open(path)
    assert repr(checkpoint) == f"<OpenCheckpoint {str(path)!r}: 1 tensors>"
    assert {checkpoint, checkpoint} == {checkpoint}
    assert checkpoint != oxmerge.open(path)
    checkpoint.close()
    assert repr(checkpoint) == f"<OpenCheckpoint {str(path)!r}: 1 tensors, closed>"


def test_a_closed_checkpoint_gives_no_more_arrays(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.safetensors", random_arrays({"x": (4,)}, 0))
    checkpoint = oxmerge.open(path)
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint["x"]


def test_bfloat16_is_numbers(tmp_path: Path) -> None:
    arrays = random_arrays({"x": (7, 3)}, 0)
    path = write_file(tmp_path / "m.safetensors", arrays, "BF16")
    with oxmerge.open(path) as checkpoint:
        array = checkpoint["x"]
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array.view(np.uint16), to_bf16(arrays["x"]))


# Imports and exceptions.


def test_importing_loads_nothing_heavy() -> None:
    heavy = ("numpy", "rich", "yaml", "torch", "safetensors", "huggingface_hub", "tokenizers")
    code = f"import oxmerge, sys; print([m for m in {heavy} if m in sys.modules])"
    done = python("-W", "error", "-c", code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(("profile", "warns"), [("debug", True), ("release", False)])
def test_importing_an_unoptimised_build_warns(profile: str, *, warns: bool) -> None:
    code = (
        "import sys, types\n"
        "core = sys.modules['oxmerge._core'] = types.ModuleType('oxmerge._core')\n"
        f"core.build_info = lambda: {{'version': '0', 'profile': '{profile}'}}\n"
        "import oxmerge\n"
    )
    done = python("-c", code)
    assert done.returncode == 0
    warning = "RuntimeWarning: oxmerge was built without optimisation and is very slow"
    assert (warning in done.stderr) is warns


def test_public_names_are_there() -> None:
    for name in oxmerge.__all__:
        assert getattr(oxmerge, name) is not None
    assert dir(oxmerge) == oxmerge.__all__
    with pytest.raises(AttributeError, match="no attribute 'mrege'; did you mean `merge`"):
        oxmerge.mrege  # noqa: B018


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "OxmergeError"])
def test_exceptions_survive_pickling(name: str) -> None:
    error = getattr(errors, name)(
        "it broke", file="f", tensor="t", expected="1", found="2", advice="mend it"
    )
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    parts = ("message", "file", "tensor", "expected", "found", "advice")
    assert [getattr(copy, p) for p in parts] == ["it broke", "f", "t", "1", "2", "mend it"]


@pytest.mark.parametrize("name", ["RecipeError", "PlanError"])
def test_several_problems_survive_pickling(name: str) -> None:
    problems = [Problem("plan", "one", file="f"), Problem("plan", "two", tensor="t")]
    error = getattr(errors, name)("cannot merge", problems=problems)
    copy = pickle.loads(pickle.dumps(error))
    assert copy.problems == error.problems
    assert str(copy) == str(error)
    assert "2 problems" in str(copy)


def test_an_exception_from_the_engine_survives_pickling(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"1234567")
    with pytest.raises(errors.CheckpointError) as caught:
        oxmerge.open(tmp_path / "m.safetensors")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.file) == (str(caught.value), str(tmp_path / "m.safetensors"))


# The program.


def test_exit_codes(tmp_path: Path, twins: Path) -> None:
    (tmp_path / "typo.yml").write_text("merge_metod: linear\n")
    assert program("merge", twins / "linear.yml", tmp_path / "out", "--quiet").returncode == 0
    again = program("merge", twins / "linear.yml", tmp_path / "out")
    assert again.returncode == 1
    assert "not empty" in again.stderr
    wrong = program("merge", tmp_path / "typo.yml", tmp_path / "other")
    assert wrong.returncode == 2
    assert "did you mean `merge_method`?" in wrong.stderr
    assert program("merge").returncode == 2
    assert program("merge", twins / "linear.yml", tmp_path / "x", "--resume").returncode == 2
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "x").exists()


RECIPE = "{models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: %s}}], %s}"

#: A recipe, and what is said of it.
WRONG_RECIPES = {
    "method typo": (RECIPE % (1, "merge_method: linaer"), "did you mean `linear`?"),
    "unknown parameter": (
        RECIPE % (1, "merge_method: linear, parameters: {wieght: 1}"),
        "did you mean `weight`?",
    ),
    "zero weights": (RECIPE % (-1, "merge_method: linear"), "the weights sum to zero"),
    "no base": (RECIPE % (1, "merge_method: ties"), "needs a `base_model`"),
    "no such model": ("{models: [{model: c}], merge_method: linear}", "no model `c`"),
}


@pytest.mark.parametrize("name", WRONG_RECIPES)
def test_a_wrong_recipe_is_no_failure_of_the_merge(tmp_path: Path, twins: Path, name: str) -> None:
    text, message = WRONG_RECIPES[name]
    (tmp_path / "r.yml").write_text(text)
    done = program("merge", tmp_path / "r.yml", tmp_path / "out", cwd=twins)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("line", ["merge {} out", "plan {}", "sweep {} out{{n}} --set seed=1"])
def test_a_recipe_that_is_not_there_is_a_usage_error(tmp_path: Path, line: str) -> None:
    for recipe in ("none.yml", "."):
        done = program(*line.format(recipe).split(), cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: cannot read the recipe `{recipe}`: ")


def test_a_name_on_the_hub_is_told_for_what_it_is(tmp_path: Path) -> None:
    write_recipe(tmp_path / "r.yml", "passthrough", ["gpt2"])
    for line in ("inspect gpt2", "plan r.yml"):
        done = program(*line.split(), cwd=tmp_path)
        assert done.returncode == 2
        assert "there is no `" in done.stderr
        assert "has no `gpt2`, and the Hub may not be asked" in done.stderr
        assert "hint: unset HF_HUB_OFFLINE" in done.stderr


def test_a_recipe_is_a_file_whatever_its_name(tmp_path: Path, twins: Path) -> None:
    (tmp_path / "a: b.yml").write_text((twins / "linear.yml").read_text())
    assert program("plan", tmp_path / "a: b.yml", cwd=twins).returncode == 0
    missing = program("plan", "a: c.yml", cwd=twins)
    assert (missing.returncode, "no such file" in missing.stderr) == (2, True)


JSON = {
    "merge": (["merge", "linear.yml", "OUT"], {"directory", "peak_memory", "seconds", "simd"}),
    "plan": (["plan", "linear.yml"], {"method", "tensors", "memory", "disk"}),
    "inspect": (["inspect", "a"], {"parameters", "tensors", "dtypes"}),
    "demo": (["demo", "--directory", "OUT"], {"directory", "peak_memory", "tensors"}),
}


@pytest.mark.parametrize("verb", JSON)
def test_json_parses(tmp_path: Path, twins: Path, verb: str) -> None:
    arguments, keys = JSON[verb]
    given = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    done = program(*given, "--json", cwd=twins)
    assert done.returncode == 0, done.stderr
    assert keys <= json.loads(done.stdout).keys()


def test_json_of_the_methods_parses() -> None:
    methods = json.loads(program("methods", "--json").stdout)["methods"]
    assert {"linear", "slerp", "ties"} <= {method["name"] for method in methods}
    one = json.loads(program("methods", "ties", "--json").stdout)
    assert one == next(method for method in methods if method["name"] == "ties")


@pytest.mark.parametrize("verb", ["merge", "plan", "inspect"])
def test_json_of_failures_parses(tmp_path: Path, verb: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    write_recipe(tmp_path / "r.yml", "passthrough", [tmp_path])
    target = tmp_path if verb == "inspect" else tmp_path / "r.yml"
    more = [tmp_path / "out"] if verb == "merge" else []
    done = program(verb, target, *more, "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == ("CheckpointError" if verb == "inspect" else "PlanError")
    assert "too short to be a safetensors file" in done.stdout


def test_the_demo(tmp_path: Path) -> None:
    done = program("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    merged = tmp_path / "oxmerge-demo" / "merged"
    lines = done.stderr.partition("\n\nwhat to try next:\n")[0].splitlines()
    assert lines[-2].startswith("wrote `oxmerge-demo/merged`: 75 tensors in 1 file, 53.5 MB in ")
    assert "peak memory" in lines[-1]
    assert lines[-1].endswith(f"threads, {oxmerge.build_info()['simd']}")
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    with oxmerge.open(merged) as checkpoint:
        assert len(checkpoint) == 75
        assert all(np.isfinite(a.astype(np.float32)).all() for a in checkpoint.values())
    report = json.loads((merged / "oxmerge_report.json").read_text())
    assert report["peak_memory"] <= report["memory"]


def test_the_report_beside_the_weights(tmp_path: Path, twins: Path) -> None:
    report = oxmerge.merge(twins / "linear.yml", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "oxmerge_report.json").read_text())
    until_commit = written.pop("seconds_before_commit")
    assert 0 < report.seconds < until_commit < report.total_seconds
    assert written.pop("left_out") == []
    told = report.as_dict()
    assert told.pop("total_seconds") == report.total_seconds
    assert written == told
    assert report.read_gb_per_second == report.bytes_read / report.seconds / 1e9
    assert report.written_gb_per_second == report.bytes_written / report.seconds / 1e9
    assert report.peak_memory > 0


def test_time_passes_between_progress_calls(tmp_path: Path, long: Path) -> None:
    times: list[float] = []
    started = time.monotonic()
    oxmerge.merge(
        long,
        tmp_path / "out",
        threads=1,
        memory="4GiB",
        progress=lambda _: times.append(time.monotonic()),
    )
    # However busy the machine is: at most one in a tenth of a second, and one at the end.
    assert len(times) <= (time.monotonic() - started) / 0.1 + 1
    assert os.path.isdir(tmp_path / "out")


def test_a_name_that_is_not_there_names_near_ones(family: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(family / name), "parameters": {"weight": 1}} for name in "ab"],
    }
    model = oxmerge.lazy(oxmerge.Recipe.from_mapping(recipe))
    told = r"there is no tensor `embed`; did you mean `embed.weight`\?"
    with oxmerge.open(family / "base") as checkpoint:
        for mapping in (checkpoint, model):
            with pytest.raises(KeyError, match=told):
                mapping["embed"]
            with pytest.raises(
                KeyError, match=r"no tensor `layers.9.weight`; did you mean `layers"
            ):
                mapping["layers.9.weight"]
            with pytest.raises(KeyError, match=r"^'there is no tensor `zzz`'$"):
                mapping["zzz"]
            assert mapping.get("embed") is None
            assert mapping.get("embed", 7) == 7
            assert mapping.get("scale") is not None
            assert "embed" not in mapping
    for look in (model.shape_of, model.dtype_of):
        with pytest.raises(KeyError, match=told):
            look("embed")


def test_a_miss_costs_nothing_unless_it_is_told(tmp_path: Path) -> None:
    names = [f"model.layers.{at}.mlp.experts.{at}.up_proj.weight" for at in range(20_000)]
    write_model(tmp_path / "a", {name: np.zeros(1, np.float32) for name in names})
    with oxmerge.open(tmp_path / "a") as checkpoint:
        started = time.process_time()
        assert all(checkpoint.get(f"{name}!") is None for name in names)
        assert time.process_time() - started < 1
        with pytest.raises(KeyError, match=r"did you mean `model.layers.7.mlp.experts.7.up_"):
            checkpoint["model.layers.7.mlp.experts.7.up_prj.weight"]
        assert time.process_time() - started < 5
