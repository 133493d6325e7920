"""Merges on a Ray cluster of several nodes, which are processes of this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
import s3_server
from oxmerge.errors import OxmergeError
from oxmerge.models import stores
from oxmerge.options import RunOptions
from oxmerge.output.objects import Objects
from writers import directory_bytes, random_arrays, tuned, write_model, write_recipe, write_sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

ray = pytest.importorskip("ray", reason="not installed: ray (see the dependency group `test`)")

# Ray's own warnings are not ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is on a full disk, as one node has it."""
    return tmp_path_factory.mktemp("full_disk")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, full_disk: Path) -> Iterator[Any]:
    """A cluster of three nodes. One of them has no models of the Hub, and a disk that is full."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("caches")
    faults = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", faults, source, "-ldl"], check=True)
    full, empty = folder / "full", folder / "empty"
    write_hub_model(full)
    python = str(Path(oxmerge.__file__).parent.parent)
    with pytest.MonkeyPatch.context() as patch, s3_server.serve() as s3:
        for name, value in s3_server.environment(s3).items():
            patch.setenv(name, value)
        stores._open.cache_clear()  # of other tests, at their servers
        patch.setenv("HF_HUB_CACHE", str(full))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("LD_PRELOAD", str(faults))
        patch.setenv("RAY_LD_PRELOAD_ON_WORKERS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([python, os.environ.get("PYTHONPATH", "")]))
        made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        made.add_node(**NODE)
        made.add_node(**NODE, env_vars={"HF_HUB_CACHE": str(empty), "FAULTS_FULL": str(full_disk)})
        ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


def write_hub_model(cache: Path) -> None:
    """Put a model into a cache of the Hub, as the Hub's library does."""
    model = cache / "models--people--tune"
    write_model(model / "snapshots" / COMMIT, tuned(random_arrays(shapes(), 0), 1), "BF16")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)


def shapes() -> dict[str, tuple[int, ...]]:
    return {f"layers.{i}.weight": (64, 100 + i) for i in range(20)}


@pytest.mark.parametrize("method", ["linear", "metagpt"])
def test_bytes_are_those_of_one_run(tmp_path: Path, cluster: Any, method: str) -> None:
    """Also where a node lacks a model: its parts are made by the others."""
    write_model(tmp_path / "base", random_arrays(shapes(), 0), "BF16")
    write_model(tmp_path / "b", tuned(random_arrays(shapes(), 0), 2), "BF16")
    about: dict[str, Any] = {"base": "base"} if method == "metagpt" else {"each": {"weight": 0.5}}
    recipe = write_recipe(tmp_path / "r.yml", method, ["people/tune", "b"], **about)
    oxmerge.merge(recipe, tmp_path / "one", shard_size=40_000)
    shown: list[oxmerge.merging.Snapshot] = []
    report = oxmerge.merge(
        recipe, tmp_path / "ray", shard_size=40_000, ray=True, parts=5, progress=shown.append
    )
    assert directory_bytes(tmp_path / "ray") == directory_bytes(tmp_path / "one")
    assert "made in 5 parts on 1 machine" in report.notes
    assert shown[-1].bytes_total == report.bytes_written
    host = os.uname().nodename
    assert any(re.search(rf"{re.escape(host)} [\d.]+ .?B/s", each.tensor) for each in shown)
    # A job that is begun again has nothing to do, also in another number of parts.
    again = oxmerge.merge(recipe, tmp_path / "ray", shard_size=40_000, ray=True, parts=3)
    assert (again.files, len(again.notes)) == (0, 1)
    # What one node lacks is told, with the node.
    lacked = [note for note in report.notes if "was made elsewhere" in note]
    assert all(f"failed on {host} (node " in note and "people/tune" in note for note in lacked)


def test_a_disk_is_full_on_one_node(tmp_path: Path, cluster: Any, full_disk: Path) -> None:
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, random_arrays(shapes(), seed), "BF16")
    recipe = write_recipe(tmp_path / "r.yml", "linear", ["a", "b"], each={"weight": 0.5})
    oxmerge.merge(recipe, tmp_path / "one", shard_size=40_000)
    report = oxmerge.merge(recipe, full_disk / "out", shard_size=40_000, ray=True, parts=6)
    assert directory_bytes(full_disk / "out") == directory_bytes(tmp_path / "one")
    told = [note for note in report.notes if "was made elsewhere" in note]
    assert told
    for note in told:
        assert f"failed on {os.uname().nodename} (node " in note
        assert "No space left on device" in note
        assert str(full_disk / "out") in note


def test_nodes_that_share_a_store_alone(tmp_path: Path, cluster: Any) -> None:
    """With numbers over the whole model, which parts leave for each other there."""
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, random_arrays(shapes(), seed), "BF16")
    recipe = write_recipe(tmp_path / "r.yml", "metagpt", ["a", "b"], base="base")
    oxmerge.merge(recipe, tmp_path / "one", shard_size=150_000)
    report = oxmerge.merge(recipe, "s3://bucket/merged", shard_size=150_000, ray=True, parts=2)
    assert report.directory == "s3://bucket/merged"
    (tmp_path / "out").mkdir()
    for name, file in Objects.at("s3://bucket/merged").files().items():
        (tmp_path / "out" / name).write_bytes(file.read(0, file.size))
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "one")


@pytest.mark.parametrize("is_in_store", [False, True])
def test_several_merges(tmp_path: Path, cluster: Any, *, is_in_store: bool) -> None:
    """Tasks end that wait for an earlier merge, and are begun again: they need no node to wait."""
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, random_arrays(shapes(), seed), "BF16")
    first = (
        "name: first\nmerge_method: metagpt\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    )
    last = "merge_method: slerp\nbase_model: first\nmodels: [{model: first}, {model: b}]\n"
    (tmp_path / "r.yml").write_text(f"{first}---\n{last}parameters: {{t: 0.3}}\n")
    oxmerge.merge(tmp_path / "r.yml", tmp_path / "one", shard_size=150_000)
    output = "s3://bucket/several" if is_in_store else str(tmp_path / "out")
    oxmerge.merge(tmp_path / "r.yml", output, shard_size=150_000, ray=True, parts=2)
    if is_in_store:
        (tmp_path / "out").mkdir()
        for name, file in Objects.at(output).files().items():
            (tmp_path / "out" / name).write_bytes(file.read(0, file.size))
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "one")


@pytest.mark.parametrize(
    ("device", "gpus"), [("cpu", 0), ("torch", 0), ("auto", 0), ("cuda", 1), ("cuda:1", 1)]
)
def test_what_a_task_asks_for(device: str, gpus: int) -> None:
    from oxmerge.on_ray import resources_of

    running = RunOptions(memory="2GiB", threads=3, device=device)
    asked = resources_of(running, cpus=8)
    assert asked == {"num_cpus": 3, "num_gpus": gpus, "memory": 2 << 30, "max_retries": 3}
    assert ray.remote(shapes).options(**asked)  # which refuses what it does not know
    assert resources_of(RunOptions(threads=16), cpus=8)["num_cpus"] == 8
    assert resources_of(RunOptions(), cpus=8)["memory"] == 256 << 20


def test_a_cluster_that_has_no_nodes_yet_is_asked_for_one() -> None:
    from oxmerge.on_ray import parts_for

    assert [parts_for(8, nodes) for nodes in (0, 1, 3, 9)] == [1, 2, 6, 8]


def test_a_cluster_that_cannot_be_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "a", random_arrays({"x": (8, 8)}, 0), "BF16")
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", ["a"])
    # A port that nobody listens at: it is bound, and stays so.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with monkeypatch.context() as context:
            context.setattr(ray, "is_initialized", lambda: False)
            with pytest.raises(OxmergeError, match="at this address") as caught:
                oxmerge.merge(recipe, tmp_path / "out", ray=address)
    assert "Connection refused" in str(caught.value.found)
    for host in ("head..node", "h" * 64):  # no names of hosts
        with monkeypatch.context() as context:
            context.setattr(ray, "is_initialized", lambda: False)
            with pytest.raises(OxmergeError, match="at this address") as caught:
                oxmerge.merge(recipe, tmp_path / "out", ray=f"{host}:6379")
        assert str(caught.value.found).startswith(f"{host}:6379: ")

    def refuse(**_: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 1.0.0")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(OxmergeError, match="can connect to") as caught:
        oxmerge.merge(recipe, tmp_path / "out", ray="auto")
    assert str(caught.value.found).endswith("was started with: Ray: 1.0.0")


def test_a_model_that_no_node_has_is_told(tmp_path: Path, cluster: Any) -> None:
    write_model(tmp_path / "a", random_arrays(shapes(), 0), "BF16")
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", ["a"])
    plan = oxmerge.plan(recipe)
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(OxmergeError) as caught:
        oxmerge.merge(plan, tmp_path / "out", ray=True)
    assert any("failed on 3 of 3 nodes" in note for note in caught.value.__notes__)


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, cluster: Any) -> None:
    recipe, output = write_large(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "oxmerge", "merge", str(recipe), str(output)]
    command += ["--shard-size=20MB", "--threads=1", "--parts=4", f"--ray={cluster.address}"]
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600
    while not list(output.rglob("*.done")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=600)
    assert process.returncode == 130, text
    assert "the same command goes on from there" in text
    assert not (output / "config.json").exists()
    # What is made is not made again: the files stay the same ones.
    inodes = {path.stat().st_ino for path in output.rglob(".model*")}
    options: dict[str, Any] = {"shard_size": "20MB", "threads": 1}
    oxmerge.merge(recipe, output, ray=True, parts=4, **options)
    assert inodes & {path.stat().st_ino for path in output.glob("model*")}
    shutil.rmtree(tmp_path)


def write_large(folder: Path) -> Path:
    """Write models that are merged in seconds, and a recipe for them."""
    for name in ("base", "a", "b"):
        sparse = {f"layers.{i}": (1 << 9, 1 << 12) for i in range(24)}
        write_sparse(folder / name / "model.safetensors", sparse)
        (folder / name / "config.json").write_text('{"model_type": "test"}')
    each = {"weight": 0.5, "density": 0.5}
    return write_recipe(folder / "r.yml", "ties", ["a", "b"], base="base", each=each)


def test_a_node_is_killed_in_the_middle(tmp_path: Path, cluster: Any) -> None:
    """Last, since the cluster has a node less afterwards."""
    recipe = write_large(tmp_path)
    killed: list[Any] = []

    def kill(snapshot: oxmerge.merging.Snapshot) -> None:
        if snapshot.bytes_done > 0 and not killed:
            killed.append(cluster.worker_nodes.copy().pop())
            cluster.remove_node(killed[0], allow_graceful=False)

    options: dict[str, Any] = {"shard_size": "20MB", "threads": 1}
    oxmerge.merge(recipe, tmp_path / "ray", ray=True, parts=6, progress=kill, **options)
    assert killed
    oxmerge.merge(recipe, tmp_path / "one", **options)
    assert directory_bytes(tmp_path / "ray") == directory_bytes(tmp_path / "one")
    shutil.rmtree(tmp_path)


def test_what_ray_does_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass ray"):
        oxmerge.merge("r.yml", tmp_path, parts=2)
