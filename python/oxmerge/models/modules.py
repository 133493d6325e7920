"""Modules of a model, such as the text and the vision part: which tensors are of which.

A recipe names them as mergekit does (``text_decoder``, ``vision_tower``, ``encoder``), or by what
the names of their tensors begin with or have in them. They are found among these names: a module is
what has its name, or what has a stack of layers of its kind. A name in full means what it names. Of
parts within each other a name means the outermost; where it fits several that are not, nothing is
chosen. Text that is found by its layers may have other kinds inside (``model.layers`` and
``model.vision_tower``): these are not of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from oxmerge.models.names import is_head, join

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from oxmerge.models.names import Layout

__all__ = ["Modules", "find_modules", "kind_of"]

_SEEN = re.compile(r"vis(ion|ual)|image|vit\b|patch")
_HEARD = re.compile(r"audio|speech|sound")
_READ = re.compile(r"language|text|llm")
#: What modules of a kind are called, whatever their tensors are.
_KINDS = (
    (frozenset(("default", "text_decoder", "text_model", "language_model", "text")), _READ),
    (frozenset(("vision_tower", "vision_model", "vision_encoder", "visual", "vision")), _SEEN),
    (frozenset(("audio_tower", "audio_encoder", "audio")), _HEARD),
)
#: What mergekit calls a part, and what the names of its tensors have (Qwen's VL models).
_ALSO_CALLED = {"multi_modal_projector": "merger"}


@dataclass(frozen=True, slots=True)
class Modules:
    """Modules of a model.

    Attributes
    ----------
    of : callable
        Returns which of them a tensor is of, by its name; None if it is of none. Two may have one
        root; the tensors are then of the first.
    roots : dict of str to list of str
        What the names of each one's tensors begin with: its root. None if the model does not have
        the module, several if it cannot be told which is meant.
    layout : Layout
        The model's stacks.
    """

    of: Callable[[str], str | None]
    roots: dict[str, list[str]]
    layout: Layout

    def has(self, module: str, prefix: str) -> bool:
        """Tell whether the layers of a stack are of a module."""
        return self.of(join(prefix, 0)) == module

    def stacks_of(self, module: str) -> list[str]:
        """Return the prefixes of the stacks that are of a module."""
        return [prefix for prefix in self.layout.stacks if self.has(module, prefix)]


def find_modules(wanted: Iterable[str], names: Iterable[str], layout: Layout) -> Modules:
    """Find modules of a model.

    Parameters
    ----------
    wanted : iterable of str
        What the recipe calls them.
    names : iterable of str
        The names of the model's tensors.
    layout : Layout
        Its stacks.
    """
    parts = {part for name in names for part in _beginnings(name)}
    roots = {module: _roots(module, parts, layout) for module in wanted}
    single = [(each[0], module) for module, each in roots.items() if len(each) == 1]
    found = sorted(single, key=lambda pair: len(pair[0]), reverse=True)
    root, text = next((pair for pair in single if _kind(pair[1]) is _READ), ("", None))
    apart: list[str] = []
    if text is not None and not f".{root}".endswith(f".{text}"):
        stacks = ((prefix, kind) for prefix in layout.stacks for kind in (_SEEN, _HEARD))
        apart = [_cut(prefix, kind) for prefix, kind in stacks if _is_of(prefix, kind)]

    def module_of(name: str) -> str | None:
        module = next((each for root, each in found if _is_in(name, root)), None)
        if module is None:
            return text if is_head(name) else None
        return None if module == text and any(_is_in(name, root) for root in apart) else module

    return Modules(module_of, roots, layout)


def _beginnings(name: str) -> Iterable[str]:
    """Yield everything that a name begins with, up to a dot."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


def _is_in(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def _roots(module: str, parts: set[str], layout: Layout) -> list[str]:
    """Return what the names of a module's tensors may begin with."""
    if module in parts:  # which is its name in full
        return [module]
    called = (module, _ALSO_CALLED.get(module, module))
    each = ({part for part in parts if f".{part}".endswith(f".{name}")} for name in called)
    if named := next(filter(None, each), None):
        within = (part for part in named if any(_is_in(part, root) for root in named - {part}))
        return sorted(named.difference(within))
    kind = _kind(module)
    if kind is None:
        return []
    of_kind = (_cut(prefix, kind) for prefix in layout.stacks if _is_of(prefix, kind))
    return list(dict.fromkeys(of_kind))


def kind_of(prefix: str) -> re.Pattern[str] | None:
    """Return what a name says that its part of a model takes besides text: pictures, sound."""
    return next((kind for kind in (_SEEN, _HEARD) if kind.search(prefix)), None)


def _kind(module: str) -> re.Pattern[str] | None:
    return next((pattern for aliases, pattern in _KINDS if module in aliases), None)


def _is_of(prefix: str, kind: re.Pattern[str]) -> bool:
    """Tell whether a stack is of a kind: text is what is neither seen nor heard."""
    if kind is _READ:
        return not _SEEN.search(prefix) and not _HEARD.search(prefix)
    return kind.search(prefix) is not None


def _cut(prefix: str, kind: re.Pattern[str]) -> str:
    """Return a stack's prefix up to the part that tells its kind, else without its last part."""
    parts = prefix.split(".")
    for at, part in enumerate(parts):
        if kind.search(part):
            return ".".join(parts[: at + 1])
    return ".".join(parts[:-1])
