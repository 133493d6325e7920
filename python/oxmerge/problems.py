"""Problems: what is wrong with a recipe or a checkpoint, kept in parts until someone prints it.

Checking goes on after the first problem: every stage, from the first key of a recipe to the last
shape, adds to one `Findings`. The same fault in two hundred tensors is one entry of its report.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass, field, replace
from math import inf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

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
#: The code of a problem that is no fault: it asks for what cannot be done yet.
UNSUPPORTED = "unsupported"
#: What problems are called, for scripts: a code never changes its meaning.
CODES = {
    "adapter": "an adapter is broken, not whole, or does not fit its model",
    "base-not-listed": "a slice does not list the base model",
    "config-differs": "two models say different things of themselves, but for their sizes",
    "config-size": "the config says another size than tensors have",
    "constant-tensor": "all elements of a tensor are the same",
    "config-layers": "the config says something of single layers that cannot follow them",
    "dropped-tensor": "the output lacks a tensor of an input",
    "duplicate-key": "a key is written twice",
    "duplicate-model": "a model is listed twice",
    "duplicate-tensor": "two tensors of the output would have one name",
    "equal-head": "a head is stored that equals the embedding",
    "equal-layers": "a layer is a copy of another",
    "ignored-head": "a head is stored that loaders do not use",
    "index-size": "an index says another size than its tensors have",
    "input-count": "the method takes more or fewer models",
    "layer-count": "models have not equally many layers",
    "layer-range": "a range of layers that its model does not have, or another length than others",
    "loose-tensor": "a tensor outside the layers could come before or after them",
    "missing-base": "the method needs a base model",
    "missing-config": "there is no config",
    "missing-head": "a model has no head of its own, the donor has one",
    "missing-key": "a key that is needed is not there",
    "missing-model": "there is no such model",
    "missing-parameter": "a parameter that is needed is not there",
    "missing-tensor": "a model lacks a tensor",
    "no-effect": "something acts on nothing",
    "no-layers": "a model has no stack of layers, or several",
    "not-a-recipe": "it is not a recipe",
    "odd-norm": "a tensor is far larger or smaller than those around it",
    "no-change": "a merge changes nothing",
    "non-finite": "a tensor has NaN or infinity",
    "odd-checkpoint": "a checkpoint is unusual",
    "other-architecture": "models are of different architectures",
    "other-size": "models of one architecture have other sizes",
    "output-differs": "an output is not what was made",
    "parameter-limits": "a parameter is outside its limits",
    "parameter-unusual": "a parameter has a value that it seldom has",
    "parameter-value": "a parameter has a value of another kind",
    "part-count": "a merge has more parts than its output has files",
    "pickle": "a file can run code when it is loaded",
    "remote-code": "a model comes with code",
    "side-file": "a file beside the weights cannot be copied",
    "stages": "the merges of one file do not fit each other",
    "tensor-dtype": "a tensor has another type than the donor's",
    "tensor-shape": "a tensor has another shape than the donor's",
    "tokenizer-differs": "tokenizers differ",
    "uneven-layers": "a layer is unlike all others",
    "unfit-formula": "the method cannot be computed so",
    "unknown-key": "a key that recipes do not have",
    "unknown-method": "there is no such method",
    "unknown-parameter": "a parameter that no method has",
    "unreachable-model": "a model on the Hub, or a file of it, cannot be had",
    "unreadable-checkpoint": "a checkpoint is broken, or cannot be read",
    "unread-file": "the system cannot read a file that is there",
    "unreadable-config": "a config or tokenizer cannot be read",
    UNSUPPORTED: "something that is sound, but not done yet",
    "vocabulary-rows": "a token has no row",
    "wrong-value": "a value of another kind stands where it is",
    "unsaved-tensor": "a tensor cannot be saved",
    "yaml": "it is not YAML",
}
#: Codes of problems that are mended in the recipe, also where they have no place in it.
_OF_RECIPES = frozenset((
    "input-count", "missing-base", "missing-model", "missing-parameter", "not-a-recipe",
    "parameter-limits", "parameter-value", "unfit-formula", "unknown-method", "wrong-value", "yaml",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a recipe.

    Attributes
    ----------
    path : str
        The keys and numbers of items that lead there, ``models[1].parameters.weight``; empty at the
        top.
    line, column : int, optional
        Where it stands in the text, from 1, if it was a text.
    file : str, optional
        The file it stands in, as it was named, if it was a file.
    """

    path: str = ""
    line: int | None = None
    column: int | None = None
    file: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """Return it for people, such as ``models[1].parameters.weight (recipe.yml:7:5)``."""
        if self.line is None:
            return self.path or self.file or ""
        at = f"line {self.line}"
        if self.file is not None:
            at = f"{self.file}:{self.line}" + (f":{self.column}" if self.column else "")
        return f"{self.path} ({at})" if self.path else at

    @property
    def in_text(self) -> str:
        """Return it without the file, such as ``models[1].parameters.weight (line 7)``."""
        return str(replace(self, file=None))


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, or that has no effect.

    Attributes
    ----------
    code : str
        What sort of thing, such as ``unknown-key``: one of `CODES`, for scripts.
    message : str
        Lower case, names in backticks, no full stop.
    where : Place, optional
        The place in the recipe.
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

    code: str
    message: str
    where: Place | None = None
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
        return self.where is not None or self.code in _OF_RECIPES

    def as_dict(self) -> dict[str, Any]:
        """Return its parts as data, without those that are empty.

        ``where``, ``line``, ``column`` and ``recipe`` are the parts of the place in the recipe;
        ``file`` is what it is about, be it the recipe or another file.
        """
        where = self.where or Place()
        parts = {
            "code": self.code,
            "message": self.message,
            "where": where.path,
            "line": where.line,
            "column": where.column,
            "recipe": where.file,
            "file": self.file or where.file,
            "tensor": self.tensor,
            "expected": self.expected,
            "found": self.found,
            "advice": self.advice,
            "tensors": list(self.tensors),
            "count": self.count,
        }
        return {name: value for name, value in parts.items() if value}

    def __str__(self) -> str:
        """Return one line, and a second one with the hint if there is one."""
        message = shorten(_QUOTED.sub(_shortened, self.message), _LONGEST_MESSAGE)
        line = printable(self._place() + message + self._comparison() + self._others())
        return line if self.advice is None else line + _HINT + self.advice

    def _place(self) -> str:
        where = str(self.where or "")
        places = [f"{shorten(where, _LONGEST_VALUE)}: "] if where else []
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


@dataclass(slots=True)
class Findings:
    """What the stages of a plan have found so far.

    Attributes
    ----------
    problems, warnings : list of Problem
        What is wrong, and what is odd but can be merged.
    ignore_unknown : bool
        Whether keys and parameters that are not known are odd only.
    """

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    ignore_unknown: bool = False

    def unknown(self, problem: Problem, *, is_corrected: bool) -> None:
        """Add a problem with a key or a parameter that is not known.

        Parameters
        ----------
        problem : Problem
            The problem.
        is_corrected : bool
            Whether its advice is what to write instead: then there is no need to ignore it.
        """
        if self.ignore_unknown:
            self.warnings.append(replace(problem, message=f"{problem.message}, which is ignored"))
        else:
            advice = problem.advice or ""
            if not is_corrected:
                advice += " (`--ignore-unknown` makes it a warning)"
            self.problems.append(replace(problem, advice=advice))


def without_hint(story: object) -> tuple[str, str | None]:
    """Return the text of a problem, or of an error, and its hint apart, if it has one."""
    text, _, hint = str(story).partition(_HINT)
    return text, hint or None


def group_problems(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Fold problems that differ only in tensor and file into one entry each, and sort them.

    Parameters
    ----------
    problems : iterable of Problem
        In the order they were found.

    Returns
    -------
    tuple of Problem
        One for each distinct fault, with a count and the first few tensors. Those with a line come
        first, in the order of lines, the others as they were found.
    """
    groups: dict[tuple[object, ...], list[Problem]] = {}
    for problem in problems:
        groups.setdefault(_group_key(problem), []).append(problem)
    return tuple(sorted(map(_fold, groups.values()), key=_line))


def _group_key(problem: Problem) -> tuple[object, ...]:
    parts = (problem.expected, problem.found, problem.advice)
    file = problem.file if problem.tensor is None else None
    return (problem.code, problem.message, problem.where, file, *parts)


def _line(problem: Problem) -> tuple[float, int]:
    where = problem.where
    return (inf, 0) if where is None or where.line is None else (where.line, where.column or 0)


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
