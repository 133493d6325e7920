"""Problems: what is wrong with a recipe or a checkpoint, kept in parts until someone prints it.

Checking goes on after the first problem, so that one report shows them all. The same fault in two
hundred tensors is one entry of that report, not two hundred.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: How many tensor names a grouped problem shows.
SHOWN_TENSORS = 3
#: Stands between a problem and what to do about it.
_HINT = "\n  hint: "
#: Controls of terminals, ends of lines, and what turns the direction of writing around.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
#: Kinds of problems that are mended in the recipe, also where they have no place in it.
_KINDS_OF_RECIPES = frozenset(("recipe", "method", "parameter", "contract", "model"))


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, or that has no effect.

    Attributes
    ----------
    kind : str
        What sort of thing: ``recipe``, ``parameter``, ``contract``, ``layers``, ``missing``, ...
    message : str
        Lower case, names in backticks, no full stop.
    where : str, optional
        The place in the recipe, such as ``models[1].parameters.weight (line 7)``.
    file : str, optional
        The file it is about.
    tensor : str, optional
        The tensor it is about; the first one where several share the problem.
    expected, found : str, optional
        What should have been there, and what was.
    advice : str, optional
        What to do about it.
    tensors : tuple of str
        The first few tensors, where several share the problem.
    count : int
        How many tensors share the problem.
    """

    kind: str
    message: str
    where: str | None = None
    file: str | None = None
    tensor: str | None = None
    expected: str | None = None
    found: str | None = None
    advice: str | None = None
    tensors: tuple[str, ...] = ()
    count: int = 1

    @property
    def is_in_recipe(self) -> bool:
        """Whether it is the recipe that is wrong, rather than a checkpoint."""
        return self.where is not None or self.kind in _KINDS_OF_RECIPES

    def __str__(self) -> str:
        """Return one line, and a second one with the hint if there is one."""
        line = printable(self._place() + self.message + self._comparison() + self._others())
        return line if self.advice is None else line + _HINT + self.advice

    def _place(self) -> str:
        places = [f"{self.where}: "] if self.where else []
        if self.file is not None:
            places.append(f"`{self.file}`: ")
        if self.tensor is not None and self.count == 1:
            places.append(f"tensor `{self.tensor}`: ")
        return "".join(places)

    def _comparison(self) -> str:
        parts = (("expected", self.expected), ("found", self.found))
        text = ", ".join(f"{word} {value}" for word, value in parts if value is not None)
        return f": {text}" if text else ""

    def _others(self) -> str:
        if self.count == 1:
            return ""
        names = ", ".join(f"`{name}`" for name in self.tensors)
        more = ", ..." if self.count > len(self.tensors) else ""
        return f" ({self.count} tensors: {names}{more})"


def without_hint(story: object) -> tuple[str, str | None]:
    """Return the text of a problem, or of an error, and its hint apart, if it has one."""
    text, _, hint = str(story).partition(_HINT)
    return text, hint or None


def group_problems(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Fold problems that differ only in tensor and file into one entry each.

    Parameters
    ----------
    problems : iterable of Problem
        In the order they were found, which the result keeps.

    Returns
    -------
    tuple of Problem
        One for each distinct fault, with a count and the first few tensors.
    """
    groups: dict[tuple[str | None, ...], list[Problem]] = {}
    for problem in problems:
        groups.setdefault(_group_key(problem), []).append(problem)
    return tuple(_fold(group) for group in groups.values())


def _group_key(problem: Problem) -> tuple[str | None, ...]:
    parts = (problem.expected, problem.found, problem.advice)
    return (problem.kind, problem.message, problem.where, *parts)


def _fold(group: list[Problem]) -> Problem:
    first = group[0]
    tensors = tuple(dict.fromkeys(each.tensor for each in group if each.tensor is not None))
    if len(tensors) <= 1:
        return first
    return replace(
        first,
        file=_common_file({each.file for each in group}),
        tensors=tensors[:SHOWN_TENSORS],
        count=len(tensors),
    )


def printable(text: str) -> str:
    """Return text with what would act on a terminal, as in a stranger's names, as escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _common_file(files: set[str | None]) -> str | None:
    """Return the file if there is one, or the folder that all files lie in, such as a model's."""
    if len(files) == 1:
        return files.pop()
    folders = {file and os.path.dirname(file) for file in files}
    return (folders.pop() or None) if len(folders) == 1 else None


def suggest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` was probably meant to be, if one is close."""
    from difflib import get_close_matches  # noqa: PLC0415 - needed only when something is wrong

    folded = {each.casefold(): each for each in sorted(known)}
    matches = get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return folded[matches[0]] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return the advice ``did you mean `x`?``, or None when nothing is close."""
    match = suggest(word, known)
    return None if match is None else f"did you mean `{match}`?"
