"""Rules by which configs give a layer its kind from its position alone.

Each rule says of one layer what a reader of the config would take it for. The merge compares
what the output's config says of a layer with what the source's said of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

#: What configs call their layer count.
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

# What readers assume where a config of that `model_type` is silent. Not a list of what can be
# merged: a type that is missing here only loses the check of a rule that its config leaves out.
_DEFAULTS: Mapping[str, Config] = {
    "cohere2": {"sliding_window_pattern": 4},
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {"sliding_window_pattern": 6},
    "glm4_moe": {"first_k_dense_replace": 1},
    "gpt_oss": {"sliding_window_pattern": 2},
    "jamba": {
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "llama4_text": {"interleave_moe_layer_step": 1, "no_rope_layer_interval": 4},
    "modernbert": {"global_attn_every_n_layers": 3},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "qwen3_next": {"full_attention_interval": 4, "decoder_sparse_step": 1},
    "smollm3": {"no_rope_layer_interval": 4},
}


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
        if not self.stands_in(config):
            return "unknown (the config does not say)"
        try:
            return self.evaluate(_with_defaults(config), layer)
        except (TypeError, ValueError, ZeroDivisionError, LookupError):
            return "unknown (the config's value is odd)"


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
    pattern = config["sliding_window_pattern"]
    if config.get("sliding_window", True) is None:
        return "full attention"
    if isinstance(pattern, str):
        return "sliding attention" if pattern[layer % len(pattern)] == "L" else "full attention"
    return "full attention" if (layer + 1) % pattern == 0 else "sliding attention"


def _max_window(config: Config, layer: int) -> str:
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return "full attention"
    windowed = layer >= int(config["max_window_layers"])
    return "sliding attention" if windowed else "full attention"


def _full_attention_interval(config: Config, layer: int) -> str:
    full = (layer + 1) % config["full_attention_interval"] == 0
    return "full attention" if full else "linear attention"


def _global_attention(config: Config, layer: int) -> str:
    is_global = layer % config["global_attn_every_n_layers"] == 0
    return "global attention" if is_global else "local attention"


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
    Rule(("sliding_window_pattern",), "layer_types", _sliding_pattern),
    Rule(("max_window_layers",), "layer_types", _max_window),
    Rule(("full_attention_interval",), "layer_types", _full_attention_interval),
    Rule(("global_attn_every_n_layers",), "layer_types", _global_attention),
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
    Rule(("num_dense_layers",), None, _dense_count),
    Rule(("no_rope_layer_interval",), "no_rope_layers", _rope_interval),
    Rule(("num_kv_shared_layers",), None, _shared_cache),
    Rule(("block_types",), None, _tiled_blocks),
    Rule(("attention_types",), "attention_layers", _attention_types),
)
"""Every rule that is known."""

_KNOWN_KEYS = frozenset(key for rule in RULES for key in rule.keys)
_LOOKS_LIKE_A_RULE = re.compile(
    r"(^|_)(layers?|attn|attention|window|moe|sparse|dense|experts?)(_\w+)?_"
    r"(interval|period|pattern|freq|frequency|step|every\w*)$"
    r"|(^|_)every_(n|k)?_?layers?$"
)


def unknown_rules(config: Config) -> Iterator[tuple[str, int | str]]:
    """Yield keys of `config` that seem to be rules over positions and are not known ones.

    A step of 1 (or an empty pattern) treats all layers alike, so it is no rule.
    """
    for key, value in config.items():
        if key in _KNOWN_KEYS or not _LOOKS_LIKE_A_RULE.search(key):
            continue
        if (type(value) is int and value > 1) or (isinstance(value, str) and len(value) > 1):
            yield key, value
