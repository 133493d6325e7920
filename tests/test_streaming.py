"""Models in stores and on web servers, and weights that are not kept: real servers, on loopback.

The bytes of a merge are those of the local one, whatever the server does on the way; or the error
says what it did, and nothing is left.
"""

from __future__ import annotations

import functools
import json
import os
import pty
import random
import shutil
import signal
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
import s3_server
from hub_server import faulty
from oxmerge import CheckpointError, InputChangedError, PlanError, RemoteError, _core
from oxmerge.cli import main
from oxmerge.demo_hub import Handler, HubServer, Model, serving
from oxmerge.models import hub, references, remote, stores, streaming
from oxmerge.output.resume import RESUME_NAME
from range_server import Fault, RangeServer, serve
from writers import Shapes, random_arrays, tuned, write_model, write_recipe, write_sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oxmerge.merging import Snapshot

KIB = 1 << 10
LAYERS = 12
SHAPES: Shapes = {
    "model.embed_tokens.weight": (640, 256),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(LAYERS)
        for name, shape in {"mlp.up_proj": (512, 256), "input_layernorm": (256,)}.items()
    },
    "model.norm.weight": (256,),
    "lm_head.weight": (640, 256),
}
#: Less than half of a model, and more than the largest tensor of two.
SPOOL = 1536 * KIB
#: As much as both models, and what is fetched at a time then.
PLENTY, EXTENT = 8 << 20, 128 * KIB
CONFIG = {"model_type": "llama", "num_hidden_layers": LAYERS, "vocab_size": 640}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 0.5}},
    "ties": {"base": True, "each": {"weight": 1, "density": 0.5}},
    "metagpt": {"base": True},  # which looks at the whole model first
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a fine-tune of it, whose tensors lie in another order."""
    folder = tmp_path_factory.mktemp("models")
    base = random_arrays(SHAPES, 0)
    write_model(folder / "base", base, "BF16", CONFIG)
    write_model(folder / "tuned", dict(sorted(tuned(base, 1).items())), "BF16", CONFIG)
    (folder / "base" / "LICENSE").write_text("free")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and servers that are not asked for long."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(stores, "_LONGEST", 1)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.001)
    stores._open.cache_clear()
    return folder


def recipe(path: Path, root: Path | str, method: str = "linear") -> Path:
    """Write a recipe of both models, which lie below `root`."""
    options = dict(METHODS[method])
    each, base = options.get("each"), f"{root}/base" if options.get("base") else None
    listed = [f"{root}/tuned"] if base else [f"{root}/base", f"{root}/tuned"]
    return write_recipe(path / f"{method}.yml", method, listed, base=base, each=each)


def weights(folder: Path) -> dict[str, bytes]:
    """Return the files that do not say where the inputs were."""
    told = ("README.md", "oxmerge_recipe.yml", "oxmerge_report.json", "oxmerge.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in told}


@pytest.fixture(scope="session")
def expected(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What merging the models by their paths gives, by method."""
    folder = tmp_path_factory.mktemp("expected")
    for method in METHODS:
        oxmerge.merge(recipe(folder, models, method), folder / method)
    return {method: weights(folder / method) for method in METHODS}


@pytest.mark.parametrize("method", ["ties", "metagpt"])
def test_a_streamed_merge_is_verified(models: Path, tmp_path: Path, method: str) -> None:
    """Computed again from what the server has, by a spool; and found out when it has changed."""
    with serve(models) as server:
        oxmerge.merge(recipe(tmp_path, server.address, method), tmp_path / "out")
        for options in ([], ["--recompute"], ["--recompute", "--sample", "1%"]):
            assert main(["verify", "-q", str(tmp_path / "out"), *options]) == 0
        path = tmp_path / "out" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        (deviation,) = oxmerge.verify(tmp_path / "out", recompute=True).deviations
        assert deviation.elements == 1


# What a merge of models elsewhere is.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spool", [SPOOL, "20GB"])
def test_bytes_are_those_of_a_local_merge(
    models: Path, expected: dict[str, Any], tmp_path: Path, method: str, spool: int | str
) -> None:
    with serve(models) as server:
        plan = oxmerge.plan(recipe(tmp_path, server.address, method), spool=spool)
        planned = server.bytes_sent()
        assert planned <= 2 * (128 << 10)  # the headers
        report = oxmerge.merge(plan, tmp_path / "out", spool=spool, threads=3)
        fetched = server.bytes_sent() - planned
    assert weights(tmp_path / "out") == expected[method]
    assert report.predicted_memory <= report.memory
    told = plan.with_options({"spool": spool}).as_dict()
    once = plan.bytes_read  # as each method reads all of its inputs
    if spool == "20GB":
        assert fetched == told["bytes_to_fetch"] == once
    else:  # extents that tensors share which are merged far from each other come twice
        often = 2 if method == "metagpt" else 1
        assert once <= fetched <= told["bytes_to_fetch"] <= 1.05 * often * once
    assert told["spool"] <= SPOOL or spool == "20GB"
    assert told["disk"] == plan.disk  # the output alone, which the summary adds the spool to
    assert "spool" in str(plan)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_adapter_in_a_store_on_a_model_of_torch(models: Path, tmp_path: Path, kind: str) -> None:
    """The model is streamed, the adapter fetched whole, and kept for the next merge."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
    with oxmerge.open(models / "base", framework="pt") as base:
        torch.save(dict(base), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    factors = {
        f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{name}.weight": torch.randn(shape)
        for layer in range(LAYERS)
        for name, shape in {"A": (2, 256), "B": (512, 2)}.items()
    }
    if kind == "bin":
        torch.save(factors, tmp_path / "adapter" / "adapter_model.bin")
    else:
        oxmerge.save(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    oxmerge.fuse(tmp_path / "model", tmp_path / "local", [tmp_path / "adapter"])
    fetched = []
    with serve(tmp_path) as server:
        for out in ("out", "again"):
            before = server.bytes_sent(f"adapter_model.{kind}")
            references._starts.cache_clear()
            adapter = f"{server.address}/adapter"
            oxmerge.fuse(f"{server.address}/model", tmp_path / out, [adapter])
            fetched.append(server.bytes_sent(f"adapter_model.{kind}") - before)
            assert weights(tmp_path / out) == weights(tmp_path / "local")
    size = (tmp_path / "adapter" / f"adapter_model.{kind}").stat().st_size
    assert fetched[0] - fetched[1] == size  # of the second time only the header is


def test_an_archive_that_torch_did_not_write_is_read_where_its_bytes_lie(tmp_path: Path) -> None:
    """Its headers are as long as their fields, so the place that torch would take is another."""
    torch = pytest.importorskip("torch")
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "pytorch_model.bin"
    torch.save({f"x{at}": torch.arange(at + 90.0) for at in range(3)}, tmp_path / "written.pt")
    with zipfile.ZipFile(tmp_path / "written.pt") as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            # So long a field that the bytes begin 16 after a multiple of 64.
            head = new.fp.tell() + 30 + len(entry.filename)  # type: ignore[union-attr]
            room = 20 + (16 - head - 20) % 64 - 4
            copy = zipfile.ZipInfo(entry.filename)
            copy.extra = struct.pack("<HH", 0xCAFE, room) + bytes(room)
            new.writestr(copy, old.read(entry))
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    with serve(tmp_path) as server, oxmerge.open(f"{server.address}/model") as model:
        for at in range(3):
            assert np.array_equal(model[f"x{at}"], np.arange(at + 90.0, dtype=np.float32))


def test_a_tied_head_is_fetched_once(models: Path, tmp_path: Path) -> None:
    tied = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    for name, seed in (("base", 3), ("tuned", 4)):
        config = {**CONFIG, "tie_word_embeddings": True}
        write_model(tmp_path / name, random_arrays(tied, seed), "BF16", config)
    oxmerge.merge(recipe(tmp_path, tmp_path), tmp_path / "local")
    with serve(tmp_path) as server:
        plan = oxmerge.plan(recipe(tmp_path, server.address))
        before = server.bytes_sent()
        oxmerge.merge(plan, tmp_path / "out", spool=SPOOL)
        assert server.bytes_sent() - before == plan.bytes_read
    assert weights(tmp_path / "out") == weights(tmp_path / "local")


def test_a_model_of_which_nothing_counts_is_not_fetched(models: Path, tmp_path: Path) -> None:
    with serve(models) as server:
        text = f"""
            merge_method: linear
            models:
            - {{model: {server.address}/base, parameters: {{weight: 1}}}}
            - {{model: {server.address}/tuned, parameters: {{weight: 0}}}}
            parameters: {{normalize: false}}
        """
        oxmerge.merge(text, tmp_path / "out", spool=SPOOL)
        asked = [span for _, path, span in server.asked if path == "/tuned/model.safetensors"]
    assert len([span for span in asked if span is not None]) == 1  # its header


@pytest.mark.parametrize("device", ["cpu", "torch"])
def test_a_sweep_fetches_once_for_all(
    models: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"models[tuned].parameters.weight": "0.2,0.9"}
    oxmerge.sweep(recipe(tmp_path, models), tmp_path / "local{n}", axes)
    with serve(models) as server:
        path = recipe(tmp_path, server.address)
        reports = oxmerge.sweep(path, tmp_path / "out{n}", axes, spool=SPOOL, device=device)
        headers = sum(span == (0, 128 << 10) for _, _, span in server.asked)
        fetched = server.bytes_sent() - headers * (128 << 10)
        assert fetched <= 1.05 * reports[0].input_bytes
    for n in range(2):
        assert weights(tmp_path / f"out{n}") == weights(tmp_path / f"local{n}")


def test_a_saved_plan_is_run_later(models: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    with serve(models) as server:
        oxmerge.plan(recipe(tmp_path, server.address)).save(tmp_path / "plan.json")
        oxmerge.merge(tmp_path / "plan.json", tmp_path / "out", spool=SPOOL)
        assert weights(tmp_path / "out") == expected["linear"]
        assert (tmp_path / "out" / "LICENSE").read_text() == "free"
        (models / "tuned" / "model.safetensors").touch()  # which gives it another ETag
        with pytest.raises(InputChangedError, match="changed after it was first read") as caught:
            oxmerge.merge(tmp_path / "plan.json", tmp_path / "late", spool=SPOOL)
    assert str(caught.value.file) == f"{server.address}/tuned/model.safetensors"
    assert not (tmp_path / "late").exists()


def test_arrays_are_fetched_when_they_are_touched(models: Path, tmp_path: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    size = 2 * 512 * 256
    with serve(models) as server:
        with oxmerge.open(f"{server.address}/base") as away, oxmerge.open(models / "base") as here:
            before = server.bytes_sent()
            array = away[name]
            assert server.bytes_sent() - before == size
            assert np.array_equal(array.view(np.uint16), here[name].view(np.uint16))
            assert not array.flags.writeable
        with oxmerge.open(f"{server.address}/base/model.safetensors", framework="pt") as away:
            assert away[name].shape == (512, 256)
        with pytest.raises(ValueError, match="is closed"):
            away[name]
        lazy = oxmerge.lazy(recipe(tmp_path, server.address, "ties"))
        before = server.bytes_sent()
        array = lazy[name]
        assert server.bytes_sent() - before == 2 * size
        local = oxmerge.lazy(recipe(tmp_path, models, "ties"))
        assert np.array_equal(array.view(np.uint16), local[name].view(np.uint16))


def test_the_command_shows_the_networks_rate(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Snapshot] = []
    with serve(models, lambda *_: time.sleep(0.02)) as server:
        path = recipe(tmp_path, server.address)
        oxmerge.merge(path, tmp_path / "out", spool=SPOOL, progress=seen.append)
        assert main(["inspect", f"{server.address}/base", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["files"]
        assert main(["plan", str(path), "--spool", "100kB"]) == 1
    assert "--spool" in capsys.readouterr().err
    from oxmerge.cli.progress import progress_line

    assert seen[-1].bytes_fetched > 0
    assert "  network 0.00 GB/s" in progress_line(seen[-1], 100.0)


def test_what_is_too_small_is_refused_with_what_would_do(models: Path, tmp_path: Path) -> None:
    with serve(models) as server:
        path = recipe(tmp_path, server.address)
        with pytest.raises(PlanError, match="the spool is too small") as caught:
            oxmerge.merge(path, tmp_path / "out", spool=300_000)
        assert not (tmp_path / "out").exists()
        enough = str(caught.value.expected).removeprefix("at least ").replace(" ", "")
        assert f"--spool {enough}" in str(caught.value.advice)
        oxmerge.merge(path, tmp_path / "out", spool=enough)
    with pytest.raises(ValueError, match="more than nothing"):
        oxmerge.merge(path, tmp_path / "other", spool=0)


def test_an_output_of_streamed_models_is_computed_again(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["verify", str(output), "--recompute", "--memory", "4GiB"]
    with serve(models) as server:
        oxmerge.merge(recipe(tmp_path, server.address, "metagpt"), output, spool=SPOOL)
        assert main(command) == 0
        assert main([*command, "--sample", "20%"]) == 0  # numbers over the model take all of it
        path = output / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert main(command) == 1
    assert "lm_head.weight" in capsys.readouterr().out


TOUCHES = """
import sys
import oxmerge
with oxmerge.open(sys.argv[1]) as checkpoint:
    assert checkpoint["lm_head.weight"].shape == (640, 256)
assert oxmerge.lazy(sys.argv[2])["lm_head.weight"].shape == (640, 256)
"""


@pytest.mark.parametrize("watched", [True, False])
def test_what_is_touched_shows_its_progress_to_who_watches(
    models: Path, tmp_path: Path, *, watched: bool
) -> None:
    reader, writer = pty.openpty() if watched else os.pipe()
    with serve(models, only_late) as server:
        arguments = [f"{server.address}/base", str(recipe(tmp_path, server.address))]
        command = [sys.executable, "-c", TOUCHES, *arguments]
        environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
        subprocess.run(command, stderr=writer, env=environment, check=True, timeout=600)
    os.close(writer)
    said = b""
    with suppress(OSError):  # a terminal that is closed
        while piece := os.read(reader, 1 << 16):
            said += piece
    os.close(reader)
    if watched:
        assert said.count(b"downloaded") >= 2
        assert b"odel.safetensors" in said  # of the file, whose name is shortened
    else:
        assert said == b""


def only_late(path: str, span: tuple[int, int] | None, _: int) -> None:
    """Let weights come late."""
    if path.endswith(".safetensors") and span is not None and span[0] > 0:
        time.sleep(0.4)


# Servers that fail.


def only_ranges(fault: str | int, share: float = 1.0) -> Fault:
    """Return what answers requests for weights so, but for headers: all, or a share of them."""
    generator = random.Random(0)

    def choose(path: str, span: tuple[int, int] | None, _: int) -> str | int | None:
        is_weights = path.endswith(".safetensors") and span is not None and span[0] > 0
        return fault if is_weights and generator.random() < share else None

    return choose


@pytest.mark.parametrize("fault", ["reset", "short", 429, 503, 500])
def test_what_passes_is_asked_for_again(
    models: Path, expected: dict[str, Any], tmp_path: Path, fault: str | int
) -> None:
    with serve(models, only_ranges(fault, 0.4)) as server:
        oxmerge.merge(recipe(tmp_path, server.address), tmp_path / "out", spool=SPOOL)
    assert weights(tmp_path / "out") == expected["linear"]


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("long", RemoteError, "more bytes came than were asked for"),
        ("other", InputChangedError, "another range than was asked for"),
        ("whole", RemoteError, "the whole file instead of a range"),
        ("changed", InputChangedError, "changed after it was first read"),
        (404, RemoteError, "status 404"),
        (403, RemoteError, "status 403"),
        (503, RemoteError, "status 503"),
        ("reset", RemoteError, "bytes read"),
    ],
)
def test_what_does_not_is_told_and_leaves_nothing(
    models: Path, tmp_path: Path, fault: str | int, kind: type[Exception], said: str
) -> None:
    with serve(models, only_ranges(fault)) as server, pytest.raises(kind) as caught:
        oxmerge.merge(recipe(tmp_path, server.address), tmp_path / "out", spool=SPOOL)
    assert said in str(caught.value)
    assert server.address in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_server_that_asks_for_a_day_is_told_at_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = time.sleep

    def awake(seconds: float) -> None:
        assert seconds < 60
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", awake)
    with serve(models, only_ranges(429)) as server:
        server.retry_after = "86400"
        path = recipe(tmp_path, server.address)
        with pytest.raises(RemoteError, match="status 429"):
            oxmerge.merge(path, tmp_path / "out", spool=SPOOL)


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "7", "RateLimit": '"api";r=0;t=55'}, 7),
        (429, {"RateLimit": '"api"; r=0; t=55'}, 55),
        (503, {"RateLimit": '"api";r=400;t=55'}, None),
        (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        (429, {"Retry-After": "12345678"}, None),
    ],
)
def test_how_long_a_server_asks_to_wait(
    status: int, headers: dict[str, str], seconds: float | None
) -> None:
    assert remote._of_status(status, None, headers).after == seconds


class Silent:
    """A file of a server that answers when it is let."""

    label, size, etag, sha256 = "model.safetensors", 100, "", None

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.answers = threading.Event()

    def read(self, start: int, stop: int) -> bytes:
        return b"".join(self.pieces(start, stop))

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        self.begun.append(start)
        self.answers.wait(1)
        yield bytes(stop - start)


def test_ctrl_c_waits_for_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        assert not file.answers.is_set()
        raise KeyboardInterrupt

    file = Silent()
    monkeypatch.setattr(streaming, "_AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        streaming.read_whole(file, 0, file.size, interrupt)
    file.answers.set()
    for thread in threading.enumerate():
        if thread.name == "oxmerge-ask":
            thread.join()
    assert 0 < len(file.begun) <= streaming.CONNECTIONS


class Archive:
    """A file of torch as far as its first bytes tell."""

    label, size, etag, sha256 = "pytorch_model.bin", 10_000, "", None

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> bytes:
        self.asked.append((start, stop))
        return b"PK\x03\x04".ljust(stop - start)

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        yield self.read(start, stop)


def test_headers_of_all_files_of_torch_have_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_FIRST", 16)
    monkeypatch.setattr(references, "_MOST_HEADERS", 1000)
    one, other, starts = Archive(), Archive(), references._Starts()
    (_, rest), (_, another) = starts(one), starts(other)
    assert rest is not None
    assert another is not None
    for _ in range(3):  # who opens the model again
        assert len(rest(100, 700)) == 600
    assert one.asked.count((100, 700)) == 1
    with pytest.raises(CheckpointError, match="larger than any model's"):
        another(100, 700)
    assert (100, 700) not in other.asked


def test_a_file_that_did_not_come_whole_is_fetched_again(models: Path, cache: Path) -> None:
    """A power cut may leave it so under its name."""
    with serve(models) as server:
        for _ in range(2):
            with oxmerge.open(f"{server.address}/base"):
                pass
            config = next(cache.rglob("config.json"))
            assert config.read_bytes() == (models / "base" / "config.json").read_bytes()
            config.write_bytes(b"")


def test_references_that_lead_nowhere_are_problems_of_the_report(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(models) as server:
        base = server.address
        text = f"merge_method: linear\nmodels:\n- model: {base}/none\n- model: {base}/base?a=b"
        with pytest.raises(PlanError) as caught:
            oxmerge.plan(text)
        codes = [problem.code for problem in caught.value.problems]
        assert codes.count("unreachable-model") == 2
        assert "there is no model" in str(caught.value)
        assert "with a query" in str(caught.value)
        for address, library in (
            ("s3://bucket/base", "obstore"), (f"{base}/base", "urllib3"),
        ):  # fmt: skip
            with monkeypatch.context() as patch:
                for name in {library, *(n for n in sys.modules if n.startswith(f"{library}."))}:
                    patch.setitem(sys.modules, name, None)  # so that it cannot be imported
                with pytest.raises(RemoteError, match=f"pip install {library}"):
                    oxmerge.open(address)
    with pytest.raises(RemoteError, match="cannot be read"):
        oxmerge.open("http://127.0.0.1:9/model")


@pytest.mark.parametrize(
    "address", ["http://", "https://[::1/a", "http://a:99999/b", "http://a:b/c", "s3://", "gs:///b"]
)
def test_what_is_no_address_is_told_at_once(address: str) -> None:
    with pytest.raises(RemoteError, match="none that a server or a store can have") as caught:
        oxmerge.open(address)
    assert caught.value.advice


def test_a_server_may_refuse_what_is_not_there(
    models: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """As S3 does for those who may read, and not list."""
    with serve(models) as server:
        server.absent = 403
        oxmerge.merge(recipe(tmp_path, server.address), tmp_path / "out", spool=SPOOL)
        with pytest.raises(RemoteError) as caught:
            oxmerge.open(f"{server.address}/none")
    assert weights(tmp_path / "out") == expected["linear"]
    assert "not there, or may not be read" in str(caught.value)
    assert f"{server.address}/none/model.safetensors" in str(caught.value)
    assert "status 403" in str(caught.value)


def test_a_secure_server_has_to_be_who_it_says(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("to make a certificate needs `openssl`")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt"]
    made += ["ec_paramgen_curve:prime256v1", "-subj", "/CN=test", "-addext"]
    made += ["subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serve(models) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        address = server.address.replace("http:", "https:")
        with pytest.raises(RemoteError, match="certificate verify failed") as caught:
            oxmerge.open(f"{address}/base")
        assert "SSL_CERT_FILE" in str(caught.value)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with oxmerge.open(f"{address}/base") as away, oxmerge.open(models / "base") as here:
            name = "lm_head.weight"
            assert np.array_equal(away[name].view(np.uint16), here[name].view(np.uint16))


def test_a_proxy_of_the_environment_is_used(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(models) as server:
        monkeypatch.setenv("http_proxy", server.address.replace("//", "//me:secret@"))
        monkeypatch.setenv("no_proxy", "localhost")
        with oxmerge.open("http://models.invalid/base") as away:
            assert away["lm_head.weight"].shape == (640, 256)
        monkeypatch.setenv("no_proxy", "models.invalid")
        monkeypatch.setattr(remote, "_QUESTIONS", 1)
        with pytest.raises(RemoteError, match="the server cannot be read"):
            oxmerge.open("http://models.invalid/base")


def test_names_that_lead_out_of_the_folder_are_passed_over(models: Path, tmp_path: Path) -> None:
    for name in ("../evil", "/etc/passwd", "a/../../b", "a//b", "a\\b", "a\0b", ""):
        assert not stores._is_within(name)
    index = {"weight_map": {"x": "../../base/model.safetensors"}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with serve(tmp_path) as server, pytest.raises(RemoteError, match="there is no model"):
        oxmerge.open(f"{server.address}/model")
    assert all("evil" not in path and ".." not in path for _, path, _ in server.asked)


# Ends of a run.


def run(path: Path, out: Path) -> subprocess.Popen[bytes]:
    arguments = ("merge", path, out, "--spool", SPOOL)
    command = [sys.executable, "-m", "oxmerge", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def until_asked(server: RangeServer) -> None:
    """Wait until weights are asked for."""
    deadline = time.monotonic() + 600
    while not any(span and span[0] for _, _, span in server.asked):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_while_it_waits_leaves_no_spool(
    models: Path, expected: dict[str, Any], tmp_path: Path, sent: signal.Signals
) -> None:
    stalls = True

    def stall(path: str, span: tuple[int, int] | None, _: int) -> None:
        while stalls and span is not None and span[0] > 0:
            time.sleep(0.05)

    with serve(models, stall) as server:
        path = recipe(tmp_path, server.address)
        with run(path, tmp_path / "out") as process:
            until_asked(server)
            process.send_signal(sent)
            process.communicate(timeout=600)
        expected_code = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[sent]
        assert process.returncode == expected_code
        left = list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
        assert not any("spool" in each.name for each in left)
        assert sent == signal.SIGKILL or not left
        stalls = False
        oxmerge.merge(path, tmp_path / "out", spool=SPOOL)
    assert weights(tmp_path / "out") == expected["linear"]


def test_what_is_finished_is_not_fetched_again(
    models: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "execute", functools.partial(_core.execute, journal_every=0.0))
    journal = tmp_path / "out" / RESUME_NAME
    finished: set[int] = set()

    def fail_half_way(path: str, span: tuple[int, int] | None, _: int) -> int | None:
        records = [line.partition(" ")[2] for line in journal.read_text().splitlines()[1:]]
        for record in map(json.loads, filter(None, records)):
            finished.update(at for at, *_ in record.get("tensors", ()))
        return 404 if len(finished) > len(SHAPES) / 2 else None

    def fault(path: str, span: tuple[int, int] | None, times: int) -> int | None:
        with suppress(FileNotFoundError, ValueError):  # or half of a record is there
            return fail_half_way(path, span, times)
        return None

    with serve(models, fault) as server:
        plan = oxmerge.plan(recipe(tmp_path, server.address))
        with pytest.raises(RemoteError, match="status 404"):
            oxmerge.merge(plan, tmp_path / "out", spool=SPOOL, threads=1)
        kept = journal.read_text()
        server.fault = lambda *_: None
        before = server.bytes_sent()
        # A spool that would hold everything, so that nothing waits for room.
        report = oxmerge.merge(plan, tmp_path / "out", spool=PLENTY)
        fetched = server.bytes_sent() - before
    assert weights(tmp_path / "out") == expected["linear"]
    done = {at for at in range(len(plan.tensors)) if f'[{at},"' in kept}
    assert any(f"finished {len(done)} of" in note for note in report.notes)
    assert len(done) > len(SHAPES) / 2
    left = {tensor.name for at, tensor in enumerate(plan.tensors) if at not in done}
    assert left
    # What is fetched belongs to a tensor that is left, but for the ends.
    extents = {
        (name, at)
        for name in ("base", "tuned")
        for start, stop in places(models / name / "model.safetensors", left)
        for at in range(start // EXTENT, (stop - 1) // EXTENT + 1)
    }
    assert report.bytes_read <= fetched <= len(extents) * EXTENT
    assert fetched < plan.bytes_read * 0.7


def places(path: Path, names: set[str]) -> list[tuple[int, int]]:
    """Return where some tensors begin and end in a file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    each = (header[name]["data_offsets"] for name in names)
    return [(8 + length + start, 8 + length + stop) for start, stop in each]


def test_what_a_callback_raises_ends_the_run(models: Path, tmp_path: Path) -> None:
    def stop(_: object) -> None:
        raise RuntimeError("enough")

    with serve(models, lambda *_: time.sleep(0.1)) as server:
        path = recipe(tmp_path, server.address)
        with pytest.raises(RuntimeError, match="enough"):
            oxmerge.merge(path, tmp_path / "out", spool=SPOOL, progress=stop)
    assert not (tmp_path / "out").exists()


# Stores.


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a real S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with the models, and the environment of its users."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with closing(urllib.request.urlopen(urllib.request.Request(f"{s3}/bucket", method="PUT"))):
        for path in filter(Path.is_file, models.rglob("*")):
            put(f"some models/{path.relative_to(models)}", path.read_bytes())
    return "s3://bucket/some models"


def put(path: str, content: bytes) -> None:
    import obstore

    obstore.put(stores._open("s3", "bucket"), path, content)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_from_s3(
    bucket: str, models: Path, expected: dict[str, Any], tmp_path: Path, cache: Path, method: str
) -> None:
    path = recipe(tmp_path, bucket, method)
    arguments = ["merge", path, tmp_path / "out", "--spool", SPOOL, "--quiet"]
    assert main(list(map(str, arguments))) == 0
    assert weights(tmp_path / "out") == expected[method]
    assert not list(cache.rglob("*.safetensors"))
    manifest = json.loads((tmp_path / "out" / "oxmerge.json").read_text())
    assert all(model["files"][0]["etag"] for model in manifest["inputs"])


def test_an_object_that_changes_is_refused(bucket: str, models: Path, tmp_path: Path) -> None:
    plan = oxmerge.plan(recipe(tmp_path, bucket))
    changed = bytearray((models / "tuned" / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    put("some models/tuned/model.safetensors", bytes(changed))
    with pytest.raises(InputChangedError, match=r"tuned/model\.safetensors"):
        oxmerge.merge(plan, tmp_path / "out", spool=SPOOL)
    assert not (tmp_path / "out").exists()


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    with pytest.raises(RemoteError, match=r"NoSuchBucket|404"):
        oxmerge.open("s3://nobody/model")
    with pytest.raises(RemoteError, match="there is no model"):
        oxmerge.open("s3://bucket/nothing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "127.0.0.1:9000"), ("AWS_ENDPOINT_URL", ""),
        ("AWS_ACCESS_KEY_ID", "key\n"), ("AWS_REGION", "us east"),
    ],
)  # fmt: skip
def test_an_environment_with_which_the_library_panics(
    bucket: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    stores._open.cache_clear()
    with pytest.raises(RemoteError, match=f"the environment's {name} cannot be used"):
        oxmerge.open("s3://bucket/base")


def test_keys_that_the_library_does_not_take(bucket: str, models: Path) -> None:
    """Of the others the usual ones are asked for by name."""
    from moto.s3.models import s3_backends

    assert bucket.startswith("s3://bucket/")
    put("odd/model.safetensors", (models / "base" / "model.safetensors").read_bytes())
    for key in ("odd//twice", "odd/../outside"):
        s3_backends["123456789012"]["aws"].put_object("bucket", key, b"x")
    with oxmerge.open("s3://bucket/odd") as checkpoint:
        assert len(checkpoint)


@pytest.mark.parametrize("name", ["base", "base/model.safetensors", "sharded"])
def test_a_store_that_refuses_to_list(
    bucket: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Files are asked for by the names that a model has, and by those of its index."""
    import obstore

    local = models / "base"
    if name == "sharded":
        local = tmp_path / "sharded"
        oxmerge.merge(write_recipe(tmp_path / "r.yml", "passthrough", [models / "base"]), local,
                      shard_size="100KB")  # fmt: skip
        assert (local / "model.safetensors.index.json").exists()
    with s3_server.serve(lists=False) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        stores._open.cache_clear()
        for path in filter(Path.is_file, local.iterdir()):
            put(f"models/{name.partition('/')[0]}/{path.name}", path.read_bytes())
        with pytest.raises(obstore.exceptions.GenericError, match="403 Forbidden"):
            list(obstore.list(stores._open("s3", "bucket"), "models"))
        with oxmerge.open(f"s3://bucket/models/{name}") as there, oxmerge.open(local) as here:
            assert set(there) == set(here)
            for tensor in here:
                assert there[tensor].tobytes() == here[tensor].tobytes()
        with pytest.raises(RemoteError, match="cannot be read") as caught:
            oxmerge.open("s3://bucket/nothing")
        assert "credentials" in str(caught.value.advice)
    stores._open.cache_clear()


@pytest.mark.slow
def test_a_model_of_many_files(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as an output may have; a store lists a thousand at a time."""
    from moto.s3.models import s3_backends

    backend = s3_backends["123456789012"]["aws"]
    for number in range(10_001):
        backend.put_object("bucket", f"many/model-{number:05}-of-10001.safetensors", b"x")
    assert len(stores.find_model("s3://bucket/many").files) == 10_001
    monkeypatch.setitem(stores.listed.__kwdefaults__, "most", 10_000)  # type: ignore[arg-type]
    with pytest.raises(RemoteError, match="too many files for a model"):
        stores.find_model("s3://bucket/many")


def test_what_is_kept_of_a_store_is_flushed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it has its name, by which later runs take it as whole: a power cut may come."""
    flushed: list[int] = []
    sync, replace = os.fsync, os.replace

    def note_flush(descriptor: int) -> None:
        sync(descriptor)
        flushed.append(os.fstat(descriptor).st_ino)

    def check(source: str, target: str) -> None:
        assert os.stat(source).st_ino in flushed
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "replace", check)
    files = stores.find_model(f"{bucket}/base").files
    stores.fetch_small(str(tmp_path / "kept"), {"config.json": files["config.json"]})
    assert (tmp_path / "kept" / "config.json").stat().st_ino in flushed


# The Hub.


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of someone who may ask the Hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "_listed", {})
    references._starts.cache_clear()
    return tmp_path / "hf"


def on_hub(models: Path) -> HubServer:
    return HubServer(
        {f"org/{name}": Model.of_folder(str(models / name)) for name in ("base", "tuned")}
    )


def test_weights_of_the_hub_are_not_kept(
    models: Path, expected: dict[str, Any], tmp_path: Path, home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with serving(on_hub(models)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        path = recipe(tmp_path, "org")
        oxmerge.merge(path, tmp_path / "out", stream=True, spool=SPOOL)
    assert weights(tmp_path / "out") == expected["linear"]
    assert not list(home.rglob("*.safetensors"))


def test_other_bytes_than_the_hub_told_of_are_noticed(
    models: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def one_range(request: Handler) -> str | None:
        nonlocal asked
        asked += request.path.startswith("/store/") and "base" in request.path
        return "other" if asked == 2 else None  # the first range behind the header

    with serving(on_hub(models), faulty(one_range)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        with pytest.raises(InputChangedError, match="not the one that the server told of"):
            oxmerge.merge(recipe(tmp_path, "org"), tmp_path / "out", stream=True)
    assert not (tmp_path / "out").exists()


# Memory.

CHILD = """
import json, sys
import oxmerge
recipe, directory, spool, memory = sys.argv[1:]
report = oxmerge.merge(recipe, directory, spool=int(spool), memory=int(memory))
with open("/proc/self/status") as lines:
    peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
print(json.dumps({**report.as_dict(), "measured": peak}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_streaming_stays_within_the_budget(tmp_path: Path, method: str) -> None:
    shapes: Shapes = {f"model.layers.{at}.weight": (4096, 4096) for at in range(10)}
    for name in ("base", "tuned"):  # 336 MB each
        write_sparse(tmp_path / name / "model.safetensors", shapes)
    memory = 160 << 20
    with serve(tmp_path) as server:
        path = recipe(tmp_path, server.address, method)
        arguments = (path, tmp_path / "out", 150_000_000, memory)
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *map(str, arguments)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["measured"] <= memory
    assert report["predicted_memory"] <= memory
    assert report["measured"] <= 1.05 * report["predicted_memory"]
    assert os.stat(tmp_path / "out" / "model.safetensors").st_size > 300_000_000
