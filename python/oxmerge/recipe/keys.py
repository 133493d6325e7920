"""Keys of a recipe: each is read, refused by name, without effect, or unknown.

A key that the dialect does not know is a problem with a suggestion. One that it knows, but that has
no effect where it stands, is a warning that says where it would act. One that oxmerge does not do
yet is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import Repr

from oxmerge.methods import DIALECT_PARAMETERS
from oxmerge.problems import UNSUPPORTED, Problem, did_you_mean, shorten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeGuard

__all__ = ["KeyReader", "Place", "is_mapping", "show", "show_key"]

#: Letters of a value that a message shows.
_SHOWN = 60

#: Every key of the dialect, and where it acts.
_ACTS_IN = {
    "merge_method": "at the top level",
    "models": "at the top level",
    "slices": "at the top level",
    "base_model": "at the top level or in a slice",
    "dtype": "at the top level",
    "out_dtype": "at the top level",
    "parameters": "at the top level, in a slice, a model or a source",
    "tokenizer": "at the top level",
    "tokenizer_source": "at the top level",
    "chat_template": "at the top level",
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
#: What is not done yet, and what to do instead.
NOT_YET = {
    "modules": ("merging the modules of a model apart", "list whole models under `models`"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the recipe: its path, and its line where that is known."""

    path: str = ""
    line: int | None = None

    def key(self, mapping: object, key: object) -> Place:
        """Return the place of a key of the mapping that stands here."""
        line = getattr(mapping, "lines", {}).get(key, self.line)
        name = show_key(key)
        return Place(f"{self.path}.{name}" if self.path else name, line)

    def item(self, index: int) -> Place:
        """Return the place of an item of the list that stands here."""
        return Place(f"{self.path}[{index}]", self.line)

    def __str__(self) -> str:
        return self.path if self.line is None else f"{self.path} (line {self.line})"


class KeyReader:
    """Checks the keys of mappings, and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def fault(
        self,
        place: Place,
        message: str,
        *,
        kind: str = "recipe",
        found: object = None,
        advice: str | None,
    ) -> None:
        """Take down that something at a place is wrong."""
        text = None if found is None else show(found)
        self.problems.append(Problem(kind, message, str(place), found=text, advice=advice))

    def check_mapping(
        self, raw: object, place: Place, known: frozenset[str]
    ) -> TypeGuard[Mapping[str, object]]:
        """Tell whether `raw` is a mapping, and check its keys if it is."""
        if not is_mapping(raw):
            message, advice = "a mapping of keys to values is needed here", "write `key: value`"
            if isinstance(raw, str) and "model" in known:
                advice = f"write `model: {shorten(raw)}`"
            self.fault(place, message, found=raw, advice=advice)
            return False
        self.check_keys(raw, place, known)
        return True

    def check_keys(
        self,
        raw: Mapping[str, object],
        place: Place,
        known: frozenset[str],
        *,
        later: bool = False,
    ) -> None:
        """Check each key that is not read; those refused by name only where `later` says."""
        for key, value in raw.items():
            if key not in known:
                self.check_key(
                    key, value, place.key(raw, key), known | (set(NOT_YET) if later else set())
                )

    def check_key(self, key: object, value: object, place: Place, known: frozenset[str]) -> None:
        """Sort a key that is not read here: refused, without effect, or unknown."""
        if key in known:
            if value is not None:
                what, advice = NOT_YET[str(key)]
                message = f"not supported yet: {what} (`{key}`)"
                self.fault(place, message, kind=UNSUPPORTED, advice=advice)
        elif key in _NEVER_ACTS:
            self.no_effect(place, f"`{key}` has no effect", _NEVER_ACTS[str(key)])
        elif key in _ACTS_IN:
            self.no_effect(place, f"`{key}` has no effect here", f"it acts {_ACTS_IN[str(key)]}")
        else:
            name = show_key(key)
            self.fault(place, f"unknown key `{name}`", advice=_key_advice(name, known))

    def no_effect(self, place: Place, message: str, advice: str) -> None:
        """Take down that something at a place has no effect."""
        self.warnings.append(Problem("recipe", message, str(place), advice=advice))


def _key_advice(key: str, known: frozenset[str]) -> str:
    if key in DIALECT_PARAMETERS and "parameters" in known:
        return "put it under `parameters`"
    keys = ", ".join(f"`{name}`" for name in sorted(known - set(NOT_YET)))
    return did_you_mean(key, known) or f"known here: {keys}"


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    """Tell whether a value is a mapping."""
    return isinstance(value, Mapping)


def show(value: object) -> str:
    """Return a value as messages show it, cut to a line's worth, however much it holds."""
    if isinstance(value, str):
        return value if value in ("nothing", "neither") else repr(shorten(value, _SHOWN))
    if isinstance(value, Mapping):
        return "a mapping"
    text = _Shown().repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def show_key(key: object) -> str:
    """Return a key as places and messages show it."""
    return shorten(key, _SHOWN) if isinstance(key, str) else show(key)


class _Shown(Repr):
    """The beginning of a value, of which no more is looked at than is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = _SHOWN

    def repr1(self, x: Any, level: int) -> str:  # noqa: ANN401 - any value at all
        return "{...}" if isinstance(x, Mapping) else super().repr1(x, level)

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002 - of the base class
        many = x.bit_length() > 4 * _SHOWN
        return f"a number of {int(x.bit_length() * 0.30103)} digits" if many else repr(x)
