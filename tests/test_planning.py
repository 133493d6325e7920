"""Planning: which tensors an output has, what they are made of, and what is wrong together."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import oxmerge
import pytest
import yaml
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from oxmerge import _core
from oxmerge.errors import PlanError
from oxmerge.models.names import find_layout
from oxmerge.planning.accounting import compact_names
from oxmerge.recipe.recipe import Recipe
from snapshot import check_snapshot, check_told

if TYPE_CHECKING:
    from oxmerge.planning.plans import Plan


class Shelf:
    """A folder of models, and what can be done with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, **specimens: zoo.Specimen) -> Shelf:
        for name, specimen in specimens.items():
            zoo.write(self.folder / name, specimen)
        return self

    def plan(self, recipe: str | dict[str, Any], **options: Any) -> Plan:
        make: Any = Recipe.from_yaml if isinstance(recipe, str) else Recipe.from_mapping
        return zoo.plan_in(self.folder, make(recipe), **options)

    def problems(self, recipe: str | dict[str, Any], **options: Any) -> list[str]:
        with pytest.raises(PlanError) as caught:
            self.plan(recipe, **options)
        # Warnings need not say what to do.
        assert "strict" in options or all(problem.advice for problem in caught.value.problems)
        text = [str(problem) for problem in caught.value.problems]
        return [line.replace(f"{self.folder}/", "") for line in text]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def weighted(*names: str, weight: object = 0.5) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": {"weight": weight}} for name in names]


def linear(*names: str, **more: object) -> dict[str, Any]:
    return {"merge_method": "linear", "models": weighted(*names), **more}


def sources(merge: Plan, name: str) -> list[tuple[str, str]]:
    (tensor,) = [tensor for tensor in merge.tensors if tensor.name == name]
    return [(source.model, source.name) for source in tensor.sources]


def values(merge: Plan, parameter: str) -> dict[str, object]:
    return {
        tensor.name: tensor.sources[0].parameters.get(parameter, tensor.parameters.get(parameter))
        for tensor in merge.tensors
    }


# What a plan has in it.


def test_the_plan_has_every_tensor(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(1, tied=True), b=zoo.llama(1, tied=True))
    plan = shelf.plan(linear("a", "b"), seed=7)
    assert (plan.method, plan.seed) == ("linear", 7)
    assert [file["path"].removeprefix(f"{shelf.folder}/") for file in plan.input_files] == [
        "a/model.safetensors",
        "b/model.safetensors",
        "a/config.json",
        "b/config.json",
    ]
    assert all(
        file.keys() == {"path", "size", "modified_ns", "device", "inode"}
        for file in plan.input_files
    )
    tensor = plan.tensors[0]
    assert tensor == plan.tensors[-len(plan.tensors)] == plan.tensors[:1][0]
    assert tensor.name == plan.tensors.names[0] == "model.embed_tokens.weight"
    assert (tensor.shape, tensor.dtype, tensor.base) == ((40, 16), "BF16", None)
    assert (tensor.shard, tensor.parameters) == (0, {"normalize": True})
    first, second = tensor.sources
    assert (first.model, first.name, first.dtype) == ("a", "model.embed_tokens.weight", "BF16")
    assert (first.file, first.parameters) == (0, {"weight": 0.5})
    assert (second.model, second.file) == ("b", 1)


def test_files_of_several_shards_are_numbered_through(shelf: Shelf) -> None:
    zoo.write(shelf.folder / "a", zoo.llama(2), files=3)
    zoo.write(shelf.folder / "b", zoo.llama(2), files=2)
    merge = shelf.plan(linear("a", "b"))
    others = ["config.json", "model.safetensors.index.json"]
    assert [Path(file["path"]).name for file in merge.input_files[5:]] == 2 * others
    for tensor in merge.tensors:
        for source in tensor.sources:
            file = merge.input_files[source.file]
            assert Path(file["path"]).parent.name == source.model
            assert source.start + tensor.bytes <= file["size"]


def test_the_output_is_cut_into_shards(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(2))
    merge = shelf.plan(linear("a"), shard_size=3000)
    places = [(tensor.shard, tensor.start) for tensor in merge.tensors]
    assert places == sorted(places)
    assert len(merge.shards) == places[-1][0] + 1 > 1


def test_a_base_outside_the_models_comes_last(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(1), b=zoo.llama(1), base=zoo.llama(1))
    recipe = {"merge_method": "ties", "base_model": "base", "models": weighted("a", "b")}
    merge = shelf.plan(recipe)
    assert list(merge.models) == ["a", "b", "base"]
    assert (merge.donor, merge.base) == (2, 2)
    tensor = merge.tensors[0]
    assert tensor.base == 2
    assert [source.parameters for source in tensor.sources] == [
        {"weight": 0.5, "density": 1.0},
        {"weight": 0.5, "density": 1.0},
        {},
    ]


def test_a_listed_base_stays_where_it_is(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(1), base=zoo.llama(1))
    models = [{"model": "base"}, *weighted("a")]
    recipe = {"merge_method": "ties", "base_model": "./base", "models": models}
    tensor = shelf.plan(recipe).tensors[0]
    assert [source.model for source in tensor.sources] == ["base", "a"]
    assert tensor.base == 0


def test_linear_does_not_take_the_base_in(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(1), base=zoo.llama(1))
    merge = shelf.plan(linear("a", base_model="base"))
    assert sources(merge, "lm_head.weight") == [("a", "lm_head.weight")]
    assert merge.models[merge.donor] == "base"
    assert [str(warning) for warning in merge.warnings] == [
        (
            "base_model: `base_model` is no input of method `linear`\n"
            "  hint: it gives the names, the config and the tokenizer; to merge it, list it"
        )
    ]
    base = merge.accounting[1]
    assert list(base.dropped) == ["the model is no input, it gives names and config"]


def test_linear_takes_a_listed_base_like_any_other(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(1), b=zoo.llama(1))
    merge = shelf.plan(linear("a", "b", base_model="b"))
    assert merge.tensors[0].base is None
    assert merge.models[merge.donor] == "b"
    assert merge.warnings == ()


DTYPES: list[tuple[str, str, dict[str, str], str]] = [
    ("BF16", "BF16", {}, "BF16"),
    ("BF16", "F16", {}, "F32"),
    ("F32", "BF16", {}, "F32"),
    ("F16", "F64", {}, "F64"),
    ("F32", "F32", {"dtype": "bfloat16"}, "BF16"),
    ("F32", "F32", {"dtype": "bfloat16", "out_dtype": "float16"}, "F16"),
]


@pytest.mark.parametrize(("one", "other", "asked", "expected"), DTYPES)
def test_output_types(
    shelf: Shelf, one: str, other: str, asked: dict[str, str], expected: str
) -> None:
    shelf.put(a=zoo.llama(1, dtype=one), b=zoo.llama(1, dtype=other))
    merge = shelf.plan(linear("a", "b", **asked))
    assert {tensor.dtype for tensor in merge.tensors} == {expected}
    assert merge.dtype == expected


def test_integer_tensors_are_copied_without_parameters(shelf: Shelf) -> None:
    shelf.put(a=zoo.bert(1), b=zoo.bert(1))
    weight = [{"filter": "encoder", "value": 0.5}, {"filter": "e", "value": 1}]
    recipe = linear("a", "b", dtype="float16") | {"models": weighted("a", "b", weight=weight)}
    tensor = shelf.plan(recipe).tensors[0]
    assert (tensor.name, tensor.dtype) == ("bert.embeddings.position_ids", "I64")
    assert tensor.parameters == {}
    assert [source.parameters for source in tensor.sources] == [{}, {}]


# Parameters over layers and names.


def test_positions_over_whole_models(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(5))
    merge = shelf.plan({"merge_method": "linear", "models": weighted("a", weight=[1, 2])})
    weights = values(merge, "weight")
    norms = [weights[f"model.layers.{layer}.input_layernorm.weight"] for layer in range(5)]
    assert norms == [1.0, 1.25, 1.5, 1.75, 2.0]
    loose = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert [weights[name] for name in loose] == [1.0, 1.0, 1.0]


def test_each_stack_has_positions_of_its_own(shelf: Shelf) -> None:
    shelf.put(a=zoo.t5(2, 3))
    merge = shelf.plan({"merge_method": "linear", "models": weighted("a", weight=[1, 2])})
    weights = values(merge, "weight")
    name = "block.{}.layer.0.layer_norm.weight"
    assert [weights["encoder." + name.format(i)] for i in range(2)] == [1.0, 2.0]
    assert [weights["decoder." + name.format(i)] for i in range(3)] == [1.0, 1.5, 2.0]


def test_extra_layers_are_loose(shelf: Shelf) -> None:
    shelf.put(a=zoo.deepseek(3))
    merge = shelf.plan({"merge_method": "linear", "models": weighted("a", weight=[0.25, 1])})
    weights = values(merge, "weight")
    assert weights["model.layers.2.input_layernorm.weight"] == 1.0
    assert weights["model.layers.3.input_layernorm.weight"] == 0.25


def test_positions_start_again_in_each_slice(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(4))
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 3]}]},
        {"sources": [{"model": "a", "layer_range": [3, 4]}]},
        {"sources": [{"model": "a", "layer_range": [2, 4]}]},
    ]
    recipe = {"merge_method": "linear", "slices": slices, "parameters": {"weight": [2, 1]}}
    weights = values(shelf.plan(recipe), "weight")
    norms = [weights[f"model.layers.{layer}.input_layernorm.weight"] for layer in range(6)]
    assert norms == [2.0, 1.5, 1.0, 1.0, 2.0, 1.0]
    assert weights["model.embed_tokens.weight"] == weights["model.norm.weight"] == 2.0


def test_shared_filters_see_output_names_and_own_filters_source_names(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(4), b=zoo.llama(4))
    at_3 = [{"filter": "layers.3.", "value": 1}, {"value": 0.5}]
    flags = [{"filter": "layers.1.", "value": False}, {"value": True}]
    slices = [
        {
            "sources": [
                {"model": "a", "layer_range": [2, 4], "parameters": {"weight": at_3}},
                {"model": "b", "layer_range": [0, 2]},
            ]
        }
    ]
    parameters = {"weight": 0.25, "normalize": flags}
    merge = shelf.plan({"merge_method": "linear", "slices": slices, "parameters": parameters})
    name = "model.layers.{}.input_layernorm.weight"
    assert [values(merge, "weight")[name.format(layer)] for layer in range(2)] == [0.5, 1.0]
    assert [values(merge, "normalize")[name.format(layer)] for layer in range(2)] == [True, False]


def test_the_slice_comes_before_the_top(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(2))
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 1]}], "parameters": {"weight": 2}},
        {"sources": [{"model": "a", "layer_range": [1, 2]}]},
    ]
    recipe = {"merge_method": "linear", "slices": slices, "parameters": {"weight": 3}}
    weights = values(shelf.plan(recipe), "weight")
    assert weights["model.layers.0.input_layernorm.weight"] == 2.0
    assert weights["model.layers.1.input_layernorm.weight"] == 3.0
    assert (weights["model.embed_tokens.weight"], weights["lm_head.weight"]) == (2.0, 3.0)


# Slices.

STACKED = """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [1, 4]}]
"""


def test_slices_are_stacked_and_renumbered(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(4), b=zoo.llama(4))
    merge = shelf.plan(STACKED)
    names = [tensor.name for tensor in merge.tensors]
    assert names == list(zoo.llama(6).tensors)
    layers = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3))
    assert merge.layer_map == {"model.layers": layers}
    norm = "model.layers.{}.input_layernorm.weight"
    assert sources(merge, norm.format(3)) == [("b", norm.format(1))]
    assert sources(merge, "model.embed_tokens.weight") == [("a", "model.embed_tokens.weight")]
    assert sources(merge, "lm_head.weight") == [("b", "lm_head.weight")]
    assert merge.warnings == ()
    check_snapshot("stacked", zoo.accounts(merge))


def test_extra_layers_follow_the_last_layer_again(shelf: Shelf) -> None:
    shelf.put(a=zoo.deepseek(3), b=zoo.deepseek(3))
    merge = shelf.plan(STACKED.replace("[1, 4]", "[1, 3]"))
    assert sources(merge, "model.layers.5.enorm.weight") == [("b", "model.layers.3.enorm.weight")]


def test_the_base_of_a_slice_gives_its_tensors(shelf: Shelf) -> None:
    with_bias = zoo.llama(2)
    with_bias.tensors["model.layers.0.mlp.up_proj.bias"] = ("BF16", (32,))
    shelf.put(a=zoo.llama(2), b=with_bias)
    slices = [
        {
            "base_model": "a",
            "sources": [
                {"model": "b", "layer_range": [0, 2], "parameters": {"weight": 1}},
                {"model": "a", "layer_range": [0, 2]},
            ],
        }
    ]
    merge = shelf.plan({"merge_method": "ties", "slices": slices})
    assert {tensor.base for tensor in merge.tensors} == {1}
    assert [str(warning).partition("`: ")[2] for warning in merge.warnings] == [
        (
            "tensor `model.layers.0.mlp.up_proj.bias`: a tensor of `b` is dropped: the slice's "
            "donor "
            "does not have it"
        )
    ]


def test_a_loose_tensor_of_no_known_side_is_asked_about(shelf: Shelf) -> None:
    odd = zoo.llama(4)
    odd.tensors["model.gate.weight"] = ("BF16", (16,))
    shelf.put(a=odd, b=odd)
    assert shelf.problems(STACKED) == [
        (
            "tensor `model.gate.weight`: cannot tell whether it comes before the layers or after "
            "them\n"
            "  hint: make the first and the last slice list the same models and parameters"
        )
    ]
    same = STACKED.replace("model: b", "model: a")
    assert sources(shelf.plan(same), "model.gate.weight") == [("a", "model.gate.weight")]


def test_slices_need_one_stack(shelf: Shelf) -> None:
    plain = zoo.llama(2)
    shelf.put(a=zoo.qwen2_vl(), b=replace(plain, config={}))
    slices = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in ("b", "a")]
    assert shelf.problems({"merge_method": "passthrough", "slices": slices}) == [
        (
            "`b`: `slices` needs a model with exactly one stack of layers: found 1 numbered "
            "prefixes, "
            "none of which the config counts (`model.layers`)\n"
            "  hint: merge whole models with `models`, or put the config.json that counts the "
            "layers beside the weights"
        ),
        (
            "`a`: `slices` needs a model with exactly one stack of layers: found 2 stacks "
            "(`model.layers`, `visual.blocks`)\n  hint: merge whole models with `models`, or put "
            "`slices` of each part under `modules`"
        ),
    ]


def test_slices_of_models_of_other_widths_do_not_fit(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(4), b=zoo.llama(4, width=32))
    problems = shelf.problems(STACKED)
    (problem,) = problems
    assert "`b` has other sizes than the donor `a`: expected `hidden_size` 16" in problem


def test_stacks_of_another_name_do_not_fit(shelf: Shelf) -> None:
    shelf.put(a=zoo.gpt2(depth=4), b=zoo.gpt2("transformer.", depth=4))
    assert shelf.problems(STACKED)[:1] == [
        (
            "slices[1] (line 5): `b`: the layers of `b` have another name: "
            "expected `h`, as in `a`, found `transformer.h`\n"
            "  hint: stack models that were saved by the same class"
        )
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("two")).put(a=zoo.deepseek(5, 2), b=zoo.deepseek(5, 2))


RANGES = st.tuples(st.sampled_from("ab"), st.integers(0, 4), st.integers(1, 5)).map(
    lambda row: {"model": row[0], "layer_range": [row[1], min(5, row[1] + row[2])]}
)


@settings(deadline=None, max_examples=40)
@given(chosen=st.lists(RANGES, min_size=1, max_size=5))
def test_whatever_is_sliced_adds_up(two: Shelf, chosen: list[dict[str, Any]]) -> None:
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [source]} for source in chosen],
    }
    wanted = [
        (source["model"], layer) for source in chosen for layer in range(*source["layer_range"])
    ]
    # By a rule of the config the first two layers are dense, and the others are not.
    if any((at < 2) != (layer < 2) for at, (_, layer) in enumerate(wanted)):
        with pytest.raises(PlanError, match="first_k_dense_replace"):
            two.plan(recipe)
        return
    merge = two.plan(recipe)
    (layers,) = merge.layer_map.values()
    assert [(merge.models[i], layer) for i, layer in layers] == wanted
    names = [tensor.name for tensor in merge.tensors]
    assert len(set(names)) == len(names)
    layout = find_layout(names, frozenset({len(wanted), len(wanted) + 1}))
    stack_names = {f"model.layers.{number}." for number in range(len(wanted) + 1)}
    assert {name[: name.index(".", 13) + 1] for name in names if layout.place(name)} == stack_names
    used = {(source.model, source.name) for tensor in merge.tensors for source in tensor.sources}
    for account in merge.accounting:
        kept = {(account.model, name) for name in (*account.merged, *account.copied)}
        assert kept == {row for row in used if row[0] == account.model}
        assert account.total == len(zoo.deepseek(5, 2).tensors)


# Contracts.

CONTRACTS: list[dict[str, Any]] = [
    {"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}]},
    {
        "merge_method": "slerp",
        "base_model": "c",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": 0.5},
    },
    {"merge_method": "nuslerp", "base_model": "a", "models": weighted("a", "b")},
    {"merge_method": "passthrough", "models": [{"model": "a"}, {"model": "b"}]},
    linear("a", "./a"),
    {"merge_method": "linear", "models": [{"model": "a", "parameters": {"wieght": 1}}]},
    {
        "merge_method": "ties",
        "base_model": "a",
        "slices": [{"sources": [{"model": "b", "layer_range": [0, 1]}]}],
        "parameters": {"weight": 1},
    },
    {"merge_method": "zzz", "models": [{"model": "a"}]},
    {"merge_method": "dare-ties", "models": [{"model": "a"}]},
    linear("a", parameters={"normalise": True, "desnity": 1}),
]


def test_contracts(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(4), b=zoo.llama(4), c=zoo.llama(4))
    check_told("contracts", [(_written(each), shelf.problems(each)) for each in CONTRACTS])


def _written(recipe: dict[str, Any]) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None).rstrip()


def test_layers_of_one_model_are_merged_with_each_other(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(4), b=zoo.llama(4))
    first, second = ({"model": "a", "layer_range": [at, at + 2]} for at in (0, 2))
    recipe = {"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.5}}
    merge = shelf.plan({**recipe, "slices": [{"sources": [first, second]}]})
    name = "model.layers.1.mlp.up_proj.weight"
    assert sources(merge, name) == [("a", name), ("a", name.replace("1", "3", 1))]
    assert merge.tensors[0].base == 0
    assert [str(warning.message) for warning in merge.warnings] == []
    merge = shelf.plan({**recipe, "slices": [{"sources": [first, first]}]})
    assert [warning.code for warning in merge.warnings][:1] == ["duplicate-model"]


def test_parameters_of_a_module_stand_before_those_of_the_recipe(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(1), b=zoo.llama(1))
    module = {
        "models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 3}}],
        "parameters": {"weight": [{"filter": "mlp", "value": 2}]},
    }
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}}
    merge = shelf.plan({**recipe, "modules": {"default": module}})
    found = {
        tensor.name: [source.parameters["weight"] for source in tensor.sources]
        for tensor in merge.tensors
    }
    assert found["model.layers.0.mlp.up_proj.weight"] == [2, 3]
    assert found["model.norm.weight"] == [1, 3]
    unknown = {**module, "parameters": {"wieght": 1}}
    (problem,) = shelf.problems({**recipe, "modules": {"default": unknown}})
    assert problem.startswith("modules.default.parameters.wieght: unknown parameter")


# Models that are not there, or do not fit.


def test_missing_models_name_the_places_tried(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(a=zoo.llama(1))
    elsewhere = tmp_path / "recipes"
    elsewhere.mkdir()
    names = ("a", "./x", "gpt2", "org/name")
    recipe = Recipe.from_mapping(linear(*names), folder=str(elsewhere))
    with pytest.raises(PlanError) as caught:
        zoo.plan_in(tmp_path, recipe)
    assert [str(problem).replace(str(tmp_path), "") for problem in caught.value.problems] == [
        (
            "models[1]: no model `./x`: there is no `/x` or `/recipes/x`\n"
            "  hint: name the folder of a model, or a safetensors file"
        ),
        *(
            f"models[{at}]: no model `{name}`: there is no `/{name}` or `/recipes/{name}`, "
            f"the Hub's cache `{os.environ['HF_HOME']}/hub` has no `{name}`, "
            "and the Hub may not be asked\n"
            "  hint: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE; or name the folder of a "
            "model, or a safetensors file"
            for at, name in ((2, "gpt2"), (3, "org/name"))
        ),
    ]


def test_a_misspelt_folder_is_told(shelf: Shelf) -> None:
    shelf.put(**{"org/tuned": zoo.llama(1), "base": zoo.llama(1)})
    problems = shelf.problems(linear("org/tund", "./bse"))
    hints = [problem.rpartition("hint: ")[2] for problem in problems]
    assert [hint.partition("?")[0] for hint in hints] == [
        "did you mean `org/tuned`",
        "did you mean `./base`",
    ]
    assert hints[0].endswith(
        "If not, unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE; or name the folder of a model, "
        "or a safetensors file"
    )


def test_a_model_may_lie_beside_the_recipe(shelf: Shelf, tmp_path: Path) -> None:
    zoo.write(tmp_path / "recipes" / "a", zoo.llama(1))
    path = tmp_path / "recipes" / "recipe.yml"
    path.write_text(json.dumps(linear("a")))
    merge = zoo.plan_in(tmp_path, Recipe.from_yaml(path))
    assert merge.input_files[0]["path"].startswith(str(tmp_path / "recipes" / "a"))


def test_a_broken_model_is_one_of_the_problems(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(1))
    (shelf.folder / "b").mkdir()
    assert shelf.problems(linear("a", "b", parameters={"wieght": 1})) == [
        "parameters.wieght: unknown parameter `wieght`\n  hint: did you mean `weight`?",
        (
            "`b`: the directory holds no weights: "
            "expected `model.safetensors` or `model.safetensors.index.json`\n"
            "  hint: name the directory that they are in, or download them"
        ),
    ]


def test_missing_tensors_are_grouped(shelf: Shelf) -> None:
    more = zoo.llama(4)
    for layer in range(4):
        more.tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = ("BF16", (16,))
    shelf.put(a=more, b=zoo.llama(4))
    name = "model.layers.{}.self_attn.q_proj.bias"
    shown = ", ".join(f"`{name.format(layer)}`" for layer in range(3))
    assert shelf.problems(linear("a", "b")) == [
        (
            f"`b`: `b` lacks a tensor: expected what the donor `a` has, found nothing "
            f"(4 tensors: {shown}, ...)\n"
            "  hint: use models of one architecture; or download it again, if it is not complete"
        )
    ]


def test_tensors_of_others_are_dropped_and_listed(shelf: Shelf) -> None:
    more = zoo.llama(2)
    more.tensors["model.layers.0.self_attn.q_proj.bias"] = ("BF16", (16,))
    shelf.put(a=zoo.llama(2), b=more)
    merge = shelf.plan(linear("a", "b"))
    dropped = merge.accounting[1].dropped
    assert {reason: list(share) for reason, share in dropped.items()} == {
        "the donor `a` does not have it": ["model.layers.0.self_attn.q_proj.bias"]
    }
    assert len(merge.warnings) == 1
    assert len(shelf.problems(linear("a", "b"), strict=True)) == 1


def test_a_tied_head_is_the_embedding_where_others_have_heads(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(2), b=zoo.llama(2, tied=True), c=zoo.llama(2, tied=True))
    folder = shelf.folder

    def head_of(name: str, recipe: dict[str, Any]) -> np.ndarray:
        recipe = json.loads(json.dumps(recipe).replace('"model": "', f'"model": "{folder}/'))
        oxmerge.merge(recipe, folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        with oxmerge.open(folder / name) as merged:
            return np.asarray(merged["lm_head.weight"], "f4")

    own = oxmerge.open(folder / "a")["lm_head.weight"].astype("f4")
    of_b = oxmerge.open(folder / "b")["model.embed_tokens.weight"].astype("f4")
    mean = ((own + of_b) / 2).astype(ml_dtypes.bfloat16).astype("f4")
    assert np.array_equal(head_of("ab", linear("a", "b")), mean)
    assert np.array_equal(head_of("ba", linear("b", "a")), mean)
    # The head comes from the last slice: of a model that ties it, below a config that does not.
    ranges = {"a": [0, 1], "b": [1, 2]}
    for listed, head in (("ab", of_b), ("ba", own)):
        slices = [{"sources": [{"model": m, "layer_range": ranges[m]}]} for m in listed]
        stacked = {"merge_method": "passthrough", "slices": slices}
        assert np.array_equal(head_of(f"stack-{listed}", stacked), head)

    merge = shelf.plan(linear("a", "b"))
    assert any("`b` ties its head to the embedding" in note for note in merge.notes)
    # Where all are tied, nothing is written twice.
    assert "lm_head.weight" not in shelf.plan(linear("b", "c")).tensors.names


def test_a_head_that_is_not_there_is_named(shelf: Shelf) -> None:
    untold = zoo.llama(1, tied=True)
    del untold.config["tie_word_embeddings"]
    shelf.put(a=zoo.llama(1), b=untold)
    assert shelf.problems(linear("a", "b")) == [
        (
            "`b`: tensor `lm_head.weight`: `b` has no head of its own, the donor `a` has one\n"
            "  hint: if its head is its embedding, say so: `tie_word_embeddings: true` in its "
            "config.json"
        )
    ]


def test_vocabularies_that_differ_are_named(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(1), b=zoo.llama(1, vocabulary=41))
    problems = shelf.problems(linear("a", "b"))
    assert problems == [
        (
            "`b/model.safetensors`: `b` has a tensor of another shape than the donor `a`: expected "
            "[40, 16], found [41, 16] (2 tensors: `model.embed_tokens.weight`, `lm_head.weight`)\n"
            "  hint: the vocabularies differ; with a `tokenizer.json` beside each model, "
            "`tokenizer_source: union` matches their rows by token"
        )
    ]


def test_depths_that_differ_are_one_problem(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(4), b=zoo.llama(3), c=zoo.llama(6))
    assert shelf.problems(linear("a", "b", "c")) == [
        (
            "`b`: layer counts differ: `model.layers` of `b`: expected 4, as in `a`, found 3\n"
            "  hint: choose layers with `slices`"
        ),
        (
            "`c`: layer counts differ: `model.layers` of `c`: expected 4, as in `a`, found 6\n"
            "  hint: choose layers with `slices`"
        ),
    ]


def test_integer_types_must_agree(shelf: Shelf) -> None:
    other = zoo.bert(1)
    other.tensors["bert.embeddings.position_ids"] = ("F32", (1, 8))
    shelf.put(a=zoo.bert(1), b=other)
    (problem,) = shelf.problems(linear("a", "b"))
    assert problem.endswith(
        "and only floats can be converted: expected I64, found F32\n"
        "  hint: use models that were saved in one way"
    )


def test_quantised_models_are_refused(shelf: Shelf) -> None:
    packed = zoo.llama(2)
    config = packed.config | {"quantization_config": {"quant_method": "gptq"}}
    for name in list(packed.tensors):
        if "proj" in name:
            packed.tensors[name] = ("I32", (2, 16))
    packed = replace(packed, config=config)
    shelf.put(a=packed, b=packed)
    problems = shelf.problems(linear("a", "b"))
    assert [problem.partition(":")[0] for problem in problems] == [
        "`a/config.json`",
        "`b/config.json`",
    ]
    assert all("the checkpoint is quantised (gptq)" in problem for problem in problems)
    # Beside a file that is named itself, the engine looks at no config.
    problems = shelf.problems(linear("a/model.safetensors", "b/model.safetensors"))
    assert len(problems) == 2
    assert "not supported yet: merging the quantised weights of `a/model" in problems[0]


# Warnings.


TIES = {"merge_method": "ties", "base_model": "a", "models": [{"model": "a"}, *weighted("b")]}

WARNED: list[dict[str, Any]] = [
    linear("b") | {"models": [{"model": "b", "parameters": {"weight": 1, "normalize": False}}]},
    linear("b", parameters={"density": 0.5}),
    linear("b", parameters={"select_topk": 0.5}),
    TIES | {"models": weighted("a", "b")},
    TIES | {"parameters": {"int8_mask": True}},
    linear("b") | {"models": weighted("b", weight=[{"filter": "mpl", "value": 1}, {"value": 2}])},
]


def test_what_has_no_effect_is_warned_of(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(1), b=zoo.llama(1))
    told = [(_written(each), [*map(str, shelf.plan(each).warnings)]) for each in WARNED]
    assert {len(warnings) for _, warnings in told} == {1}
    check_told("parameters_without_effect", told)


def test_gradients_without_layers_are_warned_of(shelf: Shelf) -> None:
    shelf.put(a=replace(zoo.llama(2), config={}))
    merge = shelf.plan({"merge_method": "linear", "models": weighted("a", weight=[1, 2])})
    assert "gradients have no effect beyond their first value" in str(merge.warnings[0])
    assert set(values(merge, "weight").values()) == {1.0}


def test_a_model_without_a_config_is_read_like_its_sibling(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(3), b=replace(zoo.llama(3), config={}))
    models = [*weighted("a"), *weighted("b", weight=[0, 1])]
    merge = shelf.plan({"merge_method": "linear", "models": models})
    assert merge.warnings == ()


def test_strict_makes_warnings_problems(shelf: Shelf) -> None:
    shelf.put(b=zoo.llama(1))
    recipe = linear("b", parameters={"density": 0.5})
    assert len(shelf.problems(recipe, strict=True)) == 1


# Everything together.

SEVEN = """\
merge_method: linear
slices:
- sources:
  - model: base
    layer_range: [0, 1]
  - model: missing_tensor
    layer_range: [0, 1]
- sources:
  - model: base
    layer_range: [1, 2]
  - model: other_shape
    layer_range: [1, 2]
- sources:
  - model: base
    layer_range: [0, 1]
  - model: /nowhere
    layer_range: [1, 2]
- sources:
  - model: base
    layer_range: [0, 2]
  - model: good
    layer_range: [0, 1]
- sources:
  - model: base
    layer_range: [0, 1]
    parameters: {weight: 0.5}
  - model: good
    layer_range: [0, 1]
    parameters: {weight: -0.5}
- sources:
  - model: good
    layer_range: [3, 9]
- sources:
  - model: base
    layer_range: [3, 4]
parameters:
  weight: 1
  wieght: 1
"""


def test_seven_faults_are_seven_entries_of_one_report(shelf: Shelf) -> None:
    missing, other = zoo.llama(4), zoo.llama(4)
    del missing.tensors["model.layers.0.mlp.up_proj.weight"]
    other.tensors["model.layers.1.mlp.up_proj.weight"] = ("BF16", (30, 16))
    shelf.put(base=zoo.llama(4), good=zoo.llama(4), missing_tensor=missing, other_shape=other)
    problems = shelf.problems(SEVEN)
    assert len(problems) == 7
    check_snapshot("seven_problems", "\n".join(problems))


# Robustness and speed.


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seeds_out_of_range(shelf: Shelf, seed: int) -> None:
    shelf.put(a=zoo.llama(1))
    with pytest.raises(ValueError, match="seed must be"):
        shelf.plan(linear("a"), seed=seed)


@pytest.mark.parametrize("seed", [1.0, "1", None])
def test_seeds_that_are_no_whole_numbers(shelf: Shelf, seed: Any) -> None:
    shelf.put(a=zoo.llama(1))
    with pytest.raises(TypeError, match="seed must be a whole number"):
        shelf.plan(linear("a"), seed=seed)


def test_a_model_is_opened_once(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.put(a=zoo.llama(2), b=zoo.llama(2))
    opened = []
    open_checkpoint = _core.open_checkpoint

    def noted(path: str) -> _core.Checkpoint:
        opened.append(os.path.basename(path))
        return open_checkpoint(path)

    monkeypatch.setattr(_core, "open_checkpoint", noted)
    shelf.plan(STACKED.replace("[1, 4]", "[1, 2]").replace("[0, 3]", "[0, 2]"))
    assert opened == ["a", "b"]


def test_planning_takes_time_in_proportion(shelf: Shelf) -> None:
    shelf.put(**{name: zoo.deepseek(31, 3, 180) for name in ("a", "b")})
    begin = time.process_time()
    merge = shelf.plan(linear("a", "b"))
    assert len(merge.tensors) > 16_000
    assert time.process_time() - begin < 20


def test_names_are_compacted() -> None:
    names = [f"l.{i}.experts.{j}.w" for i in (0, 1, 2, 5) for j in range(2)]
    assert compact_names(["a.w", *names, "l.9.w", "z"]) == [
        "a.w",
        "l.{0..2,5}.experts.{0..1}.w",
        "l.9.w",
        "z",
    ]


def test_the_engine_finds_weights_that_add_up_to_zero(shelf: Shelf) -> None:
    shelf.put(a=zoo.llama(1), b=zoo.llama(1))
    models = [*weighted("a"), *weighted("b", weight=-0.5)]
    (problem,) = shelf.problems({"merge_method": "linear", "models": models})
    assert "(12 tensors: " in problem
