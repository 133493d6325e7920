"""Modules of a model, such as the text and the vision part: which tensors are of which.

A recipe names them as mergekit does (``text_decoder``, ``vision_tower``, ``encoder``), or by what
the names of their tensors begin with or have in them. They are found among these names: a module is
what has its name, or what has a stack of layers of its kind. A name that fits several parts means
the outermost one; where several are as far out, nothing is chosen.
"""

from __future__ import annotations

import re

from oxmerge.models.names import is_head

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from oxmerge.models.names import Layout

__all__ = ["find_modules"]

_SEEN = re.compile(r"vis(ion|ual)|image|vit\b|patch")
_HEARD = re.compile(r"audio|speech|sound")
_READ = re.compile(r"language|text|llm")
#: What modules of a kind are called, whatever their tensors are.
_KINDS = (
    (frozenset(("default", "text_decoder", "text_model", "language_model", "text")), _READ),
    (frozenset(("vision_tower", "vision_model", "vision_encoder", "visual", "vision")), _SEEN),
    (frozenset(("audio_tower", "audio_encoder", "audio")), _HEARD),
)


def find_modules(
    wanted: Iterable[str], names: Iterable[str], layout: Layout
) -> tuple[Callable[[str], str | None], dict[str, list[str]]]:
    """Find modules of a model.

    Parameters
    ----------
    wanted : iterable of str
        What the recipe calls them.
    names : iterable of str
        The names of the model's tensors.
    layout : Layout
        Its stacks.

    Returns
    -------
    function
        From the name of a tensor to the module it is of, or None.
    dict of str to list of str
        What the names of each module's tensors begin with: its root. None if the model does not
        have the module, several if it cannot be told which is meant. Two modules may have one root;
        the tensors are then of the first.
    """
    parts = {part for name in names for part in _beginnings(name)}
    roots = {module: _roots(module, parts, layout) for module in wanted}
    single = [(each[0], module) for module, each in roots.items() if len(each) == 1]
    text = next((module for _, module in single if _kind(module) is _READ), None)
    found = sorted(single, key=lambda pair: len(pair[0]), reverse=True)

    def module_of(name: str) -> str | None:
        for root, module in found:
            if not root or name == root or name.startswith(f"{root}."):
                return module
        return text if is_head(name) else None

    return module_of, roots


def _beginnings(name: str) -> Iterable[str]:
    """Yield everything that a name begins with, up to a dot."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


def _roots(module: str, parts: set[str], layout: Layout) -> list[str]:
    """Return what the names of a module's tensors may begin with."""
    named = [part for part in parts if f".{part}".endswith(f".{module}")]
    if named:
        least = min(part.count(".") for part in named)
        return sorted(part for part in named if part.count(".") == least)
    kind = _kind(module)
    if kind is None:
        return []
    of_kind = (_cut(prefix, kind) for prefix in layout.stacks if _is_of(prefix, kind))
    return list(dict.fromkeys(of_kind))


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
