"""The model card."""

from __future__ import annotations

from typing import Any

from oxmerge.card import model_card

RECIPE = "merge_method: slerp\nbase_model: org/base\n"


def card(**changes: Any) -> str:
    """Write a card with few words."""
    settings: dict[str, Any] = {
        "method": "slerp",
        "models": ["org/base", "./local/tuned"],
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
library_name: transformers
tags:
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

The merge can be repeated from this file, which is also in `oxmerge_recipe.yml`:

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
