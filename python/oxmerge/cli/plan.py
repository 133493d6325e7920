"""Show what a merge would do: tensors, bytes, memory, disk, time. No tensor is merged."""

from __future__ import annotations

from oxmerge.cli.arguments import Parser, add_plan_options, plan_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace

    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    add_plan_options(parser)


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Plan and print the plan."""
    plan = engine.plan(options.recipe, **plan_options(options))
    printer.warnings(plan.warnings)
    if printer.as_json:
        printer.json(plan.as_dict())
    else:
        printer.data(str(plan))
    return 0
