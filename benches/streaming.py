"""What it takes to fetch the inputs of a merge, beside curl with as many ranges.

    python benches/streaming.py [--bytes N] [--pace MB] [--spool SIZE] [--rounds N] [--hub]

The server is a process of its own on the loopback address, and has two models of N bytes each
(1 GB). It gives each connection so many MB a second (30): it shares the processor with what is
measured, which no real server does. `--pace 0` has it give all that it can. With `--hub` it speaks
the Hub's protocol, and the digests of the files are checked besides.

Prints rates of rounds that take turns, the processor time of each side, also of a merge of the
same files by their paths, the most that the spool took on the disk, and whether the outputs have
the same bytes. It needs six times N on the disk of the working directory.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import oxmerge
from oxmerge.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))
from writers import write_sparse  # noqa: E402 - it lies with the tests

SERVER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from range_server import serve
with serve(Path(sys.argv[2])) as server:
    server.seconds_a_mib = float(sys.argv[3])
    print(server.address, flush=True)
    sys.stdin.read()
"""
HUB = """
import sys, time
from oxmerge.demo_hub import Handler, HubServer, Model, serving

class Paced(Handler):
    def send_bytes(self, file, start, stop):
        for at in range(start, stop, 1 << 20):
            self.connection.sendfile(file, at, min(1 << 20, stop - at))
            time.sleep(float(sys.argv[3]))

models = {f"org/{name}": Model.of_folder(f"{sys.argv[2]}/{name}") for name in "ab"}
with serving(HubServer(models), Paced) as hub:
    print(hub.address, flush=True)
    sys.stdin.read()
"""
RANGE = 16 << 20
TICKS = os.sysconf("SC_CLK_TCK")
RECIPE = (
    "merge_method: linear\nmodels:\n- model: {0}/a\n- model: {0}/b\nparameters: {{weight: 0.5}}\n"
)


@dataclass
class Taken:
    """What something took: seconds, and those of processors, its own and the server's."""

    wall: float
    own: float
    server: float


def write(path: Path, size: int, seed: int) -> None:
    """Write a model of about so many bytes, of numbers in (-2, 2)."""
    shapes = {f"layers.{at}.weight": (4096, 4096) for at in range(max(1, size >> 25))}
    write_sparse(path, shapes)
    block = np.random.default_rng(seed).integers(0, 1 << 16, 1 << 24, np.uint16) & 0xBFFF
    with path.open("r+b") as file:
        file.seek(-len(shapes) * block.nbytes, os.SEEK_END)
        for at in range(len(shapes)):
            np.roll(block, at * 97).tofile(file)


def curl(urls: list[str], size: int, config: Path) -> None:
    """Fetch all ranges of files of `size` bytes with curl, eight at a time, to nowhere."""
    ranges = [f"{start}-{min(start + RANGE, size) - 1}" for start in range(0, size, RANGE)]
    own = 'output = "/dev/null"\nlocation\nfail\n'
    each = [f'url = "{url}"\nrange = "{span}"\n{own}' for url in urls for span in ranges]
    config.write_text("next\n".join(each))
    command = ["curl", "--silent", "--parallel", "--parallel-max", "8", "--config", str(config)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def processor_time(server: int) -> tuple[float, float]:
    """Return the seconds of processors of this process and those it waited for, and of a server."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return sum(each.ru_utime + each.ru_stime for each in own), ticks / TICKS


@contextmanager
def timed(server: int, taken: list[Taken]) -> Iterator[None]:
    started, (own, other) = time.perf_counter(), processor_time(server)
    yield
    wall, (own_after, other_after) = time.perf_counter() - started, processor_time(server)
    taken.append(Taken(wall, own_after - own, other_after - other))


@contextmanager
def largest_spool(folder: Path) -> Iterator[list[int]]:
    """Look ten times a second how much of a disk the open files without a name take.

    Yields a list whose only number is the most that was seen.
    """
    most, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            seen = 0
            for descriptor in os.listdir("/proc/self/fd"):
                with suppress(OSError):
                    path = f"/proc/self/fd/{descriptor}"
                    target = os.readlink(path)
                    if target.startswith(str(folder)) and target.endswith(" (deleted)"):
                        seen += os.stat(path).st_blocks * 512
            most[0] = max(most[0], seen)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bytes", type=parse_size, default=1_000_000_000)
    parser.add_argument("--pace", type=float, default=30.0)
    parser.add_argument("--spool", default="1GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hub", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure, and print."""
    options = arguments()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder).resolve()
        files = [root / name / "model.safetensors" for name in ("a", "b")]
        for seed, file in enumerate(files):
            write(file, options.bytes, seed)
        pace = (1 << 20) / 1e6 / options.pace if options.pace else 0.0
        server = subprocess.Popen(
            [sys.executable, "-c", HUB if options.hub else SERVER, TESTS, root, str(pace)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        recipe, urls = RECIPE.format(address), [f"{address}/{n}/model.safetensors" for n in "ab"]
        if options.hub:
            os.environ |= {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(root / "cache")}
            recipe = RECIPE.format("org")
            urls = [f"{address}/org/{n}/resolve/main/model.safetensors" for n in "ab"]
        try:
            compare(options, recipe, urls, root, server.pid)
        finally:
            server.communicate()


def compare(
    options: argparse.Namespace, recipe: str, urls: list[str], root: Path, server: int
) -> None:
    """Let curl and merges take turns; print what they took."""
    size = (root / "a" / "model.safetensors").stat().st_size
    taken: dict[str, list[Taken]] = {"curl": [], "oxmerge": [], "by paths": []}
    largest = 0
    for _ in range(options.rounds):
        with timed(server, taken["curl"]):
            curl(urls, size, root / "curl.txt")
        plan = oxmerge.plan(recipe)
        with largest_spool(root) as most, timed(server, taken["oxmerge"]):
            oxmerge.merge(plan, root / "out", stream=True, spool=options.spool, overwrite=True)
        largest = max(largest, most[0])
        with timed(server, taken["by paths"]):
            oxmerge.merge(RECIPE.format(root), root / "local", overwrite=True)
    total = len(urls) * size / 1e9
    for name, each in taken.items():
        wall, own, other = (
            statistics.median(getattr(one, what) for one in each)
            for what in ("wall", "own", "server")
        )
        print(
            f"{name:8} {total / wall:.2f} GB/s; processor seconds a GB: "
            f"{own / total:.2f}, of the server {other / total:.2f}"
        )
    seconds = {name: statistics.median(one.wall for one in each) for name, each in taken.items()}
    print(f"oxmerge fetches {seconds['curl'] / seconds['oxmerge']:.2f} x as fast as curl")
    streamed, local = (root / name / "model.safetensors" for name in ("out", "local"))
    told = "the same" if filecmp.cmp(streamed, local, shallow=False) else "OTHER"
    print(f"the spool took {largest / 1e6:.0f} MB at the most; the outputs have {told} bytes")


if __name__ == "__main__":
    main()
