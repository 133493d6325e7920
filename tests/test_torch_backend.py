"""The torch backend gives the bytes of the engine: on torch's CPU, and on a GPU where there is one.

Tests that run on a GPU as well are marked `cuda`; the way there is the same but for the device.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import oxmerge
import pytest
from oxmerge import _core, devices, formula
from oxmerge.cli import main
from oxmerge.errors import DeviceError, InternalError, MemoryBudgetError
from oxmerge.planning.planner import build_plan
from oxmerge.recipe.recipe import Recipe
from test_same_bytes import METHODS, recipe_of, shards_of
from writers import directory_bytes, random_arrays, tuned, write_model, write_recipe

pytest.importorskip("torch", reason="not installed: torch (see the dependency group `test`)")

import torch
from oxmerge import torch_backend, torch_kernels
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

    from writers import Array, Arrays

pytestmark = pytest.mark.slow

MIB = 1 << 20
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NO_GPU = f"torch {torch.__version__} finds no GPU here"
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(GPUS == 0, reason=NO_GPU)])
DEVICES = ["torch", CUDA]

#: More than one piece, rows of many lengths, rows longer than a block, single elements.
HARD_SHAPES = {
    "wide": (3, 70_001),
    "tall": (2051, 33),
    "short": (700, 7),
    "column": (1500, 1),
    "flat": (65_537,),
    "one": (1,),
}
#: What arithmetic trips over: zeros of both signs, subnormals of each type, the greatest.
SPECIAL = np.array(
    [0.0, -0.0, 1e-45, -1e-40, 6e-8, -3e-5, 65504.0, -65520.0, 3e38, -3.4e38, 1.0, -1.0],
    np.float32,
)


def backend_on(device: str, vram: int = 4 << 30) -> torch_backend.Backend:
    backend = devices.open_backend(device, vram)
    assert backend is not None
    return backend


def on_device(
    plan: _core.Plan, directory: Path, device: str, vram: int = 4 << 30, **options: Any
) -> Any:
    """Execute a plan there; the bytes of the shards, and what the engine reports."""
    with backend_on(device, vram) as backend:
        return shards_of(plan, directory, device=backend, **options)


def least_vram(plan: _core.Plan, device: str) -> int:
    """Return the least device memory that will do."""
    with pytest.raises(MemoryBudgetError, match="the device memory is too small") as caught:
        _core.predict([plan], 4 << 30, 1, backend_on(device, 1))
    assert caught.value.advice is not None
    assert "--vram" in caught.value.advice
    found = re.fullmatch(r"at least (\d+) MiB", caught.value.expected or "")
    assert found is not None
    return int(found[1]) * MIB


# The same bytes.

#: Options of a run, which must change no byte. With the least VRAM and one thread is a test below.
SETTINGS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "3 blocks, 5 threads, mapped, least vram": {
        "largest_piece": 3,
        "threads": 5,
        "read_path": "mapped",
        "vram": None,
    },
}


@pytest.fixture(scope="module", params=METHODS)
def case(
    request: pytest.FixtureRequest, family: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[_core.Plan, dict[str, bytes]]:
    """A plan, and the shards that the engine makes of it."""
    folder = tmp_path_factory.mktemp("case")
    recipe = Recipe.from_yaml(recipe_of(folder, family, request.param))
    plan = build_plan(recipe, seed=7, shard_size=6_500_000).table
    return plan, shards_of(plan, folder / "reference")[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_gives_the_same_bytes(
    tmp_path: Path, case: tuple[_core.Plan, dict[str, bytes]], name: str, device: str
) -> None:
    plan, expected = case
    options = dict(SETTINGS[name])
    if options.get("vram", ...) is None:
        options["vram"] = least_vram(plan, device)
    shards, _ = on_device(plan, tmp_path / "out", device, **options)
    assert shards == expected


def hard_arrays(seed: int, *, no_numbers: bool) -> Arrays:
    """Return values of all sizes, repeats among them; with or without infinities and NaN."""
    generator = np.random.default_rng(seed)
    special = np.append(SPECIAL, [np.inf, -np.inf, np.nan]) if no_numbers else SPECIAL[:6]
    arrays = {}
    for name, values in random_arrays(HARD_SHAPES, seed).items():
        flat = values.reshape(-1)
        chosen = generator.random(flat.size)
        common, some = chosen < 0.3, np.array([0.5, -0.25, 0.0], np.float32)
        flat[common] = generator.choice(some, flat.size)[common]
        rare = chosen > (0.999 if no_numbers else 0.9)
        flat[rare] = generator.choice(special, flat.size)[rare]
        arrays[name] = flat.reshape(values.shape)
    return arrays


@pytest.fixture(scope="module", params=[False, True], ids=["numbers", "infinities and NaN"])
def hard_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of every type with values that arithmetic trips over."""
    folder = tmp_path_factory.mktemp("hard")
    types = {"base": "BF16", "a": "BF16", "b": "F32", "c": "F16", "d": "F64"}
    for seed, (name, dtype) in enumerate(types.items()):
        with np.errstate(over="ignore"):
            arrays = hard_arrays(seed, no_numbers=request.param)
            write_hard(folder / name, arrays, dtype)
    return folder


def write_hard(folder: Path, arrays: Arrays, dtype: str) -> None:
    """Write a model; `write_model` rounds no NaN to bf16, so that is done here."""
    write_model(folder, arrays, "F32")
    if dtype == "F32":
        return
    types: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64}
    from safetensors.numpy import save_file

    stored = {name: np.ascontiguousarray(a.astype(types[dtype])) for name, a in arrays.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("models", ["abc", "bd"])
@pytest.mark.parametrize("name", ["task_arithmetic", "ties_0.5", "dare_ties", "nuslerp_rows"])
def test_hard_values_of_every_type(
    tmp_path: Path, hard_family: Path, name: str, models: str, dtype: str, device: str
) -> None:
    options = {**METHODS[name], "models": models[:2] if "nuslerp" in name else models}
    paths = [hard_family / model for model in options.pop("models")]
    base = hard_family / "base" if options.pop("base", False) else None
    each = {"weight": 0.7, **options.pop("each", {})}
    recipe = write_recipe(
        tmp_path / "r.yml", models=paths, base=base, each=each, out_dtype=dtype, **options
    )
    plan = build_plan(Recipe.from_yaml(recipe), seed=3).table
    expected, _ = shards_of(plan, tmp_path / "expected")
    shards, _ = on_device(plan, tmp_path / "out", device, largest_piece=2)
    assert shards == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", ["slerp", "nuslerp", "nuslerp_columns", "dare_linear", "della", "cabs"]
)
def test_hard_values_in_sums(tmp_path: Path, hard_family: Path, name: str, device: str) -> None:
    plan = build_plan(Recipe.from_yaml(recipe_of(tmp_path, hard_family, name)), seed=3).table
    expected, _ = shards_of(plan, tmp_path / "expected")
    shards, _ = on_device(plan, tmp_path / "out", device, largest_piece=1, threads=3)
    assert shards == expected


@pytest.mark.parametrize("device", DEVICES)
def test_where_torch_cannot_sum_in_order_it_goes_step_by_step(
    tmp_path: Path, family: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = build_plan(Recipe.from_yaml(recipe_of(tmp_path, family, "slerp"))).table
    expected, _ = shards_of(plan, tmp_path / "expected")

    def backwards(terms: torch.Tensor) -> torch.Tensor:
        return torch_kernels.step_by_step(terms.flip(1))

    monkeypatch.setattr(torch_kernels, "scan", backwards)
    here = torch.device("cuda:0" if device == "cuda" else "cpu")
    assert torch_kernels.running_sum_on(here) is torch_kernels.step_by_step
    assert on_device(plan, tmp_path / "out", device)[0] == expected


@pytest.mark.parametrize("device", DEVICES)
def test_the_whole_directory_is_the_same(tmp_path: Path, family: Path, device: str) -> None:
    recipe = recipe_of(tmp_path, family, "ties_0.5")
    threads = torch.get_num_threads()
    here = oxmerge.merge(recipe, tmp_path / "here", memory="4GiB")
    there = oxmerge.merge(recipe, tmp_path / "there", device=device)
    assert directory_bytes(tmp_path / "here") == directory_bytes(tmp_path / "there")
    assert here.device == "cpu"
    assert there.device == "torch on the CPU" if device == "torch" else "cuda:0" in there.device
    assert any("not yet run on a GPU" in note for note in there.notes) == (device == "cuda")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("device", DEVICES)
def test_a_sweep_gives_the_same_bytes(tmp_path: Path, family: Path, device: str) -> None:
    # A weight of 0 makes one of the outputs a copy of the base.
    recipe = recipe_of(tmp_path, family, "ties_0.5")
    axes = {"models[0].parameters.weight": [0.0, 0.5], "models[1].parameters.weight": [0.0, 0.5]}
    axes["models[2].parameters.weight"] = [0.0, 0.25]
    for name, where in (("here", "cpu"), ("there", device)):
        oxmerge.sweep(recipe, f"{tmp_path / name}/{{n}}", axes, together=True, device=where)
    here, there = (directory_bytes(tmp_path / name) for name in ("here", "there"))
    assert here == there
    assert len([name for name in here if name.endswith(".safetensors")]) == 2


@pytest.mark.cuda
@pytest.mark.skipif(GPUS < 2, reason=f"{NO_GPU}: two are needed" if GPUS == 0 else "one GPU only")
def test_several_gpus_share_the_work(
    tmp_path: Path, case: tuple[_core.Plan, dict[str, bytes]]
) -> None:
    backend = backend_on("cuda")
    assert len(backend.devices) == GPUS
    workers = [backend.worker() for _ in range(2 * GPUS)]
    assert {worker.device for worker in workers} == set(backend.devices)
    assert on_device(case[0], tmp_path / "out", "cuda")[0] == case[1]


def test_workers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_kernels, "running_sum_on", lambda _: torch_kernels.step_by_step)
    backend = torch_backend.Backend(["cpu", "meta"], 1 << 30)
    turns = [backend.worker().device.type for _ in range(4)]
    assert turns == ["cpu", "meta", "cpu", "meta"]


# Kernels.

PAIRS = np.array(
    [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan, 0.3, 0.3], np.float32
)


def bits(values: Array | torch.Tensor) -> list[int]:
    array = values.numpy() if isinstance(values, torch.Tensor) else values
    return list(array.view({4: np.uint32, 8: np.uint64, 2: np.uint16}[array.itemsize]))


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_greater_and_lesser(real: Any) -> None:
    a, b = (x.reshape(-1) for x in np.meshgrid(PAIRS.astype(real), PAIRS.astype(real)))

    def one(x: float, y: float, *, greater: bool) -> float:
        if np.isnan(x) or np.isnan(y):
            return float("nan")
        first, second = sorted((x, y), key=lambda v: (v, not np.signbit(v)))
        return second if greater else first

    for op, greater in (("Max", True), ("Min", False)):
        expected = np.array(
            [one(x, y, greater=greater) for x, y in zip(a, b, strict=True)], dtype=real
        )
        found = torch_kernels.BINARY[op](torch.from_numpy(a), torch.from_numpy(b))
        assert bits(found) == bits(expected)


def test_signs_keep_nothing_but_the_sign() -> None:
    found = torch_kernels.UNARY["Sign"](torch.from_numpy(PAIRS))
    expected = np.array([0, 0, 1, -1, 1, -1, 1, -1, np.nan, 1, 1], np.float32)
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("op", ["Exp", "Ln"])
@pytest.mark.parametrize(
    ("real", "least", "most", "bound"),
    [
        (np.float32, 1e-3, 80, 0.501),
        (np.float64, 1e-3, 700, 1),
        (np.float64, 1e-300, 1e-3, 1),
    ],
)
def test_transcendental_functions_are_within_a_unit_in_the_last_place(
    op: str, real: Any, least: float, most: float, bound: float
) -> None:
    generator = np.random.default_rng(0)
    values = np.exp(generator.uniform(np.log(least), np.log(most), 100_000)).astype(real)
    exact = (np.exp if op == "Exp" else np.log)(values.astype(np.longdouble))
    found = torch_kernels.UNARY[op](torch.from_numpy(values)).numpy()
    units = np.abs(found.astype(np.longdouble) - exact) / np.spacing(np.abs(found))
    assert units.max() < bound


@oxmerge.method
def exponential(models: Any) -> Any:
    return formula.exp(models[0])


@oxmerge.method
def logarithm(models: Any) -> Any:
    return formula.log(models[0])


@pytest.mark.parametrize(("method", "op"), [(exponential, "Exp"), (logarithm, "Ln")])
@pytest.mark.parametrize(("real", "bits"), [(np.float32, np.uint32), (np.float64, np.uint64)])
def test_transcendental_functions_are_those_of_the_engine(
    method: Any, op: str, real: Any, bits: Any
) -> None:
    generator = np.random.default_rng(1)
    limits = np.finfo(real)
    ends = [0, -0.0, np.inf, -np.inf, np.nan, 1, limits.tiny, limits.smallest_subnormal]
    patterns = generator.integers(0, np.iinfo(bits).max, 50_000, bits, endpoint=True).view(real)
    # Where the results are subnormal or almost too large, near 1, and anywhere.
    powers = [generator.uniform(-110, 95, 50_000), generator.uniform(-760, 720, 50_000)]
    near = np.exp(generator.uniform(-1, 1, 50_000))
    others = np.concatenate([*powers, near, ends]).astype(real)
    values = np.concatenate([patterns, others])
    expected = oxmerge.merge_tensors(method, [values])
    found = torch_kernels.UNARY[op](torch.from_numpy(values)).numpy()
    is_same = (found.view(bits) == expected.view(bits)) | (np.isnan(found) & np.isnan(expected))
    assert is_same.all()


def test_narrowing_rounds_once() -> None:
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    ties = (np.arange(0x10000, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    singles = np.concatenate([patterns, ties, PAIRS, SPECIAL])
    halves = np.arange(0x10000, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        halfway = (halves[:-1].astype(np.float32) + halves[1:].astype(np.float32)) / 2
    singles = np.concatenate([singles, halfway])
    for dtype, name, nan in (
        (ml_dtypes.bfloat16, torch.bfloat16, 0x7FC0),
        (np.float16, torch.float16, 0x7E00),
    ):
        with np.errstate(all="ignore"):
            expected = singles.astype(dtype).view(np.uint16).copy()
        expected[np.isnan(singles)] = nan
        found = torch_kernels.narrow(torch.from_numpy(singles), name).numpy().view(np.uint16)
        assert np.array_equal(found, expected)


def test_narrowing_from_f64_rounds_once() -> None:
    # A hair above a tie: rounded to f32 first it is the tie, and then goes to even, down.
    ties = (np.arange(0x3000, 0x4000, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    doubles = ties.astype(np.float64) * (1 + 2.0**-40)
    above = ((ties.view(np.uint32) >> 16) + 1).astype(np.uint16)
    found = torch_kernels.narrow(torch.from_numpy(doubles), torch.bfloat16).numpy()
    assert np.array_equal(found.view(np.uint16), above)
    below = torch_kernels.narrow(torch.from_numpy(doubles * (1 - 2.0**-39)), torch.bfloat16)
    assert np.array_equal(below.numpy().view(np.uint16), above - 1)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x05A308D3, 0x13198A2E, 0x03707344),
            None,
        ),
    ],
)
def test_philox(key: tuple[int, int], counter: tuple[int, ...], expected: str | None) -> None:
    counters = torch.tensor([counter[0] | counter[1] << 32])
    words = torch_kernels.philox(key, counters, (counter[2], counter[3]))
    assert all(0 <= int(word) < 1 << 32 for word in words)
    assert [int(word) for word in words] == philox_by_hand(key, counter)
    if expected is not None:
        assert " ".join(f"{int(word):08x}" for word in words) == expected


def philox_by_hand(key: tuple[int, int], counter: tuple[int, ...]) -> list[int]:
    low = 0xFFFF_FFFF
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        first, second = 0xD251_1F53 * c0, 0xCD9E_8D57 * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & low, first >> 32 ^ c3 ^ k1, first & low
        k0, k1 = k0 + 0x9E37_79B9 & low, k1 + 0xBB67_AE85 & low
    return [c0, c1, c2, c3]


def draw_by_hand(key: tuple[int, int], stream: tuple[int, int], element: int) -> int:
    """Draw as `kernels/NUMERICS.md` says."""
    counter, place = element // 512 * 64 + element % 64, element % 512 // 64
    high, low = (
        philox_by_hand(key, (counter & 0xFFFF_FFFF, counter >> 32 | top, *stream))[place % 4]
        >> (16 if place >= 4 else 0)
        & 0xFFFF
        for top in (0, 1 << 31)
    )
    return high << 16 | low


@pytest.mark.parametrize("start", [0, 1, 70, 65_535, 8 << 32])
def test_a_mask_may_begin_anywhere(start: int) -> None:
    key, stream, count = (17, 3), (0xDEAD_BEEF, 0x1234_5678), 701
    draws = [draw_by_hand(key, stream, at) for at in range(start, start + count)]
    worker = torch_backend.Worker(torch.device("cpu"), torch_kernels.scan)
    for bound in [1 << 31, 1 << 32, draws[5], draws[5] + 1]:
        instructions: list[Any] = [("random", 0, [], (bound, key, stream))]
        program = worker.program(instructions, [("store", 0, "F32")], 1, 1, False)
        out = bytearray(4 * count)
        program.run(start, count, [], ([], []), 0, [memoryview(out)])
        assert list(np.frombuffer(out, np.float32)) == [draw < bound for draw in draws]


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_ranks_and_counts(real: Any) -> None:
    generator = np.random.default_rng(0)
    integer = np.int32 if real is np.float32 else np.int64
    info = np.iinfo(integer)
    patterns = generator.integers(info.min, info.max, 70_000, dtype=integer, endpoint=True)
    values = np.concatenate([patterns.view(real), PAIRS.astype(real)])
    stored: Any = values.view(integer)
    magnitudes = stored & info.max
    expected = np.where(np.signbit(values), -magnitudes, magnitudes)
    expected[np.isnan(values)] = info.max
    assert np.array_equal(torch_kernels.ordinals(torch.from_numpy(values)).numpy(), expected)
    # The whole range, half of it, a few neighbours.
    width = 8 * expected.itemsize
    for low, high, shift in (
        (int(info.min), int(info.max), width - 14),
        (0, int(info.max), width - 15),
        (int(expected[5]) - 3, int(expected[5]) + 3, 0),
    ):
        bins = (high - low >> shift) + 1
        found = torch_kernels.count(
            torch.from_numpy(values), int(low), int(high), shift, int(bins), 65_536
        ).tolist()
        ranks = [int(rank) for rank in expected]
        inside = [low <= rank <= high for rank in ranks]
        assert found[0] == sum(rank > high for rank in ranks)
        assert found[1:3] == [sum(inside[:65_536]), sum(inside[65_536:])]
        counted = [0] * bins
        for rank in (rank for rank, kept in zip(ranks, inside, strict=True) if kept):
            counted[(rank - int(low)) >> shift] += 1
        assert found[3:] == counted


# Nothing that fuses or reorders.

FORBIDDEN = re.compile(
    r"lerp|addcmul|addcdiv|fma|compile|jit|addmm|addmv|addr|baddbmm|matmul|mm|bmm|dot|vdot|inner"
    r"|einsum|tensordot|mean|std|var|norm|prod|dist|softmax|logsumexp|cumprod|index_add|scatter_add"
)


def forbidden(source: str) -> list[str]:
    """Return the operations of a program that leave rounding or order to torch."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and FORBIDDEN.fullmatch(node.attr.rstrip("_")):
            found.append(node.attr)
        if isinstance(node, ast.keyword) and node.arg == "alpha":
            found.append("alpha")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            found.append("@")
    return found


def test_no_operation_fuses_or_reorders() -> None:
    for module in (torch_backend, torch_kernels):
        assert forbidden(Path(module.__file__ or "").read_text()) == []


@pytest.mark.parametrize(
    "source",
    ["torch.lerp(a, b, w)", "a.addcmul_(b, c)", "torch.add(a, b, alpha=2)", "torch.compile(f)",
     "a @ b", "a.index_add_(0, i, b)", "torch.dot(a, b)"],
)  # fmt: skip
def test_such_operations_would_be_found(source: str) -> None:
    assert forbidden(source)


# Memory.


class Live(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of the tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, storage: int) -> None:
        self.now -= self.storages.pop(storage)


def test_pieces_keep_within_the_device_memory(
    tmp_path: Path, case: tuple[_core.Plan, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[int] = []
    at_work = torch_backend.Worker.at_work

    def counted(worker: torch_backend.Worker) -> Any:
        import contextlib

        @contextlib.contextmanager
        def enter() -> Iterator[None]:
            with Live() as live, at_work(worker):
                yield
            peaks.append(live.peak)

        return enter()

    monkeypatch.setattr(torch_backend.Worker, "at_work", counted)
    vram = least_vram(case[0], "torch")
    shards, _ = on_device(case[0], tmp_path / "out", "torch", vram=vram, threads=1)
    assert shards == case[1]
    assert not peaks or 0 < max(peaks) <= vram


@pytest.mark.parametrize("device", DEVICES)
def test_too_little_device_memory_is_refused(tmp_path: Path, family: Path, device: str) -> None:
    recipe = recipe_of(tmp_path, family, "ties_0.5")
    plan = build_plan(Recipe.from_yaml(recipe)).table
    least = least_vram(plan, device)
    with pytest.raises(MemoryBudgetError, match="the device memory is too small"):
        oxmerge.merge(recipe, tmp_path / "out", device=device, vram=least - MIB)
    assert not (tmp_path / "out").exists()
    oxmerge.merge(recipe, tmp_path / "out", device=device, vram=least)


def test_the_memory_budget_counts_torch(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "linear")
    with pytest.raises(MemoryBudgetError, match="the memory budget is too small"):
        oxmerge.merge(recipe, tmp_path / "out", device="torch", memory="200MiB")


# What goes wrong.


def test_without_torch_one_line_says_what_to_install(
    tmp_path: Path, family: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert importlib.util.find_spec("torch") is None
    recipe = recipe_of(tmp_path, family, "linear")
    for device in ("torch", "cuda", "cuda:1"):
        assert main(["merge", str(recipe), str(tmp_path / "out"), "--device", device]) == 1
        message = f"error: the device `{device}` needs torch: pip install torch\n"
        assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()


def test_a_torch_that_cannot_be_loaded_says_why(tmp_path: Path, twins: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so: no such file')")
    command = [sys.executable, "-m", "oxmerge", "merge", twins / "linear.yml", tmp_path / "out"]
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*map(str, command), "--device", "torch"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: torch is installed, but cannot be loaded: libcudart.so: no such file\n"
        "hint: install torch anew, or use --device cpu\n"
    )


# What torch has once for the whole process.


def threads_in_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return int(pool.submit(torch.get_num_threads).result())


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("first_out", [0, 1])
def test_merges_that_overlap_leave_the_threads_as_they_were(
    three_threads: None, first_out: int
) -> None:
    backends = [backend_on("torch") for _ in range(2)]
    for backend in backends:
        backend.__enter__()
        assert torch.get_num_threads() == 1
        assert threads_in_a_new_thread() == 1
    for backend in (backends[first_out], backends[1 - first_out]):
        backend.__exit__(None, None, None)
    assert torch.get_num_threads() == 3
    assert threads_in_a_new_thread() == 3


def test_merges_in_two_threads_leave_the_threads_as_they_were(three_threads: None) -> None:
    both_in = threading.Barrier(2)

    def enter() -> int:
        with backend_on("torch"):
            both_in.wait(30)
        return int(torch.get_num_threads())

    with ThreadPoolExecutor(2) as pool:
        after = [pool.submit(enter) for _ in range(2)]
        assert [each.result() for each in after] == [3, 3]
    assert threads_in_a_new_thread() == 3


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pretend a GPU of 100 bytes, of which the process has 10 and may have 90; its shares."""
    found = [0.9]
    properties = types.SimpleNamespace(total_memory=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda _: found[-1], raising=False
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: found.append(share)
    )
    return found


def test_the_limit_of_a_gpu_counts_what_is_taken_and_is_put_back(shares: list[float]) -> None:
    gpu = torch.device("cuda:0")
    with torch_backend._limited(gpu, 20):
        assert shares[-1] == 0.3
        with torch_backend._limited(gpu, 30):
            assert shares[-1] == 0.6
        with torch_backend._limited(gpu, 1000):
            assert shares[-1] == 0.9
        assert shares[-1] == 0.3
    assert shares[-1] == 0.9
    assert torch_backend._SHARES == {}


def test_a_backend_that_is_not_entered_changes_nothing(
    shares: list[float], three_threads: None
) -> None:
    backend = torch_backend.Backend(["cpu"], 1)
    backend.devices = [torch.device("cuda:0")]
    assert (shares, torch.get_num_threads()) == ([0.9], 3)
    with backend:
        assert (shares[-1], torch.get_num_threads()) == (0.11, 1)
    assert (shares[-1], torch.get_num_threads()) == (0.9, 3)


def test_a_backend_that_cannot_be_entered_puts_back_what_it_changed(
    shares: list[float], three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "memory_reserved", fail)
    backend = torch_backend.Backend(["cpu"], 1)
    backend.devices = [torch.device("cuda:0")]
    with pytest.raises(RuntimeError, match="no driver"):
        backend.__enter__()
    assert (shares, torch.get_num_threads()) == ([0.9], 3)
    assert torch_backend._SHARES == {}


@pytest.mark.skipif(GPUS > 0, reason="there is a GPU here")
def test_without_a_gpu_cuda_is_refused(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "linear")
    with pytest.raises(DeviceError, match="there is no GPU for the device `cuda:0`") as caught:
        oxmerge.merge(recipe, tmp_path / "out", device="cuda:0")
    assert caught.value.advice == "use --device cpu"
    assert not (tmp_path / "out").exists()


def test_a_device_of_another_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="there is no device `cuda:2`") as caught:
        devices.open_backend("cuda:2", None)
    assert caught.value.expected == "cuda:0 to cuda:1"


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cpu ", ""])
def test_other_devices_do_not_exist(tmp_path: Path, twins: Path, device: str) -> None:
    with pytest.raises(ValueError, match="device must be cpu, torch, cuda, cuda:N or auto"):
        oxmerge.merge(twins / "linear.yml", tmp_path / "out", device=device)


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch_backend.Program, "run", run)


def test_a_failure_of_torch_is_the_cause(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("CUDA error: an illegal memory access\nCompile with whatever")
    fail(monkeypatch, error)
    with pytest.raises(DeviceError, match="torch failed: CUDA error: an illegal") as caught:
        oxmerge.merge(twins / "linear.yml", tmp_path / "out", device="torch")
    assert caught.value.__cause__ is error
    assert caught.value.tensor in {"x", "y"}
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    oxmerge.merge(twins / "linear.yml", tmp_path / "out", device="torch")


def test_a_full_device_is_told_plainly(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    with pytest.raises(DeviceError, match="the device has no memory left") as caught:
        oxmerge.merge(twins / "linear.yml", tmp_path / "out", device="torch")
    assert "--vram" in (caught.value.advice or "")
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_a_worker_that_cannot_begin_ends_the_merge(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worker(_: object) -> None:
        raise RuntimeError("no stream")

    monkeypatch.setattr(torch_backend.Backend, "worker", worker)
    with pytest.raises(DeviceError, match="torch failed: no stream"):
        oxmerge.merge(twins / "linear.yml", tmp_path / "out", device="torch")


def test_memory_that_is_kept_is_noticed(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def run(_: object, *arguments: Any) -> None:
        buffers = arguments[-1]
        kept.append(torch.frombuffer(buffers[0], dtype=torch.uint8))

    monkeypatch.setattr(torch_backend.Program, "run", run)
    with pytest.raises(InternalError, match="kept memory that was lent to it"):
        oxmerge.merge(twins / "linear.yml", tmp_path / "out", device="torch")
    # Not looked at: what is behind it may be gone.
    assert kept
    kept.clear()


INTERRUPTED = """
import sys, oxmerge
recipe, directory = sys.argv[1:]
from oxmerge import torch_backend
print("ready", flush=True)
oxmerge.merge(recipe, directory, device="torch", threads=2)
"""


def test_an_interrupt_ends_it(tmp_path: Path) -> None:
    base = random_arrays({"x": (6000, 4096)}, 0)
    write_model(tmp_path / "base", base, "BF16")
    write_model(tmp_path / "a", tuned(base, 1), "BF16")
    recipe = write_recipe(
        tmp_path / "r.yml",
        "ties",
        [tmp_path / "a"],
        base=tmp_path / "base",
        each={"weight": 1, "density": 0.5},
    )
    command = [sys.executable, "-c", INTERRUPTED, str(recipe), str(tmp_path / "new" / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(0.4)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=600)
    assert child.returncode != 0
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
    assert not (tmp_path / "new").exists()


# Which device.


def test_the_plan_names_the_device(tmp_path: Path, family: Path, capsys: Any) -> None:
    recipe = str(recipe_of(tmp_path, family, "linear"))
    plan = oxmerge.plan(recipe, device="torch")
    assert plan.prediction.device == "torch on the CPU"
    assert plan.as_dict()["fastest"]["device"] == plan.prediction.fastest.device
    assert main(["plan", recipe]) == 0
    assert "device    cpu; the fastest should be cpu: " in capsys.readouterr().out


def test_without_a_gpu_auto_is_the_cpu_and_loads_nothing(tmp_path: Path, twins: Path) -> None:
    if devices._has_gpu():
        pytest.skip("there is a GPU here")
    code = (
        "import sys, oxmerge\n"
        "report = oxmerge.merge(*sys.argv[1:], device='auto')\n"
        "print(report.device, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(twins / "linear.yml"), str(tmp_path / "out")]
    assert subprocess.check_output(command, text=True) == "cpu False\n"


@pytest.mark.parametrize(
    ("rates", "scale", "device", "reason"),
    [
        # Bytes a second of CPU, GPU and disk; and how many times the bytes of the plan there are.
        ((9e9, 9e10, 1e9), 1e6, "cpu", "the disk is the limit"),
        ((1e9, 9e10, 1e9), 1e6, "cpu", "the disk is the limit"),
        ((1e9, 9e10, 9e9), 1e2, "cpu", "too short"),
        ((1e9, 0.9e9, 9e9), 1e6, "cpu", "the GPU would not be faster"),
        ((1e9, 9e10, 9e9), 1e6, "cuda", "with the GPU"),
        ((1e9, 9e10, 1.5e9), 1e6, "cuda", "with the GPU"),
    ],
)
def test_auto_decides_by_rates(
    tmp_path: Path,
    family: Path,
    monkeypatch: pytest.MonkeyPatch,
    rates: tuple[float, float, float],
    scale: float,
    device: str,
    reason: str,
) -> None:
    cpu, gpu, disk = rates

    def rehearse(_plan: _core.Plan, _threads: object, backend: object) -> float:
        return (cpu if backend is None else gpu) / scale

    monkeypatch.setattr(devices, "_has_gpu", lambda: True)
    monkeypatch.setattr(devices, "open_backend", lambda *_: contextlib.nullcontext("a GPU"))
    monkeypatch.setattr(devices, "disk_rate", lambda _: disk / scale)
    monkeypatch.setattr(_core, "rehearse", rehearse)
    plan = build_plan(Recipe.from_yaml(recipe_of(tmp_path, family, "ties_0.5")))
    choice = devices.choose([plan], None, None, load=True)
    assert choice.device == device
    assert reason in choice.reason


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch, rates: dict[_core.Plan, float]) -> None:
    """Pretend that there is one; rates are those of a plan on the CPU. It takes no time there."""

    def rehearse(plan: _core.Plan, _threads: object, backend: object) -> float:
        return rates[plan] if backend is None else float("inf")

    monkeypatch.setattr(devices, "_has_gpu", lambda: True)
    monkeypatch.setattr(devices, "disk_rate", lambda _: float("inf"))
    monkeypatch.setattr(_core, "rehearse", rehearse)


def test_auto_counts_every_merge_of_a_sweep(
    tmp_path: Path, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("linear", "ties_0.5")
    plans = [build_plan(Recipe.from_yaml(recipe_of(tmp_path, family, name))) for name in names]
    # The first is done at once, the second takes hours.
    rates = dict(zip((plan.table for plan in plans), (1e15, 1.0), strict=True))
    pretend_a_gpu(monkeypatch, rates)
    monkeypatch.setattr(devices, "open_backend", lambda *_: contextlib.nullcontext("a GPU"))
    assert devices.choose(plans[:1], None, None, load=True).device == "cpu"
    assert devices.choose(plans, None, None, load=True).device == "cuda"
    seen: list[int] = []

    def choose(given: Any, *_: object, **__: object) -> devices.Choice:
        seen.append(len(given))
        return devices.Choice("cpu", "")

    monkeypatch.setattr(oxmerge.merging, "choose", choose)
    axes = {"models[0].parameters.weight": "0.1,0.2,0.3"}
    recipe = recipe_of(tmp_path, family, "linear")
    oxmerge.sweep(recipe, tmp_path / "{n}", axes, device="auto", memory="4GiB")
    assert seen == [3]


def test_auto_takes_the_cpu_where_torch_cannot_use_the_gpu(
    tmp_path: Path, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = build_plan(Recipe.from_yaml(recipe_of(tmp_path, family, "linear")))
    pretend_a_gpu(monkeypatch, {plan.table: 1.0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choice = devices.choose([plan], None, None, load=True)
    assert choice.device == "cpu"
    assert "the GPU cannot be used: there is no GPU for the device `cuda`" in choice.reason


def test_rates_are_measured(tmp_path: Path, family: Path) -> None:
    for name in ("linear", "dare_ties", "nuslerp_rows"):
        plan = build_plan(Recipe.from_yaml(recipe_of(tmp_path, family, name))).table
        rates = [_core.rehearse(plan, 2, device) for device in (None, backend_on("torch"))]
        assert all(1e6 < rate < 1e12 for rate in rates)
    files = [{"path": str(family / "a" / "model.safetensors"), "size": 5_000_000}]
    assert devices.disk_rate(files) > 1e6
