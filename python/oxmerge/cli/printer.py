"""Where output goes: data to standard output, words for people to standard error."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any, TextIO

_COLOURS = {"error": "31;1", "warning": "33;1", "hint": "36"}


class Printer:
    """The two streams of the command line.

    Parameters
    ----------
    quiet
        Say nothing to people but errors.
    as_json
        Data is asked for as JSON.
    output, messages
        The streams; those of the process when None.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        as_json: bool = False,
        output: TextIO | None = None,
        messages: TextIO | None = None,
    ) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self.output = output or sys.stdout
        self.messages = messages or sys.stderr

    @property
    def is_terminal(self) -> bool:
        """Whether a person watches the messages as they come."""
        return self.messages.isatty() and os.environ.get("TERM") != "dumb"

    @property
    def has_colour(self) -> bool:
        """Whether messages may be coloured."""
        return self.is_terminal and not os.environ.get("NO_COLOR")

    def data(self, text: str) -> None:
        """Print what was asked for."""
        self.output.write(_encodable(text, self.output) + "\n")

    def json(self, value: Mapping[str, Any]) -> None:
        """Print what was asked for, as JSON."""
        import json  # noqa: PLC0415 - few need it

        self.data(json.dumps(value, indent=2, default=str))

    def say(self, text: str) -> None:
        """Tell people something, unless they want quiet."""
        if not self.quiet:
            self._message(text)

    def warnings(self, warnings: Iterable[object]) -> None:
        """Warn people, unless they want quiet."""
        for warning in warnings:
            text, *hints = str(warning).split("\n  hint: ", 1)
            self.say(f"{self._label('warning')}: {text}")
            for hint in hints:
                self.say(f"{self._label('hint')}: {hint}")

    def error(self, message: str, entries: Iterable[str] = (), hints: Iterable[str] = ()) -> None:
        """Tell people what went wrong, and what they can do."""
        self._message(f"{self._label('error')}: {message}")
        for entry in entries:
            self._message("  - " + entry.replace("\n", "\n    "))
        for hint in hints:
            self._message(f"{self._label('hint')}: {hint}")

    def flush(self) -> None:
        """Hand everything over, so that a failure to do so is seen."""
        self.output.flush()

    def close_output(self) -> None:
        """Send the rest of the output nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.output.fileno())
        os.close(nowhere)

    def _message(self, text: str) -> None:
        self.messages.write(_encodable(text, self.messages) + "\n")
        self.messages.flush()

    def _label(self, kind: str) -> str:
        return f"\x1b[{_COLOURS[kind]}m{kind}\x1b[0m" if self.has_colour else kind


def _encodable(text: str, stream: TextIO) -> str:
    """Return `text` with what the stream cannot encode written as escapes."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
