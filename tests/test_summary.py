"""What `plan` tells: every input tensor, what the disk moves, and how long that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
from oxmerge import merging
from oxmerge.planning.summary import bytes_moved
from writers import random_arrays, write_model, write_recipe

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS: dict[str, tuple[int, ...]] = {
    f"layers.{n}.{part}.weight": (16, 1000) for n in range(12) for part in ("up", "down")
}
BIASES: dict[str, tuple[int, ...]] = {f"layers.{n}.up.bias": (16,) for n in range(12)}
#: Bytes of a model of `WEIGHTS`, in bf16.
SIZE = 24 * 16_000 * 2


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, one of which has biases."""
    folder = tmp_path_factory.mktemp("shelf")
    shapes = {"a": WEIGHTS, "b": {**WEIGHTS, **BIASES}, "base": WEIGHTS}
    for seed, (name, each) in enumerate(shapes.items()):
        write_model(folder / name, random_arrays(each, seed), "BF16")
    return folder


def plan_of(folder: Path, method: str, *, base: str | None = None) -> oxmerge.Plan:
    each = {"weight": 1.0, "density": 0.5} if method == "ties" else {"weight": 1.0}
    return oxmerge.plan(
        write_recipe(folder / "r.yml", method, ["a", "b"], base=base, each=each), memory="4GiB"
    )


def inputs(plan: oxmerge.Plan) -> list[str]:
    lines = str(plan).splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("inputs"))
    return [line[10:] for line in lines[first:]]


def test_dropped_tensors_are_told_with_the_reason_and_folded(shelf: Path) -> None:
    assert inputs(plan_of(shelf, "linear")) == [
        "a: 24 tensors, 24 merged",
        "b: 36 tensors, 24 merged, 12 dropped",
        "  dropped: the donor `a` does not have it (12)",
        "    layers.{0..11}.up.bias",
    ]


def test_a_notebook_shows_the_summary(shelf: Path) -> None:
    plan = plan_of(shelf, "linear")
    assert repr(plan) == str(plan)


def test_a_model_that_is_dropped_whole_is_not_listed(shelf: Path) -> None:
    assert inputs(plan_of(shelf, "linear", base="base"))[-2:] == [
        "base: 24 tensors, 24 dropped",
        "  dropped: the model is no input, it gives names and config (24)",
    ]


def test_the_data_has_every_tensor(shelf: Path) -> None:
    weights = ["layers.{0..11}.up.weight", "layers.{0..11}.down.weight"]
    dropped = {"the donor `a` does not have it": ["layers.{0..11}.up.bias"]}
    told = plan_of(shelf, "linear").as_dict()
    assert told["inputs"] == [
        {"model": "a", "tensors": 24, "merged": weights, "copied": [], "dropped": {}},
        {"model": "b", "tensors": 36, "merged": weights, "copied": [], "dropped": dropped},
    ]
    assert told["accounting"] == {"merged": 48, "copied": 0, "dropped": 12}


def test_what_is_read_once_is_moved_once(shelf: Path) -> None:
    plan = plan_of(shelf, "linear")
    assert plan.prediction.reread_bytes is None
    assert bytes_moved(plan) == 3 * SIZE
    assert f"reads     {2 * SIZE / 1e6:.2f} MB: one read of every input\n" in str(plan)


@pytest.mark.parametrize(
    ("free", "again", "reads", "least"),
    [
        (1 << 40, 0, ", again from the page cache\n", ""),
        (1 << 10, 3 * SIZE, ", 2.3 MB again from the disk each time: more than", "at least "),
    ],
)
def test_what_is_read_again_is_counted_where_memory_cannot_keep_it(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, free: int, again: int, reads: str, least: str
) -> None:
    monkeypatch.setattr(merging, "_free_memory", lambda: free)
    plan = plan_of(shelf, "ties", base="base")
    assert plan.prediction.reread_bytes == plan.as_dict()["reread_bytes"] == again
    assert bytes_moved(plan) == 4 * SIZE + again
    assert f"one to four reads of every input{reads}" in str(plan)
    assert f"\ntime      {least}0.0 s where the disk moves 1 GB/s, " in str(plan)


@pytest.mark.parametrize("option", ["memory", "vram"])
def test_what_is_no_size_is_refused_before_anything_is_read(option: str) -> None:
    options: dict[str, Any] = {"device": "torch", option: "much"}
    with pytest.raises(ValueError, match="not a size: 'much'"):
        oxmerge.plan("nowhere.yml", **options)
    with pytest.raises(ValueError, match="not a size: 'much'"):
        oxmerge.merge("nowhere.yml", "out", **options)
