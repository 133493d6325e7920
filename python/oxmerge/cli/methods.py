"""List the merge methods, or explain one: formula, parameters, cost, paper, an example."""

from __future__ import annotations

import textwrap

from oxmerge import _core
from oxmerge.cli.arguments import Parser, UsageError, add_json_option, add_methods_option
from oxmerge.methods import Count, explain_parameter
from oxmerge.problems import Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer

_WIDTH = 79
_INDENT = 12
_PER = {
    "shared": "one for all models",
    "input": "for each model",
    "other": "for each model but the base",
}


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="the method to explain")
    add_methods_option(parser)
    add_json_option(parser)


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Print all methods, or one."""
    methods = list(engine.methods())
    if options.name is None:
        offered = engine.installed_methods()
        methods += [each for each in offered if not isinstance(each, Problem)]
        printer.warnings(each for each in offered if isinstance(each, Problem))
    else:
        methods = [_find(methods, options.name, options.allow_methods or (), engine)]
    if printer.as_json:
        printer.json({"methods": methods} if options.name is None else methods[0])
    elif options.name is None:
        printer.data("\n".join(_table(methods)))
    else:
        printer.data("\n".join(_page(methods[0])))
    return 0


def _find(
    methods: Sequence[Mapping[str, Any]], name: str, allowed: Sequence[str], engine: Engine
) -> Mapping[str, Any]:
    by_name = {method["name"]: method for method in methods}
    if name not in by_name:
        written = engine.find_method(name, allowed)
        if isinstance(written, Problem):
            raise UsageError(written.message, written.advice)
        by_name |= {} if written is None else {name: written}
    if name not in by_name:
        raise UsageError.unknown("method", name, by_name)
    return by_name[name]


def _table(methods: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    name = max(len(method["name"]) for method in methods) + 2
    kind = max(len(method["class"]) for method in methods) + 2
    for method in methods:
        head = method["name"].ljust(name) + method["class"].ljust(kind)
        yield from _hanging(head, f"{method['title']}: {method['cost']}")
    yield ""
    yield f"with any of them: {', '.join(each['name'] for each in _core.modifiers())}"
    yield "`oxmerge methods NAME` has the formula, parameters, paper and an example"


def _page(method: Mapping[str, Any]) -> Iterator[str]:
    yield f"{method['name']}: {method['title']}"
    yield ""
    contract = method["contract"]
    facts = {**method, "base": contract["base"], "inputs": _inputs(contract)}
    for label in ("formula", "base", "inputs", "class", "cost", "paper", "differs"):
        yield from _entry(label, facts.get(label, ""))
    if method["parameters"]:
        yield ""
        yield "parameters"
    for parameter in method["parameters"]:
        yield from _parameter(parameter)
    yield ""
    yield "with any method, under `oxmerge:` in the recipe"
    for each in _core.modifiers():
        yield f"  {each['name']}: {each['help']}"
    yield ""
    yield "example"
    yield from textwrap.indent(_example(method), "  ").splitlines()


def _example(method: Mapping[str, Any]) -> str:
    """Return a recipe, of a case that `oxmerge bench` measures."""
    from oxmerge.bench.cases import case_of  # noqa: PLC0415 - needed only here

    case = case_of(method)
    names = ["base", "a", "b", "c"] if case.has_base else ["a", "b", "c"]
    return case.recipe([f"models/{name}" for name in names[: case.models]])


def _inputs(contract: Mapping[str, Any]) -> str:
    """Return how many inputs a method takes, in words."""
    words = Count(*contract["inputs"]).of("model")
    others = Count(*contract["others"])
    return words if others == Count() else f"{words}, {others.of('model')} besides the base"


def _entry(label: str, value: str) -> Iterator[str]:
    """Yield a labelled value; its own line breaks are kept, as formulas have them."""
    for number, line in enumerate(value.splitlines()):
        yield from _hanging((label if number == 0 else "").ljust(_INDENT), line)


def _parameter(parameter: Mapping[str, Any]) -> Iterator[str]:
    preset = "required" if parameter["required"] else f"default {_plain(parameter['default'])}"
    yield f"  {parameter['name']} ({parameter['kind']}, {_PER[parameter['per']]}, {preset})"
    indent = " " * 6
    yield from textwrap.wrap(
        explain_parameter(parameter), _WIDTH, initial_indent=indent, subsequent_indent=indent
    )


def _plain(value: object) -> str:
    """Return a value as a recipe writes it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hanging(head: str, text: str) -> list[str]:
    """Return `text` wrapped beside `head`."""
    lines = textwrap.wrap(
        text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False
    )
    return lines or [head.rstrip()]
