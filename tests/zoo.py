"""Checkpoints with realistic names and no data.

A checkpoint here is a header and a hole: the file has its full length, but takes no space. Names,
their order and the configs follow models as they are published; dimensions are small.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oxmerge.planning.planner import build_plan
from oxmerge.schema import DTYPE_SIZES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from oxmerge.planning.accounting import ModelAccount, Share
    from oxmerge.planning.plans import Plan
    from oxmerge.recipe.recipe import Recipe

Table = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Specimen:
    """A model: its config, and its tensors' types and shapes by name."""

    config: dict[str, Any]
    tensors: Table


# Writing and reading checkpoints.


def write_checkpoint(
    folder: Path, tensors: Table, config: Mapping[str, Any] | None = None, *, files: int = 1
) -> Path:
    """Write a checkpoint without data: `files` shards, an index if several, and a config."""
    folder.mkdir(parents=True)
    rows = list(tensors.items())
    size = -(-len(rows) // files)
    shards = [dict(rows[start : start + size]) for start in range(0, len(rows), size)] or [{}]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    if len(shards) > 1:
        where = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_file(path: Path, tensors: Table) -> None:
    """Write a safetensors file whose data is a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + _bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _bytes(dtype: str, shape: Iterable[int]) -> int:
    size = DTYPE_SIZES[dtype]
    for length in shape:
        size *= length
    return size


# The specimens.


def _layers(prefix: str, count: int, table: Mapping[str, tuple[int, ...]], dtype: str) -> Table:
    return {
        f"{prefix}.{layer}.{rest}": (dtype, shape)
        for layer in range(count)
        for rest, shape in table.items()
    }


def _all(dtype: str, table: Mapping[str, tuple[int, ...]]) -> Table:
    return {name: (dtype, shape) for name, shape in table.items()}


def gpt2(prefix: str = "", depth: int = 3) -> Specimen:
    width, vocabulary = 16, 40
    table = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.bias": (1, 1, 8, 8),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, 4 * width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (4 * width, width),
        "mlp.c_proj.bias": (width,),
    }
    tensors = _all(
        "F32", {f"{prefix}wte.weight": (vocabulary, width), f"{prefix}wpe.weight": (8, width)}
    )
    tensors |= _layers(f"{prefix}h", depth, table, "F32")
    tensors |= _all("F32", {f"{prefix}ln_f.weight": (width,), f"{prefix}ln_f.bias": (width,)})
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": depth,
        "n_head": 2,
        "n_embd": width,
        "n_positions": 8,
        "vocab_size": vocabulary,
    }
    return Specimen(config, tensors)


def bert(depth: int = 2) -> Specimen:
    width = 16
    attention = {
        f"attention.self.{part}.{kind}": (width, width) if kind == "weight" else (width,)
        for part in ("query", "key", "value")
        for kind in ("weight", "bias")
    }
    table = attention | {
        "attention.output.dense.weight": (width, width),
        "attention.output.dense.bias": (width,),
        "attention.output.LayerNorm.weight": (width,),
        "attention.output.LayerNorm.bias": (width,),
        "intermediate.dense.weight": (4 * width, width),
        "intermediate.dense.bias": (4 * width,),
        "output.dense.weight": (width, 4 * width),
        "output.dense.bias": (width,),
        "output.LayerNorm.weight": (width,),
        "output.LayerNorm.bias": (width,),
    }
    tensors: Table = {"bert.embeddings.position_ids": ("I64", (1, 8))}
    tensors |= _all(
        "F32",
        {
            "bert.embeddings.word_embeddings.weight": (40, width),
            "bert.embeddings.position_embeddings.weight": (8, width),
            "bert.embeddings.token_type_embeddings.weight": (2, width),
            "bert.embeddings.LayerNorm.weight": (width,),
            "bert.embeddings.LayerNorm.bias": (width,),
        },
    )
    tensors |= _layers("bert.encoder.layer", depth, table, "F32")
    tensors |= _all(
        "F32",
        {
            "bert.pooler.dense.weight": (width, width),
            "bert.pooler.dense.bias": (width,),
            "cls.predictions.bias": (40,),
            "cls.predictions.transform.dense.weight": (width, width),
            "cls.predictions.transform.dense.bias": (width,),
            "cls.predictions.transform.LayerNorm.weight": (width,),
            "cls.predictions.transform.LayerNorm.bias": (width,),
            "cls.seq_relationship.weight": (2, width),
            "cls.seq_relationship.bias": (2,),
        },
    )
    config = {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "hidden_size": width,
        "vocab_size": 40,
        "type_vocab_size": 2,
    }
    return Specimen(config, tensors)


def t5(encoder: int = 2, decoder: int = 3) -> Specimen:
    width = 16

    def attention(place: str) -> dict[str, tuple[int, ...]]:
        return {f"{place}.{part}.weight": (width, width) for part in "qkvo"}

    def feed_forward(place: str) -> dict[str, tuple[int, ...]]:
        return {
            f"{place}.DenseReluDense.wi.weight": (4 * width, width),
            f"{place}.DenseReluDense.wo.weight": (width, 4 * width),
            f"{place}.layer_norm.weight": (width,),
        }

    norm = {"layer.0.layer_norm.weight": (width,)}
    encoder_table = attention("layer.0.SelfAttention") | norm | feed_forward("layer.1")
    cross = attention("layer.1.EncDecAttention") | {"layer.1.layer_norm.weight": (width,)}
    decoder_table = attention("layer.0.SelfAttention") | norm | cross | feed_forward("layer.2")
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors = _all("F32", {"shared.weight": (40, width)})
    tensors |= _layers("encoder.block", encoder, encoder_table, "F32")
    tensors |= _all("F32", {f"encoder.{bias}": (8, 2), "encoder.final_layer_norm.weight": (width,)})
    tensors |= _layers("decoder.block", decoder, decoder_table, "F32")
    tensors |= _all("F32", {f"decoder.{bias}": (8, 2), "decoder.final_layer_norm.weight": (width,)})
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "num_layers": encoder,
        "num_decoder_layers": decoder,
        "d_model": width,
        "num_heads": 2,
        "vocab_size": 40,
        "tie_word_embeddings": True,
    }
    return Specimen(config, tensors)


def _llama_attention(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (width // 2, width),
        "self_attn.v_proj.weight": (width // 2, width),
        "self_attn.o_proj.weight": (width, width),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }


def _llama_mlp(width: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }


def llama(
    depth: int = 4,
    *,
    width: int = 16,
    vocabulary: int = 40,
    dtype: str = "BF16",
    tied: bool = False,
) -> Specimen:
    tensors = _all(dtype, {"model.embed_tokens.weight": (vocabulary, width)})
    table = _llama_attention(width) | _llama_mlp(width, 2 * width)
    tensors |= _layers("model.layers", depth, table, dtype)
    tensors |= _all(dtype, {"model.norm.weight": (width,)})
    if not tied:
        tensors |= _all(dtype, {"lm_head.weight": (vocabulary, width)})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    return Specimen(config, tensors)


def mixtral(depth: int = 2, experts: int = 4) -> Specimen:
    width, inner = 16, 32
    table = _llama_attention(width) | {"block_sparse_moe.gate.weight": (experts, width)}
    for expert in range(experts):
        table |= {
            f"block_sparse_moe.experts.{expert}.w1.weight": (inner, width),
            f"block_sparse_moe.experts.{expert}.w2.weight": (width, inner),
            f"block_sparse_moe.experts.{expert}.w3.weight": (inner, width),
        }
    tensors = _all("BF16", {"model.embed_tokens.weight": (40, width)})
    tensors |= _layers("model.layers", depth, table, "BF16")
    tensors |= _all("BF16", {"model.norm.weight": (width,), "lm_head.weight": (40, width)})
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": depth,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "hidden_size": width,
        "vocab_size": 40,
    }
    return Specimen(config, tensors)


def deepseek(depth: int = 3, dense: int = 1, experts: int = 3) -> Specimen:
    """A DeepSeek-V3: dense layers, then layers of experts, then one that predicts further."""
    width = 16
    attention = {
        "self_attn.q_a_proj.weight": (8, width),
        "self_attn.q_a_layernorm.weight": (8,),
        "self_attn.q_b_proj.weight": (width, 8),
        "self_attn.kv_a_proj_with_mqa.weight": (12, width),
        "self_attn.kv_a_layernorm.weight": (8,),
        "self_attn.kv_b_proj.weight": (24, 8),
        "self_attn.o_proj.weight": (width, width),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    sparse = attention | {
        "mlp.gate.weight": (experts, width),
        "mlp.gate.e_score_correction_bias": (experts,),
    }
    for expert in (*map(str, range(experts)), "shared"):
        place = "mlp.shared_experts" if expert == "shared" else f"mlp.experts.{expert}"
        sparse |= {
            f"{place}.gate_proj.weight": (8, width),
            f"{place}.up_proj.weight": (8, width),
            f"{place}.down_proj.weight": (width, 8),
        }
    predicting = sparse | {
        "embed_tokens.weight": (40, width),
        "enorm.weight": (width,),
        "hnorm.weight": (width,),
        "eh_proj.weight": (width, 2 * width),
        "shared_head.norm.weight": (width,),
        "shared_head.head.weight": (40, width),
    }
    tensors = _all("BF16", {"model.embed_tokens.weight": (40, width)})
    for layer in range(depth + 1):
        table = attention | _llama_mlp(width, 32) if layer < dense else sparse
        table = predicting if layer == depth else table
        tensors |= _all(
            "BF16", {f"model.layers.{layer}.{rest}": row for rest, row in table.items()}
        )
    tensors |= _all("BF16", {"model.norm.weight": (width,), "lm_head.weight": (40, width)})
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": depth,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "n_routed_experts": experts,
        "hidden_size": width,
        "vocab_size": 40,
    }
    return Specimen(config, tensors)


def qwen2_vl(vision: int = 2, text: int = 3) -> Specimen:
    width = 16
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (32, width),
        "mlp.fc1.bias": (32,),
        "mlp.fc2.weight": (width, 32),
        "mlp.fc2.bias": (width,),
    }
    biases = {f"self_attn.{part}_proj.bias": (width,) for part in "qkv"}
    table = _llama_attention(width) | biases | _llama_mlp(width, 32)
    tensors = _all("BF16", {"model.embed_tokens.weight": (40, width)})
    tensors |= _layers("model.layers", text, table, "BF16")
    tensors |= _all("BF16", {"model.norm.weight": (width,), "lm_head.weight": (40, width)})
    tensors |= _all("BF16", {"visual.patch_embed.proj.weight": (width, 3, 2, 4, 4)})
    tensors |= _layers("visual.blocks", vision, block, "BF16")
    tensors |= _all(
        "BF16",
        {
            "visual.merger.ln_q.weight": (width,),
            "visual.merger.ln_q.bias": (width,),
            "visual.merger.mlp.0.weight": (4 * width, 4 * width),
            "visual.merger.mlp.0.bias": (4 * width,),
            "visual.merger.mlp.2.weight": (width, 4 * width),
            "visual.merger.mlp.2.bias": (width,),
        },
    )
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "num_hidden_layers": text,
        "max_window_layers": 2,
        "hidden_size": width,
        "vocab_size": 40,
        "vision_config": {"depth": vision, "embed_dim": width, "in_chans": 3, "patch_size": 4},
    }
    return Specimen(config, tensors)


def mamba(depth: int = 3) -> Specimen:
    width, inner = 16, 32
    table = {
        "mixer.A_log": (inner, 4),
        "mixer.D": (inner,),
        "mixer.conv1d.bias": (inner,),
        "mixer.conv1d.weight": (inner, 1, 4),
        "mixer.dt_proj.bias": (inner,),
        "mixer.dt_proj.weight": (inner, 2),
        "mixer.in_proj.weight": (2 * inner, width),
        "mixer.out_proj.weight": (width, inner),
        "mixer.x_proj.weight": (10, inner),
        "norm.weight": (width,),
    }
    tensors = _all("F32", {"backbone.embeddings.weight": (40, width)})
    tensors |= _layers("backbone.layers", depth, table, "F32")
    tensors |= _all("F32", {"backbone.norm_f.weight": (width,)})
    config = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "num_hidden_layers": depth,
        "n_layer": depth,
        "hidden_size": width,
        "vocab_size": 40,
        "tie_word_embeddings": True,
    }
    return Specimen(config, tensors)


ZOO: dict[str, Callable[[], Specimen]] = {
    "gpt2": gpt2,
    "gpt2_transformer": lambda: gpt2("transformer."),
    "bert": bert,
    "t5": t5,
    "llama": llama,
    "mixtral": mixtral,
    "deepseek": deepseek,
    "qwen2_vl": qwen2_vl,
    "mamba": mamba,
}


def write(folder: Path, specimen: Specimen, *, files: int = 1) -> Path:
    """Write a specimen as a checkpoint."""
    return write_checkpoint(folder, specimen.tensors, specimen.config, files=files)


# Plans of them.


def plan_in(folder: Path, recipe: Recipe, **options: Any) -> Plan:
    """Plan a merge from a working directory."""
    with contextlib.chdir(folder):
        return build_plan(recipe, **options)


def fates(account: ModelAccount) -> Iterator[tuple[str, Share]]:
    """Yield what became of a model's tensors, and which."""
    yield "merged", account.merged
    yield "copied", account.copied
    yield from ((f"dropped: {reason}", share) for reason, share in account.dropped.items())


def accounts(merge: Plan) -> str:
    """Return what became of every tensor, with runs of layers on one line."""
    lines = []
    for account in merge.accounting:
        lines.append(f"{account.model}: {account.total} tensors")
        for fate, share in fates(account):
            if share:
                lines += [f"  {fate} ({len(share)})", *map("    {}".format, share.names)]
    return "\n".join(lines)
