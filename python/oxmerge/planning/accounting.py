"""Accounting: what became of every tensor of every model.

A tensor of an input is *merged* (it takes part in arithmetic), *copied* (its bytes go to the output
as they are), or *dropped*, which always has a reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

__all__ = ["ModelAccount", "Share", "compact_names", "runs"]

_NUMBER_PART = re.compile(r"[0-9]{1,9}")


class Share:
    """Some tensors of a model: how many, and which.

    Parameters
    ----------
    count : int
        How many.
    names : callable
        Returns their names in file order; called when they are asked for, since there may be many.
    """

    def __init__(self, count: int, names: Callable[[], Iterable[str]]) -> None:
        self._count = count
        self._names = names

    def __len__(self) -> int:
        """Return how many there are."""
        return self._count

    def __iter__(self) -> Iterator[str]:
        """Iterate over their names."""
        return iter(self._names())

    @cached_property
    def names(self) -> list[str]:
        """Their names, with runs of numbers folded."""
        return compact_names(self._names())


@dataclass(frozen=True, slots=True)
class ModelAccount:
    """What became of one model's tensors.

    Attributes
    ----------
    model : str
        The model, as the recipe writes it.
    merged : Share
        Those that take part in arithmetic.
    copied : Share
        Those that are copied bit for bit.
    dropped : dict of str to Share
        Those that do not get into the output, by reason.
    """

    model: str
    merged: Share
    copied: Share
    dropped: dict[str, Share]

    @property
    def total(self) -> int:
        """How many tensors the model has."""
        return len(self.merged) + len(self.copied) + self.dropped_count

    @property
    def dropped_count(self) -> int:
        """How many of them are dropped."""
        return sum(map(len, self.dropped.values()))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data, with runs of numbers in names folded."""
        return {
            "model": self.model,
            "tensors": self.total,
            "merged": self.merged.names,
            "copied": self.copied.names,
            "dropped": {reason: share.names for reason, share in self.dropped.items()},
        }

    def summary(self) -> Iterator[str]:
        """Yield lines: how many tensors, and which are dropped, unless that is all of them."""
        counts = {
            "merged": len(self.merged),
            "copied": len(self.copied),
            "dropped": self.dropped_count,
        }
        yield ", ".join(
            [
                f"{self.model}: {self.total} tensors",
                *(f"{count} {fate}" for fate, count in counts.items() if count),
            ]
        )
        for reason, share in self.dropped.items():
            yield f"  dropped: {reason} ({len(share)})"
            if len(share) < self.total:
                yield from (f"    {name}" for name in share.names)


def compact_names(names: Iterable[str]) -> list[str]:
    """Return names with runs of numbers folded: ``layers.{0..31}.mlp.weight``.

    Examples
    --------
    >>> compact_names(["h.0.w", "h.0.b", "h.1.w", "h.1.b", "head"])
    ['h.{0..1}.w', 'h.{0..1}.b', 'head']
    """
    rows = list(dict.fromkeys(tuple(name.split(".")) for name in names))
    deepest = max((len(row) for row in rows), default=0)
    for column in reversed(range(deepest)):
        rows = _fold_column(rows, column)
    return [".".join(row) for row in rows]


def _fold_column(rows: list[tuple[str, ...]], column: int) -> list[tuple[str, ...]]:
    """Fold rows that differ only in a number in that column into one, where the first stood."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        if len(row) > column and _NUMBER_PART.fullmatch(row[column]):
            key = (*row[:column], "", *row[column + 1 :])
            groups.setdefault(key, []).append(int(row[column]))
        else:
            groups.setdefault(row, [])
    return [
        (*key[:column], _ranges(numbers), *key[column + 1 :]) if numbers else key
        for key, numbers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs(numbers)) + "}"


def runs(numbers: Iterable[int]) -> list[list[int]]:
    """Return the first and the last of numbers that follow each other.

    Examples
    --------
    >>> runs([0, 1, 2, 5])
    [[0, 2], [5, 5]]
    """
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found
