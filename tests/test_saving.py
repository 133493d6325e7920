"""Arrays that a script has made are written as they are, and as safely as a merge writes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import oxmerge
import pytest
from oxmerge import _core
from safetensors import safe_open
from safetensors.numpy import load_file
from writers import random_arrays, read_tensors, write_model, write_sparse

if TYPE_CHECKING:
    from pathlib import Path

BF16 = ml_dtypes.bfloat16
TYPES = ["bool", "uint8", "int8", "uint16", "int16", "float16", "uint32", "int32", "float32",
         "uint64", "int64", "float64"]  # fmt: skip


def of_all_types() -> dict[str, Any]:
    values = np.arange(6).reshape(2, 3)
    found: dict[str, Any] = {name: values.astype(name) for name in TYPES}
    return found | {
        "bfloat16": values.astype(BF16),
        "single": np.float32(3) * np.ones((), np.float32),
        "single of bfloat16": np.array(2.5, BF16),
        "nothing": np.zeros((0, 4), np.float16),
        "columns": values.astype(np.float32).T,
        "every other": np.arange(8, dtype=np.int16)[::2],
        'a name with ümläuts, "quotes" and \n': np.ones(3, BF16),
    }  # fmt: skip


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    arrays = of_all_types()
    path = tmp_path / "new" / "m.safetensors"
    assert oxmerge.save(arrays, path) == [str(path)]
    stored = read_tensors(path)
    assert set(stored) == set(arrays)
    for name, array in arrays.items():
        assert stored[name][1:] == (array.shape, array.tobytes())
    loaded = load_file(path)
    for name, array in oxmerge.open(path).items():
        assert array.dtype == arrays[name].dtype
        assert np.array_equal(array, arrays[name])
        assert array.dtype == BF16 or np.array_equal(loaded[name], array)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert os.listdir(path.parent) == ["m.safetensors"]


def test_elements_lie_at_multiples_of_their_size(tmp_path: Path) -> None:
    arrays = of_all_types()
    oxmerge.save(arrays, tmp_path / "m.safetensors")
    for tensor in _core.open_checkpoint(tmp_path / "m.safetensors").tensors:
        assert tensor.start % arrays[tensor.name].itemsize == 0


def test_float8_is_saved_as_it_is(tmp_path: Path) -> None:
    bits = np.arange(256, dtype=np.uint8)
    arrays = {
        name: bits.view(getattr(ml_dtypes, name)) for name in ("float8_e4m3fn", "float8_e5m2")
    }
    oxmerge.save(arrays, tmp_path / "m.safetensors")
    stored = read_tensors(tmp_path / "m.safetensors")
    assert {name: code for name, (code, _, _) in stored.items()} == {
        "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"
    }  # fmt: skip
    assert all(data == bits.tobytes() for _, _, data in stored.values())


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    oxmerge.save({"x": np.ones(2)}, path, metadata={"step": "3", "format": "np", "wer": "ich"})
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "np", "step": "3", "wer": "ich"}
    for wrong in ({"step": 3}, {3: "step"}, [("a", "b")]):
        with pytest.raises(TypeError, match=r"^metadata must be"):
            oxmerge.save({}, tmp_path / "n", metadata=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [None, 100, "1kB", 0])
def test_a_directory_in_shards(tmp_path: Path, size: Any) -> None:
    arrays = random_arrays({f"x{at}": (at, 7) for at in range(12)}, 0)
    written = oxmerge.save(arrays, tmp_path / "out", shard_size=size)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        os.path.basename(each) for each in written
    )
    opened = oxmerge.open(tmp_path / "out")
    assert all(np.array_equal(opened[name], arrays[name]) for name in arrays)
    if size in (None, 0):
        assert written == [str(tmp_path / "out" / "model.safetensors")]
        return
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(arrays)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert len(written) == len(set(index["weight_map"].values())) + 1 > 3


def test_the_average_of_the_guide(tmp_path: Path) -> None:
    arrays = random_arrays({"x": (40, 3), "y": (5,)}, 0)
    for name in "ab":
        write_model(tmp_path / name, arrays, "BF16")
    models = [oxmerge.open(tmp_path / name) for name in "ab"]
    average = {name: (models[0][name] + models[1][name]) / 2 for name in models[0]}
    oxmerge.save(average, tmp_path / "out")
    stored = read_tensors(tmp_path / "out" / "model.safetensors")
    assert stored == read_tensors(tmp_path / "a" / "model.safetensors")


class Counted(Mapping[str, Any]):
    """Arrays that are made when they are looked up."""

    def __init__(self) -> None:
        self.names = [f"x{at}" for at in range(8)]
        self.made: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self.made.append(name)
        return np.full(1 << 20, self.names.index(name), np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_tensors_are_looked_up_one_by_one(tmp_path: Path) -> None:
    counted = Counted()
    oxmerge.save(counted, tmp_path / "out", shard_size="20MB")
    assert counted.made == [*counted.names, *counted.names]
    opened = oxmerge.open(tmp_path / "out")
    assert [array[-1] for array in opened.values()] == list(range(8))


LARGE = """
import sys, oxmerge
tensors = getattr(oxmerge, sys.argv[1])(sys.argv[2])
oxmerge.save(tensors, sys.argv[3], shard_size="150MB")
status = open("/proc/self/status").read()
print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.parametrize("kind", ["lazy", "open"])
def test_a_mapping_may_be_larger_than_memory(tmp_path: Path, kind: str) -> None:
    shapes = {f"x{at}": (4096, 2048) for at in range(24)}  # 400 MB
    for name in "ab":
        write_sparse(tmp_path / name / "model.safetensors", shapes)
        (tmp_path / name / "config.json").write_text("{}")
    models = "".join(f"- {{model: {name}, parameters: {{weight: 1}}}}\n" for name in "ab")
    (tmp_path / "r.yml").write_text(f"merge_method: linear\nmodels:\n{models}")
    source = tmp_path / ("r.yml" if kind == "lazy" else "a")
    command: list[Any] = [sys.executable, "-c", LARGE, kind, source, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if kind == "lazy":
        assert int(done.stdout) < 200 << 20
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    assert not any(array.any() for array in oxmerge.open(tmp_path / "out").values())


# What is refused.


def test_every_tensor_that_cannot_be_saved_is_told(tmp_path: Path) -> None:
    wrong: dict[Any, Any] = {
        "a": np.zeros(2, complex),
        "b": np.zeros(2, ">f4"),
        "c": [1, 2],
        "d": np.array([None]),
        "e": np.zeros(2, ml_dtypes.float8_e4m3b11fnuz),
        "__metadata__": np.zeros(2),
        3: np.zeros(2),
        "\udc80": np.zeros(2),
        "good": np.zeros(2),
    }
    for target in ("out", "m.safetensors"):
        with pytest.raises(
            oxmerge.PlanError, match="the tensors cannot be saved: 8 problems"
        ) as now:
            oxmerge.save(wrong, tmp_path / target)
        assert [problem.tensor for problem in now.value.problems] == [
            "a", "b", "c", "d", "e", "__metadata__", "3", "\udc80"
        ]  # fmt: skip
        assert not (tmp_path / target).exists()
    with pytest.raises(oxmerge.OutputError, match="name"):
        oxmerge.save({"x": np.zeros(2)}, "")
    for nothing in ([np.zeros(2)], np.zeros(2), None, "x"):
        with pytest.raises(TypeError):
            oxmerge.save(nothing, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a file has no shards"):
        oxmerge.save({}, tmp_path / "m.safetensors", shard_size=3)


def test_what_is_there_is_replaced_only_where_asked(tmp_path: Path) -> None:
    one, two = {"x": np.ones(3)}, {"x": np.zeros(3), "y": np.zeros(2)}
    file, folder = tmp_path / "m.safetensors", tmp_path / "out"
    for target in (file, folder):
        oxmerge.save(one, target)
        with pytest.raises(FileExistsError):
            oxmerge.save(two, target)
        assert list(oxmerge.open(target)) == ["x"]
        oxmerge.save(two, target, overwrite=True)
        assert sorted(oxmerge.open(target)) == ["x", "y"]
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("{}")
    oxmerge.save(two, folder, overwrite=True, shard_size=20)
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "x"}
    assert sorted(os.listdir(folder)) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    oxmerge.save(one, folder, overwrite=True)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_inputs_are_not_replaced(tmp_path: Path) -> None:
    write_model(tmp_path / "a", random_arrays({"x": (4,)}, 0), "F32")
    (tmp_path / "r.yml").write_text(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    )
    file = tmp_path / "a" / "model.safetensors"
    (tmp_path / "link.safetensors").symlink_to(file)
    before = file.read_bytes()
    for tensors in (oxmerge.open(tmp_path / "a"), oxmerge.lazy(tmp_path / "r.yml")):
        for target in (file, tmp_path / "a", tmp_path / "link.safetensors"):
            with pytest.raises(oxmerge.OutputError, match="would replace"):
                oxmerge.save(tensors, target, overwrite=True)
        assert file.read_bytes() == before


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    class Failing(dict[str, Any]):
        looked_up = 0

        def __getitem__(self, name: str) -> Any:
            self.looked_up += 1
            if self.looked_up > 3:
                raise RuntimeError(name)
            return super().__getitem__(name)

    for target in (tmp_path / "m.safetensors", tmp_path / "out"):
        with pytest.raises(RuntimeError):
            oxmerge.save(Failing(x=np.ones(3), y=np.ones(3)), target)
        assert os.listdir(tmp_path) == []
    for target in (tmp_path / "m.safetensors", tmp_path / "out"):
        oxmerge.save({"x": np.ones(3)}, target)
        with pytest.raises(RuntimeError):
            oxmerge.save(Failing(x=np.zeros(3), y=np.zeros(3)), target, overwrite=True)
        assert oxmerge.open(target)["x"].tolist() == [1, 1, 1]
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "out"]
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_a_mapping_that_changes_is_noticed(tmp_path: Path) -> None:
    class Changing(dict[str, Any]):
        length = 2

        def __getitem__(self, name: str) -> Any:
            self.length += 1
            return np.zeros(self.length)

    with pytest.raises(oxmerge.OutputError, match="another array than the first time") as now:
        oxmerge.save(Changing(x=None), tmp_path / "m.safetensors")
    assert now.value.tensor == "x"
    assert os.listdir(tmp_path) == []


SLOW = """
import sys, numpy, oxmerge
class Slow(dict):
    count = 0
    def __getitem__(self, name):
        self.count += 1
        if self.count == 4:
            print("writing", flush=True)
            sys.stdin.read()
        return numpy.zeros(1000)
oxmerge.save(Slow(x=0, y=0), sys.argv[1])
"""


@pytest.mark.parametrize("target", ["m.safetensors", "out"])
def test_runs_at_once_and_dead_ones(tmp_path: Path, target: str) -> None:
    path = tmp_path / target
    command: list[Any] = [sys.executable, "-c", SLOW, path]
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **streams) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(oxmerge.OutputError, match="another run is writing"):
            oxmerge.save({"x": np.ones(2)}, path)
        other.kill()
    assert any("oxmerge-partial" in each.name for each in tmp_path.rglob("*"))
    oxmerge.save({"x": np.ones(2)}, path, overwrite=target == "out")
    assert oxmerge.open(path)["x"].tolist() == [1, 1]
    assert not any("oxmerge-partial" in each.name for each in tmp_path.rglob("*"))


@pytest.mark.parametrize("target", ["m.safetensors", "out"])
def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, target: str) -> None:
    huge = np.lib.stride_tricks.as_strided(np.zeros(1), (1 << 45,), (0,))

    class Header(dict[str, Any]):
        def dtype_of(self, name: str) -> str:
            return "F64"

        def shape_of(self, name: str) -> tuple[int, ...]:
            return huge.shape

    with pytest.raises(OSError, match="space") as now:
        oxmerge.save(Header(x=None), tmp_path / target)
    assert now.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    command: list[Any] = [sys.executable, "-c", SLOW, tmp_path / "m.safetensors"]
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **streams) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        other.send_signal(signal.SIGINT)
        other.wait(20)
    assert os.listdir(tmp_path) == []
