"""YAML as recipes use it: safe, with line numbers, and without the traps of YAML 1.1.

Three things differ from PyYAML's safe loader. A key that is written twice is an error; ``1e-5`` is
a number, as in YAML 1.2; and a date is text. Numbers with colons in them (``1:30``) are text too.
"""

from __future__ import annotations

import re
from itertools import chain

from oxmerge.errors import ProblemsError, RecipeError
from oxmerge.problems import UNSUPPORTED, Problem, shorten
from oxmerge.recipe.extent import MOST_VALUES, TooMuch, check_extent
from oxmerge.recipe.recipe import MOST_BYTES, too_long

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from yaml import SafeLoader
    from yaml.nodes import MappingNode, ScalarNode

__all__ = ["MarkedMapping", "parse_yaml"]

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
        If it is no YAML, no mapping, or has a key twice; if it is longer than a recipe, or stands
        for more than one by its aliases.
    """
    if len(text) > MOST_BYTES:
        raise too_long(path)
    import yaml  # noqa: PLC0415 - only here, so that importing oxmerge does not need PyYAML

    duplicates: list[Problem] = []
    try:
        loader = _loader_class(duplicates)(text)
        node = loader.get_single_node()
        check_extent(node, _parts)
        document = None if node is None else loader.construct_document(node)
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


def _unreadable(problems: list[Problem], path: str | None) -> ProblemsError:
    message = "cannot read the recipe" + (f" `{path}`" if path else "")
    return RecipeError.of(message, problems)


def _parts(node: object) -> Iterable[object] | None:
    """Return the nodes in a node of a YAML document."""
    value = getattr(node, "value", None)
    if not isinstance(value, list):
        return None
    return chain.from_iterable(value) if getattr(node, "id", None) == "mapping" else value


def _syntax_problem(error: Exception) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = None if mark is None else f"line {mark.line + 1}, column {mark.column + 1}"
    what = shorten(getattr(error, "problem", None) or str(error).partition("\n")[0], 240)
    kind, advice = "recipe", "mend the YAML there"
    if isinstance(error, TooMuch):
        line = getattr(getattr(error.at, "start_mark", None), "line", None)
        where, advice = None if line is None else f"line {line + 1}", error.advice
    if isinstance(error, RecursionError):
        what, advice = "nested too deeply", "write it flatter"
    if "another document" in what:
        kind, what = UNSUPPORTED, "not supported yet: several merges in one file"
        advice = "put each into a file of its own"
    return Problem(kind, what, where=where, advice=advice)


def _loader_class(duplicates: list[Problem]) -> type[SafeLoader]:
    """Return a loader that appends what is written twice to `duplicates`."""
    from yaml import SafeLoader  # noqa: PLC0415 - see parse_yaml
    from yaml.composer import ComposerError  # noqa: PLC0415
    from yaml.constructor import ConstructorError  # noqa: PLC0415

    class Loader(SafeLoader):
        yaml_implicit_resolvers = _kept_resolvers(SafeLoader.yaml_implicit_resolvers)
        values = 0

        def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - as PyYAML has it
            """Compose a node, unless a recipe has fewer: each takes a kilobyte."""
            self.values += 1
            if self.values > MOST_VALUES:
                message = f"more than {MOST_VALUES} values"
                raise ComposerError(None, None, message, self.get_mark())
            return super().compose_node(parent, index)

    def construct(loader: SafeLoader, node: MappingNode) -> object:
        duplicates.extend(_duplicates(node))
        mapping = MarkedMapping()
        yield mapping
        _fill(loader, node, mapping)

    def construct_int(loader: SafeLoader, node: ScalarNode) -> int:
        if len(node.value) > _LONGEST_NUMBER:
            message = f"a number of {len(node.value)} digits"
            raise ConstructorError(None, None, message, node.start_mark)
        return int(loader.construct_yaml_int(node))

    Loader.add_constructor("tag:yaml.org,2002:map", construct)
    Loader.add_constructor("tag:yaml.org,2002:int", construct_int)
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
            text = f"`{shorten(key)}` is written twice, first on line {first_lines[key]}"
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
