"""Names: stacks, layer counts, sides."""

from __future__ import annotations

import pytest
from oxmerge.models.names import (
    find_layer_counts,
    find_layout,
    is_head,
    is_vocabulary,
    join,
    position,
    side_of,
)

CONFIGS: list[tuple[dict[str, object], set[int]]] = [
    ({"num_hidden_layers": 32, "num_attention_heads": 8, "hidden_size": 64}, {32}),
    ({"n_layer": 12, "n_head": 4}, {12}),
    ({"num_layers": 6, "num_decoder_layers": 8}, {6, 8}),
    ({"encoder_layers": 6, "decoder_layers": 7, "decoder_layerdrop": 0}, {6, 7}),
    ({"text_config": {"num_hidden_layers": 28}, "vision_config": {"depth": 27}}, {28, 27}),
    ({"num_hidden_layers": 61, "num_nextn_predict_layers": 1}, {61}),
    ({"num_hidden_layers": 24, "max_window_layers": 21, "block_size": 8}, {24}),
    ({"num_hidden_layers": 24, "attn_layer_period": 8, "attn_layer_offset": 4}, {24}),
    ({"num_hidden_layers": True, "n_layer": "12", "depth": -1}, set()),
]


@pytest.mark.parametrize(("config", "counts"), CONFIGS)
def test_layer_counts(config: dict[str, object], counts: set[int]) -> None:
    assert find_layer_counts(config) == counts


def numbered(prefix: str, numbers: range | list[int], rest: str = "w") -> list[str]:
    return [join(prefix, number, rest) for number in numbers]


STACKS: list[tuple[list[str], set[int], dict[str, int]]] = [
    (numbered("model.layers", range(4)), {4}, {"model.layers": 4}),
    (numbered("model.layers", range(5)), {4}, {"model.layers": 4}),
    (numbered("model.layers", range(4)), {5}, {}),
    (numbered("model.layers", [0, 1, 3]), {3, 4}, {}),
    (numbered("h", range(2)) + numbered("v.blocks", range(3)), {2, 3}, {"h": 2, "v.blocks": 3}),
    (numbered("", range(2)), {2}, {"": 2}),
    (
        numbered("l", range(2), "experts.0.w") + numbered("l", range(2), "experts.1.w"),
        {2},
        {"l": 2},
    ),
    (numbered("l", range(3)), {2, 3}, {"l": 3}),
    (numbered("l", range(3)), set(), {}),
    (["layers.00.w", "layers.01.w"], {2}, {}),
]


@pytest.mark.parametrize(("names", "counts", "expected"), STACKS)
def test_stacks(names: list[str], counts: set[int], expected: dict[str, int]) -> None:
    layout = find_layout(names, frozenset(counts))
    assert {prefix: stack.depth for prefix, stack in layout.stacks.items()} == expected


def test_places() -> None:
    layout = find_layout(numbered("model.layers", range(4), "mlp.experts.1.w"), frozenset({3}))
    place = layout.place("model.layers.2.mlp.experts.1.w")
    assert place is not None
    assert (place.layer, place.rest, place.is_extra) == (2, "mlp.experts.1.w", False)
    extra = layout.place("model.layers.3.mlp.experts.1.w")
    assert extra is not None
    assert extra.is_extra
    assert layout.place("model.norm.weight") is None
    assert layout.place("other.2.weight") is None


def test_positions() -> None:
    assert [position(layer, 3) for layer in range(3)] == [0.0, 0.5, 1.0]
    assert position(0, 1) == 1.0


def test_loose_tensors_that_are_numbered_have_positions() -> None:
    names = [
        *numbered("model.layers", range(5)),  # the last of which predicts further tokens
        *numbered("visual.deepstack", range(3)),
        *numbered("visual.merger.mlp", [0, 2]),
        *numbered("single", range(1)),
        "model.norm.w",
    ]
    layout = find_layout(names, frozenset({4}))
    positions = [layout.position(name) for name in names]
    assert positions == [0, 1 / 3, 2 / 3, 1, 0, 0, 0.5, 1, 1, 1, 1, 0]
    assert {find_layout(names, frozenset()).position(name) for name in names} == {0}


SIDES: list[tuple[str, str | None]] = [
    ("model.embed_tokens.weight", "input"),
    ("transformer.wte.weight", "input"),
    ("wpe.weight", "input"),
    ("bert.embeddings.LayerNorm.weight", "input"),
    ("transformer.word_embeddings_layernorm.weight", "input"),
    ("gpt_neox.embed_in.weight", "input"),
    ("shared.weight", "input"),
    ("model.rotary_emb.inv_freq", "input"),
    ("model.norm.weight", "output"),
    ("lm_head.weight", "output"),
    ("lm_head.bias", "output"),
    ("transformer.ln_f.bias", "output"),
    ("backbone.norm_f.weight", "output"),
    ("gpt_neox.final_layer_norm.weight", "output"),
    ("embed_out.weight", "output"),
    ("model.embedding_norm.weight", "output"),
    ("score.weight", "output"),
    ("classifier.dense.weight", "output"),
    ("bert.pooler.dense.weight", "output"),
    ("cls.predictions.transform.dense.weight", "output"),
    ("mtp.embed.weight", "output"),
    ("model.gate.weight", None),
    ("alpha", None),
]


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_sides(name: str, side: str | None) -> None:
    assert side_of(name) == side


def test_heads_and_vocabularies() -> None:
    assert is_head("lm_head.weight")
    assert not is_head("model.embed_tokens.weight")
    assert is_vocabulary("model.embed_tokens.weight")
    assert is_vocabulary("transformer.wte.weight")
    assert not is_vocabulary("model.layers.0.mlp.up_proj.weight")
