"""What a recipe asks of the output's tokenizer and chat template, beside the donor's own.

The output has the donor's tokenizer files as they are. A recipe that asks for that in other words
gets it: the tokenizer of the base, or of the donor by its name, or the union of tokenizers that
have the same tokens; and a chat template that the donor has already. mergekit moves the rows of
embeddings where the models' tokens differ. oxmerge does not, so that is refused.
"""

from __future__ import annotations

import filecmp
import os
from collections import Counter
from contextlib import suppress

from oxmerge.errors import OxmergeError
from oxmerge.json_files import read_json, read_start
from oxmerge.models.names import is_vocabulary
from oxmerge.models.references import resolve_reference
from oxmerge.models.vocabularies import KINDS, OPAQUE, compare, folder_beside, present, vocabularies
from oxmerge.output.side_files import folder_of
from oxmerge.problems import UNSUPPORTED, Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from oxmerge.models.inputs import InputModel
    from oxmerge.recipe.recipe import Recipe, Template, Tokenizer

__all__ = ["check_tokenizer"]

#: Everything that makes a tokenizer what it is.
_TOKENS = (*dict.fromkeys(name for names in KINDS for name in names), *OPAQUE)
_FILES = (
    *_TOKENS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
#: More than any chat template has.
_MOST_BYTES = 1 << 20
_EVERY_ROW = 1 << 62
_MORE_ADVICE = {
    "tokens": ("rows for single tokens", "leave it out, or take mergekit for this recipe"),
    "pad_to_multiple_of": (
        "another number of rows",
        "leave it out: the output has as many rows as the donor",
    ),
}
_OTHER_WAYS = (
    "merge this recipe with mergekit, or give the models one vocabulary first, as "
    "`mergekit-tokensurgeon` does"
)


def check_tokenizer(
    recipe: Recipe, models: Sequence[InputModel], donor: InputModel, folders: tuple[str, ...]
) -> Iterator[Problem]:
    """Yield what a recipe asks of the tokenizer that the donor's own files do not give.

    Parameters
    ----------
    recipe : Recipe
        What is asked for.
    models : sequence of InputModel
        All models of the merge.
    donor : InputModel
        Whose files the output has.
    folders : tuple of str
        Where relative paths may start.
    """
    if recipe.tokenizer is not None:
        if not folder_of(donor.path).is_dir():
            message = f"the donor `{donor.reference}` is a file, and those beside it are not copied"
            advice = "name its folder, whose tokenizer the output then has"
            yield Problem("wrong-value", message, recipe.tokenizer.where, advice=advice)
        yield from _check_source(recipe.tokenizer, donor, folders)
        yield from _check_tokens(recipe.tokenizer, models, donor)
        yield from _check_more(recipe.tokenizer)
    if recipe.chat_template is not None:
        yield from _check_template(recipe.chat_template, models, donor)


def _check_source(
    asked: Tokenizer, donor: InputModel, folders: tuple[str, ...]
) -> Iterator[Problem]:
    """Check that the tokenizer of a model that is named is the donor's."""
    if asked.source in ("base", "union"):
        return
    path = resolve_reference(asked.source, folders)
    own = _folder(donor.path)
    theirs = None if isinstance(path, Problem) else _folder(path)
    if theirs is not None and _has_same_files(own, theirs):
        return
    message = (
        "not supported yet: the tokenizer of another model than the donor "
        f"`{donor.reference}` (`{asked.source}`)"
    )
    advice = "write `base` for the donor's; where this one has the same tokens with the same ids, "
    advice += "copy its files over those of the output"
    if theirs is not None and _differs(own, theirs, _rows(donor)) != _SAME:
        advice = _OTHER_WAYS
    yield Problem(UNSUPPORTED, message, asked.where, advice=advice)


def _check_tokens(
    asked: Tokenizer, models: Sequence[InputModel], donor: InputModel
) -> Iterator[Problem]:
    """Check that no row of an embedding stands for another token than in the donor."""
    own, rows = _folder(donor.path), _rows(donor)
    for model in models:
        found = _differs(own, _folder(model.path), rows)
        if found == _SAME or (found == _MORE and asked.source != "union"):
            continue
        names = f"`{model.reference}` and the donor `{donor.reference}`"
        message = f"not supported yet: matching tokens by their text: those of {names} differ"
        advice = _OTHER_WAYS
        if found == _MORE:
            message = (
                "not supported yet: a union of tokenizers: "
                f"`{model.reference}` has tokens that the donor `{donor.reference}` lacks"
            )
            advice = "write `base`, which leaves those tokens out of the output"
        elif found == _UNKNOWN:
            message = f"cannot tell whether {names} have the same tokens"
            advice = "leave it out, if they have: the output has the donor's tokenizer"
        yield Problem(UNSUPPORTED, message, asked.where, advice=advice)


def _check_more(asked: Tokenizer) -> Iterator[Problem]:
    for key in asked.more:
        what, advice = _MORE_ADVICE[key]
        message = f"not supported yet: {what} (`{key}`)"
        yield Problem(UNSUPPORTED, message, asked.where, advice=advice)


# Which tokens models have.

_SAME, _MORE, _DIFFERENT, _UNKNOWN = "same", "more", "different", "unknown"


def _differs(own: str, theirs: str, rows: int) -> str:
    """Tell how the tokens of a model differ from the donor's.

    ``same``: it has no tokenizer, or one that gives each id the same token. ``more``: it has tokens
    for ids that stand for none in the donor. ``different``: for an id that stands for one.
    """
    if own == theirs or not present(theirs, _TOKENS) or _equal(own, theirs, _TOKENS):
        return _SAME
    found = vocabularies(own, theirs)
    if found is None:
        return _UNKNOWN
    try:
        difference = compare(*found, rows)
    except (OxmergeError, OSError):
        return _UNKNOWN
    if difference is None:
        return _SAME
    lacking, _ = difference["lacking"]
    return _DIFFERENT if difference["differing"] or lacking else _MORE


def _has_same_files(own: str, theirs: str) -> bool:
    return own == theirs or bool(present(own, _FILES) and _equal(own, theirs, _FILES))


def _equal(own: str, theirs: str, names: Sequence[str]) -> bool:
    """Tell whether both folders have the same of these files, with the same bytes."""
    shared = present(own, names)
    if shared != present(theirs, names):
        return False
    try:
        _, different, unreadable = filecmp.cmpfiles(own, theirs, shared, shallow=False)
    except OSError:
        return False
    return not different and not unreadable


def _folder(path: str) -> str:
    return os.path.realpath(folder_beside(path))


def _rows(model: InputModel) -> int:
    """Return how many ids have a row in the model's embeddings."""
    named = enumerate(model.checkpoint.names())
    shapes = [model.checkpoint.tensor(at).shape for at, name in named if is_vocabulary(name)]
    return max((shape[0] for shape in shapes if shape), default=_EVERY_ROW)


# Chat templates.


def _check_template(
    asked: Template, models: Sequence[InputModel], donor: InputModel
) -> Iterator[Problem]:
    """Check that the chat template is the donor's."""
    own = _template(_folder(donor.path))
    if asked.text != "auto":
        if asked.text != own:
            message = "not supported yet: another chat template than the donor's"
            yield _template_problem(asked, message, "the template")
        return
    # mergekit takes the one that most models have; of several, any.
    folders = list(dict.fromkeys(_folder(model.path) for model in models))
    templates = [text.strip() for text in map(_template, folders) if text is not None]
    counts = Counter(templates)
    if counts and counts[(own or "").strip()] < max(counts.values()):
        most = counts.most_common(1)[0][0]
        model = next(m for m in models if (_template(_folder(m.path)) or "").strip() == most)
        message = (
            "not supported yet: a chat template that most models have and the donor "
            f"`{donor.reference}` has not"
        )
        yield _template_problem(asked, message, f"that of `{model.reference}`")


def _template_problem(asked: Template, message: str, which: str) -> Problem:
    advice = f"leave it out, and save {which} in the output as `chat_template.jinja`"
    return Problem(UNSUPPORTED, message, asked.where, advice=advice)


def _template(folder: str) -> str | None:
    """Return the chat template of a model: of a file of its own, or in the tokenizer's config."""
    with suppress(OSError, ValueError):
        text, _ = read_start(os.path.join(folder, "chat_template.jinja"), _MOST_BYTES)
        return text.decode(errors="replace")
    try:
        config, _ = read_json(os.path.join(folder, "tokenizer_config.json"))
    except (OSError, ValueError):
        return None
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
