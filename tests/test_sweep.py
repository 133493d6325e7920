"""A sweep writes what single merges would, in one pass, and nothing where it fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from oxmerge.errors import PlanError, RecipeError
from oxmerge.sweeping import parse_values, variants
from writers import directory_bytes, random_arrays, write_model, write_recipe

if TYPE_CHECKING:
    from pathlib import Path

WEIGHT, DENSITY = "models[0].parameters.weight", "models[1].parameters.density"
ROOM: dict[str, Any] = {"memory": "4GiB", "seed": 5}


def recipe_of(folder: Path, family: Path, method: str, **more: Any) -> Path:
    models = [family / "a"] if method == "slerp" else [family / "a", family / "b"]
    each = {} if method == "slerp" else {"weight": 0.4, "density": 0.5}
    if method in {"linear", "nuslerp"}:
        each = {"weight": 0.4}
    base = None if method == "linear" else family / "base"
    return write_recipe(folder / "r.yml", method, models, base=base, each=each, **more)


def weights_of(folder: Path) -> dict[str, bytes]:
    names = ("model", "config.json")
    return {name: b for name, b in directory_bytes(folder).items() if name.startswith(names)}


CASES: dict[str, dict[str, Any]] = {
    "linear": {WEIGHT: [0.0, 0.25, 1]},
    "slerp": {"parameters.t": "0:1:5"},
    "nuslerp": {WEIGHT: "0.1,0.9"},
    "task_arithmetic": {"parameters.lambda": "0.5,1"},
    "ties": {WEIGHT: "0.1:0.9:3", DENSITY: "0.2,1"},
    "dare_ties": {"parameters.lambda": "0.5,1,1.5"},
    "dare_linear": {DENSITY: "0,0.5,1"},
}


@pytest.mark.parametrize("method", CASES)
def test_outputs_are_those_of_single_merges(tmp_path: Path, family: Path, method: str) -> None:
    shared = {"t": 0.5} if method == "slerp" else {"lambda": 1.0} if "_" in method else {}
    recipe = recipe_of(tmp_path, family, method, shared=shared, dtype="bfloat16")
    made = variants(recipe, str(tmp_path / "all" / "{n}"), CASES[method])
    reports = oxmerge.sweep(recipe, str(tmp_path / "all" / "{n}"), CASES[method], **ROOM)
    assert [report.directory for report in reports] == [variant.directory for variant in made]
    seen = set()
    for at, variant in enumerate(made):
        single = oxmerge.merge(variant.recipe, tmp_path / "single" / str(at), **ROOM)
        weights = weights_of(tmp_path / "all" / str(at))
        assert weights == weights_of(tmp_path / "single" / str(at))
        assert reports[at].bytes_written == single.bytes_written
        seen.add(weights["model.safetensors"])
    assert len(seen) == len(made)


def test_inputs_are_read_once_for_all(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "ties")
    single = oxmerge.merge(recipe, tmp_path / "single", **ROOM)
    reports = oxmerge.sweep(recipe, str(tmp_path / "w{weight}"), {WEIGHT: "0.1:0.9:9"}, **ROOM)
    assert len(reports) == 9
    # The thresholds are found once. One output is computed while they are looked for; nine outputs
    # are more than what that would save, so the inputs are read again for all of them.
    assert single.bytes_read < reports[0].bytes_read < 2 * single.bytes_read
    assert (tmp_path / "w0.3" / "model.safetensors").exists()
    seconds, written = reports[0].seconds, 9 * reports[0].bytes_written
    assert reports[0].written_gb_per_second == written / seconds / 1e9


def test_the_recipe_beside_an_output_makes_it_again(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "linear")
    oxmerge.sweep(recipe, str(tmp_path / "w{0}"), {WEIGHT: [0.2, 0.7]}, **ROOM)
    [written] = (tmp_path / "w0.7").glob("*.y*ml")
    oxmerge.merge(written, tmp_path / "again", **ROOM)
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "w0.7")


def test_every_combination_or_in_step(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "ties")
    axes = {WEIGHT: [0.1, 0.9], "models[1].parameters.weight": [0.9, 0.1]}
    grid = variants(recipe, "out/{0}-{1}", axes)
    assert [v.directory for v in grid] == [
        "out/0.1-0.9",
        "out/0.1-0.1",
        "out/0.9-0.9",
        "out/0.9-0.1",
    ]
    step = variants(recipe, "out/{n}", axes, together=True)
    assert [list(v.settings.values()) for v in step] == [[0.1, 0.9], [0.9, 0.1]]
    assert [v.directory for v in step] == ["out/0", "out/1"]


@pytest.mark.parametrize(
    ("pattern", "values", "directories"),
    [
        ("w{weight}", [0.3, 1, 1.5], ["w0.3", "w1", "w1.5"]),
        ("w{weight}", "0:1:3", ["w0", "w0.5", "w1"]),
        ("w{0}", [1 / 3, 2 / 3], ["w0.333333", "w0.666667"]),
        ("w{0}", [0.12345671, 0.12345672], ["w0.12345671", "w0.12345672"]),
        ("w{0}", [0.1 + 0.2, 0.3], ["w0.30000000000000004", "w0.3"]),
        ("w{0}", [1, 1.0000001], ["w1", "w1.0000001"]),
        ("{n:03}", [0.1, 0.2], ["000", "001"]),
        ("{weight:.2f}", [0.1, 1], ["0.10", "1.00"]),
        ("{}-{weight!s}", [0.1], ["0.1-0.1"]),
        ("{weight}", 0.5, ["0.5"]),
        ("{weight}", True, ["True"]),
    ],
)
def test_directories(
    tmp_path: Path, family: Path, pattern: str, values: Any, directories: list[str]
) -> None:
    recipe = recipe_of(tmp_path, family, "linear")
    assert [v.directory for v in variants(recipe, pattern, {WEIGHT: values})] == directories


def test_a_name_that_two_places_end_in_stands_for_neither(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "linear")
    axes = {WEIGHT: [0.1, 0.2], "models[1].parameters.weight": [0.5]}
    assert [v.directory for v in variants(recipe, "{0}-{1}", axes)] == ["0.1-0.5", "0.2-0.5"]
    with pytest.raises(RecipeError, match=r"cannot fill in `w\{weight\}`") as caught:
        variants(recipe, "w{weight}", axes)
    assert caught.value.found == "several places that end in `weight`"
    assert caught.value.advice == "it may hold {0}, {1}, {n}"


def test_recipes_and_paths_as_merge_takes_them(tmp_path: Path, family: Path) -> None:
    path = recipe_of(tmp_path, family, "linear")
    recipe = oxmerge.Recipe.from_yaml(path)
    pattern = tmp_path / "w{weight}"
    reports = oxmerge.sweep(recipe, pattern, {WEIGHT: 0.7}, read_path="positioned", **ROOM)
    assert [report.directory for report in reports] == [str(tmp_path / "w0.7")]
    [variant] = variants(path, pattern, {WEIGHT: 0.7})
    assert variants(recipe, pattern, {WEIGHT: 0.7}) == [variant]
    assert variant.recipe.folder == str(tmp_path)
    assert len(variants(variant.recipe, pattern, {WEIGHT: "0:1:4"})) == 4
    with pytest.raises(ValueError, match="read_path must be one of"):
        oxmerge.sweep(recipe, pattern, {WEIGHT: 0.7}, read_path="fast")
    message = '^vram has no effect on the CPU; pass device="cuda", or leave vram out$'
    for act in (
        lambda: oxmerge.sweep(recipe, pattern, {WEIGHT: 0.7}, vram="1GiB"),
        lambda: oxmerge.merge(recipe, tmp_path / "out", vram="1GiB"),
        lambda: oxmerge.plan(recipe, vram=1 << 30),
    ):
        with pytest.raises(ValueError, match=message):
            act()


def test_what_aliases_share_is_set_in_one_place() -> None:
    recipe = (
        "merge_method: ties\nbase_model: base\nmodels:\n"
        "  - model: a\n    parameters: &same {weight: 0.5, density: 0.5}\n"
        "  - model: b\n    parameters: *same\n"
    )
    made = variants(recipe, "out/{n}", {WEIGHT: [0.1, 0.9]})
    weights = [
        [source.parameters["weight"].choices[0].values for source in variant.recipe.models]
        for variant in made
    ]
    assert weights == [[(0.1,), (0.5,)], [(0.9,), (0.5,)]]


def test_values() -> None:
    assert parse_values("1e-13:9e-13:3") == [1e-13, 5e-13, 9e-13]
    assert parse_values("-0.3:0.3:7") == [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]
    assert parse_values("0:0:2") == [0.0, 0.0]
    assert parse_values("-1.7e308:0:2") == [-1.7e308, 0.0]
    assert parse_values("0.1:0.9:9") == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert parse_values("1e-3") == [0.001]
    assert parse_values("5:5:1") == [5.0]
    assert parse_values("bfloat16,float32") == ["bfloat16", "float32"]


def test_numbers_of_numpy_are_numbers(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "linear")
    for values in (np.arange(1, 3), np.linspace(1, 2, 2, dtype=np.float32)):
        made = variants(recipe, "w{0}", {WEIGHT: values})
        assert [variant.directory for variant in made] == ["w1", "w2"]


@pytest.mark.parametrize(
    ("pattern", "axes", "message"),
    [
        ("out", {WEIGHT: "1,2"}, "`out` gives several merges the same directory"),
        ("out/{x}", {WEIGHT: "1,2"}, "cannot fill in `out/{x}`"),
        ("out/{1}", {WEIGHT: "1,2"}, "cannot fill in `out/{1}`"),
        ("out/{", {WEIGHT: "1,2"}, "cannot fill in `out/{`"),
        ("out/{0.x}", {WEIGHT: "1,2"}, "cannot fill in `out/{0.x}`"),
        ("out/{0[a]}", {WEIGHT: "1,2"}, "cannot fill in `out/{0[a]}`"),
        ("out/{n.real}", {WEIGHT: "1,2"}, "cannot fill in `out/{n.real}`"),
        ("out/{n:s}", {WEIGHT: "1,2"}, "cannot fill in `out/{n:s}`"),
        ("out/{0:.2f}", {WEIGHT: "0.001,0.002"}, "`out/{0:.2f}` gives several merges the same"),
        ("out/{n}", {WEIGHT: "inf:1:3"}, "`inf:1.0:3` is not finite"),
        ("out/{n}", {WEIGHT: "-1e308:1e308:3"}, "`-1e+308:1e+308:3` is not finite"),
        ("out/{n}", {WEIGHT: "1,.nan"}, "`nan` is not finite"),
        ("out/{n}", {}, "a sweep needs something to vary"),
        ("out/{n}", {WEIGHT: ""}, "`` lists no values"),
        ("out/{n}", {WEIGHT: "1,,2"}, "`1,,2` lists no values"),
        ("out/{n}", {WEIGHT: "a:b:3"}, "`a:b:3` lists no values"),
        ("out/{n}", {WEIGHT: "[0,1]"}, "`[0,1]` lists no values"),
        ("out/{n}", {WEIGHT: "0:1:1000"}, "`0:1:1000` has 1000 values"),
        (
            "out/{n}",
            {"models[7].parameters.weight": "1"},
            "there is no `models[7].parameters.weight` in the recipe: found 2 entries and no `[7]`",
        ),
        ("out/{n}", {f"models[{'9' * 5000}]": "1"}, "there is no `models[999"),
        ("out/{n}", {"merge_method.x": "1"}, "there is no `merge_method.x`"),
        ("out/{n}", {"models[0": "1"}, "there is no `models[0`"),
        ("out/{n}", {"": "1"}, "there is no ``"),
        ("out/{n}", {"parameters.t": "0:1:256", WEIGHT: "1,2"}, "the values make more than 256"),
    ],
)
def test_what_makes_no_sense(
    tmp_path: Path, family: Path, pattern: str, axes: dict[str, str], message: str
) -> None:
    recipe = recipe_of(tmp_path, family, "linear")
    with pytest.raises(RecipeError) as caught:
        variants(recipe, pattern, axes)
    assert str(caught.value).startswith(message)


def test_places_in_step_need_as_many_values(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "linear")
    axes = {WEIGHT: "1,2", "models[1].parameters.weight": "1,2,3"}
    with pytest.raises(RecipeError, match="as many values each"):
        variants(recipe, "out/{n}", axes, together=True)


def test_a_parameter_that_the_dialect_does_not_know(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "linear")
    with pytest.raises(RecipeError, match="did you mean `parameters`"):
        oxmerge.sweep(recipe, str(tmp_path / "{n}"), {"models[0].parameter.weight": "1,2"})


def test_merges_of_other_tensors_are_refused_and_leave_nothing(
    tmp_path: Path, family: Path
) -> None:
    recipe = recipe_of(tmp_path, family, "linear")
    models = [str(family / "a"), str(family / "c")]
    with pytest.raises(PlanError, match="must have the same input files"):
        oxmerge.sweep(recipe, str(tmp_path / "out" / "{n}"), {"models[0].model": models}, **ROOM)
    assert not (tmp_path / "out").exists()


def test_a_float64_beside_others_is_refused(tmp_path: Path, family: Path) -> None:
    """It would make the others be computed in float64 too, and so differ from single merges."""
    recipe = recipe_of(tmp_path, family, "linear")
    with pytest.raises(PlanError, match="the same working type"):
        oxmerge.sweep(recipe, str(tmp_path / "{n}"), {"dtype": "bfloat16,float64"}, **ROOM)
    oxmerge.sweep(recipe, str(tmp_path / "{n}"), {"dtype": "bfloat16,float32"}, **ROOM)
    single = write_recipe(
        tmp_path / "single.yml",
        "linear",
        [family / "a", family / "b"],
        each={"weight": 0.4},
        dtype="float32",
    )
    oxmerge.merge(single, tmp_path / "single", **ROOM)
    assert weights_of(tmp_path / "1") == weights_of(tmp_path / "single")


@pytest.mark.parametrize("axis", ["dtype", "out_dtype"])
def test_types_with_small_shards(tmp_path: Path, axis: str) -> None:
    """Shards hold other tensors then, and within a shard integers lie elsewhere."""
    for seed, name in enumerate(("a", "b")):
        arrays = random_arrays({f"w{at}": (at + 2, 40) for at in range(6)}, seed)
        counts = {f"w{at}.count": np.full(9, at, np.int32) for at in range(6)}
        mixed = {
            name: part
            for pair in zip(arrays.items(), counts.items(), strict=True)
            for name, part in pair
        }
        write_model(tmp_path / name, mixed, "F32")
    each = {"weight": 0.4}
    path = tmp_path / "r.yml"
    recipe = write_recipe(path, "linear", [tmp_path / "a", tmp_path / "b"], each=each)
    room = ROOM | {"shard_size": 700}
    types = ["bfloat16", "float32"]
    oxmerge.sweep(recipe, str(tmp_path / "all" / "{n}"), {axis: types}, **room)
    for number, variant in enumerate(variants(recipe, "{n}", {axis: types})):
        single = tmp_path / "single" / str(number)
        oxmerge.merge(variant.recipe, single, **room)
        assert len(weights_of(single)) > 4
        assert weights_of(tmp_path / "all" / str(number)) == weights_of(single)


def test_an_output_in_the_way_stops_all(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "linear")
    (tmp_path / "w2").mkdir()
    (tmp_path / "w2" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        oxmerge.sweep(recipe, str(tmp_path / "w{weight}"), {WEIGHT: [1, 2]}, **ROOM)
    assert not (tmp_path / "w1").exists()
    assert [path.name for path in (tmp_path / "w2").iterdir()] == ["notes.txt"]


def test_every_value_that_cannot_be_is_told_at_once(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "ties")
    with pytest.raises(PlanError) as caught:
        oxmerge.sweep(recipe, str(tmp_path / "{n}"), {DENSITY: [0.5, 2, -1]}, **ROOM)
    assert [problem.found for problem in caught.value.problems] == ["2", "-1"]
    with pytest.raises(RecipeError) as told:
        oxmerge.sweep(recipe, str(tmp_path / "{n}"), {"dtype": ["bf8", "float16", "x"]}, **ROOM)
    assert len(told.value.problems) == 2
    # What is wrong with all of them is told once.
    recipe.write_text(recipe.read_text().replace("merge_method", "metod: x\nmerge_method"))
    with pytest.raises(RecipeError) as once:
        oxmerge.sweep(recipe, str(tmp_path / "{n}"), {"seed": [1, 2]}, **ROOM)
    assert sum("metod" in problem.message for problem in once.value.problems) == 1
