"""Modules: parts of a model that are merged apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from oxmerge.models.modules import find_modules
from oxmerge.models.names import find_layout
from writers import random_arrays, write_model

if TYPE_CHECKING:
    from collections.abc import Mapping

LLAVA = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (8, 3, 2, 2),
    **{f"vision_tower.vision_model.encoder.layers.{n}.mlp.fc1.weight": (16, 8) for n in range(2)},
    "multi_modal_projector.linear_1.weight": (12, 8),
    "language_model.model.embed_tokens.weight": (20, 12),
    **{f"language_model.model.layers.{n}.mlp.up_proj.weight": (24, 12) for n in range(3)},
    "language_model.model.norm.weight": (12,),
    "language_model.lm_head.weight": (20, 12),
}
QWEN = {
    "visual.patch_embed.proj.weight": (8, 3),
    **{f"visual.blocks.{n}.mlp.fc1.weight": (16, 8) for n in range(2)},
    "visual.merger.mlp.0.weight": (12, 8),
    "model.embed_tokens.weight": (20, 12),
    **{f"model.layers.{n}.mlp.up_proj.weight": (24, 12) for n in range(3)},
    "model.norm.weight": (12,),
    "lm_head.weight": (20, 12),
}
T5 = {
    "shared.weight": (20, 12),
    **{f"encoder.block.{n}.layer.0.weight": (12, 12) for n in range(2)},
    "encoder.final_layer_norm.weight": (12,),
    **{f"decoder.block.{n}.layer.0.weight": (12, 12) for n in range(3)},
    "decoder.final_layer_norm.weight": (12,),
}
CLIP = ("text_model.encoder", "vision_model.encoder")
CONFIGS: dict[str, Any] = {
    "llava": {
        "model_type": "llava",
        "text_config": {"num_hidden_layers": 3},
        "vision_config": {"num_hidden_layers": 2},
    },
    "qwen": {"model_type": "qwen2_vl", "num_hidden_layers": 3, "vision_config": {"depth": 2}},
    "t5": {"model_type": "t5", "num_layers": 2, "num_decoder_layers": 3},
}


def modules(
    wanted: list[str], shapes: Mapping[str, Any], counts: set[int]
) -> dict[str | None, list[str]]:
    layout = find_layout(dict.fromkeys(shapes), frozenset(counts))
    modules = find_modules(wanted, list(shapes), layout)
    assert all(len(each) == 1 for each in modules.roots.values())
    found: dict[str | None, list[str]] = {}
    for name in shapes:
        found.setdefault(modules.of(name), []).append(name)
    return found


def roots(wanted: list[str], shapes: Mapping[str, Any], counts: set[int]) -> list[list[str]]:
    layout = find_layout(dict.fromkeys(shapes), frozenset(counts))
    return list(find_modules(wanted, list(shapes), layout).roots.values())


def begin(names: list[str], *beginnings: str) -> bool:
    return all(name.startswith(beginnings) for name in names)


def test_modules_are_found_by_name_and_by_kind() -> None:
    found = modules(["text_decoder", "vision_tower"], LLAVA, {2, 3})
    assert begin(found["text_decoder"], "language_model.")
    assert begin(found["vision_tower"], "vision_tower.")
    assert found[None] == ["multi_modal_projector.linear_1.weight"]
    found = modules(["text_decoder", "vision_tower"], QWEN, {2, 3})
    assert begin(found["text_decoder"], "model.", "lm_head.")
    assert begin(found["vision_tower"], "visual.")
    assert None not in found
    # What mergekit calls the projector, within the vision part.
    found = modules(["vision_tower", "multi_modal_projector"], QWEN, {2, 3})
    assert found["multi_modal_projector"] == ["visual.merger.mlp.0.weight"]
    assert begin(found["vision_tower"], "visual.patch_embed.", "visual.blocks.")
    moved = {f"model.{name}": shape for name, shape in LLAVA.items() if "lm_head" not in name}
    found = modules(["language_model", "multi_modal_projector"], moved, {2, 3})
    assert begin(found["language_model"], "model.language_model.")
    assert begin(found[None], "model.vision_tower.")
    found = modules(["encoder", "decoder"], T5, {2, 3})
    assert begin(found["encoder"], "encoder.")
    assert found[None] == ["shared.weight"]
    # As the first LLaVA has it: the layers of the text are beside the vision tower.
    first = {f"model.{name}": shape for name, shape in LLAVA.items() if name[0] in "mv"}
    first |= {name: shape for name, shape in QWEN.items() if not name.startswith("visual")}
    vision = [name for name in first if name.startswith("model.vision_tower.")]
    assert modules(["text_decoder"], first, {2, 3})[None] == vision
    assert modules(["text_decoder", "vision_tower"], first, {2, 3})["vision_tower"] == vision
    assert modules(["text_decoder", "vision_model"], first, {2, 3})["vision_model"] == vision
    assert None not in modules(["model", "lm_head"], first, {2, 3})
    assert roots(["audio_tower", "x"], QWEN, {2, 3}) == [[], []]


def test_a_name_that_fits_several_parts_means_what_has_the_others_inside_or_nothing() -> None:
    shapes = [f"{part}.layers.{n}.w" for part in CLIP for n in range(2)]
    both = ["text_model.encoder", "vision_model.encoder"]
    assert roots(["encoder"], dict.fromkeys(shapes), {2}) == [both]
    assert roots(both, dict.fromkeys(shapes), {2}) == [[name] for name in both]
    inside = [*shapes, "encoder.x.encoder.w"]
    assert roots(["encoder"], dict.fromkeys(inside), {2}) == [["encoder"]]
    assert roots(["x.encoder"], dict.fromkeys(inside), {2}) == [["encoder.x.encoder"]]
    # How far in a part is does not tell whether it is meant.
    uneven = dict.fromkeys(["a.part.w", "a.part.x.part.w", "much.longer.part.w"])
    assert roots(["part"], uneven, {2}) == [["a.part", "much.longer.part"]]
    # Of a kind, there are two stacks of text.
    assert roots(["text_decoder"], T5, {2, 3}) == [["encoder", "decoder"]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, random_arrays(LLAVA, seed), "F32", config=CONFIGS["llava"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


RECIPE = """\
merge_method: linear
base_model: base
modules:
  text_decoder:
    models:
    - {model: a, parameters: {weight: [1, 0, 0.5]}}
    - {model: b, parameters: {weight: 1}}
  vision_tower:
    models:
    - {model: a, parameters: {weight: 1}}
    parameters: {normalize: false}
parameters: {normalize: false}
"""


def test_modules_are_merged_apart_and_the_rest_is_carried(folder: Path) -> None:
    plan = oxmerge.plan(RECIPE)
    (note,) = (note for note in plan.notes if "projector" in note)
    assert note.startswith("1 tensor kept from `base` (modules): multi_modal_projector")
    assert "keep = true: modules (line 3)" in plan.explain("multi_modal_projector.linear_1.weight")
    oxmerge.merge(plan, "out")
    models = {name: oxmerge.open(name) for name in ("base", "a", "b", "out")}
    weights = {"language_model.model.layers.1": 0.0, "language_model.model.layers.2": 0.5}
    for name in LLAVA:
        base, a, b, out = (np.asarray(models[model][name]) for model in models)
        weight = next((w for lead, w in weights.items() if name.startswith(lead)), 1.0)
        expected = a * np.float32(weight) + b if name.startswith("language_model") else a
        expected = base if name.startswith("multi_modal") else expected
        np.testing.assert_array_equal(out, expected, err_msg=name)


def test_what_is_wrong_with_modules_is_told(folder: Path) -> None:
    text = RECIPE.replace("vision_tower", "audio_tower").replace(
        "{normalize: false}\npara", "{normalise: 1}\npara"
    )
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(text)
    found = [(problem.code, str(problem.where)) for problem in caught.value.problems]
    assert found[0] == ("no-layers", "modules.audio_tower (line 8)")
    assert found[1] == ("unknown-parameter", "modules.audio_tower.parameters.normalise (line 11)")
    source = "{model: a, layer_range: [0, 1], parameters: {weight: 1}}"
    slices = f"    slices: [{{sources: [{source}]}}]\n"
    form = "a module has exactly one of `models` and `slices`"
    assert problems_of(RECIPE.replace("  vision_tower:\n", f"  vision_tower:\n{slices}")) == [form]
    assert problems_of(
        RECIPE.replace("    models:\n    - {model: a, parameters: {weight: 1}}\n", "")
    ) == [form]


def test_sweeps_and_lazy_merges_know_modules(folder: Path) -> None:
    place = "modules.text_decoder.models[b].parameters.weight"
    oxmerge.sweep(RECIPE, "w{n}", {place: [1, 2]})
    oxmerge.merge(RECIPE, "out")
    assert Path("w0/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    assert Path("w1/model.safetensors").read_bytes() != Path("out/model.safetensors").read_bytes()
    lazy = oxmerge.lazy(RECIPE)
    with oxmerge.open("out") as merged:
        for name in merged:
            np.testing.assert_array_equal(lazy[name], np.asarray(merged[name]))


VISION = """\
merge_method: passthrough
base_model: base
modules: {vision_tower: {models: [{model: a}]}}
"""


def problems_of(text: str) -> list[str]:
    with pytest.raises(oxmerge.OxmergeError) as caught:
        oxmerge.plan(text)
    assert isinstance(caught.value, oxmerge.PlanError | oxmerge.RecipeError)
    return [str(problem.message) for problem in caught.value.problems]


def test_a_single_module_is_not_the_whole_model(folder: Path) -> None:
    oxmerge.merge(VISION, "out")
    oxmerge.merge(VISION.replace("vision_tower", "default"), "whole")
    models = {name: oxmerge.open(name) for name in ("base", "a", "out", "whole")}
    for name in LLAVA:
        base, a, out, whole = (np.asarray(models[model][name]) for model in models)
        expected = a if name.startswith("vision_tower") else base
        np.testing.assert_array_equal(out, expected, err_msg=name)
        np.testing.assert_array_equal(whole, a, err_msg=name)


def test_accounts_tell_which_module_does_without_a_model(folder: Path) -> None:
    plan = oxmerge.plan(RECIPE, strict=True)
    assert plan.warnings == ()
    accounts = {each.model: each for each in plan.accounting}
    dropped = {
        model: {reason: len(names) for reason, names in each.dropped.items()}
        for model, each in accounts.items()
    }
    nowhere = "it is in no module that the recipe names"
    unseen, unread = (
        f"the module `{module}` does not list the model"
        for module in ("vision_tower", "text_decoder")
    )
    assert dropped == {
        "a": {nowhere: 1},
        "b": {unseen: 3, nowhere: 1},
        "base": {unseen: 3, unread: 6},
    }
    assert list(accounts["base"].copied.names) == ["multi_modal_projector.linear_1.weight"]
    text = str(plan)
    assert "dropped: the module `vision_tower` does not list the model (3)" in text
    assert "note      1 tensor kept from `base` (modules): multi_modal_projector" in text


def test_a_tensor_that_only_a_listed_model_has_is_warned_about(folder: Path) -> None:
    extra = {"vision_tower.extra.weight": (3,), "language_model.extra.weight": (3,)}
    write_model(folder / "more", random_arrays(LLAVA | extra, 1), "F32", config=CONFIGS["llava"])
    text = VISION.replace("model: a", "model: more")
    plan = oxmerge.plan(text)
    (warning,) = plan.warnings
    assert (warning.code, warning.tensor) == ("dropped-tensor", "vision_tower.extra.weight")
    with pytest.raises(oxmerge.PlanError, match="the donor `base` does not have it"):
        oxmerge.plan(text, strict=True)


def test_the_base_is_no_input_where_modules_leave_nothing_to_it(folder: Path) -> None:
    every = ", ".join(
        f"{module}: {{models: [{{model: a}}]}}"
        for module in ("vision_tower", "multi_modal_projector", "language_model")
    )
    plan = oxmerge.plan(VISION.replace("vision_tower: {models: [{model: a}]}", every))
    (warning,) = plan.warnings
    assert "`base_model` is no input of method `passthrough`" in str(warning)


def test_modules_that_are_the_same_or_unclear_are_refused(folder: Path) -> None:
    twice = VISION.replace(
        "{vision_tower:", "{vision_encoder: {models: [{model: b}]}, vision_tower:"
    )
    message = "the module `vision_tower` is `vision_encoder` too"
    assert problems_of(twice) == [message]
    inside = VISION.replace(
        "{vision_tower:", "{vision_model: {models: [{model: b}]}, vision_tower:"
    )
    (warning,) = oxmerge.plan(inside).warnings
    assert (warning.code, str(warning.where)) == ("no-effect", "modules.vision_tower (line 3)")
    unclear = {f"{part}.layers.{n}.w": (2,) for part in CLIP for n in range(2)}
    for seed, name in enumerate(("base", "a")):
        config = {"num_hidden_layers": 2}
        write_model(folder / f"clip-{name}", random_arrays(unclear, seed), "F32", config=config)
    text = VISION.replace("vision_tower", "encoder").replace(": base", ": clip-base")
    text = text.replace(": a}", ": clip-a}")
    assert problems_of(text) == ["`clip-base` has more than one module `encoder`"]
    with pytest.raises(oxmerge.PlanError, match=r"`text_model.encoder`, `vision_model.encoder`"):
        oxmerge.plan(text)
    oxmerge.plan(text.replace("{encoder", "{text_model.encoder"))


def test_slices_of_a_module_are_those_of_all_of_the_model(folder: Path) -> None:
    for seed, name in enumerate(("text", "other")):
        shapes = {name: shape for name, shape in QWEN.items() if not name.startswith("visual")}
        config = {"num_hidden_layers": 3}
        write_model(folder / name, random_arrays(shapes, seed), "F32", config=config)
    parts = [
        f"{{sources: [{{model: {model}, layer_range: [{start}, {start + 2}]}}]}}"
        for model, start in (("text", 0), ("other", 1))
    ]
    slices = f"slices: [{', '.join(parts)}]"
    text = "merge_method: passthrough\n"
    oxmerge.merge(f"{text}{slices}\n", "expected")
    oxmerge.merge(f"{text}modules: {{text_decoder: {{{slices}}}}}\n", "out")
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("expected", "out")]
    assert weights[0] == weights[1]
    seen = f"{text}modules: {{vision_tower: {{{slices}}}}}\n"
    assert problems_of(seen) == ["`text` has no module `vision_tower`"]
    norm = f"{text}modules: {{norm: {{{slices}}}}}\n"
    no_layers = "`slices` of the module `{}` needs a model with exactly one stack of layers".format
    assert problems_of(norm) == [no_layers("norm")]
    # The base has such layers, and the models of the slices do not.
    assert problems_of(f"{seen}base_model: base\n") == [no_layers("vision_tower")] * 2


def test_what_no_module_has_may_be_kept_from_another_model(folder: Path) -> None:
    keep = "oxmerge: {keep: {'multi_modal_*': b, 'language_model.lm_head.*': base}}\n"
    plan = oxmerge.plan(VISION + keep, strict=True)
    assert [note.partition(":")[0] for note in plan.notes] == [
        "1 tensor kept from `b` (oxmerge.keep.multi_modal_*)",
        "5 tensors kept from `base` (modules)",
        "1 tensor kept from `base` (oxmerge.keep.language_model.lm_head.*)",
    ]
    oxmerge.merge(plan, "out")
    name = "multi_modal_projector.linear_1.weight"
    with oxmerge.open("out") as out, oxmerge.open("b") as b:
        np.testing.assert_array_equal(np.asarray(out[name]), np.asarray(b[name]))


#: Four layers of text of three, and one of vision of two.
STACKED = """\
merge_method: linear
base_model: base
modules:
  text_decoder:
    slices:
    - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
      parameters: {weight: [1, 0]}
    - sources:
      - {model: b, layer_range: [1, 3], parameters: {weight: [{filter: norm, value: 5}]}}
      - {model: a, layer_range: [1, 3]}
    parameters: {weight: 0.25}
  vision_tower:
    slices: [{sources: [{model: b, layer_range: [1, 2]}]}]
parameters: {weight: 2, normalize: false}
dtype: float32
"""


def test_modules_are_made_of_slices_each_to_a_depth_of_its_own(folder: Path) -> None:
    plan = oxmerge.plan(STACKED)
    text, vision = "language_model.model.layers", "vision_tower.vision_model.encoder.layers"
    a, b = plan.models.index("a"), plan.models.index("b")
    assert plan.layer_map == {text: ((a, 0), (a, 1), (b, 1), (b, 2)), vision: ((b, 1),)}
    config = json.loads(plan.config or "")
    assert config["text_config"]["num_hidden_layers"] == 4
    assert config["vision_config"]["num_hidden_layers"] == 1
    explained = plan.explain(f"{text}.1.mlp.up_proj.weight")
    assert "modules.text_decoder.slices[0]" in explained
    assert "weight = 0" in explained
    oxmerge.merge(plan, "out")
    layers: list[list[tuple[float, str, int]]] = [
        [(1, "a", 0), (1, "b", 0)],
        [(0, "a", 1), (0, "b", 1)],
        [(0.25, "b", 1), (0.25, "a", 1)],
        [(0.25, "b", 2), (0.25, "a", 2)],
    ]
    up = "{}.{}.mlp.up_proj.weight".format
    made = {
        up(text, number): [(weight, model, up(text, layer)) for weight, model, layer in parts]
        for number, parts in enumerate(layers)
    }
    tokens, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    norm = "language_model.model.norm.weight"
    made[tokens] = [(1, "a", tokens), (1, "b", tokens)]
    made[norm] = [(5, "b", norm), (0.25, "a", norm)]
    made[head] = [(0.25, "b", head), (0.25, "a", head)]
    made[f"{vision}.0.mlp.fc1.weight"] = [(2, "b", f"{vision}.1.mlp.fc1.weight")]
    seen = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    made[seen] = [(2, "b", seen)]
    carried = "multi_modal_projector.linear_1.weight"
    made[carried] = [(1, "base", carried)]
    models = {name: oxmerge.open(name) for name in ("base", "a", "b")}
    with oxmerge.open("out") as out:
        assert set(out) == set(made)
        for name, parts in made.items():
            each = [np.float32(weight) * np.asarray(models[m][n]) for weight, m, n in parts]
            expected = np.sum(each, axis=0, dtype=np.float32)
            np.testing.assert_array_equal(np.asarray(out[name]), expected, name)
    accounts = {each.model: each.dropped for each in plan.accounting}
    assert list(accounts["b"]["outside layer_range"]) == [f"{vision}.0.mlp.fc1.weight"]
    assert accounts["a"].keys() == {
        "the module `vision_tower` does not list the model",
        "it is in no module that the recipe names",
    }


def test_slices_of_modules_are_saved_swept_and_merged_lazily(folder: Path) -> None:
    oxmerge.merge(STACKED, "out")
    plan = oxmerge.plan(STACKED)
    plan.save("plan.json")
    loaded = oxmerge.load_plan("plan.json")
    assert loaded.layer_map == plan.layer_map
    oxmerge.merge(loaded, "again")
    place = "modules.text_decoder.slices[1].sources[a].parameters.weight"
    oxmerge.sweep(STACKED, "w{n}", {place: [0.25, 1]})
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("out", "again", "w0")]
    assert weights == [weights[0]] * 3
    assert Path("w1/model.safetensors").read_bytes() != weights[0]
    lazy = oxmerge.lazy(STACKED)
    with oxmerge.open("out") as merged:
        for name in merged:
            np.testing.assert_array_equal(lazy[name], np.asarray(merged[name]))


def test_what_is_wrong_with_slices_of_modules_is_told(folder: Path) -> None:
    assert problems_of(STACKED.replace("[1, 2]", "[1, 3]")) == [
        "`layer_range` goes past the last layer of `b`"
    ]
    inner = "language_model.model.layers.0.mlp"
    text = STACKED.replace("  vision_tower:\n", f"  {inner}: {{models: [{{model: a}}]}}\n  seen:\n")
    assert set(problems_of(text)) == {
        "`base` has no module `seen`",
        f"the module `{inner}` lies in layers whose slices are listed",
    }
    ties = STACKED.replace("linear", "ties")
    message = "the base model `base` is not among the sources of this slice"
    assert problems_of(ties).count(message) == 3


def test_the_halves_of_a_model_are_counted_by_keys_of_their_own(folder: Path) -> None:
    """`num_layers` counts the encoder, and the decoder too where nothing else counts it."""
    shapes = {name: shape for name, shape in T5.items() if ".2." not in name}
    text = """\
merge_method: passthrough
modules:
  decoder:
    slices:
    - sources: [{model: t5, layer_range: [0, 2]}]
    - sources: [{model: t5, layer_range: [1, 2]}]
"""
    both = {"model_type": "t5", "num_layers": 2, "num_decoder_layers": 2}
    write_model(folder / "t5", random_arrays(shapes, 0), "F32", config=both)
    config = json.loads(oxmerge.plan(text).config or "")
    assert (config["num_layers"], config["num_decoder_layers"]) == (2, 3)
    config = json.loads(oxmerge.plan(text.replace("decoder:", "encoder:")).config or "")
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 2)
    one = {"model_type": "t5", "num_layers": 2}
    write_model(folder / "one", random_arrays(shapes, 0), "F32", config=one)
    (problem,) = problems_of(text.replace("t5", "one"))
    assert problem.startswith("`num_layers` counts the layers of `decoder.block` and of `encoder.")


def test_a_model_of_one_module_is_compared_in_that_one_only(folder: Path) -> None:
    """What the model has of text is not merged: it may be of any depth."""
    shapes = {name: shape for name, shape in LLAVA.items() if "layers.2" not in name}
    config = {**CONFIGS["llava"], "text_config": {"num_hidden_layers": 2}}
    write_model(folder / "short", random_arrays(shapes, 1), "F32", config=config)
    short = VISION.replace("model: a", "model: short")
    oxmerge.plan(short)
    text = short.replace("vision_tower", "text_decoder")
    assert problems_of(text) == ["layer counts differ: `language_model.model.layers` of `short`"]
