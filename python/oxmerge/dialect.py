"""The dialect: what a recipe's levels are made of. Every fault is collected."""

from __future__ import annotations

from oxmerge.errors import RecipeError
from oxmerge.keys import Place, is_mapping, show
from oxmerge.problems import Problem
from oxmerge.recipe import Recipe, Slice, Source
from oxmerge.values import ValueReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["read_recipe"]

_TOP_KEYS = frozenset(
    ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype")
)
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
        raise RecipeError("cannot use the recipe", problems=reader.problems)
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
