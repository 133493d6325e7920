"""The model card."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from oxmerge.card import CardModel, model_card

RECIPE = "merge_method: slerp\nbase_model: org/base\n"


def card(**changes: Any) -> str:
    """Write a card with few words."""
    settings: dict[str, Any] = {
        "method": "slerp",
        "models": [CardModel("org/base"), CardModel("./local/tuned")],
        "base": CardModel("org/base"),
        "recipe_text": RECIPE,
        "method_title": "Spherical interpolation",
        "paper": "https://example.org/slerp",
    }
    return model_card(**{**settings, **changes})


def front_matter(text: str) -> dict[str, Any]:
    """Parse the YAML on top."""
    _, head, _ = text.split("---\n", 2)
    return dict(yaml.safe_load(head))


def test_the_whole_card() -> None:
    assert (
        card()
        == """\
---
base_model:
- org/base
library_name: transformers
tags:
- merge
- oxmerge
---

# Merge by Spherical interpolation

This model was made by merging the weights of others with oxmerge.

## Method

Merge method: [Spherical interpolation (`slerp`)](https://example.org/slerp), with \
[org/base](https://huggingface.co/org/base) as the base.

## Models

- [org/base](https://huggingface.co/org/base)
- `./local/tuned`

## Recipe

The merge can be repeated from this file, which is also in `oxmerge_recipe.yml`:

```yaml
merge_method: slerp
base_model: org/base
```
"""
    )


@pytest.mark.parametrize(
    ("reference", "is_local", "is_name"),
    [
        ("org/model", False, True),
        ("meta-llama/Llama-3.1-8B", False, True),
        ("org/model", True, False),
        ("./org/model", False, False),
        ("/data/model", False, False),
        ("~/model", False, False),
        ("../model", False, False),
        ("org/..", False, False),
        ("model", False, False),
        ("a/b/c", False, False),
        ("org/model\n", False, False),
    ],
)
def test_hub_names(reference: str, *, is_local: bool, is_name: bool) -> None:
    model = CardModel(reference, is_local=is_local)
    text = card(base=None, models=[model])
    assert front_matter(text).get("base_model") == ([reference] if is_name else None)
    assert ("huggingface.co" in text) is is_name


def test_a_base_that_is_not_merged_is_named_as_base_only() -> None:
    text = card(base=CardModel("org/other"), models=[CardModel("org/a"), CardModel("org/b")])
    assert front_matter(text)["base_model"] == ["org/other", "org/a", "org/b"]
    assert "\n- [org/other]" not in text
    assert "[org/other](https://huggingface.co/org/other) as the base" in text


def test_fences_hold_any_recipe() -> None:
    text = card(recipe_text="# ```\n# ````x\nmerge_method: linear\n")
    assert "`````yaml\n# ```\n" in text
    assert text.endswith("\n`````\n")


def test_odd_references_stay_code() -> None:
    assert "- `` a`b ``\n" in card(models=[CardModel("a`b")], base=None)


def test_a_method_without_title_or_paper() -> None:
    text = card(method_title=None, paper=None, base=None)
    assert "# Merge by slerp\n" in text
    assert "Merge method: `slerp`.\n" in text
