"""Places of a sweep: by a model's name, those that make no difference, and the text beside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oxmerge.cli import main
from oxmerge.errors import RecipeError
from oxmerge.recipe.yaml_edit import set_value
from oxmerge.recipe.yaml_text import parse_yaml
from oxmerge.sweeping import variants

if TYPE_CHECKING:
    from pathlib import Path

ROOM: dict[str, Any] = {"memory": "4GiB"}

TIES = """\
# what we tried in spring
merge_method: ties
base_model: {0}/base      # the one that both were made from
models:
  - model: {0}/base
  - model: {0}/a          # code
    parameters: &half
      weight: 0.5         # w
      density: 0.5
  - model: {0}/b          # chat
    parameters: *half
parameters: {{normalize: true, int8_mask: false}}
dtype: bfloat16
"""


def sweep(recipe: str, out: Path, axes: dict[str, Any], **options: Any) -> list[Any]:
    return oxmerge.sweep(recipe, str(out / "{n}"), axes, **ROOM, **options)


# By name.


@pytest.mark.parametrize("name", ["b", "family/b", "{0}/b", "{0}/b/", "2"])
def test_a_model_by_its_name(family: Path, name: str) -> None:
    if name == "family/b":
        name = f"{family.name}/b"
    place = f"models[{name.format(family)}].parameters.weight"
    [variant] = variants(TIES.format(family), "w{weight}", {place: 0.25})
    weights = [source.parameters.get("weight") for source in variant.recipe.models]
    assert [each and each.choices[0].values for each in weights] == [None, (0.5,), (0.25,)]
    assert variant.directory == "w0.25"
    assert variant.paths == {place: (None, "models[2].parameters.weight")}


def test_in_slices_and_in_the_long_form() -> None:
    recipe = """
    merge_method: linear
    slices:
    - sources:
      - {model: {model: {path: ./x/chat-7b.v2}}, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: x/code, layer_range: [0, 2], parameters: {weight: 1}}
    """
    place = "slices[0].sources[chat-7b.v2].parameters.weight"
    [variant] = variants(recipe, "{n}", {place: 3})
    assert variant.recipe.slices[0].sources[0].parameters["weight"].choices[0].values == (3,)


NOWHERE = "there is no `{}` in the recipe"


@pytest.mark.parametrize(
    ("place", "message", "found", "advice"),
    [
        ("models[chatt].dtype", NOWHERE, "no model `chatt` there", "did you mean `chat`?"),
        (
            "models[zzz].dtype",
            NOWHERE,
            "no model `zzz` there",
            "its models: `x/chat`, `y/chat`, `y/code`",
        ),
        (
            "models[chat].dtype",
            "`chat` in `{}` may be several models",
            "[0] `x/chat`, [1] `y/chat`",
            "write more of the path, or the position in the list",
        ),
        ("parameters[chat].weight", NOWHERE, "no model `chat` there", None),
    ],
)
def test_names_that_no_model_or_several_have(
    place: str, message: str, found: str, advice: str | None
) -> None:
    recipe = "merge_method: linear\nmodels: [{model: x/chat}, {model: y/chat}, {model: y/code}]\n"
    with pytest.raises(RecipeError) as caught:
        variants(recipe, "{n}", {place: "1,2"})
    error = caught.value
    assert (error.message, error.found, error.advice) == (message.format(place), found, advice)


def test_the_whole_name_before_the_end_of_one() -> None:
    recipe = "merge_method: linear\nmodels: [{model: x/chat}, {model: chat}]\n"
    [variant] = variants(recipe, "{n}", {"models[chat].parameters.weight": 2})
    path = (None, "models[1].parameters.weight")
    assert variant.paths == {"models[chat].parameters.weight": path}


# Without effect.

LINEAR = """\
merge_method: linear
models:
- {{model: {0}/a, parameters: {{weight: 0.5}}}}
- {{model: {0}/b, parameters: {{weight: 0.5}}}}
"""
EVEN = """\
merge_method: linear
models: [{{model: {0}/a}}, {{model: {0}/b}}]
parameters: {{weight: 1}}
"""
ARITHMETIC = """\
merge_method: task_arithmetic
base_model: {0}/base
models: [{{model: {0}/a, parameters: {{weight: 1}}}}]
"""


@pytest.mark.parametrize(
    ("recipe", "axes", "why"),
    [
        (
            TIES,
            {"models[0].parameters.weight": "0.1:0.9:9"},
            "`weight` has no effect on the base model\n  hint: it acts on the other models",
        ),
        (TIES, {"models[base].parameters.density": [0.1, 0.2]}, "no effect on the base model"),
        (TIES, {"parameters.int8_mask": "true,false"}, "`int8_mask` has no effect on the result"),
        (TIES, {"models[a].parameters.lambda": "1,2"}, "`lambda` has no effect under a model"),
        (TIES, {"parameters.t": "0,1"}, "`t` has no effect with method `ties`"),
        (
            TIES,
            {"parameters.weight": "0.1,0.2"},
            "what stands at a model counts: models[1].parameters.weight (line 8)",
        ),
        (LINEAR, {"parameters.normalize": "true,false"}, "the same formula with each value"),
        (EVEN, {"parameters.weight": "0.1:0.9:9"}, "the same formula with each value"),
        (ARITHMETIC, {"models[a].parameters.density": "0.1,0.2"}, "no effect on the result"),
        (LINEAR, {"dtype": "bfloat16,float16", "out_dtype": "float32"}, "the same formula"),
    ],
)
def test_values_that_make_no_difference_are_refused(
    tmp_path: Path, family: Path, recipe: str, axes: dict[str, Any], why: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        sweep(recipe.format(family), tmp_path / "out", axes)
    place = next(iter(axes))
    assert str(caught.value).startswith(
        f"cannot sweep: the values of `{place}` make no difference: found "
    )
    assert why in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_all_of_them_at_once_and_only_them(tmp_path: Path, family: Path) -> None:
    axes = {
        "models[0].parameters.weight": [0.1, 0.2],
        "models[1].parameters.weight": [0.1, 0.2],
        "parameters.int8_mask": [True, False],
    }
    for together in (False, True):
        with pytest.raises(RecipeError) as caught:
            sweep(TIES.format(family), tmp_path / "out", axes, together=together)
        assert [problem.message for problem in caught.value.problems] == [
            "the values of `models[0].parameters.weight` make no difference",
            "the values of `parameters.int8_mask` make no difference",
        ]


def test_what_makes_a_difference_for_one_value_of_another(tmp_path: Path, family: Path) -> None:
    """A density acts in one of the two methods."""
    recipe = ARITHMETIC.format(family)
    axes = {"merge_method": "task_arithmetic,ties", "models[a].parameters.density": "0.1,0.2"}
    assert len(sweep(recipe, tmp_path, axes)) == 4


def test_one_value_is_no_sweep(tmp_path: Path, family: Path) -> None:
    assert len(sweep(TIES.format(family), tmp_path, {"parameters.int8_mask": True})) == 1


def test_the_program_says_so(
    tmp_path: Path, family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yml"
    path.write_text(TIES.format(family))
    out = str(tmp_path / "out{n}")
    line = ["sweep", str(path), out, "--set", "models[0].parameters.weight=0.1:0.9:9"]
    assert main(line) == 2
    assert "has no effect on the base model" in capsys.readouterr().err
    assert main([*line[:-1], "models[a].parameters.weight=0.1,0.9", "--memory", "4GiB"]) == 0
    assert (tmp_path / "out1" / "model.safetensors").exists()


# The text beside.


def test_the_recipe_beside_keeps_its_yaml(tmp_path: Path, family: Path) -> None:
    text = TIES.format(family)
    axes = {"models[b].parameters.weight": [0.25], "parameters.lambda": [0.5]}
    sweep(text, tmp_path, axes)
    [beside] = (tmp_path / "0").glob("*.y*ml")
    expected = text.replace("*half", "{weight: 0.25, density: 0.5}").replace(
        "int8_mask: false}", "int8_mask: false, lambda: 0.5}"
    )
    assert beside.read_text() == expected


def test_aliases_of_what_is_set_keep_what_they_had(family: Path) -> None:
    text = TIES.format(family)
    [variant] = variants(text, "{n}", {"models[a].parameters.weight": 0.25})
    expected = text.replace("weight: 0.5 ", "weight: 0.25 ").replace(
        "*half", "{weight: 0.5, density: 0.5}"
    )
    assert variant.recipe.text == expected
    # Lines of messages are those of the text.
    assert variant.recipe.models[1].parameters["weight"].where.line == 8


EDITS: list[tuple[str, list[str | int], Any, str]] = [
    ("a: 1  # one\n", ["a"], 2, "a: 2  # one\n"),
    ("a: 1 # one", ["b"], 2, "a: 1 # one\nb: 2"),
    ("a:\n", ["a", "b"], 2, "a: {b: 2}\n"),
    ("a: ~  # none\n", ["a", "b", "c"], 2, "a: {b: {c: 2}}  # none\n"),
    ("a: {}\n", ["a", "b"], 2, "a: {b: 2}\n"),
    ("a: {b: 1,}\n", ["a", "c"], 2, "a: {b: 1, c: 2,}\n"),
    ('{"a": {"b":1}}', ["a", "c"], True, '{"a": {"b":1, "c": true}}'),
    ("a: [1, 2]\n", ["a", 1], 3, "a: [1, 3]\n"),
    ("a:\n- 1\n- 2 # two\n", ["a", 1], 3, "a:\n- 1\n- 3 # two\n"),
    ("a: [1,\n  2]  # x\nb: 1\n", ["a"], 0.5, "a: 0.5  # x\nb: 1\n"),
    ("a:\n- value: 1\n  filter: x # f\n# c\nb: 1\n", ["a"], 2, "a: 2 # f\n# c\nb: 1\n"),
    ("a: !!float 1\n", ["a"], 2, "a: 2\n"),
    ("a: 'x y'\n", ["a"], "bfloat16", "a: bfloat16\n"),
    ("a: x\n", ["a"], "yes", 'a: "yes"\n'),
    ("a: x\n", ["a"], "1e5", 'a: "1e5"\n'),
    ("a: x\n", ["a"], "é: {", 'a: "é: {"\n'),
    ("a: x\n", ["a"], 1e-7, "a: 1.0e-07\n"),
    ("a: &x 1\nb: *x\nc: [*x]\n", ["a"], 2, "a: 2\nb: 1\nc: [1]\n"),
    ("a: &x 1\nb: *x\nc: [*x]\n", ["b"], 2, "a: &x 1\nb: 2\nc: [*x]\n"),
    (
        "a: &x {b: 1}\nc:\n  <<: *x\n  d: 2\n",
        ["c", "b"],
        3,
        "a: &x {b: 1}\nc:\n  <<: *x\n  d: 2\n  b: 3\n",
    ),
    ("a: &x {b: 1}\nc:\n  <<: *x\n", ["a", "b"], 3, "a: &x {b: 3}\nc:\n  <<: {b: 1}\n"),
    ("a: |\n  text\nb: 1\n", ["c"], 3, "a: |\n  text\nb: 1\nc: 3\n"),
    ("b:\n  a: |\n    text\n", ["b", "c"], 3, "b:\n  a: |\n    text\n  c: 3\n"),
    ("- a: 1\n".replace("- ", "m:\n- "), ["m", 0, "b"], 3, "m:\n- a: 1\n  b: 3\n"),
]


def changed(value: Any, steps: list[str | int], new: Any) -> Any:
    """Return `value` with another one at the end of `steps`."""
    if not steps:
        return new
    step, *rest = steps
    if isinstance(value, list):
        return [changed(v, rest, new) if at == step else v for at, v in enumerate(value)]
    value = value or {}
    return {**value, step: changed(value.get(step), rest, new)}


@pytest.mark.parametrize(("text", "steps", "value", "expected"), EDITS)
def test_edits(text: str, steps: list[str | int], value: Any, expected: str) -> None:
    before = parse_yaml(text)
    after = changed(before, steps, value)
    edited = set_value(text, steps, before, after)
    assert edited == expected
    assert parse_yaml(edited) == after


SCALARS = st.one_of(st.booleans(), st.integers(-99, 99), st.floats(-9, 9), st.text(max_size=6))


@given(SCALARS)
def test_any_value_is_read_as_it_was_set(value: Any) -> None:
    places: list[list[str | int]] = [["parameters", "x"], ["models", 0, "x"], ["dtype"]]
    for steps in places:
        text = "models:\n- {model: a}\nparameters: {}\n"
        before = parse_yaml(text)
        after = changed(before, steps, value)
        assert parse_yaml(set_value(text, steps, before, after)) == after


def test_what_cannot_be_edited_is_written_anew(family: Path) -> None:
    text = f"? merge_method\n: linear\n? models\n: - model: {family}/a\n"
    [variant] = variants(text, "{n}", {"models[a].parameters.weight": 0.25})
    assert variant.recipe.models[0].parameters["weight"].choices[0].values == (0.25,)
    assert parse_yaml(variant.recipe.text)["merge_method"] == "linear"


def test_a_text_that_is_not_edited_right_is_not_taken(family: Path) -> None:
    """The first edit makes a model of an alias; what follows finds its way."""
    text = TIES.format(family)
    axes = {"models[b].parameters.density": 0.1, "models[a].parameters.density": 0.2}
    [variant] = variants(text, "{n}", axes)
    found = [source.parameters["density"].choices[0].values for source in variant.recipe.models[1:]]
    assert found == [(0.2,), (0.1,)]
    assert variant.recipe.text.startswith("# what we tried in spring")


def test_aliases_of_aliases_cost_nothing() -> None:
    levels = "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(12))
    text = f"merge_method: linear\nmodels: [{{model: a}}]\na0: &a0 [x]\n{levels}"
    with pytest.raises(RecipeError, match="it stands for more than 100000 values"):
        variants(text, "{n}", {"parameters.weight": "1,2"})


def test_a_merge_of_several_with_a_wrong_name() -> None:
    """Nobody knows then which is the last, in which places are."""
    text = "name: a@b\nmerge_method: linear\nmodels: [{model: x}]\n---\n"
    text += "name: last\nmerge_method: linear\nmodels: [{model: x}]\n"
    with pytest.raises(RecipeError, match="name") as caught:
        variants(text, "w{n}", {"models[0].parameters.weight": 1})
    assert any(each.where and each.where.path == "name" for each in caught.value.problems)
