"""What strangers' texts are given to in Python: targets of a fuzzer.

``tests/fuzz/run`` gives a target changed inputs for as long as asked, with Atheris; the kept inputs
are in ``tests/fuzz/corpus``, and ``test_fuzzed.py`` gives each to its target. A new target is a
function in `TARGETS`, with some inputs in a folder of its name.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import oxmerge

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TARGETS"]

_RECIPE = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]\n"


def _model(folder: Path) -> None:
    """Write a model of two layers, if it is not there."""
    if folder.exists():
        return
    folder.mkdir()
    entries, end = {}, 0
    for name in ("embed_tokens", "layers.0.up", "layers.1.up", "norm"):
        span = [end, end + 8]
        entries[f"model.{name}.weight"] = {"dtype": "F32", "shape": [2], "data_offsets": span}
        end += 8
    header = json.dumps(entries).encode()
    file = len(header).to_bytes(8, "little") + header + bytes(end)
    (folder / "model.safetensors").write_bytes(file)


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


def plan(folder: Path, data: bytes) -> None:
    """Load a saved plan, and explain it."""
    (folder / "plan.json").write_bytes(data)
    loaded = oxmerge.load_plan(folder / "plan.json")
    loaded.explain("*")


#: The targets by name. Each gets a folder that it may write to, and may raise what oxmerge raises.
TARGETS: dict[str, Callable[[Path, bytes], None]] = {
    "recipe": recipe, "config": config, "plan": plan,
}  # fmt: skip


def main() -> None:
    """Fuzz the target that is the first argument."""
    import atheris

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
