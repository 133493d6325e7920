"""How much a nested value holds when what stands in it several times is counted each time.

By aliases, a few lines of YAML can stand for a value that no memory holds, or for one without an
end; and a mapping made in Python can be as large or as deep. Whatever takes such a value apart
would take as long. So it is measured once, in the time that its parts take, and refused.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    Parts = Callable[[Any], Iterable[Any] | None]

__all__ = ["MOST_VALUES", "TooMuch", "check_extent"]

#: More values than any recipe has.
MOST_VALUES = 100_000
#: More levels than any recipe has; what takes values apart later calls itself for each.
_DEEPEST = 64
#: More bits than a number has that fits float64.
_MOST_BITS = 1024


class TooMuch(ValueError):  # noqa: N818 - it becomes a problem of a report
    """A value that is no part of a recipe; `at` is where it was noticed, if anywhere."""

    def __init__(self, message: str, advice: str, at: object = None) -> None:
        super().__init__(message)
        self.advice = advice
        self.at = at


def check_extent(value: object, parts: Parts) -> None:
    """Check that a value has an end and holds no more than a recipe could.

    Parameters
    ----------
    value : object
        What is to be taken apart.
    parts : callable
        Returns the values in a value; None for one that holds no others.

    Raises
    ------
    TooMuch
        If it contains itself, is too deep, has a number without end, or stands for more values than
        a recipe has.
    """
    total, _ = _Extent(parts).measure(value, 0)
    if total > MOST_VALUES:
        message = f"it stands for more than {MOST_VALUES} values"
        raise TooMuch(message, "write out what is needed instead of referring to it many times")


class _Extent:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._open: set[int] = set()
        # With the values themselves, so that none is forgotten and another takes its identity.
        self._known: dict[int, tuple[object, int, int]] = {}

    def measure(self, value: object, depth: int) -> tuple[int, int]:
        """Return how many values there are, and how many levels."""
        inner = self._parts(value)
        if inner is None:
            _check_number(value)
            return 1, 0
        key = id(value)
        if key in self._open:
            raise TooMuch("a value contains itself", "write out what is meant", value)
        total, height = self._known[key][1:] if key in self._known else (0, 0)
        if depth + height >= _DEEPEST:
            raise TooMuch("nested too deeply", "write it flatter", value)
        if total == 0:
            self._open.add(key)
            found = [self.measure(part, depth + 1) for part in inner]
            self._open.remove(key)
            total = 1 + sum(count for count, _ in found)
            height = 1 + max((levels for _, levels in found), default=0)
            self._known[key] = value, total, height
        return total, height


def _check_number(value: object) -> None:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        digits = int(value.bit_length() * 0.30103)
        raise TooMuch(f"a number of about {digits} digits", "write one that fits float64")
