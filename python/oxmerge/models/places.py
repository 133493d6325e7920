"""Where a tensor is in its model: which layer, and which module of it."""

from __future__ import annotations

import re
from functools import lru_cache
from math import prod

from oxmerge.models.names import find_layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oxmerge._core import TensorInfo
    from oxmerge.models.inputs import InputModel
    from oxmerge.models.names import Layout

__all__ = ["LOOSE", "layout_of", "place_of", "size_of"]

#: What tensors outside of layers are in.
LOOSE = "outside of layers"
#: Fewer numbers than that are no stack of layers.
_LEAST_STACK = 2
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
#: Tensors of a layer whose modules are kept at hand.
_MOST_MODULES = 10_000
_KIND = re.compile(r"\.(weight|bias)$")


def size_of(tensor: TensorInfo) -> int:
    """Return the number of elements of a tensor."""
    return prod(tensor.shape)


def layout_of(model: InputModel) -> Layout:
    """Return the stacks of a model; without a config, whatever is numbered."""
    if model.config:
        return model.layout
    leads = [lead for lead, _, _ in model.runs]
    numbered = find_layout(leads, frozenset()).numbered.values()
    return find_layout(leads, frozenset(n for n in numbered if n >= _LEAST_STACK))


def place_of(name: str, layout: Layout) -> tuple[str, str]:
    """Return the layer that a tensor is in, and its module there.

    Numbers within a layer, as of experts, are ``*``, so that one module is in all layers.
    """
    place = layout.place(name)
    if place is None or place.is_extra:
        return LOOSE, _KIND.sub("", name)
    return f"{place.stack.prefix}.{place.layer}", _module(place.rest)


@lru_cache(_MOST_MODULES)
def _module(rest: str) -> str:
    """Return the module of a tensor, from its name within a layer, which other layers have too."""
    return _NUMBER.sub("*", _KIND.sub("", rest))
