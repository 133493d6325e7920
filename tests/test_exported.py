"""What reaches the compiled module is memory that an object exports, or is refused."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from oxmerge import _core
from writers import write_model, write_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

X = np.arange(6, dtype=np.float32)


def address(array: Any) -> int:
    found: int = array.__array_interface__["data"][0]
    return found


def fill(given: Any, out: Any, shape: Any = (6,)) -> None:
    _core.fill_array("convert", [given], out, shape, [], "", 0, None)


def calls(wrong: Any) -> list[Callable[[], object]]:
    """Return every way to hand an array over."""
    out = np.zeros(6, np.float32)
    return [
        lambda: fill(wrong, out),
        lambda: fill(X, wrong),
        lambda: _core.fill_arrays("convert", [[wrong]], [out], [], None),
        lambda: _core.fill_arrays("convert", [[X]], [wrong], [], None),
        lambda: _core.merge_arrays(
            "linear", [wrong], None, out, [6], {}, [{"weight": 1}], "", 0, 1
        ),
        lambda: _core.merge_arrays("linear", [X], None, wrong, [6], {}, [{"weight": 1}], "", 0, 1),
        lambda: _core.numbers_of_arrays("absolute_sum", [wrong], 6, 0, None),
        lambda: _core.ulp_distance(X, wrong, None),
        lambda: _core.ulp_distance(wrong, X, None),
    ]


class Liar:
    """Says that it has memory at some address, as only a library in C could know."""

    def __init__(self) -> None:
        self.__array_interface__ = {
            "data": (address(X), False), "shape": (6,), "typestr": "<f4", "version": 3
        }  # fmt: skip
        self.dtype, self.shape, self.nbytes = X.dtype, X.shape, X.nbytes

    def data_ptr(self) -> int:
        return address(X)

    def untyped_storage(self) -> Liar:
        return self


REFUSED: dict[str, Any] = {
    "a place": (address(X), X.nbytes, "F32"),
    "an address": address(X),
    "an address with a type": (address(X), "F32"),
    "nothing": None,
    "a liar": Liar(),
    "a liar with a type": (Liar(), "F32"),
    "an unknown type": (X, "F33"),
    "a type of another size": (X, "F64"),
    "every other element": np.zeros(12, np.float32)[::2],
    "columns": np.zeros((2, 3), np.float32).T,
    "references": np.array([None] * 6, object),
    "references in pieces": np.zeros(6, [("x", object)]),
    "references as numbers": (np.array([None] * 6, object), "F64"),
    "the wrong end first": np.zeros(6, ">f4"),
    "a list": [1.0] * 6,
    "a tuple in a tuple": ((X, "F32"), "F32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_exports_no_numbers_is_refused(name: str) -> None:
    before = X.copy()
    for call in calls(REFUSED[name]):
        with pytest.raises((TypeError, ValueError, BufferError)):
            call()
    assert np.array_equal(X, before)


def test_lengths_and_what_may_be_written_come_from_the_object() -> None:
    read_only = np.zeros(6, np.float32)
    read_only.flags.writeable = False
    for wrong in (np.zeros(5, np.float32), np.zeros(7, np.float32), read_only, bytes(24)):
        with pytest.raises((ValueError, TypeError)):
            fill(X, wrong)
        with pytest.raises((ValueError, TypeError)):
            _core.fill_arrays("convert", [[X]], [wrong], [], None)
    assert not read_only.any()
    huge = (1 << 63, 1 << 63)
    for shape in (huge, (7,), (3,), (6, 2), (2**62, 4)):
        with pytest.raises((ValueError, OverflowError)):
            fill(X, np.zeros(6, np.float32), shape)


@pytest.mark.parametrize(
    "call",
    [
        lambda: _core.fill_array("lerp", [X], X.copy(), [6], [0.5], "", 0, None),
        lambda: _core.fill_array("weighted_sum", [X], X.copy(), [6], [0.5, 1], "", 0, None),
        lambda: _core.fill_array("nothing", [X], X.copy(), [6], [], "", 0, None),
        lambda: _core.fill_arrays("top_k_mask", [[X]], [X.copy()], [1], None),
        lambda: _core.fill_arrays("lerp", [[X], [X, X]], [X.copy()], [1], None),
        lambda: _core.fill_arrays("lerp", [], [X.copy()], [1], None),
        lambda: _core.numbers_of_arrays("dot", [X], 6, 0, None),
        lambda: _core.numbers_of_arrays("gram", [], 6, 0, None),
        lambda: _core.merge_arrays("linear", [X], 3, X.copy(), [6], {}, [{"weight": 1}], "", 0, 1),
        lambda: _core.merge_arrays("linear", [X], None, X.copy(), [6], {}, [], "", 0, 1),
    ],
)
def test_pieces_take_as_many_arrays_as_they_have(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"array|input|list"):
        call()


def test_other_exporters_are_taken_for_what_they_say(tmp_path: Path) -> None:
    out = np.zeros(6, np.float32)
    fill(memoryview(bytearray(X.tobytes())).cast("f"), out)
    assert out.tobytes() == X.tobytes()
    file = tmp_path / "x"
    file.write_bytes(X.tobytes())
    with file.open("r+b") as stream:
        mapped = mmap.mmap(stream.fileno(), 0)
    for given, count in ((mapped, 24), ((mapped, "F32"), 24), (X.tobytes(), 24), (X.view("i4"), 6)):
        with pytest.raises(TypeError, match=r"^(only floats can be|elements of U8 cannot be F32)"):
            fill(given, np.zeros(count, np.float32), (count,))
    with pytest.raises(TypeError, match="only floats can be computed with"):
        _core.numbers_of_arrays("absolute_sum", [X.view(np.int32)], 6, 0, None)
    copied = np.zeros(24, np.uint8)
    _core.merge_arrays("linear", [mapped], None, copied, [24], {}, [{}], "", 0, None)
    assert copied.tobytes() == X.tobytes()


def test_memory_cannot_go_away_during_a_call() -> None:
    count = 4 << 20
    out = bytearray(4 * count)
    view = memoryview(out).cast("f")
    source = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    refused, done = [], threading.Event()

    def resize() -> None:
        while not done.is_set():
            view.release()
            try:
                out.extend(b"x")
                del out[-1:]
            except BufferError:
                refused.append(1)

    thread = threading.Thread(target=resize)
    exported = [memoryview(out).cast("f") for _ in range(20)]
    thread.start()
    for each in exported:
        fill(source, each, (count,))
        each.release()
    done.set()
    thread.join()
    assert refused
    assert bytes(out) == source.tobytes()


EVIL = """
import gc, sys, torch
from oxmerge import _core
n = 1 << 22
tensor, other = torch.ones(n), torch.ones(n)

class Evil:
    def __buffer__(self, flags):
        tensor.data = torch.zeros(3)
        gc.collect()
        return memoryview(bytearray(4 * n)).cast("f")

try:
    _core.fill_arrays("lerp", [[tensor], [Evil()]], [other], [0.5], None)
except (TypeError, ValueError, BufferError) as error:
    print("refused")
else:
    print("done")
"""


def test_a_tensor_that_changes_while_others_are_looked_at() -> None:
    pytest.importorskip("torch", reason="not installed: torch (see the dependency group `test`)")
    done = subprocess.run([sys.executable, "-c", EVIL], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def plan_of(folder: Path) -> _core.Plan:
    model = write_model(folder / "model", {"x": X})
    return oxmerge.plan(write_recipe(folder / "recipe.yml", "passthrough", [model])).table


@pytest.mark.parametrize("call", ["predict", "execute", "rehearse"])
def test_memory_is_lent_to_no_other_device(tmp_path: Path, call: str) -> None:
    class Device:
        vram, devices, is_host = 1 << 30, ("cpu",), True

    calls: dict[str, Callable[[Any], object]] = {
        "predict": lambda device: _core.predict([], 1 << 30, 1, device),
        "execute": lambda device: _core.execute([], memory=1 << 30, device=device),
        "rehearse": lambda device: _core.rehearse(plan_of(tmp_path), 1, device),
    }
    with pytest.raises(TypeError, match=r"device must be a torch_backend\.Backend"):
        calls[call](Device())


def test_a_plan_cannot_make_memory(tmp_path: Path) -> None:
    engine = _core.OnDemand(plan_of(tmp_path))
    for wrong in (np.zeros(5, np.float32), (address(X), 24, "F32"), X.tobytes()):
        with pytest.raises((TypeError, ValueError)):
            engine.compute(0, wrong, None)
    with pytest.raises(ValueError, match="has no tensor 1"):
        engine.compute(1, np.zeros(6, np.float32), None)
    gc.collect()
