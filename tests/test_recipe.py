"""Recipes: what is read, what is refused, what is warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oxmerge
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oxmerge.errors import RecipeError
from oxmerge.problems import Place
from oxmerge.recipe.recipe import Choice, Recipe

MODELS = "models: [{model: a}, {model: b}]\n"
START = "merge_method: linear\n"
NEITHER = (
    "a recipe has exactly one of `models`, `slices` and `modules`: found none of them\n"
    "  hint: list whole models under `models`, or runs of layers under `slices`"
    ", or parts of the model under `modules`"
)


def problems_of(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert all(problem.advice for problem in caught.value.problems)
    return [str(problem) for problem in caught.value.problems]


def test_the_whole_of_a_recipe_is_read() -> None:
    recipe = Recipe.from_yaml(
        """
        merge_method: slerp
        base_model: a
        slices:
          - sources:
              - {model: a, layer_range: [0, 4]}
              - {model: {model: {path: b}}, layer_range: [2, 6], parameters: {weight: 0.5}}
            parameters: {normalize: yes}
          - base_model: c
            sources:
              - {model: c, layer_range: [0, 1]}
        parameters:
          t:
            - {filter: mlp, value: [0, 1]}
            - {filter: "*", value: 0.5}
        dtype: torch.bfloat16
        out_dtype: float32
        """
    )
    assert recipe.method == "slerp"
    assert recipe.base_model == "a"
    assert (recipe.dtype, recipe.out_dtype) == ("BF16", "F32")
    assert recipe.models == ()
    first, second = recipe.slices
    assert [source.model for source in first.sources] == ["a", "b"]
    assert first.sources[1].layer_range == (2, 6)
    assert first.sources[1].parameters["weight"].choices == (Choice((0.5,)),)
    assert first.parameters["normalize"].choices == (Choice((True,)),)
    assert second.base_model == "c"
    assert recipe.parameters["t"].choices == (Choice((0, 1), "mlp"), Choice((0.5,)))
    assert recipe.warnings == ()


def test_the_only_module_is_the_recipe() -> None:
    inside = "{models: [{model: a, parameters: {weight: 1}}], parameters: {normalize: false}}"
    recipe = Recipe.from_yaml(START + f"modules:\n  default: {inside}\nparameters: {{weight: 2}}\n")
    assert [source.model for source in recipe.models] == ["a"]
    assert recipe.models[0].where == Place("modules.default.models[0]", 3, 22)
    assert recipe.module_parameters["normalize"].choices == (Choice((False,)),)
    assert recipe.parameters["weight"].choices == (Choice((2,)),)


def test_places_have_lines() -> None:
    recipe = Recipe.from_yaml(START + "models:\n- model: a\n  parameters:\n    weight: 1\n")
    assert str(recipe.models[0].where) == "models[0] (line 3)"
    weight = recipe.models[0].parameters["weight"].where
    assert weight == Place("models[0].parameters.weight", line=5, column=5)
    assert str(weight) == "models[0].parameters.weight (line 5)"


SETTINGS: list[tuple[str, tuple[Choice, ...]]] = [
    ("1", (Choice((1,)),)),
    ("1e-5", (Choice((1e-5,)),)),
    ("-1E+3", (Choice((-1000.0,)),)),
    ("[0, 0.5, 1]", (Choice((0, 0.5, 1)),)),
    ("[]", ()),
    ("{value: 1}", (Choice((1,)),)),
    ("{filter: mlp, value: [1, 2]}", (Choice((1, 2), "mlp"),)),
    ("[{filter: '*', value: 1}]", (Choice((1,)),)),
    ("[{filter: a, value: []}, {value: 2}]", (Choice((), "a"), Choice((2,)))),
    ("on", (Choice((True,)),)),
    ("'0.5'", (Choice(("0.5",)),)),
    ("2024-01-02", (Choice(("2024-01-02",)),)),
    ("1:30", (Choice(("1:30",)),)),
    (".5", (Choice((0.5,)),)),
    ("0x10", (Choice((16,)),)),
]


@pytest.mark.parametrize(("text", "choices"), SETTINGS)
def test_settings(text: str, choices: tuple[Choice, ...]) -> None:
    recipe = Recipe.from_yaml(f"{START}{MODELS}parameters: {{weight: {text}}}\n")
    assert recipe.parameters["weight"].choices == choices


FAULTS: list[tuple[str, list[str]]] = [
    (
        MODELS,
        [
            (
                "merge_method: the name of a merge method is needed here: found nothing\n"
                "  hint: write `merge_method: linear`, say; `oxmerge methods` lists them"
            )
        ],
    ),
    (START, [NEITHER]),
    (START + "models: []\n", [NEITHER.replace("none of them", "an empty `models`")]),
    (START + "modules: {}\n", [NEITHER.replace("none of them", "an empty `modules`")]),
    (
        START + MODELS + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
        [NEITHER.replace("none of them", "`models` and `slices`")],
    ),
    (
        START + MODELS + "paramters: {}\n",
        ["paramters (line 3): unknown key `paramters`\n  hint: did you mean `parameters`?"],
    ),
    (
        START + "models: [{modle: a}]\n",
        ["models[0].modle (line 2): unknown key `modle`\n  hint: did you mean `model`?"],
    ),
    (
        START + "models: [{model: a, weight: 1}]\n",
        ["models[0].weight (line 2): unknown key `weight`\n  hint: put it under `parameters`"],
    ),
    (
        START + "models: [{model: a, zzz: 1}]\n",
        [
            (
                "models[0].zzz (line 2): unknown key `zzz`\n  hint: known here: `model`, "
                "`parameters` (`--ignore-unknown` makes it a warning)"
            )
        ],
    ),
    (
        START + MODELS + "tokenizer_source: base\ntokenizer: {source: base}\n",
        [
            (
                "tokenizer_source (line 3): `tokenizer_source` and `tokenizer` both say what the "
                "tokenizer is\n  hint: leave one of them out"
            )
        ],
    ),
    (
        START + MODELS + "tokenizer: {sorce: base}\n",
        ["tokenizer.sorce (line 3): unknown key `sorce`\n  hint: did you mean `source`?"],
    ),
    (
        START + MODELS + "tokenizer: base\n",
        [
            (
                "tokenizer (line 3): a mapping of keys to values is needed here: found 'base'\n"
                "  hint: write `tokenizer: {source: base}`, or `tokenizer_source: base`"
            )
        ],
    ),
    (
        START + MODELS + "tokenizer: nothing\n",  # a word, in quotes; not the lack of one
        [
            (
                "tokenizer (line 3): a mapping of keys to values is needed here: found 'nothing'\n"
                "  hint: write `tokenizer: {source: nothing}`, or `tokenizer_source: nothing`"
            )
        ],
    ),
    (
        START + "models: [null]\n",
        [
            (
                "models[0] (line 2): a mapping of keys to values is needed here: found nothing\n"
                "  hint: write `key: value`"
            )
        ],
    ),
    (
        START + MODELS + "chat_template: [auto]\n",
        [
            (
                "chat_template (line 3): a chat template is text: found ['auto']\n"
                "  hint: write `chat_template: auto`, or leave it out"
            )
        ],
    ),
    (
        START + "modules: {default: {}}\n",
        [
            (
                "modules.default (line 2): a module has exactly one of `models` and `slices`: "
                "found none of them\n"
                "  hint: list whole models under `models`, or runs of layers under `slices`"
            )
        ],
    ),
    (
        START + "modules: {1: {models: [{model: a}]}}\n",
        [
            (
                "modules.1 (line 2): the name of a module is text: found 1\n"
                "  hint: write `text_decoder: ...`, say"
            )
        ],
    ),
    (
        START + MODELS + "modules: {default: {models: [{model: a}]}}\n",
        [NEITHER.replace("none of them", "`models` and `modules`")],
    ),
    (
        START + "modules: [default]\n",
        [
            (
                "modules (line 2): a mapping of names to modules is needed here: found ['default']"
                "\n  hint: write `default: ...`"
            )
        ],
    ),
    (
        START + "models: [{model: {model: a, lora: 7}}]\n",
        [
            (
                "models[0].model.lora (line 2): a model reference is text: found 7\n"
                "  hint: put it in quotes"
            )
        ],
    ),
    (
        START + "models: [{model: 7}]\n",
        [
            (
                "models[0].model (line 2): a model reference is text: found 7\n"
                "  hint: put it in quotes"
            )
        ],
    ),
    (
        START + MODELS + "dtype: int64\n",
        [
            (
                "dtype (line 3): cannot write weights as `int64`\n  hint: whole numbers cannot "
                "hold "
                "weights; integer tensors keep their type anyway"
            )
        ],
    ),
    (
        START + MODELS + "dtype: bf16\n",
        ["dtype (line 3): cannot write weights as `bf16`\n  hint: write `bfloat16`"],
    ),
    (
        START + MODELS + "out_dtype: bfloat\n",
        ["out_dtype (line 3): cannot write weights as `bfloat`\n  hint: did you mean `bfloat16`?"],
    ),
    (
        START + MODELS + "parameters: {weight: [1, {value: 2}]}\n",
        [
            (
                "parameters.weight (line 3): values and conditional values cannot stand in one "
                "list\n"
                "  hint: write a value for all as `- value: ...`"
            )
        ],
    ),
    (
        START + MODELS + "parameters: {weight: }\n",
        [
            (
                "parameters.weight (line 3): a number, a truth value or text is needed here: "
                "found nothing\n  hint: write one, or a list of them for a gradient over the layers"
            )
        ],
    ),
    (
        START + MODELS + "parameters: {weight: {filtre: mlp, value: 1}}\n",
        [
            (
                "parameters.weight[0].filtre (line 3): unknown key `filtre`\n"
                "  hint: did you mean `filter`?"
            )
        ],
    ),
    (
        START + MODELS + "parameters: {weight: {filter: mlp}}\n",
        [
            (
                "parameters.weight[0] (line 3): `value` is needed here\n"
                "  hint: write `value: 0.5`, say"
            )
        ],
    ),
    (
        START + "slices: [{sources: [{model: a}]}]\n",
        [
            (
                "slices[0].sources[0].layer_range (line 2): two whole numbers are needed here: the "
                "first layer, and the one after the last: found nothing\n"
                "  hint: write `layer_range: [0, 8]` for the first eight layers"
            )
        ],
    ),
    (
        START + "slices: [{sources: [{model: a, layer_range: [4, 2]}]}]\n",
        [
            (
                "slices[0].sources[0].layer_range (line 2): a range from a lower to a higher "
                "layer is "
                "needed here: found [4, 2]\n  hint: the end is the layer after the last"
            )
        ],
    ),
    (
        START + "slices: [{sources: [{model: a, layer_range: [-2, 4]}]}]\n",
        [
            (
                "slices[0].sources[0].layer_range (line 2): a range from a lower to a higher "
                "layer is "
                "needed here: found [-2, 4]\n  hint: layers count from 0"
            )
        ],
    ),
    (
        START + "slices: [{sources: []}]\n",
        [
            (
                "slices[0] (line 2): a slice needs `sources`\n"
                "  hint: list them: `sources: [{model: path, layer_range: [0, 8]}]`"
            )
        ],
    ),
    (
        START + "models: {a: 1}\n",
        [
            (
                "models (line 2): a list is needed here: found a mapping\n"
                "  hint: put `- ` before each entry"
            )
        ],
    ),
    (
        START + "models: [a]\n",
        [
            (
                "models[0] (line 2): a mapping of keys to values is needed here: found 'a'\n"
                "  hint: write `model: a`"
            )
        ],
    ),
]


@pytest.mark.parametrize(("text", "expected"), FAULTS)
def test_faults(text: str, expected: list[str]) -> None:
    assert problems_of(text) == expected


def test_all_faults_are_reported_together() -> None:
    text = "merge_metod: linear\nmodels: [{modle: a}]\ndtype: bf16\nparameters: [1]\n"
    assert len(problems_of(text)) == 4


SYNTAX: list[tuple[str, str]] = [
    (
        "merge_method: linear\nmerge_method: ties\n" + MODELS,
        "line 2: `merge_method` is written twice, first on line 1",
    ),
    (
        "merge_method: linear\nmodels:\n- model: a\n  model: b\n",
        "line 4: `model` is written twice, first on line 3",
    ),
    ("- 1\n- 2\n", "a recipe is a mapping of keys to values: found a list"),
    ("# nothing\n", "a recipe is a mapping of keys to values: found nothing"),
    ("a: " + "[" * 3000 + "]" * 3000 + "\n", "nested too deeply"),
    ("a: !!python/object:os.system x\n", "line 1: recipes have no tags"),
    # The words of YAML's own messages help nobody who does not know YAML.
    ("a:\n\tb: 1\n", "line 2: this line is indented by a tab; YAML is indented by spaces"),
    ("a: x\n  \tb: 1\n", "line 2: this line is indented by a tab"),
    ("a: @x\n", "line 1: `@` cannot begin a value"),
    ("a: [1\n", "line 2: the `[` that opens on line 1 is not closed before this"),
    ("a: {b: 1\nc: 2\n", "line 2: the `{` that opens on line 1 is not closed before this"),
    ("a: 'x\nb: 1\n", "line 3: the quote that opens on line 1 is never closed"),
    (
        "models:\n  - model: a\n    parameters:\n      weight: 1\n   density: 1\n",
        (
            "line 5: this line is indented by 3, which fits no block: the block that is open began "
            "on line 2 with `- model: a`, indented by 2"
        ),
    ),
    (
        "models:\n- model: a\nweight: 1\n- model: b\n",
        (
            "line 4: an item of a list stands here, but the block that is open began on line 1 "
            "with `models:`: keys and items do not mix"
        ),
    ),
    (
        "- model: a\nmerge_method: linear\n",
        (
            "line 2: a key stands here, but the block that is open began on line 1 with "
            "`- model: a`: a list has items only"
        ),
    ),
    (
        "merge_method: linear\n  models:\n",
        (
            "line 2: this line is indented by 2, more than the line before it, "
            "`merge_method: linear`, which has its value"
        ),
    ),
    (
        "method linear\nmodels: 1\n",
        "line 2: the line before it, `method linear`, has no colon",
    ),
    ("a:b\nmodels: 1\n", "line 2: the line before it, `a:b`, has no space behind its colon"),
    ("a: b: c\n", "line 1: this line has a second `: ` in its value"),
    ('a: "x" y\n', "line 1: something stands behind a value that has ended"),
    ("filter: *\n", "line 1: `*` refers to another value, which is not there"),
    ("filter: *mlp\n", "line 1: `*mlp` refers to another value, which is not there"),
    ("a: %x\n", "line 1: `%` cannot begin a value"),
]


@pytest.mark.parametrize(("text", "expected"), SYNTAX)
def test_syntax(text: str, expected: str) -> None:
    (problem,) = problems_of(text)
    assert problem.startswith(expected)


WARNINGS: list[tuple[str, str]] = [
    (
        START + "models: [{model: a, layer_range: [0, 1]}]\n",
        (
            "models[0].layer_range (line 2): `layer_range` has no effect here\n"
            "  hint: it acts in a source of a slice"
        ),
    ),
    (
        START + "slices: [{residual_weight: 1, sources: [{model: a, layer_range: [0, 1]}]}]\n",
        (
            "slices[0].residual_weight (line 2): `residual_weight` has no effect\n"
            "  hint: it is part of the dialect, but nothing ever used it"
        ),
    ),
    (
        START + MODELS + "name: x\n",
        "name (line 3): `name` has no effect\n  hint: it names one merge of several in one file",
    ),
    (
        START + "models: [{model: {model: a, override_architecture: X}}]\n",
        (
            "models[0].model.override_architecture (line 2): `override_architecture` has no "
            "effect\n"
            "  hint: names and shapes come from the files, not from an architecture"
        ),
    ),
    (
        START + "models: [{model: a, base_model: b}]\n",
        (
            "models[0].base_model (line 2): `base_model` has no effect here\n"
            "  hint: it acts at the top level or in a slice"
        ),
    ),
]


@pytest.mark.parametrize(("text", "expected"), WARNINGS)
def test_keys_without_effect_are_warned_of(text: str, expected: str) -> None:
    assert [str(warning) for warning in Recipe.from_yaml(text).warnings] == [expected]


def test_merge_keys_and_anchors_work() -> None:
    text = START + "models:\n- &a {model: a, parameters: {weight: 1}}\n- {<<: *a, model: b}\n"
    first, second = Recipe.from_yaml(text).models
    assert (first.model, second.model) == ("a", "b")
    assert first.parameters.keys() == second.parameters.keys()


def test_null_is_absent() -> None:
    text = START + MODELS + "slices:\ntokenizer:\nparameters:\nbase_model:\ndtype:\n"
    recipe = Recipe.from_yaml(text)
    assert recipe.warnings == ()
    assert recipe.base_model is None


def test_a_path_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(START + MODELS)
    for source in (path, str(path)):
        recipe = Recipe.from_yaml(source)
        assert recipe.folder == str(tmp_path)
        assert recipe.text == START + MODELS
    assert Recipe.from_yaml(START + MODELS).folder is None
    with pytest.raises(FileNotFoundError):
        Recipe.from_yaml("nowhere.yml")


def test_a_mapping_needs_no_yaml() -> None:
    recipe = Recipe.from_mapping({"merge_method": "linear", "models": [{"model": "a"}]})
    assert recipe.models[0].where == Place("models[0]")
    paths = {"merge_method": "linear", "models": [{"model": Path("a")}], "base_model": Path("b")}
    recipe = Recipe.from_mapping(paths)
    assert (recipe.models[0].model, recipe.base_model) == ("a", "b")
    assert Recipe.from_yaml(recipe.text).models[0].model == "a"


@pytest.mark.parametrize(
    "name", ["\N{GRINNING FACE}", "\\\N{GRINNING FACE}", "\\ud83d\\ude00", "é\u2028\x7f"]
)
def test_the_text_of_a_mapping_is_the_same_recipe(name: str) -> None:
    recipe = Recipe.from_mapping({"merge_method": "linear", "models": [{"model": name}]})
    assert Recipe.from_yaml(recipe.text).models[0].model == name


def test_what_is_no_recipe_is_told_how_to_make_one() -> None:
    mapping: Any = {"merge_method": "linear", "models": [{"model": "a"}]}
    with pytest.raises(TypeError, match=r"not a list; of a mapping, `Recipe.from_mapping` makes"):
        oxmerge.plan([mapping])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"neither models nor slices; make it with `Recipe.from_y"):
        oxmerge.plan(Recipe("recipe.yml"))
    with pytest.raises(ValueError, match=r"^device must be cpu, .*, not None$"):
        oxmerge.plan(Recipe.from_mapping(mapping), device=None)  # type: ignore[arg-type]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["model", "models", "slices", "sources", "parameters", "value", "filter", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(["merge_method", "models", "slices", "parameters"]), VALUES))
def test_nothing_but_a_recipe_error_comes_of_odd_values(mapping: dict[str, Any]) -> None:
    try:
        Recipe.from_mapping(mapping)
    except RecipeError as error:
        text = str(error)
    else:
        text = "a recipe"
    assert text
