"""What several outputs of a sweep cost against as many merges.

    python benches/sweep.py --data DIR [--outputs 9]

merges the models of benches/checkpoints.py (DIR/1b) by each method once, then with as many values
of a parameter: in one pass, and one by one. Prints engine seconds, and the ratios.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import oxmerge
from oxmerge.sweeping import variants

PLACES = {"linear": "models[0].parameters.weight", "slerp": "parameters.t"}


def recipe_of(method: str, models: Path) -> str:
    """Return the recipe whose parameter is varied."""
    base = "" if method == "linear" else f"base_model: {models}/base\n"
    if method == "slerp":
        listed = f"models: [{{model: {models}/tune_a}}]\nparameters: {{t: 0.5}}\n"
    else:
        entry = "- {{model: {}, parameters: {{weight: 0.5{}}}}}\n"
        density = ", density: 0.5" if method in {"ties", "dare_ties"} else ""
        listed = "models:\n" + "".join(
            entry.format(models / name, density) for name in ("tune_a", "tune_b")
        )
    shared = "" if method in {"linear", "slerp"} else "parameters: {lambda: 1.0}\n"
    return f"merge_method: {method}\n{base}{listed}{shared}dtype: bfloat16\n"


def seconds(recipe: str, out: Path, axes: dict[str, Any]) -> tuple[float, float]:
    """Return the seconds of the sweep, and of its merges one by one."""
    together = oxmerge.sweep(recipe, str(out / "{n}"), axes)[0].seconds
    shutil.rmtree(out)
    alone = 0.0
    for variant in variants(recipe, str(out / "{n}"), axes):
        alone += oxmerge.merge(variant.recipe, variant.directory).seconds
        shutil.rmtree(out)
    return together, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--outputs", type=int, default=9)
    options = parser.parse_args()
    count = options.outputs
    print("| method | one merge, s | a sweep, s | as many merges, s | merges / sweep |")
    print("| --- | --- | --- | --- | --- |")
    for method in ("linear", "slerp", "task_arithmetic", "ties", "dare_ties"):
        recipe = recipe_of(method, options.data / "1b")
        axes = {PLACES.get(method, "parameters.lambda"): f"0.1:0.9:{count}"}
        together, alone = seconds(recipe, options.data / "sweep", axes)
        row = f"{alone / count:.2f} | {together:.2f} | {alone:.2f} | {alone / together:.2f}"
        print(f"| {method} | {row} |", flush=True)


if __name__ == "__main__":
    main()
