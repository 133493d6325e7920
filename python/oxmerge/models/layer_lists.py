"""What a config says of each layer in lists: their forms, and how each follows moved layers.

A form is found by a key and its value, not by a list of architectures:

- *one entry a layer*: ``layer_types``, or a string with a letter a layer;
- *layer numbers*: ``mlp_only_layers``, from 0 or from 1, also as text (``"3,4,5"``);
- *keyed by layer numbers*: ``{"0": 3200, "5": 1600}``;
- *groups of layers*: ``kv_reuse_group``, in which the first of a group gives something to the rest;
- *the layer that gives*: ``kv_source_layers``, one entry a layer.

Layers after the ones that the config counts, which predict further tokens, may have entries too;
they go on following the others.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any, Protocol

    Config = Mapping[str, Any]
    Path = tuple[str, ...]
    #: The config of the model that an output layer comes from, and its number there.
    Origin = tuple[Config, int]

    class Form(Protocol):
        """A list of a known form."""

        @property
        def kind(self) -> object:
            """Return what two lists must have in common to be understood in one way."""

        def says(self, layer: int) -> object:
            """Return what it says of one layer."""

        def follow(self, said: Sequence[object], origins: Sequence[Origin]) -> object:
            """Return the list for other layers, of which `said` was said; None if it cannot be."""


__all__ = ["DEPTH_KEYS", "extra_layers", "is_other_model", "numbers_layers", "read_form", "values"]

#: What configs call their layer count.
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
#: What they call the layers beyond it.
_EXTRA_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules")
#: Lists that have nothing to do with layers, whatever their length.
_NEVER = frozenset((
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "id2label",
    "begin_suppress_tokens", "suppress_tokens", "bad_words_ids", "long_factor", "short_factor",
    "mrope_section", "label2id",
))  # fmt: skip
#: Strings with one letter a layer.
_LETTERS = re.compile(r"(^|_)(override_)?pattern$")
#: Lists that hold flags even where they could be read as layer numbers.
_FLAGS = frozenset(("no_rope_layers",))
#: Lists of layer numbers that begin with 1.
_FROM_ONE = frozenset(("full_attn_layers", "kda_layers"))
_ABOUT_LAYERS = re.compile(r"(^|_)(layers?|idxs?|index|indexes|indices|blocks?)(_|$)|^slstm_at$")
#: They number the layers of something else, or no layers.
_OF_OTHERS = re.compile(
    r"vision|visual|image|video|audio|speech|token|feature|norm|extract|deepstack|insert"
)
_GIVERS = re.compile(r"(^|_)(source|sources|reuse|shared?|sharing|from)(_|$)")
_ENUMERATED = re.compile(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*,?\s*")


def extra_layers(config: Config) -> int:
    """Return how many layers a config says there are besides the ones that it counts."""
    counts = (config.get(key) for key in _EXTRA_KEYS)
    return next((count for count in counts if type(count) is int and count > 0), 0)


def is_about_layers(key: str) -> bool:
    """Tell whether a key is by its name about single layers of the stack."""
    return _ABOUT_LAYERS.search(key) is not None and _OF_OTHERS.search(key) is None


def numbers_layers(key: str, value: object) -> bool:
    """Tell whether a value of no known form is about single layers all the same."""
    if not is_about_layers(key) or not value:
        return False
    return isinstance(value, list | dict) or (
        isinstance(value, str)
        and re.fullmatch(r"(?a:[\d\s,;:\-\[\]]*\d[\d\s,;:\-\[\]]*)", value) is not None
    )


def is_other_model(value: Config) -> bool:
    """Tell whether a nested config is of a model of its own, rather than a part of this one's."""
    return bool(value.get("model_type")) or any(
        key in value for key in (*DEPTH_KEYS, "hidden_size", "depth")
    )


def values(config: Config, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """Yield every list, string and mapping by numbers in a config and its parts.

    Other models' configs nested in it are left out.
    """
    for key, value in config.items():
        if isinstance(value, dict) and _is_numbered(value):
            yield (*path, key), value
        elif isinstance(value, dict) and not (key.endswith("_config") and is_other_model(value)):
            yield from values(value, (*path, key))
        elif isinstance(value, list | str):
            yield (*path, key), value


def _is_numbered(value: Config) -> bool:
    return bool(value) and all(re.fullmatch(r"(?a:\d{1,9})", key) for key in value)


def read_form(key: str, value: object, depth: int, extra: int = 0) -> Form | None:
    """Return the form in which a value speaks of each layer; None if it has none.

    Parameters
    ----------
    key : str
        Its key.
    value : object
        A list, a string or a mapping.
    depth : int
        How many layers the config counts.
    extra : int
        How many there are besides.
    """
    if key in _NEVER or depth < 1:
        return None
    if isinstance(value, dict):
        known = _is_numbered(value) and all(int(number) < depth + extra for number in value)
        return _Keyed(value, depth) if known else None
    if isinstance(value, str):
        if is_about_layers(key) and _ENUMERATED.fullmatch(value):
            listed = [int(number) for number in value.split(",") if number.strip()]
            return _read_numbers(key, listed, depth, extra, is_text=True)
        is_letters = _LETTERS.search(key) and len(value) in (depth, depth + extra)
        return _Entries(value, depth) if is_letters else None
    if not isinstance(value, list):
        return None
    return _read_list(key, value, depth, extra)


def _read_list(key: str, value: list[Any], depth: int, extra: int) -> Form | None:
    if _GIVERS.search(key) and _is_groups(value, depth):
        return _Groups({layer: layer - group[0] for group in value for layer in group})
    if is_about_layers(key) and key not in _FLAGS:
        if _GIVERS.search(key) and len(value) == depth and _are_givers(value):
            return _Givers(value)
        numbers = _read_numbers(key, value, depth, extra)
        if numbers is not None:
            return numbers
    return _Entries(value, depth) if len(value) in (depth, depth + extra) else None


def _read_numbers(
    key: str, listed: list[Any], depth: int, extra: int, *, is_text: bool = False
) -> _Numbers | None:
    if not all(type(number) is int for number in listed) or len(set(listed)) < len(listed):
        return None
    from_one = key in _FROM_ONE or (extra == 0 and depth in listed and 0 not in listed)
    first = int(from_one)
    if not all(first <= number < depth + extra + first for number in listed):
        return None
    # As long as the stack, it is one entry a layer, unless it plainly counts the layers.
    counts = is_text or key in _FROM_ONE or listed == list(range(depth))
    if len(listed) == depth and not counts:
        return None
    return _Numbers(frozenset(listed), depth, first, is_text=is_text)


def _is_groups(value: list[Any], depth: int) -> bool:
    """Tell whether a list is of lists of layers, none of which is listed twice."""
    if not value or not all(isinstance(group, list) and group for group in value):
        return False
    numbers = [number for group in value for number in group]
    fitting = all(type(number) is int and 0 <= number < depth for number in numbers)
    return fitting and len(set(numbers)) == len(numbers)


def _are_givers(value: list[Any]) -> bool:
    """Tell whether each entry is a layer at or before its own."""
    return all(type(entry) is int and 0 <= entry <= layer for layer, entry in enumerate(value))


@dataclass(frozen=True, slots=True)
class _Entries:
    """One entry a layer; entries of extra layers stay at the end."""

    listed: list[Any] | str
    depth: int

    @property
    def kind(self) -> object:
        return _Entries, type(self.listed)

    def says(self, layer: int) -> object:
        return self.listed[layer]

    def follow(self, said: Sequence[Any], origins: Sequence[Origin]) -> object:  # noqa: ARG002
        extra = self.listed[self.depth :]
        if isinstance(extra, str):
            return "".join(said) + extra
        return [*copy.deepcopy(list(said)), *extra]


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The numbers of those layers that are of a kind."""

    listed: frozenset[int]
    depth: int
    first: int
    is_text: bool

    @property
    def kind(self) -> object:
        return _Numbers, self.first

    def says(self, layer: int) -> object:
        return layer + self.first in self.listed

    def follow(self, said: Sequence[object], origins: Sequence[Origin]) -> object:  # noqa: ARG002
        numbers = [number + self.first for number, is_listed in enumerate(said) if is_listed]
        longer = len(said) - self.depth
        numbers += sorted(n + longer for n in self.listed if n >= self.depth + self.first)
        return ",".join(map(str, numbers)) if self.is_text else numbers


@dataclass(frozen=True, slots=True)
class _Keyed:
    """Values by the numbers of layers, not of all of them."""

    listed: Config
    depth: int

    @property
    def kind(self) -> object:
        return _Keyed

    def says(self, layer: int) -> object:
        return self.listed.get(str(layer))

    def follow(self, said: Sequence[object], origins: Sequence[Origin]) -> object:  # noqa: ARG002
        longer = len(said) - self.depth
        kept = {str(n): copy.deepcopy(value) for n, value in enumerate(said) if value is not None}
        extra = {int(n): value for n, value in self.listed.items() if int(n) >= self.depth}
        return kept | {str(n + longer): value for n, value in extra.items()}


class _Giving:
    """What tells how many layers before it the layer lies whose keys and values it uses."""

    @property
    def kind(self) -> object:
        return type(self)

    def takes_from(self, said: Sequence[Any], origins: Sequence[Origin]) -> list[int] | None:
        """Return the giver of each output layer, None if it is no longer where it was."""
        found = []
        for number, ((config, layer), back) in enumerate(zip(origins, said, strict=True)):
            giver = number - (back or 0)
            if giver < 0 or origins[giver][1] != layer - (back or 0):
                return None
            if origins[giver][0] is not config:
                return None
            found.append(giver)
        return found


@dataclass(frozen=True, slots=True)
class _Givers(_Giving):
    """The layer that gives, for each layer; its own number where it uses its own."""

    listed: list[int]

    def says(self, layer: int) -> object:
        return layer - self.listed[layer]

    def follow(self, said: Sequence[object], origins: Sequence[Origin]) -> object:
        return self.takes_from(said, origins)


@dataclass(frozen=True, slots=True)
class _Groups(_Giving):
    """Lists of layers, of which the first gives to the others; other layers are in no group."""

    backs: dict[int, int]

    def says(self, layer: int) -> object:
        return self.backs.get(layer)

    def follow(self, said: Sequence[object], origins: Sequence[Origin]) -> object:
        givers = self.takes_from(said, origins)
        if givers is None:
            return None
        groups: dict[int, list[int]] = {}
        for number, giver in enumerate(givers):
            if said[number] is not None:
                groups.setdefault(giver, []).append(number)
        return list(groups.values())
