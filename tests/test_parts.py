"""A merge in parts gives the bytes of one run, and parts of something else are told apart."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
import test_token_rows as token_rows
from hypothesis import given
from hypothesis import strategies as st
from oxmerge import cli, merging, parts
from oxmerge.errors import OutputError, PlanError, UnsupportedError, WaitsForOthersError
from oxmerge.options import RunOptions
from oxmerge.output import publish
from oxmerge.output.claims import BusyError, claim, claimed
from oxmerge.output.part_files import PartFiles, Purpose, shards_of_parts
from oxmerge.output.publish import PARTS_NAME
from oxmerge.parts import shared_folder
from oxmerge.sweeping import variants
from range_server import serve
from writers import (
    directory_bytes,
    random_arrays,
    tuned,
    write_file,
    write_model,
    write_recipe,
    write_sparse,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Small tensors that lie together, some of several blocks, and integers; eleven files of weights.
SHAPES: dict[str, tuple[int, ...]] = {f"layers.{i}.weight": (64, 100 + i) for i in range(20)}
SHAPES |= {"layers.3.bias": (70000,), "layers.9.rows": (5, 7), "scale": (1,)}
IDS = {"position_ids": np.arange(77, dtype=np.int64)}
SHARD, FILES = 40_000, 11
WRITTEN = ["written_methods"]

#: Arguments of `write_recipe`, the models being a and b: some of each class of method.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 0.5}},
    "slerp": {"models": "a", "base": True, "shared": {"t": 0.3}},
    "ties": {"base": True, "each": {"weight": 0.5, "density": 0.3}},
    "dare_ties": {"base": True, "each": {"weight": 0.5, "density": 0.3}},
    "della": {"base": True, "each": {"weight": 0.5, "density": 0.4}},
    "model_stock": {"base": True},
    "nuslerp": {
        "each": {"weight": 0.5},
        "shared": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "karcher": {},
    "sce": {"base": True, "shared": {"select_topk": 0.4}},
    "arcee_fusion": {"models": "a", "base": True},
    "pcb": {"base": True, "each": {"weight": 0.5, "density": 0.3}},
    "geometric_median": {},
    # Written in Python: selections and sums of each tensor, and of each row.
    "written_methods:selected": {"base": True},
    "written_methods:by_row": {"base": True},
    # Numbers over the whole model.
    "metagpt": {"base": True},
    "nan": {"base": True, "each": {"weight": 0.5}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two fine-tunes of it, and a recipe for each method."""
    folder = tmp_path_factory.mktemp("models")
    base = random_arrays(SHAPES, seed=0)
    write_model(folder / "base", base | IDS, "BF16")
    for seed, name in enumerate("ab", start=1):
        write_model(folder / name, tuned(base, seed) | IDS, "BF16")
    for method, about in METHODS.items():
        names = list(about.get("models", "ab"))
        more = {name: about[name] for name in ("each", "shared") if name in about}
        base_name = "base" if about.get("base") else None
        write_recipe(folder / f"{method}.yml", method, names, base=base_name, **more)
    return folder


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What one run makes by each method."""
    folder = tmp_path_factory.mktemp("whole")
    made = {}
    for method in METHODS:
        options: dict[str, Any] = {"shard_size": SHARD, "seed": 5, "allow_methods": WRITTEN}
        oxmerge.merge(models / f"{method}.yml", folder / method, **options)
        made[method] = directory_bytes(folder / method)
    return made


def make(recipe: Any, output: Path, part: int, parts: int, **options: Any) -> oxmerge.MergeReport:
    usual: dict[str, Any] = {
        "shard_size": SHARD, "seed": 5, "threads": 2, "wait": 30, "allow_methods": WRITTEN,
    }  # fmt: skip
    return oxmerge.merge(recipe, output, part=(part, parts), **usual | options)


def make_all(recipe: Path, output: Path, parts: int, **options: Any) -> None:
    """Make all parts at the same time."""
    with ThreadPoolExecutor(parts) as pool:
        runs = [
            pool.submit(make, recipe, output, part, parts, **options)
            for part in range(1, parts + 1)
        ]
        for run in runs:
            run.result(timeout=600)


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=60), st.data())
def test_parts_are_of_nearly_equal_bytes(sizes: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(sizes)))
    shards = shards_of_parts(sizes, parts)
    assert sorted(shard for part in shards for shard in part) == list(range(len(sizes)))
    assert all(shards)
    # The last shard that the fullest part was given went to the emptiest.
    most = max(sum(sizes[shard] for shard in part) for part in shards)
    assert most <= sum(sizes) / parts + max(sizes)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        *((method, 3) for method in METHODS),
        *(
            pytest.param(method, parts, marks=pytest.mark.slow)
            for method in METHODS
            for parts in (1, 2, 7)
        ),
    ],
)
def test_bytes_are_those_of_one_run(
    tmp_path: Path, models: Path, whole: dict[str, dict[str, bytes]], method: str, parts: int
) -> None:
    output = tmp_path / "out"
    make_all(models / f"{method}.yml", output, parts)
    assert not (output / "config.json").exists()
    report = oxmerge.finish(output, allow_methods=WRITTEN)
    assert directory_bytes(output) == whole[method]
    assert report.files == FILES
    assert f"made in {parts} parts on 1 machine" in report.notes


def test_adapters_are_put_in_by_each_part(tmp_path: Path, models: Path) -> None:
    generator = np.random.default_rng(3)
    low: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        if name.endswith(".weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            low[f"{module}.lora_A.weight"] = generator.standard_normal((2, shape[1]), np.float32)
            low[f"{module}.lora_B.weight"] = generator.standard_normal((shape[0], 2), np.float32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_file(adapter / "adapter_model.safetensors", low)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["x"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    base = models / "base"
    names = [f"{base}+{adapter}", str(models / "b")]
    recipe = write_recipe(
        tmp_path / "r.yml", "ties", names, base=base, each={"density": 0.5, "weight": 1}
    )
    oxmerge.merge(recipe, tmp_path / "one", shard_size=SHARD, seed=5)
    make_all(recipe, tmp_path / "out", 3, finish=True)
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "one")


@pytest.mark.parametrize("source", ["union", "b"])
def test_tokenizers_are_merged_by_each_part(tmp_path: Path, source: str) -> None:
    for seed, name in enumerate("ab"):
        token_rows.make(tmp_path / name, token_rows.train("BPE", name), seed=seed)
    recipe = write_recipe(
        tmp_path / "r.yml", "linear", ["a", "b"], each={"weight": 0.5}, tokenizer_source=source
    )
    options: dict[str, Any] = {"shard_size": 600, "seed": 5}
    oxmerge.merge(recipe, tmp_path / "one", **options)
    make_all(recipe, tmp_path / "out", 3, finish=True, **options)
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "one")


#: What a sweep varies of the method.
AXES = {"ties": {"models[b].parameters.weight": "0.2,0.9"}, "nan": {"parameters.lambda": "0.5,1"}}


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("ties", 3),
        ("nan", 2),
        *(pytest.param("nan", parts, marks=pytest.mark.slow) for parts in (1, 3, 7)),
    ],
)
def test_a_sweep_in_parts(tmp_path: Path, models: Path, method: str, parts: int) -> None:
    recipe = models / f"{method}.yml"
    options: dict[str, Any] = {"shard_size": SHARD, "seed": 5, "threads": 2}
    oxmerge.sweep(recipe, tmp_path / "one{n}", AXES[method], **options)
    with ThreadPoolExecutor(parts) as pool:
        runs = [
            pool.submit(
                oxmerge.sweep, recipe, tmp_path / "out{n}", AXES[method], part=(at, parts),
                wait=60, **options,
            )
            for at in range(1, parts + 1)
        ]  # fmt: skip
        for run in runs:
            assert len(run.result(timeout=600)) == 2
    for n in range(2):
        # Whichever is the first of them, each is completed by itself.
        oxmerge.finish(tmp_path / f"out{n}")
        assert directory_bytes(tmp_path / f"out{n}") == directory_bytes(tmp_path / f"one{n}")


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("parameters.t", 2),  # what comes first is one merge for all
        pytest.param("[second].models[b].parameters.weight", 3, marks=pytest.mark.slow),
        pytest.param("[first].parameters.lambda", 2, marks=pytest.mark.slow),
    ],
)
def test_a_sweep_over_several_merges_in_parts(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, place: str, parts: int
) -> None:
    recipe, axes = models / "several_swept.yml", {place: "0.2,0.7"}
    recipe.write_text(SEVERAL.replace("merge_method: metagpt", "merge_method: nan"))
    options: dict[str, Any] = {"shard_size": 2 * SHARD, "seed": 5, "threads": 2}
    oxmerge.sweep(recipe, tmp_path / "one{n}", axes, **options)
    made: list[str] = []
    execute = merging.execute

    def watched(plans: Any, outputs: Any, *arguments: Any) -> Any:
        made.extend(str(output.path.relative_to(tmp_path)) for output in outputs)
        return execute(plans, outputs, *arguments)

    monkeypatch.setattr("oxmerge.parts.execute", watched)
    for part in range(1, parts + 1):
        oxmerge.sweep(recipe, tmp_path / "out{n}", axes, part=(part, parts), **options)
    # What is equal for both outputs is made in one of them, and stays for the other.
    earlier = {path.split("/")[0] for path in made if "/earlier/" in path}
    assert earlier == ({"out0"} if place == "parameters.t" else {"out0", "out1"})
    for n in range(2):
        oxmerge.finish(tmp_path / f"out{n}")
        assert directory_bytes(tmp_path / f"out{n}") == directory_bytes(tmp_path / f"one{n}")
        assert not list((tmp_path / f"out{n}").glob(".*"))


def test_a_part_of_a_sweep_is_not_one_of_a_merge(tmp_path: Path, models: Path) -> None:
    recipe = models / "ties.yml"
    options: dict[str, Any] = {"shard_size": SHARD, "seed": 5}
    reports = oxmerge.sweep(recipe, tmp_path / "out{n}", AXES["ties"], part=(1, 2), **options)
    assert all("not yet part 2" in report.notes[-1] for report in reports)
    alone = variants(recipe, tmp_path / "out{n}", AXES["ties"])[0].recipe
    with pytest.raises(OutputError, match="another sweep"):
        make(alone, tmp_path / "out0", 2, 2)
    again = oxmerge.sweep(
        recipe, tmp_path / "out{n}", AXES["ties"], part=(2, 2), finish=True, **options
    )
    assert [report.files for report in again] == [FILES, FILES]
    with pytest.raises(UnsupportedError, match="not cut into files alike"):
        oxmerge.sweep(
            recipe, tmp_path / "two{n}", {"dtype": "float32,bfloat16"}, part=(1, 2), **options
        )


def test_an_output_of_a_sweep_that_cannot_be_completed(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are complete all the same, and it is said what completes it."""
    whole = parts.complete

    def complete(plan: Any, count: int, path: Path, *options: Any) -> Any:
        if path.name == "out0":
            raise OSError(errno.ENOSPC, "no space left")
        return whole(plan, count, path, *options)

    monkeypatch.setattr(parts, "complete", complete)
    with pytest.raises(OSError, match="no space left") as caught:
        oxmerge.sweep(
            models / "ties.yml", tmp_path / "out{n}", AXES["ties"], part=(1, 1), finish=True,
            shard_size=SHARD,
        )  # fmt: skip
    told = f"not complete: `oxmerge finish {tmp_path}/out0` completes it"
    assert caught.value.__notes__ == [told]
    assert (tmp_path / "out1" / "config.json").exists()
    monkeypatch.undo()
    assert oxmerge.finish(tmp_path / "out0").files == FILES


@pytest.mark.parametrize("method", ["ties", "nan"])
def test_inputs_are_streamed_to_each_part(
    tmp_path: Path,
    models: Path,
    whole: dict[str, dict[str, bytes]],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part fetches what its own tensors need, however small the spool is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    about = METHODS[method]
    output = tmp_path / "out"
    with serve(models) as server:
        names = [f"{server.address}/{name}" for name in "ab"]
        recipe = write_recipe(
            tmp_path / "r.yml", method, names, base=f"{server.address}/base", each=about.get("each")
        )
        planned = 0
        for part in (1, 2, 3):
            oxmerge.plan(recipe, shard_size=SHARD)
            planned = server.bytes_sent()
            try:
                make(recipe, output, part, 3, spool="1MB", wait=0)
            except OutputError:
                assert method == "nan"
                assert part < 3
            largest = 3 * 2 * 70_000 + 3 * (128 << 10)  # the largest tensor, and headers
            assert server.bytes_sent() - planned <= 2 * (
                oxmerge.plan(recipe).bytes_read / 3 + largest
            )
        make_all(recipe, output, 3, spool="1MB")
        oxmerge.finish(output)
    told = ("README.md", "oxmerge_recipe.yml", "oxmerge.json")
    made = directory_bytes(output)
    assert made.keys() == whole[method].keys()
    assert all(data == whole[method][name] for name, data in made.items() if name not in told)


#: The first is of numbers over the whole model, and has fewer files than the last.
SEVERAL = """\
name: first
merge_method: metagpt
base_model: base
models: [{model: a}, {model: b}]
---
name: second
merge_method: linear
models:
- {model: first, parameters: {weight: 0.4}}
- {model: b, parameters: {weight: 0.6}}
---
merge_method: slerp
base_model: second
models: [{model: second}, {model: first}]
parameters: {t: 0.3}
dtype: float32
"""


def write_several(models: Path) -> Path:
    recipe = models / "several.yml"
    recipe.write_text(SEVERAL)
    return recipe


@pytest.fixture(scope="module")
def several(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, bytes]]:
    """A recipe of several merges, and what one run makes."""
    recipe, output = write_several(models), tmp_path_factory.mktemp("several") / "one"
    oxmerge.merge(recipe, output, shard_size=2 * SHARD, seed=5)
    return recipe, directory_bytes(output)


@pytest.mark.parametrize(
    "parts", [3, *(pytest.param(parts, marks=pytest.mark.slow) for parts in (1, 2, 7))]
)
def test_several_merges_in_parts(
    tmp_path: Path, several: tuple[Path, dict[str, bytes]], parts: int
) -> None:
    recipe, whole = several
    output = tmp_path / "out"
    make_all(recipe, output, parts, shard_size=2 * SHARD)
    assert sorted(path.name for path in (output / PARTS_NAME / "earlier").iterdir()) == ["1", "2"]
    oxmerge.finish(output)
    assert directory_bytes(output) == whole


def test_a_part_makes_what_no_run_has_begun_of_earlier_merges(tmp_path: Path, models: Path) -> None:
    """So parts that run one after the other, as on few cores, do not wait in vain."""
    text = SEVERAL.replace("merge_method: metagpt", "merge_method: model_stock")
    recipe, output = models / "several_in_turn.yml", tmp_path / "out"
    recipe.write_text(text)
    options: dict[str, Any] = {"shard_size": 2 * SHARD, "seed": 5}
    oxmerge.merge(recipe, tmp_path / "one", **options)
    for part in (2, 3, 1):
        make(recipe, output, part, 3, **options, finish=True)
    assert directory_bytes(output) == directory_bytes(tmp_path / "one")


def test_a_part_sweeps_what_no_run_has_begun(
    tmp_path: Path, models: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    output = tmp_path / "out"
    make(models / "nan.yml", output, 2, 3)
    # Each is made by its own run all the same: so none finds that the output is complete.
    report = make(models / "nan.yml", output, 3, 3, wait=0)
    assert report.notes[-1] == "part 3 of 3 is made, but not yet part 1"
    make(models / "nan.yml", output, 1, 3, finish=True)
    assert directory_bytes(output) == whole["nan"]


def test_what_is_swept_meanwhile_is_not_swept_again(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be made by then, and must stay as it was left."""
    recipe, output = models / "nan.yml", tmp_path / "out"
    for part in (1, 2, 3, 2):
        with contextlib.suppress(WaitsForOthersError):
            make(recipe, output, part, 3, wait=0)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("2of3*/.model*")}
    assert before
    (output / PARTS_NAME / "3of3.numbers").unlink()
    monkeypatch.setattr(PartFiles, "unswept", lambda _: [2])
    with pytest.raises(WaitsForOthersError):
        make(recipe, output, 1, 3, wait=0.1)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_others_sweep_when_a_part_gives_up(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has waited all the same, and whoever placed it runs it again."""
    recipe, output = models / "nan.yml", tmp_path / "out"
    execute = merging.execute

    def late(*arguments: Any) -> Any:
        try:
            return execute(*arguments)
        except OutputError:
            monkeypatch.undo()
            make(recipe, output, 2, 2, wait=0)
            raise

    monkeypatch.setattr(parts, "execute", late)
    with pytest.raises(WaitsForOthersError):
        make(recipe, output, 1, 2, wait=0)


def test_a_part_that_another_run_makes_is_waited_for(tmp_path: Path, models: Path) -> None:
    recipe, output = models / "linear.yml", tmp_path / "out"
    make(recipe, output, 1, 2)
    with ThreadPoolExecutor(1) as pool, shared_folder(output, 2, 2) as files:
        with files.locked():
            second = pool.submit(make, recipe, output, 2, 2, finish=True)
            time.sleep(0.2)
            assert not second.done()
        assert second.result(timeout=600).files == FILES


def test_what_another_run_has_begun_is_left_to_it(tmp_path: Path, models: Path) -> None:
    output = tmp_path / "out"
    make(models / "linear.yml", output, 1, 3)
    with shared_folder(output, 1, 3) as files:
        free = [files.of(part).is_free() for part in (1, 2, 3)]
        assert free == [False, True, True]
        with files.of(2).locked():
            assert not files.of(2).is_free(own=True)
        # Its locks may not be seen here: only a run of the same part takes it.
        story = json.loads((output / PARTS_NAME / "1of3.key").read_text())
        (output / PARTS_NAME / "3of3.key").write_text(json.dumps(story | {"machine": "another"}))
        assert not files.of(3).is_free()
        assert files.of(3).is_free(own=True)


def test_parts_of_several_merges_one_after_the_other(
    tmp_path: Path, several: tuple[Path, dict[str, bytes]]
) -> None:
    """A part says what it waits for, and goes on from there when it is run again."""
    recipe, whole = several
    output, told = tmp_path / "out", []
    for _ in range(4):
        for part in (1, 2, 3):
            try:
                options: dict[str, Any] = {"wait": 0, "shard_size": 2 * SHARD, "finish": True}
                report = make(recipe, output, part, 3, **options)
            except OutputError as error:
                told.append(f"{error.message.partition(',')[0]}: {str(error.advice)[:19]}")
        if (output / "config.json").exists():
            break
    assert set(told) == {
        "numbers over the whole model are needed: run this part again",
        "the merge `first` comes first: run this part again",
        "the merge `second` comes first: run this part again",
    }
    assert report.files > 7
    assert directory_bytes(output) == whole


def test_an_input_of_an_earlier_merge_is_another_file(
    tmp_path: Path, models: Path, several: tuple[Path, dict[str, bytes]]
) -> None:
    recipe, _ = several
    copy, output = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(models, copy)
    with pytest.raises(OutputError, match="numbers over the whole model"):
        make(recipe, output, 1, 2, wait=0)
    shutil.rmtree(copy / "base")
    write_model(copy / "base", random_arrays(SHAPES, 7) | IDS, "BF16")
    with pytest.raises(OutputError, match="another file than part 1 has") as caught:
        make(copy / "several.yml", output, 2, 2, wait=0)
    assert caught.value.file == str(copy / "base" / "model.safetensors")


def test_the_last_part_completes_the_output(
    tmp_path: Path, models: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    output = tmp_path / "out"
    make_all(models / "metagpt.yml", output, 3, finish=True)
    assert directory_bytes(output) == whole["metagpt"]


def test_parts_one_after_the_other(
    tmp_path: Path, models: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    """Without numbers over the model none waits for another."""
    output = tmp_path / "out"
    for part in (3, 1, 2):
        report = make(models / "ties.yml", output, part, 3, finish=True, wait=0)
    assert report.files == FILES
    assert directory_bytes(output) == whole["ties"]


def test_sweeps_are_waited_for_so_long(
    tmp_path: Path, models: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    recipe, output = models / "nan.yml", tmp_path / "out"
    for part in (1, 2):
        with pytest.raises(OutputError, match="other parts have not found") as caught:
            make(recipe, output, part, 3, wait=0)
        assert "3" in str(caught.value.found)
    make(recipe, output, 3, 3, wait=0)
    for part in (1, 2):
        make(recipe, output, part, 3, wait=0, finish=True)
    assert directory_bytes(output) == whole["nan"]


def test_a_part_that_is_made_is_not_made_again(
    tmp_path: Path, models: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    recipe, output = models / "linear.yml", tmp_path / "out"
    make_all(recipe, output, 3)
    before = {path: path.stat().st_mtime_ns for path in output.rglob(".model*")}
    assert before
    assert "part 2 of 3 is made already" in make(recipe, output, 2, 3).notes[-1]
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob(".model*")}
    # One whose file is not as it was left is.
    spoilt = next(path for path in before if "2of3" in str(path))
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    with pytest.raises(OutputError, match="part 2 are not as it left them"):
        oxmerge.finish(output)
    with pytest.raises(OutputError, match="not all parts") as caught:
        oxmerge.finish(output)
    assert caught.value.found == "not yet part 2"
    make(recipe, output, 2, 3, finish=True)
    assert directory_bytes(output) == whole["linear"]


def test_a_part_is_begun_again_when_the_output_is_complete(tmp_path: Path, models: Path) -> None:
    """As batch systems do: that is no failure, but for what would make something else."""
    shutil.copytree(models, tmp_path / "models")
    recipe, output = tmp_path / "models" / "linear.yml", tmp_path / "out"
    make_all(recipe, output, 2, finish=True)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    copied = shutil.copytree(tmp_path / "models", tmp_path / "elsewhere") / "linear.yml"
    again = [
        make(recipe, output, 2, 2),
        make(copied, output, 1, 2, finish=True),
        make(recipe, output, 1, 3, overwrite=True),
        oxmerge.finish(output),
    ]
    assert [report.files for report in again] == [0] * 4
    assert {report.notes for report in again} == {
        (f"`{output}` is complete: nothing is left to do",)
    }
    assert before == {path: path.stat().st_mtime_ns for path in output.iterdir()}
    for other in ({"seed": 6}, {"fresh": True}):
        with pytest.raises(FileExistsError):
            make(recipe, output, 2, 2, **other)
    make_all(recipe, output, 2, finish=True, fresh=True, overwrite=True)
    assert before.keys() == set(output.iterdir())
    assert not before.items() & {(path, path.stat().st_mtime_ns) for path in output.iterdir()}
    os.utime(tmp_path / "models" / "b" / "model.safetensors", ns=(1, 1))
    with pytest.raises(FileExistsError):
        make(recipe, output, 2, 2)
    (output / f"model-00001-of-{FILES:05}.safetensors").unlink()
    with pytest.raises(FileExistsError):
        make(copied, output, 2, 2)


def test_what_one_machine_knows_more_of_an_input(models: Path) -> None:
    """One has it from the Hub, with its ETag, the other as a copy: it is the same merge."""
    copy = Purpose.of(oxmerge.plan(models / "linear.yml"), 2)
    hub = replace(copy, marks=tuple(marks | {"ETag": "0" * 40} for marks in copy.marks))
    other = replace(hub, marks=tuple({**marks, "sample": "0" * 32} for marks in copy.marks))
    each = (copy, hub, other)
    same = [[one.is_sealed(seal.seal()) for seal in each] for one in each]
    assert same == [[True, True, False], [True, True, False], [False, False, True]]
    damaged: Any
    for damaged in (None, [], [None] * len(copy.marks), {}, 3):
        assert not copy.is_sealed(copy.seal() | {"marks": damaged})


@pytest.mark.parametrize("begins", ["shared_folder", "load_plan", "complete"])
def test_two_runs_finish_the_output(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, begins: str
) -> None:
    """The later one finds that it is complete, however far it had come."""
    output = tmp_path / "out"
    make_all(models / "linear.yml", output, 2)
    begin = getattr(parts, begins)

    def after_another(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        assert oxmerge.finish(output).files == FILES
        return begin(*arguments, **options)

    monkeypatch.setattr(parts, begins, after_another)
    assert oxmerge.finish(output).files == 0
    assert not list(output.glob(".*"))


@pytest.mark.parametrize("wait", [0, 60])
def test_an_output_is_completed_while_a_part_waits(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, wait: int
) -> None:
    """The part is not made again, though it may replace what is there."""
    recipe, output = models / "linear.yml", tmp_path / "out"
    make_all(recipe, output, 2)

    def is_busy(*_: Any, **__: Any) -> None:
        if not wait:
            oxmerge.finish(output)
        monkeypatch.setattr(parts, "share_output", publish.share_output)
        raise BusyError("another run completes the output")

    def finish(*_: Any) -> bool:
        return oxmerge.finish(output).files == FILES

    monkeypatch.setattr(parts, "share_output", is_busy)
    monkeypatch.setattr(parts.Patience, "wait", finish)
    assert make(recipe, output, 2, 2, wait=wait, overwrite=True).files == 0
    assert not list(output.glob(".*"))


def test_finishing_waits_for_no_part(tmp_path: Path, models: Path) -> None:
    output = tmp_path / "out"
    make_all(models / "linear.yml", output, 2)
    with contextlib.ExitStack() as stack:
        stack.callback(claim(output, shared=True).release)
        with pytest.raises(BusyError):
            oxmerge.finish(output)
    assert oxmerge.finish(output).files == FILES


@pytest.mark.parametrize("again", ["part", "finish"])
def test_who_completes_is_killed_at_the_very_end(
    tmp_path: Path, models: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    """The model is there, and some of what it was made of: a later run removes that."""
    recipe, output = models / "linear.yml", tmp_path / "out"
    make_all(recipe, output, 2)

    def die(output: Any) -> None:
        (output.path / PARTS_NAME / "1of2.done").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(publish, "_remove_folders_of_runs", die)
        context.setattr(publish, "close", lambda output: output.claim.release())
        with pytest.raises(KeyboardInterrupt):
            oxmerge.finish(output)
    assert (output / PARTS_NAME).exists()
    report = make(recipe, output, 1, 2) if again == "part" else oxmerge.finish(output)
    assert report.files == 0
    assert not list(output.glob(".*"))
    assert directory_bytes(output) == whole["linear"]


def test_outputs_of_a_sweep_that_are_complete_stay(tmp_path: Path, models: Path) -> None:
    def part(number: int, **options: Any) -> list[int]:
        reports = oxmerge.sweep(
            models / "nan.yml", tmp_path / "out{n}", AXES["nan"], shard_size=SHARD,
            part=(number, 2), **options,
        )  # fmt: skip
        return [report.files for report in reports]

    part(2)
    assert all(part(1))
    oxmerge.finish(tmp_path / "out0")
    made = directory_bytes(tmp_path / "out0")
    assert part(1, finish=True) == [0, FILES]
    assert part(2, finish=True) == [0, 0]
    assert directory_bytes(tmp_path / "out0") == made


def test_who_completes_waits_for_runs_that_are_about_to_end(
    tmp_path: Path, models: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    """A run of a part shares the output until it ends: the last one may come before that."""
    output = tmp_path / "out"
    make_all(models / "linear.yml", output, 2)
    told = Event()
    with ThreadPoolExecutor(1) as pool:
        other = claim(output, shared=True)
        last = pool.submit(
            make, models / "linear.yml", output, 2, 2, finish=True,
            progress=lambda shown: told.set() if "parts to end" in shown.tensor else None,
        )  # fmt: skip
        assert told.wait(60)
        other.release()
        assert last.result(timeout=600).files == FILES
    assert directory_bytes(output) == whole["linear"]


def test_a_part_waits_for_the_run_that_completes_the_output(tmp_path: Path, models: Path) -> None:
    recipe, output = models / "linear.yml", tmp_path / "out"
    make(recipe, output, 1, 2)
    told = Event()
    with ThreadPoolExecutor(1) as pool:
        other = claim(output)
        with pytest.raises(OutputError, match="another run is writing here"):
            make(recipe, output, 2, 2, wait=0)
        second = pool.submit(
            make, recipe, output, 2, 2,
            progress=lambda shown: told.set() if "the run that completes" in shown.tensor else None,
        )  # fmt: skip
        assert told.wait(60)
        other.release()
        assert second.result(timeout=60).notes[-1].startswith("part 2 of 2 is made, and all others")
    # A merge that is not in parts takes longer than anyone waits.
    with claimed(tmp_path / "other"), pytest.raises(OutputError, match="is writing here"):
        make(recipe, tmp_path / "other", 1, 2)


def test_a_missing_part_is_told(tmp_path: Path, models: Path) -> None:
    output = tmp_path / "out"
    make(models / "linear.yml", output, 2, 3)
    with pytest.raises(OutputError, match="not all parts") as caught:
        oxmerge.finish(output)
    assert caught.value.found == "not yet parts 1, 3"
    with pytest.raises(OutputError, match="no parts of a merge"):
        oxmerge.finish(tmp_path)


def test_more_parts_than_files(tmp_path: Path, models: Path) -> None:
    with pytest.raises(PlanError, match="at most 11 parts") as caught:
        make(models / "linear.yml", tmp_path / "out", 1, 12)
    assert "--shard-size" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "what"), [({"seed": 6}, "another seed"), ({"shard_size": 50_000}, "shard size")]
)
def test_parts_of_another_plan(
    tmp_path: Path, models: Path, change: dict[str, Any], what: str
) -> None:
    output = tmp_path / "out"
    make(models / "ties.yml", output, 1, 2)
    with pytest.raises(OutputError, match=what):
        make(models / "ties.yml", output, 2, 2, **change)
    with pytest.raises(OutputError, match="another number of parts"):
        make(models / "ties.yml", output, 2, 3)
    with pytest.raises(OutputError, match="another text of the recipe"):
        make(models / "linear.yml", output, 2, 2)
    # Who was refused has left nothing that refuses others.
    make(models / "ties.yml", output, 2, 2, finish=True)


def test_inputs_lie_elsewhere_on_another_machine(
    tmp_path: Path, models: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    """A copy has another path, other inodes and other times."""
    output, copy = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(models, copy)
    make(models / "linear.yml", output, 1, 2)
    make(copy / "linear.yml", output, 2, 2, finish=True)
    assert directory_bytes(output) == whole["linear"]


def test_an_input_is_another_file_on_another_machine(tmp_path: Path, models: Path) -> None:
    output, copy = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(models, copy)
    make(models / "linear.yml", output, 1, 2)
    weights = copy / "b" / "model.safetensors"
    arrays = {name: values + np.float32(1) for name, values in random_arrays(SHAPES, 0).items()}
    shutil.rmtree(copy / "b")
    write_model(copy / "b", arrays | IDS, "BF16")
    assert weights.stat().st_size == (models / "b" / "model.safetensors").stat().st_size
    with pytest.raises(OutputError, match="another file than part 1 has") as caught:
        make(copy / "linear.yml", output, 2, 2)
    assert caught.value.file == str(weights)
    assert str(models / "b" / "model.safetensors") in str(caught.value.expected)


def test_an_input_has_changed_on_one_machine(
    tmp_path: Path, models: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    """Nothing but its time tells it: size and samples are the same."""
    shutil.copytree(models, tmp_path / "copy")
    recipe, output = tmp_path / "copy" / "linear.yml", tmp_path / "out"
    make(recipe, output, 1, 2)
    weights = tmp_path / "copy" / "b" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2 + 9000] ^= 1
    weights.write_bytes(data)
    for part in (1, 2):
        with pytest.raises(OutputError, match="has changed since part 1 was begun") as caught:
            make(recipe, output, part, 2)
        assert caught.value.file == str(weights)
    # On another machine times may differ.
    key = output / PARTS_NAME / "1of2.key"
    key.write_text(json.dumps(json.loads(key.read_text()) | {"machine": "another"}))
    make(models / "linear.yml", output, 2, 2)
    with pytest.raises(OutputError, match="a part of a merge here"), _running(output):
        oxmerge.clean(output)
    assert oxmerge.clean(output)


@contextlib.contextmanager
def _running(output: Path) -> Iterator[None]:
    """Be a run of the first part, where directories cannot be locked."""
    folder = os.open(output / PARTS_NAME, os.O_RDONLY)
    try:
        with PartFiles(1, 2, folder, output).locked():
            yield
    finally:
        os.close(folder)


def test_a_running_part_keeps_a_whole_merge_out(tmp_path: Path, models: Path) -> None:
    recipe, output = models / "linear.yml", tmp_path / "out"
    make(recipe, output, 1, 2)
    with _running(output):
        for begin in (oxmerge.clean, partial(oxmerge.merge, recipe, fresh=True)):
            with pytest.raises(OutputError, match="another run makes a part"):
                begin(output)
        assert (output / PARTS_NAME / "1of2.done").exists()
    oxmerge.merge(recipe, output, fresh=True)


def test_a_merge_and_its_parts_exclude_each_other(tmp_path: Path, models: Path) -> None:
    recipe, output = models / "linear.yml", tmp_path / "out"
    make(recipe, output, 1, 2)
    with pytest.raises(OutputError, match="parts of a merge were made here"):
        oxmerge.merge(recipe, output, shard_size=SHARD)
    assert oxmerge.clean(output)
    assert not output.exists()
    make(recipe, output, 1, 2)
    oxmerge.merge(recipe, output, shard_size=SHARD, fresh=True)
    assert not list(output.glob(".*"))
    with pytest.raises(FileExistsError):
        make(recipe, output, 1, 2)


def test_a_part_keeps_out_what_was_begun_whole(tmp_path: Path, models: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / ".model.safetensors.oxmerge-partial").write_bytes(b"")
    with pytest.raises(OutputError, match="not in parts was begun"):
        make(models / "linear.yml", output, 1, 2)


def test_two_runs_of_one_part(tmp_path: Path, models: Path) -> None:
    output = tmp_path / "out"
    make(models / "linear.yml", output, 1, 2)
    folder = os.open(output / PARTS_NAME, os.O_RDONLY)
    try:
        with PartFiles(2, 2, folder, output).locked():
            with pytest.raises(OutputError, match="another run makes part 2"):
                make(models / "linear.yml", output, 2, 2, wait=0)
            make(models / "linear.yml", output, 1, 2)
    finally:
        os.close(folder)


def test_a_model_that_is_there_is_replaced_at_the_end(
    tmp_path: Path, models: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    recipe, output = models / "linear.yml", tmp_path / "out"
    write_model(output, random_arrays({"old": (3,)}, 0), "BF16")
    with pytest.raises(FileExistsError):
        make(recipe, output, 1, 2)
    make_all(recipe, output, 2, overwrite=True)
    assert (output / "model.safetensors").exists()
    with pytest.raises(FileExistsError):
        oxmerge.finish(output)
    oxmerge.finish(output, overwrite=True)
    assert directory_bytes(output) == whole["linear"]
    assert oxmerge.finish(output).files == 0
    oxmerge.merge(recipe, output, shard_size=SHARD, overwrite=True)
    with pytest.raises(OutputError, match="no parts") as caught:
        oxmerge.finish(output)
    assert caught.value.found == "a model that is complete"


def test_what_is_not_finite_is_told_at_the_end(tmp_path: Path) -> None:
    base = random_arrays({f"layers.{i}.weight": (64, 100) for i in range(8)}, 0)
    huge = {name: np.full_like(values, 3e38) for name, values in base.items()}
    for name in "ab":
        write_model(tmp_path / name, huge, "BF16")
    recipe = write_recipe(
        tmp_path / "r.yml", "linear", ["a", "b"], each={"weight": 3}, shared={"normalize": False}
    )
    output = tmp_path / "out"
    make_all(recipe, output, 2)
    with pytest.raises(PlanError, match=r"not finite|infinit"):
        oxmerge.finish(output)
    assert oxmerge.finish(output, allow_nonfinite=True).warnings


def test_what_cannot_be_made_in_parts(tmp_path: Path, models: Path) -> None:
    with pytest.raises(ValueError, match="digests"):
        make(models / "linear.yml", tmp_path / "out", 1, 2, digests=False)
    with pytest.raises(ValueError, match="from 1 to 2"):
        make(models / "linear.yml", tmp_path / "out", 3, 2)


def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path, models: Path) -> None:
    output = tmp_path / "out"
    make(models / "linear.yml", output, 1, 1)
    lock = output / PARTS_NAME / "finish.lock"
    lock.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        oxmerge.finish(output)
    assert caught.value.filename == str(lock)


def test_finishing_goes_on_after_it_failed_half_way(
    tmp_path: Path,
    models: Path,
    whole: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    make_all(models / "linear.yml", output, 3)
    rename, renamed = publish._rename, []

    def fail(*arguments: Any, **options: Any) -> None:
        renamed.append(arguments)
        if len(renamed) == 5:
            raise OSError(errno.EIO, "the disk is gone")
        rename(*arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(publish, "_rename", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            oxmerge.finish(output)
    assert not (output / "config.json").exists()
    assert not list(output.glob("model*"))
    oxmerge.finish(output)
    assert directory_bytes(output) == whole["linear"]


def test_the_command_line(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out")
    command = ["merge", str(models / "linear.yml"), output, f"--shard-size={SHARD}"]
    assert cli.main([*command, "--part=1/2"]) == 0
    assert "part 1 of 2 is made, but not yet part 2" in capsys.readouterr().err
    assert cli.main(["finish", output]) == 1
    assert "not yet part 2" in capsys.readouterr().err
    assert cli.main([*command, "--part=2/2"]) == 0
    assert "`oxmerge finish` completes" in capsys.readouterr().err
    assert cli.main(["finish", output, "--json"]) == 0
    assert cli.main([*command, "--part=3/2"]) == 2
    assert cli.main([*command, "--finish"]) == 2
    assert cli.main([*command, "--part=1/2", "--no-digests"]) == 2
    assert cli.main([*command, "--part=1/2", "--hash-inputs"]) == 2
    for name in ("hash_inputs", "allow_nonfinite"):
        asked: dict[str, Any] = {name: True}
        with pytest.raises(ValueError, match=f"{name} is for the part that completes"):
            RunOptions(part=(1, 2), **asked)
        assert RunOptions(part=(1, 2), finish=True, **asked).finish


PAGE = (Path(__file__).parent.parent / "python" / "CLUSTERS.md").read_text(encoding="utf-8")


def block(beginning: str) -> str:
    """Return the block of the guide that begins so."""
    return PAGE[PAGE.index(f"```sh\n{beginning}") :].split("```")[1].removeprefix("sh\n")


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe of the guide's name, where `oxmerge` is this one."""
    for seed, name in enumerate("ab"):
        shapes = {f"layers.{i}.weight": (400, 512) for i in range(10)}
        write_model(tmp_path / name, random_arrays(shapes, seed), "BF16")
    write_recipe(tmp_path / "recipe.yml", "linear", ["a", "b"], each={"weight": 0.5})
    program = tmp_path / "bin" / "oxmerge"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m oxmerge "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.slow
def test_the_block_for_slurm(guide: Path) -> None:
    """A stand-in runs the script as an array of tasks does."""
    script = guide / "job.sh"
    script.write_text(block("#!/bin/bash"))
    about = dict(re.findall(r"^#SBATCH (--\S+)=(\S+)$", script.read_text(), re.MULTILINE))
    first, last = map(int, about["--array"].split("-"))
    tasks = [
        subprocess.Popen(
            ["bash", script],
            cwd=guide,
            env=os.environ
            | {
                "SLURM_ARRAY_TASK_ID": str(task),
                "SLURM_ARRAY_TASK_COUNT": str(last - first + 1),
                "SLURM_CPUS_PER_TASK": about["--cpus-per-task"],
            },
        )
        for task in range(first, last + 1)
    ]
    assert [task.wait(timeout=600) for task in tasks] == [0, 0, 0, 0]
    check(guide, "merged-by-slurm")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("parallel") is None, reason="not installed: GNU parallel")
def test_the_block_for_gnu_parallel(guide: Path) -> None:
    subprocess.run(["bash", "-c", block("seq")], cwd=guide, check=True, timeout=600)
    check(guide, "merged")


def check(folder: Path, output: str) -> None:
    oxmerge.merge(folder / "recipe.yml", folder / "whole", shard_size="1MB")
    assert directory_bytes(folder / output) == directory_bytes(folder / "whole")


def test_what_others_wrote_is_not_believed(tmp_path: Path, models: Path) -> None:
    recipe, output = models / "nan.yml", tmp_path / "out"
    make_all(recipe, output, 2)
    shared = output / PARTS_NAME
    before = {path: path.read_bytes() for path in shared.iterdir() if path.is_file()}
    numbers = shared / "1of2.numbers"
    lines = before[numbers].splitlines(keepends=True)
    # Cut off, of another plan, with a tensor that there is not.
    for damage in (b"".join(lines[:-1]), b"".join(lines[1:]), b"x" * 200 + b"\n"):
        numbers.write_bytes(damage)
        (shared / "2of2.done").unlink(missing_ok=True)
        for path in (shared / "2of2").iterdir():
            path.unlink()
        with pytest.raises(OutputError):
            make(recipe, output, 2, 2, wait=0)
    for name in ("1of2.done", "1of2.key"):
        for text in (b"", b"[]", b"{}", b'{"key": 3, "shards": {"x": 1}}', b"\xff", b"[" * 10**6):
            (shared / name).write_bytes(text)
            with pytest.raises(OutputError):
                oxmerge.finish(output)
    (shared / "1of2.done").write_bytes(before[shared / "1of2.done"].replace(b"model-", b"../..-"))
    with pytest.raises(OutputError):
        oxmerge.finish(output)
    whole_key = json.loads(before[shared / "1of2.key"])
    for key in (
        3, "", "[" * 5000, '{"inputs": 3}', "\ud800", json.dumps({"inputs": [[1]] * 4}),
    ):  # fmt: skip
        (shared / "1of2.key").write_text(json.dumps(whole_key | {"key": key}))
        with pytest.raises(OutputError, match=r"damaged|another"):
            make(recipe, output, 2, 2)
    for name, value in (("paths", [3]), ("marks", 1), ("marks", [[]]), ("states", {}), ("host", 0)):
        (shared / "1of2.key").write_text(json.dumps(whole_key | {name: value}))
        with pytest.raises(OutputError, match="damaged"):
            make(recipe, output, 2, 2)
    for path, data in before.items():
        path.write_bytes(data)
    make(recipe, output, 2, 2)
    oxmerge.finish(output)


#: The command line, which writes down at once what is finished.
OFTEN = """
import functools, sys
from oxmerge import _core, cli
_core.execute = functools.partial(_core.execute, journal_every=0.01)
sys.exit(cli.main(sys.argv[1:]))
"""


def start(command: Sequence[str], output: Path) -> subprocess.Popen[str]:
    """Start a command, and wait until it has written down something that is finished."""
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600
    # The first line is the key.
    while not any(path.read_bytes().count(b"\n") > 1 for path in output.rglob(".oxmerge_resume*")):
        assert process.poll() is None, "it ended before it wrote anything down"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe that one thread merges in a second, in four files."""
    folder = tmp_path_factory.mktemp("slow")
    for name in ("base", "a", "b"):
        shapes = {f"layers.{i}": (1 << 9, 1 << 12) for i in range(20)}
        write_sparse(folder / name / "model.safetensors", shapes)
        (folder / name / "config.json").write_text('{"model_type": "test"}')
    each = {"weight": 0.5, "density": 0.5}
    yield write_recipe(folder / "slow.yml", "ties", ["a", "b"], base="base", each=each)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_killed_part_goes_on(tmp_path: Path, slow: Path) -> None:
    output = tmp_path / "out"
    options = ["--shard-size=25MB", "--threads=1", "--quiet", "--part=1/2"]
    command = [sys.executable, "-c", OFTEN, "merge", str(slow), str(output), *options]
    process = start(command, output)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    for part in (1, 2):
        report = oxmerge.merge(
            slow, output, shard_size="25MB", memory="2GiB", part=(part, 2), finish=True
        )
    assert any("an interrupted run had finished" in note for note in report.notes)
    assert not list(output.glob(".*"))
