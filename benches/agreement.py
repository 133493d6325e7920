"""Holds two merged models against each other: oxmerge's and mergekit's.

    python benches/agreement.py OURS THEIRS

prints a line of JSON: over a few tensors, the share of elements whose bits are equal, the share
more than two steps of bfloat16 apart, and the largest difference. It runs as a process of its
own, so that what it loads is given back.

mergekit rounds within its formulas; oxmerge rounds once. So bits differ now and then, by a step.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

TENSORS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.3.input_layernorm.weight",
    "model.norm.weight",
)
SIGN = 0x8000
STEPS = 2


def load(model: Path, name: str) -> NDArray[np.uint16]:
    """The bits of a bfloat16 tensor."""
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            entry: dict[str, Any] | None = json.loads(file.read(size)).get(name)
        if entry is None:
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is {entry['dtype']}, not BF16")
        begin, end = entry["data_offsets"]
        return np.fromfile(path, np.uint16, (end - begin) // 2, offset=8 + size + begin)
    raise SystemExit(f"{name} is in no shard")


def ordered(bits: NDArray[np.uint16]) -> NDArray[np.int32]:
    """Numbers that lie as the values do, one a step, both zeros at 0."""
    magnitude = (bits & (SIGN - 1)).astype(np.int32)
    return np.where(bits & SIGN, -magnitude, magnitude)


def values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def compare(ours: Path, theirs: Path) -> dict[str, float]:
    """Shares of equal and of distant elements, and the largest difference, over the tensors."""
    equal = beyond = total = 0
    largest = 0.0
    for name in TENSORS:
        a, b = load(ours, name), load(theirs, name)
        steps = np.abs(ordered(a) - ordered(b))
        equal += int((steps == 0).sum())
        beyond += int((steps > STEPS).sum())
        largest = max(largest, float(np.abs(values(a) - values(b)).max()))
        total += steps.size
    return {
        "elements": total,
        "equal": equal / total,
        "beyond_two_steps": beyond / total,
        "largest_difference": largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares two merged models.")
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(compare(arguments.ours, arguments.theirs)))


if __name__ == "__main__":
    main()
