"""What a config says about the meaning of weights, in one spelling.

Two models belong together if their configs give the same weights the same meaning. *Every key
counts unless it is known not to*: an architecture that is new has keys that nobody knows, and a
difference in one of them is better shown than passed over. Known not to count are

- names and versions of what made the file, and how code is to be found;
- element types and quantisation, which the tensors' headers and other checks tell;
- how a model is run (caches, kernels, what is returned) and how text is generated;
- how it was trained: dropout, initial values, losses;
- the ids of tokens, and how many positions and tokens there may be: shapes and tokenizers tell what
  the rows are;
- how many layers there are, which the tensors tell.

A key has one meaning in all its spellings: those that transformers takes for each other, rotary
settings as its versions 4 and 5 write them, a text model's keys in the outer config or in a nested
one. A key that is absent, or null where null asks for the default, has its default where that is
known: for common keys and types of models. Where it is not, an absent key is no difference.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from oxmerge.models.layer_lists import DEPTH_KEYS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any

    Config = Mapping[str, Any]

__all__ = [
    "Statement",
    "holds_token_ids",
    "is_language_config",
    "is_model_config",
    "meaning_of",
    "same",
    "types_of",
]

_LANGUAGE_CONFIG = re.compile(r"(^|_)(text|language|llm|decoder|thinker)(_|$)")
_NOT_OF_THE_MODEL = re.compile(r"quantization|compression|generation")
#: Keys whose whole numbers, also those in lists, are ids of tokens.
_TOKEN_IDS = re.compile(
    r"_token_(id|ids|index)$|^(begin_)?suppress_tokens$|^(bad|force)_words_ids$|^sequence_bias$"
)

#: Keys that give weights no other meaning.
_WITHOUT_MEANING = frozenset((
    # What made the file, and where code is.
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "unsloth_version",
    "unsloth_fixed", "unsloth_fixed_mistral", "auto_map", "custom_pipelines", "_from_model_config",
    "finetuning_task", "task_specific_params", "problem_type", "architectures", "model_type",
    "_attn_implementation_autoset", "tokenizer_class", "processor_class", "language", "license",
    # Element types and quantisation.
    "torch_dtype", "dtype", "params_dtype", "bf16", "fp16", "fp32", "use_bfloat16", "fp32_residual",
    "quantization", "quantization_config", "compression_config", "mamba_ssm_dtype",
    "enable_fp32_logits", "router_dtype", "moe_router_dtype", "softmax_in_fp32", "attn_dtype",
    "attention_softmax_in_fp32", "residual_in_fp32", "output_upcast",
    # How it is run.
    "use_cache", "_attn_implementation", "attn_implementation", "attn_implementation_new",
    "attn_impl", "_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention",
    "use_flash_attention_2", "flash_attn", "flash_rotary", "fused_dense", "use_dynamic_ntk_cache",
    "use_cache_quantization", "use_cache_kernel", "softmax_kernel", "pretraining_tp", "ep_size",
    "tensor_parallel", "tensor_parallel_degree", "tp_plan", "pp_plan", "base_model_tp_plan",
    "base_model_pp_plan", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "use_return_dict", "torchscript", "tf_legacy_loss", "chunk_size_feed_forward",
    "gradient_checkpointing", "use_gradient_checkpointing", "cache_implementation",
    "use_mamba_kernels", "use_kernel_forward_from_hub", "num_logits_to_keep", "logits_to_keep",
    "calc_logits_for_entire_prompt", "disable_custom_kernels", "use_cpu_initialization",
    "mamba_chunk_size", "block_multiple_of", "pruned_heads", "is_decoder", "is_llama_config",
    "cross_attention_hidden_size", "add_cross_attention", "step_kernel", "chunkwise_kernel",
    "sequence_kernel", "return_last_states", "use_triton_kernels",
    # How text is generated.
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "typical_p", "top_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "remove_invalid_values",
    "exponential_decay_length_penalty", "generation_config", "max_new_tokens", "max_window_size",
    "prefix", "chat_format",
    # How it was trained.
    "init_config", "rescale_prenorm_residual", "embd_init", "time_step_floor",
    "time_step_init_scheme", "time_step_max", "time_step_min", "time_step_scale", "aux_loss_alpha",
    "seq_aux", "router_z_loss_coef", "output_router_logits_loss", "router_jitter_noise",
    "input_jitter_noise", "jitter_eps", "label_smoothing", "emb_dropout_prob",
    "router_bias_update_rate", "moe_aux_loss_coeff", "mtp_loss_scaling_factor", "scale_lr",
    "apply_spec_augment", "ignore_index",
    # How many tokens and positions there are.
    "vocab_size", "padded_vocab_size", "n_positions", "n_ctx", "max_position_embeddings",
    "max_position_embedding", "max_sequence_length", "max_seq_len",
    "seq_length", "model_max_length", "max_seq_length", "seq_len", "context_length",
    # How many layers there are.
    *DEPTH_KEYS, "num_layer", "num_hidden_blocks", "num_nextn_predict_layers", "num_mtp_modules",
    "num_mtp_layers",
))  # fmt: skip
_PATTERNS_WITHOUT_MEANING = re.compile(
    r"dropout|drop_path|drop_rate|pdrop|layerdrop|(^|_)init(ializer)?(_|$)|_loss(_|$)|loss_coef"
    r"|^mask_(time|feature)_|^unsloth_|^_attn_|^(train|training)_"
)

#: Spellings of a key: the first one stands for all.
_SPELLINGS = (
    ("hidden_size", "n_embd", "d_model"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num",
     "num_attention_groups"),
    ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "d_ff"),
    ("hidden_act", "activation_function", "activation", "activation_type", "ffn_act"),
    ("norm_eps", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon",
     "norm_epsilon", "rms_norm_epsilon"),
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_num_experts"),
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k",
     "top_k_experts"),
    ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
    ("norm_topk_prob", "moe_renormalize"),
    ("n_group", "num_expert_group"),
    ("routed_scaling_factor", "moe_router_scaling_factor"),
    ("sliding_window_pattern", "_sliding_window_pattern"),
    ("tie_word_embeddings", "tie_embeddings", "tie_embedding"),
)  # fmt: skip
#: Names of one function.
_ACTIVATIONS = {
    "swish": "silu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu_squared": "relu2",
}  # fmt: skip

#: Stands for a default that readers do not agree on.
_UNKNOWN = "unknown"
#: Defaults of common types; keys in the first of their spellings. Where these say nothing of heads,
#: there are as many for keys and values as for queries, and together they are as wide as the model.
_RMS = {"hidden_act": "silu", "norm_eps": 1e-6, "rope_theta": 10000.0}
_QWEN = {**_RMS, "tie_word_embeddings": False, "use_sliding_window": False}
_GEMMA = {
    "hidden_act": "gelu_tanh", "norm_eps": 1e-6, "rope_theta": 10000.0, "head_dim": 256,
    "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
_DEFAULTS: Mapping[str, Config] = {
    "llama": {**_RMS, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    "mistral": {**_RMS, "tie_word_embeddings": False, "sliding_window": 4096,
                "num_key_value_heads": 8},
    "mixtral": {
        "hidden_act": "silu", "norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": False,
        "num_experts_per_tok": 2, "num_key_value_heads": 8,
    },
    "qwen2": {**_QWEN, "num_key_value_heads": 32},
    "qwen2_moe": {**_QWEN, "num_key_value_heads": 16, "norm_topk_prob": False},
    "qwen3": {**_QWEN, "head_dim": 128, "num_key_value_heads": 32, "attention_bias": False},
    "qwen3_moe": {
        **_QWEN, "head_dim": _UNKNOWN, "num_key_value_heads": 4, "attention_bias": False,
        "norm_topk_prob": False,
    },
    "gemma": {**_GEMMA, "num_key_value_heads": 16},
    "gemma2": {
        **_GEMMA, "num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        **_GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window": 4096,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
    },
    "gemma3n_text": {
        **_GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "num_key_value_heads": 2,
    },
    "phi": {
        "hidden_act": "gelu_tanh", "norm_eps": 1e-5, "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5, "tie_word_embeddings": False, "qk_layernorm": False,
    },
    "phi3": {
        "hidden_act": "silu", "norm_eps": 1e-5, "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0, "tie_word_embeddings": False,
    },
    "stablelm": {
        "hidden_act": "silu", "norm_eps": 1e-5, "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": False, "use_parallel_residual": False, "qk_layernorm": False,
    },
    "gpt_neox": {
        "hidden_act": "gelu", "norm_eps": 1e-5, "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": False, "use_parallel_residual": True, "attention_bias": True,
    },
    "gpt2": {
        "hidden_act": "gelu_tanh", "norm_eps": 1e-5, "tie_word_embeddings": True,
        "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True,
    },
    "falcon": {
        "norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "alibi": False,
        "parallel_attn": True, "multi_query": True, "new_decoder_architecture": False,
        "num_key_value_heads": _UNKNOWN,
    },
    "bloom": {"norm_eps": 1e-5, "tie_word_embeddings": True},
    "olmo2": {"hidden_act": "silu", "norm_eps": 1e-5, "rope_theta": 10000.0,
              "tie_word_embeddings": False, "attention_bias": False},
    "starcoder2": {"hidden_act": "gelu_tanh", "norm_eps": 1e-5, "rope_theta": 10000.0,
                   "tie_word_embeddings": True, "num_key_value_heads": 2},
    "granite": {
        **_RMS, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
        "attention_multiplier": 1.0,
    },
    "deepseek_v2": {
        **_RMS, "head_dim": _UNKNOWN, "tie_word_embeddings": False, "attention_bias": False,
    },
    "deepseek_v3": {
        **_RMS, "head_dim": _UNKNOWN, "tie_word_embeddings": False, "attention_bias": False,
    },
    "bert": {"hidden_act": "gelu", "norm_eps": 1e-12, "position_embedding_type": "absolute"},
}  # fmt: skip

#: Keys that `_rotary` puts in one spelling.
_ROTARY_KEYS = (
    "rope_theta", "rope_scaling", "rope_parameters", "rotary_emb_base", "rotary_base", "rotary_pct",
    "rope_pct", "partial_rotary_factor", "rope_local_base_freq", "global_rope_theta",
    "local_rope_theta", "original_max_position_embeddings", "max_position_embeddings",
)  # fmt: skip
_ROPE_TYPES = {"su": "longrope", "mrope": "default", "axial": "default", None: "default"}
#: Types that scale where they do not say so.
_SCALED_BY_DEFAULT = frozenset((
    "apertus", "cwm", "gpt_oss", "higgs_audio_v2", "ministral3", "mistral4",
    "openai_privacy_filter",
))  # fmt: skip
#: Types of scaling that depend on how many positions the model had before.
_FROM_ORIGINAL = frozenset(("dynamic", "longrope", "yarn", "llama3"))
_CLOSE = 1e-6


@dataclass(frozen=True, slots=True)
class Statement:
    """What a config says, or leaves to a default.

    Attributes
    ----------
    value : object
        The value.
    is_given : bool
        Whether it stands in the config.
    key : str, optional
        The key as the config spells it, if it is not the first of its spellings.
    """

    value: Any
    is_given: bool = True
    key: str | None = None

    def __str__(self) -> str:
        """Return the value as JSON has it, cut to a line, and whether it is a default."""
        text = _text(self.value)
        return text if self.is_given else f"{text} (the default)"


def types_of(config: Config) -> frozenset[str]:
    """Return the types a model is of: its own, and that of the language model in it.

    ``gemma3_text`` is what ``gemma3`` wraps; they count as one.
    """
    language = _parts(config)[0]
    types = (config.get("model_type"), language.get("model_type"))
    return frozenset(str(each).removesuffix("_text") for each in types if each)


def meaning_of(config: Config) -> dict[str, Statement]:
    """Return everything that counts in a config, by the names of keys with dots between them."""
    language, others = _parts(config)
    said = _canonical(language)
    for name, part in others.items():
        inner = _canonical(part)
        if part.get("model_type"):
            inner["model_type"] = Statement(part["model_type"])
        said |= {f"{name}.{key}": value for key, value in inner.items()}
    return said


def same(one: Any, other: Any) -> bool:  # noqa: ANN401
    """Tell whether two values mean the same: numbers but for rounding, NaN like itself."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or _both_nan(one, other) or math.isclose(one, other, rel_tol=_CLOSE)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)


def _both_nan(one: float, other: float) -> bool:
    return one != one and other != other  # noqa: PLR0124 - only NaN differs from itself


def is_model_config(key: str) -> bool:
    """Tell whether a key holds the config of a model, or a part of one."""
    return key.endswith("_config") and _NOT_OF_THE_MODEL.search(key) is None


def is_language_config(key: str) -> bool:
    """Tell whether a key holds the config of the language model in another."""
    return is_model_config(key) and _LANGUAGE_CONFIG.search(key) is not None


def holds_token_ids(key: str) -> bool:
    """Tell whether the whole numbers under a key, also those in lists, are ids of tokens."""
    return _TOKEN_IDS.search(key) is not None


def _parts(config: Config) -> tuple[dict[str, Any], dict[str, Config]]:
    """Return what is said of the language model, in whichever config, and the other configs."""
    language: dict[str, Any] = {}
    others: dict[str, Config] = {}
    nested: tuple[dict[str, Any], dict[str, Config]] | None = None
    for key, value in config.items():
        if not isinstance(value, dict) or not is_model_config(key):
            language[key] = value
        elif nested is None and is_language_config(key):
            nested = _parts(value)
        else:
            others[key] = value
    if nested is not None:
        given = {key: value for key, value in nested[0].items() if value is not None}
        language |= given
        others |= nested[1]
    return language, others


def _canonical(config: Config) -> dict[str, Statement]:
    """Return what one model's config says, in the first of all spellings."""
    kind = str(config.get("model_type"))
    given, spelt = _spelled(config)
    defaults = dict(_DEFAULTS.get(kind, {}))
    _settle_activation(given, kind)
    _settle_window(given, defaults)
    rotary = _rotary(config, defaults)
    for key in _ROTARY_KEYS:
        given.pop(key, None)
        defaults.pop(key, None)
    said = {key: Statement(value, key=spelt.get(key)) for key, value in _leaves(given)}
    said |= rotary
    for key, value in defaults.items():
        said.setdefault(key, Statement(value, is_given=False))
    _derive_heads(said, is_known=kind in _DEFAULTS)
    return said


def _spelled(config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the keys that count, each in the first of its spellings, and how it was spelt."""
    given = {key: value for key, value in config.items() if _counts(key)}
    spelt: dict[str, str] = {}
    for first, *more in _SPELLINGS:
        found = [key for key in more if given.get(key) is not None]
        if given.get(first) is None and len(found) == 1:
            given[first] = given.pop(found[0])
            spelt[first] = found[0]
    return given, spelt


def _counts(key: str) -> bool:
    is_known = key in _WITHOUT_MEANING or _PATTERNS_WITHOUT_MEANING.search(key) is not None
    return not is_known and not holds_token_ids(key)


def _settle_activation(given: dict[str, Any], kind: str) -> None:
    # Gemma's first configs said `gelu`, and readers took another function unless told anew.
    told = given.pop("hidden_activation", None)
    if told is None and kind == "gemma":
        told = "gelu_pytorch_tanh"
    name = told or given.pop("hidden_act", None)
    if isinstance(name, str):
        given["hidden_act"] = _ACTIVATIONS.get(name, name)


def _settle_window(given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Leave out the sizes of a window that is switched off."""
    if given.get("use_sliding_window", defaults.get("use_sliding_window")) is False:
        for key in ("sliding_window", "max_window_layers"):
            given.pop(key, None)
            defaults.pop(key, None)


def _derive_heads(said: dict[str, Statement], *, is_known: bool) -> None:
    """Fill in what readers take from other keys: where a key is null, or is known to be derived."""
    heads, width = (_number(said, key) for key in ("num_attention_heads", "hidden_size"))
    derived = {
        "num_key_value_heads": heads,
        "head_dim": width // heads if width and heads else None,
    }
    for key, value in derived.items():
        is_null = key in said and said[key].value is None
        if is_null:
            del said[key]
        if value is not None and (is_null or (is_known and key not in said)):
            said[key] = Statement(value, is_given=False)
        if key in said and said[key].value == _UNKNOWN:
            del said[key]


def _number(said: Mapping[str, Statement], key: str) -> int | None:
    value = said[key].value if key in said else None
    return value if type(value) is int else None


def _leaves(config: Config, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested mappings that count, by their names with dots between them."""
    for key, value in config.items():
        if not path or _counts(key):
            if isinstance(value, dict) and value:
                yield from _leaves(value, f"{path}{key}.")
            elif not isinstance(value, dict):
                yield f"{path}{key}", value


# Rotary settings.


def _rotary(config: Config, defaults: Config) -> dict[str, Statement]:
    """Return the rotary settings, by kind of layer where kinds have their own."""
    said: dict[str, Statement] = {}
    for suffix, settings in _rotary_sets(config, defaults):
        said |= {f"{key}{suffix}": value for key, value in _settle(settings, config, defaults)}
    return said


def _rotary_sets(config: Config, defaults: Config) -> Iterable[tuple[str, Config]]:
    parameters, scaling = (_mapping(config, key) for key in ("rope_parameters", "rope_scaling"))
    kinds = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    if kinds:
        return [(f" ({kind})", settings) for kind, settings in kinds.items()]
    local = _first(config, "rope_local_base_freq", "local_rope_theta")
    if local is None and not parameters:
        local = defaults.get("rope_local_base_freq")
    if local is None:
        return [("", {**scaling, **parameters})]
    full = {**scaling, **parameters}
    theta = config.get("global_rope_theta")
    if theta is not None:
        full = {"rope_theta": theta, **full}
    return [(" (full_attention)", full), (" (sliding_attention)", {"rope_theta": local})]


def _settle(settings: Config, config: Config, defaults: Config) -> Iterator[tuple[str, Statement]]:
    theta = _first(settings, "rope_theta")
    theta = (
        _first(config, "rope_theta", "rotary_emb_base", "rotary_base") if theta is None else theta
    )
    if theta is not None:
        yield "rope_theta", Statement(theta)
    elif "rope_theta" in defaults:
        yield "rope_theta", Statement(defaults["rope_theta"], is_given=False)
    part = _first(settings, "partial_rotary_factor")
    part = (
        _first(config, "partial_rotary_factor", "rotary_pct", "rope_pct") if part is None else part
    )
    if part is not None:
        yield "partial_rotary_factor", Statement(part)
    elif "partial_rotary_factor" in defaults:
        yield "partial_rotary_factor", Statement(defaults["partial_rotary_factor"], is_given=False)
    kind = settings.get("rope_type", settings.get("type"))
    kind = _ROPE_TYPES.get(kind, kind) if isinstance(kind, str | None) else kind
    if kind != "default" or config.get("model_type") not in _SCALED_BY_DEFAULT:
        yield "rope_type", Statement(kind, is_given=kind != "default")
    given = {
        key: value
        for key, value in settings.items()
        if key not in ("rope_theta", "partial_rotary_factor", "rope_type", "type", "finetuned")
        and value is not None
    }
    if kind == "default":
        given.pop("factor", None)
    elif isinstance(kind, str) and kind in _FROM_ORIGINAL:
        keys = ("original_max_position_embeddings", "max_position_embeddings")
        given.setdefault("original_max_position_embeddings", _first(config, *keys))
    for key, value in _leaves(given):
        if value is not None:
            yield f"rope_scaling.{key}", Statement(value)


def _mapping(config: Config, key: str) -> Config:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _first(config: Config, *keys: str) -> Any:  # noqa: ANN401
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _text(value: object) -> str:
    import json  # noqa: PLC0415 - only where there is a difference

    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004
