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
    from collections.abc import Iterable, Sequence

#: How many tensor names a grouped problem shows.
SHOWN_TENSORS = 3
#: How many problems a report shows.
SHOWN_PROBLEMS = 100
#: Letters of a name or a value that a message shows: a stranger may have written more.
_LONGEST_NAME = 120
_LONGEST_VALUE = 240
_LONGEST_MESSAGE = 800
_QUOTED = re.compile(f"`[^`]{{{_LONGEST_NAME + 1},}}`")
#: Letters that may tell a name of which they are a part.
_SHORTEST_PART = 4
#: Words that are compared closely with one that is not known.
_COMPARED = 200
#: Stands between a problem and what to do about it.
_HINT = "\n  hint: "
#: Controls of terminals, ends of lines, and what turns the direction of writing around.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
#: The kind of a problem that is no fault: it asks for what cannot be done yet.
UNSUPPORTED = "unsupported"
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
        message = shorten(_QUOTED.sub(_shortened, self.message), _LONGEST_MESSAGE)
        line = printable(self._place() + message + self._comparison() + self._others())
        return line if self.advice is None else line + _HINT + self.advice

    def _place(self) -> str:
        places = [f"{shorten(self.where, _LONGEST_VALUE)}: "] if self.where else []
        if self.file is not None:
            places.append(f"`{self.file}`: ")
        if self.tensor is not None and self.count == 1:
            places.append(f"tensor `{shorten(self.tensor)}`: ")
        return "".join(places)

    def _comparison(self) -> str:
        parts = (("expected", self.expected), ("found", self.found))
        text = ", ".join(
            f"{word} {shorten(value, _LONGEST_VALUE)}" for word, value in parts if value is not None
        )
        return f": {text}" if text else ""

    def _others(self) -> str:
        if self.count == 1:
            return ""
        names = ", ".join(f"`{shorten(name)}`" for name in self.tensors)
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


def shorten(text: str, most: int = _LONGEST_NAME) -> str:
    """Return text of so many letters at the most: the middle of a longer one is left out.

    Examples
    --------
    >>> shorten("model.layers.0.mlp.up_proj.weight", 20)
    'model.lay...j.weight'
    """
    if len(text) <= most:
        return text
    kept = most - 3
    return f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"


def _shortened(match: re.Match[str]) -> str:
    return f"`{shorten(match[0][1:-1])}`"


def shown(problems: Sequence[object]) -> tuple[list[object], str | None]:
    """Return the problems that a report shows, and how many more there are."""
    more = len(problems) - SHOWN_PROBLEMS
    return list(problems[:SHOWN_PROBLEMS]), f"and {more} more" if more > 0 else None


def _common_file(files: set[str | None]) -> str | None:
    """Return the file if there is one, or the folder that all files lie in, such as a model's."""
    if len(files) == 1:
        return files.pop()
    folders = {file and os.path.dirname(file) for file in files}
    return (folders.pop() or None) if len(folders) == 1 else None


def near(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return the known words that `word` was probably meant to be, the nearest first.

    Of many words, such as the tensors of a model, only those that begin and end most like it are
    compared closely.
    """
    from difflib import get_close_matches  # noqa: PLC0415 - needed only when something is wrong
    from heapq import nlargest  # noqa: PLC0415

    if len(word) > _LONGEST_VALUE:
        return []
    folded = {each.casefold(): each for each in sorted(known)}
    word = word.casefold()
    candidates = nlargest(_COMPARED, folded, key=lambda each: _ends_alike(word, each))
    matches = get_close_matches(word, sorted(candidates), n=most, cutoff=0.6)
    if not matches and len(word) >= _SHORTEST_PART:  # or it is a part of one
        matches = sorted((each for each in candidates if word in each), key=len)[:most]
    return [folded[match] for match in matches]


def _ends_alike(one: str, other: str) -> int:
    """Return how many letters two words have in common at their ends."""
    ends = (one, other), (one[::-1], other[::-1])
    return sum(len(os.path.commonprefix(pair)) for pair in ends)  # noqa: RUF071 - of letters


def did_you_mean(word: str, known: Iterable[str], most: int = 1) -> str | None:
    """Return the advice ``did you mean `x`?``, or None when nothing is close."""
    matches = " or ".join(f"`{shorten(printable(match))}`" for match in near(word, known, most))
    return f"did you mean {matches}?" if matches else None


def no_such_key(what: str, name: object, known: Iterable[str]) -> KeyError:
    """Return the error for a name that a mapping does not have, with those that are near it."""
    advice = did_you_mean(name, known, 3) if isinstance(name, str) else None
    text = printable(f"there is no {what} `{shorten(str(name))}`")
    return KeyError(f"{text}; {advice}" if advice else text)
