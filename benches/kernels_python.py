"""How fast `oxmerge.kernels` are on arrays in memory, beside a copy, torch and NumPy.

After the large arrays come calls on small ones, averages in place among them, and on lists of many.

Everything runs in one process, in rounds: each round runs every contender once, so that a busy
moment hits all alike, and the best round of each counts. Before each there is a pause, in which the
threads of the one before, which spin for a while, go to sleep. Rates count every byte of every
input and of the result once.

    python benches/kernels_python.py [--elements 64Mi] [--rounds 15] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import torch
from oxmerge import kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Array = np.ndarray[Any, Any]

#: Elements that a careful torch program widens at once.
CHUNK = 1 << 20
#: Seconds before a contender runs: threads of OpenMP spin after their work.
PAUSE = 0.03


@dataclass(frozen=True)
class Case:
    """A contender.

    Attributes
    ----------
    group, name : str
        What is computed, and by whom.
    call : callable
        Does it once.
    bytes : int
        Bytes that it has to move, at least.
    rounds : int
        In how many of the rounds it runs: some take seconds.
    """

    group: str
    name: str
    call: Callable[[], object]
    bytes: int
    rounds: int = 1 << 30


@dataclass(frozen=True)
class Target:
    """What is promised: `better` takes at most 1 / `factor` of the time of `worse`.

    With `rates`, the rate in bytes is compared instead of the time.
    """

    better: str
    worse: str
    factor: float
    rates: bool = False


TARGETS = (
    Target("sum of 2: oxmerge", "copy: best", 0.85, rates=True),
    Target("sum of 2: oxmerge", "sum of 2: torch.lerp", 1),
    Target("sum of 2: oxmerge", "sum of 2: torch float32 in chunks", 2),
    Target("sum of 2: oxmerge", "sum of 2: torch float32", 12),
    Target("sum of 2: oxmerge", "sum of 2: numpy float32", 12),
    Target("sum of 4: oxmerge", "copy: best", 0.85, rates=True),
    Target("half of all: oxmerge top_k_mask", "half of all: torch.topk", 30),
    Target("half of all: oxmerge top_k_mask", "half of all: torch.kthvalue", 8),
)


def chunked(tensors: list[torch.Tensor], weights: list[float], out: torch.Tensor) -> None:
    """Sum in float32, a chunk at a time, as a careful program does."""
    for start in range(0, out.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        total = tensors[0][part].float().mul_(weights[0])
        for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
            total.add_(tensor[part].float().mul_(weight))
        out[part] = total


def plain(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Sum in float32 as everyone writes it first."""
    terms = (w * tensor.float() for w, tensor in zip(weights, tensors, strict=True))
    return sum(terms, torch.zeros(())).to(tensors[0].dtype)


def widened(tensor: torch.Tensor) -> Array:
    """Return bfloat16 as float32, in NumPy."""
    bits: Array = tensor.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32)


def in_numpy(tensors: list[torch.Tensor], weights: list[float]) -> Array:
    """Sum in float32 in NumPy, and round to nearest even."""
    total = np.float32(weights[0]) * widened(tensors[0])
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total += np.float32(weight) * widened(tensor)
    bits = total.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def cases(elements: int, threads: int) -> Iterable[Case]:
    """Yield every contender."""
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(elements, generator=generator) for _ in range(4))
    tensors = [draw.to(torch.bfloat16) for draw in draws]
    out, mask = torch.empty_like(tensors[0]), torch.empty(elements, dtype=torch.bool)
    one, k, few = 2 * elements, elements // 2, 3
    raw = [tensor.view(torch.int16).numpy() for tensor in (tensors[0], out)]
    yield Case("copy", "torch", lambda: out.copy_(tensors[0]), 2 * one)
    yield Case("copy", "oxmerge convert", lambda: _convert(tensors[0], out, threads), 2 * one)
    yield Case("copy", "numpy (one thread)", lambda: np.copyto(raw[1], raw[0]), 2 * one)
    for count in (2, 4):
        group, inputs, weights = f"sum of {count}", tensors[:count], [0.7, 0.3, 0.2, 0.1][:count]
        total = (count + 1) * one
        yield Case(group, "oxmerge", _summing(inputs, weights, out, threads), total)
        yield Case(group, "oxmerge, new result", _summing(inputs, weights, None, threads), total)
        yield Case(group, "oxmerge, in place", _summing(inputs, weights, inputs[0], threads), total)
        if count == 2:
            a, b = inputs
            yield Case(group, "torch.lerp", _lerp(a, b, out), total)
        yield Case(group, "torch float32 in chunks", _chunked(inputs, weights, out), total)
        yield Case(group, "torch float32", _plain(inputs, weights), total, few)
        yield Case(group, "numpy float32", _in_numpy(inputs, weights), total, few)
    x, options = tensors[1], {"threads": threads}
    reads = {"out": mask, **options}
    group = "half of all"
    yield Case(group, "oxmerge top_k_mask", lambda: kernels.top_k_mask(x, k, **reads), one)
    yield Case(group, "oxmerge kth_magnitude", lambda: kernels.kth_magnitude(x, k, **options), one)
    yield Case(group, "torch.kthvalue", lambda: x.abs().kthvalue(k), one, few)
    yield Case(group, "torch.topk", lambda: x.abs().topk(k, sorted=False), one, few)
    a, b = tensors[1:3]
    yield Case("dot", "oxmerge", lambda: kernels.dot(a, b, **options), 2 * one)
    yield Case("norm", "oxmerge", lambda: kernels.norm(a, **options), one)
    yield Case("norm", "torch float32", lambda: torch.linalg.vector_norm(a.float()), one, few)


def _convert(source: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    kernels.convert(source, "bfloat16", out=out, threads=threads)


def _summing(
    tensors: list[torch.Tensor], weights: list[float], out: torch.Tensor | None, threads: int
) -> Callable[[], object]:
    return lambda: kernels.weighted_sum(tensors, weights, out=out, threads=threads)


def _lerp(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.lerp(a, b, 0.3, out=out)


def _chunked(
    tensors: list[torch.Tensor], weights: list[float], out: torch.Tensor
) -> Callable[[], object]:
    return lambda: chunked(tensors, weights, out)


def _plain(tensors: list[torch.Tensor], weights: list[float]) -> Callable[[], object]:
    return lambda: plain(tensors, weights)


def _in_numpy(tensors: list[torch.Tensor], weights: list[float]) -> Callable[[], object]:
    return lambda: in_numpy(tensors, weights)


def measure(all_cases: list[Case], rounds: int) -> dict[str, dict[str, float]]:
    """Run the rounds; seconds (best and median) and rate of each contender."""
    times: dict[str, list[float]] = {}
    for each in range(rounds):
        for case in all_cases:
            if each < case.rounds:
                time.sleep(PAUSE)
                started = time.perf_counter()
                case.call()
                seconds = time.perf_counter() - started
                times.setdefault(f"{case.group}: {case.name}", []).append(seconds)
    found = {}
    for case in all_cases:
        name = f"{case.group}: {case.name}"
        best = min(times[name])
        middle = sorted(times[name])[len(times[name]) // 2]
        found[name] = {"best_s": best, "median_s": middle, "bytes": case.bytes}
    copies = [row for name, row in found.items() if name.startswith("copy: ")]
    found["copy: best"] = min(copies, key=lambda row: row["best_s"])
    return found


def small_calls() -> dict[str, float]:
    """Return microseconds of a call on 4 KiB, by kind of array."""
    arrays = [np.ones(1024, np.float32) for _ in range(2)]
    tensors = [torch.ones(1024) for _ in range(2)]
    calls: dict[str, Callable[[], object]] = {
        "weighted_sum, numpy": lambda: kernels.weighted_sum(arrays, [0.5, 0.5], out=arrays[0]),
        "weighted_sum, torch": lambda: kernels.weighted_sum(tensors, [0.5, 0.5], out=tensors[0]),
        "linear, numpy": lambda: kernels.linear(arrays, weight=0.5, out=arrays[0]),
        "linear, torch, new result": lambda: kernels.linear(tensors, weight=0.5),
        "norm, numpy": lambda: kernels.norm(arrays[0]),
        "top_k_mask, numpy": lambda: kernels.top_k_mask(arrays[0], 512),
    }
    found = {}
    for name, call in calls.items():
        best = float("inf")
        for _ in range(200):
            started = time.perf_counter()
            for _ in range(50):
                call()
            best = min(best, (time.perf_counter() - started) / 50)
        found[name] = best * 1e6
    return found


#: A model of many small tensors: how many, and the length of their rows and columns.
TENSORS, LENGTH = 400, 64


def list_calls(threads: int) -> dict[str, float]:
    """Return microseconds of a step of an average over many small tensors, in place."""
    shape = (LENGTH, LENGTH)
    mean, latest = ([torch.randn(shape) for _ in range(TENSORS)] for _ in range(2))
    a, b = ([tensor.numpy() for tensor in tensors] for tensors in (mean, latest))
    options: dict[str, Any] = {"threads": threads}
    calls: dict[str, Callable[[], object]] = {
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(mean, latest, 0.1),
        "oxmerge lerp, torch": lambda: kernels.lerp(mean, latest, 0.1, out=mean, **options),
        "oxmerge lerp, numpy": lambda: kernels.lerp(a, b, 0.1, out=a, **options),
        "oxmerge weighted_sum, torch": lambda: kernels.weighted_sum(
            [mean, latest], [0.9, 0.1], out=mean, **options
        ),
    }
    # In turns, so that a busy moment hits all alike.
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(300):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            found[name] = min(found[name], (time.perf_counter() - started) * 1e6)
    return found


def average_calls() -> dict[str, float]:
    """Return microseconds of an average of two arrays of 256 by 256, apart and in place."""
    a, b, out = (np.ones((256, 256), np.float32) for _ in range(3))
    calls: dict[str, Callable[[], object]] = {}
    for where, target in (("apart", out), ("in place", a)):
        calls[f"lerp, {where}"] = lambda to=target: kernels.lerp(a, b, 0.1, out=to)  # type: ignore[misc]
        calls[f"linear, {where}"] = lambda to=target: kernels.linear([a, b], weight=0.5, out=to)  # type: ignore[misc]
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(1000):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            found[name] = min(found[name], (time.perf_counter() - started) * 1e6)
    return found


def ratio(rows: dict[str, dict[str, float]], target: Target) -> float:
    """Return by how much the better one is ahead."""
    better, worse = rows[target.better], rows[target.worse]
    if target.rates:
        return better["bytes"] / better["best_s"] * worse["best_s"] / worse["bytes"]
    return worse["best_s"] / better["best_s"]


def size(text: str) -> int:
    """Read a number of elements such as 64Mi."""
    units = {"Ki": 1 << 10, "Mi": 1 << 20}
    unit = next((unit for unit in units if text.endswith(unit)), "")
    return int(text.removesuffix(unit)) * units.get(unit, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=size, default=64 << 20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    rows = measure(list(cases(options.elements, options.threads)), options.rounds)
    calls = small_calls()
    lists, averages = list_calls(options.threads), average_calls()
    out = sys.stdout.write
    out(f"{options.elements >> 20} Mi elements of bfloat16, {options.threads} threads, best of ")
    out(f"{options.rounds} rounds, load {load:.1f} at the start, simd ")
    out(f"{oxmerge.build_info()['simd']}, torch {torch.__version__}\n\n")
    copy = rows["copy: best"]["bytes"] / rows["copy: best"]["best_s"]
    out("| case | best ms | median ms | GB/s | of a copy |\n| --- | --- | --- | --- | --- |\n")
    for name, row in rows.items():
        rate = row["bytes"] / row["best_s"]
        out(f"| {name} | {row['best_s'] * 1e3:.2f} | {row['median_s'] * 1e3:.2f} ")
        out(f"| {rate / 1e9:.1f} | {rate / copy:.0%} |\n")
    out("\n| a call on 4 KiB | µs |\n| --- | --- |\n")
    out("".join(f"| {name} | {each:.1f} |\n" for name, each in calls.items()))
    out(f"\n| {TENSORS} tensors of {LENGTH} by {LENGTH} | µs |\n| --- | --- |\n")
    out("".join(f"| {name} | {each:.0f} |\n" for name, each in lists.items()))
    out("\n| two arrays of 256 by 256 | µs |\n| --- | --- |\n")
    out("".join(f"| {name} | {each:.1f} |\n" for name, each in averages.items()))
    out("\n| target | wanted | found |\n| --- | --- | --- |\n")
    verdicts = []
    for target in TARGETS:
        found = ratio(rows, target)
        verdicts.append((f"{target.better} ÷ {target.worse}", target.factor, found))
    verdicts.append(("20 µs ÷ slowest small sum", 1, 20 / max(list(calls.values())[:4])))
    foreach, ours = lists["torch._foreach_lerp_"], lists["oxmerge lerp, torch"]
    verdicts.append(("a list: oxmerge ÷ torch._foreach_lerp_", 1, foreach / ours))
    for name in ("lerp", "linear"):
        share = averages[f"{name}, apart"] / averages[f"{name}, in place"]
        verdicts.append((f"{name}: in place ÷ apart", 0.8, share))
    for name, wanted, found in verdicts:
        out(f"| {name} | {wanted:g} | {found:.2f}{'' if found >= wanted else ' **missed**'} |\n")
    if options.json is not None:
        options.json.write_text(
            json.dumps(
                {"rows": rows, "small": calls, "lists": lists, "averages": averages, "load": load},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
