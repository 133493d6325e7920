"""How fast a merge fetches its inputs, beside curl with as many ranges from the same server.

    python benches/streaming.py [BYTES [MB_A_SECOND]]

The server is a process of its own on the loopback address, and has two sparse models of as many
bytes each (1 GB). It gives each connection so many MB a second (30): it shares the processor with
what is measured, which no real server does. Prints seconds and rates of rounds that take turns, and
the ratio of the medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import oxmerge

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
RANGE = 16 << 20
ROUNDS = 3


def curl(address: str, files: list[Path], root: Path) -> float:
    """Return the seconds that curl takes for all ranges of some files, eight at a time."""
    lines = []
    for file in files:
        for start in range(0, file.stat().st_size, RANGE):
            lines += [
                f'url = "{address}/{file.relative_to(root)}"',
                f'range = "{start}-{start + RANGE - 1}"',
                'output = "/dev/null"',
                "next",
            ]
    config = root / "curl.txt"
    config.write_text("\n".join(lines[:-1]))
    command = ["curl", "--silent", "--parallel", "--parallel-max", "8", "--config", str(config)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure, and print."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000_000
    pace = (1 << 20) / 1e6 / (float(sys.argv[2]) if len(sys.argv) > 2 else 30.0)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder).resolve()
        shapes = {f"layers.{at}.weight": (4096, 4096) for at in range(max(1, size >> 25))}
        files = [root / name / "model.safetensors" for name in ("a", "b")]
        for file in files:
            write_sparse(file, shapes)
        total = sum(file.stat().st_size for file in files)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(TESTS), str(root), str(pace)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        recipe = f"merge_method: linear\nmodels:\n- model: {address}/a\n- model: {address}/b\n"
        recipe += "parameters: {weight: 0.5}\n"
        times: dict[str, list[float]] = {"curl": [], "oxmerge": []}
        try:
            for _ in range(ROUNDS):
                times["curl"].append(curl(address, files, root))
                plan = oxmerge.plan(recipe)
                report = oxmerge.merge(plan, root / "out", spool="1GB", overwrite=True)
                times["oxmerge"].append(report.seconds)
        finally:
            server.communicate()
    for name, seconds in times.items():
        rates = ", ".join(f"{total / each / 1e9:.2f}" for each in seconds)
        print(f"{name:8} {statistics.median(seconds):.2f} s; GB/s: {rates}")
    ratio = statistics.median(times["curl"]) / statistics.median(times["oxmerge"])
    print(f"oxmerge fetches {ratio:.2f} x as fast, and merges and writes besides")


if __name__ == "__main__":
    main()
