"""What a merge in parts costs: 1, 2 and 4 workers of one thread beside one process of as many.

    python benches/parts.py DIR [--size tiny|1b] [--rounds 5]

Both are whole processes of the command line, on the same models, in interleaved rounds. Seconds go
from the first start to the end of the last process, with `oxmerge finish`; CPU seconds are those of
all processes together, and bytes moved what they read and wrote of tensors. The table has
medians. The overhead is the CPU time that parts take more than one process, for each part,
without what it takes to start as many processes, which is that of `oxmerge --version`.
"""

from __future__ import annotations

import argparse
import json
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
    taken: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for _ in range(options.rounds):
        for workers in WORKERS:
            starts = [[*command, "--version"]] * (workers + 1)
            whole = [[*merge, f"--threads={workers}", "--json"]]
            parts = [
                [*merge, "--threads=1", f"--part={part}/{workers}"]
                for part in range(1, workers + 1)
            ]
            for name, together, last in (
                ("starts", starts, None),
                ("one process", whole, None),
                ("parts", parts, [*command, "finish", str(output), "--quiet", "--json"]),
            ):
                shutil.rmtree(output, ignore_errors=True)
                os.sync()
                taken.setdefault((name, workers), []).append(measure(together, last))
    print(f"load {os.getloadavg()[0]:.1f}, models of {model_bytes(options.size) / 1e9:.2f} GB")
    print("| threads | what | seconds | CPU seconds | GB moved | overhead of a part, CPU seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    medians = {
        case: [statistics.median(each) for each in zip(*rounds, strict=True)]
        for case, rounds in taken.items()
    }
    for workers in WORKERS:
        (_, starting, _), whole_took, parts_took = (
            medians[name, workers] for name in ("starts", "one process", "parts")
        )
        # As many processes as parts, and one that finishes; the whole has one.
        more = parts_took[1] - whole_took[1] - starting * workers / (workers + 1)
        for name, (seconds, cpu, moved), told in (
            ("one process", whole_took, ""),
            ("parts", parts_took, f"{more / workers:.2f}"),
        ):
            row = f"| {workers} | {name} | {seconds:.2f} | {cpu:.2f} | {moved / 1e9:.2f} | {told} |"
            print(row)


def measure(together: list[list[str]], last: list[str] | None) -> tuple[float, float, float]:
    """Run commands at the same time, and one after them; seconds, CPU seconds, bytes moved."""
    before, started = os.times(), time.perf_counter()
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in together]
    ended = [(process.communicate()[0], process.returncode) for process in processes]
    if last is not None:
        done = subprocess.run(last, check=False, stdout=subprocess.PIPE)
        ended.append((done.stdout, done.returncode))
    seconds, after = time.perf_counter() - started, os.times()
    if any(code for _, code in ended):
        sys.exit("a merge failed")
    cpu = after.children_user + after.children_system - before.children_user
    text = ended[-1][0]  # who finishes tells of all
    report = json.loads(text) if text.startswith(b"{") else {"bytes_read": 0, "bytes_written": 0}
    moved = report["bytes_read"] + report["bytes_written"]
    return seconds, cpu - before.children_system, moved


if __name__ == "__main__":
    main()
