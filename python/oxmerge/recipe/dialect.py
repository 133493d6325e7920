"""The dialect: what a recipe's levels are made of. Every fault is collected."""

from __future__ import annotations

from oxmerge.errors import RecipeError
from oxmerge.problems import Problem, shorten
from oxmerge.recipe.keys import Place, is_mapping, show
from oxmerge.recipe.recipe import Recipe, Slice, Source, Template, Tokenizer, TokenRow
from oxmerge.recipe.values import ValueReader

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
    )
)
_TOKENIZER_KEYS = frozenset(("source", "tokens", "pad_to_multiple_of"))
_TOKEN_KEYS = frozenset(("source", "force"))
_MODEL_TOKEN_KEYS = frozenset(("kind", "model", "token", "token_id"))
#: More rows than any vocabulary has.
_MOST_ROWS = 1 << 22
_MODEL_KEYS = frozenset(("model", "parameters"))
_SLICE_KEYS = frozenset(("sources", "base_model", "parameters"))
_SOURCE_KEYS = frozenset(("model", "layer_range", "parameters"))


def read_recipe(
    mapping: Mapping[str, object], *, text: str = "", folder: str | None = None
) -> Recipe:
    """Return the recipe in `mapping`; raise `RecipeError` with every fault in it."""
    reader = _RecipeReader()
    recipe = reader.recipe(mapping, text, folder)
    if reader.problems:
        raise RecipeError.of("cannot use the recipe", reader.problems)
    return recipe


class _RecipeReader(ValueReader):
    """Reads the levels of a recipe, from the top down."""

    def recipe(self, raw: object, text: str, folder: str | None) -> Recipe:
        place = Place()
        if not is_mapping(raw):
            message, advice = "a recipe is a mapping of keys to values", "give it as a mapping"
            self.problems.append(Problem("recipe", message, found=show(raw), advice=advice))
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
            text=text,
            folder=folder,
            warnings=tuple(self.warnings),
        )
        self.check_form(raw)
        return recipe

    def check_form(self, raw: Mapping[str, object]) -> None:
        """Exactly one of `models` and `slices` says what to merge."""
        given = [key for key in ("models", "slices") if raw.get(key)]
        if len(given) == 1 or (not given and raw.get("modules")):  # which is refused by name
            return
        found = " and ".join(f"`{key}`" for key in given) or "neither"
        message = "a recipe has exactly one of `models` and `slices`"
        advice = "list whole models under `models`, or runs of layers under `slices`"
        self.problems.append(Problem("recipe", message, found=found, advice=advice))

    def method(self, raw: Mapping[str, object], place: Place) -> str:
        method = raw.get("merge_method")
        if isinstance(method, str) and method:
            return method
        self.fault(
            place.key(raw, "merge_method"),
            "the name of a merge method is needed here",
            found="nothing" if method is None else method,
            advice="write `merge_method: linear`, say; `oxmerge methods` lists them",
        )
        return ""

    def tokenizer(self, raw: Mapping[str, object], place: Place) -> Tokenizer | None:
        """Read `tokenizer_source`, or `tokenizer` with everything that may be in it."""
        given = [key for key in ("tokenizer_source", "tokenizer") if raw.get(key) is not None]
        if not given:
            return None
        value, place = raw[given[0]], place.key(raw, given[0])
        if len(given) > 1:
            message = "`tokenizer_source` and `tokenizer` both say what the tokenizer is"
            self.fault(place, message, advice="leave one of them out")
            return None
        if given == ["tokenizer_source"]:
            source = self.reference_value(value, place)
            # As recipes for earlier versions of mergekit write it.
            return Tokenizer(str(place), source.removeprefix("model:")) if source else None
        if isinstance(value, str):
            message, name = "a mapping of keys to values is needed here", shorten(value)
            advice = f"write `tokenizer: {{source: {name}}}`, or `tokenizer_source: {name}`"
            self.fault(place, message, found=value, advice=advice)
            return None
        if not self.check_mapping(value, place, _TOKENIZER_KEYS):
            return None
        tokens = self.token_rows(value, place)
        multiple = self.multiple(value, place)
        source = self.reference(value, "source", place) if value.get("source") else "union"
        return Tokenizer(str(place), source, tokens, multiple) if source else None

    def multiple(self, raw: Mapping[str, object], place: Place) -> int | None:
        """Read `pad_to_multiple_of`."""
        value = raw.get("pad_to_multiple_of")
        if value is None or (type(value) is int and 1 <= value <= _MOST_ROWS):
            return value
        message = f"a whole number from 1 to {_MOST_ROWS} is needed here"
        place, advice = place.key(raw, "pad_to_multiple_of"), "write `pad_to_multiple_of: 64`, say"
        self.fault(place, message, found=value, advice=advice)
        return None

    def token_rows(self, raw: Mapping[str, object], place: Place) -> tuple[TokenRow, ...]:
        """Read `tokens`: from each token to what becomes of its row."""
        values = raw.get("tokens")
        if values is None:
            return ()
        place = place.key(raw, "tokens")
        if not is_mapping(values):
            message, advice = "a mapping from tokens is needed here", "write `<token>: {source: x}`"
            self.fault(place, message, found=values, advice=advice)
            return ()
        read = (
            self.token_row(token, value, place.key(values, token))
            for token, value in values.items()
        )
        return tuple(row for row in read if row is not None)

    def token_row(self, token: object, raw: object, place: Place) -> TokenRow | None:
        if not isinstance(token, str) or not token:
            self.fault(place, "a token is text", found=token, advice="put it in quotes")
            return None
        if not self.check_mapping(raw, place, _TOKEN_KEYS):
            return None
        force, source = raw.get("force", False), raw.get("source")
        if not isinstance(force, bool):
            message, advice = "true or false is needed here", "write `force: true`"
            self.fault(place.key(raw, "force"), message, found=force, advice=advice)
            return None
        if source is None:
            return TokenRow(str(place), token, force=force)
        place = place.key(raw, "source")
        if is_mapping(source) and "kind" in source:
            return self.token_of_kind(token, source, place, force=force)
        model = self.reference_value(source, place)
        return TokenRow(str(place), token, "model", model, force=force) if model else None

    def token_of_kind(
        self, token: str, raw: Mapping[str, object], place: Place, *, force: bool
    ) -> TokenRow | None:
        """Read ``{kind: zero}``, or ``{kind: model_token, model: path, token: text}``."""
        if raw["kind"] == "zero":
            self.check_keys(raw, place, frozenset(("kind",)))
            return TokenRow(str(place), token, "zero", force=force)
        if raw["kind"] != "model_token":
            message, advice = "unknown kind of row", "write `zero` or `model_token`"
            self.fault(place.key(raw, "kind"), message, found=raw["kind"], advice=advice)
            return None
        self.check_keys(raw, place, _MODEL_TOKEN_KEYS)
        given = [raw[key] for key in ("token", "token_id") if raw.get(key) is not None]
        model = self.reference(raw, "model", place)
        of = given[0] if len(given) == 1 else None
        is_row = raw.get("token_id") is not None and type(of) is int and 0 <= of < _MOST_ROWS
        if model is None or not (is_row or (raw.get("token") is not None and isinstance(of, str))):
            message = "a model, and a token of it or the number of its row, are needed here"
            advice = "write `{kind: model_token, model: path, token: text}`"
            self.fault(place, message, advice=advice)
            return None
        return TokenRow(str(place), token, "row", model, of, force)  # type: ignore[arg-type]

    def chat_template(self, raw: Mapping[str, object], place: Place) -> Template | None:
        """Read `chat_template`."""
        value = raw.get("chat_template")
        if value is None:
            return None
        place = place.key(raw, "chat_template")
        if isinstance(value, str) and value:
            return Template(str(place), value)
        message, advice = "a chat template is text", "write `chat_template: auto`, or leave it out"
        self.fault(place, message, found=value, advice=advice)
        return None

    def model(self, raw: object, place: Place) -> Source | None:
        return self.source(raw, place, _MODEL_KEYS)

    def slice(self, raw: object, place: Place) -> Slice | None:
        if not self.check_mapping(raw, place, _SLICE_KEYS):
            return None
        sources = self.items(raw, "sources", place, self.slice_source)
        if not raw.get("sources"):
            self.fault(
                place,
                "a slice needs `sources`",
                advice="list them: `sources: [{model: path, layer_range: [0, 8]}]`",
            )
        return Slice(
            where=str(place),
            sources=sources,
            base_model=self.reference(raw, "base_model", place),
            parameters=self.settings(raw, place),
        )

    def slice_source(self, raw: object, place: Place) -> Source | None:
        return self.source(raw, place, _SOURCE_KEYS)

    def source(self, raw: object, place: Place, keys: frozenset[str]) -> Source | None:
        if not self.check_mapping(raw, place, keys):
            return None
        layers = self.layer_range(raw, place) if "layer_range" in keys else None
        model = self.reference(raw, "model", place)
        if raw.get("model") is None:
            self.fault(place, "`model` is needed here", advice="write `model: path`")
        parameters = self.settings(raw, place)
        return None if model is None else Source(model, str(place), layers, parameters)
