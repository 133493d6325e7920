"""Rules by which configs give a layer its kind from its position alone.

Each rule says of one layer what a reader of the config would take it for. The merge compares
what the output's config says of a layer with what the source's said of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from oxmerge.models.layer_lists import DEPTH_KEYS, is_other_model

Config = Mapping[str, Any]

# What readers assume where a config of that `model_type` is silent. Not a list of what can be
# merged: a type that is missing here only loses the check of a rule that its config leaves out.
_DEFAULTS: dict[str, Config] = {
    "afmoe": {"global_attn_every_n_layers": 4},
    "bailing_hybrid": {"layer_group_size": 6, "first_k_dense_replace": 2},
    "cohere2": {"sliding_window_pattern": 4},
    "diffllama": {"layer_idx": True},
    "esmc": {"layer_idx": True},
    "exaone4": {"sliding_window_pattern": 4},
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {"sliding_window_pattern": 6},
    "gemma3n_text": {"sliding_window_pattern": 5},
    "glm4_moe": {"first_k_dense_replace": 1},
    "gpt_oss": {"sliding_window_pattern": 2},
    "jamba": {
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "llama4_text": {"interleave_moe_layer_step": 1, "no_rope_layer_interval": 4},
    "minicpm": {"scale_depth": 1.0},
    "minicpm3": {"scale_depth": 1.4},
    "minimax": {"layer_idx": True, "full_attention_interval": 2},
    "minimax_m1": {"layer_idx": True},
    "minimax_text_01": {"layer_idx": True},
    "modernbert": {"global_attn_every_n_layers": 3},
    "olmo3": {"sliding_window_pattern": 4},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "qwen3_5_moe_text": {"full_attention_interval": 4},
    "qwen3_5_text": {"full_attention_interval": 4},
    "qwen3_next": {"full_attention_interval": 4, "decoder_sparse_step": 1},
    "smollm3": {"no_rope_layer_interval": 4},
    "vaultgemma": {"sliding_window_pattern": 2},
}


#: Types whose readers give layers their kinds by position where `layer_types` is absent, by rules
#: that are nobody else's.
_OWN_RULES = (
    "beam", "cwm", "deepseek_v4", "diffusion_gemma_text", "embedding_gemma2_text", "flint",
    "gemma4_text", "gemma4_unified_text", "glm5_next_text", "granite_swa", "granitemoe_swa",
    "inkling_text", "kolibri1", "lara_mini", "lfm3", "muse_glimmer_text", "muse_spark_text",
    "neomme", "olmo_hybrid", "qwen4_exp_text", "t5_gemma_module", "t5gemma2_decoder",
    "t5gemma2_text",
)  # fmt: skip
_DEFAULTS |= {name: {"layer_types": "by position"} for name in _OWN_RULES}


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule over positions.

    Attributes
    ----------
    keys
        The keys it reads.
    replaced_by
        A list in the config that, where present, readers use instead.
    evaluate
        The kind of one layer, for a config that has at least one of the keys.
    """

    keys: tuple[str, ...]
    replaced_by: str | None
    evaluate: Callable[[Config, int], str]

    def stands_in(self, config: Config) -> bool:
        """Tell whether `config` has the rule and nothing replaces it."""
        config = _with_defaults(config)
        if self.replaced_by is not None and isinstance(config.get(self.replaced_by), list):
            return False
        return any(config.get(key) is not None for key in self.keys)

    def kind(self, config: Config, layer: int) -> str:
        """Return what a reader takes `layer` for."""
        try:
            listed = None if self.replaced_by is None else config.get(self.replaced_by)
            if isinstance(listed, list):
                return _listed_kind(listed[layer])
            if not self.stands_in(config):
                return "unknown (the config does not say)"
            return self.evaluate(_with_defaults(config), layer)
        except (TypeError, ValueError, ZeroDivisionError, LookupError):
            return "unknown (the config's value is odd)"


def _listed_kind(entry: object) -> str:
    """Return what a list says of a layer in the words of the rule that it replaces."""
    text = str(entry).replace("_", " ")
    return _experts(text == "sparse") if text in ("sparse", "dense") else text


def _with_defaults(config: Config) -> Config:
    defaults = _DEFAULTS.get(str(config.get("model_type")), {})
    silent = {key: value for key, value in defaults.items() if config.get(key) is None}
    return {**config, **silent}


def _count(config: Config, key: str, default: int) -> int:
    value = config.get(key)
    return default if value is None else int(value)


def _depth(config: Config) -> int:
    return next((int(config[key]) for key in DEPTH_KEYS if config.get(key) is not None), 0)


def _sliding_pattern(config: Config, layer: int) -> str:
    pattern = config.get("sliding_window_pattern") or config["_sliding_window_pattern"]
    if config.get("sliding_window", True) is None:
        return "full attention"
    if isinstance(pattern, str):
        return "sliding attention" if pattern[layer % len(pattern)] == "L" else "full attention"
    return "full attention" if (layer + 1) % pattern == 0 else "sliding attention"


def _max_window(config: Config, layer: int) -> str:
    is_used = config.get("use_sliding_window", config.get("model_type") == "dots1")
    if not is_used or config.get("sliding_window") is None:
        return "full attention"
    windowed = layer >= int(config["max_window_layers"])
    return "sliding attention" if windowed else "full attention"


def _full_attention_interval(config: Config, layer: int) -> str:
    full = (layer + 1) % config["full_attention_interval"] == 0
    return "full attention" if full else "linear attention"


def _global_attention(config: Config, layer: int) -> str:
    # Some count the layer from 0 and others from 1; both readings must stay true.
    period = config["global_attn_every_n_layers"]
    kinds = {0: "the first layer", period - 1: "the last layer"}
    return f"{kinds.get(layer % period, 'a layer inside')} of a group of {period}"


def _group_of_layers(config: Config, layer: int) -> str:
    size = config["layer_group_size"]
    if (layer + 1) % size == 0:
        return "full attention"
    is_last = layer >= _depth(config) // size * size
    return "a layer of the last, smaller group" if is_last else "linear attention"


def _attention_period(config: Config, layer: int) -> str:
    period = _count(config, "attn_layer_period", 8)
    offset = _count(config, "attn_layer_offset", 4)
    return "an attention layer" if layer % period == offset else "a state-space layer"


def _expert_period(config: Config, layer: int) -> str:
    period = _count(config, "expert_layer_period", 2)
    offset = _count(config, "expert_layer_offset", 1)
    return _experts(layer % period == offset)


def _first_dense(config: Config, layer: int) -> str:
    if not config.get("n_routed_experts", True):
        return _experts(has_experts=False)
    frequency = config.get("moe_layer_freq")
    if isinstance(frequency, list):
        return _experts(bool(frequency[layer]))
    step = 1 if frequency is None else int(frequency)
    return _experts(layer >= _count(config, "first_k_dense_replace", 0) and layer % step == 0)


def _sparse_step(config: Config, layer: int) -> str:
    if not config.get("num_experts", True):
        return _experts(has_experts=False)
    listed_dense = layer in (config.get("mlp_only_layers") or ())
    return _experts(not listed_dense and (layer + 1) % config["decoder_sparse_step"] == 0)


def _interleaved_experts(config: Config, layer: int) -> str:
    return _experts((layer + 1) % config["interleave_moe_layer_step"] == 0)


def _expert_interval(config: Config, layer: int) -> str:
    start = _count(config, "moe_layer_start_index", 0)
    end = _count(config, "moe_layer_end_index", -1)
    last = _depth(config) - 1 if end == -1 else end
    on_step = (layer + 1) % _count(config, "moe_layer_interval", 1) == 0
    return _experts(on_step and start <= layer <= last)


def _skipped_experts(config: Config, layer: int) -> str:
    return _experts(layer >= int(config["moe_layer_num_skipped"]))


def _shared_block(config: Config, layer: int) -> str:
    hybrid = config.get("hybrid_layer_ids")
    if not isinstance(hybrid, list) or layer not in hybrid:
        return "a layer without a shared block"
    return f"a layer with the shared block {hybrid.index(layer) % int(config['num_mem_blocks'])}"


def _own_number(config: Config, layer: int) -> str:
    return f"layer {layer} of {_depth(config)}"


def _per_layer_inputs(config: Config, layer: int) -> str:
    return _own_number(config, layer) if config["hidden_size_per_layer_input"] else "any layer"


def _inverse_scale(config: Config, layer: int) -> str:
    is_scaled = config["scale_attn_by_inverse_layer_idx"]
    return f"a layer whose attention is divided by {layer + 1}" if is_scaled else "any layer"


def _branch_scale(config: Config, layer: int) -> str:  # noqa: ARG001
    scale = float(config["scale_depth"]) / math.sqrt(_depth(config))
    return f"a layer whose branches are multiplied by {scale:.6g}"


def _dense_count(config: Config, layer: int) -> str:
    return _experts(layer >= int(config["num_dense_layers"]))


def _rope_interval(config: Config, layer: int) -> str:
    without = (layer + 1) % config["no_rope_layer_interval"] == 0
    return "a layer without rotary embedding" if without else "a layer with rotary embedding"


def _shared_cache(config: Config, layer: int) -> str:
    shared = layer >= _depth(config) - int(config["num_kv_shared_layers"])
    return "a layer that shares keys and values" if shared else "a layer with its own keys"


def _tiled_blocks(config: Config, layer: int) -> str:
    blocks = config["block_types"]
    return f"a block of type `{blocks[layer % len(blocks)]}`"


def _attention_types(config: Config, layer: int) -> str:
    kinds = [kind for names, count in config["attention_types"] for kind in names * count]
    return f"{kinds[layer]} attention"


def _experts(has_experts: bool) -> str:  # noqa: FBT001
    return "a layer of experts" if has_experts else "a dense layer"


RULES = (
    Rule(("sliding_window_pattern", "_sliding_window_pattern"), "layer_types", _sliding_pattern),
    Rule(("layer_types",), "layer_types", _own_number),
    Rule(("max_window_layers",), "layer_types", _max_window),
    Rule(("full_attention_interval",), "layer_types", _full_attention_interval),
    Rule(("global_attn_every_n_layers",), "layer_types", _global_attention),
    Rule(("layer_group_size",), "layer_types", _group_of_layers),
    Rule(("attn_layer_period", "attn_layer_offset"), "layers_block_type", _attention_period),
    Rule(("expert_layer_period", "expert_layer_offset"), None, _expert_period),
    Rule(("first_k_dense_replace", "moe_layer_freq"), "mlp_layer_types", _first_dense),
    Rule(("decoder_sparse_step",), None, _sparse_step),
    Rule(("interleave_moe_layer_step",), "moe_layers", _interleaved_experts),
    Rule(
        ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"),
        None,
        _expert_interval,
    ),
    Rule(("moe_layer_num_skipped",), None, _skipped_experts),
    Rule(("num_dense_layers",), "mlp_layer_types", _dense_count),
    Rule(("no_rope_layer_interval",), "no_rope_layers", _rope_interval),
    Rule(("num_kv_shared_layers",), None, _shared_cache),
    Rule(("block_types",), None, _tiled_blocks),
    Rule(("attention_types",), "attention_layers", _attention_types),
    # Not a key, but what readers of some types compute with: a decay that depends on the number.
    Rule(("layer_idx",), None, _own_number),
    # There the embeddings hold a part for each layer.
    Rule(("hidden_size_per_layer_input",), None, _per_layer_inputs),
    Rule(("num_mem_blocks",), None, _shared_block),
    Rule(("scale_attn_by_inverse_layer_idx",), None, _inverse_scale),
    Rule(("scale_depth",), None, _branch_scale),
)
"""Every rule that is known."""

RULE_KEYS = frozenset(key for rule in RULES for key in rule.keys if key != rule.replaced_by)
"""The keys of the known rules."""

_LOOKS_LIKE_A_RULE = re.compile(
    r"(^|_)(layers?|attn|attention|window|moe|sparse|dense|experts?|reuse|share|kv|topk)(_\w+)?_"
    r"(interval|period|pattern|freq|frequency|step|every\w*)$"
    r"|(^|_)every_(n|k|i)?_?(layers?|blocks?)$|(^|_)layers?_(group_size|share_factor)$"
    r"|^cla_share_factor$|_layers_per_\w*(block|group)$"
)
_LOOKS_LIKE_A_COUNT = re.compile(
    r"(^|_)(num|n|first|last|start|end|skip|k)_(\w+_)?(layers?|blocks?|replace)$"
    r"|(^|_)(layers?|blocks?)_(\w+_)?(num_skipped|skipped|start|end|offset|index_start|index_end)$"
    r"|^(\w+_)?dense_mlp_idx$|^n_dense_first_layers$"
)
#: They count all layers, layers besides the stack, or what is not a layer of it.
_COUNTS_OTHERS = re.compile(
    r"hidden_layers|nextn|mtp|predict|vision|visual|image|video|audio|speech|conv|encoder|decoder"
    r"|adapter|mem_blocks|random_blocks|res_blocks|residual|upscale|query|upsample|downsample|extract|expert|local"
)


def unknown_rules(config: Config) -> Iterator[tuple[str, int | str]]:
    """Yield keys of `config` that seem to be rules over positions and are not known ones.

    A step of 1 (or an empty pattern) treats all layers alike, so it is no rule.
    """
    for key, value in _pairs(config):
        if key in RULE_KEYS or not _LOOKS_LIKE_A_RULE.search(key):
            continue
        if (type(value) is int and value > 1) or (isinstance(value, str) and len(value) > 1):
            yield key, value


def unknown_counts(config: Config, depth: int) -> Iterator[tuple[str, int]]:
    """Yield keys of `config` that seem to count layers from an end of the stack, and are unknown.

    They would say something of other layers when layers move, in a way that is not known. One that
    counted none or all of the donor's layers, `depth`, treats all alike.
    """
    for key, value in _pairs(config):
        if key in RULE_KEYS or key in DEPTH_KEYS or _COUNTS_OTHERS.search(key):
            continue
        if type(value) is int and 0 < value != depth and _LOOKS_LIKE_A_COUNT.search(key):
            yield key, value


def _pairs(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a config and its parts, without those of other models."""
    for key, value in config.items():
        if not isinstance(value, Mapping):
            yield key, value
        elif not (key.endswith("_config") and is_other_model(value)):
            yield from _pairs(value)
