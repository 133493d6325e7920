"""Merges whose output is in an object store: a real S3 server, on loopback."""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
from oxmerge.models import stores
from oxmerge.output.objects import Objects
from writers import directory_bytes, random_arrays, tuned, write_model, write_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHAPES: dict[str, tuple[int, ...]] = {f"layers.{i}.weight": (64, 100 + i) for i in range(20)}
SHAPES |= {"layers.3.bias": (70000,), "layers.9.rows": (5, 7)}
SHARD, FILES = 60_000, 8

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 0.5}},
    "model_stock": {"base": "base"},
    "metagpt": {"base": "base"},  # with numbers over the whole model
}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a real S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    with closing(urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"))):
        yield address
    server.stop()


numbers = count()


@pytest.fixture
def output(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address of which nothing is there, in the environment of users of the store."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3, "TMPDIR": str(scratch),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    stores._open.cache_clear()
    return f"s3://bucket/some merges/{next(numbers)}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two fine-tunes of it, and a recipe for each method."""
    folder = tmp_path_factory.mktemp("models")
    base = random_arrays(SHAPES, seed=0)
    for seed, name in enumerate(("base", "a", "b")):
        write_model(folder / name, tuned(base, seed) if seed else base, "BF16")
    for method, about in METHODS.items():
        write_recipe(folder / f"{method}.yml", method, ["a", "b"], **about)
    return folder


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What a merge into a directory makes by each method."""
    folder = tmp_path_factory.mktemp("whole")
    for method in METHODS:
        oxmerge.merge(models / f"{method}.yml", folder / method, shard_size=SHARD, seed=5)
    return {method: directory_bytes(folder / method) for method in METHODS}


def make(recipe: Path, output: str, part: int, parts: int, **options: Any) -> oxmerge.MergeReport:
    options = {"shard_size": SHARD, "seed": 5, "threads": 2, "wait": 60} | options
    return oxmerge.merge(recipe, output, part=(part, parts), **options)


def fetched(output: str, folder: Path) -> dict[str, bytes]:
    """Return what is in the store, but for the report."""
    for name, file in Objects.at(output).files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read(0, file.size))
    return directory_bytes(folder)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_bytes_are_those_of_a_directory(
    tmp_path: Path, models: Path, whole: Any, output: str, method: str, parts: int
) -> None:
    recipe = models / f"{method}.yml"
    with ThreadPoolExecutor(parts) as pool:
        runs = [pool.submit(make, recipe, output, at + 1, parts) for at in range(parts)]
        assert [run.result(timeout=120).directory for run in runs] == [output] * parts
    there = Objects.at(output).files()
    assert "config.json" not in there
    assert len([name for name in there if name.endswith(".safetensors")]) == FILES
    report = oxmerge.finish(output)
    assert (report.directory, report.files) == (output, FILES)
    assert fetched(output, tmp_path / "out") == whole[method]
    assert not list((tmp_path / "scratch").iterdir())


def test_one_run_makes_all(tmp_path: Path, models: Path, whole: Any, output: str) -> None:
    oxmerge.merge(models / "metagpt.yml", output, shard_size=SHARD, seed=5)
    assert fetched(output, tmp_path / "out") == whole["metagpt"]
