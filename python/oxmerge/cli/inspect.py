"""Show what is in a checkpoint: tensors by stack, dtypes, shapes, layers, tied pairs."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import Any

from oxmerge.cli.arguments import Parser, add_json_option
from oxmerge.json_files import read_json
from oxmerge.models.names import find_layer_counts, find_layout, is_head
from oxmerge.models.vocabularies import folder_beside
from oxmerge.output.config import says_tied
from oxmerge.planning.accounting import runs
from oxmerge.problems import printable
from oxmerge.schema import DTYPE_SIZES
from oxmerge.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Iterator, Sequence

    from oxmerge._core import Checkpoint, TensorInfo
    from oxmerge.cli.engine import Engine
    from oxmerge.cli.printer import Printer
    from oxmerge.models.names import Layout

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")
_LEAST_STACK = 2
_NAME_WIDTH = 46


@dataclass(frozen=True)
class Row:
    """Tensors of one name (but for numbers), dtype and shape."""

    pattern: str
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Stack:
    """Tensors that repeat over layers."""

    prefix: str
    layers: int
    rows: dict[Row, list[int]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Contents:
    """What a checkpoint holds, sorted."""

    loose: list[Row]
    stacks: list[Stack]
    tied: list[str]
    dtypes: dict[str, tuple[int, int]]
    parameters: int
    total_bytes: int


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "model", metavar="MODEL", help="a model directory, a weight file, or a name on the Hub"
    )
    add_json_option(parser)


def run(options: Namespace, printer: Printer, engine: Engine) -> int:
    """Open the checkpoint and print what it holds."""
    located, checkpoint = engine.open_checkpoint(options.model)
    contents = sort_tensors(checkpoint, _read_config(located.path))
    printer.warnings([*map(str, located.warnings), *checkpoint.warnings])
    if printer.as_json:
        printer.json(_as_data(options.model, located.pinned, checkpoint, contents))
    else:
        printer.lines(_lines(options.model, located.pinned, checkpoint, contents))
    return 0


def sort_tensors(checkpoint: Checkpoint, config: dict[str, Any]) -> Contents:
    """Sort the tensors of a checkpoint into stacks and loose ones, as merging does."""
    tensors = list(checkpoint.tensors)
    layout = _layout([tensor.name for tensor in tensors], config)
    stacks = {prefix: Stack(prefix, stack.depth) for prefix, stack in layout.stacks.items()}
    loose = []
    for tensor in tensors:
        place = layout.place(tensor.name)
        shape = tuple(tensor.shape)
        if place is None or place.is_extra:
            loose.append(Row(tensor.name, tensor.dtype, shape))
            continue
        row = Row(_NUMBER.sub("#", place.rest), tensor.dtype, shape)
        stacks[place.stack.prefix].rows[row].append(place.layer)
    return Contents(
        loose,
        list(stacks.values()),
        _tied(tensors, config),
        _by_dtype(tensors),
        sum(prod(tensor.shape) for tensor in tensors),
        sum(_bytes(tensor) for tensor in tensors),
    )


def _layout(names: list[str], config: dict[str, Any]) -> Layout:
    """Find the stacks that the config counts; without a config, whatever is numbered."""
    counts = find_layer_counts(config)
    if not config:
        numbered = find_layout(names, counts).numbered.values()
        counts = frozenset(count for count in numbered if count >= _LEAST_STACK)
    return find_layout(names, counts)


def _read_config(model: str) -> dict[str, Any]:
    try:
        config, _ = read_json(os.path.join(folder_beside(model), "config.json"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _bytes(tensor: TensorInfo) -> int:
    return prod(tensor.shape) * DTYPE_SIZES[tensor.dtype]


def _by_dtype(tensors: Iterable[TensorInfo]) -> dict[str, tuple[int, int]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += 1
        sizes[tensor.dtype] += _bytes(tensor)
    return {dtype: (counts[dtype], sizes[dtype]) for dtype in sorted(counts)}


def _tied(tensors: Iterable[TensorInfo], config: dict[str, Any]) -> list[str]:
    """Say what is tied to what, as far as the config does."""
    if not says_tied(config):
        return []
    has_head = any(is_head(tensor.name) for tensor in tensors)
    stored = ", though a head is stored" if has_head else ""
    return [f"output head = input embedding, says the config{stored}"]


def _lines(
    model: str, pinned: str | None, checkpoint: Checkpoint, contents: Contents
) -> Iterator[str]:
    count, files = len(checkpoint.tensors), len(checkpoint.files)
    yield f"model       {model}"
    if pinned is not None:
        away = [int(file["size"]) for file in checkpoint.files if "remote" in file]
        yield f"on the Hub  {pinned}, {_whereabouts(away)}"
    yield f"files       {files}, {format_size(contents.total_bytes)} of weights"
    yield f"tensors     {count}"
    yield f"parameters  {contents.parameters:,} ({_human(contents.parameters)})"
    for dtype, (number, size) in contents.dtypes.items():
        yield f"dtype       {dtype}: {number} tensors, {format_size(size)}"
    for pair in contents.tied:
        yield f"tied        {pair}"
    for stack in contents.stacks:
        yield ""
        yield f"{stack.prefix}: {stack.layers} layers"
        for row, layers in stack.rows.items():
            yield _row(row) + _where(layers, stack.layers)
    if contents.loose:
        yield ""
        yield "outside of layers"
        yield from (_row(row) for row in contents.loose)


def _whereabouts(away: list[int]) -> str:
    """Say whether the weights are on this machine; `away` are the bytes of files that are not."""
    files = "1 file" if len(away) == 1 else f"{len(away)} files"
    return f"{files} with {format_size(sum(away))} not downloaded" if away else "on this machine"


def _row(row: Row) -> str:
    shape = " x ".join(str(length) for length in row.shape) or "scalar"
    return f"  {printable(row.pattern):<{_NAME_WIDTH}} {row.dtype:<5} {shape}"


def _where(layers: Sequence[int], depth: int) -> str:
    """Say in which layers a row is, unless it is in each once."""
    distinct = sorted(set(layers))
    times = f", {len(layers) // len(distinct)} each" if len(layers) > len(distinct) else ""
    if len(distinct) == depth:
        return times
    parts = (str(a) if a == b else f"{a}-{b}" for a, b in runs(distinct))
    return f", layers {', '.join(parts)}{times}"


def _human(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def _as_data(
    model: str, pinned: str | None, checkpoint: Checkpoint, contents: Contents
) -> dict[str, Any]:
    return {
        "model": model,
        "pinned": pinned,
        "files": [str(file["path"]) for file in checkpoint.files],
        "parameters": contents.parameters,
        "bytes": contents.total_bytes,
        "dtypes": {
            dtype: {"tensors": count, "bytes": size}
            for dtype, (count, size) in contents.dtypes.items()
        },
        "stacks": {stack.prefix: stack.layers for stack in contents.stacks},
        "tied": contents.tied,
        "tensors": [
            {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            for tensor in checkpoint.tensors
        ],
        "warnings": [str(warning) for warning in checkpoint.warnings],
    }
