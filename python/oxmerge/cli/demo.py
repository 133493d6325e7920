"""Make two small checkpoints and merge them, to see what a merge looks like."""

from __future__ import annotations

import os
import shlex
import shutil
import sys

from oxmerge.cli.arguments import Parser, UsageError, add_json_option, natural
from oxmerge.cli.merge import tell
from oxmerge.cli.progress import show_progress
from oxmerge.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer
    from oxmerge.demo import Demo

_KINDS = ("folders", "hub", "lora")
_SIZES = ("tiny", "1b", "7b", "70b")


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--kind",
        choices=_KINDS,
        default="folders",
        help="hub: by their names, from a small server that stands for the Hub; lora: put an "
        "adapter into the first instead of merging both (folders)",
    )
    parser.add_argument(
        "--size",
        choices=_SIZES,
        default="tiny",
        help="of the checkpoints: tiny (53 MB each), or as large as a real model (tiny)",
    )
    parser.add_argument(
        "--directory", metavar="DIR", default="oxmerge-demo", help="where (./oxmerge-demo)"
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the weights (0)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    add_json_option(parser)


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Make the checkpoints, merge them, and tell how it went."""
    from oxmerge.demo import RANK, describe, make_adapter, make_demo  # noqa: PLC0415 - not for --help
    from oxmerge.models.hub import find_library  # noqa: PLC0415 - not for --help
    from oxmerge.output.claims import claimed, named  # noqa: PLC0415 - not for --help

    if options.kind == "hub" and options.size in {"7b", "70b"}:
        raise UsageError("the small server is for small models", "ask for `--size tiny` or `1b`")
    if options.kind == "hub" and (reason := find_library()) is not None:
        raise UsageError(*reason)
    # Another demo there would make the checkpoints anew while this one merges them.
    with claimed(named(options.directory)):
        printer.say(f"making two checkpoints of size {options.size} in `{options.directory}`")
        demo = make_demo(options.directory, options.size, options.seed)
        printer.say(describe(demo))
        if options.kind == "hub":
            _by_name(demo, printer, engine)
        elif options.kind == "lora":
            adapter = make_adapter(demo, options.size, options.seed)
            printer.say(f"made an adapter of rank {RANK}: `{adapter}`")
            _fuse(demo, str(adapter), printer, engine)
        else:
            _merge(demo, str(demo.recipe), printer, engine)
    printer.say("")
    printer.say("what to try next:")
    for command in _next(demo):
        printer.say(f"  {_program()} {command}")
    return 0


def _merge(demo: Demo, recipe: str, printer: Printer, engine: Engine) -> None:
    output = str(demo.recipe.parent / "merged")
    printer.say(f"running: {_program()} merge {shlex.quote(recipe)} {shlex.quote(output)}")
    with show_progress(printer) as progress:
        report = engine.merge(recipe, output, overwrite=True, fresh=True, progress=progress)
    tell(report, printer)


def _by_name(demo: Demo, printer: Printer, engine: Engine) -> None:
    """Plan and merge by names that a server gives, and tell what it was asked for."""
    from oxmerge.demo_hub import hub_of  # noqa: PLC0415 - not for --help

    folder, (base, tuned) = str(demo.recipe.parent), map(str, demo.models)
    with hub_of(folder, base, tuned) as (hub, recipe):
        printer.say(f"serving them as `demo/base` and `demo/tuned` from {hub.address}")
        printer.say(f"running: {_program()} plan {shlex.quote(recipe)}")
        plan = engine.plan(recipe)
        for line in str(plan).splitlines():
            printer.say(f"  {line}")
        planned = hub.sent
        printer.say(f"for the plan the server sent {format_size(planned)}: headers, small files")
        _merge(demo, recipe, printer, engine)
        cache = os.environ["HF_HUB_CACHE"]
        printer.say(f"for the merge it sent {format_size(hub.sent - planned)}, kept in `{cache}`:")
        again = f"HF_HUB_CACHE={shlex.quote(cache)} {_program()} plan {shlex.quote(recipe)}"
        printer.say(f"so it needs no server any more: {again}")


def _fuse(demo: Demo, adapter: str, printer: Printer, engine: Engine) -> None:
    model, output = str(demo.models[0]), str(demo.recipe.parent / "merged")
    places = f"{shlex.quote(model)} {shlex.quote(output)} --adapter {shlex.quote(adapter)}"
    printer.say(f"running: {_program()} fuse {places}")
    with show_progress(printer) as progress:
        report = engine.fuse(
            model, output, [adapter], overwrite=True, fresh=True, progress=progress
        )
    tell(report, printer)
    printer.say(f"in a recipe that is the model {shlex.quote(f'{model}+{adapter}')}")


def _next(demo: Demo) -> Iterator[str]:
    """Yield commands that go on from here."""
    folder = demo.recipe.parent
    recipe, merged = shlex.quote(str(demo.recipe)), shlex.quote(str(folder / "merged"))
    yield f"inspect {merged}"
    yield f"plan {recipe}"
    if not demo.sparse:  # of which three more could be too much
        swept = shlex.quote(str(folder / "swept" / "t{t}"))
        yield f"sweep {recipe} {swept} --set parameters.t=0.2,0.5,0.8 --overwrite"
    yield "methods ties"
    yield "bench --quick"


def _program() -> str:
    """Return what this program is called where it was started."""
    started = sys.argv[0]
    found = shutil.which("oxmerge")
    if found is not None and os.path.exists(started) and os.path.samefile(found, started):
        return "oxmerge"
    if os.path.basename(started) == "oxmerge":
        return shlex.quote(started)
    return f"{shlex.quote(sys.executable)} -m oxmerge"
