"""Values of a recipe: references, ranges, types, and the settings of parameters."""

from __future__ import annotations

import os
import re

from oxmerge.models.references import parse_reference, with_revision
from oxmerge.problems import did_you_mean, near
from oxmerge.recipe.keys import KeyReader, at_item, at_key, is_mapping, show, show_key
from oxmerge.recipe.recipe import UNREAD, Choice, Setting
from oxmerge.schema import DTYPE_NAMES, FLOATS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeVar

    from oxmerge.problems import Place
    from oxmerge.recipe.recipe import Scalar, Settings

    Item = TypeVar("Item")

__all__ = ["ValueReader", "whole_number"]

_CHOICE_KEYS = frozenset(("value", "filter"))
_DTYPES = {DTYPE_NAMES[code]: code for code in FLOATS}
#: Other names of types, as torch and trainers have them.
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
_OF_FEW_BITS = re.compile(r"(float|fp|f|int|uint|i|u|nf|mxfp|nvfp)[48]($|\D)")
#: Quotes of typesetting, as word processors make them of those of YAML.
_QUOTES = frozenset(
    ("\u201c\u201d", "\u2018\u2019", "\u201e\u201c", "\u201d\u201d", "\u00ab\u00bb")
)
#: Stands for a setting that cannot be read, which is reported already.
_UNREAD_CHOICE = Choice((), is_read=False)
#: A whole number as text, of no more digits than any layer has.
_WHOLE = re.compile(r"-?\d{1,9}", re.ASCII)


class ValueReader(KeyReader):
    """Reads the values of a recipe."""

    def items(
        self,
        raw: Mapping[str, object],
        key: str,
        place: Place,
        read: Callable[[object, Place], Item],
    ) -> tuple[Item, ...]:
        """Read each item of the list under `key`."""
        listed = raw.get(key)
        if listed is None:
            return ()
        place = at_key(place, raw, key)
        if not isinstance(listed, list | tuple):
            self.fault(
                place, "a list is needed here", found=listed, advice="put `- ` before each entry"
            )
            return ()
        return tuple(read(item, at_item(place, listed, at)) for at, item in enumerate(listed))

    def reference(self, raw: Mapping[str, object], key: str, place: Place) -> str | None:
        """Read the model reference under `key`, if there is one; `UNREAD` after reporting it."""
        value = raw.get(key)
        return None if value is None else self.reference_value(value, at_key(place, raw, key))

    def reference_value(self, value: object, place: Place) -> str:
        """Read a model reference, in its short or its long form; `UNREAD` after reporting it."""
        if is_mapping(value):
            return self.reference_mapping(value, place)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            listed = isinstance(value, list | tuple)
            advice = "name one model" if listed else "put it in quotes"
            self.fault(place, "a model reference is text", found=value, advice=advice)
            return UNREAD
        if value[:1] + value[-1:] in _QUOTES:
            message = "these quotes are taken for a part of the name"
            advice = 'write `"` for them, or leave them out'
            self.fault(place, message, found=value, advice=advice)
            return UNREAD
        parsed = parse_reference(value)
        if isinstance(parsed, str):
            return parsed
        self.fault(place, parsed.message, code=parsed.code, advice=parsed.advice)
        return UNREAD

    def reference_mapping(self, raw: Mapping[str, object], place: Place) -> str:
        """Read the long form: ``{model: path or {path: ...}, lora: ..., ...}``."""
        long_form = "model" in raw
        self.check_keys(
            raw, place, frozenset(("model", "lora") if long_form else ("path", "revision"))
        )
        revision = raw.get("revision")
        if revision is not None and isinstance(raw.get("path"), str):
            if not isinstance(revision, str):
                advice = "put it in quotes"
                at = at_key(place, raw, "revision")
                self.fault(at, "a revision is text", found=revision, advice=advice)
                return UNREAD
            return self.reference_value(with_revision(str(raw["path"]), revision), place)
        key = "model" if long_form else "path"
        if raw.get(key) is None:
            message, advice = "`model` is needed here", "write `model: path`"
            self.fault(place, message, code="missing-key", advice=advice)
        model = self.reference(raw, key, place) or UNREAD
        if raw.get("lora") is None or model == UNREAD:
            return model
        adapter = self.reference(raw, "lora", place)
        return UNREAD if not adapter else f"{model}+{adapter}"

    def layer_range(self, raw: Mapping[str, object], place: Place) -> tuple[int, int] | None:
        """Read a source's first layer and the one after its last."""
        value, place = raw.get("layer_range"), at_key(place, raw, "layer_range")
        bounds = _whole_numbers(value)
        if len(bounds) != 2:  # noqa: PLR2004 - a start and an end
            self.fault(
                place,
                "two whole numbers are needed here: the first layer, and the one after the last",
                found=value,
                advice="write `layer_range: [0, 8]` for the first eight layers",
            )
            return None
        start, end = bounds
        if start < 0 or start > end:
            rule = "layers count from 0" if start < 0 else "the end is the layer after the last"
            self.fault(
                place,
                "a range from a lower to a higher layer is needed here",
                found=value,
                advice=rule,
            )
            return None
        return start, end

    def dtype(self, raw: Mapping[str, object], key: str, place: Place) -> str | None:
        """Read the element type under `key`, if there is one, as safetensors calls it."""
        value = raw.get(key)
        if value is None:
            return None
        place = at_key(place, raw, key)
        if value == "":
            self.is_empty(key, place)
            return None
        name = value.removeprefix("torch.").lower() if isinstance(value, str) else show(value)
        name = _DTYPE_ALIASES.get(name, name)
        if name not in _DTYPES:
            message, advice = f"cannot write weights as `{show_key(value)}`", _dtype_advice(name)
            self.fault(place, message, advice=advice)
        return _DTYPES.get(name)

    def is_empty(self, key: str, place: Place) -> None:
        """Take down that empty text stands for nothing, as forms write it."""
        self.no_effect(place, f"an empty `{key}` has no effect", "leave it out")

    # Parameters.

    def settings(self, raw: Mapping[str, object], place: Place) -> Settings:
        """Read the `parameters` of a level."""
        values = raw.get("parameters")
        if values is None:
            return {}
        place = at_key(place, raw, "parameters")
        if not is_mapping(values):
            message = "a mapping of parameters to values is needed here"
            self.fault(place, message, found=values, advice="write `weight: 0.5`, say")
            return {}
        settings: dict[str, Setting] = {}
        key = ""
        for name, value in values.items():
            where = at_key(place, values, name)
            begins, colon, _ = name.partition(":") if isinstance(name, str) else ("", "", "")
            if value is None and begins and colon:  # as `{t:0.5}`
                message = f"`{show_key(name)}` has no space behind its colon"
                self.fault(where, message, advice="write `key: value`")
                settings[begins] = Setting(where, (_UNREAD_CHOICE,))
            elif value is None and not isinstance(name, str):
                # YAML reads `{t: 0,5}` as `{t: 0, 5: null}`
                advice = "decimals have a point, not a comma"
                self.fault(where, f"`{name}` stands alone here", advice=advice)
                if key in settings:  # of which it is the rest
                    settings[key] = Setting(where, (_UNREAD_CHOICE,))
            else:
                key = name if isinstance(name, str) else show(name)
                settings[key] = Setting(where, self.choices(value, where))
        return settings

    def choices(self, value: object, place: Place) -> tuple[Choice, ...]:
        """Read a setting: a value, a gradient, a conditional, or a list of conditionals."""
        if is_mapping(value):
            if value and not any(near(str(key), _CHOICE_KEYS) for key in value):
                message = "values by part of a name are a list"
                name = show_key(next(iter(value)))
                advice = f"write `- {{filter: {name}, value: ...}}`, one below the other"
                self.fault(place, message, found=value, advice=advice)
                return (_UNREAD_CHOICE,)
            return (self.conditional(value, place),)
        if not isinstance(value, list | tuple):
            return self.unconditional(value, place)
        if not any(map(is_mapping, value)):
            return self.unconditional(value, place) if value else ()
        if all(map(is_mapping, value)):
            return self.conditionals(value, place)
        self.fault(
            place,
            "values and conditional values cannot stand in one list",
            advice="write a value for all as `- value: ...`",
        )
        return (_UNREAD_CHOICE,)

    def unconditional(self, value: object, place: Place) -> tuple[Choice, ...]:
        """Read a value or a gradient for every tensor."""
        values = self.values(value, place)
        return (_UNREAD_CHOICE if values is None else Choice(values),)

    def conditionals(self, items: Sequence[object], place: Place) -> tuple[Choice, ...]:
        """Read a list of ``{filter, value}``."""
        return tuple(
            self.conditional(item, at_item(place, items, at)) for at, item in enumerate(items)
        )

    def conditional(self, raw: object, place: Place) -> Choice:
        """Read one ``{filter, value}``."""
        if not self.check_mapping(raw, place, _CHOICE_KEYS):
            return _UNREAD_CHOICE
        pattern = raw.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            self.fault(
                at_key(place, raw, "filter"),
                "a part of a tensor name is needed here",
                found=pattern,
                advice="write `filter: mlp`, say",
            )
            return _UNREAD_CHOICE
        if self.is_misspelt(raw, "value", _CHOICE_KEYS):
            return _UNREAD_CHOICE
        if raw.get("value") is None:
            message, advice = "`value` is needed here", "write `value: 0.5`, say"
            self.fault(place, message, code="missing-key", advice=advice)
            return _UNREAD_CHOICE
        values = self.values(raw["value"], at_key(place, raw, "value"))
        if values is None:
            return _UNREAD_CHOICE
        return Choice(values, None if pattern == "*" else pattern)

    def values(self, value: object, place: Place) -> tuple[Scalar, ...] | None:
        """Read a value, or the points of a gradient; None after reporting one that is neither."""
        points = value if isinstance(value, list | tuple) else (value,)
        for point in points:
            if not isinstance(point, bool | int | float | str):
                self.fault(
                    place,
                    "a number, a truth value or text is needed here",
                    found=point,
                    advice="write one, or a list of them for a gradient over the layers",
                )
                return None
        return tuple(points)


def _whole_numbers(value: object) -> list[int]:
    """Return the whole numbers that a list is made of; nothing if it is not."""
    numbers = [whole_number(item) for item in value] if isinstance(value, list | tuple) else []
    return [] if None in numbers else numbers  # type: ignore[return-value]


def whole_number(value: object) -> int | None:
    """Return the whole number that a value is, perhaps as ``8.0`` or in quotes; None if it is not.

    Examples
    --------
    >>> whole_number("8"), whole_number(8.5)
    (8, None)
    """
    if isinstance(value, str):
        return int(value) if _WHOLE.fullmatch(value) else None
    return (
        int(value) if type(value) is int or (type(value) is float and value.is_integer()) else None
    )


def _dtype_advice(name: str) -> str:
    if name == "int64":
        return "whole numbers cannot hold weights; integer tensors keep their type anyway"
    if _OF_FEW_BITS.match(name):
        return "write `bfloat16`, and quantise the merged model afterwards"
    return did_you_mean(name, _DTYPES) or "write one of " + ", ".join(
        f"`{each}`" for each in _DTYPES
    )
