"""Show what a merge would do: tensors, bytes, memory, disk, time. No tensor is merged."""

from __future__ import annotations

from dataclasses import asdict

from oxmerge.cli import mergekit
from oxmerge.cli.arguments import Parser, add_plan_options, plan_options
from oxmerge.recipe.patterns import compile_pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace

    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer
    from oxmerge.planning.plans import Plan


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    add_plan_options(parser)
    mergekit.add_options(parser)
    parser.add_argument(
        "--explain",
        metavar="TENSORS",
        help="tell where each number for these tensors comes from: a name, or a pattern such as "
        "'model.layers.3.*', where `*` is any part of a name",
    )
    parser.add_argument("--save", metavar="FILE", help="write the plan to a file that merge takes")
    parser.add_argument("-q", "--quiet", action="store_true", help="print the plan and errors only")


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Plan and print the plan."""
    for note in mergekit.notes(options):
        printer.say(f"note: {note}")
    plan = engine.plan(options.recipe, **plan_options(options))
    printer.warnings(plan.warnings)
    if options.save is not None:
        plan.save(options.save)
        printer.say(f"saved the plan as `{options.save}`")
    if options.explain is not None:
        _explain(plan, options.explain, printer)
    elif printer.as_json:
        printer.json(plan.as_dict())
    else:
        printer.data(str(plan))
    return 0


def _explain(plan: Plan, pattern: str, printer: Printer) -> None:
    is_chosen = compile_pattern(pattern).fullmatch
    chosen = [name for name in plan.tensors.names if is_chosen(name)] or [pattern]
    if printer.as_json:
        tensors = (plan.tensors.find(name) for name in chosen)
        data = {tensor.name: asdict(tensor) for tensor in tensors if tensor is not None}
        printer.json({"tensors": data})
    else:
        printer.data("\n".join(plan.explain(name) for name in chosen))
