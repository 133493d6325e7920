"""The output's config: what is edited, and what must not be."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from oxmerge.errors import PlanError
from oxmerge.output_config import edit_config, json_text

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "eos_token_id": [1, 2, 3, 4],
    "rope_scaling": {"factor": 8.0, "long_factor": [1.0, 1.0, 1.0, 1.0]},
    "torch_dtype": "float16",
    "an_unknown_key": {"num_hidden_layers": 4},
}
QWEN: dict[str, Any] = {
    "model_type": "qwen3",
    "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
    "max_window_layers": 2,
    "num_hidden_layers": 4,
    "sliding_window": 128,
    "use_sliding_window": True,
    "dtype": "bfloat16",
}


def layers(*parts: tuple[dict[str, Any], range]) -> list[tuple[dict[str, Any], int]]:
    """Build a layer map from ranges of layers."""
    return [(config, layer) for config, numbers in parts for layer in numbers]


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Return the keys whose values differ."""
    return {key for key in {*before, *after} if before.get(key) != after.get(key)}


def test_nothing_to_change_changes_nothing() -> None:
    config, notes = edit_config(LLAMA, layer_map=layers((LLAMA, range(4))), donor_depth=4)
    assert config == LLAMA
    assert list(config) == list(LLAMA)
    assert notes == []


def test_the_donor_config_is_left_alone() -> None:
    before = copy.deepcopy(LLAMA)
    config, _ = edit_config(LLAMA, dtype="BF16", layer_map=layers((LLAMA, range(3))), donor_depth=4)
    config["rope_scaling"]["factor"] = 1.0
    assert before == LLAMA


@pytest.mark.parametrize(
    ("donor", "expected"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": None}, {"dtype": "bfloat16"}),
        ({"x": 1}, {"x": 1, "torch_dtype": "bfloat16"}),
        (
            {"text_config": {"torch_dtype": "float16"}},
            {"text_config": {"torch_dtype": "bfloat16"}},
        ),
        (
            {"dtype": "float16", "quantization_config": {"dtype": "float16"}},
            {"dtype": "bfloat16", "quantization_config": {"dtype": "float16"}},
        ),
    ],
)
@pytest.mark.parametrize("dtype", ["BF16", "bfloat16"])
def test_dtype_in_the_donors_spelling(
    donor: dict[str, Any], expected: dict[str, Any], dtype: str
) -> None:
    config, notes = edit_config(donor, dtype=dtype)
    assert config == expected
    assert len(notes) == 1


def test_depth_changes_only_the_layer_count() -> None:
    config, notes = edit_config(
        LLAMA, layer_map=layers((LLAMA, range(3)), (LLAMA, range(1, 4))), donor_depth=4
    )
    assert changed(LLAMA, config) == {"num_hidden_layers"}
    assert config["num_hidden_layers"] == 6
    assert list(config) == list(LLAMA)
    assert notes == ["`num_hidden_layers`: 4 became 6"]


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"])
def test_the_donors_key_for_depth(key: str) -> None:
    donor = {key: 2, "heads": 2}
    config, _ = edit_config(donor, layer_map=layers((donor, range(1))), donor_depth=2)
    assert config == {key: 1, "heads": 2}


def test_no_key_for_depth_is_an_error() -> None:
    with pytest.raises(PlanError, match="no layer count of 4"):
        edit_config({"floors": 4}, layer_map=layers((LLAMA, range(3))), donor_depth=4)


def test_layer_types_come_from_the_sources() -> None:
    other = {**QWEN, "layer_types": ["sliding_attention"] * 6, "num_hidden_layers": 6}
    config, notes = edit_config(
        QWEN, layer_map=layers((QWEN, range(2)), (other, range(3, 6))), donor_depth=4
    )
    assert config["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 3
    assert changed(QWEN, config) == {"layer_types", "num_hidden_layers"}
    assert any("layer_types" in note for note in notes)


def test_same_depth_but_other_layers_still_rebuilds() -> None:
    order = [(QWEN, 3), (QWEN, 2), (QWEN, 1), (QWEN, 0)]
    config, _ = edit_config(QWEN, layer_map=order, donor_depth=4)
    assert config["layer_types"] == QWEN["layer_types"][::-1]


def test_a_source_without_the_list_is_an_error() -> None:
    other = {key: value for key, value in QWEN.items() if key != "layer_types"}
    with pytest.raises(PlanError, match="`layer_types` speaks of each layer"):
        edit_config(QWEN, layer_map=layers((other, range(3))), donor_depth=4)


def test_a_list_that_only_a_source_has_is_noted() -> None:
    donor = {"num_hidden_layers": 4}
    other = {"num_hidden_layers": 4, "windows": [1, 2, 3, 4]}
    config, notes = edit_config(donor, layer_map=layers((other, range(3))), donor_depth=4)
    assert config == {"num_hidden_layers": 3}
    assert any("`windows` of a source is left out" in note for note in notes)


def test_nested_text_config_and_a_vision_tower_of_the_same_depth() -> None:
    donor = {
        "text_config": {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]},
        "vision_config": {"num_hidden_layers": 4, "depths": [1, 2, 3, 4]},
    }
    config, _ = edit_config(donor, layer_map=[(donor, 0), (donor, 2)], donor_depth=4)
    assert config == {
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "c"]},
        "vision_config": donor["vision_config"],
    }


def test_towers_of_the_same_depth_ask() -> None:
    donor = {"vision_config": {"num_layers": 4}, "audio_config": {"num_layers": 4}}
    with pytest.raises(PlanError, match="not clear which"):
        edit_config(donor, layer_map=[(donor, 0)], donor_depth=4)


@pytest.mark.parametrize(
    ("key", "listed", "expected"),
    [
        ("mlp_only_layers", [0, 3], [0, 2, 3]),
        ("full_attention_layers", [1], []),
        ("attn_layer_indices", [], []),
        ("moe_layers", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("no_rope_layers", [1, 0, 1, 0], [1, 1, 0, 1]),
        ("layer_budget", [7, 5, 3, 1], [7, 3, 1, 7]),
        ("token_list", [0, 3], [0, 3]),
    ],
)
def test_lists_of_layer_numbers_and_of_layers(
    key: str, listed: list[int], expected: list[int]
) -> None:
    donor = {"num_hidden_layers": 4, key: listed}
    config, _ = edit_config(donor, layer_map=[(donor, n) for n in (0, 2, 3, 0)], donor_depth=4)
    # Output layers 0 to 3 are source layers 0, 2, 3, 0.
    if key == "mlp_only_layers":
        expected = [position for position, n in enumerate((0, 2, 3, 0)) if n in listed]
    assert config[key] == expected


def test_a_string_with_one_letter_a_layer() -> None:
    donor = {"num_hidden_layers": 4, "hybrid_override_pattern": "M-*-", "name": "four"}
    config, _ = edit_config(donor, layer_map=[(donor, 0), (donor, 2)], donor_depth=4)
    assert config == {"num_hidden_layers": 2, "hybrid_override_pattern": "M*", "name": "four"}


RULES = [
    # config, layers of the output, whether the rule still fits
    ({"first_k_dense_replace": 1}, [0, 2, 3], True),
    ({"first_k_dense_replace": 1}, [1, 2, 3], False),
    ({"first_k_dense_replace": 1}, [0, 1, 0, 1], False),
    ({"first_k_dense_replace": 0, "moe_layer_freq": 2}, [0, 1, 0, 1], True),
    ({"first_k_dense_replace": 0, "moe_layer_freq": 2}, [0, 2], False),
    ({"decoder_sparse_step": 2, "mlp_only_layers": []}, [2, 3], True),
    ({"decoder_sparse_step": 2, "mlp_only_layers": []}, [1, 2], False),
    ({"decoder_sparse_step": 1, "mlp_only_layers": [0]}, [0, 2, 0, 3], True),
    ({"sliding_window_pattern": 2}, [0, 1, 2, 1], True),
    ({"sliding_window_pattern": 2}, [0, 2], False),
    ({"sliding_window_pattern": "LG"}, [0, 1, 0, 1, 2, 3], True),
    ({"sliding_window_pattern": "LG"}, [1, 0], False),
    ({"full_attention_interval": 4}, [0, 1, 2, 3, 0, 1, 2, 3], True),
    ({"full_attention_interval": 4}, [0, 1, 2, 2], False),
    ({"full_attention_interval": 4, "layer_types": ["a", "b", "c", "d"]}, [0, 1, 3], True),
    ({"max_window_layers": 2, "use_sliding_window": False}, [3, 2, 1, 0, 0], True),
    ({"max_window_layers": 2, "use_sliding_window": True, "sliding_window": 8}, [0, 1, 2], True),
    ({"max_window_layers": 2, "use_sliding_window": True, "sliding_window": 8}, [2, 3], False),
    ({"attn_layer_period": 2, "attn_layer_offset": 1}, [0, 1, 0, 1], True),
    ({"attn_layer_period": 2, "attn_layer_offset": 1}, [1, 2], False),
    ({"num_kv_shared_layers": 2}, [0, 1, 2, 3], True),
    ({"num_kv_shared_layers": 2}, [0, 1, 2], False),
    ({"attention_types": [[["global", "local"], 2]]}, [0, 1], True),
    ({"attention_types": [[["global", "local"], 2]]}, [1, 2], False),
    ({"block_types": ["recurrent", "attention"]}, [2, 3], True),
    ({"block_types": ["recurrent", "attention"]}, [1, 2], False),
    ({"model_type": "gemma2"}, [0, 1, 2, 3, 2, 3], True),
    ({"model_type": "gemma2"}, [0, 1, 1, 2], False),
    ({"model_type": "gemma2", "sliding_window": None}, [0, 1, 1, 2], True),
    ({"first_k_dense_replace": 1, "n_routed_experts": None}, [1, 2], True),
    ({"decoder_sparse_step": 2, "num_experts": 0}, [1, 2], True),
    ({"new_layer_period": 2}, [2, 3], True),
    ({"new_layer_period": 2}, [1, 2], False),
    ({"new_layer_period": 1}, [1, 2], True),
]


@pytest.mark.parametrize(("extra", "chosen", "fits"), RULES)
def test_position_rules(extra: dict[str, Any], chosen: list[int], *, fits: bool) -> None:
    donor = {"num_hidden_layers": 4, **extra}
    layer_map = [(donor, layer) for layer in chosen]
    if fits:
        config, _ = edit_config(donor, layer_map=layer_map, donor_depth=4)
        assert config["num_hidden_layers"] == len(chosen)
        return
    with pytest.raises(PlanError) as caught:
        edit_config(donor, layer_map=layer_map, donor_depth=4)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].advice is not None


def test_a_misfit_says_which_layer_and_why() -> None:
    donor = {"num_hidden_layers": 4, "first_k_dense_replace": 1}
    with pytest.raises(PlanError) as caught:
        edit_config(donor, layer_map=[(donor, 1), (donor, 2)], donor_depth=4)
    assert caught.value.problems[0].message == (
        "by `first_k_dense_replace`, `moe_layer_freq` output layer 0 would be read as a dense "
        "layer, but it was a layer of experts as layer 1 of its model"
    )


def test_all_problems_in_one_report() -> None:
    donor = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "full_attention_interval": 4}
    with pytest.raises(PlanError) as caught:
        edit_config(donor, layer_map=[(donor, 3), (donor, 2)], donor_depth=4)
    assert len(caught.value.problems) == 2


def test_a_head_beside_a_tied_config_is_noted() -> None:
    donor = {"text_config": {"tie_word_embeddings": True}}
    assert edit_config(donor, writes_head=False)[1] == []
    config, notes = edit_config(donor, writes_head=True)
    assert config == donor
    assert "tie_word_embeddings" in notes[0]


def test_text_is_what_transformers_writes() -> None:
    text = json_text({"name": "Größe", "list": [1], "empty": {}})
    assert text == '{\n  "name": "Größe",\n  "list": [\n    1\n  ],\n  "empty": {}\n}\n'
    assert json.loads(json_text({"odd": "\ud800"})) == {"odd": "\ud800"}
