"""What strangers' texts are given to in Python: targets of a fuzzer.

``tests/fuzz/run`` gives a target changed inputs for as long as asked, with Atheris; the kept inputs
are in ``tests/fuzz/corpus``, and ``test_fuzzed.py`` gives each to its target. A new target is a
function in `TARGETS`, with some inputs in a folder of its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import oxmerge

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TARGETS"]

_RECIPE = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]\n"


def _model(folder: Path) -> None:
    """Write a model of two layers, if it is not there."""
    names = ("embed_tokens", "layers.0.up", "layers.1.up", "norm")
    _weights(folder / "model.safetensors", {f"model.{name}.weight": [2] for name in names})


def _weights(file: Path, shapes: dict[str, list[int]]) -> None:
    """Write tensors of zeros, if the file is not there."""
    if file.exists():
        return
    file.parent.mkdir(exist_ok=True)
    entries, end = {}, 0
    for name, shape in shapes.items():
        span = [end, end + 4 * prod(shape)]
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": span}
        end = span[1]
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))


def recipe(folder: Path, data: bytes) -> None:
    """Plan a recipe."""
    for name in ("a", "b"):
        _model(folder / name)
    os.chdir(folder)
    (folder / "recipe.yml").write_bytes(data)
    oxmerge.plan("recipe.yml")


def config(folder: Path, data: bytes) -> None:
    """Plan a merge of a model with this config."""
    for name in ("a", "b"):
        _model(folder / name)
    (folder / "b" / "config.json").write_text('{"num_hidden_layers": 2, "rope_theta": 10000.0}')
    (folder / "a" / "config.json").write_bytes(data)
    os.chdir(folder)
    oxmerge.plan(_RECIPE)


def adapter(folder: Path, data: bytes) -> None:
    """Plan a model with an adapter of this config."""
    modules = [f"model.layers.{at}.up" for at in (0, 1)]
    pairs = {"lora_A.weight": [2, 3], "lora_B.weight": [4, 2]}
    factors = {
        f"base_model.model.{module}.{name}": shape
        for module in modules
        for name, shape in pairs.items()
    }
    _weights(folder / "m" / "model.safetensors", {f"{module}.weight": [4, 3] for module in modules})
    _weights(folder / "l" / "adapter_model.safetensors", factors)
    (folder / "l" / "adapter_config.json").write_bytes(data)
    os.chdir(folder)
    oxmerge.plan("merge_method: passthrough\nmodels: [{model: m+l}]\n")


def plan(folder: Path, data: bytes) -> None:
    """Load a saved plan, and explain it."""
    (folder / "plan.json").write_bytes(data)
    loaded = oxmerge.load_plan(folder / "plan.json")
    loaded.explain("*")


def manifest(folder: Path, data: bytes) -> None:
    """Read a manifest."""
    from oxmerge.checking.manifests import read_manifest

    # Nothing else of it is looked at, unless its own digest is right.
    text = data.rpartition(b'"sha256": ')[0] or data
    end = f'"sha256": "{hashlib.sha256(text).hexdigest()}"\n}}\n'
    (folder / "oxmerge.json").write_bytes(text + end.encode())
    read_manifest(str(folder))


def renames(folder: Path, data: bytes) -> None:
    """Claim an output where a run was killed between its renames."""
    from oxmerge.output.journal import JOURNAL_NAME
    from oxmerge.output.publish import close, prepare_output

    output = folder / "out"
    output.mkdir(exist_ok=True)
    (output / JOURNAL_NAME).write_bytes(data)
    names = ["config.json", "model.safetensors"]
    close(
        prepare_output(
            output, overwrite=False, input_files=[], needed_bytes=1, names=names, purpose="p"
        )
    )


#: The targets by name. Each gets a folder that it may write to, and may raise what oxmerge raises.
TARGETS: dict[str, Callable[[Path, bytes], None]] = {
    "recipe": recipe, "config": config, "plan": plan, "adapter": adapter,
    "manifest": manifest, "renames": renames,
}  # fmt: skip


def main() -> None:
    """Fuzz the target that is the first argument."""
    import atheris

    os.environ["HF_HUB_OFFLINE"] = "1"  # what is no path may be a name there
    target, kept = TARGETS[sys.argv[1]], Path(__file__).parent / "fuzz" / "corpus" / sys.argv.pop(1)
    here = os.getcwd()

    def run(data: bytes) -> None:
        try:
            target(Path(folder), data)
        except (oxmerge.OxmergeError, OSError):
            pass
        finally:
            os.chdir(here)

    with tempfile.TemporaryDirectory() as folder:
        # What is imported first in here is watched.
        with atheris.instrument_imports(include=["oxmerge"]):
            for each in kept.iterdir():
                run(each.read_bytes())
        atheris.Setup(sys.argv, run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
