"""List the merge methods, or explain one: formula, parameters, class, cost, paper."""

from __future__ import annotations

import textwrap

from oxmerge.cli.arguments import Parser, UsageError, add_json_option
from oxmerge.methods import DIALECT_METHODS

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
    add_json_option(parser)


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Print all methods, or one."""
    methods = list(engine.methods())
    if options.name is not None:
        methods = [_find(methods, options.name)]
    if printer.as_json:
        printer.json({"methods": methods} if options.name is None else methods[0])
    elif options.name is None:
        printer.data("\n".join(_table(methods)))
    else:
        printer.data("\n".join(_page(methods[0])))
    return 0


def _find(methods: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    by_name = {str(method["name"]): method for method in methods}
    if name in DIALECT_METHODS and name not in by_name:
        known = ", ".join(by_name)
        raise UsageError(f"method `{name}` is not in this release", f"known are: {known}")
    if name not in by_name:
        raise UsageError.unknown("method", name, by_name)
    return by_name[name]


def _table(methods: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    widest = max((len(str(method["name"])) for method in methods), default=0) + 2
    for method in methods:
        about = method.get("formula", "")
        yield from _hanging(str(method["name"]).ljust(widest), " ".join(str(about).split()))


def _page(method: Mapping[str, Any]) -> Iterator[str]:
    yield f"{method['name']}: {method.get('title', '')}"
    yield ""
    facts = {**method, **_contract(method.get("contract", {}))}
    for label in ("formula", "base", "inputs", "class", "cost", "paper"):
        if facts.get(label):
            yield from _entry(label, str(facts[label]))
    parameters = method.get("parameters", ())
    if not parameters:
        return
    yield ""
    yield "parameters"
    for parameter in parameters:
        yield from _parameter(parameter)


def _contract(contract: Mapping[str, Any]) -> dict[str, str]:
    """Return what a method takes, in words."""
    words = {"base": str(contract["base"])} if "base" in contract else {}
    counts = [
        _count(contract[key]) + ending
        for key, ending in (("inputs", ""), ("others", " besides the base"))
        if key in contract and tuple(contract[key]) != (0, None)
    ]
    return {**words, "inputs": ", ".join(counts)} if counts else words


def _count(bounds: Sequence[int | None]) -> str:
    least, most = bounds
    if most is None:
        return f"at least {least}"
    return f"exactly {least}" if least == most else f"{least} to {most}"


def _entry(label: str, value: str) -> Iterator[str]:
    """Yield a labelled value; its own line breaks are kept, as formulas have them."""
    for number, line in enumerate(value.splitlines()):
        yield from _hanging((label if number == 0 else "").ljust(_INDENT), line)


def _parameter(parameter: Mapping[str, Any]) -> Iterator[str]:
    per = parameter.get("per")
    facts = [str(parameter[key]) for key in ("kind",) if parameter.get(key)]
    facts += [_PER.get(str(per), str(per))] if per else []
    default = parameter.get("default")
    facts.append("required" if parameter.get("required") else f"default {_plain(default)}")
    yield f"  {parameter['name']} ({', '.join(facts)})"
    text = parameter.get("help")
    if text:
        yield from textwrap.wrap(
            str(text), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
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
