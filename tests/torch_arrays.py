"""Arrays of torch. Run by `test_with_torch.py` in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import oxmerge
import pytest
import torch
from oxmerge import _core, kernels
from safetensors.torch import load_file
from test_in_memory import SEED, STORED, call_of, case, uniform
from torch._subclasses.fake_tensor import FakeTensorMode
from writers import random_arrays, tuned, write_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from test_in_memory import Stored

__all__ = ["case", "uniform"]  # fixtures

BF16 = ml_dtypes.bfloat16
X = torch.ones(3)


def stored(tensors: Mapping[str, torch.Tensor]) -> Stored:
    """Return tensors as `read_tensors` returns a file."""
    found = {}
    for name, tensor in tensors.items():
        dtype = STORED[str(tensor.dtype).removeprefix("torch.")]
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = (dtype, tuple(tensor.shape), data)
    return found


def as_torch(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return copies of a checkpoint's tensors."""
    found = {}
    for name, array in checkpoint.items():
        if array.dtype == ml_dtypes.bfloat16:
            found[name] = torch.tensor(array.view(np.int16)).view(torch.bfloat16)
        else:
            found[name] = torch.tensor(array)
    return found


def test_torch_tensors_give_the_bits_of_files(case: tuple[str, Path, Stored], family: Path) -> None:
    name, _, expected = case
    method, models, has_base, keywords = call_of(name)
    dicts = [as_torch(oxmerge.open(family / model)) for model in models]
    base = as_torch(oxmerge.open(family / "base")) if has_base else None
    merged = oxmerge.merge_state_dicts(method, dicts, base, seed=SEED, **keywords)
    assert all(isinstance(tensor, torch.Tensor) for tensor in merged.values())
    assert stored(merged) == expected


def test_lazy_tensors_have_the_bits_of_files(case: tuple[str, Path, Stored]) -> None:
    _, recipe, expected = case
    lazy = oxmerge.lazy(recipe, framework="pt", seed=SEED)
    assert all(isinstance(tensor, torch.Tensor) for tensor in lazy.values())
    assert stored(lazy) == expected


def test_the_default_device_does_not_matter(tmp_path: Path) -> None:
    write_model(tmp_path / "a", random_arrays({"x": (40, 3)}, 0), "F32")
    recipe = tmp_path / "r.yml"
    recipe.write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    with torch.device("meta"):
        found = [
            kernels.weighted_sum([X, X], [1, 2]),
            kernels.top_k_mask(X, 2),
            kernels.gram([X, X]),
            oxmerge.merge_tensors("linear", [X.expand(2, 3).T], weight=1),
            oxmerge.lazy(recipe, framework="pt")["x"],
        ]
        oxmerge.merge(recipe, tmp_path / "out", device="torch")
    assert [tensor.device.type for tensor in found] == ["cpu"] * 5
    assert found[0].tolist() == [3, 3, 3]
    assert found[2].tolist() == [[3, 3], [3, 3]]


def test_subnormal_numbers_are_kept_where_torch_flushes_them(tmp_path: Path) -> None:
    tiny = np.full(70_001, 1e-40, np.float32)
    for name in "ab":
        write_model(tmp_path / name, {"x": tiny}, "F32")
    models = "".join(f"- {{model: {n}, parameters: {{weight: 1}}}}\n" for n in "ab")
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: linear\nmodels:\n{models}")

    def results() -> list[bytes]:
        opened = [oxmerge.open(tmp_path / name) for name in "ab"]
        arrays = [
            *(kernels.weighted_sum([tiny, tiny], [0.5, 0.5], threads=n) for n in (1, 2)),
            kernels.weighted_sum([tiny[:9], tiny[:9]], [0.5, 0.5]),
            oxmerge.merge_state_dicts("linear", opened, weight=1)["x"],
            oxmerge.lazy(recipe)["x"],
        ]
        for device in ("cpu", "torch"):
            oxmerge.merge(recipe, tmp_path / "out", device=device, overwrite=True)
            arrays.append(oxmerge.open(tmp_path / "out")["x"])
        return [array.tobytes() for array in arrays]

    expected = results()
    smallest = torch.tensor(1e-40)
    assert torch.set_flush_denormal(True)
    try:
        found = results()
        assert smallest * 1 == 0  # flushes still
    finally:
        torch.set_flush_denormal(False)
    assert found == expected
    assert expected[0] == tiny.tobytes()


def test_an_average_in_training(uniform: dict[str, dict[str, Any]]) -> None:
    average = as_torch(uniform["a"])
    addresses = {name: tensor.data_ptr() for name, tensor in average.items()}
    for step, model in enumerate("bc", start=2):
        latest = as_torch(uniform[model])
        oxmerge.merge_state_dicts("linear", [average, latest], weight=[step - 1, 1], out=average)
    assert addresses == {name: tensor.data_ptr() for name, tensor in average.items()}
    mean = sum(uniform[model]["w"].astype(np.float32) for model in "abc") / 3
    np.testing.assert_allclose(average["w"].float().numpy(), mean, rtol=2**-7, atol=1e-6)


def test_parameters_of_a_model_can_be_merged_in_place() -> None:
    ours, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = (0.5 * ours.weight + 0.5 * theirs.weight).detach()
    dicts = [dict(ours.named_parameters()), dict(theirs.named_parameters())]
    oxmerge.merge_state_dicts("linear", dicts, weight=0.5, out=dicts[0])
    assert torch.equal(ours.weight, expected)
    assert ours.weight.requires_grad


def test_tensors_that_share_memory_are_merged_once() -> None:
    def tied(value: float) -> dict[str, torch.Tensor]:
        weight = torch.full((4, 3), value)
        return {"embed": weight, "head": weight}

    one, other = tied(1.0), tied(5.0)
    oxmerge.merge_state_dicts("linear", [one, other], weight=[0.75, 0.25], out=one)
    assert one["embed"].unique().tolist() == one["head"].unique().tolist() == [2.0]
    other["head"] = other["head"].clone()
    message = (
        "tensor `head`: it shares memory with `embed` of out, which is overwritten by then; "
        "give out arrays of its own, or leave one of the names out"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        oxmerge.merge_state_dicts("linear", [one, other], weight=0.5, out=one)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_torch_and_numpy_give_the_same(name: str) -> None:
    values = np.random.default_rng(1).standard_normal((3, 1001))
    arrays = [(values + at).astype(BF16 if name == "bfloat16" else name) for at in range(2)]
    as_torch = [torch.tensor(x.astype(np.float64)).to(getattr(torch, name)) for x in arrays]
    expected = kernels.weighted_sum(arrays, [0.3, 0.6])
    found = kernels.weighted_sum(as_torch, [0.3, 0.6])
    assert isinstance(found, torch.Tensor)
    assert found.dtype == as_torch[0].dtype
    assert found.shape == (3, 1001)
    assert np.array_equal(found.double().numpy(), expected.astype(np.float64))
    assert kernels.norm(as_torch[0]) == kernels.norm(arrays[0])
    assert isinstance(kernels.top_k_mask(as_torch[0], 5), torch.Tensor)
    assert kernels.gram(as_torch).dtype == torch.float64


NARROW = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]


@pytest.mark.parametrize("name", NARROW)
def test_every_number_of_float8_is_taken_exactly(name: str) -> None:
    narrow = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name))
    wide = narrow.to(torch.float32)
    array = narrow.view(torch.uint8).numpy().view(getattr(ml_dtypes, name))
    for given in (narrow, array):
        found = kernels.convert(given, "float32")
        np.testing.assert_array_equal(np.asarray(found), wide.numpy())
        copied = oxmerge.merge_tensors("passthrough", [given])
        assert str(copied.dtype).removeprefix("torch.") == "bfloat16"
        np.testing.assert_array_equal(np.asarray(kernels.convert(copied, "float32")), wide.numpy())
    with pytest.raises(TypeError, match="`x_scale` would not be applied"):
        oxmerge.merge_state_dicts("linear", [{"x": narrow, "x_scale": X}], weight=1)
    columns = narrow.view(16, 16).T
    assert torch.equal(
        kernels.convert(columns, "float32").nan_to_num(), wide.view(16, 16).T.nan_to_num()
    )


@pytest.mark.parametrize("name", ["float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"])
def test_every_number_of_float8_of_ml_dtypes_is_taken_exactly(name: str) -> None:
    narrow = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name))
    found = kernels.convert(narrow, "float32")
    np.testing.assert_array_equal(found, narrow.astype(np.float32))
    with pytest.raises(TypeError, match=rf"^out is of {name}, and the result of bfloat16 at least"):
        kernels.weighted_sum([narrow], [1], out=narrow)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_lists_are_one_call(name: str, *, fast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 64), (1,), (), (0, 2), (70_001,), (2, 3, 4)]
    dtype = getattr(torch, name)

    def draw() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    a, b = draw(), draw()
    a[-1] = torch.nn.Parameter(a[-1])
    expected = [kernels.lerp(x, y, 0.3) for x, y in zip(a, b, strict=True)]
    found = kernels.lerp(a, b, 0.3)
    assert all(map(torch.equal, found, expected))
    assert not any(each.requires_grad for each in found)
    out = [torch.empty_like(each) for each in found]
    options: dict[str, Any] = {} if fast else {"dtype": dtype}
    assert kernels.lerp(a, b, 0.3, out=out, **options) is out
    assert all(map(torch.equal, out, expected))
    versions = [each._version for each in a]
    kernels.lerp(a, b, 0.3, out=a, **options)
    assert all(map(torch.equal, a, expected))
    assert all(each._version > before for each, before in zip(a, versions, strict=True))
    if name in {"float32", "float64"}:
        again = [x.detach().clone() for x in b]
        torch._foreach_lerp_(again, [x.detach() for x in a], 0.7)
        mine = kernels.lerp(b, a, 0.7)
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(mine, again, strict=True))


def test_lists_of_any_tensors() -> None:
    odd = torch.arange(6.0).reshape(2, 3).T
    negated = torch.tensor([1 + 2j]).conj().imag
    narrow = torch.ones(3).to(torch.float8_e4m3fn)
    given = [odd, negated, narrow, np.array([1, 2], np.float32)]
    found = kernels.weighted_sum([given, given], [1, 1])
    assert found[0].tolist() == (2 * odd).tolist()
    assert found[1].tolist() == [-4]
    assert found[2].dtype == torch.bfloat16
    assert isinstance(found[3], np.ndarray)
    with pytest.raises(ValueError, match=r"^out\[0\] is a negated view"):
        kernels.lerp([X[:1]], [X[:1]], 0.5, out=[negated])
    with pytest.raises(ValueError, match=r"^b\[0\] is on the device `meta`"):
        kernels.lerp([X], [torch.empty(3, device="meta")], 0.5, out=[torch.empty(3)])
    with pytest.raises(TypeError, match=r"^b\[0\] is sparse"):
        kernels.lerp([torch.eye(3)], [torch.eye(3).to_sparse()], 0.5, out=[torch.eye(3)])
    with pytest.raises(ValueError, match="two of out share memory"):
        kernels.lerp([X, X], [X, X], 0.5, out=[X, X])


WITHOUT_EXCHANGE = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import torch_arrays
for name in ("float16", "bfloat16", "float32", "float64"):
    torch_arrays.test_lists_are_one_call(name, fast=True)
    torch_arrays.test_torch_and_numpy_give_the_same(name)
torch_arrays.test_lists_of_any_tensors()
torch_arrays.test_results_go_to_out()
torch_arrays.test_memory_of_a_tensor_is_held()
"""


def test_older_torch_hands_out_capsules() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_EXCHANGE],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_memory_of_a_tensor_is_held() -> None:
    """It may be given other memory by another thread, in the middle of a call."""
    count = 16 << 20
    tensor, out = torch.ones(count), torch.zeros(count)
    storage = weakref.ref(tensor.untyped_storage())
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            tensor.data = torch.full((count,), 2.0)

    thread = threading.Thread(target=swap)
    thread.start()
    for _ in range(10):
        kernels.weighted_sum([tensor], [3], out=out, threads=1)
        assert set(out.unique().tolist()) <= {3.0, 6.0}
    stop.set()
    thread.join()
    assert storage() is None


@pytest.mark.parametrize("size", [0, 16])
def test_a_storage_that_is_too_small_is_not_read_past(size: int) -> None:
    def shrunk() -> torch.Tensor:
        tensor = torch.ones(1 << 20)
        tensor.untyped_storage().resize_(size)
        return tensor

    out = torch.empty(1 << 20)
    for call in (
        lambda: kernels.weighted_sum([shrunk()], [1], out=out),
        lambda: _core.fill_array("convert", [shrunk()], out, (1 << 20,), [], "", 0, None),
        lambda: _core.fill_array("convert", [out], shrunk(), (1 << 20,), [], "", 0, None),
        lambda: _core.numbers_of_arrays("absolute_sum", [shrunk()], 1 << 20, 0, None),
    ):
        told = r"no memory of its own for its elements|overlaps an input"
        with pytest.raises(ValueError, match=told):
            call()


def test_results_go_to_out() -> None:
    values = np.array([1, 2, 3], np.float32)
    tensor = torch.empty(3)
    assert kernels.task_vector(torch.tensor(values), torch.ones(3), out=tensor) is tensor
    assert tensor.tolist() == [0, 1, 2]
    mask = torch.empty(7, dtype=torch.bool)
    assert kernels.random_mask(7, 1, out=mask) is mask
    assert mask.all()
    odd = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(kernels.weighted_sum([odd], [2]), 2 * odd)
    same = kernels.task_arithmetic([tensor], mask.float()[:3].clone(), weight=torch.tensor(0.5))
    assert same.tolist() == [0.5, 1, 1.5]


def test_autograd_knows_what_was_overwritten() -> None:
    def loss(act: Any) -> torch.Tensor:
        weight = torch.ones(3, requires_grad=True)
        needed = 2 * weight.detach()
        product = (weight * needed).sum()
        act(needed)
        return product

    loss(lambda _: None).backward()
    acts: list[Any] = [
        lambda out: kernels.weighted_sum([X], [3], out=out),
        lambda out: kernels.random_mask(3, 0.5, out=out),
        lambda out: oxmerge.merge_tensors("linear", [out], weight=1, out=out),
        lambda out: oxmerge.merge_state_dicts("linear", [{"x": X}], weight=1, out={"x": out}),
    ]
    for act in acts:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss(act).backward()
    with torch.inference_mode():
        assert kernels.weighted_sum([X], [3], out=torch.empty(3)).tolist() == [3, 3, 3]


def test_tensors_are_saved_and_opened(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3).bfloat16()
    linear = torch.nn.Linear(3, 2)
    tensors = {
        **linear.state_dict(),
        "parameter": linear.weight,
        "columns": weight.T,
        "tied": weight,
        "tied too": weight,
        "single": torch.tensor(3.5, dtype=torch.float16),
        "nothing": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "narrow": torch.ones(3).to(torch.float8_e4m3fn),
        "negated": torch.tensor([1 + 2j]).conj().imag,
        "numpy": np.array([1, 2], np.float32),
        "numpy of bfloat16": np.ones(3, BF16),
    }
    path = tmp_path / "m.safetensors"
    oxmerge.save(tensors, path)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        expected = tensor if isinstance(tensor, torch.Tensor) else loaded[name]
        assert loaded[name].dtype == expected.dtype
        assert torch.equal(loaded[name].float(), expected.detach().float())
    assert loaded["numpy of bfloat16"].dtype == torch.bfloat16
    del tensors["narrow"]
    oxmerge.save(tensors, path, overwrite=True)
    opened = oxmerge.open(path, framework="pt")
    for name, tensor in opened.items():
        assert tensor.dtype == loaded[name].dtype
        assert torch.equal(tensor, loaded[name])
    before = path.read_bytes()
    opened["weight"].zero_()  # in memory alone
    assert path.read_bytes() == before
    oxmerge.save(opened, tmp_path / "again", shard_size=40)
    again = oxmerge.open(tmp_path / "again", "pt")
    assert all(torch.equal(again[name], opened[name]) for name in tensors)
    mixed = oxmerge.merge_state_dicts("linear", [again, dict(opened)], weight=0.5)
    assert isinstance(mixed["columns"], torch.Tensor)


def test_no_tensor_on_a_device_is_saved_as_nothing(tmp_path: Path) -> None:
    tensors = {"x": torch.empty(3, device="meta"), "y": torch.eye(2).to_sparse()}
    with pytest.raises(oxmerge.PlanError, match="cannot be saved: 2 problems"):
        oxmerge.save(tensors, tmp_path / "m.safetensors")


def test_the_average_of_the_guide_is_right_in_torch(tmp_path: Path) -> None:
    values = {"x": np.full((3, 5), 1.5, np.float32)}
    for name in "ab":
        write_model(tmp_path / name, values, "BF16")
    numpy = [oxmerge.open(tmp_path / name) for name in "ab"]
    oxmerge.save({"x": (numpy[0]["x"] + numpy[1]["x"]) / 2}, tmp_path / "numpy")
    of_torch = [oxmerge.open(tmp_path / name, framework="pt") for name in "ab"]
    oxmerge.save({"x": (of_torch[0]["x"] + of_torch[1]["x"]) / 2}, tmp_path / "torch")
    for name in ("numpy", "torch"):
        found = load_file(tmp_path / name / "model.safetensors")["x"]
        assert found.dtype == torch.bfloat16
        assert found.unique().tolist() == [1.5]


class Other:
    """An array of another package, known by DLPack alone."""

    def __init__(self, tensor: torch.Tensor, device: int = 1) -> None:
        self.tensor = tensor
        self.device = device

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0


class Old(Other):
    """Has a DLPack without versions, which does not say what may be written to."""

    def __dlpack__(self, **options: Any) -> Any:
        if "max_version" in options:
            raise TypeError(options)
        return self.tensor.__dlpack__()


def test_bfloat16_over_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    other: Any = Other(torch.tensor([3, 4], dtype=torch.bfloat16))
    found = kernels.weighted_sum([other], [2])
    assert isinstance(found, np.ndarray)
    assert found.dtype == BF16
    assert found.tolist() == [6, 8]
    with pytest.raises(TypeError, match=r"^out cannot be taken over DLPack: .* or of torch$"):
        kernels.weighted_sum([other], [2], out=other)

    class Broken(Other):
        def __dlpack__(self, **_: Any) -> Any:
            raise BufferError("no such type.")

    with pytest.raises(TypeError, match=r"^tensor cannot be taken over DLPack: no such type\."):
        kernels.norm(Broken(X))
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not loaded
    with pytest.raises(TypeError, match=r"^tensor cannot be taken over DLPack: .* or of torch$"):
        kernels.norm(other)


def test_out_over_dlpack() -> None:
    out: Any = Other(torch.zeros(2))
    assert kernels.weighted_sum([Old(torch.tensor([3.0, 4.0]))], [2], out=out) is out
    assert out.tensor.tolist() == [6, 8]
    message = (
        "out is read-only over its DLPack, which one older than 1.0 always is; pass an array of "
        "NumPy or of torch"
    )
    old: Any = Old(torch.zeros(3))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kernels.weighted_sum([X], [2], out=old)


def test_page_locked_memory_is_on_the_cpu() -> None:
    assert kernels.norm(Other(torch.tensor([3.0, 4.0]), device=3)) == 5
    with pytest.raises(ValueError, match=r"^tensor is not on the CPU; copy it there first$"):
        kernels.norm(Other(X, device=2))


def call(*arguments: Any, **options: Any) -> Any:
    return lambda: oxmerge.merge_tensors("linear", *arguments, weight=1, **options)


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            call([torch.empty(3, dtype=torch.float8_e8m0fnu)]),
            TypeError,
            (
                "tensors[0] is of float8_e8m0fnu, which is not supported; convert it to float32 or "
                "bfloat16"
            ),
        ),
        (
            call([X], out=torch.empty(3, dtype=torch.float8_e4m3fn)),
            TypeError,
            ("out is of float8_e4m3fn, and the result of bfloat16 at least; pass one of bfloat16"),
        ),
        (
            call([torch.empty(3, device="meta")]),
            ValueError,
            (
                "tensors[0] is on the device `meta`; copy it to the CPU first (`.cpu()`), or merge "
                "files with `oxmerge merge`"
            ),
        ),
        (
            call([torch.eye(3).to_sparse()]),
            TypeError,
            "tensors[0] is sparse; make it dense first (`.to_dense()`)",
        ),
        (
            call([X], out=torch.empty(6)[::2]),
            ValueError,
            (
                "the elements of out do not follow each other in memory; write into a contiguous "
                "one, such as `out.contiguous()`, and copy from there"
            ),
        ),
    ],
)
def test_errors_say_what_to_do(act: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        act()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: Any) -> None:
    nested = torch.nested.nested_tensor([X, X[:2]], layout=layout)
    with pytest.raises(TypeError, match=r"^tensor is nested; merge its parts one by one"):
        kernels.norm(nested)


class Wrapper(torch.Tensor):  # type: ignore[misc] # mypy does not look into torch
    """Has a shape and no memory, as tensors of quantisers and of distributed packages may."""

    @classmethod
    def __torch_dispatch__(cls, *call: Any) -> Any:
        raise AssertionError(call)


def resized(size: int, step: int = 1) -> torch.Tensor:
    tensor = torch.ones(3)[::step]
    tensor.untyped_storage().resize_(size)
    return tensor


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    "tensor",
    [
        resized(0),
        resized(8),
        resized(8, step=2),
        torch.Tensor._make_wrapper_subclass(Wrapper, (3,)),
        FakeTensorMode().from_tensor(torch.ones(3)),
    ],
)
def test_tensors_without_memory_are_refused(tensor: torch.Tensor) -> None:
    advice = "has no memory of its own for its elements; materialise it first"
    with pytest.raises(ValueError, match=re.escape(f"tensors[0] {advice}")):
        oxmerge.merge_tensors("linear", [tensor], weight=1)
    with pytest.raises(ValueError, match=re.escape(f"out {advice}")):
        kernels.weighted_sum([torch.ones(tensor.shape)], [2], out=tensor)


@pytest.mark.parametrize("transform", [torch.func.functionalize, torch.func.vmap])
def test_tensors_of_a_transform_are_refused(transform: Any) -> None:
    with pytest.raises(ValueError, match=r"^tensor has no memory of its own for its elements;"):
        transform(lambda x: x + kernels.norm(x))(torch.ones(3, 2))


def test_negated_views_are_resolved() -> None:
    conjugate = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert conjugate.is_neg()
    negated = torch._neg_view(torch.ones(2))
    assert kernels.weighted_sum([conjugate, negated], [1, 1]).tolist() == [-3, 3]
    with pytest.raises(
        ValueError, match=r"^out is a negated view; pass a tensor of its own, not negated$"
    ):
        kernels.weighted_sum([torch.ones(2)], [2], out=negated)


def write_llamas(folder: Path) -> Any:
    """Write a small Llama as `base`, and two fine-tunes of it, `code` and `chat`; its config."""
    transformers = pytest.importorskip(
        "transformers", reason="not installed: transformers (see the dependency group `test`)"
    )
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    tensors = transformers.LlamaForCausalLM(config).float().state_dict()
    base = {name: tensor.numpy() for name, tensor in tensors.items()}
    write_model(folder / "base", base, "BF16", config.to_dict())
    for seed, name in enumerate(("code", "chat"), start=1):
        write_model(folder / name, tuned(base, seed, 1e-2), "BF16", config.to_dict())
    return config


def test_a_model_of_transformers_from_a_recipe(tmp_path: Path) -> None:
    config = write_llamas(tmp_path)
    from transformers import LlamaForCausalLM

    models = "".join(f"- {{model: {n}, parameters: {{weight: 1}}}}\n" for n in ("code", "chat"))
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: linear\nmodels:\n{models}")
    oxmerge.merge(recipe, tmp_path / "out", memory="4GiB")
    tensors = oxmerge.lazy(recipe, framework="pt")
    assigned = LlamaForCausalLM(config)
    assigned.load_state_dict(tensors, assign=True)
    straight = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)
    with torch.device("meta"):
        on_meta = LlamaForCausalLM(config)
    on_meta.load_state_dict(tensors, assign=True)
    ids = torch.arange(7)[None]
    with torch.inference_mode():
        expected = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
        for model in (assigned, straight):
            assert torch.equal(model.eval()(ids).logits, expected)
        # Why the guide says not to.
        with pytest.raises(NotImplementedError, match="meta"):
            on_meta.eval()(ids)


@pytest.mark.parametrize("installed", [True, False])
def test_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, installed: bool
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    root = Path(__file__).parent.parent
    guide = (root / "python" / "SCRIPTS.md").read_text(encoding="utf-8")
    readme = (root / "README.md").read_text(encoding="utf-8")
    write_llamas(tmp_path / "models")
    recipe = re.search(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    assert recipe is not None
    (tmp_path / "recipe.yml").write_text(recipe[1])
    monkeypatch.chdir(tmp_path)
    for name, text in {"README.md": readme, "SCRIPTS.md": guide}.items():
        script = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
        assert "oxmerge.lazy(" in script
        exec(compile(script, name, "exec"), {})
