"""Recipes of several merges: later ones read what earlier ones make."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
import yaml
import zoo
from oxmerge import merging
from oxmerge.arrays import lazily
from oxmerge.cli import main
from oxmerge.output import publish
from writers import random_arrays, write_model

if TYPE_CHECKING:
    from collections.abc import Sequence

SHAPES = {"embed.weight": (70, 33), "layers.0.weight": (257, 129), "scale": (7,)}
FIRST = """\
merge_method: ties
base_model: a
models:
- model: b
  parameters: {weight: 1, density: 0.4}
- model: c
  parameters: {weight: 0.5, density: 0.6}
dtype: bfloat16
"""
SECOND = """\
merge_method: linear
models:
- model: FIRST
  parameters: {weight: 0.7}
- model: d
  parameters: {weight: 0.6}
"""
LAST = """\
merge_method: slerp
base_model: SECOND
models:
- model: SECOND
- model: FIRST
parameters: {t: 0.3}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("abcd"):
        write_model(tmp_path / name, random_arrays(SHAPES, seed), "BF16")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stream(*documents: str) -> str:
    return "---\n".join(documents).replace("FIRST", "first").replace("SECOND", "second")


ALL = (f"name: second\n{SECOND}", f"name: first\n{FIRST}", LAST)


def weights(folder: str | Path) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def in_steps() -> bytes:
    """Merge the same one by one."""
    oxmerge.merge(FIRST, "by-hand/first")
    oxmerge.merge(SECOND.replace("FIRST", "by-hand/first"), "by-hand/second")
    last = LAST.replace("FIRST", "by-hand/first").replace("SECOND", "by-hand/second")
    oxmerge.merge(last, "by-hand/last")
    return weights("by-hand/last")


def test_the_bytes_are_those_of_one_merge_after_another(folder: Path) -> None:
    Path("recipe.yml").write_text(stream(*ALL))
    report = oxmerge.merge("recipe.yml", "out")
    assert weights("out") == in_steps()
    assert [note.partition(":")[0] for note in report.notes[:2]] == [
        "`first` was merged first",
        "`second` was merged first",
    ]
    # The outputs of the first two are gone, the recipe is kept whole.
    assert not [name for name in os.listdir("out") if name.startswith(".")]
    assert sorted(os.listdir()) == sorted(["a", "b", "by-hand", "c", "d", "out", "recipe.yml"])
    assert Path("out", "oxmerge_recipe.yml").read_text() == stream(*ALL)


def test_a_plan_of_several_merges(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = oxmerge.plan(stream(*ALL))
    assert [stage.recipe.name for stage in plan.stages] == ["first", "second"]
    assert plan.disk > sum(stage.disk for stage in plan.stages) > 0
    assert str(plan).startswith("first     `first`: ties, 3 tensors, writes")
    assert plan.as_dict()["stages"][1]["method"] == "linear"
    oxmerge.merge(plan, "out")
    assert weights("out") == in_steps()
    Path("recipe.yml").write_text(stream(*ALL))
    assert main(["plan", "recipe.yml", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["stages"]) == 2


def test_a_plan_of_several_merges_is_saved(folder: Path) -> None:
    plan = oxmerge.plan(stream(*ALL), seed=3, shard_size=60_000)
    plan.save("plan.json")
    loaded = oxmerge.load_plan("plan.json", memory="4GiB")
    assert (str(loaded), loaded.seed) == (str(oxmerge.plan(plan, memory="4GiB")), 3)
    oxmerge.merge("plan.json", "loaded")
    oxmerge.merge(plan, "out")
    files = [name for name in os.listdir("out") if name.endswith(".safetensors")]
    assert len(files) > 1
    for name in files:
        assert Path("loaded", name).read_bytes() == Path("out", name).read_bytes()
    text = Path("plan.json").read_text()
    for old, new, match in (
        ('{"oxmerge_plan":', '{"oxmerge_plan":9', "another version"),
        ('"seed": 3', '"seed": -1', "out of range"),
        ('"recipe_text": "', '"recipe_text": "a", "x": "', "not what|mapping"),
        ('"effect": "', '"effect": "0', "are not what they were"),
        ('"merges":{', '"merges":[{', "no plan that oxmerge saved"),
    ):
        assert old in text
        Path("plan.json").write_text(text.replace(old, new))
        with pytest.raises(oxmerge.OxmergeError, match=match):
            oxmerge.load_plan("plan.json")
    Path("plan.json").write_text(text)
    os.utime("b/model.safetensors", ns=(0, 0))
    with pytest.raises(oxmerge.PlanError, match="the files that they read, are not what they were"):
        oxmerge.load_plan("plan.json")


def test_tensors_of_several_merges_are_computed_when_asked_for(folder: Path) -> None:
    oxmerge.merge(stream(*ALL), "out")
    plan = oxmerge.plan(stream(*ALL))
    assert plan.stand_ins is not None
    stand_in = Path(plan.stand_ins.folder, "0", "model.safetensors")
    assert stand_in.stat().st_size > 60_000
    lazy = oxmerge.lazy(plan)
    empty = stand_in.stat().st_blocks
    with oxmerge.open("out") as merged:
        np.testing.assert_array_equal(lazy["scale"], np.asarray(merged["scale"]))
        # Only what that tensor needs was made.
        assert stand_in.stat().st_blocks <= empty + 16
        for name in [*merged, *merged]:
            np.testing.assert_array_equal(lazy[name], np.asarray(merged[name]))
    oxmerge.save(lazy, "saved")
    assert weights("saved") == weights("out")


class _Interrupted(io.FileIO):
    """A file of which a write is interrupted when it is done."""

    def write(self, data: Any) -> int:
        super().write(data)
        raise KeyboardInterrupt


def test_a_tensor_that_is_interrupted_is_computed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in keeps its time: with another one it would be an input that has changed."""
    oxmerge.merge(stream(*ALL), "out")
    lazy = oxmerge.lazy(stream(*ALL))
    monkeypatch.setattr(lazily, "open", _Interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        lazy["scale"]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    with oxmerge.open("out") as merged:
        np.testing.assert_array_equal(lazy["scale"], np.asarray(merged["scale"]))


SWEPT = (f"name: second\n{SECOND}", f"name: first\n{FIRST}", f"{LAST}# the end\n")


@pytest.mark.parametrize(
    ("place", "made"),
    [
        # What the place does not change is made once; of others there is one for each value.
        ("parameters.t", ["first", "second"]),
        ("[second].models[1].parameters.weight", ["first", "second", "second"]),
        ("[first].models[b].parameters.weight", ["first", "first", "second", "second"]),
    ],
)
def test_any_place_in_several_merges_is_swept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, made: list[str]
) -> None:
    run: list[str] = []
    together = merging.merge_together

    def watched(merges: Any, *args: Any, **options: Any) -> Any:
        run.extend(recipe.name for recipe, _ in merges if isinstance(recipe.name, str))
        return together(merges, *args, **options)

    monkeypatch.setattr(merging, "merge_together", watched)
    reports = oxmerge.sweep(stream(*SWEPT), "x{n}", {place: [0.25, 0.5]})
    assert sorted(run) == made
    assert [report.directory for report in reports] == ["x0", "x1"]
    assert weights("x0") != weights("x1")
    for number, value in enumerate(("0.25", "0.5")):
        text = Path(f"x{number}", "oxmerge_recipe.yml").read_text()
        # The recipe beside each is the text that was given, with another value.
        assert value in text
        assert text.endswith("# the end\n")
        monkeypatch.undo()
        monkeypatch.chdir(folder)
        oxmerge.merge(text, f"y{number}")
        assert weights(f"x{number}") == weights(f"y{number}")
        notes = [note for note in reports[number].notes if "merged first" in note]
        assert len(notes) == 2
    assert not [name for name in os.listdir("x0") + os.listdir("x1") if name.startswith(".")]


def test_what_is_wrong_with_a_sweep_of_several_merges_is_told(folder: Path) -> None:
    for place, message in (
        ("[third].parameters.t", r"no merge `\[third\].parameters.t`.*\n.*`\[second\]`"),
        ("[first].models[d].parameters.weight", "no model `d` there"),
        ("[first].parameters.int8_mask", "make no difference"),
    ):
        values = [True, False] if "mask" in place else [0.25, 0.5]
        with pytest.raises(oxmerge.RecipeError, match=message):
            oxmerge.sweep(stream(*SWEPT), "x{n}", {place: values})
    assert sorted(os.listdir()) == ["a", "b", "c", "d"]


def test_stand_ins_go_with_the_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder / "tmp"))
    plan = oxmerge.plan(stream(*ALL))
    assert len(os.listdir("tmp")) == 1
    del plan
    assert os.listdir("tmp") == []
    with pytest.raises(oxmerge.PlanError):
        oxmerge.plan(stream(*ALL).replace("model: d", "model: none"))
    assert os.listdir("tmp") == []


def test_nothing_is_left_of_earlier_merges_when_a_later_one_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out").mkdir()
    Path("out", "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        oxmerge.merge(stream(*ALL), "out")
    assert sorted(os.listdir()) == ["a", "b", "c", "d", "out"]

    claim = publish.prepare_output

    def stop(directory: str, **options: Any) -> publish.OutputDirectory:
        if str(directory).endswith("oxmerge-partial/2"):
            assert weights("new/.stages.oxmerge-partial/1")
            raise RuntimeError("enough")
        return claim(directory, **options)

    monkeypatch.setattr("oxmerge.merging.prepare_output", stop)
    with pytest.raises(RuntimeError, match="enough"):
        oxmerge.merge(stream(*ALL), "new")
    assert sorted(os.listdir()) == ["a", "b", "c", "d", "out"]


FAULTS: list[tuple[Sequence[str], str]] = [
    ((FIRST, SECOND), "merge_method (line 10): a second merge without a name"),
    (
        (f"name: x\n{FIRST}", f"name: x\n{FIRST}", SECOND),
        "name (line 11): a second merge with the name `x`",
    ),
    (
        (f"name: first\n{FIRST}", f"name: second\n{FIRST}"),
        "name (line 1): several merges, of which one should be the output: found `first`, `second`",
    ),
    (
        (f"name: first\n{SECOND.replace('FIRST', 'SECOND')}", f"name: second\n{SECOND}", LAST),
        "name (line 9): these merges read each other's outputs: `second` -> `first` -> `second`",
    ),
    ((f"name: [1]\n{FIRST}", LAST), "name (line 1): a name is text without `+` and `@`: found [1]"),
]


@pytest.mark.parametrize(("documents", "message"), FAULTS)
def test_merges_that_do_not_fit_each_other(
    folder: Path, documents: Sequence[str], message: str
) -> None:
    with pytest.raises(oxmerge.RecipeError) as caught:
        oxmerge.plan(stream(*documents))
    assert message in str(caught.value)


def test_every_merge_is_checked_before_the_first_runs(folder: Path) -> None:
    text = stream(*ALL).replace("t: 0.3", "q: 0.3").replace("model: d", "model: none")
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.merge(text, "out")
    assert [problem.code for problem in caught.value.problems] == [
        "missing-model",
        "unknown-parameter",
    ]
    assert not Path("out").exists()


def test_a_merge_that_no_other_reads_is_told_and_left_out(folder: Path) -> None:
    plan = oxmerge.plan(stream(f"name: idle\n{FIRST}", FIRST))
    assert plan.stages == ()
    (warning,) = plan.warnings
    assert str(warning).startswith("name (line 1): the output of the merge `idle` is read by no")


def test_a_plan_keeps_its_seed_and_sizes(folder: Path) -> None:
    text = stream(*ALL).replace("merge_method: ties", "merge_method: dare_ties")
    oxmerge.merge(text, "direct", seed=7, shard_size=20_000)
    oxmerge.merge(oxmerge.plan(text, seed=7, shard_size=20_000), "planned")
    files = sorted(path.name for path in Path("direct").glob("*.safetensors"))
    assert len(files) > 1
    for name in files:
        assert Path("planned", name).read_bytes() == Path("direct", name).read_bytes()


@pytest.mark.parametrize("name", ["b", "d"])
def test_no_input_of_any_merge_is_replaced(folder: Path, name: str) -> None:
    before = weights(name)
    with pytest.raises(oxmerge.OutputError, match="which is an input of the merge"):
        oxmerge.merge(stream(*ALL), name, overwrite=True)
    assert weights(name) == before


def test_the_last_merge_may_have_a_name(folder: Path) -> None:
    named = (*ALL[:2], f"name: last\n{LAST}")
    oxmerge.merge(stream(*named), "out")
    assert weights("out") == in_steps()


def test_empty_documents_are_passed_over(folder: Path) -> None:
    plan = oxmerge.plan(f"---\n{FIRST}---\n")
    assert plan.stages == ()


def test_configs_and_tokenizers_go_through_all_merges(folder: Path) -> None:
    for name in ("x", "y"):
        zoo.write(folder / name, zoo.llama(2))
        Path(name, "tokenizer_config.json").write_text("{}")
    first = "name: first\nmerge_method: passthrough\nslices:\n- sources: [{model: x, layer_range: "
    first += "[0, 2]}]\n- sources: [{model: y, layer_range: [1, 2]}]\n"
    second = "merge_method: linear\nmodels:\n- {model: first, parameters: {weight: 1}}\n"
    oxmerge.merge(stream(first, second), "out")
    assert json.loads(Path("out", "config.json").read_text())["num_hidden_layers"] == 3
    assert Path("out", "tokenizer_config.json").read_text() == "{}"


def test_the_card_names_what_all_merges_were_made_from(folder: Path) -> None:
    oxmerge.merge(stream(*ALL), "out")
    front = yaml.safe_load(Path("out", "README.md").read_text().split("---")[1])
    assert set(front["base_model"]) == set("abcd")


def test_a_run_that_was_killed_leaves_nothing_in_the_way(folder: Path) -> None:
    Path("recipe.yml").write_text(stream(*ALL))
    program = (
        "import os, signal, oxmerge\n"
        "from oxmerge.output import publish\n"
        "claim = publish.prepare_output\n"
        "def stop(directory, **options):\n"
        "    if str(directory).endswith('partial/2'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return claim(directory, **options)\n"
        "import oxmerge.merging\n"
        "oxmerge.merging.prepare_output = stop\n"
        "oxmerge.merge('recipe.yml', 'out')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir("out") == [".stages.oxmerge-partial"]
    oxmerge.merge("recipe.yml", "out")
    assert weights("out") == in_steps()
    assert not [name for name in os.listdir("out") if name.startswith(".")]


def test_nothing_beside_the_output_is_touched(folder: Path) -> None:
    Path("out.stage-1").mkdir()
    Path("out.stage-1", "mine.txt").write_text("mine")
    oxmerge.merge(stream(*ALL), "out")
    assert Path("out.stage-1", "mine.txt").read_text() == "mine"


def test_a_temporary_directory_that_cannot_be_used_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder / "nowhere"))
    with pytest.raises(oxmerge.OutputError, match="set `TMPDIR`"):
        oxmerge.plan(stream(*ALL))
