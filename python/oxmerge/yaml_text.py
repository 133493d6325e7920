"""YAML as recipes use it: safe, with line numbers, and without the traps of YAML 1.1.

Three things differ from PyYAML's safe loader. A key that is written twice is an error; ``1e-5`` is
a number, as in YAML 1.2; and a date is text. Numbers with colons in them (``1:30``) are text too.
"""

from __future__ import annotations

import re

from oxmerge.errors import RecipeError
from oxmerge.problems import Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from yaml import SafeLoader
    from yaml.nodes import MappingNode

__all__ = ["MarkedMapping", "parse_yaml"]

_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?"
    r"|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$",
    re.ASCII,
)
_INT = re.compile(r"[-+]?(?:0b[01_]+|0x[\da-fA-F_]+|0o?[0-7_]+|0|[1-9][\d_]*)$", re.ASCII)
_REPLACED_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("float", "int", "timestamp")}


class MarkedMapping(dict[str, object]):
    """A mapping that remembers the line that each key stands on.

    Attributes
    ----------
    lines : dict
        Line number, from 1, by key.
    """

    __slots__ = ("lines",)

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


def parse_yaml(text: str, path: str | None = None) -> MarkedMapping:
    """Return the mapping that the YAML text is.

    Parameters
    ----------
    text : str
        One YAML document.
    path : str, optional
        Where it comes from, for messages.

    Raises
    ------
    RecipeError
        If it is no YAML, no mapping, or has a key twice.
    """
    import yaml  # noqa: PLC0415 - only here, so that importing oxmerge does not need PyYAML

    duplicates: list[Problem] = []
    try:
        loader = _loader_class(duplicates)(text)
        document = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _unreadable([_syntax_problem(error)], path) from error
    if duplicates:
        raise _unreadable(duplicates, path)
    if not isinstance(document, MarkedMapping):
        found = "nothing" if document is None else type(document).__name__
        message = "a recipe is a mapping of keys to values"
        problem = Problem(
            "recipe", message, found=found, advice="write `merge_method: linear`, say"
        )
        raise _unreadable([problem], path)
    return document


def _unreadable(problems: list[Problem], path: str | None) -> RecipeError:
    message = "cannot read the recipe" + (f" `{path}`" if path else "")
    return RecipeError(message, problems=problems)


def _syntax_problem(error: Exception) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = None if mark is None else f"line {mark.line + 1}, column {mark.column + 1}"
    what = getattr(error, "problem", None) or str(error).partition("\n")[0]
    advice = "mend the YAML there"
    if isinstance(error, RecursionError):
        what, advice = "nested too deeply", "write it flatter"
    if "another document" in what:
        what = "not supported yet: several merges in one file"
        advice = "put each into a file of its own"
    return Problem("recipe", what, where=where, advice=advice)


def _loader_class(duplicates: list[Problem]) -> type[SafeLoader]:
    """Return a loader that appends what is written twice to `duplicates`."""
    from yaml import SafeLoader  # noqa: PLC0415 - see parse_yaml

    class Loader(SafeLoader):
        yaml_implicit_resolvers = _kept_resolvers(SafeLoader.yaml_implicit_resolvers)

    def construct(loader: SafeLoader, node: MappingNode) -> object:
        duplicates.extend(_duplicates(node))
        mapping = MarkedMapping()
        yield mapping
        _fill(loader, node, mapping)

    Loader.add_constructor("tag:yaml.org,2002:map", construct)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    return Loader


def _kept_resolvers(resolvers: dict[str, list[tuple[str, object]]]) -> dict[str, list[object]]:
    return {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in _REPLACED_TAGS]
        for first, pairs in resolvers.items()
    }


def _duplicates(node: MappingNode) -> list[Problem]:
    first_lines: dict[str, int] = {}
    problems = []
    for key_node, _ in node.value:
        key, line = str(getattr(key_node, "value", "")), key_node.start_mark.line + 1
        if key in first_lines and key != "<<":
            text = f"`{key}` is written twice, first on line {first_lines[key]}"
            advice = "leave one of them out"
            problems.append(Problem("recipe", text, where=f"line {line}", advice=advice))
        first_lines.setdefault(key, line)
    return problems


def _fill(loader: SafeLoader, node: MappingNode, mapping: MarkedMapping) -> None:
    """Fill `mapping` from its node, after YAML's merge keys (``<<``) are resolved."""
    loader.flatten_mapping(node)
    content: dict[Any, object] = loader.construct_mapping(node)
    mapping.update(content)
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        mapping.lines[key] = key_node.start_mark.line + 1
