"""The model card: `README.md` of a merged model.

The card depends on the recipe and its models only. It carries no time, no place and no name of
the output, so that the same merge gives the same bytes anywhere; what a run took stands in
`oxmerge_report.json`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CARD_NAME = "README.md"
RECIPE_NAME = "oxmerge_recipe.yml"
REPORT_NAME = "oxmerge_report.json"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class CardModel:
    """A model of the recipe.

    Attributes
    ----------
    reference
        As the recipe writes it.
    is_local
        Whether that is a path of the machine that merged, though it may read like a Hub name.
    """

    reference: str
    is_local: bool = False

    @property
    def hub_name(self) -> str | None:
        """The reference as a name on the Hub, if it is one."""
        is_name = not self.is_local and _HUB_NAME.fullmatch(self.reference) is not None
        return self.reference if is_name else None


def model_card(
    *,
    method: str,
    models: Sequence[CardModel],
    base: CardModel | None,
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
        The models merged, in listed order; the base may be among them.
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
        _front_matter(everyone),
        f"# Merge by {method_title or method}",
        "This model was made by merging the weights of others with oxmerge.",
        "## Method",
        _method_sentence(method, method_title, paper, base),
        "## Models",
        "\n".join(f"- {_mention(model)}" for model in everyone if model != base or base in models),
        "## Recipe",
        f"The merge can be repeated from this file, which is also in `{RECIPE_NAME}`:",
        _fenced(recipe_text),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(models: Iterable[CardModel]) -> str:
    names = [model.hub_name for model in models if model.hub_name]
    lines = ["base_model:", *(f"- {name}" for name in names)] if names else []
    return "\n".join(
        ["---", *lines, "library_name: transformers", "tags:", "- merge", "- oxmerge", "---"]
    )


def _method_sentence(
    method: str, title: str | None, paper: str | None, base: CardModel | None
) -> str:
    name = f"`{method}`" if title is None else f"{title} (`{method}`)"
    linked = name if paper is None else f"[{name}]({paper})"
    basis = "" if base is None else f", with {_mention(base)} as the base"
    return f"Merge method: {linked}{basis}."


def _mention(model: CardModel) -> str:
    name = model.hub_name
    if name is not None:
        return f"[{name}](https://huggingface.co/{name})"
    return _code(model.reference)


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
