"""How fast `oxmerge.kernels` are on arrays in memory, beside torch and NumPy.

    python benches/arrays.py [--elements 64Mi] [--rounds 15] [--save FILE]

The rounds, the yardsticks, the record and the table are those of `oxmerge bench`: each round runs
everyone once, and each counts every byte of every input and of the result once. Before each there
is a pause, in which the threads of the one before, which spin for a while, go to sleep. What takes
seconds runs in the last three rounds only.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from oxmerge import kernels
from oxmerge.bench.arrays import Arrays, copy_jobs
from oxmerge.bench.crew import Crews
from oxmerge.bench.machine import Others, cores, describe, warnings_of
from oxmerge.bench.measure import Job, Taken, measure
from oxmerge.bench.record import Record, Row, write_record
from oxmerge.bench.table import text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Call = Callable[[], object]

CHUNK = 1 << 20  # elements that a careful torch program widens at once
PAUSE = 0.03  # seconds
SMALL_CALLS = 200  # at a time: one alone is too short for a clock
FEW = 3
WEIGHTS = (0.7, 0.3, 0.2, 0.1)


def job(
    name: str, by: str, call: Call, moved: tuple[int, int], *, rounds: int | None = None
) -> Job:
    """Return a job of one call that reads and writes so many bytes."""
    calls = 1 if sum(moved) > CHUNK else SMALL_CALLS

    def run() -> Taken:
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return Taken((time.perf_counter() - started) / calls)

    row = Row("kernels", name, by, "memory", *moved, cores())
    return Job(row, run, lambda: time.sleep(PAUSE), warm_up=rounds is None, rounds=rounds)


def in_chunks(tensors: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Sum in float32, a chunk at a time, as a careful program does."""
    for start in range(0, out.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        total = tensors[0][part].float().mul_(WEIGHTS[0])
        for tensor, weight in zip(tensors[1:], WEIGHTS[1:], strict=False):
            total.add_(tensor[part].float().mul_(weight))
        out[part] = total


def plain(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum in float32 as everyone writes it first."""
    terms = (weight * tensor.float() for weight, tensor in zip(WEIGHTS, tensors, strict=False))
    return sum(terms, torch.zeros(())).to(tensors[0].dtype)


def in_numpy(arrays: Sequence[NDArray[np.uint16]]) -> NDArray[np.uint16]:
    """Sum in float32 in NumPy, and round to nearest even."""
    total = np.zeros(arrays[0].size, np.float32)
    for weight, each in zip(WEIGHTS, arrays, strict=False):
        total += np.float32(weight) * (each.astype(np.uint32) << 16).view(np.float32)
    bits = total.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def large(arrays: Arrays) -> Iterator[Job]:
    """Yield what is done to large arrays."""
    raw = (*arrays.inputs, arrays.output)
    *tensors, out = (torch.from_numpy(each.view(np.int16)).view(torch.bfloat16) for each in raw)
    one, half = arrays.output.nbytes, arrays.elements // 2
    mask = torch.empty(arrays.elements, dtype=torch.bool)
    yield job(
        "copy", "oxmerge", lambda: kernels.convert(tensors[0], "bfloat16", out=out), (one, one)
    )
    yield job("copy", "torch", lambda: out.copy_(tensors[0]), (one, one))
    for count in (2, 3):
        yield from sums(tensors[:count], out, arrays.inputs[:count])
    x, bits = tensors[1], (one, one // 2)
    yield job("half of all", "oxmerge", lambda: kernels.top_k_mask(x, half, out=mask), bits)
    yield job(
        "half of all", "torch.topk", lambda: x.abs().topk(half, sorted=False), bits, rounds=FEW
    )
    yield job("median", "oxmerge", lambda: kernels.kth_magnitude(x, half), (one, 0))
    yield job("median", "torch.kthvalue", lambda: x.abs().kthvalue(half), (one, 0), rounds=FEW)
    yield job("dot", "oxmerge", lambda: kernels.dot(x, tensors[0]), (2 * one, 0))
    yield job("norm", "oxmerge", lambda: kernels.norm(x), (one, 0))
    yield job("norm", "torch", lambda: torch.linalg.vector_norm(x.float()), (one, 0), rounds=FEW)


def sums(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, raw: Sequence[NDArray[np.uint16]]
) -> Iterator[Job]:
    """Yield weighted sums of as many arrays. A new result costs page faults, nearly all of it."""
    name, weights = f"sum of {len(tensors)}", WEIGHTS[: len(tensors)]
    one = 2 * out.numel()
    moved = (len(tensors) * one, one)
    targets = {"oxmerge": out, "oxmerge, in place": tensors[0], "oxmerge, new result": None}
    for by, target in targets.items():

        def summed(target: torch.Tensor | None = target) -> object:
            return kernels.weighted_sum(tensors, weights, out=target)

        yield job(name, by, summed, moved)
    if len(tensors) == 2:
        yield job(name, "torch.lerp", lambda: torch.lerp(*tensors, 0.3, out=out), moved)
    yield job(name, "torch, in chunks", lambda: in_chunks(tensors, out), moved)
    yield job(name, "torch, plainly", lambda: plain(tensors), moved, rounds=FEW)
    yield job(name, "numpy", lambda: in_numpy(raw), moved, rounds=FEW)


def small() -> Iterator[Job]:
    """Yield calls on 4 KiB, which cost what a call costs."""
    arrays = [np.ones(1024, np.float32) for _ in range(2)]
    tensors = [torch.ones(1024) for _ in range(2)]
    half, moved = [0.5, 0.5], (8192, 4096)

    def summed(of: Sequence[torch.Tensor] | Sequence[NDArray[np.float32]]) -> Call:
        return lambda: kernels.weighted_sum(of, half, out=of[0])

    yield job("sum of 2, 4 KiB", "oxmerge", summed(tensors), moved)
    yield job("sum of 2, 4 KiB", "oxmerge, numpy", summed(arrays), moved)
    yield job("sum of 2, 4 KiB", "torch", lambda: tensors[0].lerp_(tensors[1], 0.5), moved)
    yield job("linear, 4 KiB", "oxmerge", lambda: kernels.linear(tensors, weight=0.5), moved)
    yield job("norm, 4 KiB", "oxmerge", lambda: kernels.norm(arrays[0]), (4096, 0))
    yield job("top_k_mask, 4 KiB", "oxmerge", lambda: kernels.top_k_mask(arrays[0], 512), moved)


def size(text: str) -> int:
    """Read a number of elements such as 64Mi."""
    return int(text.removesuffix("Mi")) << (20 if text.endswith("Mi") else 0)


def main() -> None:
    """Measure, print, and save where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=size, default=64 << 20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(cores())
    machine, others = describe(os.curdir), Others()
    with Crews() as crews:
        arrays = Arrays.draw(options.elements, crews.of(cores()))
        jobs = [*copy_jobs(arrays, [cores()], crews), *large(arrays), *small()]
        rows, notes = measure(jobs, options.rounds, lambda _: None)
    machine |= others.busy()
    settings = {"size": "none", "rounds": options.rounds, "storage_bytes": 0}
    settings |= {"elements": options.elements}
    notes = [*warnings_of(machine), f"torch {torch.__version__}, {cores()} threads", *notes]
    record = Record(machine, settings, tuple(rows), tuple(notes))
    print(text(record))
    if options.save is not None:
        options.save.write_text(write_record(record))


if __name__ == "__main__":
    main()
