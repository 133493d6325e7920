"""Patterns of tensor names: `*` stands for any part of a name, dots included.

A name is renamed by a pair of patterns: what each `*` of the one stands for is put in for the same
`*` of the other. All patterns take time in proportion to a name, whoever wrote them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Rename", "check_pattern", "check_rename", "compile_pattern", "renamed"]

#: More `*` than any pattern needs; a matcher of many thousand takes long to make.
MOST_STARS = 16


@dataclass(frozen=True)
class Rename:
    """A pair of patterns.

    Attributes
    ----------
    pattern : str
        What names it is for, as a whole.
    name : str
        What they become, with as many `*`.

    Examples
    --------
    >>> Rename("h.*.attn.*", "model.layers.*.self_attn.*")("h.3.attn.q.weight")
    'model.layers.3.self_attn.q.weight'
    """

    pattern: str
    name: str

    @cached_property
    def _match(self) -> re.Pattern[str]:
        return compile_pattern(self.pattern)

    def __call__(self, name: str) -> str | None:
        """Return what a name becomes; None if it is not for that name."""
        found = self._match.fullmatch(name)
        if found is None:
            return None
        first, *others = self.name.split("*")
        return first + "".join(map("".join, zip(found.groups(), others, strict=True)))

    @property
    def reverse(self) -> Rename:
        """The pair that undoes it."""
        return Rename(self.name, self.pattern)

    def __str__(self) -> str:
        """Return it as messages show it."""
        return f"`{self.pattern}` as `{self.name}`"


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return an expression for whole names (`fullmatch`), with a group for each `*`."""
    first, *others = map(re.escape, pattern.split("*"))
    # Each part but the last is found where it comes first, and not looked for again.
    inner = "".join(f"(?>(.*?){part})" for part in others[:-1])
    return re.compile(first + inner + "".join(f"(.*){part}" for part in others[-1:]), re.DOTALL)


def check_pattern(pattern: object) -> tuple[str, str] | None:
    """Return what is wrong with a pattern, and what to do; None if it is sound."""
    if not isinstance(pattern, str) or not pattern:
        return "a pattern of tensor names is needed here", 'write `"vision_tower.*"`, say'
    if pattern.count("*") > MOST_STARS:
        return f"a pattern has at most {MOST_STARS} `*`", "one `*` stands for any part of a name"
    return None


def check_rename(pattern: object, name: object) -> tuple[str, str] | None:
    """Return what is wrong with a pair of patterns, and what to do; None if it is sound."""
    if not (isinstance(pattern, str) and isinstance(name, str) and pattern and name):
        return "a name in the donor is needed here", 'write `"transformer.*": "model.*"`, say'
    if pattern.count("*") != name.count("*"):
        message = f"`{pattern}` needs a name with as many `*`"
        return message, "put a `*` where each part of the name goes"
    return check_pattern(pattern)


def renamed(names: Iterable[str], rules: Sequence[Rename]) -> tuple[list[str], list[Rename]]:
    """Return what names become, each by the first rule that is for it, and the rules that acted."""
    acted = set()
    found = []
    for name in names:
        for rule in rules:
            new = rule(name)
            if new is not None:
                if new != name:
                    acted.add(rule)
                name = new  # noqa: PLW2901 - what it is called from here on
                break
        found.append(name)
    return found, [rule for rule in rules if rule in acted]
