"""What the documents say is run: docstring examples, and the code blocks of the README."""

from __future__ import annotations

import doctest
import inspect
import json
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import oxmerge
import pytest
from oxmerge import kernels
from writers import random_arrays, write_model

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(oxmerge.__path__, "oxmerge.")
    if module.name not in {"oxmerge._core", "oxmerge.__main__"}
)


def blocks(language: str) -> list[str]:
    """Return the blocks of a language in the README."""
    found = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    assert found, f"the README has a block of {language}"
    return found


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the recipe of the README and its models where the examples look for them."""
    shapes = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,)}
    for seed, name in enumerate(("base", "code", "chat")):
        write_model(tmp_path / "models" / name, random_arrays(shapes, seed), "BF16")
    factors = {"lora_embedding_A": (2, 40), "lora_embedding_B": (16, 2)}
    shapes = {f"base_model.model.model.embed_tokens.{each}": factors[each] for each in factors}
    for seed, name in enumerate(("code", "chat")):
        folder = tmp_path / "adapters" / name
        write_model(folder, random_arrays(shapes, seed), "F32")
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"]}
        (folder / "adapter_config.json").write_text(json.dumps(told))
    (tmp_path / "recipe.yml").write_text("\n".join(blocks("yaml")))
    monkeypatch.chdir(tmp_path)


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "rust/ARCHITECTURE.md",
        "rust/methods/ADDING.md",
        "python/MERGEKIT.md",
        "python/CLUSTERS.md",
    ],
)
def test_files_that_pages_name_are_there(page: str) -> None:
    places = [
        ROOT,
        *(ROOT / name for name in ("rust", "python/oxmerge", "tests", "benches", "python")),
    ]
    named = set(re.findall(r"`([\w/.-]+\.(?:py|pyi|rs|md))`", (ROOT / page).read_text("utf-8")))
    files = [path for place in places for path in place.rglob("*") if path.suffix != ".pyc"]
    missing = {name for name in named if not any(str(f).endswith(f"/{name}") for f in files)}
    assert missing <= {"rust/methods/NAME.rs"}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name.startswith("oxmerge.torch_"):
        pytest.importorskip(
            "torch", reason="not installed: torch (see the dependency group `test`)"
        )
    failed, _ = doctest.testmod(import_module(name))
    assert failed == 0


def test_some_module_has_examples() -> None:
    finder = doctest.DocTestFinder()
    examples = (finder.find(import_module(name)) for name in MODULES if "torch" not in name)
    assert sum(len(test.examples) for tests in examples for test in tests) > 0


@pytest.mark.parametrize("name", kernels.__all__)
def test_every_kernel_tells_its_cost_its_source_and_has_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(kernels, name)) or ""
    notes = text.partition("Notes\n-----\n")[2].partition("Examples\n--------\n")
    assert re.search(r"read|write", notes[0]), "what it costs"
    assert re.search(r"http|IEEE|From ", notes[0]), "where it is from"
    assert f"{name}(" in notes[2] or "merges files only" in notes[0], "how it is called"


def test_readme_runs(tmp_path: Path) -> None:
    for block in blocks("python"):  # each by itself: a reader copies one
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "merged" / "config.json").is_file()
