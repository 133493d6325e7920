"""Outputs of every way to make one: verified, computed again, and found out when changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from oxmerge.cli import main
from oxmerge.demo_hub import HubServer, Model, serving
from oxmerge.models import references
from writers import random_arrays, signed, tuned, write_file, write_model, write_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = {
    "visual.blocks.0.mlp.fc1.weight": (16, 8),
    "visual.blocks.1.mlp.fc1.weight": (16, 8),
    "model.embed_tokens.weight": (20, 12),
    **{f"model.layers.{n}.mlp.up_proj.weight": (24, 12) for n in range(3)},
    "model.norm.weight": (12,),
}
CONFIG = {"model_type": "qwen2_vl", "num_hidden_layers": 3, "vision_config": {"depth": 2}}
HALF = {"weight": 0.5}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a base, two fine-tunes of it and an adapter."""
    base = random_arrays(SHAPES, 0)
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, tuned(base, seed) if seed else base, "BF16", config=CONFIG)
        order = np.random.default_rng(seed).permutation(20)
        vocabulary = {f"t{row}": int(order[row]) for row in range(20)}
        model = {"type": "WordLevel", "unk_token": "t0", "vocab": vocabulary}
        text = json.dumps({"added_tokens": [], "model": model})
        (tmp_path / name / "tokenizer.json").write_text(text)
    low = random_arrays(
        {
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": (2, 12),
            "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": (24, 2),
        },
        7,
    )
    (tmp_path / "lora").mkdir()
    write_file(tmp_path / "lora" / "adapter_model.safetensors", low)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(recipe: Path | str, **options: Any) -> str:
    oxmerge.merge(recipe, "out", memory="4GiB", threads=2, **options)
    return "out"


def recipe(folder: Path, method: str, models: list[str], **more: Any) -> Path:
    return write_recipe(folder / "r.yml", method, models, **more)


def by_modules(folder: Path) -> str:
    models = [{"model": name} for name in "ab"]
    parts = {"text_decoder": {"models": models}, "vision_encoder": {"models": models[::-1]}}
    text = {
        "merge_method": "slerp", "base_model": "a", "modules": parts, "parameters": {"t": 0.25}
    }  # fmt: skip
    (folder / "r.yml").write_text(json.dumps(text))
    return merge(folder / "r.yml")


def by_sweep(folder: Path) -> str:
    swept = recipe(folder, "linear", ["a", "b"], each=HALF)
    oxmerge.sweep(swept, "w{weight}", {"models[a].parameters.weight": [0.25, 0.75]}, seed=3)
    return "w0.75"


def with_adapter(folder: Path) -> str:
    both = ["base+lora=0.5", "b"]
    return merge(recipe(folder, "ties", both, base="base", each={**HALF, "density": 0.5}))


def by_fuse(folder: Path) -> str:
    oxmerge.fuse("base", "out", ["lora"])
    return "out"


def by_token(folder: Path) -> str:
    tokenizer = {"source": "base", "pad_to_multiple_of": 32}
    each = {**HALF, "density": 0.5}
    return merge(
        recipe(folder, "dare_ties", ["a", "b"], base="base", each=each, tokenizer=tokenizer)
    )


def by_union(folder: Path) -> str:
    path = folder / "b" / "tokenizer.json"
    path.write_text(path.read_text().replace('"t3"', '"another"'))
    return merge(recipe(folder, "linear", ["a", "b"], each=HALF, tokenizer={"source": "union"}))


def in_python(folder: Path) -> str:
    made = recipe(folder, "written_methods:sharpened", ["a", "b"], base="base", each=HALF)
    return merge(made, allow_methods=["written_methods"])


def in_arrays(folder: Path) -> str:
    made = recipe(folder, "written_methods:by_row", ["a", "b"], base="base", each=HALF)
    return merge(made, allow_methods=["written_methods"])


def in_parts(folder: Path) -> str:
    made = recipe(folder, "metagpt", ["a", "b"], base="base")
    for part in (1, 2):
        with_first = {"shard_size": "1KB", "part": (part, 2), "wait": 0}
        try:
            merge(made, **with_first)
        except oxmerge.OutputError:
            continue
    merge(made, shard_size="1KB", part=(1, 2), finish=True)
    return "out"


def with_extensions(folder: Path) -> str:
    asked = {"keep": ["visual.*"], "layer_scale": {"from": 0.5, "to": 1.0}}
    return merge(
        recipe(folder, "task_arithmetic", ["a", "b"], base="base", each=HALF, oxmerge=asked)
    )


def in_stages(folder: Path) -> str:
    """Of which the last one reads the tokenizer of the first."""
    first = recipe(folder, "linear", ["a", "b"], each=HALF, tokenizer={"source": "union"})
    text = first.read_text()
    last = recipe(folder, "linear", ["first", "b"], each=HALF, tokenizer={"source": "union"})
    last.write_text(f"name: first\n{text}---\n{last.read_text()}")
    return merge(last)


WAYS = [
    by_modules, by_sweep, with_adapter, by_fuse, by_token, by_union, in_python, in_arrays,
    in_parts, with_extensions, in_stages,
]  # fmt: skip


def verify(*arguments: str) -> int:
    allowed = ["--allow-methods", "written_methods"] if "--recompute" in arguments else []
    return main(["verify", "--quiet", *allowed, *arguments])


def check(out: str) -> None:
    """Check an output in every way, then one of which an element is another."""
    assert verify(out) == 0
    assert verify(out, "--recompute") == 0
    assert verify(out, "--recompute", "--sample", "20%") == 0
    changed = shutil.copytree(out, f"{out}-changed")
    path = max(Path(changed).glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert verify(changed) == 1
    assert verify(changed, "--recompute") == 1


@pytest.mark.parametrize("make", WAYS)
def test_an_output_is_verified(models: Path, make: Callable[[Path], str]) -> None:
    check(make(models))


def test_an_output_of_models_on_the_hub(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(models / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    references._starts.cache_clear()
    served = {f"org/{name}": Model.of_folder(str(models / name)) for name in "ab"}
    with serving(HubServer(served)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        out = merge(recipe(models, "linear", ["org/a", "org/b"], each=HALF))
        check(out)
        # On another machine, which has none of it.
        shutil.rmtree(models / "hf")
        references._starts.cache_clear()
        assert verify(out, "--recompute", "--sample", "1%") == 0
        assert verify(out, "--recompute") == 0


def first(out: Path) -> Path:
    return min(out.glob("*.safetensors"))


def edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def swap(out: Path) -> None:
    one, *_, other = sorted(out.glob("*.safetensors"))
    one.rename(out / "aside")
    other.rename(one)
    (out / "aside").rename(other)


def link(out: Path) -> None:
    path = first(out)
    path.rename(out.parent / f"{out.name}.elsewhere")
    path.symlink_to(out.parent / f"{out.name}.elsewhere")


def pipe(out: Path) -> None:
    path = first(out)
    path.unlink()
    os.mkfifo(path)


def rename(out: Path) -> None:
    """Rename a tensor, in its file and in the index."""
    for path in (*out.glob("*.safetensors"), out / "model.safetensors.index.json"):
        path.write_bytes(path.read_bytes().replace(b"model.norm", b"model.nurm"))


#: What is done to an output, and what `verify` says then with and without `--recompute`.
DAMAGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "a flipped byte": (lambda out: edit(first(out), b'"pt"', b'"qt"'), 1),
    "swapped files": (swap, 1),
    "a file that is gone": (lambda out: first(out).unlink(), 1),
    "a file that is cut": (lambda out: os.truncate(first(out), 9000), 1),
    "a link": (link, 1),
    "a pipe": (pipe, 1),
    "a renamed tensor": (rename, 1),
    "weights that loaders prefer": (
        lambda out: shutil.copy("a/model.safetensors", out / "model.safetensors"), 1
    ),
    "another template": (lambda out: (out / "chat_template.jinja").write_text("{{ 1 }}"), 1),
    "other defaults": (lambda out: (out / "generation_config.json").write_text("{}"), 1),
    "code": (lambda out: (out / "modeling_it.py").write_text("pass"), 1),
    "an adapter": (lambda out: (out / "adapter_config.json").write_text("{}"), 1),
    "more templates": (lambda out: (out / "additional_chat_templates").mkdir(), 1),
    "a pickle": (lambda out: (out / "pytorch_model.bin").write_bytes(b"PK"), 1),
    "another index": (
        lambda out: edit(out / "model.safetensors.index.json", b'"total_size":', b'"total":'), 1
    ),
    "another config": (lambda out: edit(out / "config.json", b'"depth": 2', b'"depth": 3'), 1),
    "no config": (lambda out: (out / "config.json").unlink(), 1),
    "another tokenizer": (lambda out: edit(out / "tokenizer.json", b'"t1"', b'"t!"'), 1),
    "another hash": (lambda out: edit(out / "oxmerge.json", b'"blake3":"', b'"blake3":"0'), 2),
    "another weight": (lambda out: edit(out / "oxmerge.json", b"weight: 0.5", b"weight: 0.6"), 2),
    "another count": (lambda out: edit(out / "oxmerge.json", b'"nan":0', b'"nan":1'), 2),
    "more in it": (lambda out: edit(out / "oxmerge.json", b"\n}\n", b"\n}\n\n"), 2),
    "half of it": (lambda out: os.truncate(out / "oxmerge.json", 2000), 2),
    "no manifest": (lambda out: (out / "oxmerge.json").unlink(), 2),
}  # fmt: skip


def test_whatever_is_done_to_an_output_is_told(models: Path) -> None:
    """But for the card, the report and files of no use to a loader."""
    made = recipe(models, "task_arithmetic", ["a", "b"], base="base", each=HALF)
    merge(made, shard_size="1KB")
    (models / "out" / "README.md").write_text("my own words")
    (models / "out" / "notes.txt").write_text("more of them")
    assert verify("out") == verify("out", "--recompute") == 0
    for name, (damage, code) in DAMAGES.items():
        out = shutil.copytree("out", models / name, symlinks=True)
        damage(out)
        assert verify(str(out)) == code, name
        assert verify(str(out), "--recompute") == code, name


def test_an_output_in_the_cache_of_the_hub(models: Path) -> None:
    """There each file is a link to one whose name is its digest."""
    merge(recipe(models, "linear", ["a", "b"], each=HALF))
    (models / "blobs").mkdir()
    for path in Path("out").iterdir():
        path.rename(models / "blobs" / path.name)
        path.symlink_to(models / "blobs" / path.name)
    assert verify("out") == 0


def test_a_manifest_leads_nowhere_else(models: Path) -> None:
    merge(recipe(models, "linear", ["a", "b"], each=HALF))
    manifest, where = Path("out", "oxmerge.json"), '"beside": [{"name": "config.json"'
    for name in ("../a/config.json", "/etc/hosts", "a/../config.json", "a//b", "x\\u0000"):
        text = manifest.read_text().replace(where, where.replace("config.json", name))
        copy = shutil.copytree("out", models / f"copy{len(list(models.iterdir()))}")
        (copy / "oxmerge.json").write_text(signed(text))
        found = oxmerge.verify(copy)
        assert [each.code for each in found.problems] == ["output-differs"]
        assert "`oxmerge.json` tells of a file" in found.problems[0].message
