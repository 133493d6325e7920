"""Makes Llama-shaped checkpoints for the bench: one base and two fine-tunes.

    python benches/checkpoints.py DIR [--size 1b|tiny|7b] [--step 0.002]

writes DIR/base, DIR/tune_a and DIR/tune_b: bfloat16, two shards a model (7b: three) with an index,
config.json and the files of a toy tokenizer.

The base is N(0, 0.02), its norms 1 + N(0, 0.02). A fine-tune is base + N(0, step), a step of 1e-4
unless given, rounded to bfloat16 to nearest even. A step of bfloat16 is about as long as a
difference of 1e-4 or longer, so many differences are exactly zero and many are equal, as in real
fine-tunes, which is what the methods that select have to cope with. Every element has its own draw:
no noise is used twice.
The same seed gives the same files whatever the number of threads.

The 7b models are sparse: real headers and holes instead of weights, so that they cost no disk.
They are for the memory row: what counts there are sizes, not values.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

MODELS = ("base", "tune_a", "tune_b")
SEED = 20250
BASE_STD = 0.02
TUNE_STD = 1e-4
CHUNK = 1 << 21  # elements that one task draws
ITEM = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class Shape:
    """What config.json says of a Llama, and how many shards it has."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    shards: int = 2
    sparse: bool = False


SHAPES = {
    "1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "tiny": Shape(256, 704, 4, 8, 2, 1000),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000, shards=3, sparse=True),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor's place: its number seeds it, its offset is counted from the file's first byte."""

    number: int
    name: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class Shard:
    """A file with its header ready and every tensor at its place."""

    name: str
    header: bytes
    tensors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        last = self.tensors[-1]
        return last.offset + last.elements * ITEM


def tensors(shape: Shape) -> list[Tensor]:
    """All tensors in the order of a state dict."""
    rows: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (shape.vocab, shape.hidden))
    ]
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        rows += [(prefix + name, dims) for name, dims in layer_tensors(shape)]
    rows.append(("model.norm.weight", (shape.hidden,)))
    rows.append(("lm_head.weight", (shape.vocab, shape.hidden)))
    return [Tensor(number, name, dims) for number, (name, dims) in enumerate(rows)]


def layer_tensors(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    hidden, ffn = shape.hidden, shape.ffn
    kv = hidden // shape.heads * shape.kv_heads
    return [
        ("self_attn.q_proj.weight", (hidden, hidden)),
        ("self_attn.k_proj.weight", (kv, hidden)),
        ("self_attn.v_proj.weight", (kv, hidden)),
        ("self_attn.o_proj.weight", (hidden, hidden)),
        ("mlp.gate_proj.weight", (ffn, hidden)),
        ("mlp.up_proj.weight", (ffn, hidden)),
        ("mlp.down_proj.weight", (hidden, ffn)),
        ("input_layernorm.weight", (hidden,)),
        ("post_attention_layernorm.weight", (hidden,)),
    ]


def shards(shape: Shape) -> list[Shard]:
    """Cuts the state dict into shards of like size; within one, names are sorted, as usual."""
    every = tensors(shape)
    limit = -(-sum(t.elements for t in every) // shape.shards)
    groups: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in every:
        if filled + tensor.elements // 2 > limit * len(groups):
            groups.append([])
        groups[-1].append(tensor)
        filled += tensor.elements
    return [
        lay_out(f"model-{i:05}-of-{len(groups):05}.safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]


def lay_out(file_name: str, group: list[Tensor]) -> Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(group, key=lambda t: t.name)
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.elements * ITEM
        header[tensor.name] = {
            "dtype": "BF16",
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = tuple(
        Tensor(t.number, t.name, t.shape, start + header[t.name]["data_offsets"][0])
        for t in ordered
    )
    return Shard(file_name, struct.pack("<Q", len(text)) + text, placed)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to nearest even. Overwrites `values`, which must be finite."""
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    bits += odd
    bits >>= 16
    return bits.astype(np.uint16)


def to_f32(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    bits = values.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def noise(count: int, std: float, *key: int) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence((SEED, *key))))
    values = generator.standard_normal(count, dtype=np.float32)
    values *= np.float32(std)
    return values


def draw(tensor: Tensor, begin: int, count: int, step: float) -> list[NDArray[np.uint16]]:
    """A run of elements of one tensor for every model, the base first."""
    values = noise(count, BASE_STD, 0, tensor.number, begin)
    if len(tensor.shape) == 1:
        values += np.float32(1)
    base = to_bf16(values)
    tunes = []
    for model in range(1, len(MODELS)):
        values = noise(count, step, model, tensor.number, begin)
        values += to_f32(base)
        tunes.append(to_bf16(values))
    return [base, *tunes]


def chunks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    for begin in range(0, tensor.elements, CHUNK):
        yield begin, min(CHUNK, tensor.elements - begin)


def write_shard(
    root: Path, shard: Shard, shape: Shape, pool: ThreadPoolExecutor, step: float
) -> None:
    """Writes one shard of every model."""
    files = [(root / model / shard.name).open("wb") for model in MODELS]

    def write_chunk(tensor: Tensor, begin: int, count: int) -> None:
        for file, values in zip(files, draw(tensor, begin, count, step), strict=True):
            os.pwrite(file.fileno(), values.tobytes(), tensor.offset + begin * ITEM)

    for file in files:
        file.write(shard.header)
        file.flush()
        file.truncate(shard.size)
    if not shape.sparse:
        runs = [(t, *run) for t in shard.tensors for run in chunks(t)]
        list(pool.map(lambda run: write_chunk(*run), runs))
    for file in files:
        os.fsync(file.fileno())
        file.close()


def config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def side_files(shape: Shape, parts: list[Shard]) -> dict[str, Any]:
    """The JSON files of a model: index, config and a toy tokenizer."""
    special = ["<unk>", "<s>", "</s>"]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = special + [f"w{i}" for i in range(len(special), shape.vocab)]
    return {
        "config.json": config(shape),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "model.safetensors.index.json": {
            "metadata": {"total_size": sum(t.elements * ITEM for p in parts for t in p.tensors)},
            "weight_map": {t.name: p.name for p in parts for t in p.tensors},
        },
        "special_tokens_map.json": names,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **names},
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [added_token(i, content) for i, content in enumerate(special)],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {word: i for i, word in enumerate(words)},
                "unk_token": "<unk>",
            },
        },
    }


def added_token(number: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}


def make(root: Path, size: str, step: float = TUNE_STD) -> None:
    """Makes the three models under `root`; the indexes come last and say that all is there."""
    shape = SHAPES[size]
    parts = shards(shape)
    for model in MODELS:
        (root / model).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for shard in parts:
            write_shard(root, shard, shape, pool, step)
    files = side_files(shape, parts)
    for model in MODELS:
        for name in sorted(files, key=lambda n: n.endswith("index.json")):
            (root / model / name).write_text(json.dumps(files[name], indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes checkpoints for the bench.")
    parser.add_argument("dir", type=Path)
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--step", type=float, default=TUNE_STD)
    arguments = parser.parse_args()
    make(arguments.dir, arguments.size, arguments.step)


if __name__ == "__main__":
    main()
