"""What torch and transformers make of a merge; run as a program, so that tests stay small.

Arguments: a directory with `first`, `second` and `merged`, and the two coefficients. Writes
`reference.safetensors` there, and prints what was found as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import oxmerge  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoTokenizer  # noqa: E402

SENTENCES = [
    "A merge of model checkpoints is arithmetic on files.",
    "The ox pulls the plough; the plough turns the soil, slowly and all day long.",
]


def reference(folder: Path, first: float, second: float) -> dict[str, torch.Tensor]:
    """Merge in float32 with separate multiplies and adds, and round once."""
    a, b = (load_file(folder / name / "model.safetensors") for name in ("first", "second"))
    merged = {}
    for name, x in a.items():
        if not x.is_floating_point():
            assert torch.equal(x, b[name])
            merged[name] = x
            continue
        # As 0-dim tensors, the coefficients are float32 and stay so.
        scaled = x.float() * torch.tensor(first, dtype=torch.float32)
        other = b[name].float() * torch.tensor(second, dtype=torch.float32)
        merged[name] = (scaled + other).to(x.dtype)
    return merged


def embeddings(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    """Return a mean of the last hidden states for each sentence."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model.float().eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def main() -> None:
    folder, first, second = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    merged = reference(folder, first, second)
    save_file(merged, folder / "reference.safetensors")
    loaded, notes = AutoModel.from_pretrained(folder / "merged", output_loading_info=True)
    same_class = type(loaded)(AutoConfig.from_pretrained(folder / "first"))
    weights = {name: value for name, value in merged.items() if name in same_class.state_dict()}
    lacking, _ = same_class.load_state_dict(weights, strict=False)
    ours, theirs = (embeddings(model, folder / "merged") for model in (loaded, same_class))
    lazy = oxmerge.lazy(folder / "r.yml", framework="pt")
    straight = type(loaded)(AutoConfig.from_pretrained(folder / "first"))
    known = straight.state_dict()
    wanted = {name: lazy[name] for name in lazy if name in known}
    absent, _ = straight.load_state_dict(wanted, strict=False, assign=True)
    from_recipe = embeddings(straight, folder / "first")
    original = embeddings(AutoModel.from_pretrained(folder / "first"), folder / "first")
    found = {
        "lacking": sorted({*lacking, *absent, *notes["missing_keys"]}),
        "mismatched": sorted(map(str, notes["mismatched_keys"])),
        "shape": list(ours.shape),
        "difference": float((ours - theirs).abs().max()),
        "from_recipe": float((from_recipe - theirs).abs().max()),
        "change": float((ours - original).abs().max()),
        "finite": bool(ours.isfinite().all()),
    }
    sys.stdout.write(json.dumps(found) + "\n")


main()
