"""Reading a recipe: every key checked at every level, every fault collected.

A key that the dialect does not know is a problem with a suggestion. One that it knows, but that has
no effect where it stands, is a warning that says where it would act. One that oxmerge does not do
yet is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from oxmerge.errors import RecipeError
from oxmerge.problems import Problem, did_you_mean
from oxmerge.recipe import Choice, Recipe, Setting, Slice, Source
from oxmerge.references import parse_reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeGuard, TypeVar

    from oxmerge.recipe import Scalar, Settings

    Item = TypeVar("Item")

__all__ = ["read_recipe"]

#: Every key of the dialect, and where it acts.
_ACTS_IN = {
    "merge_method": "at the top level",
    "models": "at the top level",
    "slices": "at the top level",
    "base_model": "at the top level or in a slice",
    "dtype": "at the top level",
    "out_dtype": "at the top level",
    "parameters": "at the top level, in a slice, a model or a source",
    "sources": "in a slice",
    "model": "in an entry of `models` or `sources`",
    "layer_range": "in a source of a slice",
    "filter": "in a conditional value",
    "value": "in a conditional value",
}
_NEVER_ACTS = {
    "residual_weight": "it is part of the dialect, but nothing ever used it",
    "name": "it names one merge of several in one file",
    "override_architecture": "names and shapes come from the files, not from an architecture",
}
_NOT_YET = {
    "modules": "merging the modules of a model apart",
    "tokenizer": "building a tokenizer",
    "tokenizer_source": "building a tokenizer",
    "chat_template": "setting a chat template",
}
_TOP_KEYS = frozenset(
    ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype")
)
_MODEL_KEYS = frozenset(("model", "parameters"))
_SLICE_KEYS = frozenset(("sources", "base_model", "parameters"))
_SOURCE_KEYS = frozenset(("model", "layer_range", "parameters"))
_CHOICE_KEYS = frozenset(("value", "filter"))

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_DTYPE_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
}


def read_recipe(
    mapping: Mapping[str, object], *, text: str | None = None, folder: str | None = None
) -> Recipe:
    """Return the recipe in `mapping`; raise `RecipeError` with every fault in it."""
    reader = _Reader()
    recipe = reader.recipe(mapping, text, folder)
    if reader.problems:
        raise RecipeError("cannot use the recipe", problems=reader.problems)
    return recipe


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in the recipe: its path, and its line where that is known."""

    path: str = ""
    line: int | None = None

    def key(self, mapping: object, key: object) -> _Place:
        """Return the place of a key of the mapping that stands here."""
        line = getattr(mapping, "lines", {}).get(key, self.line)
        return _Place(f"{self.path}.{key}" if self.path else str(key), line)

    def item(self, index: int) -> _Place:
        """Return the place of an item of the list that stands here."""
        return _Place(f"{self.path}[{index}]", self.line)

    def __str__(self) -> str:
        return self.path if self.line is None else f"{self.path} (line {self.line})"


class _Reader:
    """Reads the parts of a recipe, and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def fault(
        self,
        place: _Place,
        message: str,
        *,
        kind: str = "recipe",
        found: object = None,
        advice: str | None = None,
    ) -> None:
        text = None if found is None else _show(found)
        self.problems.append(Problem(kind, message, str(place), found=text, advice=advice))

    # The levels, from the top down.

    def recipe(self, raw: object, text: str | None, folder: str | None) -> Recipe:
        place = _Place()
        if not _is_mapping(raw):
            self.problems.append(
                Problem("recipe", "a recipe is a mapping of keys to values", found=_show(raw))
            )
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
            text=text,
            folder=folder,
            warnings=tuple(self.warnings),
        )
        self.check_form(raw)
        return recipe

    def check_form(self, raw: Mapping[str, object]) -> None:
        """Exactly one of `models` and `slices` says what to merge."""
        given = [key for key in ("models", "slices") if raw.get(key)]
        refused = [key for key in ("modules",) if raw.get(key)]
        if len(given) == 1 or (not given and refused):
            return
        found = " and ".join(f"`{key}`" for key in given) or "neither"
        message = "a recipe has exactly one of `models` and `slices`"
        self.problems.append(Problem("recipe", message, found=found))

    def method(self, raw: Mapping[str, object], place: _Place) -> str:
        method = raw.get("merge_method")
        if isinstance(method, str) and method:
            return method
        self.fault(
            place.key(raw, "merge_method"),
            "the name of a merge method is needed here",
            found="nothing" if method is None else method,
        )
        return ""

    def model(self, raw: object, place: _Place) -> Source | None:
        return self.source(raw, place, _MODEL_KEYS)

    def slice(self, raw: object, place: _Place) -> Slice | None:
        if not self.check_mapping(raw, place, _SLICE_KEYS):
            return None
        sources = self.items(raw, "sources", place, self.slice_source)
        if not raw.get("sources"):
            self.fault(place, "a slice needs `sources`")
        return Slice(
            where=str(place),
            sources=sources,
            base_model=self.reference(raw, "base_model", place),
            parameters=self.settings(raw, place),
        )

    def slice_source(self, raw: object, place: _Place) -> Source | None:
        return self.source(raw, place, _SOURCE_KEYS)

    def source(self, raw: object, place: _Place, keys: frozenset[str]) -> Source | None:
        if not self.check_mapping(raw, place, keys):
            return None
        layers = self.layer_range(raw, place) if "layer_range" in keys else None
        model = self.reference(raw, "model", place)
        if raw.get("model") is None:
            self.fault(place, "`model` is needed here")
        parameters = self.settings(raw, place)
        return None if model is None else Source(model, str(place), layers, parameters)

    # Keys.

    def check_mapping(
        self, raw: object, place: _Place, known: frozenset[str]
    ) -> TypeGuard[Mapping[str, object]]:
        if not _is_mapping(raw):
            self.fault(place, "a mapping of keys to values is needed here", found=raw)
            return False
        self.check_keys(raw, place, known)
        return True

    def check_keys(
        self,
        raw: Mapping[str, object],
        place: _Place,
        known: frozenset[str],
        *,
        later: bool = False,
    ) -> None:
        for key, value in raw.items():
            if key not in known:
                self.check_key(
                    key, value, place.key(raw, key), known | (set(_NOT_YET) if later else set())
                )

    def check_key(self, key: object, value: object, place: _Place, known: frozenset[str]) -> None:
        """Sort a key that is not read here: refused, without effect, or unknown."""
        if key in known:
            if value is not None:
                self.fault(
                    place, f"not supported yet: {_NOT_YET[str(key)]} (`{key}`)", kind="unsupported"
                )
        elif key in _NEVER_ACTS:
            self.no_effect(place, f"`{key}` has no effect", _NEVER_ACTS[str(key)])
        elif key in _ACTS_IN:
            self.no_effect(place, f"`{key}` has no effect here", f"it acts {_ACTS_IN[str(key)]}")
        else:
            advice = did_you_mean(str(key), known)
            keys = ", ".join(f"`{name}`" for name in sorted(known - set(_NOT_YET)))
            self.fault(place, f"unknown key `{key}`", advice=advice or f"known here: {keys}")

    def no_effect(self, place: _Place, message: str, advice: str) -> None:
        self.warnings.append(Problem("recipe", message, str(place), advice=advice))

    # Values.

    def items(
        self,
        raw: Mapping[str, object],
        key: str,
        place: _Place,
        read: Callable[[object, _Place], Item | None],
    ) -> tuple[Item, ...]:
        """Read each item of the list under `key`; those that cannot be read are left out."""
        listed = raw.get(key)
        if listed is None:
            return ()
        place = place.key(raw, key)
        if not isinstance(listed, list | tuple):
            self.fault(place, "a list is needed here", found=listed)
            return ()
        read_items = [
            read(item, _item_place(place, item, index)) for index, item in enumerate(listed)
        ]
        return tuple(item for item in read_items if item is not None)

    def reference(self, raw: Mapping[str, object], key: str, place: _Place) -> str | None:
        value = raw.get(key)
        return None if value is None else self.reference_value(value, place.key(raw, key))

    def reference_value(self, value: object, place: _Place) -> str | None:
        if _is_mapping(value):
            return self.reference_mapping(value, place)
        if not isinstance(value, str):
            advice = None if isinstance(value, list | tuple) else "put it in quotes"
            self.fault(place, "a model reference is text", found=value, advice=advice)
            return None
        parsed = parse_reference(value)
        if isinstance(parsed, str):
            return parsed
        self.fault(place, parsed.message, kind=parsed.kind, advice=parsed.advice)
        return None

    def reference_mapping(self, raw: Mapping[str, object], place: _Place) -> str | None:
        """Read the long form: ``{model: path or {path: ...}, lora: ..., ...}``."""
        long_form = "model" in raw
        self.check_keys(
            raw, place, frozenset(("model", "lora") if long_form else ("path", "revision"))
        )
        for key, what in (("lora", "a LoRA on a model"), ("revision", "a revision of a model")):
            if raw.get(key) is not None:
                self.fault(
                    place.key(raw, key), f"not supported yet: {what} (`{key}`)", kind="unsupported"
                )
        key = "model" if long_form else "path"
        if raw.get(key) is None:
            self.fault(place, "`model` is needed here")
        return self.reference(raw, key, place)

    def layer_range(self, raw: Mapping[str, object], place: _Place) -> tuple[int, int] | None:
        value, place = raw.get("layer_range"), place.key(raw, "layer_range")
        bounds = _whole_numbers(value)
        if len(bounds) != 2:  # noqa: PLR2004 - a start and an end
            self.fault(
                place,
                "two whole numbers are needed here: the first layer, and the one after the last",
                found="nothing" if value is None else value,
            )
            return None
        start, end = bounds
        if start < 0 or start >= end:
            rule = "layers count from 0" if start < 0 else "the end is the layer after the last"
            self.fault(
                place,
                "a range from a lower to a higher layer is needed here",
                found=value,
                advice=rule,
            )
            return None
        return start, end

    def dtype(self, raw: Mapping[str, object], key: str, place: _Place) -> str | None:
        value = raw.get(key)
        if value is None:
            return None
        name = str(value).removeprefix("torch.")
        if name not in _DTYPES:
            self.fault(
                place.key(raw, key),
                f"cannot write weights as `{value}`",
                advice=_dtype_advice(name),
            )
        return _DTYPES.get(name)

    # Parameters.

    def settings(self, raw: Mapping[str, object], place: _Place) -> Settings:
        values = raw.get("parameters")
        if values is None:
            return {}
        place = place.key(raw, "parameters")
        if not _is_mapping(values):
            self.fault(place, "a mapping of parameters to values is needed here", found=values)
            return {}
        return {
            str(name): Setting(
                str(place.key(values, name)), self.choices(value, place.key(values, name))
            )
            for name, value in values.items()
        }

    def choices(self, value: object, place: _Place) -> tuple[Choice, ...]:
        """Read a setting: a value, a gradient, a conditional, or a list of conditionals."""
        if _is_mapping(value):
            return self.conditionals([value], place)
        if not isinstance(value, list | tuple):
            return self.unconditional(value, place)
        if not any(map(_is_mapping, value)):
            return self.unconditional(value, place) if value else ()
        if all(map(_is_mapping, value)):
            return self.conditionals(value, place)
        self.fault(
            place,
            "values and conditional values cannot stand in one list",
            advice="write a value for all as `- value: ...`",
        )
        return ()

    def unconditional(self, value: object, place: _Place) -> tuple[Choice, ...]:
        return (Choice(self.values(value, place)),)

    def conditionals(
        self, items: list[object] | tuple[object, ...], place: _Place
    ) -> tuple[Choice, ...]:
        read = (self.conditional(item, place.item(index)) for index, item in enumerate(items))
        return tuple(choice for choice in read if choice is not None)

    def conditional(self, raw: object, place: _Place) -> Choice | None:
        if not self.check_mapping(raw, place, _CHOICE_KEYS):
            return None
        pattern = raw.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            self.fault(
                place.key(raw, "filter"), "a part of a tensor name is needed here", found=pattern
            )
            return None
        if raw.get("value") is None:
            self.fault(place, "`value` is needed here")
            return None
        values = self.values(raw["value"], place.key(raw, "value"))
        return Choice(values, None if pattern == "*" else pattern)

    def values(self, value: object, place: _Place) -> tuple[Scalar, ...]:
        points = value if isinstance(value, list | tuple) else (value,)
        for point in points:
            if not isinstance(point, bool | int | float | str):
                self.fault(
                    place,
                    "a number, a truth value or text is needed here",
                    found="nothing" if point is None else point,
                )
                return ()
        return tuple(points)


def _is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(value, Mapping)


def _item_place(place: _Place, item: object, index: int) -> _Place:
    """Return the place of a list item, on the line of its first key where that is known."""
    lines = getattr(item, "lines", None)
    return _Place(f"{place.path}[{index}]", min(lines.values()) if lines else place.line)


def _show(value: object) -> str:
    if isinstance(value, str):
        return value if value in ("nothing", "neither") else repr(value)
    text = repr(value) if not isinstance(value, Mapping) else "a mapping"
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004 - a line's worth


def _whole_numbers(value: object) -> list[int]:
    """Return the whole numbers that a list is made of; nothing if it is not."""
    items = value if isinstance(value, list | tuple) else ()
    if not all(type(item) is int or (type(item) is float and item.is_integer()) for item in items):
        return []
    return [int(item) for item in items]


def _dtype_advice(name: str) -> str:
    if name == "int64":
        return "whole numbers cannot hold weights; integer tensors keep their type anyway"
    alias = _DTYPE_ALIASES.get(name.lower())
    if alias is not None:
        return f"write `{alias}`"
    return did_you_mean(name, _DTYPES) or "write one of " + ", ".join(
        f"`{each}`" for each in _DTYPES
    )
