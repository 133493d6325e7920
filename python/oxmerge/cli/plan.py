"""Show what a merge would do: tensors, bytes, memory, disk, time. No tensor is merged."""

from __future__ import annotations

from oxmerge.cli.arguments import Parser, add_plan_options, plan_options
from oxmerge.cli.progress import format_duration
from oxmerge.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from oxmerge.cli.engine import Engine, PlanSummary
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
        printer.lines(_lines(plan))
    return 0


def _time(plan: PlanSummary) -> str:
    """Say how long the bytes take, on a common disk and on a fast one."""
    moved = plan.bytes_read + plan.bytes_written
    slow, fast = (format_duration(moved / rate) for rate in (1e9, 3e9))
    return f"{slow} where the disk moves 1 GB/s, {fast} at 3 GB/s"


def _fastest(plan: PlanSummary) -> str:
    return f"{plan.fastest.device}: {plan.fastest.reason}"


def _lines(plan: PlanSummary) -> Iterator[str]:
    files = "1 file" if plan.files == 1 else f"{plan.files} files"
    yield f"method    {plan.method}"
    yield f"tensors   {plan.tensors} in {files}"
    yield f"reads     {format_size(plan.bytes_read)}: {plan.cost}"
    yield f"writes    {format_size(plan.bytes_written)}"
    yield f"memory    {format_size(plan.memory, binary=True)} at the peak"
    yield f"threads   {plan.threads}"
    yield f"device    {plan.device}; the fastest should be {_fastest(plan)}"
    yield f"disk      {format_size(plan.disk)} needed"
    yield f"time      {_time(plan)}"
    entries = [f"{count} {fate}" for fate, count in plan.accounting.items() if count]
    for name in plan.left_out:
        yield f"not copied  {name}"
    yield f"inputs    {', '.join(entries) or 'no tensors'}"
