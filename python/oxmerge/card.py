"""The model card: `README.md` of a merged model.

The card depends on the recipe and its models only. It carries no time, no place and no name of
the output, so that the same merge gives the same bytes anywhere; what a run took stands in
`oxmerge_report.json`.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CARD_NAME = "README.md"
RECIPE_NAME = "oxmerge_recipe.yml"
REPORT_NAME = "oxmerge_report.json"

_FRONT_MATTER = "---\nlibrary_name: transformers\ntags:\n- merge\n- oxmerge\n---"


def model_card(
    *,
    method: str,
    models: Sequence[str],
    base: str | None,
    recipe_text: str,
    method_title: str | None = None,
    paper: str | None = None,
) -> str:
    """Write the text of the card.

    Parameters
    ----------
    method
        Name of the merge method, as in the recipe.
    models
        The models merged as the recipe writes them, in listed order; the base may be among them.
    base
        The base model, if the recipe has one.
    recipe_text
        The recipe as it was given.
    method_title
        The method's full name.
    paper
        Address of its paper.
    """
    everyone = list(dict.fromkeys([*([base] if base else []), *models]))
    sections = [
        _FRONT_MATTER,
        f"# Merge by {method_title or method}",
        "This model was made by merging the weights of others with oxmerge.",
        "## Method",
        _method_sentence(method, method_title, paper, base),
        "## Models",
        "\n".join(f"- {_code(model)}" for model in everyone if model != base or base in models),
        "## Recipe",
        f"The merge can be repeated from this file, which is also in `{RECIPE_NAME}`:",
        _fenced(recipe_text),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _method_sentence(method: str, title: str | None, paper: str | None, base: str | None) -> str:
    name = f"`{method}`" if title is None else f"{title} (`{method}`)"
    linked = name if paper is None else f"[{name}]({paper})"
    basis = "" if base is None else f", with {_code(base)} as the base"
    return f"Merge method: {linked}{basis}."


def _code(text: str) -> str:
    """`text` as inline code, whatever it holds."""
    line = " ".join(text.split())
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if "`" in line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _fenced(text: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
