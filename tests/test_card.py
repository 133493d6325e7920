"""The model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
import yaml
from oxmerge.output.card import Metadata, hub_name, model_card, read_metadata
from writers import random_arrays, write_model, write_recipe

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = "merge_method: slerp\nbase_model: org/base\n"


def card(**changes: Any) -> str:
    """Write a card with few words."""
    settings: dict[str, Any] = {
        "method": "slerp",
        "models": ["org/base", "./local/tuned"],
        "hub_names": ["org/base", "tuned"],
        "metadata": Metadata(None, "text-generation", ("chat", "merge")),
        "base": "org/base",
        "recipe_text": RECIPE,
        "method_title": "Spherical interpolation",
        "paper": "https://example.org/slerp",
    }
    return model_card(**{**settings, **changes})


def test_the_whole_card() -> None:
    assert (
        card()
        == """\
---
base_model:
- org/base
- tuned
base_model_relation: merge
library_name: transformers
pipeline_tag: text-generation
tags:
- chat
- merge
- oxmerge
---

# Merge by Spherical interpolation

This model was made by merging the weights of others with oxmerge.

## Method

Merge method: [Spherical interpolation (`slerp`)](https://example.org/slerp), with \
`org/base` as the base.

## Models

- `org/base`
- `./local/tuned`

## Recipe

It is also in `oxmerge_recipe.yml`. Relative paths in it hold where it was first run.

```yaml
merge_method: slerp
base_model: org/base
```
"""
    )


def test_a_base_that_is_not_merged_is_named_as_base_only() -> None:
    text = card(base="org/other", models=["org/a", "org/b"])
    assert "\n- `org/a`\n- `org/b`\n" in text
    assert "\n- `org/other`" not in text
    assert "`org/other` as the base" in text


def test_fences_hold_any_recipe() -> None:
    text = card(recipe_text="# ```\n# ````x\nmerge_method: linear\n")
    assert "`````yaml\n# ```\n" in text
    assert text.endswith("\n`````\n")


def test_odd_references_stay_code() -> None:
    assert "- `` a`b ``\n" in card(models=["a`b"], base=None)


def test_a_method_without_title_or_paper() -> None:
    text = card(method_title=None, paper=None, base=None)
    assert "# Merge by slerp\n" in text
    assert "Merge method: `slerp`.\n" in text


NAMES = [
    ("org/model", "org/model", "org/model"),
    ("models/llama", "models/llama", "llama"),
    ("./mine", "mine", "mine"),
    ("/home/me/Llama 3 (mine)", "/home/me/Llama 3 (mine)", "Llama-3-mine"),
    ("a", f"/cache/hub/models--org--the-model--x/snapshots/{'0123' * 10}", "org/the-model--x"),
    ("a", f"/cache/hub/models--org--m/snapshots/{'0123' * 10}/model.safetensors", "org/m"),
    ("/", "/", None),
    ("é", "é", None),
]


@pytest.mark.parametrize(("reference", "path", "expected"), NAMES)
def test_what_a_model_is_called_on_the_hub(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference: str,
    path: str,
    expected: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    if path != "/":
        place = tmp_path / path.removeprefix("/")
        if place.suffix == ".safetensors":
            place.parent.mkdir(parents=True)
            place.touch()
        else:
            place.mkdir(parents=True)
        path = str(place)
    assert hub_name(reference, path) == expected


CARDS: list[tuple[str, Metadata]] = [
    ("# no front matter\n", Metadata()),
    ("---\nlibrary_name: mlx\n", Metadata()),
    (
        "---\r\nlibrary_name: mlx\r\npipeline_tag: text-generation\r\ntags: [a b, c]\r\n---\r\n#",
        Metadata("mlx", "text-generation", ("a b", "c")),
    ),
    ("---\ntags:\n- a\n- [b]\n- 7\n- null\n- c\n---\n", Metadata(tags=("a", "c"))),
    ("---\ntags: chat\nlibrary_name: [x]\n---\n", Metadata()),
    ('---\nlibrary_name: "a\\nb: c"\npipeline_tag: "---"\n---\n', Metadata()),
    ("---\nlibrary_name: " + "x" * 100 + "\n---\n", Metadata()),
    ("---\nlibrary_name: x\nlibrary_name: y\n---\n", Metadata()),
    ("---\n- a\n---\n", Metadata()),
    ("---\n&a [*a]\n---\n", Metadata()),
    ("---\ntags: [" + "a, " * 1000 + "]\n---\n", Metadata(tags=("a",) * 50)),
]


@pytest.mark.parametrize(("text", "expected"), CARDS)
def test_what_is_taken_from_a_donors_card(tmp_path: Path, text: str, expected: Metadata) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_metadata(tmp_path) == expected


def test_the_card_of_a_merge(tmp_path: Path) -> None:
    for name in ("base", "tuned", "other"):
        write_model(tmp_path / name, random_arrays({"x": (2,)}, 0))
    front = "library_name: sentence-transformers\npipeline_tag: feature-extraction\ntags: [hei]"
    (tmp_path / "base/README.md").write_text(f"---\n{front}\nlicense: mit\n---\n")
    (tmp_path / "tuned/README.md").write_text("---\nlibrary_name: mlx\ntags: [x]\n---\n")
    models = [tmp_path / "tuned", tmp_path / "other"]
    recipe = write_recipe(
        tmp_path / "r.yml", "task_arithmetic", models, base=tmp_path / "base", each={"weight": 1}
    )
    oxmerge.merge(recipe, tmp_path / "out")
    _, front, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": ["base", "tuned", "other"],
        "base_model_relation": "merge",
        "library_name": "sentence-transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["hei", "merge", "oxmerge"],
    }
    assert text.startswith("\n# Merge by")
