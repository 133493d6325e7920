"""Files of torch are models like any other: read where they lie, and nothing in them runs."""

from __future__ import annotations

import json
import os
import shlex
import struct
import subprocess
import sys
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oxmerge.cli import main
from oxmerge.errors import CheckpointError, OxmergeError, UnsupportedError
from safetensors.torch import load_file, save_file
from writers import write_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Tensors = dict[str, torch.Tensor]

#: A type of torch for each that can be merged or copied.
TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip
CONFIG = {"model_type": "test", "num_hidden_layers": 2, "tie_word_embeddings": True}


def read(path: Path) -> tuple[Tensors, list[str]]:
    """Return the tensors of a checkpoint and what is odd about it."""
    with oxmerge.open(path, framework="pt") as checkpoint:
        return dict(checkpoint), checkpoint.warnings


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether two models have the same tensors, to the bit."""

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))

    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_each_type(tmp_path: Path, protocol: int) -> None:
    tensors = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in TYPES}
    torch.save(tensors, tmp_path / "a.pt", pickle_protocol=protocol)
    found, warnings = read(tmp_path / "a.pt")
    assert equal(found, tensors)
    assert warnings == []
    arrays = oxmerge.open(tmp_path / "a.pt")
    assert [arrays[name].tolist() for name in tensors] == [t.tolist() for t in tensors.values()]


def test_views_of_one_storage(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "row": whole[2], "rows": whole[1:3], "element": whole[3, 5], "column": whole[1:2, 3:4],
        "whole": whole, "parameter": torch.nn.Parameter(whole), "empty": whole[:0],
        "empty, beyond": torch.empty(3, 0), "number": torch.tensor(7), "flat": whole.view(-1),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "a.bin")
    found, warnings = read(tmp_path / "a.bin")
    assert equal(found, tensors)
    assert warnings == []


def scattered(tensors: Tensors) -> Tensors:
    """Return equal tensors that lie otherwise: transposed, each second row, a column for all."""
    found = {}
    for at, (name, tensor) in enumerate(tensors.items()):
        if at % 3 == 0:
            found[name] = tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
        elif at % 3 == 1:
            found[name] = tensor.repeat_interleave(2, 0)[::2]
        else:
            found[name] = tensor[:1].expand(tensor.shape)
    return found


def test_views_are_merged_as_what_they_say(tmp_path: Path) -> None:
    """By any method, with any number of threads, from a saved plan; integers too."""
    torch.manual_seed(0)
    tensors = scattered({f"x{at}": torch.randn(300, 700).bfloat16() for at in range(4)})
    tensors["x4"] = torch.randn(50, 60, 70).bfloat16().permute(2, 0, 1)
    tensors["x5"] = torch.randn(300, 900, 2).bfloat16()[1:, 1::2].transpose(0, 2)
    tensors["steps"] = torch.arange(60).reshape(4, 15).T
    assert sum(not each.is_contiguous() for each in tensors.values()) == len(tensors)
    views, plain = tmp_path / "views", tmp_path / "plain"
    views.mkdir()
    plain.mkdir()
    torch.save(tensors, views / "pytorch_model.bin")
    whole = {name: each.contiguous() for name, each in tensors.items()}
    save_file(whole, plain / "model.safetensors")
    same = {"steps": whole["steps"]} | {f"x{at}": whole[f"x{at}"].float() for at in range(6)}
    each = {"weight": 1, "density": 0.5}
    recipe = write_recipe(
        tmp_path / "t.yml", "ties", [views], base=plain, each=each, dtype="float32"
    )
    for threads in (1, 5):
        oxmerge.merge(recipe, tmp_path / f"{threads}", threads=threads)
        assert equal(load_file(tmp_path / f"{threads}" / "model.safetensors"), same)
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [views])
    oxmerge.plan(recipe).save(tmp_path / "plan.json")
    oxmerge.merge(oxmerge.load_plan(tmp_path / "plan.json"), tmp_path / "copy")
    assert equal(load_file(tmp_path / "copy" / "model.safetensors"), whole)
    assert oxmerge.diff(views, plain).is_equal
    assert "adapter" not in str(oxmerge.plan(recipe).explain("x0"))


def model(seed: int) -> Tensors:
    """Return a small model with a head that is its embedding."""
    torch.manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(32, 8).bfloat16()}
    for layer in range(2):
        for part in range(60):  # more than a hundred in all: keys of two and three digits
            tensors[f"model.layers.{layer}.part{part}.weight"] = torch.randn(8, 8).bfloat16()
    tensors["model.steps"] = torch.arange(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


def save(folder: Path, tensors: Tensors, kind: str) -> Path:
    """Save a model in one of the ways in which models are saved, with what training leaves."""
    folder.mkdir()
    torch.save({"state": {0: {"step": torch.tensor(1)}}}, folder / "optimizer.pt")
    torch.save(torch.nn.Linear(1, 1), folder / "training_args.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if kind == "safetensors":
        plain = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        save_file(plain, folder / "model.safetensors", {"format": "pt"})
    elif kind == "one file":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "wrapped":
        torch.save({"epoch": 3, "state_dict": tensors}, folder / "last.ckpt")
    else:
        names = sorted(tensors, key=lambda name: "layers.1" in name)
        cut = len(names) - 60
        shards = {f"pytorch_model-0000{1 + at}-of-00002.bin": part
                  for at, part in enumerate((names[:cut], names[cut:]))}  # fmt: skip
        for file, part in shards.items():
            torch.save({name: tensors[name] for name in part}, folder / file)
        where = {name: file for file, part in shards.items() for name in part}
        index = {"metadata": {}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 0.5}},
    "slerp": {"shared": {"t": 0.3}},
    "ties": {"each": {"weight": 0.5, "density": 0.5}},
    "dare_ties": {"each": {"weight": 0.5, "density": 0.5}},
}


def merged(folder: Path, method: str, kinds: tuple[str, str, str]) -> Tensors:
    """Merge three models that were saved in these ways, by recipe, and return the output."""
    folder.mkdir()
    base, *others = (save(folder / f"{at}", model(at), kind) for at, kind in enumerate(kinds))
    others = others[:1] if method == "slerp" else others
    given = None if method == "linear" else base
    recipe = write_recipe(folder / "r.yml", method, others, base=given, **RECIPES[method])
    oxmerge.merge(recipe, folder / "out")
    return dict(load_file(folder / "out" / "model.safetensors"))


@pytest.mark.parametrize("method", RECIPES)
def test_a_merge_gives_what_it_gives_of_safetensors(tmp_path: Path, method: str) -> None:
    expected = merged(tmp_path / "s", method, ("safetensors", "safetensors", "safetensors"))
    assert "lm_head.weight" not in expected
    kinds = ("one file", "shards", "wrapped")
    assert equal(merged(tmp_path / "t", method, kinds), expected)
    assert equal(merged(tmp_path / "m", method, ("safetensors", *kinds[1:])), expected)


def test_an_adapter_of_torch_on_a_model_of_torch(tmp_path: Path) -> None:
    lead = "base_model.model.model.layers.0.part3"
    adapter = {f"{lead}.lora_A.weight": torch.randn(2, 8),
               f"{lead}.lora_B.weight": torch.randn(8, 2),
               "base_model.model.lm_head.lora_A.weight": torch.randn(2, 8),
               "base_model.model.lm_head.lora_B.weight": torch.randn(32, 2)}  # fmt: skip
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["part3", "lm_head"]}
    made = {}
    for kind in ("safetensors", "one file"):
        folder = save(tmp_path / kind, model(0), kind)
        on = tmp_path / f"on {kind}"
        on.mkdir()
        (on / "adapter_config.json").write_text(json.dumps(said))
        if kind == "safetensors":
            save_file(adapter, on / "adapter_model.safetensors")
        else:
            torch.save(adapter, on / "adapter_model.bin")
        oxmerge.merge(
            {"merge_method": "passthrough", "models": [{"model": f"{folder}+{on}"}]},
            tmp_path / f"{kind} out",
        )
        made[kind] = load_file(tmp_path / f"{kind} out" / "model.safetensors")
    assert "lm_head.weight" in made["safetensors"]
    assert equal(made["one file"], made["safetensors"])


def test_every_verb_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (save(tmp_path / name, model(at), "shards") for at, name in enumerate("ab"))
    recipe = write_recipe(tmp_path / "r.yml", "linear", [a, b / "pytorch_model.bin.index.json"],
                          each={"weight": 0.5})  # fmt: skip
    assert main(["inspect", str(a)]) == 0
    assert "122 tensors" in capsys.readouterr().out
    plan = oxmerge.plan(recipe)
    assert any("ties its head to the embedding" in note for note in plan.notes)
    plan.save(tmp_path / "plan.json")
    oxmerge.merge(oxmerge.load_plan(tmp_path / "plan.json"), tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert equal(made, dict(oxmerge.lazy(recipe, framework="pt").items()))
    told = tmp_path / "w{weight}"
    assert (
        main(["sweep", str(recipe), str(told), "--set", "models[0].parameters.weight=0.5,1"]) == 0
    )
    assert equal(load_file(tmp_path / "w0.5" / "model.safetensors"), made)


def test_safetensors_win(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model(0), "one file")
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    found, warnings = read(folder)
    assert equal(found, {"x": torch.ones(2)})
    assert warnings == []


def test_a_head_that_is_not_tied_stays(tmp_path: Path) -> None:
    """Nor does one that has bytes of its own, whatever the config says."""
    tensors = model(0)
    folder = save(tmp_path / "copied", {**tensors, "lm_head.weight": torch.ones(32, 8)}, "one file")
    untied = save(tmp_path / "untied", tensors, "one file")
    (untied / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": False}))
    for each in (folder, untied):
        recipe = write_recipe(tmp_path / "r.yml", "passthrough", [each])
        assert "lm_head.weight" in [tensor.name for tensor in oxmerge.plan(recipe).tensors]


WRAPPED: dict[str, tuple[Any, list[str]]] = {
    "model": ({"model": {"x": torch.ones(2)}, "optimizer": {"m": [torch.ones(1), 0.5]}},
              ["the model is what is under `model`; left out beside it: `optimizer`"]),
    "steps": ({"step": torch.tensor(7), "state_dict": {"x": torch.ones(2)}},
              ["the model is what is under `state_dict`; left out beside it: `step`"]),
    "module": ({"module": {"model_state_dict": {"x": torch.ones(2)}}}, []),
    "others": ({"x": torch.ones(2), "version": 3, "shape": torch.Size([2]), "long": 2**99},
               ["what is no tensor is left out: `version`, `shape`, `long`"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_what_training_scripts_save(tmp_path: Path, name: str) -> None:
    saved, expected = WRAPPED[name]
    torch.save(saved, tmp_path / "a.pth")
    found, warnings = read(tmp_path / "a.pth")
    assert equal(found, {"x": torch.ones(2)})
    assert warnings == [f"`a.pth`: {text}" for text in expected]


@pytest.mark.slow
def test_files_and_tensors_beyond_4_gib(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = {"large": torch.empty(5 << 30, dtype=torch.uint8), "behind": torch.empty(3)}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensors, tmp_path / "a.pt")  # the bytes are a hole, which takes no space
    with (tmp_path / "a.pt").open("r+b") as file, oxmerge.open(tmp_path / "a.pt") as checkpoint:
        place = next(t.start for t in checkpoint._checkpoint.tensors if t.name == "behind")
        file.seek(place)
        file.write(struct.pack("<3f", 1, 2, 3))
    with oxmerge.open(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.shape_of("large") == (5 << 30,)
        assert checkpoint["behind"].tolist() == [1, 2, 3]


# What is refused.


def _command(error: OxmergeError) -> str:
    """Return the command that an advice names, with the Python that runs this."""
    _, is_there, command = str(error.advice).partition("run: python ")
    assert is_there
    return f"{shlex.quote(sys.executable)} {command}"


def _rezip(path: Path, **kind: Any) -> None:
    """Write an archive anew, as other programs than torch do."""
    with zipfile.ZipFile(path) as old:
        entries = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w", **kind) as new:
        for name, data in entries:
            new.writestr(name, data)


def _compressed(path: Path, tensor: torch.Tensor) -> None:
    torch.save({"x": tensor}, path)
    _rezip(path, compression=zipfile.ZIP_DEFLATED)


def _old(path: Path, tensor: torch.Tensor) -> None:
    torch.save({"x": tensor}, path, _use_new_zipfile_serialization=False)


def _big_endian(path: Path, tensor: torch.Tensor) -> None:
    torch.save({"x": tensor}, path)
    data = path.read_bytes()
    assert data.count(b"little") == 1  # padded, so that the place of what follows stays
    with zipfile.ZipFile(path) as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            folder, _, entry = name.partition("/")
            swapped = tensor.numpy().byteswap().tobytes() if entry == "data/0" else content
            new.writestr(f"{folder}/{entry}", b"big" if entry == "byteorder" else swapped)


#: How a file is written that torch can read, and why it is not read as it is.
CONVERTED: dict[Callable[[Path, torch.Tensor], None], str] = {
    _compressed: "the entry `a/data.pkl` of the zip archive is compressed",
    _old: "the file is in the format of torch before 1.6",
    _big_endian: "the file was written on a big-endian machine",
}


@pytest.mark.slow
@pytest.mark.parametrize("write", CONVERTED, ids=lambda write: write.__name__)
def test_what_is_refused_is_converted_by_the_command_that_is_told(
    tmp_path: Path, write: Callable[[Path, torch.Tensor], None]
) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    tensor = torch.arange(6.0).reshape(2, 3)
    write(folder / "a.pt", tensor)
    with pytest.raises(UnsupportedError, match=CONVERTED[write]) as caught:
        oxmerge.open(folder / "a.pt")
    done = subprocess.run(
        _command(caught.value), shell=True, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert equal(read(folder / "a.safetensors")[0], {"x": tensor})


class Runs:
    """Something whose pickle calls a function with one argument."""

    def __init__(self, function: Callable[[str], object], argument: str) -> None:
        self.called = function, (argument,)

    def __reduce__(self) -> Any:
        """Return what a pickle calls."""
        return self.called


def _qint8() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


X = torch.ones(2)
#: What is saved, and how the message goes on.
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "runs a command": (lambda: {"x": X, "y": Runs(os.system, "touch ran")},
                       "the file asks for code that is not run: found `posix.system`"),
    "evaluates": (lambda: {"x": X, "y": Runs(eval, "open('ran', 'w')")},
                  "the file asks for code that is not run: found `__builtin__.eval`"),
    "imports": (lambda: {"x": X, "y": Runs(__import__, "antigravity")},
                "the file asks for code that is not run: found `__builtin__.__import__`"),
    "opens a file": (lambda: {"x": X, "y": Runs(open, "ran")},
                     "the file asks for code that is not run: found `io.open`"),
    "loads code": (lambda: {"x": X, "y": Runs(torch.load, "ran")},
                   "the file asks for code that is not run: found `torch.serialization.load`"),
    "a module": (lambda: torch.nn.Linear(2, 2),
                 "the file asks for code that is not run: found `torch.nn.modules.linear.Linear`"),
    "a set": (lambda: {"x": {1}},
              "the file asks for code that is not run: found `__builtin__.set`"),
    "quantised": (lambda: {"x": _qint8()}, "quantised tensors cannot be merged: found"),
    "sparse": (lambda: {"x": X.to_sparse()}, "sparse tensors cannot be merged: found"),
    "meta": (lambda: {"x": X.to("meta")}, "a tensor on the meta device has no numbers: found"),
    "fp8": (lambda: {"x": X.to(torch.float8_e4m3fn)}, r"tensor `x`: 8-bit float weights \(FP8\)"),
    "complex": (lambda: {"x": torch.complex(X, X)}, "tensor `x`: complex numbers cannot be merged"),
    "negated": (lambda: {"x": torch._neg_view(X)}, "tensor `x`: .* negated only when it is used"),
    "a tensor": (lambda: X, "the file holds no dictionary of tensors by name"),
    "a list": (lambda: [X], "the file holds no dictionary of tensors by name"),
    "nothing": (dict, "the file holds no dictionary of tensors by name"),
    "unknown dictionaries": (lambda: {"a": {"x": X}, "b": {"x": X}},
                             "by name: found the keys `a`, `b`"),
    "two models": (lambda: {"model": {"x": X}, "module": {"x": X}},
                   "it is not clear which dictionary .*: found `model` and `module`"),
    "numbers for names": (lambda: {0: X}, "a tensor of the file has a name that is no text"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make, told = REFUSED[name]
    torch.save(make(), "a.pt")
    with pytest.raises((UnsupportedError, CheckpointError), match=told) as caught:
        oxmerge.open("a.pt")
    assert caught.value.advice
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [tmp_path])
    with pytest.raises(oxmerge.PlanError) as planned:
        oxmerge.plan(recipe)
    assert [problem.message for problem in planned.value.problems] == [caught.value.message]
    assert sorted(os.listdir()) == ["a.pt", "r.yml"]  # nothing ran


def test_a_program_of_torch_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    with pytest.raises(UnsupportedError, match="the file is a program") as caught:
        oxmerge.open(tmp_path / "a.pt")
    assert "torch.jit.load" in str(caught.value.advice)


def archive(path: Path, pickled: bytes, **entries: bytes) -> Path:
    """Write an archive as torch does, with this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickled)
        for name, data in {"data/0": bytes(8), **entries}.items():
            file.writestr(f"a/{name}", data)
    return path


def text(value: str) -> bytes:
    """Return what puts a text on the stack."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """Return what puts a number on the stack."""
    data = (
        value.to_bytes(9, "little", signed=True)
        if abs(value) >= 1 << 63
        else struct.pack("<q", value)
    )
    return b"\x8a" + bytes([len(data)]) + data


def tensor(
    shape: tuple[int, ...] = (2,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
    count: int = 2,
    key: str = "0",
    storage: str = "torch\nFloatStorage",
) -> bytes:
    """Return what puts a tensor on the stack, by default of all of `data/0`."""
    place = b"(" + text("storage") + b"c" + storage.encode() + b"\n" + text(key) + text("cpu")
    sizes = b"".join(b"(" + b"".join(map(number, each)) + b"t" for each in (shape, strides))
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + number(count) + b"tQ"
            + number(offset) + sizes + b"\x89NtR")  # fmt: skip


def saved(value: bytes, name: str = "x") -> bytes:
    """Return a pickle of a dictionary with one value."""
    return b"\x80\x02}" + text(name) + value + b"s."


#: Pickles that no torch wrote, and what is said of them.
PICKLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the pickle ends inside an instruction"),
    "of protocol 0": (b"(dp0\nS'x'\nI1\ns.", "an instruction that no state dict needs: found `d`"),
    "a class of old": (b"\x80\x02(ios\nsystem\n.", "not run: found `os.system`"),
    "a name from the stack": (b"\x80\x04" + text("nt") + text("system") + b"\x93.",
                              "not run: found `nt.system`"),
    "an extension": (b"\x80\x02\x82\x01.", r"no state dict needs: found `\\x82`"),
    "a new object": (saved(b"ccollections\nOrderedDict\n)\x81"), r"needs: found `\\x81`"),
    "a call of a class": (saved(b"ctorch\nFloatStorage\n)R"), "calls a function in an unknown way"),
    "a call of nothing": (saved(b"N)R"), "the pickle calls what is no function"),
    "a state": (saved(tensor() + b"}b"), "sets the state of what is no dictionary"),
    "a storage from elsewhere": (saved(tensor(storage="os\nsystem")), "not run: found `os.system`"),
    "a storage that is none": (saved(b"K\x01Q"), "a storage that is described in an unknown way"),
    "a storage by a path": (saved(tensor(key="../../etc/passwd")),
                            "lacks an entry: expected `a/data/../../etc/passwd`"),
    "another size": (saved(tensor(count=3)), "another size than its entry: expected 8 bytes"),
    "a negative size": (saved(tensor(count=-2)), "another size than its entry"),
    "too large": (saved(tensor(shape=(3,))), "lies past the end of its storage"),
    "too far": (saved(tensor(offset=1)), "lies past the end of its storage"),
    "before": (saved(tensor(offset=-1)), "lies past the end of its storage"),
    "a negative shape": (saved(tensor(shape=(-1,))), "the tensor's shape is none"),
    "another number of strides": (saved(tensor(strides=())), "the tensor's shape is none"),
    "endless": (saved(tensor(shape=(2**62, 2**62), strides=(0, 0))), "size overflows"),
    "endlessly far": (saved(tensor(offset=2**62)), "lies past the end of its storage"),
    "many dimensions": (saved(tensor((1,) * 65, (1,) * 65)), "the tensor's shape is none"),
    "a long number for a shape": (saved(tensor(shape=(2**64,))), "the tensor's shape is none"),
    "a huge long": (saved(b"\x8b\xff\xff\xff\x7f"), r"needs: found `\\x8b`"),
    "a huge text": (saved(b"X\xff\xff\xff\xff"), "the pickle ends inside an instruction"),
    "a huger text": (b"\x80\x04\x8d" + b"\xff" * 8, "the pickle ends inside an instruction"),
    "a memo out of order": (b"\x80\x02}r\xff\xff\xff\xff.", "numbers its values out of order"),
    "a memo of nothing": (b"\x80\x02h\x00.", "comes back to a value that is not there"),
    "an empty stack": (b"\x80\x02.", "takes a value that is not there"),
    "below a mark": (b"\x80\x02}(" + text("x") + b"s.", "puts keys into what is no dictionary"),
    "half a pair": (b"\x80\x02}(" + text("x") + b"u.", "a key without a value"),
    "a newer version": (b"\x80\x06}.", "unknown version: expected at most 5, found 6"),
    "a name twice": (b"\x80\x02}(" + 2 * (text("x") + tensor()) + b"u.",
                     "the file has two tensors of this name"),
    "of text that is none": (b"\x80\x02}X\x01\0\0\0\xff" + tensor() + b"s.",
                             "a tensor of the file has a name that is no text"),
    "many marks": (b"\x80\x02" + b"(" * (2 << 20), "too many values that wait"),
    "many values": (b"\x80\x02" + b"N" * (2 << 20), "too many values that wait"),
    "many lists": (b"\x80\x02" + b"](" * (2 << 20) + b".", "too many values that wait"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_lies(tmp_path: Path, name: str) -> None:
    pickled, told = PICKLES[name]
    with pytest.raises((UnsupportedError, CheckpointError), match=told) as caught:
        oxmerge.open(archive(tmp_path / "a.pt", pickled))
    assert len(str(caught.value)) < 1500


def test_dictionaries_in_dictionaries(tmp_path: Path) -> None:
    """Levels of which each holds the one below nine times cost no more than their text."""
    levels = b"}q\x00" + b"".join(
        b"}q" + bytes([at]) + b"(" + 9 * (text("x") + b"h" + bytes([at - 1])) + b"u"
        for at in range(1, 200)
    )
    pickled = b"\x80\x02}" + text("levels") + b"(" + levels + b"ts" + text("x") + tensor() + b"s."
    found, odd = read(archive(tmp_path / "a.pt", pickled))
    assert equal(found, {"x": torch.zeros(2)})
    assert odd == ["`a.pt`: what is no tensor is left out: `levels`"]
    itself = b"\x80\x02}q\x00" + text("model") + b"h\x00s."
    with pytest.raises(UnsupportedError, match="no dictionary of tensors"):
        oxmerge.open(archive(tmp_path / "b.pt", itself))


@pytest.mark.slow
def test_a_pickle_costs_no_more_than_its_size(tmp_path: Path) -> None:
    """Millions of values are refused before they take gigabytes, and before long."""
    for at, (filler, told) in enumerate([
        (b"]}a" * (8 << 20), "too many values"),  # a list of empty dictionaries
        (b")\x85\x85\x85\x85\x85" * (4 << 20), "too many values"),  # tuples of tuples
        (b"K\x01" * (12 << 20), "too many values that wait"),
    ]):  # fmt: skip
        path = archive(tmp_path / f"{at}.pt", b"\x80\x02]" + filler + b".")
        done = subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True,
                              timeout=600, check=True)  # fmt: skip
        error, megabytes = done.stdout.split("|")
        assert told in error
        assert int(megabytes) < 500


OPEN = """
import sys, oxmerge
try:
    oxmerge.open(sys.argv[1])
except oxmerge.OxmergeError as error:
    print(error, end="|")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) >> 10)
"""


# Archives that lie.


def _central(data: bytearray, name: bytes) -> int:
    """Return where the directory's entry of that name begins."""
    return data.rindex(name) - 46


def _put(data: bytearray, at: int, kind: str, *numbers: int) -> None:
    struct.pack_into(f"<{kind}", data, at, *numbers)


def _end(data: bytearray) -> int:
    return data.rindex(b"PK\x05\x06")


def _twice(data: bytearray) -> None:
    data[_central(data, b"a/data/1") + 46 + 7] = ord("0")


def _past_the_end(data: bytearray) -> None:
    _put(data, _central(data, b"a/data/0") + 42, "I", len(data) - 4)


def _of_another(data: bytearray) -> None:
    _put(data, _central(data, b"a/data/0") + 42, "I", 0)


def _longer(data: bytearray) -> None:
    _put(data, _central(data, b"a/data/0") + 20, "II", 1 << 20, 1 << 20)


def _two_sizes(data: bytearray) -> None:
    _put(data, _central(data, b"a/data/0") + 20, "I", 4)


def _encrypted(data: bytearray) -> None:
    _put(data, _central(data, b"a/data/0") + 8, "H", 1)


def _no_zip64(data: bytearray) -> None:
    _put(data, _central(data, b"a/data/0") + 42, "I", 0xFFFFFFFF)


def _directory_beyond(data: bytearray) -> None:
    _put(data, _end(data) + 16, "I", len(data))


def _more_entries(data: bytearray) -> None:
    _put(data, _end(data) + 8, "HH", 9, 9)


def _cut_entry(data: bytearray) -> None:
    _put(data, _central(data, b"a/data/1") + 28, "H", 999)


def _many_disks(data: bytearray) -> None:
    _put(data, _end(data) + 4, "H", 1)


def _far_zip64(data: bytearray) -> None:
    at = _end(data)
    data[at:at] = struct.pack("<4sIQI", b"PK\x06\x07", 0, 2**64 - 8, 1)


def _no_zip64_there(data: bytearray) -> None:
    at = _end(data)
    data[at:at] = struct.pack("<4sIQI", b"PK\x06\x07", 0, 0, 1)


def _truncated(data: bytearray) -> None:
    del data[len(data) // 2 :]


def _longer_comment(data: bytearray) -> None:
    _put(data, _end(data) + 20, "H", 4)


#: What is changed in an archive, and what is said of it.
ARCHIVES: dict[Callable[[bytearray], None], str] = {
    _twice: "two entries of one name: found `a/data/0`",
    _past_the_end: "the entry `a/data/0` lies past the entries",
    _of_another: "the entry `a/data/0` of the zip archive has another header",
    _longer: "the entry `a/data/0` lies past the entries",
    _two_sizes: "the entry `a/data/0` of the zip archive has two sizes: expected 8, found 4",
    _encrypted: "the entry `a/data/0` of the zip archive is encrypted",
    _no_zip64: "the zip archive's directory is damaged",
    _directory_beyond: "the zip archive's directory does not lie before its end",
    _more_entries: "not as many entries as it says: expected 9, found 3",
    _cut_entry: "the zip archive's directory is damaged",
    _many_disks: "the zip archive is a part of several",
    _far_zip64: "the zip archive's end lies past the end of the file",
    _no_zip64_there: "the zip archive's zip64 end is damaged",
    _truncated: "the zip archive has no directory at its end",
    _longer_comment: "the zip archive has no directory at its end",
}


@pytest.mark.parametrize("change", ARCHIVES, ids=lambda change: change.__name__)
def test_an_archive_that_lies(tmp_path: Path, change: Callable[[bytearray], None]) -> None:
    path = archive(tmp_path / "a.pt", saved(tensor()), **{"data/1": bytes(8)})
    assert list(read(path)[0]) == ["x"]
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    with pytest.raises((UnsupportedError, CheckpointError), match=ARCHIVES[change]) as caught:
        oxmerge.open(path)
    assert caught.value.advice


def test_archives_that_are_no_model(tmp_path: Path) -> None:
    for at, names in enumerate([[], ["a/data/0"], ["a/data.pkl", "b/data.pkl"], ["a/b/data.pkl"]]):
        with zipfile.ZipFile(tmp_path / f"{at}.bin", "w") as file:
            for name in ["x", *names]:
                file.writestr(name, b"")
        with pytest.raises(CheckpointError, match="the zip archive is no file of torch"):
            oxmerge.open(tmp_path / f"{at}.bin")


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """Return some view of a storage that others have too."""
    view = BASE.to(draw(st.sampled_from(TYPES[:6])))
    for _ in range(draw(st.integers(0, 4))):
        axis = draw(st.integers(0, view.ndim - 1)) if view.ndim else 0
        kinds = ["slice", "select", "transpose", "expand"] if view.ndim else ["expand"]
        match draw(st.sampled_from(kinds)):
            case "slice":
                start, stop = sorted(draw(st.tuples(st.integers(0, 4), st.integers(0, 4))))
                view = view[(slice(None),) * axis + (slice(start, stop, draw(st.integers(1, 2))),)]
            case "select" if view.shape[axis]:
                view = view.select(axis, draw(st.integers(0, view.shape[axis] - 1)))
            case "transpose":
                view = view.transpose(axis, draw(st.integers(0, view.ndim - 1)))
            case "expand":
                view = view.expand(draw(st.integers(0, 2)), *view.shape)
    return view


BASE = torch.arange(60.0).reshape(3, 4, 5)


@given(st.lists(views(), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_views_are_what_torch_says(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[torch.Tensor]
) -> None:
    path = tmp_path_factory.mktemp("views") / "a.pt"
    tensors = {f"x{at}": view for at, view in enumerate(drawn)}
    torch.save(tensors, path)
    assert equal(read(path)[0], torch.load(path))
