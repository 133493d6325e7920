"""What a merge in parts costs: 1, 2 and 4 workers of one thread beside one process of as many.

    python benches/parts.py DIR [--size tiny|1b] [--rounds 5]

Both are whole processes of the command line, on the same models, in interleaved rounds. Seconds go
from the first start to the end of the last process, with `oxmerge finish`; CPU seconds are those of
all processes together. What stands in the table are medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from oxmerge.demo import make_demo, model_bytes

WORKERS = (1, 2, 4)
SHARDS = 8


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=("tiny", "1b"), default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    demo = make_demo(options.directory / "models", options.size)
    output = options.directory / "merged"
    command = [sys.executable, "-m", "oxmerge"]
    shard = f"--shard-size={model_bytes(options.size) // SHARDS}"
    merge = [*command, "merge", str(demo.recipe), str(output), shard, "--quiet"]
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for workers in WORKERS:
            whole = [[*merge, f"--threads={workers}"]]
            parts = [
                [*merge, "--threads=1", f"--part={part}/{workers}"]
                for part in range(1, workers + 1)
            ]
            for name, together, last in (
                ("one process", whole, None),
                ("parts", parts, [*command, "finish", str(output), "--quiet"]),
            ):
                shutil.rmtree(output, ignore_errors=True)
                os.sync()
                taken.setdefault((name, workers), []).append(measure(together, last))
    print(f"load {os.getloadavg()[0]:.1f}, models of {model_bytes(options.size) / 1e9:.2f} GB")
    print("| threads | what | seconds | CPU seconds |")
    print("| --- | --- | --- | --- |")
    for (name, workers), rounds in sorted(taken.items(), key=lambda each: each[0][1]):
        seconds, cpu = (statistics.median(each) for each in zip(*rounds, strict=True))
        print(f"| {workers} | {name} | {seconds:.2f} | {cpu:.2f} |")


def measure(together: list[list[str]], last: list[str] | None) -> tuple[float, float]:
    """Run commands at the same time, and one after them; seconds and CPU seconds."""
    before, started = os.times(), time.perf_counter()
    processes = [subprocess.Popen(command) for command in together]
    codes = [process.wait() for process in processes]
    codes += [] if last is None else [subprocess.run(last, check=False).returncode]
    if any(codes):
        sys.exit("a merge failed")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user
    return time.perf_counter() - started, cpu - before.children_system


if __name__ == "__main__":
    main()
