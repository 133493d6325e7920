"""YAML as recipes use it: safe, with line numbers, and without the traps of YAML 1.1.

Three things differ from PyYAML's safe loader. A key that is written twice is an error; ``1e-5`` is
a number, as in YAML 1.2; and a date is text. Numbers with colons in them (``1:30``) are text too.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import chain

from oxmerge.errors import ProblemsError, RecipeError
from oxmerge.problems import UNSUPPORTED, Findings, Place, Problem, shorten
from oxmerge.recipe.extent import MOST_VALUES, TooMuch, check_extent
from oxmerge.recipe.keys import without_effect
from oxmerge.recipe.recipe import MOST_BYTES, too_long
from oxmerge.recipe.yaml_faults import explain_fault, explain_slip, explain_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Iterable
    from typing import Any

    from yaml import SafeLoader
    from yaml.nodes import MappingNode, ScalarNode, SequenceNode

__all__ = ["MarkedList", "MarkedMapping", "parse_documents", "parse_yaml"]

_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?"
    r"|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$",
    re.ASCII,
)
_INT = re.compile(r"[-+]?(?:0b[01_]+|0x[\da-fA-F_]+|0o?[0-7_]+|0|[1-9][\d_]*)$", re.ASCII)
#: More digits than a number has that fits float64.
_LONGEST_NUMBER = 400
_REPLACED_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("float", "int", "timestamp")}


class MarkedMapping(dict[str, object]):
    """A mapping that remembers where each key stands.

    Attributes
    ----------
    marks : dict
        Line and column, from 1, by key.
    own : dict
        Keys of a document under which anchors stand, and whether aliases elsewhere refer to them.
    """

    __slots__ = ("marks", "own")

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, tuple[int, int]] = {}
        self.own: dict[str, bool] = {}


class MarkedList(list[object]):
    """A list that remembers where each item stands.

    Attributes
    ----------
    marks : list
        Line and column, from 1, of each item.
    """

    __slots__ = ("marks",)

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[int, int]] = []


def parse_yaml(text: str) -> MarkedMapping:
    """Return the mapping that the YAML text is.

    Parameters
    ----------
    text : str
        One YAML document.

    Raises
    ------
    RecipeError
        As `parse_documents`, and if there are several, or a key is written twice.
    """
    findings = Findings()
    documents = parse_documents(text, None, findings)
    if len(documents) > 1:
        message = "not supported yet: several merges in one recipe"
        advice = "put the last one into a file of its own, and name the outputs of the others"
        findings.problems.append(Problem(UNSUPPORTED, message, advice=advice))
    if findings.problems:
        raise _unreadable(findings.problems)
    return documents[0]


def parse_documents(text: str, path: str | None, findings: Findings) -> list[MarkedMapping]:
    """Return the mappings that the documents of a YAML text are; at least one.

    Parameters
    ----------
    text : str
        YAML documents, with ``---`` between them.
    path : str, optional
        Where it comes from, for messages.
    findings : Findings
        Takes keys that are written twice.

    Raises
    ------
    RecipeError
        If it is no YAML, or no mapping; if it is longer than a recipe, or stands for more than one
        by its aliases.
    """
    if len(text) > MOST_BYTES:
        raise too_long(path)
    import yaml  # noqa: PLC0415 - only here, so that importing oxmerge does not need PyYAML

    documents: list[object] = []
    try:
        anchors: list[int] = []
        aliases: list[tuple[int, int]] = []
        loader = _loader_class(findings.problems, anchors, aliases, path)(text)
        while loader.check_node():
            node: Any = loader.get_node()
            check_extent(node, _parts)
            node.own = _own_keys(node, anchors, aliases)
            documents.append(loader.construct_document(node))
            anchors.clear()
            aliases.clear()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _unreadable([_syntax_problem(error, text, path)]) from error
    mappings = [document for document in documents if isinstance(document, MarkedMapping)]
    others = [each for each in documents if each is not None and each not in mappings]
    if others or not mappings:
        found = _kind(others[0]) if others else "nothing"
        message = "a recipe is a mapping of keys to values"
        advice = "write `merge_method: linear`, say"
        if others and isinstance(others[0], str):
            found = f"text, `{shorten(others[0], 60)}`"
            message, advice = explain_text(others[0]) or (message, advice)
        place = None if path is None else Place(file=path)
        raise _unreadable([Problem("not-a-recipe", message, place, found=found, advice=advice)])
    return mappings


def _own_keys(node: Any, anchors: list[int], aliases: list[tuple[int, int]]) -> dict[str, bool]:  # noqa: ANN401
    """Return the keys of a document under which anchors stand, and whether others refer to them.

    `anchors` has their places in the text, `aliases` those of what each refers to, and their own.
    """
    keys = [key for key, _ in node.value] if getattr(node, "id", None) == "mapping" else []
    starts = [key.start_mark.index for key in keys]

    def under(place: int) -> int:
        return bisect_right(starts, place) - 1

    referred = {under(at) for at, used in aliases if under(at) != under(used)}
    held = (under(at) for at in anchors if under(at) >= 0)  # but for one of the document itself
    return {str(keys[at].value): at in referred for at in sorted(held, key=referred.__contains__)}


def _kind(value: object) -> str:
    """Return what a value is, in words."""
    if isinstance(value, list):
        return "a list"
    return "a number or a truth value"


def _unreadable(problems: list[Problem]) -> ProblemsError:
    return RecipeError.of("cannot read the recipe", problems)


def _parts(node: object) -> Iterable[object] | None:
    """Return the nodes in a node of a YAML document."""
    value = getattr(node, "value", None)
    if not isinstance(value, list):
        return None
    return chain.from_iterable(value) if getattr(node, "id", None) == "mapping" else value


def _syntax_problem(error: Exception, text: str, path: str | None) -> Problem:
    from yaml import Mark  # noqa: PLC0415 - see parse_documents
    from yaml.reader import ReaderError  # noqa: PLC0415

    mark = getattr(error, "problem_mark", None)
    advice = "mend the YAML there"
    if isinstance(error, ReaderError):
        before = text[: error.position]
        mark = Mark("", 0, before.count("\n"), len(before) - before.rfind("\n") - 1, None, 0)
        what = f"a character that YAML has not: `{text[error.position]}`"
        advice = "take it out"
    elif mark is None:
        what = shorten(str(error).partition("\n")[0], 240)
    else:
        what, advice = explain_fault(error, text)
    if isinstance(error, TooMuch):
        mark, advice = getattr(error.at, "start_mark", None), error.advice
    if isinstance(error, RecursionError):
        what, advice = "nested too deeply", "write it flatter"
    where = Place(file=path) if mark is None else _at(mark, path)
    return Problem("yaml", what, where, advice=advice)


def _at(mark: Any, path: str | None) -> Place:  # noqa: ANN401 - PyYAML has no types
    return Place("", mark.line + 1, mark.column + 1, path)


def _loader_class(
    duplicates: list[Problem],
    anchors: list[int],
    aliases: list[tuple[int, int]],
    path: str | None,
) -> type[SafeLoader]:
    """Return a loader that appends what is written twice to `duplicates`.

    `anchors` and `aliases` get what `_own_keys` takes.
    """
    from yaml import SafeLoader  # noqa: PLC0415 - see parse_yaml
    from yaml.composer import ComposerError  # noqa: PLC0415
    from yaml.constructor import ConstructorError  # noqa: PLC0415
    from yaml.events import AliasEvent  # noqa: PLC0415

    class Loader(SafeLoader):
        yaml_implicit_resolvers = _kept_resolvers(SafeLoader.yaml_implicit_resolvers)
        values = 0

        def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - as PyYAML has it
            """Compose a node, unless a recipe has fewer: each takes a kilobyte."""
            self.values += 1
            if self.values > MOST_VALUES:
                message = f"more than {MOST_VALUES} values"
                raise ComposerError(None, None, message, self.get_mark())
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            is_alias, place = isinstance(event, AliasEvent), event.start_mark.index
            node: Any = super().compose_node(parent, index)
            if is_alias:
                aliases.append((node.start_mark.index, place))
            elif event.anchor is not None:
                anchors.append(place)
            return node

    def construct(loader: SafeLoader, node: MappingNode) -> object:
        own: dict[str, bool] = getattr(node, "own", {})
        duplicates.extend(_duplicates(node, path, own))
        mapping = MarkedMapping()
        mapping.own = own
        yield mapping
        _fill(loader, node, mapping)

    def construct_list(loader: SafeLoader, node: SequenceNode) -> object:
        listed = MarkedList()
        yield listed
        listed.extend(loader.construct_sequence(node))
        listed.marks = [_position(each) for each in node.value]

    def construct_int(loader: SafeLoader, node: ScalarNode) -> int:
        if len(node.value) > _LONGEST_NUMBER:
            message = f"a number of {len(node.value)} digits"
            raise ConstructorError(None, None, message, node.start_mark)
        return int(loader.construct_yaml_int(node))

    Loader.add_constructor("tag:yaml.org,2002:map", construct)
    Loader.add_constructor("tag:yaml.org,2002:seq", construct_list)
    Loader.add_constructor("tag:yaml.org,2002:int", construct_int)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    return Loader


def _kept_resolvers(resolvers: dict[str, list[tuple[str, object]]]) -> dict[str, list[object]]:
    return {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in _REPLACED_TAGS]
        for first, pairs in resolvers.items()
    }


def _position(node: Any) -> tuple[int, int]:  # noqa: ANN401 - PyYAML has no types
    return node.start_mark.line + 1, node.start_mark.column + 1


def _duplicates(node: MappingNode, path: str | None, own: Container[str]) -> list[Problem]:
    """Return the keys that are written twice.

    A key of one's own may be: each of its values is for aliases, whatever it is called.
    """
    first_lines: dict[str, int] = {}
    problems = []
    for key_node, _ in node.value:
        key, line = str(getattr(key_node, "value", "")), key_node.start_mark.line + 1
        is_own = key == "<<" or (key in own and without_effect(key) is None)
        if key in first_lines and not is_own and not explain_slip(key):  # which is told of a key
            text = f"`{shorten(key)}` is written twice, first on line {first_lines[key]}"
            advice = "leave one of them out"
            place = _at(key_node.start_mark, path)
            problems.append(Problem("duplicate-key", text, place, advice=advice))
        first_lines.setdefault(key, line)
    return problems


def _fill(loader: SafeLoader, node: MappingNode, mapping: MarkedMapping) -> None:
    """Fill `mapping` from its node, after YAML's merge keys (``<<``) are resolved."""
    loader.flatten_mapping(node)
    content: dict[Any, object] = loader.construct_mapping(node)
    mapping.update(content)
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        mapping.marks[key] = _position(key_node)
