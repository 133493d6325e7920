"""The dialect: what a recipe's levels are made of.

Every fault is taken down, and what cannot be read has a stand-in, so that planning can go on to
what else is wrong.
"""

from __future__ import annotations

from dataclasses import replace

from oxmerge.problems import Findings, Place, Problem, shorten
from oxmerge.recipe.extensions import ExtensionReader
from oxmerge.recipe.keys import at_key, is_mapping, show_key
from oxmerge.recipe.recipe import (
    MOST_ROWS,
    UNREAD,
    Recipe,
    Slice,
    Source,
    Template,
    Tokenizer,
    TokenRow,
)
from oxmerge.recipe.values import whole_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["read_recipe"]

_TOP_KEYS = frozenset(
    (
        "merge_method",
        "models",
        "slices",
        "modules",
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
_TOKEN_KEYS = frozenset(("source", "force"))
_MODEL_TOKEN_KEYS = frozenset(("kind", "model", "token", "token_id"))
_MODULE_KEYS = frozenset(("models", "slices", "parameters"))
_MODEL_KEYS = frozenset(("model", "parameters"))
_SLICE_KEYS = frozenset(("sources", "base_model", "parameters"))
_SOURCE_KEYS = frozenset(("model", "layer_range", "parameters"))
#: How a flag may be written.
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
#: Stands for a module that cannot be read, which is reported already.
_UNREAD_MODULE: dict[str, object] = {}
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
        {"layer_slices"},
        "for `bakllama`, which stacks layers",
        "write `slices: [{sources: [{model: path, layer_range: [0, 8]}]}]` for them",
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
    (
        {"peft_type"},
        "the config of an adapter",
        "name the adapter's folder behind its model: `model: base+adapter`",
    ),
    (
        {"model_type", "architectures"},
        "the config of a model",
        "name the model's folder in a recipe: `models: [{model: path}]`",
    ),
)


def read_recipe(
    mapping: Mapping[str, object],
    findings: Findings,
    *,
    text: str = "",
    folder: str | None = None,
    file: str | None = None,
    in_stages: bool = False,
) -> Recipe:
    """Return the recipe in `mapping`, as far as it can be read; the faults go to `findings`.

    `in_stages` says that it is one of several merges, which have names.
    """
    known = Findings(findings.problems, ignore_unknown=findings.ignore_unknown)
    recipe = _RecipeReader(known).recipe(mapping, Place(file=file), in_stages=in_stages)
    return replace(recipe, text=text, folder=folder, warnings=tuple(known.warnings))


class _RecipeReader(ExtensionReader):
    """Reads the levels of a recipe, from the top down."""

    def recipe(self, raw: object, place: Place, *, in_stages: bool) -> Recipe:
        if not is_mapping(raw):
            message, advice = "a recipe is a mapping of keys to values", "give it as a mapping"
            self.fault(place, message, code="not-a-recipe", found=raw, advice=advice)
            return Recipe("")
        other = _other_tool(raw)
        if other is not None:
            message, advice = other
            self.fault(place, message, code="not-a-recipe", advice=advice)
            return Recipe("")
        for key, value in raw.items() if "merge_method" not in raw else ():
            if key not in _TOP_KEYS and is_mapping(value) and "merge_method" in value:
                message = f"the recipe stands below `{show_key(key)}`"
                advice = "take that line out, and write the others without their indent"
                self.fault(at_key(place, raw, key), message, code="unknown-key", advice=advice)
                return Recipe("")
        known = _TOP_KEYS | {"name"} if in_stages else _TOP_KEYS
        self.check_keys(raw, place, known)
        whole, at = self.whole(raw, place)
        recipe = Recipe(
            method=self.method(raw, place),
            models=self.items(whole, "models", at, self.model),
            slices=self.items(whole, "slices", at, self.slice),
            modules=self.modules(raw, place) if whole is raw else (),
            module_parameters={} if whole is raw else self.settings(whole, at),
            base_model=self.reference(raw, "base_model", place),
            parameters=self.settings(raw, place),
            dtype=self.dtype(raw, "dtype", place),
            out_dtype=self.dtype(raw, "out_dtype", place),
            tokenizer=self.tokenizer(raw, place),
            chat_template=self.chat_template(raw, place),
            extensions=self.extensions(raw, place),
            places={key: at_key(place, raw, key) for key in raw if key in known},
            name=self.name(raw, place) if in_stages else None,
        )
        self.check_form(raw, whole, at)
        return recipe

    def whole(self, raw: Mapping[str, object], place: Place) -> tuple[Mapping[str, object], Place]:
        """Return what has `models` or `slices` of all of the model, and where it stands.

        That is the recipe, or its only module, if that is called `default`.
        """
        modules = raw.get("modules")
        if not modules or raw.get("models") or raw.get("slices"):
            return raw, place
        at = at_key(place, raw, "modules")
        if not is_mapping(modules):
            message, advice = "a mapping of names to modules is needed here", "write `default: ...`"
            self.fault(at, message, found=modules, advice=advice)
            return _UNREAD_MODULE, at
        if modules.keys() != {"default"}:
            return raw, place
        module, at = modules["default"], at_key(at, modules, "default")
        if not self.check_mapping(module, at, _MODULE_KEYS):
            return _UNREAD_MODULE, at
        return module, at

    def modules(self, raw: Mapping[str, object], place: Place) -> tuple[Slice, ...]:
        """Read the modules that are merged apart."""
        modules = raw.get("modules")
        if not is_mapping(modules) or raw.get("models") or raw.get("slices"):
            return ()
        place = at_key(place, raw, "modules")
        return tuple(
            part
            for name, module in modules.items()
            for part in self.one_of_modules(name, module, at_key(place, modules, name))
        )

    def one_of_modules(self, name: object, raw: object, place: Place) -> tuple[Slice, ...]:
        """Read a module: whole models as one part, or each slice as one."""
        if not isinstance(name, str) or not name:
            message, advice = "the name of a module is text", "write `text_decoder: ...`, say"
            self.fault(place, message, found=name, advice=advice)
            return ()
        if not self.check_mapping(raw, place, _MODULE_KEYS):
            return ()
        self.check_form({}, raw, place)
        settings = self.settings(raw, place)
        models = self.items(raw, "models", place, self.model)
        slices = self.items(raw, "slices", place, self.slice)
        if not slices:
            return (Slice(place, models, None, settings, name),)
        return tuple(replace(part, module=name, module_parameters=settings) for part in slices)

    def name(self, raw: Mapping[str, object], place: Place) -> str | None:
        """Read what later merges call the output."""
        name = raw.get("name")
        is_text = isinstance(name, str) and name and not {"+", "@"} & set(name)
        if name is None or is_text:
            return name  # type: ignore[return-value]
        message, advice = "a name is text without `+` and `@`", "write `name: first`, say"
        self.fault(at_key(place, raw, "name"), message, found=name, advice=advice)
        return None

    def check_form(
        self, raw: Mapping[str, object], whole: Mapping[str, object], place: Place
    ) -> None:
        """Exactly one of `models`, `slices` and `modules` says what to merge."""
        keys = ["models", "slices", "modules"] if whole is raw else ["models", "slices"]
        given = [f"`{key}`" for key in keys if whole.get(key)]
        if len(given) == 1 or whole is _UNREAD_MODULE:  # which is reported
            return
        known = _TOP_KEYS if whole is raw else _MODULE_KEYS
        if not given and any(self.is_misspelt(whole, key, known) for key in keys):
            return
        empty = [f"an empty `{key}`" for key in keys if key in whole]
        found = " and ".join(given or empty) or "none of them"
        message = "a module has exactly one of `models` and `slices`"
        advice = "list whole models under `models`, or runs of layers under `slices`"
        if whole is raw:
            message = "a recipe has exactly one of `models`, `slices` and `modules`"
            advice += ", or parts of the model under `modules`"
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
            found=method,
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
        tokens = self.token_rows(value, place)
        multiple = self.multiple(value, place)
        source = self.reference(value, "source", place) if value.get("source") else "union"
        return Tokenizer(place, source, tokens, multiple) if source else None

    def multiple(self, raw: Mapping[str, object], place: Place) -> int | None:
        """Read `pad_to_multiple_of`."""
        value = raw.get("pad_to_multiple_of")
        if value is None:
            return None
        multiple = whole_number(value)
        if multiple is not None and 1 <= multiple <= MOST_ROWS:
            return multiple
        message = f"a whole number from 1 to {MOST_ROWS} is needed here"
        place, advice = (
            at_key(place, raw, "pad_to_multiple_of"),
            "write `pad_to_multiple_of: 64`, say",
        )
        self.fault(place, message, found=value, advice=advice)
        return None

    def token_rows(self, raw: Mapping[str, object], place: Place) -> tuple[TokenRow, ...]:
        """Read `tokens`: from each token to what becomes of its row."""
        values = raw.get("tokens")
        if values is None:
            return ()
        place = at_key(place, raw, "tokens")
        if not is_mapping(values):
            message, advice = "a mapping from tokens is needed here", "write `<token>: {source: x}`"
            self.fault(place, message, found=values, advice=advice)
            return ()
        read = (
            self.token_row(token, value, at_key(place, values, token))
            for token, value in values.items()
        )
        return tuple(row for row in read if row is not None)

    def token_row(self, token: object, raw: object, place: Place) -> TokenRow | None:
        if not isinstance(token, str) or not token:
            self.fault(place, "a token is text", found=token, advice="put it in quotes")
            return None
        if not self.check_mapping(raw, place, _TOKEN_KEYS):
            return None
        force, source = _FLAGS.get(str(raw.get("force", False)).lower()), raw.get("source")
        if force is None:
            message, advice = "true or false is needed here", "write `force: true`"
            self.fault(at_key(place, raw, "force"), message, found=raw["force"], advice=advice)
            return None
        if source is None:
            return TokenRow(place, token, force=force)
        place = at_key(place, raw, "source")
        if is_mapping(source) and "kind" in source:
            return self.token_of_kind(token, source, place, force=force)
        model = self.reference_value(source, place)
        return TokenRow(place, token, "model", model, force=force) if model else None

    def token_of_kind(
        self, token: str, raw: Mapping[str, object], place: Place, *, force: bool
    ) -> TokenRow | None:
        """Read ``{kind: zero}``, or ``{kind: model_token, model: path, token: text}``."""
        if raw["kind"] == "zero":
            self.check_keys(raw, place, frozenset(("kind",)))
            return TokenRow(place, token, "zero", force=force)
        if raw["kind"] != "model_token":
            message, advice = "unknown kind of row", "write `zero` or `model_token`"
            self.fault(at_key(place, raw, "kind"), message, found=raw["kind"], advice=advice)
            return None
        self.check_keys(raw, place, _MODEL_TOKEN_KEYS)
        given = [raw[key] for key in ("token", "token_id") if raw.get(key) is not None]
        model = self.reference(raw, "model", place)
        of = given[0] if len(given) == 1 else None
        if raw.get("token_id") is not None:
            of = whole_number(of)
        is_row = isinstance(of, int) and 0 <= of < MOST_ROWS
        if model is None or not (is_row or (raw.get("token") is not None and isinstance(of, str))):
            message = "a model, and a token of it or the number of its row, are needed here"
            advice = "write `{kind: model_token, model: path, token: text}`"
            self.fault(place, message, advice=advice)
            return None
        return TokenRow(place, token, "row", model, of, force)  # type: ignore[arg-type]

    def chat_template(self, raw: Mapping[str, object], place: Place) -> Template | None:
        """Read `chat_template`."""
        value = raw.get("chat_template")
        if value is None:
            return None
        place = at_key(place, raw, "chat_template")
        if value == "":
            self.is_empty("chat_template", place)
            return None
        if isinstance(value, str):
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
        if not raw.get("sources") and not self.is_misspelt(raw, "sources", _SLICE_KEYS):
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
            is_run=True,
        )

    def slice_source(self, raw: object, place: Place) -> Source:
        return self.source(raw, place, _SOURCE_KEYS)

    def source(self, raw: object, place: Place, keys: frozenset[str]) -> Source:
        if not self.check_mapping(raw, place, keys):
            return Source(UNREAD, place)
        has_layers = "layer_range" in keys and not self.is_misspelt(raw, "layer_range", keys)
        layers = self.layer_range(raw, place) if has_layers else None
        model = self.reference(raw, "model", place)
        if raw.get("model") is None and not self.is_misspelt(raw, "model", keys):
            message, advice = "`model` is needed here", "write `model: path`"
            if raw.keys() == {"parameters"}:
                advice = "take out its dash, if it belongs to the model above"
            self.fault(place, message, code="missing-key", advice=advice)
        return Source(model or UNREAD, place, layers, self.settings(raw, place))


def _other_tool(raw: Mapping[str, object]) -> tuple[str, str] | None:
    """Return what a file is that is no recipe for merging weights, and what to do."""
    if "merge_method" in raw and not raw.keys().isdisjoint(("models", "slices", "modules")):
        return None
    for keys, what, advice in _OTHER_TOOLS:
        if keys <= raw.keys():
            return f"this file is {what}, not a recipe for merging weights", advice
    return None
