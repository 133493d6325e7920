"""How an exception is told: plain text for people, data with `--json`."""

from __future__ import annotations

import errno
import re
import signal

from oxmerge.cli.arguments import UsageError
from oxmerge.cli.printer import DataUnwritten
from oxmerge.errors import OxmergeError, RecipeError, UnsupportedError
from oxmerge.problems import shown, without_hint
from oxmerge.signals import Ended

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oxmerge.cli.printer import Printer

DONE, FAILED, USAGE, ENDED = 0, 1, 2, 128

# The number that Rust puts behind the system's own words.
_RUST_NUMBER = re.compile(r" \(os error \d+\)")
_PARTS = ("file", "tensor", "expected", "found", "advice")
_HINTS = {
    errno.EEXIST: "name a new directory, or replace the model that is there with `--overwrite`",
    errno.ENOSPC: "free some space, or name a directory on another disk",
    errno.ENOTDIR: "a part of this path is a file: name another directory",
    errno.EACCES: "check the permissions of the file and of its folders",
    errno.EAGAIN: "allow more threads and processes (`ulimit -u`), or ask for fewer `--threads`",
    errno.ENOMEM: "allow more memory (`ulimit -v`), or ask for less `--memory`, fewer `--threads`",
    errno.EROFS: "the file system is read-only: name a directory on another one",
}


def exit_code(error: BaseException) -> int:
    """Return the exit code that an exception ends the program with."""
    if isinstance(error, KeyboardInterrupt):
        return ENDED + _signal(error)
    problems = getattr(error, "problems", ())
    if any(problem.is_in_recipe for problem in problems) or isinstance(error, UsageError):
        return USAGE
    # What is not supported may be of a recipe or of a checkpoint; then its problems tell.
    is_recipe = isinstance(error, RecipeError) and not isinstance(error, UnsupportedError)
    return USAGE if is_recipe else FAILED


def report(error: BaseException, printer: Printer) -> bool:
    """Tell about an exception; False for one that is a defect of the program."""
    if not isinstance(error, OxmergeError | OSError | UsageError | KeyboardInterrupt | MemoryError):
        return False
    if not printer.as_json:
        tell(error, printer)
        return True
    try:
        printer.json({"error": as_data(error)})
        printer.flush()
    except DataUnwritten:
        printer.close_output()
        tell(error, printer)
    return True


def tell(error: BaseException, printer: Printer) -> None:
    """Tell people about an exception, and before it what is odd besides."""
    odd, more = shown(getattr(error, "warnings", ()))
    printer.warnings([*odd, *filter(None, [more])])
    problems, more = shown(getattr(error, "problems", ()))
    stories = [without_hint(each) for each in problems]
    stories += [] if more is None else [(more, None)]
    headline = getattr(error, "message", "") if stories else _headline(error)
    advice = _HINTS.get(error.errno or 0) if isinstance(error, OSError) else None
    hints = [getattr(error, "advice", None) or advice, *_notes(error)]
    printer.error(headline, stories, filter(None, hints))


def as_data(error: BaseException) -> dict[str, Any]:
    """Return an exception as data, its parts kept apart and empty ones left out."""
    if isinstance(error, OxmergeError):
        parts = {name: getattr(error, name, None) for name in _PARTS}
        lists = {
            name: [problem.as_dict() for problem in getattr(error, name, ())]
            for name in ("problems", "warnings")
        }
        story = {"message": error.message, **parts, **lists}
    elif isinstance(error, OSError):
        story = {
            "message": error.strerror or str(error),
            "file": _text(error.filename),
            "errno": error.errno,
            "advice": _HINTS.get(error.errno or 0),
        }
    else:
        story = {"message": _headline(error), "advice": getattr(error, "advice", None)}
    story["notes"] = _notes(error)
    return {"kind": type(error).__name__, **{k: v for k, v in story.items() if v}}


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def _headline(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        number = _signal(error)
        return "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError):
        reason = _RUST_NUMBER.sub("", error.strerror or str(error))
        reason = reason[:1].lower() + reason[1:]
        return reason if error.filename is None else f"`{_text(error.filename)}`: {reason}"
    return without_hint(error)[0] if isinstance(error, OxmergeError) else str(error)


def _signal(interrupt: KeyboardInterrupt) -> signal.Signals:
    return interrupt.signal if isinstance(interrupt, Ended) else signal.SIGINT


def _text(name: object) -> str | None:
    if isinstance(name, bytes):
        return name.decode(errors="replace")
    return None if name is None else str(name)
