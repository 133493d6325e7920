"""Small checkpoints with data, written without the code under test."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
#: Shapes by name.
Shapes = Mapping[str, tuple[int, ...]]

_NAMES = {
    "bool": "BOOL", "uint8": "U8", "uint16": "U16", "int32": "I32", "int64": "I64",
    "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip
_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


def to_bf16(values: Array) -> Array:
    """Round float32 to the bits of bfloat16, to nearest even. No NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """Widen the bits of bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: Array, dtype: str | None = None) -> tuple[str, bytes, tuple[int, ...]]:
    """Return the safetensors dtype, the bytes and the shape of an array."""
    if dtype == "BF16":
        return "BF16", to_bf16(values).tobytes(), values.shape
    if dtype is not None:
        values = values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])
    return _NAMES[values.dtype.name], values.tobytes(), values.shape


def write_file(path: Path, tensors: Mapping[str, Array], dtype: str | None = None) -> Path:
    """Write a safetensors file; floats as `dtype`, if it is given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, end = [], 0
    for name, values in tensors.items():
        as_dtype = dtype if values.dtype.kind == "f" else None
        kind, data, shape = encode(values, as_dtype)
        start, end = end, end + len(data)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
        parts.append(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    return path


def write_model(
    folder: Path,
    tensors: Mapping[str, Array],
    dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model directory with one weight file and a config."""
    folder.mkdir(parents=True)
    write_file(folder / "model.safetensors", tensors, dtype)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    return folder


def write_sparse(path: Path, shapes: Shapes, dtype: str = "BF16") -> Path:
    """Write a safetensors file whose data is a hole: zeros that take no space."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def expert_shapes(layers: int, shape: tuple[int, int] = (32, 64)) -> dict[str, tuple[int, ...]]:
    """Return tensors of the layout of DeepSeek-V3, all of one small shape: 61 layers have 45,337.

    The first three layers are dense; each of the others has 256 experts.
    """
    attention = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    attention += ["q_a_layernorm", "kv_a_layernorm"]
    matrices = ("gate_proj", "up_proj", "down_proj")
    names = ["model.embed_tokens"]
    for layer in range(layers):
        parts = ["input_layernorm", "post_attention_layernorm"]
        parts += [f"self_attn.{part}" for part in attention]
        experts = [f"experts.{expert}." for expert in range(256)] + ["shared_experts."]
        parts += [
            f"mlp.{part}{name}" for part in ([""] if layer < 3 else experts) for name in matrices
        ]
        parts += [] if layer < 3 else ["mlp.gate"]
        names += [f"model.layers.{layer}.{part}" for part in parts]
    return {f"{name}.weight": shape for name in [*names, "model.norm", "lm_head"]}


def write_experts(folder: Path, layers: int, seed: int, *, shard: int = 8 << 20) -> Path:
    """Write a model of `expert_shapes` with an index, and random numbers in bf16."""
    folder.mkdir(parents=True)
    shapes = expert_shapes(layers)
    size = 2 * int(np.prod(next(iter(shapes.values()))))
    names, each = list(shapes), max(1, shard // size)
    count = -(-len(names) // each)
    generator = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    for number in range(count):
        file_name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = names[number * each : (number + 1) * each]
        values = generator.standard_normal((len(part), size // 2), np.float32) * np.float32(0.02)
        write_file(
            folder / file_name,
            {n: v.reshape(shapes[n]) for n, v in zip(part, values, strict=True)},
            "BF16",
        )
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": len(names) * size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "deepseek_v3", "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_arrays(shapes: Shapes, seed: int) -> Arrays:
    """Return float32 arrays as weights are: normal, of small scale."""
    generator = np.random.default_rng(seed)
    return {
        name: (generator.standard_normal(shape, np.float32) * np.float32(0.02))
        for name, shape in shapes.items()
    }


def tuned(base: Mapping[str, Array], seed: int, scale: float = 1e-4) -> Arrays:
    """Return a fine-tune of `base`: the same with a little noise."""
    generator = np.random.default_rng(seed)
    return {
        name: values + generator.standard_normal(values.shape, np.float32) * np.float32(scale)
        for name, values in base.items()
    }


def read_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Read a safetensors file: dtype, shape and bytes of each tensor."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = (entry["dtype"], tuple(entry["shape"]), data[start:end])
    return found


def write_recipe(
    path: Path,
    method: str,
    models: Sequence[Path | str],
    *,
    base: Path | str | None = None,
    each: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    shared: Mapping[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Write a recipe: the parameters of each model, or the same for all, and those of all."""
    per_model = [each] * len(models) if each is None or not isinstance(each, list) else each
    entries = []
    for model, parameters in zip(models, per_model, strict=True):
        entry: dict[str, Any] = {"model": str(model)}
        if parameters:
            entry["parameters"] = dict(parameters)
        entries.append(entry)
    recipe: dict[str, Any] = {"merge_method": method, "models": entries, **more}
    if base is not None:
        recipe["base_model"] = str(base)
    if shared:
        recipe["parameters"] = dict(shared)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def signed(manifest: str) -> str:
    """Return the text of a manifest with its own digest, whatever it says."""
    text = manifest.rpartition('"sha256": ')[0]
    return f'{text}"sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def evict(folder: Path) -> None:
    """Write the files of a folder to the disk, and drop them from the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def directory_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file under a directory, but the report of the run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "oxmerge_report.json"
    }
