"""Modules: parts of a model that are merged apart."""

from __future__ import annotations

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
    module_of, roots = find_modules(wanted, list(shapes), layout)
    assert all(len(each) == 1 for each in roots.values())
    found: dict[str | None, list[str]] = {}
    for name in shapes:
        found.setdefault(module_of(name), []).append(name)
    return found


def roots(wanted: list[str], shapes: Mapping[str, Any], counts: set[int]) -> list[list[str]]:
    layout = find_layout(dict.fromkeys(shapes), frozenset(counts))
    return list(find_modules(wanted, list(shapes), layout)[1].values())


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


def test_a_name_that_fits_several_parts_means_the_outermost_or_nothing() -> None:
    shapes = [f"{part}.layers.{n}.w" for part in CLIP for n in range(2)]
    both = ["text_model.encoder", "vision_model.encoder"]
    assert roots(["encoder"], dict.fromkeys(shapes), {2}) == [both]
    assert roots(both, dict.fromkeys(shapes), {2}) == [[name] for name in both]
    inside = [*shapes, "encoder.x.encoder.w"]
    assert roots(["encoder"], dict.fromkeys(inside), {2}) == [["encoder"]]
    assert roots(["x.encoder"], dict.fromkeys(inside), {2}) == [["encoder.x.encoder"]]
    # Letters do not count: these are as far out as each other.
    uneven = dict.fromkeys(["a.part.w", "longer.part.w"])
    assert roots(["part"], uneven, {2}) == [["a.part", "longer.part"]]
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
    - {model: a}
    parameters: {weight: 1}
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
        "weight: 1}\npara", "wight: 1}\npara"
    )
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(text)
    found = [(problem.code, str(problem.where)) for problem in caught.value.problems]
    assert found[0] == ("no-layers", "modules.audio_tower (line 8)")
    assert found[1] == ("unknown-parameter", "modules.audio_tower.parameters.wight (line 11)")
    slices = "    slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n"
    text = RECIPE.replace("    models:\n    - {model: a}\n", slices)
    with pytest.raises(oxmerge.UnsupportedError, match="slices of one of several modules"):
        oxmerge.plan(text)
    with pytest.raises(oxmerge.RecipeError, match="a module needs `models`"):
        oxmerge.plan(RECIPE.replace("    models:\n    - {model: a}\n", ""))


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
