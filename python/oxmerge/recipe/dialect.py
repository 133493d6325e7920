"""The dialect: what a recipe's levels are made of.

Every fault is taken down, and what cannot be read has a stand-in, so that planning can go on to
what else is wrong.
"""

from __future__ import annotations

from dataclasses import replace

from oxmerge.problems import Findings, Place, Problem, shorten
from oxmerge.recipe.extensions import ExtensionReader
from oxmerge.recipe.keys import at_key, is_mapping
from oxmerge.recipe.recipe import UNREAD, Recipe, Slice, Source, Template, Tokenizer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["read_recipe"]

_TOP_KEYS = frozenset(
    (
        "merge_method",
        "models",
        "slices",
        "base_model",
        "parameters",
        "dtype",
        "out_dtype",
        "tokenizer",
        "tokenizer_source",
        "chat_template",
        "oxmerge",
    )
)
_TOKENIZER_KEYS = frozenset(("source", "tokens", "pad_to_multiple_of"))
_MODEL_KEYS = frozenset(("model", "parameters"))
_SLICE_KEYS = frozenset(("sources", "base_model", "parameters"))
_SOURCE_KEYS = frozenset(("model", "layer_range", "parameters"))
#: Files of other tools by the keys that tell them.
_OTHER_TOOLS = (
    (
        {"experts"},
        "for `mergekit-moe`, which builds a model of experts from dense ones",
        "oxmerge does not build experts: run `mergekit-moe`",
    ),
    (
        {"genome"},
        "for `mergekit-evolve`, which searches for a recipe",
        "run the search there, and merge the recipe that it finds here",
    ),
    (
        {"datasets", "base_model"},
        "for training",
        "train with it, and merge the models that come of it",
    ),
    (
        {"model_name_or_path"},
        "for training",
        "train with it, and merge the models that come of it",
    ),
)


def read_recipe(
    mapping: Mapping[str, object],
    findings: Findings,
    *,
    text: str = "",
    folder: str | None = None,
    file: str | None = None,
) -> Recipe:
    """Return the recipe in `mapping`, as far as it can be read; the faults go to `findings`."""
    known = Findings(findings.problems, ignore_unknown=findings.ignore_unknown)
    recipe = _RecipeReader(known).recipe(mapping, Place(file=file))
    return replace(recipe, text=text, folder=folder, warnings=tuple(known.warnings))


class _RecipeReader(ExtensionReader):
    """Reads the levels of a recipe, from the top down."""

    def recipe(self, raw: object, place: Place) -> Recipe:
        if not is_mapping(raw):
            message, advice = "a recipe is a mapping of keys to values", "give it as a mapping"
            self.fault(place, message, code="not-a-recipe", found=raw, advice=advice)
            return Recipe("")
        other = _other_tool(raw)
        if other is not None:
            message, advice = other
            self.fault(place, message, code="not-a-recipe", advice=advice)
            return Recipe("")
        self.check_keys(raw, place, _TOP_KEYS, later=True)
        recipe = Recipe(
            method=self.method(raw, place),
            models=self.items(raw, "models", place, self.model),
            slices=self.items(raw, "slices", place, self.slice),
            base_model=self.reference(raw, "base_model", place),
            parameters=self.settings(raw, place),
            dtype=self.dtype(raw, "dtype", place),
            out_dtype=self.dtype(raw, "out_dtype", place),
            tokenizer=self.tokenizer(raw, place),
            chat_template=self.chat_template(raw, place),
            extensions=self.extensions(raw, place),
            places={key: at_key(place, raw, key) for key in raw if key in _TOP_KEYS},
        )
        self.check_form(raw, place)
        return recipe

    def check_form(self, raw: Mapping[str, object], place: Place) -> None:
        """Exactly one of `models` and `slices` says what to merge."""
        given = [key for key in ("models", "slices") if raw.get(key)]
        if len(given) == 1 or (not given and raw.get("modules")):  # which is refused by name
            return
        found = " and ".join(f"`{key}`" for key in given) or "neither"
        message = "a recipe has exactly one of `models` and `slices`"
        advice = "list whole models under `models`, or runs of layers under `slices`"
        self.findings.problems.append(
            Problem("wrong-value", message, place, found=found, advice=advice)
        )

    def method(self, raw: Mapping[str, object], place: Place) -> str:
        method = raw.get("merge_method")
        if isinstance(method, str) and method:
            return method
        if self.is_misspelt(raw, "merge_method", _TOP_KEYS):
            return ""
        self.fault(
            at_key(place, raw, "merge_method"),
            "the name of a merge method is needed here",
            code="missing-key" if method is None else "wrong-value",
            found="nothing" if method is None else method,
            advice="write `merge_method: linear`, say; `oxmerge methods` lists them",
        )
        return ""

    def tokenizer(self, raw: Mapping[str, object], place: Place) -> Tokenizer | None:
        """Read `tokenizer_source`, or `tokenizer` with everything that may be in it."""
        given = [key for key in ("tokenizer_source", "tokenizer") if raw.get(key) is not None]
        if not given:
            return None
        value, place = raw[given[0]], at_key(place, raw, given[0])
        if len(given) > 1:
            message = "`tokenizer_source` and `tokenizer` both say what the tokenizer is"
            self.fault(place, message, advice="leave one of them out")
            return None
        if given == ["tokenizer_source"]:
            named = self.reference_value(value, place)
            # As recipes for earlier versions of mergekit write it.
            return Tokenizer(place, named.removeprefix("model:")) if named else None
        if isinstance(value, str):
            message, name = "a mapping of keys to values is needed here", shorten(value)
            advice = f"write `tokenizer: {{source: {name}}}`, or `tokenizer_source: {name}`"
            self.fault(place, message, found=value, advice=advice)
            return None
        if not self.check_mapping(value, place, _TOKENIZER_KEYS):
            return None
        more = ["tokens"] if value.get("tokens") else []
        # A multiple of one is any number.
        more += ["pad_to_multiple_of"] if value.get("pad_to_multiple_of") not in (None, 1) else []
        source = self.reference(value, "source", place) if value.get("source") else "union"
        return Tokenizer(place, source, tuple(more)) if source else None

    def chat_template(self, raw: Mapping[str, object], place: Place) -> Template | None:
        """Read `chat_template`."""
        value = raw.get("chat_template")
        if value is None:
            return None
        place = at_key(place, raw, "chat_template")
        if isinstance(value, str) and value:
            return Template(place, value)
        message, advice = "a chat template is text", "write `chat_template: auto`, or leave it out"
        self.fault(place, message, found=value, advice=advice)
        return None

    def model(self, raw: object, place: Place) -> Source:
        return self.source(raw, place, _MODEL_KEYS)

    def slice(self, raw: object, place: Place) -> Slice:
        if not self.check_mapping(raw, place, _SLICE_KEYS):
            return Slice(place, ())
        sources = self.items(raw, "sources", place, self.slice_source)
        if not raw.get("sources"):
            self.fault(
                place,
                "a slice needs `sources`",
                code="missing-key",
                advice="list them: `sources: [{model: path, layer_range: [0, 8]}]`",
            )
        return Slice(
            where=place,
            sources=sources,
            base_model=self.reference(raw, "base_model", place),
            parameters=self.settings(raw, place),
        )

    def slice_source(self, raw: object, place: Place) -> Source:
        return self.source(raw, place, _SOURCE_KEYS)

    def source(self, raw: object, place: Place, keys: frozenset[str]) -> Source:
        if not self.check_mapping(raw, place, keys):
            return Source(UNREAD, place)
        layers = self.layer_range(raw, place) if "layer_range" in keys else None
        model = self.reference(raw, "model", place)
        if raw.get("model") is None and not self.is_misspelt(raw, "model", keys):
            message, advice = "`model` is needed here", "write `model: path`"
            self.fault(place, message, code="missing-key", advice=advice)
        return Source(model or UNREAD, place, layers, self.settings(raw, place))


def _other_tool(raw: Mapping[str, object]) -> tuple[str, str] | None:
    """Return what a file is that is no recipe for merging weights, and what to do."""
    if "merge_method" in raw:
        return None
    for keys, what, advice in _OTHER_TOOLS:
        if keys <= raw.keys():
            return f"this file is {what}, not a recipe for merging weights", advice
    return None
