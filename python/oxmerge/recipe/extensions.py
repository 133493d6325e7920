"""Extensions: what stands under `oxmerge`, the one key of a recipe that other tools do not have."""

from __future__ import annotations

from oxmerge.recipe.keys import EXTENSION_KEYS, at_item, at_key, is_mapping
from oxmerge.recipe.patterns import Rename, check_pattern, check_rename
from oxmerge.recipe.recipe import UNREAD, Extensions, Keep, Renames, Setting
from oxmerge.recipe.values import ValueReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from oxmerge.problems import Place
    from oxmerge.recipe.recipe import Choice

__all__ = ["ExtensionReader"]

_RANGE_KEYS = frozenset(("from", "to"))


class ExtensionReader(ValueReader):
    """Reads what stands under `oxmerge`."""

    def extensions(self, raw: Mapping[str, object], place: Place) -> Extensions:
        """Read the extensions of a recipe, if it has any."""
        value, place = raw.get("oxmerge"), at_key(place, raw, "oxmerge")
        if value is None or not self.check_mapping(value, place, EXTENSION_KEYS):
            return Extensions()
        return Extensions(
            keep=tuple(self.keep(value, place)),
            on_mismatch=self.on_mismatch(value, place),
            layer_scale=self.layer_scale(value, place),
            rename=tuple(self.rename(value, place)),
        )

    def keep(self, raw: Mapping[str, object], place: Place) -> Iterator[Keep]:
        """Read the patterns of tensors that are kept, and the models that they are kept from."""
        listed, place = raw.get("keep"), at_key(place, raw, "keep")
        if listed is None:
            return
        if is_mapping(listed):
            for pattern, model in listed.items():
                where = at_key(place, listed, pattern)
                if self.is_pattern(pattern, where):
                    yield Keep(where, pattern, self.reference_value(model, where))
        elif isinstance(listed, list | tuple):
            for at, pattern in enumerate(listed):
                where = at_item(place, listed, at)
                if self.is_pattern(pattern, where):
                    yield Keep(where, pattern)
        else:
            message = "a list of patterns is needed here, or a mapping of patterns to models"
            advice = 'write `["vision_tower.*"]`, or `{"vision_tower.*": path}`'
            self.fault(place, message, found=listed, advice=advice)

    def is_pattern(self, value: object, place: Place) -> bool:
        """Tell whether a value can be a pattern of names, and report one that cannot."""
        fault = check_pattern(value)
        if fault is not None:
            message, advice = fault
            self.fault(place, message, found=value, advice=advice)
        return fault is None

    def on_mismatch(self, raw: Mapping[str, object], place: Place) -> Place | None:
        """Return where `on_mismatch: base` stands; None if tensors have to match."""
        value, place = raw.get("on_mismatch"), at_key(place, raw, "on_mismatch")
        if value not in (None, "error", "base"):
            message = "`on_mismatch` says `error` or `base`"
            advice = "write `base`: where a model lacks a tensor, the base's is taken"
            self.fault(place, message, found=value, advice=advice)
        return place if value == "base" else None

    def layer_scale(self, raw: Mapping[str, object], place: Place) -> Setting | None:
        """Read the factors by depth: a setting, or `{from, to}`."""
        value, place = raw.get("layer_scale"), at_key(place, raw, "layer_scale")
        if value is None:
            return None
        ends = is_mapping(value) and not _RANGE_KEYS.isdisjoint(value)
        choices = self.ends(value, place) if ends else self.choices(value, place)
        return Setting(place, choices)

    def ends(self, raw: object, place: Place) -> tuple[Choice, ...]:
        """Read the factors of the first layer and the last one."""
        if not self.check_mapping(raw, place, _RANGE_KEYS):
            return ()
        for key in sorted(_RANGE_KEYS - raw.keys()):
            if not self.is_misspelt(raw, key, _RANGE_KEYS):
                message, advice = f"`{key}` is needed here", "write `{from: 0.5, to: 1.0}`, say"
                self.fault(place, message, code="missing-key", advice=advice)
        return self.unconditional([raw[key] for key in ("from", "to") if key in raw], place)

    def rename(self, raw: Mapping[str, object], place: Place) -> Iterator[Renames]:
        """Read how the tensors of models are called."""
        models, place = raw.get("rename"), at_key(place, raw, "rename")
        if models is None:
            return
        if not is_mapping(models):
            message = "a mapping of models to names is needed here"
            advice = 'write `{path: {"transformer.*": "model.*"}}`'
            self.fault(place, message, found=models, advice=advice)
            return
        for model, names in models.items():
            where = at_key(place, models, model)
            reference = self.reference_value(model, where)
            if not is_mapping(names):
                message = "a mapping of names in this model to names in the donor is needed here"
                advice = 'write `{"transformer.*": "model.*"}`'
                self.fault(where, message, found=names, advice=advice)
            elif reference != UNREAD:
                rules = self.rules(names, where)
                yield Renames(where, reference, tuple(rules))

    def rules(self, names: Mapping[str, object], place: Place) -> Iterator[Rename]:
        """Read patterns of names and what becomes of them."""
        for pattern, name in names.items():
            where = at_key(place, names, pattern)
            fault = check_rename(pattern, name)
            if isinstance(pattern, str) and isinstance(name, str) and fault is None:
                yield Rename(pattern, name)
            elif fault is not None:
                message, advice = fault
                self.fault(where, message, found=name, advice=advice)
