"""Merges whose output is in an object store: a real S3 server, on loopback."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
import s3_server
from oxmerge import in_store
from oxmerge.errors import (
    InputChangedError,
    OutputError,
    OxmergeError,
    RemoteError,
    UnsupportedError,
)
from oxmerge.models import stores
from oxmerge.output.claims import BusyError, claimed
from oxmerge.output.objects import Objects
from writers import directory_bytes, random_arrays, tuned, write_model, write_recipe, write_sparse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHAPES: dict[str, tuple[int, ...]] = {f"layers.{i}.weight": (64, 100 + i) for i in range(20)}
SHAPES |= {"layers.3.bias": (70000,), "layers.9.rows": (5, 7)}
SHARD, FILES = 60_000, 8

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 0.5}},
    "model_stock": {"base": "base"},
    "metagpt": {"base": "base"},  # with numbers over the whole model
}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a real S3 server, with a bucket."""
    with s3_server.serve() as address:
        yield address


numbers = itertools.count()


@pytest.fixture
def output(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address of which nothing is there, in the environment of users of the store."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name, value in {**s3_server.environment(s3), "TMPDIR": str(scratch)}.items():
        monkeypatch.setenv(name, value)
    stores._open.cache_clear()
    return f"s3://bucket/some merges/{next(numbers)}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two fine-tunes of it, and a recipe for each method."""
    folder = tmp_path_factory.mktemp("models")
    base = random_arrays(SHAPES, seed=0)
    for seed, name in enumerate(("base", "a", "b")):
        write_model(folder / name, tuned(base, seed) if seed else base, "BF16")
    for method, about in METHODS.items():
        write_recipe(folder / f"{method}.yml", method, ["a", "b"], **about)
    return folder


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What a merge into a directory makes by each method."""
    folder = tmp_path_factory.mktemp("whole")
    for method in METHODS:
        oxmerge.merge(models / f"{method}.yml", folder / method, shard_size=SHARD, seed=5)
    return {method: directory_bytes(folder / method) for method in METHODS}


def make(recipe: Path, output: str, part: int, parts: int, **options: Any) -> oxmerge.MergeReport:
    usual: dict[str, Any] = {"shard_size": SHARD, "seed": 5, "threads": 2, "wait": 60}
    return oxmerge.merge(recipe, output, part=(part, parts), **usual | options)


def fetched(output: str, folder: Path) -> dict[str, bytes]:
    """Return what is in the store, but for the report."""
    for name, file in Objects.at(output).files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read(0, file.size))
    return directory_bytes(folder)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("linear", 2),
        ("metagpt", 3),
        pytest.param("metagpt", 1, marks=pytest.mark.slow),
        pytest.param("metagpt", 2, marks=pytest.mark.slow),
        pytest.param("linear", 3, marks=pytest.mark.slow),
        pytest.param("model_stock", 1, marks=pytest.mark.slow),
        pytest.param("model_stock", 2, marks=pytest.mark.slow),
        pytest.param("model_stock", 3, marks=pytest.mark.slow),
    ],
)
def test_bytes_are_those_of_a_directory(
    tmp_path: Path, models: Path, whole: Any, output: str, method: str, parts: int
) -> None:
    recipe = models / f"{method}.yml"
    with ThreadPoolExecutor(parts) as pool:
        runs = [pool.submit(make, recipe, output, at + 1, parts) for at in range(parts)]
        assert [run.result(timeout=600).directory for run in runs] == [output] * parts
    there = Objects.at(output).files()
    assert "config.json" not in there
    assert len([name for name in there if name.endswith(".safetensors")]) == FILES
    report = oxmerge.finish(output)
    assert (report.directory, report.files) == (output, FILES)
    assert fetched(output, tmp_path / "out") == whole[method]
    assert not list((tmp_path / "scratch").iterdir())


def test_models_in_the_store_of_google(
    tmp_path: Path, models: Path, whole: Any, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed from there, and made there in parts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with s3_server.serve(google=True) as address:
        for name, value in s3_server.google_environment(address, tmp_path / "account.json").items():
            monkeypatch.setenv(name, value)
        for name in ("base", "a", "b"):
            objects = Objects.at(f"gs://bucket/models/{name}")
            for path in (models / name).iterdir():
                objects.upload(path.name, path, threading.Event())
        names = [f"gs://bucket/models/{name}" for name in ("a", "b", "base")]
        recipe = write_recipe(tmp_path / "r.yml", "metagpt", names[:2], base=names[2])
        made = "gs://bucket/merged"
        for part in (1, 2):
            make(recipe, made, part, 2, finish=True)
        found = fetched(made, tmp_path / "out")
    told = ("README.md", "oxmerge_recipe.yml", "oxmerge.json")
    assert found.keys() == whole["metagpt"].keys()
    assert all(data == whole["metagpt"][name] for name, data in found.items() if name not in told)


def test_servers_share_nothing(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no test finds what another has left: those of a process share what they keep."""
    Objects.at(output).put("left", b"here")
    with s3_server.serve() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        stores._open.cache_clear()
        assert not Objects.at(output).files()
    stores._open.cache_clear()


def test_one_run_makes_all(tmp_path: Path, models: Path, whole: Any, output: str) -> None:
    oxmerge.merge(models / "metagpt.yml", output, shard_size=SHARD, seed=5)
    assert fetched(output, tmp_path / "out") == whole["metagpt"]


def test_the_last_part_completes_the_output(
    tmp_path: Path, models: Path, whole: Any, output: str
) -> None:
    """Parts one after the other; their number may be another later."""
    recipe = models / "linear.yml"
    report = make(recipe, output, 1, 2)
    assert re.search(r"but not yet \d of 8 weight files", report.notes[-1])
    with pytest.raises(OutputError, match="not all parts") as caught:
        oxmerge.finish(output)
    assert re.fullmatch(r"not yet \d of them", str(caught.value.found))
    for part in (1, 2, 3):
        report = make(recipe, output, part, 3, finish=True)
    assert report.files == FILES
    assert fetched(output, tmp_path / "out") == whole["linear"]
    # Begun again, by whoever places parts, neither has anything left to do.
    for again in (make(recipe, output, 1, 2), oxmerge.finish(output)):
        assert (again.files, again.notes) == (
            0,
            (f"`{output}` is complete: nothing is left to do",),
        )
    with pytest.raises(OutputError, match="something lies where"):
        make(recipe, output, 1, 3, seed=6)
    with pytest.raises(OutputError, match="something lies where"):
        oxmerge.merge(recipe, output, shard_size=SHARD, seed=5)


def test_two_runs_complete_the_output(
    tmp_path: Path, models: Path, whole: Any, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later one finds that it is complete, however far it had come."""
    recipe = models / "linear.yml"
    make(recipe, output, 1, 2)
    complete = in_store.complete_in_store

    def after_another(*arguments: Any) -> Any:
        complete(*arguments)
        return complete(*arguments)

    with monkeypatch.context() as context:
        context.setattr(in_store, "complete_in_store", after_another)
        report = make(recipe, output, 2, 2, finish=True)
    assert "another run completes the output" in report.notes[-1]
    # One that was killed then has left records.
    Objects.at(output).put(".parts.oxmerge-partial/1of2.key", b"{}")
    Objects.at(output).put(".parts.oxmerge-partial/plan", b"{}")
    assert make(recipe, output, 2, 2).files == 0
    assert fetched(output, tmp_path / "out") == whole["linear"]


@pytest.mark.parametrize("begins", ["join", "_fetch_numbers"])
def test_an_output_is_completed_while_a_part_begins(
    models: Path, output: str, monkeypatch: pytest.MonkeyPatch, begins: str
) -> None:
    """Begun again by whoever places parts, it finds nothing left to do."""
    for part in (1, 2):
        make(models / "metagpt.yml", output, part, 2)
    begin = getattr(in_store._Output, begins)

    def after_another(*arguments: Any) -> Any:
        monkeypatch.setattr(in_store._Output, begins, begin)
        assert oxmerge.finish(output).files == FILES
        return begin(*arguments)

    monkeypatch.setattr(in_store._Output, begins, after_another)
    assert make(models / "metagpt.yml", output, 2, 2).files == 0


def test_sweeps_are_waited_for_so_long(
    tmp_path: Path, models: Path, whole: Any, output: str
) -> None:
    recipe = models / "metagpt.yml"
    with pytest.raises(OutputError, match="other parts lack theirs") as caught:
        make(recipe, output, 1, 2, wait=0)
    assert re.fullmatch(r"none over \d of 8 weight files", str(caught.value.found))
    make(recipe, output, 2, 2, wait=0)
    shutil.rmtree(tmp_path / "scratch")  # it goes on elsewhere
    (tmp_path / "scratch").mkdir()
    make(recipe, output, 1, 2, wait=0, finish=True)
    assert fetched(output, tmp_path / "out") == whole["metagpt"]


def test_a_part_sweeps_what_no_run_has_begun(
    tmp_path: Path, models: Path, whole: Any, output: str
) -> None:
    recipe = models / "metagpt.yml"
    with pytest.raises(OutputError, match="other parts lack theirs"):
        make(recipe, output, 2, 3, wait=0)
    report = make(recipe, output, 1, 3)
    assert re.search(r"part 1 of 3 is made, but not yet \d of 8", report.notes[-1])
    for part in (3, 2):
        make(recipe, output, part, 3, wait=0, finish=True)
    assert fetched(output, tmp_path / "out") == whole["metagpt"]


def test_what_another_run_has_begun_is_waited_for(
    models: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, told = models / "metagpt.yml", []

    def sweep_none(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(in_store, "make", sweep_none)
        with pytest.raises(KeyboardInterrupt):
            make(recipe, output, 2, 2)
    with pytest.raises(OutputError, match="other parts lack theirs"):
        make(recipe, output, 1, 2, wait=0.1, progress=lambda shown: told.append(shown.tensor))
    assert re.fullmatch(r"waiting for the sweeps of \d weight files", told[-1])


def test_parts_of_another_plan(models: Path, output: str) -> None:
    make(models / "linear.yml", output, 1, 2)
    for recipe, options, what in (
        ("linear", {"seed": 6}, "another seed"),
        ("model_stock", {}, "another text of the recipe"),
    ):
        with pytest.raises(OutputError, match=what):
            make(models / f"{recipe}.yml", output, 2, 2, **options)
    # Who was refused has left nothing that refuses others.
    make(models / "linear.yml", output, 2, 2, finish=True)


@pytest.mark.parametrize("is_complete", [False, True])
def test_another_merge_begins_at_the_same_time(
    tmp_path: Path,
    models: Path,
    whole: Any,
    output: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_complete: bool,
) -> None:
    """Who has seen nothing there, and writes down later what it is, gives way."""
    put, first = Objects.put, itertools.count()
    parts = 1 if is_complete else 2

    def after_another(self: Objects, name: str, data: bytes) -> None:
        if name.endswith(".key") and next(first) == 0:
            make(models / "linear.yml", output, 1, parts, finish=True)
        put(self, name, data)

    with monkeypatch.context() as context:
        context.setattr(Objects, "put", after_another)
        said = "something lies where" if is_complete else "another text of the recipe"
        with pytest.raises(OutputError, match=said):
            make(models / "model_stock.yml", output, 1, parts)
    if not is_complete:
        with pytest.raises(OutputError, match="another text of the recipe"):
            make(models / "model_stock.yml", output, 2, 2)
        make(models / "linear.yml", output, 2, 2, finish=True)
    assert fetched(output, tmp_path / "out") == whole["linear"]


def test_a_part_that_is_made_twice_leaves_nothing_in_a_model(
    tmp_path: Path, models: Path, whole: Any, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = models / "linear.yml"
    make(recipe, output, 1, 2)
    upload, first = Objects.upload, itertools.count()

    def after_completion(self: Objects, name: str, *arguments: Any) -> None:
        if name.endswith(".safetensors") and next(first) == 0:
            make(recipe, output, 2, 2, finish=True)
        upload(self, name, *arguments)

    with monkeypatch.context() as context:
        context.setattr(Objects, "upload", after_completion)
        report = make(recipe, output, 1, 2, fresh=True)
    assert "another run has completed" in report.notes[-1]
    assert fetched(output, tmp_path / "out") == whole["linear"]


def test_an_output_has_more_objects_than_a_model(
    models: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In work each weight file is several."""
    defaults = stores.listed.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "most", FILES)
    make(models / "linear.yml", output, 1, 1)
    assert len(Objects.at(output).files()) > FILES
    with pytest.raises(RemoteError, match="too many files for a model"):
        stores.find_model(output)


def test_clean_removes_nothing_while_a_run_is_here(
    models: Path, output: str, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="other parts lack") as caught:
        make(models / "metagpt.yml", output, 1, 2, wait=0)
    (folder,) = (tmp_path / "scratch").iterdir()
    assert str(folder) in caught.value.__notes__[-1]
    before = Objects.at(output).files()
    with claimed(folder), pytest.raises(BusyError, match="another run is writing here"):
        oxmerge.clean(output)
    with claimed(folder), pytest.raises(BusyError, match="makes the same") as busy:
        make(models / "metagpt.yml", output, 1, 2, wait=0)
    assert busy.value.file == output
    assert Objects.at(output).files() == before != {}
    assert oxmerge.clean(output)
    assert not Objects.at(output).files()


def test_clean_with_a_damaged_record(models: Path, output: str) -> None:
    """It does not say whether a model is complete: so what may be one stays."""
    objects = Objects.at(output)
    objects.put("model.safetensors", b"")
    story = {"files": ["model.safetensors"], "last": ["config.json"]}
    objects.put(".parts.oxmerge-partial/1of1.key", json.dumps(story).encode())
    assert oxmerge.clean(output)
    assert list(objects.files()) == ["model.safetensors"]


def test_what_was_uploaded_is_removed_by_others(
    models: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Objects.upload

    def lose(self: Objects, name: str, *arguments: Any) -> None:
        upload(self, name, *arguments)
        if name.endswith(".safetensors"):
            self.remove([name])

    monkeypatch.setattr(Objects, "upload", lose)
    with pytest.raises(OutputError, match="not there any more") as caught:
        make(models / "linear.yml", output, 1, 1)
    assert f"{output}/model-" in str(caught.value.file)


def test_what_the_same_command_meets_again_has_no_hint(
    models: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(*_: Any) -> None:
        raise InputChangedError("an input changed")

    monkeypatch.setattr(in_store, "make", change)
    with pytest.raises(InputChangedError) as caught:
        make(models / "linear.yml", output, 1, 1)
    assert not getattr(caught.value, "__notes__", [])


def test_clean_removes_what_parts_have_left(models: Path, output: str, tmp_path: Path) -> None:
    objects = Objects.at(output)
    assert not oxmerge.clean(output)
    with pytest.raises(OutputError, match="there are no parts"):
        oxmerge.finish(output)
    make(models / "linear.yml", output, 1, 2)
    with pytest.raises(OutputError, match="other parts lack"):
        make(models / "metagpt.yml", f"{output}0", 1, 2, wait=0)
    assert list((tmp_path / "scratch").iterdir())
    assert oxmerge.clean(output)
    assert oxmerge.clean(f"{output}0")
    assert not objects.files()
    assert not list((tmp_path / "scratch").iterdir())
    # A model that is complete stays.
    oxmerge.merge(models / "linear.yml", output, shard_size=SHARD)
    there = objects.files()
    objects.put(
        ".parts.oxmerge-partial/1of1.key",
        json.dumps({"files": list(there), "last": "config.json"}).encode(),
    )
    assert oxmerge.clean(output)
    assert objects.files() == there


SEVERAL = """\
name: first
merge_method: metagpt
base_model: base
models: [{model: a}, {model: b}]
---
merge_method: slerp
base_model: first
models: [{model: first}, {model: b}]
parameters: {t: 0.3}
"""


def write_several(models: Path) -> Path:
    (models / "several.yml").write_text(SEVERAL)
    return models / "several.yml"


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_several_merges(tmp_path: Path, models: Path, output: str, parts: int) -> None:
    """What comes first lies in the store until the end; a later merge streams it."""
    recipe = write_several(models)
    options: dict[str, Any] = {"shard_size": SHARD, "seed": 5}
    oxmerge.merge(recipe, tmp_path / "one", **options)
    if parts == 1:
        oxmerge.merge(recipe, output, **options)
    else:
        with ThreadPoolExecutor(parts) as pool:
            runs = [pool.submit(make, recipe, output, at + 1, parts) for at in range(parts)]
            assert all(run.result(timeout=600) for run in runs)
        assert any("earlier/1/config.json" in name for name in Objects.at(output).files())
        oxmerge.finish(output)
    assert fetched(output, tmp_path / "out") == directory_bytes(tmp_path / "one")
    assert not list((tmp_path / "scratch").iterdir())


def test_several_merges_wait_for_each_other(models: Path, output: str, tmp_path: Path) -> None:
    recipe = write_several(models)
    for part, said in ((1, "other parts lack theirs"), (2, "the merge `first` comes first")):
        with pytest.raises(OutputError, match=said):
            make(recipe, output, part, 2, wait=0)
    assert list((tmp_path / "scratch").iterdir())
    assert oxmerge.clean(output)
    assert not Objects.at(output).files()
    assert not list((tmp_path / "scratch").iterdir())


#: What a sweep varies of a method, of which the second has numbers over the whole model.
AXES = {"linear": {"models[a].parameters.weight": "0.2,0.9"}, "nan": {"parameters.lambda": "0.5,1"}}


@pytest.mark.parametrize("method", AXES)
def test_a_sweep(tmp_path: Path, models: Path, output: str, method: str) -> None:
    """A weight file is made for all outputs at once, and each is completed by itself."""
    recipe, axes = models / f"{method}.yml", AXES[method]
    options: dict[str, Any] = {"shard_size": SHARD, "seed": 5}
    if method == "nan":
        write_recipe(recipe, method, ["a", "b"], base="base", each={"weight": 0.5})
    one = oxmerge.sweep(recipe, tmp_path / "one{n}", axes, **options)
    if method == "linear":
        reports = oxmerge.sweep(recipe, f"{output}/{{n}}", axes, **options)
        assert [report.files for report in reports] == [FILES, FILES]
        assert reports[0].bytes_read == one[0].bytes_read
    else:
        for part in (1, 2):
            with contextlib.suppress(OutputError):
                oxmerge.sweep(recipe, f"{output}/{{n}}", axes, part=(part, 2), wait=0, **options)
        oxmerge.sweep(recipe, f"{output}/{{n}}", axes, part=(1, 2), wait=0, **options)
        for n in range(2):
            oxmerge.finish(f"{output}/{n}")
    for n in range(2):
        made = fetched(f"{output}/{n}", tmp_path / f"out{n}")
        assert made == directory_bytes(tmp_path / f"one{n}")
    assert not list((tmp_path / "scratch").iterdir())


def test_what_cannot_be_written(
    tmp_path: Path, models: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = models / "linear.yml"
    for address in (
        "https://example.com/model",
        "s3:///model",
        "s3://key@bucket/m",
        "s3://b/m?x=1",
    ):
        with pytest.raises(OutputError, match=r"no store|more than a path"):
            oxmerge.merge(recipe, address)
    with pytest.raises((OutputError, RemoteError), match=r"NoSuchBucket|404"):
        oxmerge.merge(recipe, "s3://nobody/model")
    with pytest.raises(UnsupportedError, match="cannot be replaced"):
        oxmerge.merge(recipe, output, overwrite=True)
    with pytest.raises(OutputError, match="needs digests"):
        oxmerge.merge(recipe, output, digests=False)
    with pytest.raises(UnsupportedError, match="several merges cannot be made in a store"):
        oxmerge.sweep(write_several(models), output + "{n}", {"parameters.t": "0.1,0.2"})
    with monkeypatch.context() as context:
        context.setattr("oxmerge.in_store.MOST_BYTES", 1000)
        with pytest.raises(OutputError, match="larger than an upload"):
            oxmerge.merge(recipe, output)
    Objects.at(output).put("notes.txt", b"mine")
    with pytest.raises(OutputError, match="something lies where") as caught:
        oxmerge.merge(recipe, output)
    assert caught.value.found == "`notes.txt`"


def test_the_disk_here_is_full(
    tmp_path: Path, models: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="two weight files") as caught:
        oxmerge.merge(models / "linear.yml", output, shard_size=SHARD)
    assert caught.value.errno == errno.ENOSPC
    assert "TMPDIR" in str(caught.value)


def test_the_store_refuses_a_file(
    tmp_path: Path, models: Path, whole: Any, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was uploaded before stays, and the same command goes on."""
    import obstore
    from obstore.exceptions import PermissionDeniedError

    put, count = obstore.put, itertools.count()

    def refuse(store: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith(".safetensors") and next(count) == 2:
            raise PermissionDeniedError("no more of that")
        return put(store, path, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(obstore, "put", refuse)
        with pytest.raises(OutputError, match="cannot be written to") as caught:
            oxmerge.merge(models / "linear.yml", output, shard_size=SHARD, seed=5)
    assert "no more of that" in str(caught.value.found)
    assert "goes on from there" in caught.value.__notes__[0]
    there = Objects.at(output).files()
    assert len([name for name in there if name.endswith(".safetensors")]) == 2
    oxmerge.merge(models / "linear.yml", output, shard_size=SHARD, seed=5)
    assert fetched(output, tmp_path / "out") == whole["linear"]


def test_a_folder_of_someone_else_is_not_used(models: Path, output: str, tmp_path: Path) -> None:
    make(models / "linear.yml", output, 1, 2)
    with pytest.raises(OutputError, match="other parts lack"):
        make(models / "metagpt.yml", f"{output}0", 1, 2, wait=0)
    (folder,) = (tmp_path / "scratch").iterdir()
    folder.chmod(0o770)
    with pytest.raises(OutputError, match="someone else's"):
        make(models / "metagpt.yml", f"{output}0", 1, 2, wait=0)


def test_what_others_wrote_is_not_believed(
    tmp_path: Path, models: Path, whole: Any, output: str
) -> None:
    recipe, objects = models / "metagpt.yml", Objects.at(output)
    for part in (1, 2):
        with contextlib.suppress(OutputError):
            make(recipe, output, part, 2, wait=0)
    make(recipe, output, 1, 2, wait=0)
    there = {
        name: file.read(0, file.size) for name, file in objects.files().items() if "parts" in name
    }
    done = ".parts.oxmerge-partial/2of8.done"
    story = json.loads(there[done])
    for text in (
        b"", b"[]", b"[" * 10**5, b"\xff", json.dumps(story | {"etag": "other"}).encode(),
        json.dumps(story | {"done": {"notes": 3}}).encode(),
        json.dumps(story | {"done": story["done"] | {"memory": {}}}).encode(),
    ):  # fmt: skip
        objects.put(done, text)
        with pytest.raises(OutputError, match="not all parts"):
            oxmerge.finish(output)
    objects.put(done, there[done])
    for name, text in (("2of8.journal", b"x"), ("plan", b"{}"), ("plan", b"\xff")):
        objects.put(f".parts.oxmerge-partial/{name}", text)
        with pytest.raises(OxmergeError):
            oxmerge.finish(output)
        objects.put(f".parts.oxmerge-partial/{name}", there[f".parts.oxmerge-partial/{name}"])
    objects.put(".parts.oxmerge-partial/1of2.key", b'{"key": 3}')
    with pytest.raises(OutputError, match="damaged"):
        make(recipe, output, 1, 2)
    oxmerge.finish(output)
    assert fetched(output, tmp_path / "out") == whole["metagpt"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose output is four files, each of several pieces of an upload."""
    folder = tmp_path_factory.mktemp("large")
    for name in "ab":
        sparse = {f"layers.{i}": (1 << 10, 1 << 12) for i in range(8)}
        write_sparse(folder / name / "model.safetensors", sparse)
        (folder / name / "config.json").write_text('{"model_type": "test"}')
    return write_recipe(folder / "r.yml", "linear", ["a", "b"], each={"weight": 0.5})


def command(recipe: Path, output: str, *options: str) -> list[str]:
    merge = [sys.executable, "-m", "oxmerge", "merge", str(recipe), output]
    return [*merge, "--shard-size=17MB", "--threads=2", *options]


@pytest.mark.slow
def test_memory_is_bounded(large: Path, output: str) -> None:
    done = subprocess.run(
        command(large, output, "--memory=160MiB", "--json"),
        capture_output=True,
        check=True,
        timeout=600,
    )
    report = json.loads(done.stdout)
    assert report["peak_memory"] <= report["memory"] == 160 << 20
    assert report["files"] == 4


def test_an_upload_that_is_stopped_is_taken_back(s3: str, output: str, tmp_path: Path) -> None:
    path, stopped = tmp_path / "large", threading.Event()
    path.write_bytes(bytes(30 << 20))
    seen: list[list[str]] = []

    def look() -> None:
        while not stopped.is_set():
            if found := uploads(s3, output):
                seen.append(found)
                stopped.set()

    def upload() -> None:
        while True:  # until it is seen under way
            Objects.at(output).upload("model.safetensors", path, stopped)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(look)
        with pytest.raises(KeyboardInterrupt):
            upload()
    assert seen
    assert not uploads(s3, output)


def uploads(s3: str, output: str) -> list[str]:
    """Return the names of objects of which pieces have come and no end."""
    with closing(urllib.request.urlopen(f"{s3}/bucket?uploads")) as answer:
        keys = re.findall("<Key>(.*?)</Key>", answer.read().decode())
    return [key for key in keys if key.startswith(output.removeprefix("s3://bucket/"))]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_part_that_ends_early_goes_on(
    large: Path, output: str, s3: str, tmp_path: Path, number: signal.Signals
) -> None:
    """It shows no part of a file, and uploads none again."""
    process = subprocess.Popen(command(large, output, "-q"), stderr=subprocess.PIPE, text=True)
    objects, deadline = Objects.at(output), time.monotonic() + 600
    while not any(name.endswith(".done") for name in objects.files()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, text = process.communicate(timeout=600)
    assert process.returncode == (130 if number == signal.SIGINT else -number), text
    if number == signal.SIGINT:
        assert "goes on from there" in text
        assert not uploads(s3, output)
    before = {n: f.etag for n, f in objects.files().items() if n.endswith(".safetensors")}
    sizes = dict(oxmerge.plan(large, shard_size="17MB").shards)
    assert all(objects.files()[name].size == sizes[name] for name in before)
    assert 0 < len(before) < 4
    shown: list[oxmerge.merging.Snapshot] = []
    report = oxmerge.merge(large, output, shard_size="17MB", threads=2, progress=shown.append)
    assert report.files == 4
    done = [each.bytes_done for each in shown]
    assert done == sorted(done)
    assert all(each.bytes_done <= each.bytes_total <= sum(sizes.values()) for each in shown)
    after = {n: f.etag for n, f in objects.files().items() if n.endswith(".safetensors")}
    assert before.items() <= after.items()
    assert len(after) == 4
    assert not list((tmp_path / "scratch").iterdir())
