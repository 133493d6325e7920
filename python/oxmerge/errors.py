"""Exceptions. One base, few classes; builtin ones where a builtin says it best.

Files that do not exist are `FileNotFoundError`, an output that exists is `FileExistsError`, a full
disk is an `OSError` with its number, and Ctrl-C is `KeyboardInterrupt`.
"""

from __future__ import annotations

from oxmerge.problems import UNSUPPORTED, Problem, group_problems, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypeVar

    T = TypeVar("T")

__all__ = [
    "CheckpointError",
    "DeviceError",
    "InputChangedError",
    "InternalError",
    "MemoryBudgetError",
    "OutputError",
    "OxmergeError",
    "PlanError",
    "RecipeError",
    "RemoteError",
    "UnsupportedError",
]


class OxmergeError(Exception):
    """Base of every error that is oxmerge's own.

    Parameters
    ----------
    message : str
        What went wrong; lower case, without place or advice.
    file, tensor, expected, found, advice : str, optional
        The parts of the story, kept apart as attributes of the same names.
    """

    def __init__(
        self,
        message: str = "",
        *,
        file: str | None = None,
        tensor: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        advice: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.tensor = tensor or None  # an array in memory need not have a name
        self.expected = expected
        self.found = found
        self.advice = advice

    def as_problem(self, code: str = "unreadable-checkpoint") -> Problem:
        """Return the same story as an entry of a report."""
        return Problem(
            code,
            self.message,
            file=self.file,
            tensor=self.tensor,
            expected=self.expected,
            found=self.found,
            advice=self.advice,
        )

    def __str__(self) -> str:
        """Return the message with its place, comparison and hint."""
        return str(self.as_problem())

    def __repr__(self) -> str:
        """Return the class and the whole story: of the arguments alone the reason would lack."""
        return f"{type(self).__name__}({str(self)!r})"


class ProblemsError(OxmergeError, ValueError):
    """Base of the errors that report several problems together.

    Parameters
    ----------
    message : str
        The headline.
    problems : iterable of Problem
        Every problem found. Without any, the error itself is the only one.
    warnings : iterable of Problem
        What is odd besides: it may be what the problems come of.
    file, tensor, expected, found, advice : str, optional
        As for `OxmergeError`.
    """

    def __init__(
        self,
        message: str = "",
        *,
        problems: Iterable[Problem] = (),
        warnings: Iterable[Problem] = (),
        file: str | None = None,
        tensor: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        advice: str | None = None,
    ) -> None:
        super().__init__(
            message, file=file, tensor=tensor, expected=expected, found=found, advice=advice
        )
        self.problems: tuple[Problem, ...] = tuple(problems)
        self.warnings: tuple[Problem, ...] = tuple(warnings)

    @classmethod
    def of(
        cls, message: str, problems: Iterable[Problem], warnings: Iterable[Problem] = ()
    ) -> ProblemsError:
        """Return the error for problems, grouped: `UnsupportedError` if nothing else is wrong."""
        problems = group_problems(problems)
        is_sound = problems and all(problem.code == UNSUPPORTED for problem in problems)
        kind = UnsupportedError if is_sound else cls
        return kind(message, problems=problems, warnings=group_problems(warnings))

    def __str__(self) -> str:
        """Return the headline and one entry for each problem, then for each warning."""
        if not self.problems:
            return super().__str__()
        if len(self.problems) == 1:
            entries = [f"{self.message}: {self.problems[0]}"]
        else:
            count = f"{self.message}: {len(self.problems)} problems"
            entries = [count, *_entries("- ", self.problems)]
        return "\n".join([*entries, *_entries("warning: ", self.warnings)])


def _entries(lead: str, problems: tuple[Problem, ...]) -> list[str]:
    told, more = shown(problems)
    entries = [f"{lead}{problem}".replace("\n", "\n  ") for problem in told]
    return entries if more is None else [*entries, more]


def all_of(calls: Iterable[Callable[[], T]]) -> list[T]:
    """Return what calls return, or raise one error with every problem that they find.

    It is the first one's, where only one call fails.
    """
    results: list[T] = []
    errors: list[ProblemsError] = []
    for call in calls:
        try:
            results.append(call())
        except ProblemsError as error:
            errors.append(error)
    if len(errors) > 1 and all(error.problems for error in errors):
        found = [problem for error in errors for problem in error.problems]
        odd = [warning for error in errors for warning in error.warnings]
        kind = next((type(e) for e in errors if not isinstance(e, UnsupportedError)), PlanError)
        raise kind.of(errors[0].message, found, odd) from errors[0].__cause__
    if errors:
        raise errors[0]
    return results


class RecipeError(ProblemsError):
    """A recipe that cannot be read: `problems` has every fault in it, and in what it names."""


class PlanError(ProblemsError):
    """A recipe that does not fit its checkpoints: `problems` has every fault that headers show."""


class CheckpointError(OxmergeError):
    """A checkpoint that is broken: its header, its index or its sizes."""


class UnsupportedError(RecipeError, PlanError, CheckpointError):
    """What is sound, but cannot be merged yet: in a recipe, a plan or a checkpoint.

    So it is what each of them raises, where nothing is wrong but that.
    """

    def as_problem(self, code: str = UNSUPPORTED) -> Problem:
        """Return the same story as an entry of a report."""
        return super().as_problem(code)


class MemoryBudgetError(OxmergeError):
    """The memory budget cannot hold the smallest step of the work."""


class DeviceError(OxmergeError):
    """A device cannot be used, or failed while it computed; `__cause__` has what torch said."""


class InputChangedError(OxmergeError):
    """An input file changed while the merge was reading it."""


class RemoteError(OxmergeError):
    """What is on the Hub or in a store cannot be found, may not be had, or does not come whole."""

    def as_problem(self, code: str = "unreachable-model") -> Problem:
        """Return the same story as an entry of a report."""
        return super().as_problem(code)


class InternalError(OxmergeError):
    """The engine broke a promise of its own: a bug in oxmerge."""


class OutputError(OxmergeError):
    """The output cannot be written where it was asked to go."""


class WaitsForOthersError(OutputError):
    """Other parts of a merge have not left in time what this one needs; its own is kept."""
