"""The output's config: what is edited, and what must not be."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from oxmerge.errors import PlanError
from oxmerge.models.names import Stack
from oxmerge.output import config
from oxmerge.output.config import Restacked, json_text
from oxmerge.output.token_ids import edit_tokens, ids_in

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


def edit_config(
    donor: dict[str, Any],
    *,
    layer_map: list[tuple[dict[str, Any], int]] | None = None,
    donor_depth: int = 4,
    **options: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Edit the config of a donor with one stack of layers."""
    stacks = [Restacked(Stack("model.layers", donor_depth), layer_map)]
    return config.edit_config(donor, stacks=stacks, **options)


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


FOLLOWING: list[tuple[str, dict[str, Any], list[int], dict[str, Any]]] = [
    # what it is, what the config says, layers of the output, what it says then
    (
        "numbers from 1 in a part of the config",
        {"linear_attn_config": {"full_attn_layers": [2, 4], "kda_layers": [1, 3], "num_heads": 8}},
        [0, 1, 0, 1, 3],
        {
            "linear_attn_config": {
                "full_attn_layers": [2, 4, 5],
                "kda_layers": [1, 3],
                "num_heads": 8,
            }
        },
    ),
    (
        "all layers, from 1",
        {"linear_attn_config": {"kda_layers": [1, 2, 3, 4], "full_attn_layers": []}},
        [0, 3],
        {"linear_attn_config": {"kda_layers": [1, 2], "full_attn_layers": []}},
    ),
    (
        "numbers from 1, as the last tells",
        {"hot_layers": [2, 4]},
        [1, 2, 3],
        {"hot_layers": [1, 3]},
    ),
    ("text", {"moe_layers_enum": "1,2,3"}, [0, 1, 1, 3], {"moe_layers_enum": "1,2,3"}),
    ("text with spaces", {"moe_layers_enum": "1, 3"}, [0, 3, 2, 1], {"moe_layers_enum": "1,3"}),
    ("text of all layers", {"moe_layers_enum": "0,1,2,3"}, [3, 3], {"moe_layers_enum": "0,1"}),
    (
        "values by layer",
        {"conv_dim": {"0": 32, "1": 16, "2": 16, "3": 8}},
        [3, 0, 1],
        {"conv_dim": {"0": 8, "1": 32, "2": 16}},
    ),
    (
        "values of some layers",
        {"per_layer_config": {"2": {"head_dim": 8}}},
        [0, 2, 2, 3],
        {"per_layer_config": {"1": {"head_dim": 8}, "2": {"head_dim": 8}}},
    ),
    (
        "groups",
        {"kv_reuse_group": [[1, 2], [3]]},
        [0, 1, 2, 1, 2, 0, 3],
        {"kv_reuse_group": [[1, 2], [3, 4], [6]]},
    ),
    (
        "givers",
        {"kv_source_layers": [0, 1, 1, 3]},
        [0, 1, 2, 1, 2, 3],
        {"kv_source_layers": [0, 1, 1, 3, 3, 5]},
    ),
    (
        "a pattern beside the list that replaced it",
        {"_sliding_window_pattern": 2, "layer_types": ["s", "f", "s", "f"]},
        [0, 0, 1, 3],
        {"_sliding_window_pattern": 2, "layer_types": ["s", "s", "f", "f"]},
    ),
    (
        "entries of extra layers",
        {
            "num_nextn_predict_layers": 1,
            "layer_types": ["a", "b", "c", "d", "extra"],
            "moe_layers_enum": "3,4",
        },
        [0, 3, 3],
        {
            "num_nextn_predict_layers": 1,
            "layer_types": ["a", "d", "d", "extra"],
            "moe_layers_enum": "1,2,3",
        },
    ),
    ("a second count", {"num_blocks": 4}, [0, 1], {"num_blocks": 2}),
]


@pytest.mark.parametrize(
    ("says", "order", "then"),
    [case[1:] for case in FOLLOWING],
    ids=[case[0] for case in FOLLOWING],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_lists_follow_the_layers(
    says: dict[str, Any], order: list[int], then: dict[str, Any], *, is_nested: bool
) -> None:
    def config(depth: int, what: dict[str, Any]) -> dict[str, Any]:
        inner = {"num_hidden_layers": depth, **what}
        return {"text_config": inner} if is_nested else inner

    donor = config(4, says)
    edited, _ = edit_config(donor, layer_map=[(donor, n) for n in order], donor_depth=4)
    assert edited == config(len(order), then)


TORN: list[tuple[dict[str, Any], list[int]]] = [
    ({"kv_reuse_group": [[1, 2]]}, [0, 2]),
    ({"kv_reuse_group": [[1, 2]]}, [0, 1, 3, 2]),
    ({"kv_source_layers": [0, 1, 1, 3]}, [0, 2, 3]),
    # About layers, in a way that is not known.
    ({"kv_layers": [0, 9]}, [0, 2]),
    ({"hot_layers": "0-2"}, [0, 2]),
    ({"hot_layers": "1,7"}, [0, 2]),
    ({"hot_layers": {"7": 1}}, [0, 2]),
    ({"layer_types": ["a", "b", "c"]}, [0, 2]),
    ({"linear_attn_config": {"kda_layers": [0, 1]}}, [0, 2]),
    # Counts from an end, and periods.
    ({"n_dense_first_layers": 1}, [0, 2]),
    ({"num_hash_layers": 2}, [0, 1, 2]),
    ({"part": {"num_hash_layers": 2}}, [0, 1, 2]),
    ({"layer_group_size": 2}, [0, 2]),
    ({"layer_group_size": 3}, [0, 1, 2, 3, 0]),
    ({"kv_reuse_every_i_layer": 2}, [0, 2]),
    ({"cla_share_factor": 2}, [0, 2]),
    ({"moe_layer_num_skipped": 1}, [1, 2]),
    # What depends on the number of the layer, or of layers, alone.
    ({"model_type": "diffllama"}, [0, 2]),
    ({"scale_attn_by_inverse_layer_idx": True}, [0, 2]),
    ({"scale_depth": 1.4}, [0, 1, 2]),
    ({"hidden_size_per_layer_input": 8}, [0, 1, 2]),
    ({"model_type": "granite_swa"}, [0, 2]),
]


@pytest.mark.parametrize(("says", "order"), TORN)
@pytest.mark.parametrize("is_nested", [False, True])
def test_what_cannot_follow_is_an_error(
    says: dict[str, Any], order: list[int], *, is_nested: bool
) -> None:
    inner = {"num_hidden_layers": 4, **says}
    donor = {"text_config": inner} if is_nested else inner
    with pytest.raises(PlanError) as caught:
        edit_config(donor, layer_map=[(donor, n) for n in order], donor_depth=4)
    key = next(
        key for key in ("layer_idx", "layer_types", *_keys(says)) if key in str(caught.value)
    )
    assert key
    assert len(caught.value.problems) == 1


def _keys(config: dict[str, Any]) -> list[str]:
    inner = (_keys(value) for value in config.values() if isinstance(value, dict))
    return [*config, *(key for keys in inner for key in keys)]


FITTING: list[tuple[dict[str, Any], list[int]]] = [
    ({"layer_group_size": 2}, [0, 1, 0, 1, 2, 3]),
    ({"layer_group_size": 3}, [0, 1, 2, 3, 3]),
    ({"num_hash_layers": 0}, [0, 2]),
    ({"num_hash_layers": 4}, [0, 2]),
    ({"num_nextn_predict_layers": 1}, [0, 2]),
    ({"scale_attn_by_inverse_layer_idx": False}, [0, 2]),
    ({"hidden_size_per_layer_input": 0}, [0, 2]),
    ({"scale_depth": 1.4}, [0, 1, 2, 2]),
    ({"model_type": "granite_swa", "layer_types": ["a", "b", "c", "d"]}, [0, 2]),
    ({"vision_feature_layer": [-2, -1]}, [0, 2]),
    ({"hot_layers": []}, [0, 2]),
    ({"layer_norm_eps": 1e-5, "image_token_index": 7, "num_key_value_heads": 2}, [0, 2]),
]


@pytest.mark.parametrize(("says", "order"), FITTING)
def test_what_has_no_need_to_follow_is_left(says: dict[str, Any], order: list[int]) -> None:
    donor = {"num_hidden_layers": 4, **says}
    config, _ = edit_config(donor, layer_map=[(donor, n) for n in order], donor_depth=4)
    assert changed(donor, config) <= {"num_hidden_layers", "layer_types"}


def test_a_list_takes_entries_of_a_model_that_says_the_same_by_a_rule() -> None:
    donor: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window_pattern": 2}
    other: dict[str, Any] = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "_sliding_window_pattern": 2,
    }
    layer_map = [(donor, 0), (other, 1), (other, 2), (donor, 3)]
    config, _ = edit_config(donor, layer_map=layer_map, donor_depth=4)
    assert config == donor
    with pytest.raises(PlanError, match="`sliding_window_pattern`"):
        edit_config(donor, layer_map=[(donor, 0), (other, 2)], donor_depth=4)


def test_a_pattern_that_its_list_no_longer_bears_out_is_noted() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    donor = {"num_hidden_layers": 4, "_sliding_window_pattern": 2, "layer_types": kinds}
    _, notes = edit_config(donor, layer_map=[(donor, n) for n in (0, 0, 1)], donor_depth=4)
    assert any("`_sliding_window_pattern` no longer tells" in note for note in notes)
    _, notes = edit_config(donor, layer_map=[(donor, n) for n in (0, 1)], donor_depth=4)
    assert not any("no longer" in note for note in notes)


def test_numbers_of_two_models_count_from_the_same() -> None:
    """The other's list does not show where it begins, so that it may not be taken for ours."""
    donor = {"num_hidden_layers": 4, "hot_layers": [2, 4]}
    other = {"num_hidden_layers": 4, "hot_layers": [1, 3]}
    with pytest.raises(PlanError, match="`hot_layers` speaks of each layer"):
        edit_config(donor, layer_map=[(donor, 0), (other, 1)], donor_depth=4)


def test_infinity_and_nan_are_written_as_python_does() -> None:
    config = {"time_step_limit": [0.0, math.inf], "low": -math.inf, "none": math.nan}
    edited, notes = edit_config(config)
    assert notes == []
    text = json_text(edited)
    assert "Infinity" in text
    assert "NaN" in text
    assert "-Infinity" in text


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


def test_ids_follow_their_tokens_wherever_they_are() -> None:
    config = {
        "image_token_index": 30,
        "eos_token_ids": [30, 31],
        "pad_token_id": -1,
        "sep_token_id": 7,
        "mask_token_id": None,
        "suppress_tokens": [5, 30],
        "begin_suppress_tokens": [],
        "bad_words_ids": [[30, 31], [30, 7], [7]],
        "force_words_ids": [[[30], [31]], [[7], [30]]],
        "sequence_bias": [[[30, 31], -0.5], [[7], 0.5]],
        "forced_decoder_ids": [[1, None], [2, 30], [3, 7]],
        "lang_to_id": {"<|de|>": 30, "<|en|>": 5},
        "task_to_id": "none",
        "text_config": {"boi_token_index": 31, "hidden_size": 31},
        "hidden_size": 30,
        "vocab_size": 40,
    }
    assert set(ids_in(config)) == {5, 7, 30, 31}
    ids = {5: None, 7: None, 30: 45, 31: 0}
    edited, notes = edit_tokens(config, 50, ids, {"sep_token_id": 9, "suppress_tokens": [9]})
    expected = {
        **config,
        "image_token_index": 45,
        "eos_token_ids": [45, 0],
        "sep_token_id": 9,
        "suppress_tokens": [45],
        "bad_words_ids": [[45, 0]],
        "force_words_ids": [[[45], [0]]],
        "sequence_bias": [[[45, 0], -0.5]],
        "forced_decoder_ids": [[1, None], [2, 45]],
        "lang_to_id": {"<|de|>": 45},
        "text_config": {"boi_token_index": 0, "hidden_size": 31},
        "vocab_size": 50,
    }
    assert edited == expected
    assert len(notes) == 11
    told = "`image_token_index` is 45, and was 30: the output has other tokens"
    assert told in notes
    # Where no token is left, that of the tokenizer's own model is taken.
    edited, _ = edit_tokens({"suppress_tokens": [5]}, None, ids, {"suppress_tokens": [9]})
    assert edited == {"suppress_tokens": [9]}
