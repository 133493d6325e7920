"""Show how two models differ: by tensor, layer and module.

The exit code is 0 if they are equal, bit for bit, 1 if they differ, and 2 if that is not known.
"""

from __future__ import annotations

from heapq import nlargest
from itertools import islice

from oxmerge.cli.arguments import Parser, add_json_option, add_resource_options, check_file
from oxmerge.cli.progress import show_progress
from oxmerge.cli.tables import print_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Iterator

    from oxmerge.checking.differences import Difference, Numbers, TensorDifference
    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer

EQUAL, DIFFERENT = 0, 1
#: Rows of each kind that are shown, unless all are asked for.
_SHOWN = 10
_HEAD = ("changed", "largest", "RMS", "relative", "cosine", "flips")


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument("a", metavar="A", help="a model: what a recipe may name")
    parser.add_argument("b", metavar="B", help="the model that is compared with it")
    parser.add_argument("--base", metavar="MODEL", help="compare what A and B add to this model")
    parser.add_argument("--all", action="store_true", help="show every layer and tensor")
    parser.add_argument(
        "--html", metavar="FILE", help="write a page with a heat map and a table to sort"
    )
    add_resource_options(parser)
    add_json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print no progress")


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Compare and tell how they differ."""
    if options.html is not None:
        check_file(options.html)
    given = {"base": options.base, "memory": options.memory, "threads": options.threads}
    with show_progress(printer) as progress:
        found = engine.diff(options.a, options.b, **given, progress=progress or False)
    printer.warnings(found.warnings)
    if options.html is not None:
        from oxmerge.checking.page import write_page  # noqa: PLC0415 - seldom asked for

        write_page(found, options.html)
    if printer.as_json:
        rows = (tensor.as_dict() for tensor in found.tensors)
        printer.json_with_rows(found.as_dict(), "tensors", rows)
    else:
        _tell(found, printer, everything=options.all)
    return EQUAL if found.is_equal else DIFFERENT


def _tell(found: Difference, printer: Printer, *, everything: bool) -> None:
    printer.lines(_summary(found, None if everything else _SHOWN))
    if found.is_equal:
        return
    most = None if everything else _SHOWN
    printer.data("")
    _table(printer, "module", found.modules, most)
    _table(printer, "layer", found.layers, most)
    title = "tensors" if everything else "the tensors that differ most"
    changed = (tensor for tensor in found.tensors if everything or not tensor.is_equal)
    tensors = changed if everything else nlargest(_SHOWN, changed, key=_weight)
    rows = ((tensor.name, *_cells(tensor.numbers)) for tensor in tensors)
    print_table(printer, title, ("tensor", *_HEAD), rows)


def _summary(found: Difference, most: int | None) -> Iterator[str]:
    yield f"a     {found.a}"
    yield f"b     {found.b}"
    if found.base is not None:
        yield f"base  {found.base}: cosine, relative norm and flips are of task vectors"
    yield ""
    yield found.verdict
    total = found.total
    if not found.is_equal and total.elements:
        cells = zip(_HEAD, _cells(total), strict=True)
        yield ", ".join(f"{name} {cell}" for name, cell in cells)
    if total.left_out:
        yield f"{total.left_out} elements are left out: they are not finite, or too far apart"
    lists = {
        "only in a": found.only_in_a,
        "only in b": found.only_in_b,
        "not in the base, and not compared": found.not_in_base,
    }
    for what, names in lists.items():
        if names:
            yield f"{what}: {len(names)} tensors"
            yield from _names(names, most)
    if found.unlike:
        yield f"of other shapes or types: {len(found.unlike)} tensors"
        unlike = (
            f"{x.name}: {x.a[0]} {list(x.a[1])}, {x.b[0]} {list(x.b[1])}" for x in found.unlike
        )
        yield from _names(unlike, most)


def _names(names: Iterable[str], most: int | None) -> Iterator[str]:
    left = iter(names)
    yield from (f"  {name}" for name in islice(left, most))
    if next(left, None) is not None:
        yield "  ... (`--all` shows all)"


def _table(printer: Printer, what: str, groups: dict[str, Numbers], most: int | None) -> None:
    shown = list(groups)
    if len(shown) == 1:
        return  # it is the whole model
    title = f"by {what}"
    if most is not None and len(shown) > most:
        shown = nlargest(most, shown, key=lambda name: groups[name].relative or 0.0)
        title += f": {most} of {len(groups)}, those that differ most"
    rows = ((name, *_cells(groups[name])) for name in shown)
    print_table(printer, title, (what, *_HEAD), rows)


def _weight(tensor: TensorDifference) -> tuple[bool, float]:
    relative = tensor.numbers.relative
    return relative is None, relative or 0.0


def _cells(numbers: Numbers) -> tuple[str, ...]:
    share = numbers.changed / numbers.elements if numbers.elements else 0.0
    relative, cosine = numbers.relative, numbers.cosine
    return (
        f"{share:.2%}",
        f"{numbers.largest:.3g}",
        f"{numbers.rms:.3g}",
        "-" if relative is None else f"{relative:.3g}",
        "-" if cosine is None else f"{cosine:.6f}",
        str(numbers.flips),
    )
