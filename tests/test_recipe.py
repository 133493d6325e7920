"""Recipes: what is read, what is refused, what is warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oxmerge
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oxmerge.errors import RecipeError
from oxmerge.problems import Place
from oxmerge.recipe.recipe import Choice, Recipe
from snapshot import check_told

MODELS = "models: [{model: a}, {model: b}]\n"
START = "merge_method: linear\n"


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


FAULTS = [
    MODELS,
    START,
    START + "models: []\n",
    START + "modules: {}\n",
    START + MODELS + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
    START + MODELS + "paramters: {}\n",
    START + "models: [{modle: a}]\n",
    START + "models: [{model: a, weight: 1}]\n",
    START + "models: [{model: a, zzz: 1}]\n",
    START + MODELS + "tokenizer_source: base\ntokenizer: {source: base}\n",
    START + MODELS + "tokenizer: {sorce: base}\n",
    START + MODELS + "tokenizer: base\n",
    START + MODELS + "tokenizer: nothing\n",
    START + "models: [null]\n",
    START + MODELS + "chat_template: [auto]\n",
    START + "modules: {default: {}}\n",
    START + "modules: {1: {models: [{model: a}]}}\n",
    START + MODELS + "modules: {default: {models: [{model: a}]}}\n",
    START + "modules: [default]\n",
    START + "models: [{model: {model: a, lora: 7}}]\n",
    START + "models: [{model: 7}]\n",
    START + MODELS + "dtype: int64\n",
    START + MODELS + "dtype: fp8\n",
    START + "models: [{model: &m a}]\nx-common: *m\n",
    "&whole\n" + START + MODELS + "x-common: 1\n",
    START + MODELS + "paramters: &p {weight: 1}\nx: *p\n",
    START + "modelz: &m [{model: a}, {model: b}]\n",
    START + MODELS + "dtpye: &d bfloat16\nout_dtype: *d\n",
    START + MODELS + "DTYPE: &d bfloat16\nout_dtype: *d\n",
    START + "model_list: &m [{model: a}]\n",
    START + "models: [{model: a, revision: main}]\n",
    START + "models: [{model: a, lora: b}]\n",
    "layer_slices: [{model: a, start: 0, end: 4}]\nembedding_source: a\n",
    "merge_method: moe\nbase_model: a\nexperts: [{source_model: a}]\n",
    START + MODELS + "out_dtype: bfloat\n",
    START + MODELS + "parameters: {weight: [1, {value: 2}]}\n",
    START + MODELS + "parameters: {weight: }\n",
    START + MODELS + "parameters: {weight: {filtre: mlp, value: 1}}\n",
    START + MODELS + "parameters: {weight: {filter: mlp}}\n",
    START + "slices: [{sources: [{model: a}]}]\n",
    START + "slices: [{sources: [{model: a, layer_range: [4, 2]}]}]\n",
    START + "slices: [{sources: [{model: a, layer_range: [-2, 4]}]}]\n",
    START + "slices: [{sources: []}]\n",
    START + "models: {a: 1}\n",
    START + "models: [a]\n",
    START + "modls: [{model: a}]\n",
    START + "slices: [{source: [{model: a}]}]\n",
    START + "slices: [{sources: [{model: a, layer_rang: [0, 1]}]}]\n",
    START + MODELS + "parameters: {weight: [{vlaue: 1}]}\n",
    START + MODELS + "parameters: {weight: {w: 1}}\n",
    START + "models:\n-model: a\n-model: b\n",
    START + "models:\n\u2014 model: a\n\u2014 model: b\n",
    START + "models:\n\u00a0- model: a\n",
    START + "models: [{model: \u201ca\u201d}]\n",
    START + MODELS + "parameters: {weight: {self_attn: 1, mlp: 0.5}}\n",
    START + "models:\n- model: a\n- parameters:\n    weight: 1\n",
    "config:\n  merge_method: linear\n  models: [{model: a}]\n",
    '{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base"}\n',
    '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}\n',
]


def test_faults() -> None:
    check_told("faults_of_recipes", [(text, problems_of(text)) for text in FAULTS])


def test_all_faults_are_reported_together() -> None:
    text = "merge_metod: linear\nmodels: [{modle: a}]\ndtype: fp8\nparameters: [1]\n"
    assert len(problems_of(text)) == 4


SYNTAX = [
    "merge_method: linear\nmerge_method: ties\n" + MODELS,
    "merge_method: linear\nmodels:\n- model: a\n  model: b\n",
    "density: &d 1\nmerge_method: ties\nparameters: {density: *d, density: 0}\n" + MODELS,
    "dtype: &d float32\ndtype: *d\nmerge_method: linear\n" + MODELS,
    "- 1\n- 2\n",
    "# nothing\n",
    "a: " + "[" * 3000 + "]" * 3000 + "\n",
    "a: !!python/object:os.system x\n",
    "a:\n\tb: 1\n",
    "a: x\n  \tb: 1\n",
    "a: @x\n",
    "a: [1\n",
    "a: {b: 1\nc: 2\n",
    "a: 'x\nb: 1\n",
    "models:\n  - model: a\n    parameters:\n      weight: 1\n   density: 1\n",
    "models:\n- model: a\nweight: 1\n- model: b\n",
    "- model: a\nmerge_method: linear\n",
    "merge_method: linear\n  models:\n",
    "method linear\nmodels: 1\n",
    "a:b\nmodels: 1\n",
    "a: b: c\n",
    'a: "x" y\n',
    "filter: *\n",
    "filter: *mlp\n",
    "a: %x\n",
    "a: {*x}\n",
    "models\n- model: a\n",
    "models\uff1a\n- model: a\n",
    "```yaml\nmerge_method: linear\n```\n",
    "a:\u00a0b\nmodels: 1\n",
    "models:\n  - model: a\n  -model: b\n",
    "? [a]\n: 1\n",
    "a: {<<: b}\n",
    "a: b\x07\n",
    # As they come from pages, mails, and files of other kinds.
    "```yaml\nmerge_method: linear\n```\n",
    "merge_method: linear\n~~~\n",
    "> merge_method: linear\n> models: []\n",
    "**models**: 1\n",
    "models:\n* model: a\n",
    "models:\n- model: `a`\n",
    "models:\n- model: [a/b](https://huggingface.co/a/b)\n",
    "models:\n- model: {{ a }}\n",
    "<html>\n<body>merge_method: linear</body></html>\n",
    "models:\n- model: &quot;a&quot;\n",
    'models:\n- model: "C:\\models\\a"\n',
    'merge_method = "linear"\n[[models]]\nmodel = "a"\n',
    "[merge]\nmethod = linear\n",
    "a: 1\n...\nb: 2\n",
    "models:\n- model: a\n\u00a0\u00a0parameters:\n    weight: 1\n- model: b\n",
    "models:\n  - model: a\n  parameters:\n    weight: 1\n",
    "Merge a and b.\n",
    "Entry not found\n",
    "| model | weight |\n",
    "a: 1\n%b: 2\n",
]


def test_syntax() -> None:
    told = [(text, problems_of(text)) for text in SYNTAX]
    assert {len(problems) for _, problems in told} == {1}
    check_told("syntax_of_recipes", told)


WARNINGS = [
    START + "models: [{model: a, layer_range: [0, 1]}]\n",
    START + "slices: [{residual_weight: 1, sources: [{model: a, layer_range: [0, 1]}]}]\n",
    START + MODELS + "name: x\n",
    START + "models: [{model: {model: a, override_architecture: X}}]\n",
    START + "models: [{model: a, base_model: b}]\n",
    START + MODELS + "chat_template: ''\n",
    START + MODELS + "dtype: ''\n",
    START + MODELS + "pad_to_multiple_of: 8\n",
    START + MODELS + "output_path: merged\n",
    START + MODELS + "x-common: &x {weight: 1}\n",
]


def test_keys_without_effect_are_warned_of() -> None:
    told = [(text, [*map(str, Recipe.from_yaml(text).warnings)]) for text in WARNINGS]
    assert {len(warnings) for _, warnings in told} == {1}
    check_told("keys_without_effect", told)


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


def test_a_mapping_may_have_numbers_and_types_of_numpy_and_torch() -> None:
    torch = pytest.importorskip("torch")
    mapping = {
        "merge_method": "slerp",
        "slices": [{"sources": [{"model": "a", "layer_range": [np.int64(0), np.uint8(4)]}]}],
        "parameters": {"t": np.linspace(0, 1, 3), "x": torch.tensor([0.5, 0.25]), "y": np.True_},
        "dtype": torch.bfloat16,
        "out_dtype": np.float32,
    }
    read = Recipe.from_mapping(mapping)
    again = Recipe.from_yaml(read.text)
    for recipe in (read, again):
        values = {name: each.choices[0].values for name, each in recipe.parameters.items()}
        assert values == {"t": (0.0, 0.5, 1.0), "x": (0.5, 0.25), "y": (True,)}
        assert recipe.slices[0].sources[0].layer_range == (0, 4)
        assert (recipe.dtype, recipe.out_dtype) == ("BF16", "F32")
    many = {**mapping, "parameters": {"t": np.zeros(1_000_000)}}
    with pytest.raises(RecipeError, match="a number, a truth value or text is needed here"):
        Recipe.from_mapping(many)


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
