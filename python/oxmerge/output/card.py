"""The model card: `README.md` of a merged model.

The card depends on the recipe and its models only. It carries no time, no place and no name of
the output, so that the same merge gives the same bytes anywhere; what a run took stands in
`oxmerge_report.json`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from types import MappingProxyType

from oxmerge.json_files import read_start
from oxmerge.models.hub_cache import Commit
from oxmerge.models.references import FOLDERS
from oxmerge.problems import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

CARD_NAME = "README.md"
RECIPE_NAME = "oxmerge_recipe.yml"
REPORT_NAME = "oxmerge_report.json"

#: What a card says that a model is for, and whether it may be taken over; a stranger wrote it.
_WORD = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_TAG = re.compile(r"[\w][\w .:/+-]{0,79}")
_MOST_TAGS = 50
#: A model as cards name their base models: on the Hub, or a folder's name.
_BASE = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_MOST_BASES = 1000
#: As much of a card as may hold its front matter.
_MOST_BYTES = 1 << 16
_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
#: A name as the Hub has it.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a card tells programs of a model.

    Attributes
    ----------
    library_name, pipeline_tag : str, optional
        The library that loads it, and what it is for.
    tags : tuple of str
        Further words.
    base_models : tuple of str
        What it was made from.
    relation : str
        What it is to them.
    """

    library_name: str | None = None
    pipeline_tag: str | None = None
    tags: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    relation: str = "merge"


def read_metadata(folder: str | os.PathLike[str]) -> Metadata:
    """Return what the card of a model says, as far as it can be taken over; nothing without one."""
    from oxmerge.errors import OxmergeError  # noqa: PLC0415 - to keep what is loaded small
    from oxmerge.recipe.yaml_text import parse_yaml  # noqa: PLC0415 - it needs PyYAML

    try:
        data, _ = read_start(os.path.join(folder, CARD_NAME), _MOST_BYTES)
        text = data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
        found = _FRONT_MATTER.match(text)
        values = {} if found is None else parse_yaml(found[1])
    except (OSError, ValueError, OxmergeError):
        values = {}
    tags = values.get("tags")
    listed = tags if isinstance(tags, list) else []
    base = values.get("base_model")
    bases = base if isinstance(base, list) else [base]
    return Metadata(
        library_name=_matching(_WORD, values.get("library_name")),
        pipeline_tag=_matching(_WORD, values.get("pipeline_tag")),
        tags=tuple(filter(None, (_matching(_TAG, tag) for tag in listed)))[:_MOST_TAGS],
        base_models=tuple(filter(None, (_matching(_BASE, name) for name in bases)))[:_MOST_BASES],
    )


def _matching(pattern: re.Pattern[str], value: object) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None


def hub_name(reference: str, path: str) -> str | None:
    """Return what a model is called on the Hub, or would be: no path of this machine.

    That is what the Hub's cache says, a reference that is a name there as it stands, or the name of
    the model's folder. The Hub takes nothing else as a `base_model`.

    Parameters
    ----------
    reference
        As the recipe writes it.
    path
        Where the model lies.

    Examples
    --------
    >>> hub_name("/home/me/models/Llama 3 (mine)", "/home/me/models/Llama 3 (mine)")
    'Llama-3-mine'
    """
    cached = Commit.of_path(path) or Commit.of_path(os.path.realpath(path))
    if cached is not None:
        return cached[0].name
    if _HUB_NAME.fullmatch(reference) and reference.partition("/")[0].lower() not in FOLDERS:
        return reference
    place = os.path.realpath(path)
    folder = os.path.dirname(place) if os.path.isfile(place) else place
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(folder))
    return name.strip("-._") or None


def model_card(  # noqa: PLR0913 - what a card says, keyword only
    *,
    method: str,
    models: Sequence[str],
    pinned: Mapping[str, str] = MappingProxyType({}),
    hub_names: Iterable[str | None] = (),
    metadata: Metadata | None = None,
    base: str | None,
    recipe_text: str,
    method_title: str | None = None,
    paper: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Write the text of the card.

    Parameters
    ----------
    method
        Name of the merge method, as in the recipe.
    models
        The models merged as the recipe writes them, in listed order; the base may be among them.
    pinned
        Of those that are from the Hub, what they are called there with their commits.
    hub_names
        What they are called on the Hub.
    metadata
        What the donor's card says.
    base
        The base model, if the recipe has one.
    recipe_text
        The recipe as it was given.
    method_title
        The method's full name.
    paper
        Address of its paper.
    notes
        On tensors that are not merged as others are.
    """
    everyone = list(dict.fromkeys([*([base] if base else []), *models]))
    commits = {model: f", that is {_code(pin)}" for model, pin in pinned.items()}
    sections = [
        _front_matter(hub_names, metadata or Metadata()),
        f"# Merge by {method_title or method}",
        "This model was made by merging the weights of others with oxmerge.",
        "## Method",
        _method_sentence(method, method_title, paper, base),
        "## Models",
        "\n".join(
            f"- {_code(model)}{commits.get(model, '')}"
            for model in everyone
            if model != base or base in models
        ),
        "## Tensors" if notes else "",
        "\n".join(f"- {_code(note)}" for note in notes),
        "## Recipe",
        f"It is also in `{RECIPE_NAME}`. Relative paths in it hold where it was first run.",
        _fenced(pinned_recipe(recipe_text, pinned)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def pinned_recipe(text: str, pinned: Mapping[str, str]) -> str:
    """Return the text of a recipe, with the commits of its models as comments before it."""
    pins = (f"{model} was {pin}" for model, pin in pinned.items())
    return "".join(f"# {printable(pin)}\n" for pin in pins) + text


def _front_matter(hub_names: Iterable[str | None], metadata: Metadata) -> str:
    import yaml  # noqa: PLC0415 - heavy

    names = list(dict.fromkeys(filter(None, hub_names)))
    values = {
        "base_model": names,
        "base_model_relation": metadata.relation if names else None,
        "library_name": metadata.library_name or "transformers",
        "pipeline_tag": metadata.pipeline_tag,
        "tags": list(dict.fromkeys((*metadata.tags, "merge", "oxmerge"))),
    }
    given = {key: value for key, value in values.items() if value}
    text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def _method_sentence(method: str, title: str | None, paper: str | None, base: str | None) -> str:
    name = f"`{method}`" if title is None else f"{title} (`{method}`)"
    # What is written in Python is from a module.
    is_address = paper is not None and paper.startswith("http")
    linked = f"[{name}]({paper})" if is_address else name if paper is None else f"{name}, {paper}"
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
