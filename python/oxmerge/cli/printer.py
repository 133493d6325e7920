"""Where output goes: data to standard output, words for people to standard error.

Data that cannot be handed over is a failure. Words that nobody can read are not: the work goes on.
"""

from __future__ import annotations

import io
import os
import sys
from typing import cast

from oxmerge.problems import printable, without_hint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any, TextIO

_COLOURS = {"error": "31;1", "warning": "33;1", "hint": "36"}


class DataUnwritten(Exception):  # noqa: N818 - where a pipe is closed, it is no error
    """Data could not be handed over: whoever read it has seen enough, or the disk is full.

    Parameters
    ----------
    reason
        What the system said.
    """

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Messages(io.TextIOBase):
    """A stream for people, each word of which is handed over at once. They may have gone.

    Parameters
    ----------
    stream
        Where the words go, as long as they can be written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """How it encodes text."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Tell whether a person watches."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the number of the file."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            _send_nowhere(self._stream)
        return len(text)


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
        # A process may be started without them.
        self.output = output or sys.stdout or io.StringIO()
        self.messages = cast("TextIO", Messages(messages or sys.stderr or io.StringIO()))

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
        try:
            self.output.write(_shown(text, self.output) + "\n")
        except OSError as error:
            raise DataUnwritten(error) from error

    def lines(self, lines: Iterable[str]) -> None:
        """Print what was asked for, line by line, whatever names are in it."""
        self.data("\n".join(map(printable, lines)))

    def json(self, value: Mapping[str, Any]) -> None:
        """Print what was asked for, as JSON."""
        import json  # noqa: PLC0415 - few need it

        self.data(json.dumps(value, indent=2, default=str))

    def json_with_rows(
        self, value: Mapping[str, Any], key: str, rows: Iterable[Mapping[str, Any]]
    ) -> None:
        """Print what was asked for as JSON; its last key has rows, which are made one by one."""
        import json  # noqa: PLC0415 - few need it

        head = json.dumps(value, indent=2, default=str).removesuffix("\n}")
        self.data(f'{head},\n  "{key}": [')
        line = ""
        for row in rows:
            if line:
                self.data(f"{line},")
            line = f"    {json.dumps(row, default=str)}"
        self.data(f"{line}\n  ]\n}}".lstrip("\n"))

    def say(self, text: str) -> None:
        """Tell people something in one line, unless they want quiet."""
        if not self.quiet:
            self._message(printable(text))

    def warnings(self, warnings: Iterable[object]) -> None:
        """Warn people, unless they want quiet."""
        if self.quiet:
            return
        for warning in warnings:
            text, hint = without_hint(warning)
            self._message(printable(text), "warning")
            if hint:
                self._message(hint, "hint")

    def error(
        self,
        message: str,
        problems: Iterable[tuple[str, str | None]] = (),
        hints: Iterable[str] = (),
    ) -> None:
        """Tell people what went wrong, and what they can do: about each problem, and in all."""
        self._message(message, "error")
        for problem, hint in problems:
            self._message("  - " + problem)
            if hint:
                self._message(hint, "hint", indent="    ")
        for hint in hints:
            self._message(hint, "hint")

    def flush(self) -> None:
        """Hand everything over, so that a failure to do so is seen."""
        try:
            self.output.flush()
        except OSError as error:
            raise DataUnwritten(error) from error

    def close_output(self) -> None:
        """Send the rest of the output nowhere."""
        _send_nowhere(self.output)

    def _message(self, text: str, kind: str | None = None, *, indent: str = "") -> None:
        label = "" if kind is None else f"{self._coloured(kind)}: "
        self.messages.write(f"{indent}{label}{_shown(text, self.messages)}\n")

    def _coloured(self, kind: str) -> str:
        return f"\x1b[{_COLOURS[kind]}m{kind}\x1b[0m" if self.has_colour else kind


def _send_nowhere(stream: TextIO) -> None:
    """Let a stream go nowhere, so that what it still holds does no harm when the program ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _shown(text: str, stream: TextIO) -> str:
    """Return lines of text with what the stream cannot encode, or obeys, written as escapes."""
    encoding = stream.encoding or "utf-8"
    lines = "\n".join(map(printable, text.split("\n")))
    return lines.encode(encoding, "backslashreplace").decode(encoding)
