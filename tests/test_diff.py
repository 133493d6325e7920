"""How two models differ: every number against NumPy, and what people see."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import product
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import oxmerge
import pytest
from oxmerge.cli import main
from oxmerge.errors import MemoryBudgetError, PlanError
from writers import (
    from_bf16,
    random_arrays,
    to_bf16,
    tuned,
    write_experts,
    write_file,
    write_model,
    write_sparse,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from oxmerge.checking.differences import Numbers

Array = np.ndarray[Any, Any]
TYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}

# The oracle: the whole tensor at once, in NumPy. Sums have the shape of `rust/kernels/NUMERICS.md`.


def fold(values: Array) -> float:
    """Sum by adding the upper half to the lower until one is left."""
    size = 1 << max(len(values) - 1, 0).bit_length()
    values = np.concatenate([values, np.zeros(size - len(values))])
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return float(values[0])


def block_sum(values: Array) -> float:
    """Sum a block: lane i mod 16 in order of i, then the lanes."""
    padded = np.concatenate([values, np.zeros(-len(values) % 16)])
    # A running sum goes from the first to the last; zeros at the end change nothing.
    return fold(np.cumsum(padded.reshape(-1, 16), axis=0)[-1])


def total(values: Array) -> float:
    values = values.ravel().astype(np.float64)
    starts = range(0, len(values), 65536)
    return fold(np.array([block_sum(values[start : start + 65536]) for start in starts] or [0.0]))


def dot(a: Array, b: Array) -> float:
    return total(a.astype(np.float64) * b.astype(np.float64))


def expected(a: Array, b: Array, base: Array | None = None) -> dict[str, float]:
    """Return what a difference is to say of arrays that are stored so."""
    same_type = a.dtype == b.dtype
    bits = int((a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")).sum()) if same_type else None
    wide = (
        np.float64
        if np.float64 in {each.dtype.type for each in (a, b, base) if each is not None}
        else np.float32
    )
    a, b = a.astype(wide), b.astype(wide)
    with np.errstate(all="ignore"):
        d = b - a
        if base is not None:
            a, b = a - base.astype(wide), b - base.astype(wide)
        finite = np.isfinite(d) & np.isfinite(a) & np.isfinite(b)
    d, a, b = (np.where(finite, each, 0) for each in (d, a, b))
    changed, left_out = int((d != 0).sum()), int((~finite).sum())
    return {
        "elements": d.size,
        "stored": changed + left_out if bits is None else bits,
        "changed": changed,
        "compared": int(finite.sum()),
        "left_out": left_out,
        "squares": dot(d, d),
        "squares_of_a": dot(a, a),
        "squares_of_b": dot(b, b),
        "products": dot(a, b),
        "largest": float(np.abs(d).max(initial=0)),
        "flips": int((np.sign(a) * np.sign(b) < 0).sum()),
    }


def as_numbers(numbers: Numbers) -> dict[str, float]:
    return {name: getattr(numbers, name) for name in numbers.__slots__}


SHAPES = [(), (0,), (1,), (17,), (3, 0, 5), (257, 255), (65537,), (3, 11, 7), (2, 9, 8001)]


def awkward(shape: tuple[int, ...], seed: int, dtype: str) -> Array:
    """Return numbers as of weights; zeros, huge and tiny ones, infinities and NaN among them."""
    generator = np.random.default_rng(seed)
    values = np.asarray(generator.standard_normal(shape) * 0.02)
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-42, 65504.0]
    chosen = generator.random(shape) < 0.05
    values = np.where(chosen, generator.choice(odd, shape), values)
    with np.errstate(all="ignore"):
        return values.astype(TYPES[dtype])


def write(folder: Path, arrays: dict[str, Array]) -> Path:
    """Write a model of arrays of any type."""
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    names = {np.dtype(v): k for k, v in TYPES.items()} | {
        np.dtype("i8"): "I64",
        np.dtype("?"): "BOOL",
    }
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
        parts.append(array.tobytes())
    text = json.dumps(header).encode()
    folder.mkdir()
    data = len(text).to_bytes(8, "little") + text + b"".join(parts)
    (folder / "model.safetensors").write_bytes(data)
    return folder


PAIRS = [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("F64", "F64")]
PAIRS += [("BF16", "F32"), ("F32", "F64"), ("F16", "BF16")]


def changed_in_part(values: Array, seed: int) -> Array:
    """Return values of which about half are others."""
    others = awkward(values.shape, seed, next(k for k, v in TYPES.items() if v == values.dtype))
    return np.where(np.random.default_rng(seed).random(values.shape) < 0.5, values, others)


@pytest.mark.parametrize("base", [None, "BF16", "F32"])
def test_every_number_is_that_of_numpy_to_the_bit(tmp_path: Path, base: str | None) -> None:
    sides: list[dict[str, Array]] = [{}, {}, {}]
    for seed, ((of_a, of_b), shape) in enumerate(product(PAIRS, SHAPES)):
        values = awkward(shape, 3 * seed, of_a)
        other = awkward(shape, 3 * seed + 1, of_b)
        other = changed_in_part(values, 3 * seed + 1) if of_a == of_b else other
        third = awkward(shape, 3 * seed + 2, base or "F32")
        for side, array in zip(sides, (values, other, third), strict=True):
            side[f"{of_a}.{of_b}.{shape}"] = array
    folders = [write(tmp_path / name, side) for name, side in zip("abc", sides, strict=True)]
    found = oxmerge.diff(*folders[:2], base=folders[2] if base else None, memory="4GiB")
    assert len(found.tensors) == len(PAIRS) * len(SHAPES)
    a, b, c = sides
    for tensor in found.tensors:
        name = tensor.name
        wanted = expected(a[name], b[name], c[name] if base else None)
        assert as_numbers(tensor.numbers) == wanted, name
    assert found.total.changed == sum(each.numbers.changed for each in found.tensors) > 0
    assert not found.is_equal
    assert not found.has_equal_numbers


# What is compared with what.


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command, and return the exit code and what it printed."""
    code = main(["diff", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_a_model_equals_itself(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = oxmerge.diff(family / "base", family / "base")
    assert found.is_equal
    assert found.total.stored == found.total.changed == found.total.flips == 0
    assert (found.total.relative, found.total.cosine) == (0.0, 1.0)
    code, out, _ = run(capsys, family / "base", family / "base")
    assert (code, out.splitlines()[-1]) == (0, "equal: the same tensors, bit for bit")


def test_bits_count_where_numbers_are_equal(tmp_path: Path) -> None:
    zero, other_zero = np.zeros(100, np.float32), np.full(100, -0.0, np.float32)
    ids = np.arange(7)
    a = write_model(tmp_path / "a", {"x": zero, "ids": ids})
    b = write_model(tmp_path / "b", {"x": other_zero, "ids": ids})
    found = oxmerge.diff(a, b)
    assert (found.is_equal, found.has_equal_numbers) == (False, True)
    assert (found.total.stored, found.total.changed) == (100, 0)
    # The same numbers in a wider type.
    narrow = write_model(tmp_path / "narrow", random_arrays({"x": (40, 50)}, 1), "BF16")
    values = from_bf16(to_bf16(random_arrays({"x": (40, 50)}, 1)["x"]))
    found = oxmerge.diff(narrow, write_model(tmp_path / "wide", {"x": values}))
    assert (found.is_equal, found.has_equal_numbers) == (False, True)
    assert found.verdict == "the same numbers, stored as other bits"
    # NaN of one kind in both is the same bits, but no number that could be compared.
    odd = np.array([1, np.nan], np.float32)
    c, d = (write_model(tmp_path / name, {"x": odd}) for name in "cd")
    found = oxmerge.diff(c, d)
    assert found.is_equal
    assert found.total.left_out == 1


def test_squares_beyond_float64_have_no_ratio(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", {"x": np.array([1e300, 2])}, "F64")
    b = write_model(tmp_path / "b", {"x": np.array([-1e300, 2])}, "F64")
    total = oxmerge.diff(a, b).total
    assert (total.relative, total.cosine, total.flips) == (None, None, 1)


def test_integers_are_compared_by_their_bits(tmp_path: Path) -> None:
    ids = np.arange(100_000).reshape(100, 1000)
    mask = np.zeros(33, bool)
    a = write_model(tmp_path / "a", {"ids": ids, "mask": mask})
    b = write_model(tmp_path / "b", {"ids": np.where(ids % 1000 == 7, 0, ids), "mask": mask})
    found = oxmerge.diff(a, b, base=a)
    assert [tensor.numbers.stored for tensor in found.tensors] == [100, 0]
    assert [tensor.is_equal for tensor in found.tensors] == [False, True]
    assert (found.total.changed, found.total.compared) == (100, 0)
    assert found.total.cosine is None
    assert [tensor.numbers.relative for tensor in found.tensors] == [None, 0]


def test_models_with_nothing_in_common(tmp_path: Path) -> None:
    a, b = (write_model(tmp_path / x, {x: np.ones(3, np.float32)}) for x in "ab")
    found = oxmerge.diff(a, b)
    assert (found.only_in_a, found.only_in_b) == (("a",), ("b",))
    assert (found.verdict, found.total.elements) == ("different", 0)


def test_what_cannot_be_compared_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = random_arrays({"x": (8, 8)}, 1)["x"]
    a = write_model(tmp_path / "a", {"x": x, "gone": x, "shape": x, "kind": x})
    b = write_model(tmp_path / "b", {"x": x, "shape": x[:4], "kind": x > 0, "new": x, "more": x})
    found = oxmerge.diff(a, b)
    assert (found.only_in_a, found.only_in_b) == (("gone",), ("new", "more"))
    assert {each.name: (each.a, each.b) for each in found.unlike} == {
        "shape": (("F32", (8, 8)), ("F32", (4, 8))),
        "kind": (("F32", (8, 8)), ("BOOL", (8, 8))),
    }
    assert [tensor.name for tensor in found.tensors if tensor.is_equal] == ["x"]
    assert not found.is_equal
    assert not found.has_equal_numbers
    found = oxmerge.diff(a, a, base=b)
    assert set(found.not_in_base) == {"gone", "shape", "kind"}
    assert not found.is_equal  # not all is known
    code, out, _ = run(capsys, a, b)
    assert code == 1
    lines = [line.strip() for line in out.splitlines()]
    assert "only in a: 1 tensors" in lines
    assert "shape: F32 [8, 8], F32 [4, 8]" in lines


def test_tensors_of_other_names_are_found(tmp_path: Path) -> None:
    arrays = random_arrays({"layers.0.w": (8, 8), "embed.weight": (8, 8)}, 1)
    a = write_model(tmp_path / "a", {f"model.{name}": x for name, x in arrays.items()})
    b = write_model(
        tmp_path / "b", {f"model.language_model.{name}": x for name, x in arrays.items()}
    )
    assert oxmerge.diff(a, b).is_equal


def test_what_an_adapter_adds(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    weights = random_arrays({f"{module}.weight": (24, 16), "model.norm.weight": (16,)}, 1)
    base = write_model(tmp_path / "base", weights)
    parts = random_arrays({"lora_A": (4, 16), "lora_B": (24, 4)}, 2)
    (tmp_path / "adapter").mkdir()
    named = {f"base_model.model.{module}.{part}.weight": x for part, x in parts.items()}
    write_file(tmp_path / "adapter" / "adapter_model.safetensors", named)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    found = oxmerge.diff(base, f"{base}+{tmp_path / 'adapter'}")
    assert [tensor.is_equal for tensor in found.tensors] == [False, True]
    added = 2 * (parts["lora_B"].astype(np.float64) @ parts["lora_A"])
    assert found.total.squares == pytest.approx((added**2).sum(), rel=1e-4)


def test_layers_and_modules_are_sums_of_their_tensors(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.{rest}" for layer in range(3)
             for rest in ("attn.q.weight", "attn.q.bias", "mlp.experts.0.up.weight",
                          "mlp.experts.1.up.weight")]  # fmt: skip
    base = random_arrays(dict.fromkeys([*names, "lm_head.weight"], (30, 40)), 1)
    config = {"num_hidden_layers": 3}
    a = write_model(tmp_path / "a", base, config=config)
    b = write_model(tmp_path / "b", tuned(base, 2), config=config)
    found = oxmerge.diff(a, b)
    assert list(found.layers) == [*(f"model.layers.{n}" for n in range(3)), "outside of layers"]
    assert list(found.modules) == ["attn.q", "mlp.experts.*.up", "lm_head"]
    one = [t.numbers for t in found.tensors if t.name.startswith("model.layers.1.")]
    layer = found.layers["model.layers.1"]
    assert layer.elements == 4 * 1200
    assert layer.squares == math.fsum(each.squares for each in one)
    assert layer.largest == max(each.largest for each in one)
    assert found.cells["model.layers.1", "attn.q"].elements == 2 * 1200
    wanted = np.concatenate([(tuned(base, 2)[n] - base[n]).ravel() for n in base]).astype(float)
    assert found.total.rms == pytest.approx(math.sqrt((wanted**2).mean()), rel=1e-12)


# How it runs.


def test_numbers_depend_on_neither_threads_nor_memory(family: Path) -> None:
    def numbers(**options: Any) -> list[dict[str, float]]:
        models = family / "a", family / "c"
        found = oxmerge.diff(*models, base=family / "base", **options)
        return [as_numbers(tensor.numbers) for tensor in found.tensors]

    wanted = numbers(memory="4GiB", threads=1)
    assert numbers(memory="4GiB", threads=7) == wanted
    least = needed(lambda: numbers(memory=1))
    assert numbers(memory=least, threads=3) == wanted


def needed(attempt: Callable[[], object]) -> str:
    """Return the budget that a refusal asks for."""
    with pytest.raises(MemoryBudgetError) as caught:
        attempt()
    return (caught.value.expected or "").removeprefix("at least ").replace(" ", "")


def test_a_large_model_needs_no_more_memory_than_is_allowed(tmp_path: Path) -> None:
    for name in "ab":
        write_sparse(tmp_path / name / "model.safetensors", {"x": (64 << 10, 4096), "y": (5,)})
    code = (
        "import sys, oxmerge; from oxmerge import _core;"
        "found = oxmerge.diff(*sys.argv[1:], memory='96MiB');"
        "print(found.is_equal, _core.peak_memory() >> 20)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
    equal, peak = subprocess.check_output(command, text=True).split()
    assert equal == "True"
    assert int(peak) <= 96


def test_many_small_tensors(tmp_path: Path) -> None:
    a, b = (write_experts(tmp_path / name, 5, seed) for seed, name in enumerate("ab"))
    found = oxmerge.diff(a, b)
    assert len(found.tensors) == len(oxmerge.open(a))
    assert all(tensor.numbers.changed > 2000 for tensor in found.tensors)
    assert oxmerge.diff(a, a, base=b).is_equal


def test_progress_may_end_it(tmp_path: Path) -> None:
    for name in "ab":
        write_sparse(tmp_path / name / "model.safetensors", {"x": (128 << 10, 4096)})

    def stop(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        oxmerge.diff(tmp_path / "a", tmp_path / "b", threads=1, progress=stop)
    with pytest.raises(TypeError, match="progress must be"):
        oxmerge.diff(tmp_path / "a", tmp_path / "b", progress=3)  # type: ignore[arg-type]


def test_the_command_tells_it_as_data(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, family / "base", family / "b", "--json")
    data = json.loads(out)
    found = oxmerge.diff(family / "base", family / "b")
    assert code == 1
    assert data["tensors"] == [tensor.as_dict() for tensor in found.tensors]
    assert data["total"] == found.total.as_dict()
    assert (data["equal"], data["schema"]) == (False, 1)


def test_what_cannot_be_compared_at_all_ends_with_two(
    tmp_path: Path, family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, family / "base", tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert "no model" in err
    broken = write_model(tmp_path / "broken", {"x": np.zeros(9)})
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    code, out, err = run(capsys, family / "base", broken, "--json")
    assert code == 2
    assert json.loads(out)["error"]["problems"][0]["code"] == "unreadable-checkpoint"
    with pytest.raises(PlanError, match="cannot compare"):
        oxmerge.diff(family / "base", broken)
    assert run(capsys, family / "base", family / "a", "--html", tmp_path)[0] == 2
