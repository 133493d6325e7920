"""A difference as a page of HTML: a heat map, distributions, and a table to sort."""

from __future__ import annotations

import json
import os

from oxmerge.models.places import LOOSE
from oxmerge.pages import CLOSING, opening
from oxmerge.problems import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from oxmerge.checking.differences import Difference, TensorDifference

__all__ = ["write_page"]

#: Cells of the map, beyond which nobody sees anything.
_MOST_CELLS = 20_000
_STYLE = """
body { max-width: 90rem; } .quiet { opacity: .75; } .verdict { font-weight: 600; }
#map th, #map td { padding: .1rem .45rem; font-size: .8rem; } #map td { border: 1px solid #8882; }
#tensors th { padding: 0; } #tensors tbody { font-size: .85rem; }
#tensors th:nth-child(-n+5), #tensors td:nth-child(-n+5), #map th:first-child { text-align: left; }
th button { font: inherit; font-weight: 600; border: 0; background: none; color: inherit;
  cursor: pointer; padding: .2rem .7rem; }
th[aria-sort="ascending"] button::after { content: " ▲"; }
th[aria-sort="descending"] button::after { content: " ▼"; }
#distributions { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
figure { margin: 0; } figcaption { font-weight: 600; } .bar { fill: #2563eb; }
svg text { fill: currentColor; font: 12px system-ui, sans-serif; }
"""


def write_page(found: Difference, path: str | os.PathLike[str]) -> None:
    """Write a difference as one page that needs no network.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    template = os.path.join(os.path.dirname(__file__), "difference.html")
    with open(template, encoding="utf-8") as file:
        body = file.read()
    names = f"{os.path.basename(found.a)} and {os.path.basename(found.b)}"
    with open(path, "w", encoding="utf-8") as page:
        page.write(opening(f"How {printable(names)} differ", _STYLE))
        page.write('\n<script type="application/json" id="data">')
        # A stranger's names must not end the script.
        page.writelines(part.replace("<", "\\u003c") for part in _data(found))
        page.write(f"</script>\n{body}{CLOSING}")


def _data(found: Difference) -> Iterator[str]:
    """Yield all that the page shows, as JSON: tensors as lists, to be short."""
    layers, modules = list(found.layers), list(found.modules)
    cells = [
        {"layer": layer, "module": module, **numbers.as_dict()}
        for (layer, module), numbers in list(found.cells.items())[:_MOST_CELLS]
    ]
    head = found.as_dict() | {
        "columns": list(found.total.as_dict()),
        "cells": cells,
        "layers": layers,
        "modules": modules,
        "loose": LOOSE,
    }
    yield json.dumps(head).removesuffix("}") + ', "tensors": ['
    layer_numbers, module_numbers = (
        {name: at for at, name in enumerate(each)} for each in (layers, modules)
    )

    def row(tensor: TensorDifference) -> str:
        place = [layer_numbers[tensor.layer], module_numbers[tensor.module]]
        types = [list(tensor.dtypes), list(tensor.shape)]
        return json.dumps([tensor.name, *place, *types, *tensor.numbers.as_dict().values()])

    for at, tensor in enumerate(found.tensors):
        yield f",\n{row(tensor)}" if at else row(tensor)
    yield "]}"
