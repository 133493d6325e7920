"""Models by their names on the Hub: a server on this machine, and the real library as a client."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from hub_server import at_random, faulty
from hypothesis import given
from hypothesis import strategies as st
from oxmerge import RemoteError, _core
from oxmerge.cli import main
from oxmerge.cli.progress import PlainProgress, progress_line
from oxmerge.demo_hub import Handler, HubServer, Model, serving
from oxmerge.merging import Snapshot
from oxmerge.models import download, hub, references, remote
from oxmerge.models.hub_cache import Commit, HubName, cache_folder, find_cached
from oxmerge.models.references import Located, resolve_reference
from oxmerge.problems import Problem
from writers import directory_bytes, random_arrays, write_file, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    **{f"model.layers.{at}.mlp.weight": (96, 32) for at in range(4)},
    "lm_head.weight": (64, 32),
}
RECIPE = """\
merge_method: linear
models:
  - {model: org/one, parameters: {weight: 0.7}}
  - {model: org/two@v1, parameters: {weight: 0.3}}
dtype: bfloat16
"""


def shards(folder: Path, seed: int, *, beside: bool = False) -> Path:
    """Write a model of two shards with an index, a config and a tokenizer."""
    arrays = random_arrays(SHAPES, seed)
    folder.mkdir(parents=True)
    names = list(arrays)
    weight_map: dict[str, str] = {}
    for at, part in enumerate((names[:3], names[3:]), start=1):
        file = f"model-0000{at}-of-00002.safetensors"
        write_file(folder / file, {name: arrays[name] for name in part}, "BF16")
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "num_hidden_layers": 4, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    if beside:
        (folder / "LICENSE").write_text("free")
        (folder / "pytorch_model.bin").write_bytes(b"PK" + bytes(200_000))
        (folder / "code").mkdir()
        (folder / "code" / "modeling.py").write_text("pass\n")
        (folder / "onnx").mkdir()
        write_file(folder / "onnx" / "model.safetensors", {"x": arrays[names[0]]}, "BF16")
        (folder / "onnx" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of one shape."""
    folder = tmp_path_factory.mktemp("models")
    shards(folder / "one", 1, beside=True)
    shards(folder / "two", 2)
    return folder


class Hub:
    """A server that runs, and the environment of its users."""

    def __init__(self, stack: ExitStack, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self._stack, self._patch = stack, patch
        self.home = folder / "hf"
        patch.setenv("HF_HOME", str(self.home))
        patch.delenv("HF_HUB_OFFLINE")
        patch.setattr(remote, "_FIRST_WAIT", 0.001)
        patch.setattr(hub, "_listed", {})
        references._starts.cache_clear()

    def start(self, served: dict[str, Model], handler: type[Handler] = Handler) -> HubServer:
        """Start a server, which is the Hub from then on."""
        server = self._stack.enter_context(serving(HubServer(served), handler))
        self._patch.setenv("HF_ENDPOINT", server.address)
        return server

    def offline(self) -> None:
        """Forbid to ask."""
        self._patch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The environment of someone who uses the Hub, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with ExitStack() as stack:
        yield Hub(stack, monkeypatch, tmp_path)


@pytest.fixture
def served(models: Path) -> dict[str, Model]:
    """What the Hub has unless a test says otherwise."""
    one = Model.of_folder(str(models / "one"))
    return {"org/one": one, "org/two": Model.of_folder(str(models / "two"), revisions=("v1",))}


def local(models: Path, recipe: str = RECIPE) -> str:
    """Return the recipe by paths."""
    recipe = recipe.replace("org/one", str(models / "one"))
    return recipe.replace("org/two@v1", str(models / "two"))


def weights(folder: Path) -> dict[str, bytes]:
    """Return what does not say which models were merged."""
    told = ("README.md", "oxmerge.json", "oxmerge_recipe.yml", "oxmerge_report.json")
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in told}


# The way from a name to a merged model.


def test_a_merge_by_name_is_the_local_merge(
    the_hub: Hub, models: Path, served: dict[str, Model], tmp_path: Path
) -> None:
    server = the_hub.start(served)
    plan = oxmerge.plan(RECIPE)
    weight_bytes = sum(file.stat().st_size for file in models.glob("*/model-*"))
    headers = sum(1 for method, path, _ in server.asked if method == "GET" and "/store/" in path)
    assert headers == 4  # one request for each shard's header, and none for anything else
    assert plan.as_dict()["bytes_to_fetch"] == weight_bytes
    pins = [f"{name}@{model.commit}" for name, model in served.items()]
    assert plan.pinned == tuple(pins)
    assert all(pin in str(plan) for pin in pins)
    assert f"fetches   {weight_bytes / 1e3:.1f} kB in 4 files" in str(plan)
    plan.save(tmp_path / "plan.json")

    report = oxmerge.merge(oxmerge.load_plan(tmp_path / "plan.json"), "out")
    assert [note for note in report.notes if "@" in note] == [
        f"`org/one` is `{pins[0]}`", f"`org/two@v1` is `{pins[1]}`",
    ]  # fmt: skip
    inputs = json.loads(Path("out/oxmerge.json").read_text())["inputs"]
    assert [each["pinned"] for each in inputs] == pins
    assert all(file["sha256"] for each in inputs for file in each["files"][:2])
    card = Path("out/README.md").read_text()
    assert all(f"that is `{pin}`" in card and f" was {pin}" in card for pin in pins)
    assert f"# org/one was {pins[0]}\n" in Path("out/oxmerge_recipe.yml").read_text()

    oxmerge.merge(local(models), tmp_path / "local")
    assert weights(Path("out")) == weights(tmp_path / "local")
    assert {"LICENSE", "code/modeling.py"} <= set(weights(Path("out")))
    # What was not needed was not fetched.
    fetched = {path.name for path in the_hub.home.rglob("snapshots/*/**/*") if not path.is_dir()}
    assert "pytorch_model.bin" not in fetched

    # From then on the Hub is not asked.
    before = len(server.asked)
    the_hub.offline()
    oxmerge.merge(RECIPE, "again")
    assert weights(Path("again")) == weights(Path("out"))
    assert len(server.asked) == before


@pytest.mark.slow
def test_a_name_takes_no_memory_of_the_merge(
    the_hub: Hub, served: dict[str, Model], tmp_path: Path
) -> None:
    the_hub.start(served)
    (tmp_path / "r.yml").write_text(RECIPE)
    command = [sys.executable, "-m", "oxmerge", "merge", str(tmp_path / "r.yml"), "out", "--json"]
    done = subprocess.run(
        [*command, "--memory", "128MiB"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["peak_memory"] <= 128 << 20
    assert "% " in done.stderr or "note: `org/one` is `org/one@" in done.stderr


@pytest.mark.slow
def test_a_sweep_fetches_once(the_hub: Hub, served: dict[str, Model]) -> None:
    server = the_hub.start(served)
    oxmerge.sweep(RECIPE, "out/{weight}", {"models[0].parameters.weight": [0.1, 0.5, 0.9]})
    large = [path.partition("?")[0] for _, path, wanted in server.asked if "/store/" in path]
    assert all(large.count(path) == 2 for path in set(large))  # a header, and the file
    assert len(set(large)) == 4


@pytest.mark.slow
def test_what_is_opened_is_fetched_when_touched(
    the_hub: Hub, models: Path, served: dict[str, Model]
) -> None:
    the_hub.start(served)

    def here() -> set[str]:
        return {path.name for path in the_hub.home.rglob("*.safetensors")}

    with oxmerge.open("org/one") as checkpoint, oxmerge.open(models / "one") as same:
        assert list(checkpoint) == list(same)
        assert here() == set()
        name = "model.embed_tokens.weight"
        assert np.array_equal(checkpoint[name], same[name])
        assert here() == {"model-00001-of-00002.safetensors"}
    lazy, same_lazy = oxmerge.lazy(RECIPE), oxmerge.lazy(local(models))
    assert np.array_equal(lazy[name], same_lazy[name])
    assert {path.parent.name for path in the_hub.home.rglob("*.safetensors")} == {
        model.commit for model in served.values()
    }
    assert here() == {"model-00001-of-00002.safetensors"}
    assert np.array_equal(lazy["lm_head.weight"], same_lazy["lm_head.weight"])


def test_only_files_that_are_read_are_fetched(the_hub: Hub, served: dict[str, Model]) -> None:
    the_hub.start(served)
    source = "{model: org/one, layer_range: [0, 1]}"
    recipe = f"merge_method: passthrough\nslices:\n- sources: [{source}]\n"
    plan = oxmerge.plan(recipe)
    assert [os.path.basename(file["path"]) for file in plan.absent] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]  # fmt: skip - the head is in the second
    with oxmerge.open("org/two@v1") as checkpoint:
        checkpoint["lm_head.weight"]
    assert len(list(the_hub.home.rglob("*.safetensors"))) == 1


def test_models_by_name_are_compared_and_checked(
    the_hub: Hub, served: dict[str, Model], models: Path
) -> None:
    the_hub.start(served)
    assert oxmerge.check("org/one", quick=True).tensors == len(SHAPES)
    assert not list(Path(cache_folder()).rglob("*.safetensors"))
    found, local = (
        oxmerge.diff("org/one", "org/two@v1"),
        oxmerge.diff(models / "one", models / "two"),
    )
    assert found.total == local.total
    assert found.total.changed > 0
    assert oxmerge.check("org/one").errors == oxmerge.check(models / "one").errors


def test_an_output_is_verified_with_inputs_by_name(the_hub: Hub, served: dict[str, Model]) -> None:
    the_hub.start(served)
    oxmerge.merge(RECIPE, "out")
    shutil.rmtree(the_hub.home)
    assert oxmerge.verify("out", recompute=True).is_equal


def test_inspect_tells_of_a_name(
    the_hub: Hub, served: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    server = the_hub.start(served)
    assert main(["inspect", "org/one", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pinned"] == f"org/one@{served['org/one'].commit}"
    assert told["stacks"] == {"model.layers": 4}
    assert main(["inspect", "hf://org/one/onnx"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"on the Hub  {told['pinned']}/onnx, 1 file with 4.21 kB not downloaded" in lines
    assert main(["inspect", "org/one/onnx/model.safetensors"]) == 0
    ranges = [wanted for _, path, wanted in server.asked if path.startswith("/store/")]
    assert len(ranges) == 3
    assert all(wanted.startswith("bytes=0-") for wanted in ranges)


def test_an_adapter_by_its_name(
    the_hub: Hub, models: Path, served: dict[str, Model], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["mlp"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"lora_A": (2, 32), "lora_B": (96, 2)}
    names = (f"base_model.model.model.layers.{at}.mlp.{part}" for at in range(4) for part in shapes)
    factors = {f"{name}.weight": shapes[name[-6:]] for name in names}
    write_file(folder / "adapter_model.safetensors", random_arrays(factors, 3), "F32")
    the_hub.start({**served, "org/adapter": Model.of_folder(str(folder))})
    recipe = passthrough("org/one+org/adapter@main")
    plan = oxmerge.plan(recipe)
    pins = [f"org/one@{served['org/one'].commit}", "org/adapter@"]
    assert (plan.pinned[0] or "").startswith("+".join(pins))
    oxmerge.merge(plan, "out")
    oxmerge.merge(passthrough(f"{models / 'one'}+{folder}"), tmp_path / "local")
    assert weights(Path("out")) == weights(tmp_path / "local")


def test_the_bar_tells_of_downloads_first() -> None:
    snapshot = Snapshot(
        0, 9 * 10**9, 0, 0, "org/one@c/model.safetensors", 1 << 27, 10**9, 4 * 10**9
    )
    assert progress_line(snapshot, 10.0, 30.0) == (
        " 25%  1 GB of 4 GB  downloaded  0.10 GB/s  30.0 s left  peak 128 MiB"
        "  org/one@c/model.safetensors"
    )
    told: list[str] = []
    times = iter((0.0, 1.0, 11.0, 12.0, 18.0))
    show = PlainProgress(told.append, lambda: next(times))
    show(snapshot)
    show(snapshot)
    show(Snapshot(10**9, 9 * 10**9, 0, 1, "x", 1 << 27, 4 * 10**9, 4 * 10**9))
    show(Snapshot(2 * 10**9, 9 * 10**9, 0, 1, "x", 1 << 27, 4 * 10**9, 4 * 10**9))
    assert [line.split("  ")[:4] for line in told] == [
        [" 25%", "1 GB of 4 GB", "downloaded", "0.10 GB/s"],
        [" 22%", "2 GB of 9 GB", "0.33 GB/s", "21.0 s left"],  # since the last byte came
    ]


# Names.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None, "")),
        ("gpt2", ("gpt2", None, "")),
        ("org/name@main", ("org/name", "main", "")),
        ("org/name@refs/pr/12", ("org/name", "refs/pr/12", "")),
        ("org/name@refs/convert/x/sub", ("org/name", "refs/convert/x", "sub")),
        ("org/name@feature%2Fx/sub/dir/", ("org/name", "feature/x", "sub/dir")),
        ("org/name/sub/model.safetensors", ("org/name", None, "sub/model.safetensors")),
        ("hf://org/name@v1/sub", ("org/name", "v1", "sub")),
        ("hf://models/org/name", ("org/name", None, "")),
    ],
)
def test_names(text: str, expected: tuple[str, str | None, str]) -> None:
    found = HubName.parse(text)
    assert found is not None
    assert (found.name, found.revision, found.inside) == expected


NO_NAMES = (
    "", "/org/name", "./name", "../name", "~/name", "org/name/../x", "org/name@..", "org//name",
    "org/name@a%2F..%2Fb", "org/na me", "-org/name", "org/name.", "org/na--me", "org/name.git",
    "org/name@%2E%2E", "org/name@x/..", "s3://bucket/name", "org/name@x@y", "org/näme", "org\\name",
)  # fmt: skip


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/tree/v1/onnx", "org/name@v1/onnx"),
        ("https://hf.co/org/name/blob/refs%2Fpr%2F1/a.bin?x=1", "org/name@refs%2Fpr%2F1/a.bin"),
    ],
)
def test_a_page_of_the_hub_is_told_its_name(page: str, name: str) -> None:
    found = resolve_reference(page, ())
    assert isinstance(found, Problem)
    assert found.advice == f"write its name, `{name}`"
    assert HubName.parse(name)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("HF_ENDPOINT", "localhost:80", "HF_ENDPOINT is no address of a server"),
        ("HF_ENDPOINT", "http://127.0.0.1:99999", "HF_ENDPOINT is no address of a server"),
        ("HF_ENDPOINT", "http://[", "HF_ENDPOINT is no address of a server"),
        ("HF_TOKEN", "hf_€", "the token for the Hub has letters that no token has"),
        ("HF_TOKEN_PATH", "/", "the token for the Hub cannot be read (is a directory)"),
    ],
)
def test_an_environment_that_no_request_can_be_made_of(
    the_hub: Hub, tmp_path: Path, variable: str, value: str, told: str
) -> None:
    """The library reads it when it is imported, so another process has it."""
    done = subprocess.run(
        [sys.executable, "-m", "oxmerge", "inspect", "org/one"],
        env={**os.environ, "HF_HOME": str(the_hub.home), variable: value},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert told in done.stderr
    assert "hint:" in done.stderr


@pytest.mark.parametrize("text", NO_NAMES)
def test_what_is_no_name(text: str) -> None:
    assert HubName.parse(text) is None


@given(st.text(alphabet="ab/.@%2Fe-~\\\0h:", max_size=24))
def test_no_name_leads_out_of_the_cache(text: str) -> None:
    found = HubName.parse(text)
    if found is not None:
        commit = Commit(found.name, "0" * 40)
        place = os.path.normpath(commit.path_of(found.inside))
        assert place.startswith(os.path.join(cache_folder(), "models--"))
        revision = os.path.join(cache_folder(), "x", *(found.revision or "main").split("/"))
        assert os.path.normpath(revision) == revision


def test_a_path_wins_when_it_is_there(the_hub: Hub, served: dict[str, Model]) -> None:
    server = the_hub.start(served)
    for name in ("org/one", "a@b", "a+b", "org/two"):
        write_model(Path(name), random_arrays({"x": (3,)}, 0), "BF16")
    for name in ("org/one", "a@b", "a+b"):
        found = resolve_reference(name, (os.getcwd(),))
        assert found == Located(os.path.abspath(name))
    # Before a revision too, which is told.
    found = resolve_reference("org/two@v1", (os.getcwd(),))
    assert isinstance(found, Located)
    assert found.path == os.path.abspath("org/two")
    assert "which has no revisions" in found.warnings[0].message
    assert not server.asked
    assert isinstance(resolve_reference("hf://org/one", (os.getcwd(),)), Located)
    assert server.asked
    # A folder for models is nobody's name, so that a slip does not go to the Hub.
    missing = resolve_reference("models/onee", (os.getcwd(),))
    assert isinstance(missing, Problem)
    assert missing.code == "missing-model"


def test_revisions(the_hub: Hub, models: Path) -> None:
    folder = str(models / "one")
    model = Model.of_folder(folder, revisions=("main", "feature/x", "refs/pr/1"))
    the_hub.start({"org/one": model})
    commit = Commit("org/one", model.commit)
    for revision in ("feature%2Fx", "refs/pr/1", model.commit):
        found = resolve_reference(f"org/one@{revision}", ())
        assert isinstance(found, Located)
        assert found.pinned == f"org/one@{model.commit}"
    the_hub.offline()
    for revision in ("feature/x", "refs/pr/1", model.commit, model.commit[:7]):
        assert find_cached("org/one", revision) == commit
    assert find_cached("org/one", "main") is None  # nobody has asked for it
    assert find_cached("org/one", model.commit[:6]) is None
    recipe = "merge_method: passthrough\nmodels: [{{model: {{path: org/one, revision: {}}}}}]\n"
    the_hub._patch.delenv("HF_HUB_OFFLINE")
    assert oxmerge.plan(recipe.format("feature/x")).models == ("org/one@feature%2Fx",)


def test_a_name_stays_what_the_cache_has(the_hub: Hub, models: Path) -> None:
    first = Model.of_folder(str(models / "one"))
    the_hub.start({"org/one": first})
    oxmerge.plan(passthrough("org/one"))  # whose weights are not here
    the_hub.start({"org/one": Model(first.files, "9" * 40), "org/x": first})
    assert oxmerge.plan(passthrough("org/one")).pinned == (f"org/one@{first.commit}",)
    assert oxmerge.plan(passthrough("org/one@" + "9" * 40)).pinned == ("org/one@" + "9" * 40,)


# The cache, without the library.

VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "/home/me/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "~/hf", "XDG_CACHE_HOME": "/x"}, "/home/me/hf/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/hf"}, "/old"),
        ({"HF_HUB_CACHE": "$BASE/c", "HUGGINGFACE_HUB_CACHE": "/old"}, "/base/c"),
    ],
)
def test_where_the_cache_is(
    values: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", "BASE": "/base", **values}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == expected
    # The library finds the same place.
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def cached(model: Path, home: Path, name: str, *, double: bool = False) -> Path:
    """Put a model into a cache, as links to blobs; or as links to links."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for file in sorted(model.rglob("*")):
        if file.is_dir():
            continue
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        blob = folder / "blobs" / digest
        if double:
            shared = home / "hub" / "blobs" / digest[:2] / digest
            shared.parent.mkdir(parents=True, exist_ok=True)
            shared.write_bytes(file.read_bytes())
            blob.unlink(missing_ok=True)
            blob.symlink_to(os.path.relpath(shared, blob.parent))
        else:
            blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture
def without_library(the_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The environment of someone who has the cache alone."""
    monkeypatch.setattr(hub, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return the_hub


def test_the_cache_needs_no_library(without_library: Hub, models: Path, tmp_path: Path) -> None:
    one = cached(models / "one", without_library.home, "org/one", double=True)
    two = cached(models / "two", without_library.home, "org/two")
    recipe = RECIPE.replace("org/two@v1", f"org/two@{two.name[:8]}")
    report = oxmerge.merge(recipe, "out")
    assert f"`org/one` is `org/one@{one.name}`" in report.notes
    oxmerge.merge(local(models), tmp_path / "local")
    assert weights(Path("out")) == weights(tmp_path / "local")
    # Nothing was written there, and its files are as good by their paths.
    before = directory_bytes(without_library.home)
    for path in (one, one.parent.parent, one / "model.safetensors.index.json"):
        found = resolve_reference(str(path), ("/",))
        assert isinstance(found, Located)
        assert (found.pinned or "").startswith(f"org/one@{one.name}")
    assert directory_bytes(without_library.home) == before


@pytest.mark.parametrize("how", ["offline", "no library"])
def test_a_partial_snapshot_says_what_it_lacks(
    how: str, without_library: Hub, models: Path
) -> None:
    one = cached(models / "one", without_library.home, "org/one")
    shard = one / "model-00002-of-00002.safetensors"
    # Unfinished, so that its link leads nowhere.
    shard.resolve().rename(f"{shard.resolve()}.1234.incomplete")
    if how == "offline":
        without_library.offline()
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan("merge_method: passthrough\nmodels: [{model: org/one}]\n")
    (problem,) = caught.value.problems
    assert problem.code == "unreachable-model"
    assert "the Hub's cache lacks files of `org/one`" in problem.message
    assert problem.found == "no `model-00002-of-00002.safetensors`"
    advice = "unset HF_HUB_OFFLINE" if how == "offline" else "pip install huggingface_hub"
    assert advice in (problem.advice or "")


def test_another_revision_in_the_cache_is_told(without_library: Hub, models: Path) -> None:
    one = cached(models / "one", without_library.home, "org/one")
    problem = refusal(passthrough("org/one@v1"))
    assert f"has no `org/one@v1` but `org/one@{one.name}`" in problem.message


def test_another_format_in_the_cache_is_not_taken_for_the_model(
    the_hub: Hub, tmp_path: Path
) -> None:
    """Some programs fetch only what they read of a model, such as Mistral's own format."""
    write_model(tmp_path / "one", random_arrays(SHAPES, 1), "BF16")
    write_file(tmp_path / "one" / "consolidated.safetensors", {"wq": np.ones((2, 2))}, "BF16")
    server = the_hub.start({"org/one": Model.of_folder(str(tmp_path / "one"))})
    commit = server.models["org/one"].commit
    fetched = the_hub.home / "hub" / "models--org--one" / "snapshots" / commit
    fetched.mkdir(parents=True)
    shutil.copy(tmp_path / "one" / "consolidated.safetensors", fetched)
    (fetched.parent.parent / "refs").mkdir()
    (fetched.parent.parent / "refs" / "main").write_text(commit)
    with oxmerge.open("org/one") as checkpoint:
        assert set(checkpoint) == set(SHAPES)
    the_hub.offline()
    assert refusal(passthrough("org/one")).found == "no `model.safetensors`"


def test_what_may_lack_beside_the_weights_is_told(without_library: Hub, models: Path) -> None:
    two = cached(models / "two", without_library.home, "org/two")
    (two / "tokenizer_config.json").unlink()
    plan = oxmerge.plan("merge_method: passthrough\nmodels: [{model: org/two}]\n")
    assert "may lack files beside the weights" in str(plan.warnings[0])


def test_a_manifest_tells_nothing_of_the_network(
    the_hub: Hub, served: dict[str, Model], tmp_path: Path
) -> None:
    """Which server did not answer, and why, is of that day: the merge is the same."""
    the_hub.start(served)
    recipe = "merge_method: passthrough\nmodels: [{model: org/two@v1}]\n"
    oxmerge.merge(recipe, tmp_path / "whole")
    for path in the_hub.home.rglob("tokenizer_config.json"):
        path.unlink()
    the_hub.offline()
    report = oxmerge.merge(recipe, tmp_path / "out")
    assert "and they were not fetched: found the Hub may not be asked" in report.warnings[0]
    assert json.loads((tmp_path / "out" / "oxmerge.json").read_text())["warnings"] == []


@pytest.mark.slow
def test_a_partial_snapshot_is_completed(
    the_hub: Hub, models: Path, served: dict[str, Model], tmp_path: Path
) -> None:
    server = the_hub.start(served)
    with oxmerge.open("org/one") as checkpoint:
        checkpoint["model.embed_tokens.weight"]
    server.asked.clear()
    plan = oxmerge.plan(local(models).replace(str(models / "one"), "org/one"))
    assert [os.path.basename(file["path"]) for file in plan.absent] == [
        "model-00002-of-00002.safetensors"
    ]
    oxmerge.merge(plan, "out")
    oxmerge.merge(local(models), tmp_path / "local")
    assert weights(Path("out")) == weights(tmp_path / "local")
    assert not any("model-00001" in path for method, path, _ in server.asked if method == "GET")


@pytest.mark.parametrize("text", ["../../../etc", "0" * 39, "", "é" * 40, "\0" * 40, "0" * 9999])
def test_a_ref_that_is_no_commit_is_none(text: str, without_library: Hub, models: Path) -> None:
    one = cached(models / "one", without_library.home, "org/one")
    (one.parent.parent / "refs" / "main").write_text(text)
    assert find_cached("org/one") is None


@pytest.mark.parametrize("tree", ["[]", "{", '{"files": 3}', '{"files": {"../x": {"size": 1}}}'])
def test_a_list_of_files_that_is_none_is_passed_over(
    tree: str, without_library: Hub, models: Path
) -> None:
    one = cached(models / "one", without_library.home, "org/one")
    trees = one.parent.parent / "trees"
    trees.mkdir()
    (trees / f"{one.name}.json").write_text(tree)
    assert isinstance(resolve_reference("org/one", ()), Located)


# Ranges.


def remote_shard(server: HubServer, name: str = "org/one") -> tuple[remote.HttpFile, bytes]:
    """Return a large file of the server, and its bytes."""
    model, file = server.models[name], "model-00001-of-00002.safetensors"
    data = Path(model.files[file]).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return hub.file_of(Commit(name, model.commit), file, len(data), digest), data


PASSING = ("reset", "cut", "short", "429", "503", "500")


@pytest.mark.parametrize("seed", range(3))
def test_ranges_come_whole_whatever_happens(
    seed: int, the_hub: Hub, served: dict[str, Model]
) -> None:
    server = the_hub.start(served, faulty(at_random(seed, PASSING, 0.3)))
    server.seconds = 0.5  # addresses expire on the way
    file, data = remote_shard(server)
    assert file.label == f"org/one@{served['org/one'].commit}/model-00001-of-00002.safetensors"
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    generator = random.Random(seed)
    for _ in range(25):
        start = generator.randrange(len(data))
        stop = generator.randrange(start, len(data) + 1)
        assert file.read(start, stop) == data[start:stop]
        time.sleep(0.04)
    with pytest.raises(ValueError, match="no bytes 1 to"):
        file.read(1, len(data) + 1)


@pytest.mark.parametrize(
    ("fault", "error", "told"),
    [
        ("whole", RemoteError, "the whole file instead of a range"),
        ("range", oxmerge.InputChangedError, "another range"),
        ("403", RemoteError, "status 403"),
        ("404", RemoteError, "status 404"),
        ("503", RemoteError, "status 503"),
        ("429", RemoteError, "status 429"),
        ("reset", RemoteError, "bytes 5 to 5000 cannot be fetched"),
        ("endless", RemoteError, "more bytes came than were asked for"),
        ("etag", oxmerge.InputChangedError, "the file changed after it was first read"),
    ],
)
def test_a_range_that_cannot_be_had_says_why(
    fault: str, error: type[Exception], told: str, the_hub: Hub, served: dict[str, Model]
) -> None:
    server = the_hub.start(served, faulty(lambda request: at_store(request, fault)))
    file, data = remote_shard(server)
    if fault == "etag":  # which only another answer shows
        assert file.read(0, 9) == data[:9]
    with pytest.raises(error) as caught:
        file.read(5, 5000)
    assert told in str(caught.value)
    assert file.label in str(caught.value)
    assert "hint: " in str(caught.value)


def at_store(request: Any, fault: str) -> str | None:
    """Return the fault for what the store is asked for."""
    return fault if request.path.startswith("/store/") else None


# What users meet.


def refusal(recipe: str) -> Problem:
    """Return the one problem of a plan."""
    with pytest.raises((oxmerge.PlanError, oxmerge.RecipeError)) as caught:
        oxmerge.plan(recipe)
    (problem,) = caught.value.problems
    return problem


def passthrough(model: str) -> str:
    return f"merge_method: passthrough\nmodels: [{{model: '{model}'}}]\n"


@pytest.mark.parametrize(
    ("model", "message", "advice"),
    [
        ("org/ome", "the Hub has no model `org/ome`, or it is private", "did you mean `org/one`?"),
        ("org/private", "no model `org/private`, or it is private", "`hf auth login`, or set HF_"),
        ("org/gated", "`org/gated` is given only to those who asked for it", "ask for access at"),
        ("org/one@v9", "`org/one` has no revision `v9`", "/org/one/refs for its branches"),
        ("org/one/nowhere", "`org/one` has no `nowhere`", "name a folder or a file that it has"),
        (
            "org/pickle",
            "the zip archive has no directory at its end",
            "download it again",
        ),
        ("org/empty", "holds no weights", "download"),
    ],
)
def test_what_the_hub_refuses(
    model: str, message: str, advice: str, the_hub: Hub, served: dict[str, Model],
    tmp_path: Path, models: Path,
) -> None:  # fmt: skip
    one = str(models / "one")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(600))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    the_hub.start({
        **served,
        "org/private": Model.of_folder(one, token="secret"),
        "org/gated": Model.of_folder(one, token="secret", gated=True),
        "org/pickle": Model.of_folder(str(tmp_path / "pickle")),
        "org/empty": Model.of_folder(str(tmp_path / "empty")),
    })  # fmt: skip
    oxmerge.plan(passthrough("org/one"))  # so that the name is known
    problem = refusal(passthrough(model))
    assert message in str(problem)
    assert advice in (problem.advice or "")


@pytest.mark.parametrize(
    ("address", "is_here"),
    [
        ("https://hub.example/org/name/a.bin", True),
        ("https://HUB.example:443/api/a.bin", True),
        ("http://hub.example/a.bin", False),
        ("https://hub.example:444/a.bin", False),
        ("https://hub.example.evil/a.bin", False),
        ("https://hub.example@evil/a.bin", False),
        ("https://hub.example:99999/a.bin", False),
        ("/a.bin", False),
    ],
)
def test_a_token_is_for_the_hub_alone(
    monkeypatch: pytest.MonkeyPatch, address: str, *, is_here: bool
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://Hub.example/")
    assert hub._is_here(address) is is_here


def test_a_token_that_is_not_taken(
    the_hub: Hub, served: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    the_hub.start(served, faulty(lambda _: "401"))
    assert "or it is private" in refusal(passthrough("org/one")).message
    monkeypatch.setenv("HF_TOKEN", "expired")
    problem = refusal(passthrough("org/one"))
    assert "the Hub does not take the token" in problem.message
    assert "set HF_TOKEN anew" in (problem.advice or "")


def test_a_cache_that_cannot_be_written(
    the_hub: Hub, served: dict[str, Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    the_hub.start(served)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    problem = refusal(passthrough("org/one"))
    assert problem.message.endswith("the Hub's cache cannot be used")
    assert problem.file == str(tmp_path / "file" / "hub")
    assert "HF_HUB_CACHE names another folder" in (problem.advice or "")


@pytest.mark.slow
def test_a_token_opens_what_is_private(
    the_hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = str(models / "one")
    private = {"org/one": Model.of_folder(one, token="secret")}
    gated = {"org/gated": Model.of_folder(one, token="secret", gated=True)}
    server = the_hub.start(private | gated)
    monkeypatch.setenv("HF_TOKEN", "other")
    assert "the token is of an account" in (refusal(passthrough("org/one")).advice or "")
    monkeypatch.setenv("HF_TOKEN", "secret")
    for name in ("org/one", "org/gated"):
        oxmerge.merge(passthrough(name), name.replace("/", "-"))  # the store refuses tokens
    assert any(path.startswith("/store/") for _, path, _ in server.asked)


def test_the_hub_limits_or_fails(the_hub: Hub, served: dict[str, Model]) -> None:
    counts = {"429": 2, "503": 1}

    def fault(request: Any) -> str | None:
        for status, left in counts.items():
            if request.path.startswith("/api/models/") and left:
                counts[status] -= 1
                return status
        return None

    the_hub.start(served, faulty(fault))
    assert isinstance(resolve_reference("org/one", ()), Located)
    assert sum(counts.values()) == 0
    # What names a commit is not asked again for another.
    the_hub.start(served, faulty(lambda _: "429"))
    problem = refusal(passthrough("org/two"))
    assert "limits how often it may be asked" in problem.message


def test_the_hub_limits_downloads(the_hub: Hub, served: dict[str, Model]) -> None:
    left = [3]

    def fault(request: Any) -> str | None:
        if "config.json" in request.path and left[0]:
            left[0] -= 1
            return "429"
        return None

    the_hub.start(served, faulty(fault))
    assert isinstance(resolve_reference("org/one", ()), Located)
    assert left == [0]


def test_large_files_beside_the_weights_are_left_out(
    the_hub: Hub, served: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    the_hub.start(served)
    monkeypatch.setattr(hub, "MOST_SMALL", 3)
    problem = refusal(passthrough("org/one"))
    assert "too large for what it should be" in problem.message
    monkeypatch.setattr(hub, "MOST_SMALL", 10_000)
    oxmerge.plan(passthrough("org/one"))
    monkeypatch.setattr(hub, "MOST_SMALL", 3)
    for file in the_hub.home.rglob("LICENSE"):
        file.unlink()
    (warning,) = oxmerge.plan(passthrough("org/one")).warnings
    assert "the output will lack it" in warning.message
    assert (warning.file or "").endswith("/LICENSE")


def test_nobody_there(the_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    problem = refusal(passthrough("org/one"))
    assert "there is no path `org/one`, and the Hub cannot be reached" in problem.message
    assert "check the network" in (problem.advice or "")


class _NoHub(BaseHTTPRequestHandler):
    """What is not the Hub, as a page to sign in to a network."""

    said = b"<html>"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.said)))
        self.end_headers()
        self.wfile.write(self.said)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("said", [b"<html>", b"{}", b"[" * 10**5, b'{"id": 3, "siblings": 4}'])
def test_what_answers_is_not_the_hub(
    the_hub: Hub, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(_NoHub, "said", said)
    with ThreadingHTTPServer(("127.0.0.1", 0), _NoHub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        problem = refusal(passthrough("org/one"))
        server.shutdown()
    assert "is not the Hub" in problem.message
    assert "HF_ENDPOINT" in (problem.advice or "")


def test_offline_and_nothing_here(the_hub: Hub) -> None:
    the_hub.offline()
    problem = refusal(passthrough("org/one"))
    assert problem.code == "missing-model"
    assert f"the Hub's cache `{cache_folder()}` has no `org/one`" in problem.message


def test_no_library(without_library: Hub) -> None:
    problem = refusal(passthrough("org/one"))
    assert "pip install huggingface_hub" in (problem.advice or "")


def test_the_disk_is_full(
    the_hub: Hub, served: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = the_hub.start(served)
    plan = oxmerge.plan(RECIPE)
    before = server.sent
    real = os.statvfs
    files = sum(int(file["size"]) for file in plan.absent)
    room = files + plan.disk - 1

    class Little:
        f_frsize, f_bavail = 1, room

    monkeypatch.setattr(os, "statvfs", lambda path: Little if "hf" in str(path) else real(path))
    with pytest.raises(OSError, match="not enough space to download") as caught:
        oxmerge.merge(plan, "out")
    assert "`--stream`, which keeps no weights, needs" in str(caught.value)
    assert server.sent == before
    assert not Path("out").exists()


# Downloads that go wrong.


def leftovers(hub: Hub) -> list[str]:
    """Return files that are not finished, or whose bytes are not those of their names."""
    blobs = [path for path in hub.home.rglob("blobs/*") if path.is_file()]
    return [
        path.name
        for path in blobs
        if len(path.name) != 40 and hashlib.sha256(path.read_bytes()).hexdigest() != path.name
    ]


@pytest.mark.slow
def test_other_bytes_are_not_taken(the_hub: Hub, served: dict[str, Model]) -> None:
    def fault(request: Any) -> str | None:
        is_whole = "Range" not in request.headers and "model-00002" in request.path
        return at_store(request, "other") if is_whole else None

    the_hub.start(served, faulty(fault))
    with pytest.raises(oxmerge.InputChangedError, match="other bytes came than the Hub told of"):
        oxmerge.merge(RECIPE, "out")
    assert not Path("out").exists()
    assert leftovers(the_hub) == []
    # What came whole is kept, and the rest comes when the server has mended its ways.
    server = the_hub.start(served)
    oxmerge.merge(RECIPE, "out")
    assert any("model-00002" in path for _, path, _ in server.asked)


@pytest.mark.slow
def test_downloads_go_on_after_faults(
    the_hub: Hub, models: Path, served: dict[str, Model], tmp_path: Path
) -> None:
    seen: set[str] = set()

    def fault(request: Any) -> str | None:
        path = request.path.partition("?")[0]
        if "Range" in request.headers or not path.startswith("/store/") or path in seen:
            return None
        seen.add(path)
        return "cut"

    the_hub.start(served, faulty(fault))
    oxmerge.merge(RECIPE, "out")
    assert len(seen) == 4
    oxmerge.merge(local(models), tmp_path / "local")
    assert weights(Path("out")) == weights(tmp_path / "local")


@pytest.mark.slow
def test_an_interrupted_download_leaves_nothing_unfinished(
    the_hub: Hub, served: dict[str, Model]
) -> None:
    class Slow(Handler):
        def send_bytes(self, file: Any, start: int, stop: int) -> None:
            if "Range" not in self.headers and "model-00002" in self.path:
                self.wfile.flush()
                self.rfile.read(1)  # until the client goes away
            else:
                super().send_bytes(file, start, stop)

    the_hub.start(served, Slow)
    plan = oxmerge.plan(RECIPE)
    seen = []

    class EnoughError(Exception):
        pass

    def progress(snapshot: Any) -> None:
        seen.append((snapshot.bytes_fetched, snapshot.bytes_to_fetch))
        if snapshot.bytes_fetched >= sum(
            int(file["size"]) for file in plan.absent if "model-00001" in file["path"]
        ):
            raise EnoughError

    with pytest.raises(EnoughError):
        oxmerge.merge(plan, "out", progress=progress)
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {plan.as_dict()["bytes_to_fetch"]}
    assert not Path("out").exists()
    assert leftovers(the_hub) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_downloads_end_with_the_merge(
    number: signal.Signals, the_hub: Hub, served: dict[str, Model]
) -> None:
    waits, ended = threading.Event(), threading.Event()

    class Endless(Handler):
        def send_bytes(self, file: Any, start: int, stop: int) -> None:
            if "Range" in self.headers or not self.path.startswith("/store/"):
                super().send_bytes(file, start, stop)
                return
            super().send_bytes(file, start, (start + stop) // 2)
            self.wfile.flush()
            waits.set()
            with suppress(OSError):
                self.rfile.read(1)  # until the client goes away
            ended.set()
            self.close_connection = True

    the_hub.start(served, Endless)
    Path("r.yml").write_text(RECIPE)
    command = [sys.executable, "-m", "oxmerge", "merge", "r.yml", "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as merge:
        has_begun = waits.wait(600)
        merge.send_signal(number if has_begun else signal.SIGKILL)
        _, said = merge.communicate(timeout=600)
    assert has_begun, said
    assert merge.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert ended.wait(600)
    until = time.monotonic() + 600
    while list(the_hub.home.rglob("*.incomplete")) and time.monotonic() < until:
        time.sleep(0.01)  # the program that downloaded still cleans up
    assert leftovers(the_hub) == []
    if number != signal.SIGKILL:
        assert not Path("out").exists()


LIBRARY = """
import os, time, types
def get_session():
    return types.SimpleNamespace(event_hooks={"response": []})
def hf_hub_download(repo, name, **_):
    path = f"{repo}/{name}.incomplete"
    try:
        open(path, "w").close()
        time.sleep(60)
    finally:
        time.sleep(0.2)  # a moment in which another interrupt comes
        os.unlink(path)
"""


def test_interrupts_do_not_end_the_removing(tmp_path: Path) -> None:
    """The program has one from the terminal, one from the merge, and one when its input ends."""
    (tmp_path / "huggingface_hub.py").write_text(LIBRARY)
    job = {"cache": "", "endpoint": "", "files": [
        {"label": "x", "repo": str(tmp_path), "name": "x", "commit": "", "etag": "", "blob": "no"}
    ]}  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-P", download.__file__], text=True, env={"PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as program:  # fmt: skip
        assert program.stdin is not None
        print(json.dumps(job), file=program.stdin, flush=True)
        until = time.monotonic() + 600
        while not (tmp_path / "x.incomplete").exists() and time.monotonic() < until:
            time.sleep(0.01)
        for _ in range(2):
            program.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, said = program.communicate(timeout=600)
    assert "KeyboardInterrupt" in said
    assert not (tmp_path / "x.incomplete").exists()


@pytest.mark.slow
def test_names_of_files_that_lead_elsewhere(
    the_hub: Hub, models: Path, served: dict[str, Model], tmp_path: Path
) -> None:
    evil = dict(served["org/one"].files)
    for name in ("../../../../evil.json", "/evil.json", "a/../../evil.json", "..\\evil.json"):
        evil[name] = evil["config.json"]
    before = {path for path in tmp_path.rglob("*") if "hf" not in path.parts}
    the_hub.start({"org/one": Model(evil, served["org/one"].commit)})
    found = resolve_reference("org/one", ())
    assert isinstance(found, Located)
    assert all(".." not in name and not name.startswith("/") for name in found.absent)
    oxmerge.merge(passthrough("org/one"), "out")
    new = {path for path in tmp_path.rglob("*") if "hf" not in path.parts} - before
    assert all(Path("out").absolute() in (path, *path.parents) for path in new)


def test_an_etag_that_leads_elsewhere(
    the_hub: Hub, served: dict[str, Model], tmp_path: Path
) -> None:
    """The library calls a file in its cache by its ETag."""

    class Evil(Handler):
        def send_header(self, keyword: str, value: str) -> None:
            is_etag = keyword == "ETag" and self.path.endswith("/config.json")
            super().send_header(keyword, '"../../../../../evil"' if is_etag else value)

    the_hub.start(served, Evil)
    problem = refusal(passthrough("org/one"))
    assert "the ETag `../../../../../evil` leads out of the cache" in (problem.found or "")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("size", [-1, 1 << 70, "12", None])
def test_a_size_that_is_none(the_hub: Hub, served: dict[str, Model], size: Any) -> None:
    class Lying(Handler):
        def described(self, model: Model, file: str) -> dict[str, Any]:
            entry = super().described(model, file)
            if "lfs" in entry:
                entry["lfs"]["size"] = size
            return entry

    the_hub.start(served, Lying)
    assert "no `model-00001-of-00002.safetensors`" in (refusal(passthrough("org/one")).found or "")


def test_a_listing_that_lies(the_hub: Hub, served: dict[str, Model], tmp_path: Path) -> None:
    class Lying(Handler):
        def described(self, model: Model, file: str) -> dict[str, Any]:
            entry = super().described(model, file)
            if "lfs" in entry:
                entry["lfs"]["size"] = entry["size"] = entry["size"] + 1
            return entry

    the_hub.start(served, Lying)
    problem = refusal(passthrough("org/one"))
    assert "the Hub's listing and its files do not fit each other" in problem.message


def test_headers_are_bounded(the_hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "model.safetensors"
    with file.open("wb") as out:
        out.write((99_000_000).to_bytes(8, "little") + b"{")
        out.truncate(50_000_000)
    server = the_hub.start({"org/m": Model.of_folder(str(tmp_path / "m"))})
    assert "the file ends inside its header" in str(refusal(passthrough("org/m")))
    assert server.sent < 1_000_000


def test_a_file_that_is_not_here_is_not_read(the_hub: Hub, served: dict[str, Model]) -> None:
    the_hub.start(served)
    plan = oxmerge.plan(RECIPE)
    with pytest.raises(oxmerge.errors.InternalError, match="before it is here"):
        _core.execute([(plan.table, os.getcwd())], memory=1 << 28)
    places = {file["remote"]["label"]: __file__ for file in plan.absent}
    with pytest.raises(oxmerge.InputChangedError, match="another than the one that was planned"):
        plan.table.placed(places)


# Files of torch.


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_of_torch_files_by_name(the_hub: Hub, tmp_path: Path, *, stream: bool) -> None:
    """It is planned from the ends of its files, and merged as by its path, a view among others."""
    torch = pytest.importorskip("torch")
    folder = tmp_path / "old"
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
    tensors["lm_head.weight"] = torch.randn(32, 64).bfloat16().T
    tensors["model.large"] = torch.randn(512, 512).bfloat16()
    where: dict[str, str] = {}
    for at, names in enumerate((list(tensors)[:3], list(tensors)[3:])):
        file = f"pytorch_model-0000{at + 1}-of-00002.bin"
        torch.save({name: tensors[name] for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    server = the_hub.start({"org/old": Model.of_folder(str(folder))})
    plan = oxmerge.plan(passthrough("org/old"))
    ranges = [wanted for _, path, wanted in server.asked if path.startswith("/store/")]
    assert len(ranges) <= 2 * 2  # the two ends of both files
    assert not list(the_hub.home.rglob("*.bin"))
    oxmerge.merge(plan, "out", stream=stream, spool="4MB")
    oxmerge.merge(passthrough(str(folder)), tmp_path / "local")
    assert (
        weights(Path("out"))["model.safetensors"]
        == (weights(tmp_path / "local")["model.safetensors"])
    )
    assert bool(list(the_hub.home.rglob("*.bin"))) is not stream


# Adapters.


def test_an_adapter_by_name(the_hub: Hub, models: Path, tmp_path: Path) -> None:
    """Its config is fetched for the plan, its weights for the merge, both as a model's are."""
    adapter, module = tmp_path / "adapter", "model.layers.2.mlp"
    adapter.mkdir()
    shapes = {"A.weight": (2, 32), "B.weight": (96, 2)}
    factors = {f"base_model.model.{module}.lora_{name}": shape for name, shape in shapes.items()}
    write_file(adapter / "adapter_model.safetensors", random_arrays(factors, 5))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 64, "target_modules": ["layers.2.mlp"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    served = {name: Model.of_folder(str(models / name[4:])) for name in ("org/one",)}
    the_hub.start(served | {"me/lora": Model.of_folder(str(adapter), revisions=("v2",))})
    plan = oxmerge.plan(
        {"merge_method": "passthrough", "models": [{"model": "org/one+me/lora@v2"}]}
    )
    assert not any(file.stat().st_size > 5000 for file in the_hub.home.rglob("*.safetensors"))
    oxmerge.merge(plan, tmp_path / "by-name")
    oxmerge.fuse(models / "one", tmp_path / "by-path", [adapter])
    ours, theirs = (weights(tmp_path / name) for name in ("by-name", "by-path"))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    the_hub.offline()
    oxmerge.fuse("org/one", tmp_path / "again", ["me/lora@v2"])
    assert weights(tmp_path / "again")["model.safetensors"] == ours["model.safetensors"]
    models_of = [{"model": "me/lora@v2", "parameters": {"weight": 1}}]
    oxmerge.merge({"merge_method": "linear", "models": models_of}, tmp_path / "alone")
    assert "# me/lora@v2 was me/lora@" in (tmp_path / "alone" / "oxmerge_recipe.yml").read_text()
