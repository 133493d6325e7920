"""Models that do not belong together: what differs is told, and only that."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from oxmerge import PlanError
from oxmerge.cli import main
from oxmerge.models.config_meaning import meaning_of, same, types_of
from writers import Arrays, write_model, write_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

Config = dict[str, Any]

LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 8,
}


def differences(one: Config, other: Config) -> dict[str, tuple[str, str]]:
    """Return what differs, as it is shown."""
    ours, theirs = meaning_of(one), meaning_of(other)
    return {
        key: (str(value), str(theirs[key]))
        for key, value in ours.items()
        if key in theirs and not same(value.value, theirs[key].value)
    }


# What counts, and in which spelling.

SAME: list[tuple[Config, Config]] = [
    ({}, {"_name_or_path": "x", "torch_dtype": "float16", "use_cache": False}),
    ({"torch_dtype": "float16"}, {"dtype": "bfloat16"}),
    ({"rope_theta": 10000.0}, {}),
    ({"rope_theta": 10000}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
    ({"rope_scaling": None}, {"rope_parameters": {"rope_theta": 1e4}}),
    (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2}},
    ),
    (
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 4096},
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
            },
            "max_position_embeddings": 16384,
        },
    ),
    ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ({"rotary_pct": 0.5}, {"partial_rotary_factor": 0.5}),
    ({"head_dim": 16}, {}),
    ({"head_dim": 16}, {"head_dim": None}),
    ({"num_key_value_heads": 4}, {}),
    ({"num_key_value_heads": 4}, {"num_key_value_heads": None}),
    ({"rms_norm_eps": 1e-6}, {}),
    ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 9.999999747378752e-06}),
    ({"hidden_act": "silu"}, {"hidden_act": "swish"}),
    ({"attention_bias": False, "mlp_bias": False}, {}),
    ({"tie_word_embeddings": False}, {}),
    ({"attention_dropout": 0.1, "initializer_range": 0.1, "pretraining_tp": 2}, {}),
    (
        {"attention_dropout": 0.1, "initializer_range": 0.1, "pretraining_tp": 2},
        {"attention_dropout": 0.0, "initializer_range": 0.2, "pretraining_tp": 1},
    ),
    ({"eos_token_id": [1, 2], "bos_token_id": 0}, {"eos_token_id": 3, "bos_token_id": 1}),
    ({"image_token_index": 7, "bad_words_ids": [[1]]}, {"image_token_id": 8}),
    ({"max_position_embeddings": 2048}, {"max_position_embeddings": 4096}),
    ({"a_key_of_tomorrow": 1}, {}),
    ({"a_key_of_tomorrow": None}, {"another": 2}),
    ({"limit": [0.0, math.inf]}, {"limit": [0.0, math.inf]}),
    ({"limit": math.nan}, {"limit": math.nan}),
    ({"sliding_window": 8, "use_sliding_window": False}, {"use_sliding_window": False}),
    (
        {"sliding_window": 8, "max_window_layers": 2, "use_sliding_window": False},
        {"sliding_window": 16, "max_window_layers": 1, "use_sliding_window": False},
    ),
    ({"text_config": {"intermediate_size": 8}}, {"intermediate_size": 8}),
    ({"text_config": {"intermediate_size": 8}}, {"llm_config": {"intermediate_size": 8}}),
    ({"vision_config": {"dtype": "float16"}}, {"vision_config": {"dtype": "bfloat16"}}),
    ({"num_experts_per_tok": 2}, {"num_experts_per_token": 2}),
    ({"_sliding_window_pattern": 6}, {"sliding_window_pattern": 6}),
    ({"quantization_config": {"bits": 4}}, {"quantization_config": {"bits": 8}}),
]

DIFFERENT: list[tuple[Config, Config, str]] = [
    ({}, {"rope_theta": 1e6}, "rope_theta"),
    ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
    ({"rope_theta": 1e6}, {"rope_scaling": None, "rope_theta": 1e4}, "rope_theta"),
    ({}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        "rope_scaling.factor",
    ),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
        "rope_scaling.original_max_position_embeddings",
    ),
    ({}, {"head_dim": 8}, "head_dim"),
    ({"head_dim": 16}, {"head_dim": 8}, "head_dim"),
    ({}, {"num_key_value_heads": 2}, "num_key_value_heads"),
    (
        {},
        {"num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 4},
        "num_attention_heads",
    ),
    ({}, {"rms_norm_eps": 1e-5}, "norm_eps"),
    ({}, {"hidden_act": "gelu"}, "hidden_act"),
    ({"sliding_window": None}, {"sliding_window": 4096}, "sliding_window"),
    ({"attn_logit_softcapping": None}, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"num_experts_per_tok": 2}, {"num_experts_per_token": 4}, "num_experts_per_tok"),
    ({"routed_scaling_factor": 1.0}, {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
    ({"norm_topk_prob": True}, {"norm_topk_prob": False}, "norm_topk_prob"),
    ({"embedding_multiplier": 1.0}, {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ({"kv_lora_rank": 8}, {"kv_lora_rank": 16}, "kv_lora_rank"),
    ({"ssm_state_size": 8}, {"ssm_state_size": 16}, "ssm_state_size"),
    ({"time_step_limit": [0.0, math.inf]}, {"time_step_limit": [0.0, 1.0]}, "time_step_limit"),
    ({"layer_types": ["a", "b"]}, {"layer_types": ["b", "a"]}, "layer_types"),
    ({"tie_word_embeddings": True}, {}, "tie_word_embeddings"),
    ({"partial_rotary_factor": 0.5}, {"rotary_pct": 0.25}, "partial_rotary_factor"),
    ({"a_key_of_tomorrow": 1}, {"a_key_of_tomorrow": 2}, "a_key_of_tomorrow"),
    ({"part": {"inner": 1}}, {"part": {"inner": 2}}, "part.inner"),
    ({"text_config": {"rope_theta": 1e6}}, {"rope_theta": 1e4}, "rope_theta"),
    (
        {"vision_config": {"patch_size": 14}},
        {"vision_config": {"patch_size": 16}},
        "vision_config.patch_size",
    ),
    (
        {"vision_config": {"model_type": "clip"}},
        {"vision_config": {"model_type": "siglip"}},
        "vision_config.model_type",
    ),
    ({"id2label": {"0": "bad"}}, {"id2label": {"0": "good"}}, "id2label.0"),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_theta (full_attention)",
    ),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_means_the_same_does_not_differ(one: Config, other: Config) -> None:
    assert differences({**LLAMA, **one}, {**LLAMA, **other}) == {}
    assert differences({**LLAMA, **other}, {**LLAMA, **one}) == {}


@pytest.mark.parametrize(("one", "other", "key"), DIFFERENT)
def test_what_means_something_else_differs(one: Config, other: Config, key: str) -> None:
    assert list(differences({**LLAMA, **one}, {**LLAMA, **other})) == [key]
    assert list(differences({**LLAMA, **other}, {**LLAMA, **one})) == [key]


def test_defaults_are_those_of_the_type() -> None:
    gemma = {"model_type": "gemma", "hidden_size": 64, "num_attention_heads": 2}
    # Its readers pass over `hidden_act`, and its heads are of one size whatever the width.
    assert differences({**gemma, "hidden_act": "gelu"}, gemma) == {}
    assert differences({**gemma, "head_dim": 256}, gemma) == {}
    mistral = {"model_type": "mistral", "sliding_window": None}
    found = differences(mistral, {"model_type": "mistral"})
    assert found == {"sliding_window": ("null", "4096 (the default)")}
    # Nobody knows what one of another type has where it does not say.
    assert differences({"model_type": "new", "rope_theta": 1e6}, {"model_type": "new"}) == {}


def test_gemma3_as_both_versions_of_transformers_write_it() -> None:
    four = {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    five = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 1024,
        "_sliding_window_pattern": 6,
        "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_theta": 1e6, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    }
    assert differences(four, five) == {}
    assert types_of(four) & types_of(five)
    local = {**five["rope_parameters"], "sliding_attention": {"rope_theta": 2e4}}  # type: ignore[dict-item]
    assert list(differences(four, {**five, "rope_parameters": local})) == [
        "rope_theta (sliding_attention)"
    ]


def test_what_transformers_makes_of_a_config_is_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3",
                 "gpt_neox", "gpt2", "stablelm", "olmo2", "granite", "bert"):  # fmt: skip
        given = {
            "model_type": name,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": 5e5,
            "_name_or_path": "somewhere",
        }
        if name in {"gpt_neox", "gpt2", "bert"}:
            del given["num_key_value_heads"]
        if name == "gpt_neox":
            given["rotary_emb_base"] = given.pop("rope_theta")
        known = transformers.AutoConfig.for_model(**given)
        written = json.loads(known.to_json_string(use_diff=False))
        assert differences(given, written) == {}, name


# Plans.


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes two models and a recipe for both."""

    def write(one: Config, other: Config, depth: int = 2, **more: Any) -> Path:
        for name, config in (("one", one), ("other", other)):
            tensors: Arrays = {"model.embed_tokens.weight": np.ones((8, 4), np.float32)}
            for layer in range(depth):
                tensors[f"model.layers.{layer}.x.weight"] = np.ones(4, np.float32)
            write_model(tmp_path / name, tensors, "BF16", config)
        models = [tmp_path / "one", tmp_path / "other"]
        return write_recipe(tmp_path / "r.yml", "linear", models, each={"weight": 1}, **more)

    return write


def warnings_of(recipe: Path, **options: Any) -> list[str]:
    return [str(warning) for warning in oxmerge.plan(recipe, **options).warnings]


def test_models_that_belong_together_give_no_warning(pair: Callable[..., Path]) -> None:
    recipe = pair(LLAMA, {**LLAMA, "rope_parameters": {"rope_theta": 1e4}, "dtype": "float16"})
    assert warnings_of(recipe, strict=True) == []


def test_a_difference_is_told_with_both_values(pair: Callable[..., Path], tmp_path: Path) -> None:
    recipe = pair(LLAMA, {**LLAMA, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5})
    first, second = warnings_of(recipe)
    both = [first, second]
    theta = next(text for text in both if "`rope_theta`" in text)
    assert "expected 10000.0 (the default), found 1000000.0" in theta
    assert str(tmp_path / "other") in theta
    assert any("`rms_norm_eps`" in text and "found 1e-05" in text for text in both)
    with pytest.raises(PlanError, match="rope_theta"):
        oxmerge.plan(recipe, strict=True)


def test_many_differences_are_told_in_short(pair: Callable[..., Path]) -> None:
    keys = {f"key_{number:03}": number for number in range(200)}
    recipe = pair({**LLAMA, **keys}, {**LLAMA, **dict.fromkeys(keys, -1)})
    told = warnings_of(recipe)
    assert len(told) == 13
    assert "188: `key_012`" in told[-1]
    assert all(len(text) < 1000 for text in told)


def test_a_long_value_is_told_in_a_line(pair: Callable[..., Path]) -> None:
    recipe = pair({**LLAMA, "new": "x" * 10_000}, {**LLAMA, "new": [[1] * 10_000]})
    (told,) = warnings_of(recipe)
    assert len(told) < 600


KINDS: list[tuple[Config, Config, str]] = [
    (LLAMA, {**LLAMA, "model_type": "mistral"}, "model_type"),
    (LLAMA, {**LLAMA, "architectures": ["LlamaModel"]}, "architectures"),
]


@pytest.mark.parametrize(("one", "other", "key"), KINDS)
def test_another_kind_of_model_is_refused_unless_allowed(
    one: Config, other: Config, key: str, pair: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = pair(one, other)
    with pytest.raises(PlanError, match=f"another kind of model .* by `{key}`") as caught:
        oxmerge.plan(recipe)
    assert "--allow-mismatch" in str(caught.value)
    with pytest.raises(PlanError, match=key):
        oxmerge.lazy(recipe)
    with pytest.raises(PlanError, match=key):
        oxmerge.sweep(recipe, tmp_path / "{n}", {"models[0].parameters.weight": [1, 2]})
    assert any(f"`{key}`" in told for told in warnings_of(recipe, allow_mismatch=True))
    assert len(oxmerge.lazy(recipe, allow_mismatch=True)) == 3
    oxmerge.merge(recipe, tmp_path / "merged", allow_mismatch=True)
    axes = {"models[0].parameters.weight": [1, 2]}
    assert len(oxmerge.sweep(recipe, tmp_path / "{n}", axes, allow_mismatch=True)) == 2
    for option in ("--allow-mismatch", "--allow-crimes"):
        assert main(["plan", str(recipe), option]) == 0
    assert main(["plan", str(recipe)]) == 1
    assert main(["plan", str(recipe), "--allow-mismatch", "--strict"]) == 1


def test_a_language_model_and_its_wrapper_may_meet(pair: Callable[..., Path]) -> None:
    inner = {**LLAMA, "model_type": "llama"}
    wrapper = {"model_type": "llava", "architectures": ["Llava"], "text_config": inner}
    (told,) = warnings_of(pair(inner, wrapper))
    assert "`model_type`" in told


def test_an_old_spelling_of_a_class_is_the_class(pair: Callable[..., Path]) -> None:
    assert warnings_of(pair(LLAMA, {**LLAMA, "architectures": ["LLaMAForCausalLM"]})) == []


def test_a_model_without_a_config_is_not_compared(
    pair: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = pair(LLAMA, LLAMA)
    (tmp_path / "other" / "config.json").unlink()
    assert warnings_of(recipe) == []


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN"])
def test_infinity_in_a_config_is_read_and_written(
    value: str, pair: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = pair(LLAMA, LLAMA)
    text = json.dumps(LLAMA)[:-1] + f', "time_step_limit": [0.0, {value}], "NaN": "a \\" NaN"}}'
    for name in ("one", "other"):
        (tmp_path / name / "config.json").write_text(text)
    assert warnings_of(recipe) == []
    oxmerge.merge(recipe, tmp_path / "merged")
    written = (tmp_path / "merged" / "config.json").read_text()
    assert f"    {value}\n" in written
    assert json.loads(written)["NaN"] == 'a " NaN'
    (tmp_path / "other" / "config.json").write_text(text.replace(value, "7.0"))
    (told,) = warnings_of(recipe)
    assert f"expected {value}, found 7.0" in told


def test_a_config_with_infinity_may_still_be_quantised(
    pair: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = pair(LLAMA, LLAMA)
    text = '{"limit": [Infinity], "quantization_config": {"quant_method": "gptq"}}'
    (tmp_path / "other" / "config.json").write_text(text)
    with pytest.raises(PlanError, match="gptq"):
        oxmerge.plan(recipe)


# Layers.


def slices(tmp_path: Path, pairs: Sequence[tuple[list[int], list[int]]]) -> Path:
    recipe = {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {
                        "model": str(tmp_path / name),
                        "layer_range": span,
                        "parameters": {"weight": 1},
                    }
                    for name, span in zip(("one", "other"), spans, strict=True)
                ]
            }
            for spans in pairs
        ],
    }
    (tmp_path / "s.yml").write_text(json.dumps(recipe))
    return tmp_path / "s.yml"


def test_layers_of_one_kind_may_be_merged_from_other_places(
    pair: Callable[..., Path], tmp_path: Path
) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = {**LLAMA, "num_hidden_layers": 4, "layer_types": kinds}
    pair(config, config, depth=4)
    assert warnings_of(slices(tmp_path, [([0, 2], [2, 4])])) == []
    (told,) = warnings_of(slices(tmp_path, [([0, 2], [1, 3])]))
    assert "layer 1 of" in told
    assert 'expected "sliding_attention", found "full_attention"' in told


def test_a_rule_over_positions_tells_kinds_too(pair: Callable[..., Path], tmp_path: Path) -> None:
    config = {**LLAMA, "num_hidden_layers": 4, "sliding_window_pattern": 2}
    pair(config, config, depth=4)
    assert warnings_of(slices(tmp_path, [([0, 2], [2, 4])])) == []
    assert len(warnings_of(slices(tmp_path, [([0, 2], [1, 3])]))) == 1


def test_models_of_other_depths_may_be_stacked(pair: Callable[..., Path], tmp_path: Path) -> None:
    pair(LLAMA, LLAMA)
    deep = {**LLAMA, "num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "other" / name).unlink()
    (tmp_path / "other").rmdir()
    tensors = {f"model.layers.{n}.x.weight": np.ones(4, np.float32) for n in range(3)}
    tensors["model.embed_tokens.weight"] = np.ones((8, 4), np.float32)
    write_model(tmp_path / "other", tensors, "BF16", deep)
    two = {**LLAMA, "layer_types": ["a", "b"]}
    (tmp_path / "one" / "config.json").write_text(json.dumps(two))
    assert warnings_of(slices(tmp_path, [([0, 2], [0, 2])])) == []
    assert len(warnings_of(slices(tmp_path, [([0, 2], [1, 3])]))) == 1


# Tokenizers.

BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "d": 3}, "merges": ["a b"]}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.5], ["c", -2.0]]}
ADDED = [{"id": 4, "content": "<end>", "special": True}]


def tokenizer(model: Mapping[str, Any], added: Sequence[Mapping[str, Any]] = ()) -> str:
    return json.dumps({"version": "1.0", "added_tokens": list(added), "model": model})


def swapped(vocabulary: Mapping[str, int]) -> dict[str, int]:
    names = list(vocabulary)
    return {**vocabulary, names[1]: vocabulary[names[2]], names[2]: vocabulary[names[1]]}


@pytest.fixture
def tokens(pair: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that gives two models files, and tells what a plan warns of."""

    def told(one: Mapping[str, str | bytes], other: Mapping[str, str | bytes]) -> list[str]:
        recipe = pair(LLAMA, LLAMA)
        for name, files in (("one", one), ("other", other)):
            for file, text in files.items():
                data = text if isinstance(text, bytes) else text.encode()
                (tmp_path / name / file).write_bytes(data)
        return warnings_of(recipe)

    return told


EQUAL: list[tuple[dict[str, str | bytes], dict[str, str | bytes]]] = [
    ({"tokenizer.json": tokenizer(BPE)}, {"tokenizer.json": tokenizer(BPE)}),
    # How text is cut does not count, nor how the file is written.
    (
        {"tokenizer.json": tokenizer(BPE)},
        {"tokenizer.json": json.dumps({"model": {**BPE, "merges": [["a", "b"]]}}, indent=2)},
    ),
    ({"tokenizer.json": tokenizer(BPE)}, {"vocab.json": json.dumps(BPE["vocab"])}),
    ({"tokenizer.json": tokenizer(BPE)}, {"vocab.txt": "a\nb\nc\nd\n"}),
    ({"tokenizer.json": tokenizer(BPE)}, {}),
    ({"tokenizer.json": tokenizer(BPE)}, {"tokenizer.model": b"\x00\x01"}),
    ({"tokenizer.model": b"\x00\x01"}, {"tokenizer.model": b"\x00\x01"}),
    ({"tokenizer.json": "broken"}, {"tokenizer.json": "broken"}),
    (
        {"tokenizer.json": tokenizer({"type": "WordLevel", "vocab": {"a": 0}})},
        {"tokenizer.json": tokenizer({"type": "WordPiece", "vocab": {"a": 0}})},
    ),
    # Ids beyond the rows of the embedding, which has eight, do not matter.
    (
        {"tokenizer.json": tokenizer(BPE)},
        {"tokenizer.json": tokenizer(BPE, [{"id": 8, "content": "<new>"}])},
    ),
    # An added token stands before the one of the model.
    (
        {"tokenizer.json": tokenizer({**BPE, "vocab": {"a": 0}}, [{"id": 0, "content": "z"}])},
        {"tokenizer.json": tokenizer({**BPE, "vocab": {"z": 0}})},
    ),
    (
        {"vocab.json": '{"a": 0, "b": 1}', "added_tokens.json": '{"<end>": 2}'},
        {"vocab.json": '{"b": 1, "<end>": 2, "a": 0}'},
    ),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_tokenizers_with_the_same_tokens(
    one: Mapping[str, str], other: Mapping[str, str], tokens: Callable[..., list[str]]
) -> None:
    assert tokens(one, other) == []


OTHER: list[tuple[dict[str, str | bytes], dict[str, str | bytes], str]] = [
    (
        {"tokenizer.json": tokenizer(BPE)},
        {"tokenizer.json": tokenizer({**BPE, "vocab": swapped(BPE["vocab"])})},  # type: ignore[arg-type]
        "2 of 4: 1 is `b` in the donor and `c` here, 2 is `c` in the donor and `b` here",
    ),
    (
        {"tokenizer.json": tokenizer(UNIGRAM)},
        {"tokenizer.json": tokenizer({**UNIGRAM, "vocab": [["b", 0.0], ["a", 0.0], ["c", 0]]})},
        "2 of 3: 0 is `a` in the donor and `b` here",
    ),
    (
        {"tokenizer.json": tokenizer(BPE, ADDED)},
        {"tokenizer.json": tokenizer(BPE, [{"id": 4, "content": "<stop>"}])},
        "1 of 5: 4 is `<end>` in the donor and `<stop>` here",
    ),
    (
        {"tokenizer.json": tokenizer(BPE, ADDED)},
        {"tokenizer.json": tokenizer(BPE)},
        "1 only in the donor, 0 only here: 4 is `<end>` in the donor",
    ),
    (
        {"vocab.json": '{"a": 0, "b": 1}'},
        {"vocab.json": '{"a": 1, "b": 0}'},
        "2 of 2",
    ),
    ({"vocab.txt": "a\nb\n"}, {"vocab.txt": "b\na\n"}, "2 of 2"),
    ({"tokenizer.model": b"\x00"}, {"tokenizer.model": b"\x01"}, "cannot be compared"),
    ({"spiece.model": b"\x00"}, {"spiece.model": b"\x01"}, "cannot be compared"),
    # An id that two tokens claim is not the row of either.
    (
        {"vocab.json": '{"a": 0, "b": 0}'},
        {"vocab.json": '{"a": 0}'},
        "1 of 1: 0 is `a` and `b` in the donor and `a` here",
    ),
    # What is broken, or lies.
    ({"tokenizer.json": tokenizer(BPE)}, {"tokenizer.json": "broken"}, "cannot be compared"),
    ({"tokenizer.json": tokenizer(BPE)}, {"tokenizer.json": b"\xff\xfe"}, "cannot be compared"),
    (
        {"tokenizer.json": tokenizer(BPE)},
        {"tokenizer.json": b'{"model": {"vocab": {"\xff": 0}}}'},
        "cannot be compared",
    ),
    (
        {"tokenizer.json": tokenizer(BPE)},
        {"tokenizer.json": tokenizer({"vocab": {"a": -1}})},
        "cannot be compared",
    ),
    (
        {"tokenizer.json": tokenizer(BPE)},
        {"tokenizer.json": tokenizer({"vocab": {"a": {}}})},
        "cannot be compared",
    ),
    (
        {"tokenizer.json": tokenizer(BPE)},
        {"tokenizer.json": "[" * 1_000_000},
        "cannot be compared",
    ),
    (
        {"tokenizer.json": tokenizer(BPE)},
        {"tokenizer.json": '{"model": {"deep": ' + "[" * 1_000_000},
        "cannot be compared",
    ),
    ({"vocab.txt": "a\n"}, {"vocab.txt": b"\xff\n"}, "cannot be compared"),
]


@pytest.mark.parametrize(("one", "other", "told"), OTHER)
def test_tokenizers_with_other_tokens(
    one: Mapping[str, str], other: Mapping[str, str], told: str, tokens: Callable[..., list[str]]
) -> None:
    (warning,) = tokens(one, other)
    assert told in warning
    assert "other" in warning


def test_tokens_of_strangers_are_shown_in_a_line(tokens: Callable[..., list[str]]) -> None:
    one = {"tokenizer.json": tokenizer({"vocab": {"x" * 100_000: 0, "\x1b[31m\n": 1}})}
    (warning,) = tokens(one, {"tokenizer.json": tokenizer({"vocab": {"a": 0, "b": 1}})})
    assert len(warning) < 700
    assert "\x1b" not in warning


def test_ids_of_any_size_cost_nothing(tokens: Callable[..., list[str]]) -> None:
    one = {"tokenizer.json": tokenizer({"vocab": {"a": 2**64 - 1, "b": 2**63, "c": 0}})}
    assert tokens(one, {"tokenizer.json": tokenizer({"vocab": {"c": 0}})}) == []


def test_a_model_whose_embedding_is_not_merged_may_have_other_tokens(
    pair: Callable[..., Path], tmp_path: Path
) -> None:
    pair(LLAMA, LLAMA)
    (tmp_path / "one" / "tokenizer.json").write_text(tokenizer(BPE))
    (tmp_path / "other" / "tokenizer.json").write_text(tokenizer(UNIGRAM))
    spans = [("one", [0, 1]), ("other", [0, 1]), ("one", [1, 2])]
    stack = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(tmp_path / name), "layer_range": span}]}
            for name, span in spans
        ],
    }
    (tmp_path / "s.yml").write_text(json.dumps(stack))
    assert [told for told in warnings_of(tmp_path / "s.yml") if "token" in told] == []
    assert any("token" in told for told in warnings_of(tmp_path / "r.yml"))


def test_a_base_that_only_gives_the_tokenizer_is_compared(
    pair: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = pair(LLAMA, LLAMA, base=tmp_path / "base")
    tensors = {f"model.layers.{n}.x.weight": np.ones(4, np.float32) for n in range(2)}
    tensors["model.embed_tokens.weight"] = np.ones((8, 4), np.float32)
    write_model(tmp_path / "base", tensors, "BF16", {**LLAMA, "rope_theta": 1e6})
    vocabularies = {"base": BPE["vocab"], "one": BPE["vocab"], "other": {"b": 0, "a": 1}}
    for name, vocabulary in vocabularies.items():
        (tmp_path / name / "tokenizer.json").write_text(tokenizer({"vocab": vocabulary}))
    told = warnings_of(recipe)
    assert len([text for text in told if "`rope_theta`" in text]) == 2
    (tokens_told,) = (text for text in told if "2 of 2" in text)
    assert str(tmp_path / "other") in tokens_told


def test_a_usual_tokenizer_is_compared_in_no_time(
    pair: Callable[..., Path], tmp_path: Path
) -> None:
    vocabulary = {f"Ġtoken{number}": number for number in range(150_000)}
    merges = [[f"left{number}", f"right{number}"] for number in range(150_000)]
    recipe = pair(LLAMA, LLAMA)
    text = tokenizer({"vocab": vocabulary, "merges": merges})
    assert len(text) > 8_000_000
    for name in ("one", "other"):
        (tmp_path / name / "tokenizer.json").write_text(text)
    assert warnings_of(recipe) == []
    started = time.process_time()
    assert warnings_of(recipe) == []
    assert time.process_time() - started < 0.5
    (tmp_path / "other" / "tokenizer.json").write_text(
        tokenizer({"vocab": swapped(vocabulary), "merges": merges})
    )
    started = time.process_time()
    (told,) = warnings_of(recipe)
    assert "2 of 8" in told  # the embedding has eight rows
    assert time.process_time() - started < 5
