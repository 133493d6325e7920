"""One report: from the first key of a recipe to the last shape, every problem is told at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
import zoo
from oxmerge.cli import main
from oxmerge.problems import CODES

if TYPE_CHECKING:
    from oxmerge import Problem

SOURCES = Path(oxmerge.__file__).parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    zoo.write(tmp_path / "a", zoo.llama(2))
    zoo.write(tmp_path / "same", zoo.llama(2))
    zoo.write(tmp_path / "wide", zoo.llama(3, width=32))
    zoo.write(tmp_path / "tokens", zoo.llama(2, vocabulary=48))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(text: str, **options: Any) -> tuple[Problem, ...]:
    Path("recipe.yml").write_text(text)
    with pytest.raises((oxmerge.RecipeError, oxmerge.PlanError)) as caught:
        oxmerge.plan("recipe.yml", **options)
    problems: tuple[Problem, ...] = caught.value.problems
    return problems


def codes(text: str, **options: Any) -> list[str]:
    return [problem.code for problem in report(text, **options)]


EVERYTHING = """\
merge_method: tiess
base_model: a
models:
- model: wide
  parameters: {wieght: 1}
- model: nowhere
  parameters:
    density: 0,5
- same
- model: tokens
paramters: {}
dtype: float8_e4m3fn
dtype: bfloat16
"""


def test_a_recipe_and_its_models_have_one_report(folder: Path) -> None:
    problems = report(EVERYTHING)
    assert [(each.code, each.where and each.where.line) for each in problems] == [
        ("unknown-method", 1),
        ("unknown-parameter", 5),
        ("missing-model", 6),
        ("wrong-value", 9),
        ("unknown-key", 11),
        ("duplicate-key", 13),
        ("tensor-shape", None),
        ("other-size", None),
    ]
    assert str(problems[1].where) == "models[0].parameters.wieght (recipe.yml:5:16)"
    assert (problems[1].where or oxmerge.problems.Place()).column == 16
    size = problems[-1]
    assert size.expected == (
        "`hidden_size` 16, `intermediate_size` 32, `head_dim` 8, `num_hidden_layers` 2"
    )
    assert size.found == "32, 64, 16, 3"
    assert size.count == 21
    assert len(size.tensors) == 3
    assert folder.name in str(size.file)


def test_a_faulty_recipe_is_a_recipe_error(folder: Path) -> None:
    Path("recipe.yml").write_text(EVERYTHING)
    with pytest.raises(oxmerge.RecipeError):
        oxmerge.plan("recipe.yml")
    with pytest.raises(oxmerge.RecipeError):
        oxmerge.Recipe.from_yaml("recipe.yml")
    with pytest.raises(oxmerge.PlanError):
        oxmerge.plan({"merge_method": "linear", "models": [{"model": "none"}]})


def test_what_cannot_be_read_has_no_consequences(folder: Path) -> None:
    # None of these is a missing base, a wrong count or a missing weight besides.
    slerp = "merge_method: slerp\nbase_model: [a]\nmodels:\n- model: a\n- 5\nparameters: {t: {}}\n"
    assert codes(slerp) == ["wrong-value", "wrong-value", "missing-key"]
    linear = "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: [1, [2]]}\n"
    assert codes(linear) == ["wrong-value"]
    assert codes("merge_metod: linear\nmodels: [{modle: a}]\n") == ["unknown-key", "unknown-key"]
    assert codes("merge_method: linear\nmodels: []\n") == ["wrong-value"]
    assert codes("merge_method: linear\nslices: [5, {sources: []}]\n") == [
        "wrong-value",
        "missing-key",
    ]


def test_codes_are_listed_and_used() -> None:
    text = "\n".join(path.read_text() for path in SOURCES.rglob("*.py"))
    used = set(re.findall(r'(?:Problem\(|about\(|code(?:: str)? ?=)\s*"([a-z-]+)"', text))
    used |= set(re.findall(r'"([a-z-]+)" if method is None else "wrong-value"', text))
    used |= set(re.findall(r'return "([a-z-]+)" if is_of_system', text))
    used |= {"yaml", "unsupported"}
    assert used == set(CODES)


LINEAR = "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 1, frob: 2}\nfoo: 1\n"


def test_unknown_keys_may_be_ignored(folder: Path) -> None:
    assert codes(LINEAR) == ["unknown-parameter", "unknown-key"]
    plan = oxmerge.plan("recipe.yml", ignore_unknown=True)
    told = [str(warning) for warning in plan.warnings]
    assert told[0].startswith(
        "models[0].parameters.frob (recipe.yml:4:27): unknown parameter `frob`, which is ignored"
    )
    assert told[1].startswith("foo (recipe.yml:5:1): unknown key `foo`, which is ignored")
    assert codes(LINEAR, ignore_unknown=True, strict=True) == ["unknown-parameter", "unknown-key"]
    assert oxmerge.Recipe.from_yaml(LINEAR, ignore_unknown=True).method == "linear"
    assert main(["merge", "recipe.yml", "out", "--ignore-unknown", "--quiet"]) == 0
    lazy = oxmerge.lazy("recipe.yml", ignore_unknown=True)
    assert "model.norm.weight" in lazy
    (swept,) = oxmerge.sweep(
        "recipe.yml", "swept", {"models[a].parameters.weight": 0.5}, ignore_unknown=True
    )
    assert swept.tensors == len(lazy)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("parameters: {embed_slerp: true}", "parameter `embed_slerp` has no effect with method"),
        ("parameters: {smooth: true}", "parameter `smooth` has no effect with method"),
        ("parameters: {int8_mask: true}", "parameter `int8_mask` has no effect"),
        ("parameters: {t: 0.5}", "parameter `t` has no effect with method `linear`"),
        ("int8_mask: true", "`int8_mask` has no effect"),
        ("random_seed: 5", "`random_seed` has no effect"),
        ("out_shard_size: 5B", "`out_shard_size` has no effect"),
    ],
)
def test_keys_without_effect_are_known_by_name(folder: Path, line: str, message: str) -> None:
    text = "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 1}\n"
    (warning,) = oxmerge.plan(text + line + "\n").warnings
    assert warning.code == "no-effect"
    assert message in warning.message
    assert warning.where is not None
    assert warning.where.line == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: a\ngate_mode: hidden\nexperts: []\n", "`mergekit-moe`"),
        ("genome: {models: [a]}\n", "`mergekit-evolve`"),
        ("base_model: a\ndatasets: []\n", "for training"),
    ],
)
def test_recipes_for_other_tools_are_told(folder: Path, text: str, words: str) -> None:
    (problem,) = report(text)
    assert problem.code == "not-a-recipe"
    assert words in problem.message


def test_decimal_commas_are_told(folder: Path) -> None:
    (problem,) = report("merge_method: linear\nmodels:\n- model: a\nparameters:\n  weight: 0,5\n")
    assert problem.advice == "did you mean `0.5`? decimals have a point, not a comma"
    found = report("merge_method: linear\nmodels:\n- model: a\nparameters: {t: 0,5}\n")
    assert "decimals have a point, not a comma" in [problem.advice for problem in found]


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("50%", "did you mean `0.5`?"),
        ("12.5 %", "did you mean `0.125`?"),
        ("[0.1 0.2]", "did you mean `[0.1, 0.2]`?"),
        ("(0, -0.5)", "did you mean `[0, -0.5]`?"),
        ("\u22120.5", "did you mean `-0.5`?"),
        ("0.5# half", "did you mean `0.5`? comments begin with ` #`"),
        ("0.5,", "did you mean `0.5`?"),
        ("half", "write a finite number, or a list of such for a gradient"),
        ("5" * 300 + "e9%", "write a finite number, or a list of such for a gradient"),
    ],
)
def test_a_text_in_which_people_see_numbers(folder: Path, written: str, advice: str) -> None:
    (problem,) = report(
        f"merge_method: linear\nmodels:\n- model: a\nparameters:\n  weight: {written}\n"
    )
    assert problem.advice == advice


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("{model: a, weight: 1}", ["unknown-key"]),
        ("{model: a, params: {weight: 1}}", ["unknown-key"]),
        ("{model: a, parameters: [{weight: 1}]}", ["wrong-value"]),
        ("{model: a, parameters: {weight: 0,5}}", ["wrong-value"]),
        ("{model: a, parameters: {weight:0.5}}", ["wrong-value"]),
    ],
)
def test_that_it_is_missing_is_not_told_of_what_is_misplaced(
    folder: Path, model: str, told: list[str]
) -> None:
    assert codes(f"merge_method: linear\nmodels: [{model}]\n") == told


ODD = "merge_method: linear\nint8_mask: true\nmodels: [{model: a, parameters: {weight: x}}]\n"


def test_warnings_are_told_with_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yml").write_text(ODD)
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan("recipe.yml")
    (warning,) = caught.value.warnings
    assert (warning.code, len(caught.value.problems)) == ("no-effect", 1)
    assert f"\nwarning: {warning.where}" in str(caught.value)
    assert main(["plan", "recipe.yml"]) == 2
    told = capsys.readouterr().err
    assert told.index("warning: int8_mask") < told.index("error: cannot merge")
    assert main(["plan", "recipe.yml", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert [each["code"] for each in error["warnings"]] == ["no-effect"]
    # Of a recipe by itself, of several merges; and as problems if they are asked for as such.
    with pytest.raises(oxmerge.RecipeError) as unread:
        oxmerge.Recipe.from_yaml(f"dtype: x\n{ODD}")
    assert [each.code for each in unread.value.warnings] == ["no-effect"]
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(f"name: first\n{ODD}---\nmerge_method: linear\nmodels: [{{model: first}}]\n")
    assert [each.code for each in caught.value.warnings] == ["no-effect"]
    assert codes(ODD, strict=True) == ["no-effect", "parameter-value"]


def test_an_unknown_method_says_nothing_of_parameters(folder: Path) -> None:
    text = "merge_method: tiess\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(text)
    assert [each.code for each in caught.value.problems] == ["unknown-method"]
    assert caught.value.warnings == ()


def test_types_of_few_bits_are_told() -> None:
    with pytest.raises(oxmerge.RecipeError, match="quantise the merged model afterwards"):
        oxmerge.Recipe.from_yaml("merge_method: linear\nmodels: [{model: a}]\ndtype: float8_e5m2\n")


def test_problems_are_data_with_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yml").write_text(EVERYTHING)
    assert main(["plan", "recipe.yml", "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["error"]["problems"]
    assert problems[1] == {
        "code": "unknown-parameter",
        "message": "unknown parameter `wieght`",
        "where": "models[0].parameters.wieght",
        "line": 5,
        "column": 16,
        "recipe": "recipe.yml",
        "file": "recipe.yml",
        "advice": "did you mean `weight`?",
        "count": 1,
    }
    assert problems[-1]["code"] == "other-size"
    assert problems[-1]["count"] == 21
    Path("recipe.yml").write_text(LINEAR.replace("foo", "name").replace(", frob: 2", ""))
    assert main(["plan", "recipe.yml", "--json"]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert (warning["code"], warning["where"], warning["line"]) == ("no-effect", "name", 5)


def test_the_same_fault_of_two_files_is_told_of_both(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
    text = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\n"
    files = [Path(str(problem.file)).name for problem in report(text)]
    assert files == ["one", "two"]
