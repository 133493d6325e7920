"""Setting one value in YAML text, and leaving every other character as it is.

The text is looked at as the parser's events, which know where everything stands. What cannot stay
as it is where several places share a value by an alias is written out: the alias, where the place
lies behind one; else the aliases of what is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    Steps = Sequence[str | int]

__all__ = ["cut_documents", "set_value"]

#: Text that is the same text without quotes, wherever it stands.
_PLAIN = re.compile(r"(\.{0,2}/)?[A-Za-z_][\w./-]*", re.ASCII)
#: What it would mean without quotes.
_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"))


@dataclass(slots=True)
class _Node:
    """A value in the text, from its first character to the one after its last."""

    start: int
    end: int
    #: Of its first character, in its line.
    column: int
    #: The definition that an alias stands for.
    of: _Node | None = None
    text: str = ""
    is_mapping: bool = False
    #: Whether a collection is in brackets; None for what is none.
    is_flow: bool | None = None
    items: list[_Node] = field(default_factory=list)
    keys: list[_Node] = field(default_factory=list)

    def below(self, step: str | int) -> tuple[_Node | None, _Node | None]:
        """Return a key and what stands under it, or at a position; None for what is not there."""
        if isinstance(step, int):
            return None, self.items[step]
        pairs = zip(self.keys, self.items, strict=True)
        return next((pair for pair in pairs if pair[0].text == step), (None, None))

    def walk(self) -> Iterator[_Node]:
        """Yield it and everything below."""
        yield self
        for below in (*self.keys, *self.items):
            yield from below.walk()


def set_value(text: str, steps: Steps, before: Any, after: Any) -> str:  # noqa: ANN401 - any YAML
    r"""Return `text` with the value at the end of `steps` set.

    Parameters
    ----------
    text : str
        One YAML document.
    steps : sequence of str or int
        Keys and positions, from the top down. Keys need not be there yet.
    before, after : object
        What the text says, and what it is to say: equal but for what stands at `steps`.

    Examples
    --------
    >>> text = "a: {b: 1}  # two\n"
    >>> set_value(text, ["a", "b"], {"a": {"b": 1}}, {"a": {"b": 0.5}})
    'a: {b: 0.5}  # two\n'
    >>> set_value(text, ["a", "c"], {"a": {"b": 1}}, {"a": {"b": 1, "c": 2}})
    'a: {b: 1, c: 2}  # two\n'
    """
    root = _parsed(text)
    (first, last, new), changed = _edit(text, root, steps, after)
    edits = [(first, last, new)]
    # Whoever has by an alias what is changed keeps it as it was.
    paths = {id(node): path for path, node in _paths(root, ())}
    for node in root.walk():
        is_there = node.end <= first or node.start >= last
        if is_there and any(node.of is each for each in changed):
            old = _at(before, paths[id(node.of)])
            edits.append((node.start, node.end, _written(old)))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def cut_documents(text: str) -> list[str]:
    r"""Return YAML text cut where documents begin; what is in front of the first goes with it.

    Documents that hold nothing go with the one before.

    Examples
    --------
    >>> cut_documents("# two\n---\na: 1\n---\nb: 1  # one\n---\n")
    ['# two\n---\na: 1\n', '---\nb: 1  # one\n---\n']
    """
    import yaml  # noqa: PLC0415 - as below

    starts: list[int] = []
    begun = 0
    events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
    for event in events:
        name = type(event).__name__
        if name == "DocumentStartEvent":
            begun = event.start_mark.index
        elif name == "MappingStartEvent" and begun not in starts[-1:]:
            starts.append(begun)
    ends = [*starts[1:], len(text)]
    return [text[start:end] for start, end in zip([0, *starts[1:]], ends, strict=True)]


def _edit(
    text: str,
    root: _Node,
    steps: Steps,
    after: Any,  # noqa: ANN401 - any YAML
) -> tuple[tuple[int, int, str], list[_Node]]:
    """Return the change, and the nodes that mean something else by it."""
    node, changed = root, []
    for at, step in enumerate(steps, start=1):
        key, below = node.below(step)
        changed.append(node)
        new = _at(after, steps[:at])
        if below is None:
            return _inserted(text, node, str(step), new), changed
        if at == len(steps) or below.of is not None or not below.items:
            return _replaced(text, key, below, new), [*changed, *below.walk()]
        node = below
    raise ValueError("no step leads to a place")


def _replaced(text: str, key: _Node | None, node: _Node, value: Any) -> tuple[int, int, str]:  # noqa: ANN401
    """Return the change of a node to another value."""
    start, new = node.start, _written(value)
    if key is not None and node.items and not node.is_flow:
        start = text.index(":", key.end) + 1  # a block begins on a line of its own
    if text[start - 1] in ":-":
        new = f" {new}"
    return start, node.end, new


def _inserted(text: str, node: _Node, key: str, value: Any) -> tuple[int, int, str]:  # noqa: ANN401
    """Return the change that gives a mapping one more key."""
    is_json = bool(node.keys) and text[node.keys[0].start] == '"'
    entry = f"{_quoted(key) if is_json else _written(key)}: {_written(value)}"
    last = max((each.end for each in node.items), default=None)
    if node.is_flow:
        place = node.end - 1 if last is None else last
        return place, place, entry if last is None else f", {entry}"
    place = node.end if last is None else last
    indent = " " * (node.keys[0].column if node.keys else 0)
    if text[place - 1] != "\n":  # as it is after a block of text
        line_end = text.find("\n", place)
        place = len(text) if line_end < 0 else line_end
        return place, place, f"\n{indent}{entry}"
    return place, place, f"{indent}{entry}\n"


def _paths(
    node: _Node, path: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], _Node]]:
    yield path, node
    for at, below in enumerate(node.items):
        yield from _paths(below, (*path, node.keys[at].text if node.is_mapping else at))


def _at(value: Any, steps: Steps) -> Any:  # noqa: ANN401
    for step in steps:
        value = value[step]
    return value


def _parsed(text: str) -> _Node:
    """Return the document as nodes with their places."""
    import yaml  # noqa: PLC0415 - only here, so that importing oxmerge does not need PyYAML

    events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
    try:
        while not isinstance(next(events), yaml.DocumentStartEvent):
            pass
        return _read(events, next(events), {})
    except (yaml.YAMLError, StopIteration) as error:
        raise ValueError(error) from error


def _read(events: Iterator[Any], event: Any, anchors: dict[str, _Node]) -> _Node:  # noqa: ANN401
    """Read the node that begins with an event."""
    node = _Node(event.start_mark.index, event.end_mark.index, column=event.start_mark.column)
    match type(event).__name__:
        case "AliasEvent":
            node.of = anchors[event.anchor]
            return node
        case "ScalarEvent":
            node.text = event.value
        case "MappingStartEvent" | "SequenceStartEvent" as name:
            node.is_flow, node.is_mapping = bool(event.flow_style), name == "MappingStartEvent"
    if event.anchor is not None:
        anchors[event.anchor] = node
    if node.is_flow is not None:
        _read_below(events, node, anchors)
    return node


def _read_below(events: Iterator[Any], node: _Node, anchors: dict[str, _Node]) -> None:
    """Read what a collection holds, up to its end."""
    for event in events:
        if type(event).__name__ in ("MappingEndEvent", "SequenceEndEvent"):
            # The end of a block is told where the next thing begins, beyond comments.
            node.end = event.end_mark.index if node.is_flow else node.items[-1].end
            return
        below = _read(events, event, anchors)
        if node.is_mapping:
            node.keys.append(below)
            below = _read(events, next(events), anchors)
        node.items.append(below)


def _written(value: Any) -> str:  # noqa: ANN401
    """Return a value as YAML in one line, which is right in a block and in a flow."""
    if isinstance(value, Mapping):
        entries = (f"{_written(key)}: {_written(each)}" for key, each in value.items())
        return "{" + ", ".join(entries) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, float):
        # 1e-05 is text in YAML 1.1, which mergekit reads.
        number = repr(value)
        return number if "." in number else number.replace("e", ".0e")
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
        return value if is_plain else _quoted(value)
    return json.dumps(value, default=str)


def _quoted(text: str) -> str:
    escaped = {'"': '\\"', "\\": "\\\\"}
    parts = (escaped.get(c, c) if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(parts)}"'
