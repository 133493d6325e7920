"""Two small checkpoints and a recipe, made on the spot, to try a merge without a download.

The checkpoints have the shapes of Llama models, are sharded, and come with what a model directory
has: index, config, generation config, tokenizer. The second is the first plus a little noise, as
a fine-tuned model is. For the sizes that would take minutes to fill, the files are sparse: all
zeros, no space on disk, but read and merged like any others.

`oxmerge bench` makes its models here too: more fine-tunes, nearer and farther, and checkpoints of
the layout of DeepSeek-V3, with its tens of thousands of tensors.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import IO, TYPE_CHECKING, Any

from oxmerge.errors import OutputError
from oxmerge.output.claims import named
from oxmerge.signals import put_off
from oxmerge.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

RECIPE_NAME = "recipe.yml"
MODEL_NAMES = ("demo-base", "demo-tuned")
#: Of the demo's adapter, and the modules that it is for; all linear ones.
RANK = 8
ADAPTED = ("q_proj", "v_proj")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CHUNK = 1 << 20
_BASE_SPREAD = 0.02
TUNING_SPREAD = 0.001
_ALIGNMENT = 8
#: What a demo's folder may hold: its models, its recipe, and what it merged.
_OURS = re.compile(
    r"demo-base|demo-tuned(-\d+)?|demo-adapter|recipe\.yml|merged|swept|hub\.yml|hub-cache"
)
_RECIPE = """\
# More of the fine-tuned model from the first layer to the last.
merge_method: slerp
base_model: {base}
models:
  - model: {base}
  - model: {tuned}
parameters:
  t: [0.2, 0.8]
dtype: bfloat16
"""


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    is_norm: bool = False

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that make a Llama model's shapes."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool
    shards: int
    filled: bool = False

    def tensors(self) -> Iterator[_Tensor]:
        """Yield the tensors of the model, in the order of its computation."""
        hidden, wide = self.hidden, self.intermediate
        keys = hidden // self.heads * self.key_heads
        yield _Tensor("model.embed_tokens.weight", (self.vocabulary, hidden))
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            yield _Tensor(f"{layer}.input_layernorm.weight", (hidden,), is_norm=True)
            yield _Tensor(f"{layer}.self_attn.q_proj.weight", (hidden, hidden))
            yield _Tensor(f"{layer}.self_attn.k_proj.weight", (keys, hidden))
            yield _Tensor(f"{layer}.self_attn.v_proj.weight", (keys, hidden))
            yield _Tensor(f"{layer}.self_attn.o_proj.weight", (hidden, hidden))
            yield _Tensor(f"{layer}.post_attention_layernorm.weight", (hidden,), is_norm=True)
            yield from _mlp(f"{layer}.mlp", hidden, wide)
        yield _Tensor("model.norm.weight", (hidden,), is_norm=True)
        if not self.tied:
            yield _Tensor("lm_head.weight", (self.vocabulary, hidden))

    def config(self) -> dict[str, Any]:
        """Return what is this kind's own in `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "head_dim": self.hidden // self.heads,
            "intermediate_size": self.intermediate,
            "mlp_bias": False,
            "model_type": "llama",
            "num_key_value_heads": self.key_heads,
            "tie_word_embeddings": self.tied,
        }


@dataclass(frozen=True, slots=True)
class Experts:
    """The numbers that make the shapes of a model with the layout of DeepSeek-V3.

    Queries, keys and values go through narrow matrices; all layers but the first few have a router
    and many small experts, three matrices each.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    vocabulary: int
    shards: int
    experts: int
    expert_intermediate: int
    query_rank: int
    key_rank: int
    rotary: int
    plain: int
    dense: int = 3
    filled: bool = False

    def tensors(self) -> Iterator[_Tensor]:
        """Yield the tensors of the model, in the order of its computation."""
        hidden, heads, keys = self.hidden, self.heads, self.key_rank
        yield _Tensor("model.embed_tokens.weight", (self.vocabulary, hidden))
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            attention = f"{layer}.self_attn"
            yield _Tensor(f"{layer}.input_layernorm.weight", (hidden,), is_norm=True)
            yield _Tensor(f"{attention}.q_a_proj.weight", (self.query_rank, hidden))
            yield _Tensor(f"{attention}.q_a_layernorm.weight", (self.query_rank,), is_norm=True)
            wide = heads * (self.plain + self.rotary)
            yield _Tensor(f"{attention}.q_b_proj.weight", (wide, self.query_rank))
            yield _Tensor(f"{attention}.kv_a_proj_with_mqa.weight", (keys + self.rotary, hidden))
            yield _Tensor(f"{attention}.kv_a_layernorm.weight", (keys,), is_norm=True)
            yield _Tensor(f"{attention}.kv_b_proj.weight", (2 * heads * self.plain, keys))
            yield _Tensor(f"{attention}.o_proj.weight", (hidden, heads * self.plain))
            yield _Tensor(f"{layer}.post_attention_layernorm.weight", (hidden,), is_norm=True)
            if number < self.dense:
                yield from _mlp(f"{layer}.mlp", hidden, self.intermediate)
                continue
            yield _Tensor(f"{layer}.mlp.gate.weight", (self.experts, hidden))
            yield _Tensor(f"{layer}.mlp.gate.e_score_correction_bias", (self.experts,))
            for expert in range(self.experts):
                yield from _mlp(f"{layer}.mlp.experts.{expert}", hidden, self.expert_intermediate)
            yield from _mlp(f"{layer}.mlp.shared_experts", hidden, self.expert_intermediate)
        yield _Tensor("model.norm.weight", (hidden,), is_norm=True)
        yield _Tensor("lm_head.weight", (self.vocabulary, hidden))

    def config(self) -> dict[str, Any]:
        """Return what is this kind's own in `config.json`."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "first_k_dense_replace": self.dense,
            "intermediate_size": self.intermediate,
            "kv_lora_rank": self.key_rank,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": self.expert_intermediate,
            "moe_layer_freq": 1,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "num_key_value_heads": self.heads,
            "q_lora_rank": self.query_rank,
            "qk_nope_head_dim": self.plain,
            "qk_rope_head_dim": self.rotary,
            "tie_word_embeddings": False,
            "v_head_dim": self.plain,
        }


def _mlp(name: str, hidden: int, wide: int) -> Iterator[_Tensor]:
    """Yield the three matrices of a feed-forward block."""
    yield _Tensor(f"{name}.gate_proj.weight", (wide, hidden))
    yield _Tensor(f"{name}.up_proj.weight", (wide, hidden))
    yield _Tensor(f"{name}.down_proj.weight", (hidden, wide))


_NARROW_EXPERTS = Experts(
    16, 61, 32, 2, 512, 8, 256, 8, query_rank=8, key_rank=8, rotary=4, plain=8, filled=True
)
SIZES: dict[str, Shape | Experts] = {
    "tiny": Shape(512, 8, 1408, 8, 2, 4096, tied=False, shards=2, filled=True),
    "1b": Shape(2048, 16, 8192, 32, 8, 128256, tied=True, shards=4, filled=True),
    "7b": Shape(4096, 32, 11008, 32, 32, 32000, tied=False, shards=3),
    "70b": Shape(8192, 80, 28672, 64, 8, 128256, tied=False, shards=30),
    # For the bench: many small tensors, twice as many, and the real sizes.
    "experts": _NARROW_EXPERTS,
    "experts-twice": replace(_NARROW_EXPERTS, layers=122),
    "experts-671b": Experts(
        *(7168, 61, 18432, 128, 129280, 163, 256, 2048),
        query_rank=1536,
        key_rank=512,
        rotary=64,
        plain=128,
    ),
}
"""The sizes there are."""


@dataclass(frozen=True, slots=True)
class Demo:
    """What `make_demo` made.

    Attributes
    ----------
    recipe
        The recipe file.
    models
        The model directories: the base, then its fine-tunes.
    model_bytes
        Bytes of weights in each.
    sparse
        Whether the weights are zeros that take no space.
    """

    recipe: Path
    models: tuple[Path, ...]
    model_bytes: int
    sparse: bool


def make_demo(
    directory: str | os.PathLike[str],
    size: str = "tiny",
    seed: int = 0,
    spreads: Sequence[float] = (TUNING_SPREAD,),
) -> Demo:
    """Write a base, its fine-tunes and a recipe into `directory`.

    Parameters
    ----------
    directory
        New, empty, or of an earlier demo and nothing else; that one's files are replaced.
    size
        One of `SIZES`.
    seed
        Of the random weights; the same seed gives the same files.
    spreads
        For each fine-tune, the standard deviation of its difference from the base. The recipe
        merges the first, if there is one.

    Raises
    ------
    OutputError
        If the directory holds something else, or a recipe that is not the demo's.
    """
    folder = named(directory)
    shape = SIZES[size]
    _claim(folder)
    tensors = list(shape.tensors())
    size_of_each = model_bytes(size)
    tuned = len(spreads)
    filled = shape.filled and _has_space(folder, (2 + tuned) * size_of_each)
    names = (*MODEL_NAMES, *(f"{MODEL_NAMES[1]}-{number}" for number in range(2, tuned + 1)))
    models = tuple(folder / name for name in names[: 1 + tuned])
    recipe = folder / RECIPE_NAME
    # First: it is what a folder is known by as a demo's, also where the rest was interrupted.
    recipe.write_text(_recipe_text(), encoding="utf-8")
    try:
        for model in models:
            model.mkdir(exist_ok=True)
            _write_side_files(model, shape)
        _write_weights(models, _split(tensors, shape.shards), seed if filled else None, spreads)
    except BaseException:
        with put_off():
            for model in models:
                _remove_weights(model)
        raise
    return Demo(recipe, models, size_of_each, sparse=not filled)


def make_adapter(
    demo: Demo,
    size: str = "tiny",
    seed: int = 0,
    rank: int = RANK,
    modules: Sequence[str] = ADAPTED,
) -> Path:
    """Write a LoRA for the base of a demo, as PEFT does, and return its folder.

    Parameters
    ----------
    demo
        What `make_demo` made.
    size
        Its size.
    seed
        Of the random factors.
    rank
        Of the factors.
    modules
        Which modules it is for, by their last names.
    """
    import numpy as np  # noqa: PLC0415 - heavy

    random = np.random.Generator(np.random.SFC64([seed, rank]))
    factors = []
    for tensor in SIZES[size].tensors():
        module, _, _ = tensor.name.rpartition(".")
        if module.endswith(tuple(modules)):
            rows, columns = tensor.shape
            for name, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                factors.append(_Tensor(f"base_model.model.{module}.lora_{name}.weight", shape))
    folder = demo.recipe.parent / "demo-adapter"
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": [*modules]}
    _write_json(folder / "adapter_config.json", config)
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(_header(factors))
        for factor in factors:
            drawn = random.standard_normal(factor.elements, dtype=np.float32)
            file.write(_bfloat16(drawn * np.float32(_BASE_SPREAD)).data)
    return folder


def model_bytes(size: str) -> int:
    """Return the bytes of weights that a model of a size has."""
    return sum(2 * tensor.elements for tensor in SIZES[size].tensors())


def describe(demo: Demo) -> str:
    """Return a phrase on what was made."""
    kind = "sparse files of zeros, " if demo.sparse else ""
    return f"made two checkpoints of {format_size(demo.model_bytes)} each ({kind}bfloat16)"


def _claim(folder: Path) -> None:
    """Make sure that nothing in `folder` is anyone's but the demo's, and remove its old weights."""
    if folder.exists() and not folder.is_dir():
        raise _not_ours("it is a file", folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(os.listdir(folder))
    for name in names:
        if not _OURS.fullmatch(name):
            raise _not_ours(f"`{name}` in it is not the demo's", folder)
    if names and not _has_our_recipe(folder):
        raise _not_ours(f"its `{RECIPE_NAME}` is not the demo's", folder)
    for name in names:
        if name.startswith("demo-"):
            # Files of another size would be taken for part of the model.
            _remove_weights(folder / name)


def _remove_weights(model: Path) -> None:
    for file in model.glob("model*.safetensors*"):
        file.unlink()


def _has_our_recipe(folder: Path) -> bool:
    try:
        return (folder / RECIPE_NAME).read_bytes() == _recipe_text().encode()
    except FileNotFoundError:
        return False


def _recipe_text() -> str:
    return _RECIPE.format(base=MODEL_NAMES[0], tuned=MODEL_NAMES[1])


def _not_ours(reason: str, folder: Path) -> OutputError:
    return OutputError(
        f"{reason}, and would be in the way of the demo",
        file=str(folder),
        advice="name a new directory with `--directory`",
    )


def _has_space(folder: Path, needed: int) -> bool:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize > needed


def _split(tensors: Sequence[_Tensor], count: int) -> list[list[_Tensor]]:
    """Cut into shards of about the same size, in order."""
    total = sum(tensor.elements for tensor in tensors)
    shards: list[list[_Tensor]] = [[] for _ in range(count)]
    before = 0
    for tensor in tensors:
        shards[before * count // total].append(tensor)
        before += tensor.elements
    return [shard for shard in shards if shard]


def _write_weights(
    models: Sequence[Path],
    shards: Sequence[Sequence[_Tensor]],
    seed: int | None,
    spreads: Sequence[float],
) -> None:
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - not for --help

    names = [f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
    firsts = list(accumulate((len(shard) for shard in shards), initial=0))
    stopped = threading.Event()
    # Every tensor has a seed of its own, so the order in which they are written is free.
    with ThreadPoolExecutor() as pool:
        try:
            jobs = [
                pool.submit(
                    _write_shard,
                    [model / name for model in models],
                    shard,
                    None if seed is None else (seed, first),
                    spreads,
                    stopped,
                )
                for name, shard, first in zip(names, shards, firsts, strict=False)
            ]
            for job in jobs:
                job.result()
        except RuntimeError as error:  # that is how Python says that there is no thread to be had
            stopped.set()
            raise OSError(errno.EAGAIN, str(error)) from error
        except BaseException:
            # Leaving the pool waits for its threads, and Ctrl-C does not reach them.
            stopped.set()
            raise
    weight_map = {
        tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
    }
    total = sum(2 * tensor.elements for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for model in models:
        _write_json(model / "model.safetensors.index.json", index)


def _write_shard(
    paths: Sequence[Path],
    shard: Sequence[_Tensor],
    seed: tuple[int, int] | None,
    spreads: Sequence[float],
    stopped: threading.Event,
) -> None:
    """Write one shard of every model; zeros without a seed, which has the first one's number."""
    header = _header(shard)
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for file in files:
            file.write(header)
        if seed is None:
            size = len(header) + sum(2 * tensor.elements for tensor in shard)
            for file in files:
                file.truncate(size)
            return
        for number, tensor in enumerate(shard, start=seed[1]):
            _write_tensor(files, tensor, (seed[0], number), spreads, stopped)


def _header(shard: Iterable[_Tensor]) -> bytes:
    """Return a safetensors header: length, JSON, spaces up to a multiple of eight."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard:
        end = start + 2 * tensor.elements
        entries[tensor.name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(
    files: Sequence[IO[bytes]],
    tensor: _Tensor,
    seed: tuple[int, int],
    spreads: Sequence[float],
    stopped: threading.Event,
) -> None:
    """Write a tensor of every model, a piece at a time, until `stopped`."""
    import numpy as np  # noqa: PLC0415 - heavy

    random = np.random.Generator(np.random.SFC64(list(seed)))
    for start in range(0, tensor.elements, _CHUNK):
        if stopped.is_set():
            return
        count = min(_CHUNK, tensor.elements - start)
        weights = draw_weights(random, count, spreads, is_norm=tensor.is_norm)
        for file, bits in zip(files, weights, strict=True):
            file.write(bits.data)


def draw_weights(
    random: np.random.Generator, count: int, spreads: Sequence[float], *, is_norm: bool = False
) -> list[NDArray[np.uint16]]:
    """Draw `count` weights of a base and of its fine-tunes, as the bits of bfloat16."""
    import numpy as np  # noqa: PLC0415 - heavy

    values = random.standard_normal(count, dtype=np.float32)
    values *= np.float32(_BASE_SPREAD)
    if is_norm:
        values += np.float32(1)
    weights = [_bfloat16(values)]
    for spread in spreads:
        noise = random.standard_normal(count, dtype=np.float32)
        noise *= np.float32(spread)
        noise += values
        weights.append(_bfloat16(noise))
    return weights


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Finite values, rounded to nearest even, as the bits of bfloat16."""
    import numpy as np  # noqa: PLC0415 - heavy

    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    odd += bits
    odd += np.uint32(0x7FFF)
    odd >>= np.uint32(16)
    return odd.astype(np.uint16)


def _write_side_files(model: Path, shape: Shape | Experts) -> None:
    _write_json(model / "config.json", _config(shape))
    generation = {"_from_model_config": True, "bos_token_id": 256, "eos_token_id": 257}
    _write_json(model / "generation_config.json", generation)
    _write_json(model / "tokenizer.json", _tokenizer())
    _write_json(
        model / "tokenizer_config.json",
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 2048,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def _config(shape: Shape | Experts) -> dict[str, Any]:
    config = {
        "bos_token_id": 256,
        "eos_token_id": 257,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "max_position_embeddings": 2048,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }
    return dict(sorted((config | shape.config()).items()))


def _tokenizer() -> dict[str, Any]:
    """Return a tokenizer of single bytes, with a beginning and an end."""
    vocabulary = {letter: number for number, letter in enumerate(_byte_letters())}
    special = {"<s>": 256, "</s>": 257}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": text, **flags, "special": True}
            for text, number in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {"type": "BPE", "vocab": {**vocabulary, **special}, "merges": []},
    }


def _byte_letters() -> Iterator[str]:
    """Yield the letter that byte-level tokenizers write for each byte.

    A byte that is a visible Latin-1 character stands for itself; the others, in order, take the
    code points from 256 on.
    """
    stand_in = 0x100
    for byte in range(0x100):
        letter = chr(byte)
        if letter.isprintable() and not letter.isspace():
            yield letter
        else:
            yield chr(stand_in)
            stand_in += 1


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
