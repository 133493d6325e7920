"""What is wrong with a text that is no YAML, in words for people who do not know YAML."""

from __future__ import annotations

import re

from oxmerge.problems import shorten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["explain_fault", "explain_slip", "explain_text"]

#: Letters of a line that a message shows.
_SHOWN = 60
_CLOSED_BY = {"[": "]", "{": "}"}
_QUOTES = "put the value in quotes"
_SPACES = "\u00a0\u2000-\u200b\u202f\u3000\ufeff"
#: What an editor or a page makes of YAML's signs, and what to write.
_SLIPS = (
    (re.compile(rf"^[\s-]*[{_SPACES}]|[:-][{_SPACES}]"), "a space that YAML does not take for one",
     "replace it by a space of the keyboard"),
    (re.compile(r"\uff1a"), "a wide colon, `\uff1a`", "write `: `"),
    (re.compile(r"^\s*[\u2010-\u2015\u2022]"), "another sign than `-` before it", "write `- `"),
    (re.compile(r"^\s*(```|~~~)"), "a fence of Markdown", "take out the lines that begin so"),
    (re.compile(r"^\s*-[^\W\d]"), "no space behind its dash", "write `- `"),
    (re.compile(r"^\s*\*\*|\]\(https?:"), "marks of Markdown", "write the text without them"),
    (re.compile(r"^\s*\*\s"), "another sign than `-` before it", "write `- `"),
    (re.compile(r"^\s*>\s"), "the mark of a quotation", "take out the `>` of each line"),
    (re.compile(r"^\s*//"), "a comment of another language", "begin comments with `#`"),
    (re.compile(r"(?i)^\s*</?(!doctype|html|head|body|div|pre|span|table|t[dr])\b"), "HTML",
     "copy the recipe's text, or download its file"),
    (re.compile(r":\s*\{\{"), "a place to fill in", "write what belongs there"),
    (re.compile(r":\s*`"), "a backtick", "take the backticks out"),
)  # fmt: skip
#: A line of a configuration in TOML or INI.
_ASSIGNS = re.compile(r"\s*[\w.-]+\s*=|\s*\[[\w.\s\[\]-]+\]\s*$")
#: What PyYAML says of faults that need no line to be told.
_TOLD = {
    "unknown escape": (
        "a backslash in double quotes begins a special character",
        "use single quotes",
    ),
    "scanning an anchor": ("`&` at the beginning of a value gives it a name", _QUOTES),
    "scanning a block scalar": (
        "`|` or `>` at the beginning of a value begins a longer text",
        _QUOTES,
    ),
    "scanning a directive": ("`%` at the beginning of a line begins a directive", _QUOTES),
    "constructor for the tag": ("recipes have no tags", "take out what begins with `!`"),
    "unhashable": ("a list or a mapping stands where a key is", "write `key: value`"),
    "for merging": ("`<<` takes a mapping, or a list of such", "write `<<: *name`, say"),
}


def explain_fault(  # noqa: PLR0911 - a line for each kind
    error: Any,  # noqa: ANN401 - PyYAML has no types
    text: str,
) -> tuple[str, str]:
    """Return what an error of PyYAML means, and what to do about it.

    Parameters
    ----------
    error : yaml.MarkedYAMLError
        The error; it knows the line that it is on, and mostly where the block around it began.
    text : str
        The text.
    """
    mark, context = error.problem_mark, str(error.context or "")
    lines = [*text.splitlines(), ""]  # a fault may be at the end
    line = lines[mark.line] if mark.line < len(lines) else ""
    problem = str(error.problem or "")
    begun = error.context_mark.line if "simple key" in context else mark.line
    slip = _slip_near(lines, begun, mark.line)
    told = (told for words, told in _TOLD.items() if words in f"{context} {problem}")
    slip = slip or next(told, None)
    if slip is not None:
        return slip
    if r"'\t'" in problem:
        return _tab(line)
    if "is not a key" in problem or "not allowed here" in problem:
        return _second_value(lines, mark.line, mark.column)
    if "expected ':'" in problem:
        return f"line {begun + 1}, {_no_colon(lines[begun])}", "write `key: value`"
    if "<document start>" in problem:
        return _ended(lines, mark.line)
    if "quoted scalar" in context:
        opened = f"the quote that opens on line {error.context_mark.line + 1} is never closed"
        return opened, "close it, or take it out"
    if "while parsing a flow" in context or "while parsing a block" in context:
        return (_unclosed if "a flow" in context else _wrong_block)(error, lines)
    if "alias" in problem or "alias" in context:
        name = shorten(line[(error.context_mark or mark).column :].strip().rstrip(",]}"), _SHOWN)
        return f"`{name}` refers to another value, which is not there", _QUOTES
    if "cannot start any token" in problem:
        return f"`{line[mark.column : mark.column + 1]}` cannot begin a value", _QUOTES
    return shorten(problem or str(error).partition("\n")[0], 240), "mend the YAML there"


def _slip_near(lines: list[str], begun: int, number: int) -> tuple[str, str] | None:
    """Return what a line near a fault has that only looks like YAML, and what to write."""
    # A wide space is seen late: the lines that it should have indented end a block.
    wide = (at for at in range(number) if re.match(rf"[\s-]*[{_SPACES}]", lines[at]))
    for at in (begun, number, number - 1, *wide):
        slip = explain_slip(lines[at]) if 0 <= at < len(lines) else None
        if slip is not None:
            return f"line {at + 1}, `{shorten(lines[at].strip(), _SHOWN)}`, has {slip[0]}", slip[1]
    return None


def explain_slip(text: str) -> tuple[str, str] | None:
    """Return what looks like YAML in a line or a key and is not, and what to write instead.

    Examples
    --------
    >>> explain_slip("-model"), explain_slip("model")
    (('no space behind its dash', 'write `- `'), None)
    """
    return next((slip[1:] for slip in _SLIPS if slip[0].search(text)), None)


def _tab(line: str) -> tuple[str, str]:
    if line[: len(line) - len(line.lstrip())].find("\t") < 0:
        return "a tab stands here, where YAML has spaces", "replace it by a space"
    advice = "replace the tab by spaces, as many as the lines of the same block begin with"
    return "this line is indented by a tab; YAML is indented by spaces", advice


def _second_value(lines: list[str], number: int, column: int) -> tuple[str, str]:
    """Explain a `: ` where none can be."""
    line = lines[number]
    if re.search(r":\s", line[:column]):
        return "this line has a second `: ` in its value", _QUOTES
    before = next((each for each in reversed(lines[:number]) if _says(each)), "")
    if not re.search(r":(\s|$)", before):
        return f"the line before it, {_no_colon(before)}", "write `key: value`"
    begun = f"the line before it, `{shorten(before.strip(), _SHOWN)}`,"
    found = f"this line is indented by {_indent(line)}, more than {begun} which has its value"
    return found, f"indent it by {_indent(before)}, or take the value of the line before out"


def _no_colon(line: str) -> str:
    """Say of a line that is no key with a value what it lacks."""
    missing = "no space behind its colon" if ":" in line else "no colon"
    return f"`{shorten(line.strip(), _SHOWN)}`, has {missing}"


def _ended(lines: list[str], number: int) -> tuple[str, str]:
    """Explain a line behind the end of a document."""
    before = next((each for each in reversed(lines[:number]) if _says(each)), "")
    shown = shorten(before.strip(), _SHOWN)
    if _ASSIGNS.match(before):
        return f"`{shown}` is not YAML, but TOML or INI", "write `key: value`"
    return f"the line before it, `{shown}`, ends the recipe", "take that out, or what follows"


def explain_text(text: str) -> tuple[str, str] | None:
    """Return what a text is that has no keys and values, and what to write instead."""
    lines = [each for each in text.splitlines() if _says(each)]
    slip = next(filter(None, map(explain_slip, lines)), None)
    if slip is not None:
        return f"it has {slip[0]}", slip[1]
    if any(map(_ASSIGNS.match, lines)):
        return "it is not YAML, but TOML, INI or a program", "write `merge_method: linear`, say"
    return None


def _unclosed(error: Any, lines: list[str]) -> tuple[str, str]:  # noqa: ANN401 - as above
    at = error.context_mark
    bracket = "".join(lines[at.line : at.line + 1])[at.column : at.column + 1]
    if bracket not in _CLOSED_BY:  # the parser knows no more than that the text ended
        return "a `[` or `{` before this is not closed", "close it, or put a comma here"
    message = f"the `{bracket}` that opens on line {at.line + 1} is not closed before this"
    return message, f"close it with `{_CLOSED_BY.get(bracket, bracket)}`, or put a comma here"


def _wrong_block(error: Any, lines: list[str]) -> tuple[str, str]:  # noqa: ANN401 - as above
    """Explain a line that does not fit the block that is open."""
    at, opened = error.problem_mark, error.context_mark
    line = "".join(lines[at.line : at.line + 1])
    shown = shorten(lines[opened.line][opened.column :].strip(), _SHOWN)
    block = f"the block that is open began on line {opened.line + 1} with `{shown}`"
    if line[: at.column].strip():
        return "something stands behind a value that has ended", _QUOTES
    if at.column == opened.column:
        kind = "an item of a list" if line[at.column :].startswith("-") else "a key"
        is_list, fault = shown.startswith("-"), f"{kind} stands here, but {block}"
        if is_list and kind == "a key":
            inside = len(shown) - len(shown.lstrip("- ")) + opened.column
            advice = f"indent it by {inside} if it belongs to an item, else less than the list"
            return f"{fault}: a list has items only", advice
        rest = "a list has items only" if is_list else "keys and items do not mix"
        return f"{fault}: {rest}", "put `- ` before each item of a list"
    found = f"this line is indented by {at.column}, which fits no block: {block}, indented by "
    return f"{found}{opened.column}", f"indent it by {opened.column}, or as what it belongs to"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _says(line: str) -> bool:
    """Tell whether a line says anything."""
    return bool(line.strip()) and not line.lstrip().startswith("#")
