"""The output depends on the recipe, the inputs, the seed and the shard size, on nothing else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oxmerge import _core
from oxmerge.errors import MemoryBudgetError
from oxmerge.planning.planner import build_plan
from oxmerge.recipe.recipe import Recipe
from writers import (
    directory_bytes,
    evict,
    random_arrays,
    tuned,
    write_model,
    write_recipe,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

LEVELS = oxmerge.build_info()["simd_available"]

#: Arguments of `write_recipe`, the models being a, b and c.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "models": "abc", "each": {"weight": 0.3}},
    "linear_in_f64": {
        "method": "linear",
        "models": "ab",
        "each": {"weight": 0.7},
        "dtype": "float64",
    },
    "passthrough": {"method": "passthrough", "models": "a"},
    "task_arithmetic": {"method": "task_arithmetic", "models": "ab", "base": True},
    "slerp": {"method": "slerp", "models": "a", "base": True, "shared": {"t": 0.3}},
    "ties_0.05": {"method": "ties", "models": "abc", "base": True, "each": {"density": 0.05}},
    "ties_0.5": {"method": "ties", "models": "abc", "base": True, "each": {"density": 0.5}},
    "ties_0.99": {"method": "ties", "models": "ac", "base": True, "each": {"density": 0.99}},
    "dare_linear": {
        "method": "dare_linear",
        "models": "ab",
        "base": True,
        "each": {"density": 0.4},
    },
    "dare_ties": {"method": "dare_ties", "models": "abc", "base": True, "each": {"density": 0.3}},
    "della": {"method": "della", "models": "abc", "base": True, "each": {"density": 0.4}},
    "della_linear": {
        "method": "della_linear",
        "models": "ab",
        "base": True,
        "each": {"density": 0.6, "epsilon": 0.05},
        "shared": {"rescale": False},
    },
    "cabs": {
        "method": "cabs",
        "models": "abc",
        "base": True,
        "each": {"n": 5},
        "shared": {"m": 16},
    },
    "nuslerp": {"method": "nuslerp", "models": "ab", "base": True},
    "nuslerp_rows": {"method": "nuslerp", "models": "ab", "shared": {"nuslerp_flatten": False}},
    "nuslerp_columns": {
        "method": "nuslerp",
        "models": "ab",
        "shared": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "breadcrumbs": {
        "method": "breadcrumbs",
        "models": "ab",
        "base": True,
        "each": {"density": 0.6, "gamma": 0.1},
    },
    "breadcrumbs_ties": {
        "method": "breadcrumbs_ties",
        "models": "abc",
        "base": True,
        "each": {"density": 0.3, "gamma": 0.05},
        "shared": {"rescale": True},
    },
    "multislerp": {"method": "multislerp", "models": "abc", "base": True},
    "multislerp_without_base": {"method": "multislerp", "models": "abc"},
    "karcher": {"method": "karcher", "models": "abc"},
    "model_stock": {"method": "model_stock", "models": "abc", "base": True},
    "model_stock_rows": {
        "method": "model_stock",
        "models": "ab",
        "base": True,
        "shared": {"filter_wise": True},
    },
    "sce": {"method": "sce", "models": "abc", "base": True, "shared": {"select_topk": 0.3}},
    "sce_all": {"method": "sce", "models": "ab", "base": True},
    "nearswap": {"method": "nearswap", "models": "a", "base": True, "shared": {"t": 0.001}},
    "arcee_fusion": {"method": "arcee_fusion", "models": "a", "base": True},
    "ram": {"method": "ram", "models": "abc", "base": True},
    "ramplus_tl": {
        "method": "ramplus_tl",
        "models": "abc",
        "base": True,
        "shared": {"epsilon": 0.001, "r": 0.2, "alpha": 0.3},
    },
    "soup": {"method": "soup", "models": "abc"},
    "ema": {"method": "ema", "models": "abc", "shared": {"decay": 0.7}},
    "geometric_median": {"method": "geometric_median", "models": "abc", "base": True},
    "consensus_ta": {"method": "consensus_ta", "models": "abc", "base": True},
    "magmax": {"method": "magmax", "models": "abc", "base": True},
    "emr": {"method": "emr", "models": "abc", "base": True, "shared": {"lambda": 0.8}},
    "metagpt": {"method": "metagpt", "models": "abc", "base": True},
    "nan": {"method": "nan", "models": "abc", "base": True},
    "expo": {"method": "expo", "models": "a", "base": True},
    "pcb": {"method": "pcb", "models": "abc", "base": True, "each": {"density": 0.3}},
}

SETTINGS: dict[str, dict[str, Any]] = {
    "1 thread": {"threads": 1},
    "2 threads, mapped": {"threads": 2, "read_path": "mapped"},
    "5 threads, positioned": {"threads": 5, "read_path": "positioned"},
    "least memory, mapped": {"memory": None, "read_path": "mapped"},
    "least memory, positioned": {"memory": None, "read_path": "positioned"},
    "1 block": {"largest_piece": 1, "threads": 5},
    "2 blocks, no direct writes": {"largest_piece": 2, "direct": False},
    "9 blocks, mapped": {"largest_piece": 9, "read_path": "mapped", "threads": 2},
    "no direct writes": {"direct": False},
    **{f"{level} instructions": {"level": level} for level in LEVELS},
}


def test_every_method_is_among_the_cases() -> None:
    assert {case["method"] for case in METHODS.values()} == {row["name"] for row in _core.methods()}


def weights_of(method: str) -> dict[str, float]:
    """Return a weight for each model, if the method takes one."""
    row = next(row for row in _core.methods() if row["name"] == method)
    return {"weight": 0.4} if any(each["name"] == "weight" for each in row["parameters"]) else {}


def recipe_of(folder: Path, family: Path, name: str) -> Path:
    options = dict(METHODS[name])
    models = [family / model for model in options.pop("models")]
    base = family / "base" if options.pop("base", False) else None
    each = weights_of(options["method"]) | options.pop("each", {})
    return write_recipe(folder / f"{name}.yml", models=models, base=base, each=each, **options)


def least_memory(plan: _core.Plan) -> int:
    """Return the least budget that will do, in this process as it is now."""
    with pytest.raises(MemoryBudgetError) as caught:
        _core.predict([plan], 1, 1)
    found = re.fullmatch(r"at least (\d+) MiB", caught.value.expected or "")
    assert found is not None
    return int(found[1]) << 20


def shards_of(
    plan: _core.Plan, directory: Path, *, level: str | None = None, **options: Any
) -> Any:
    """Execute a plan; the bytes of the shards, what is known of tensors, and the report."""
    directory.mkdir()
    if options.get("memory", ...) is None:
        options["memory"] = least_memory(plan)
    with pytest.MonkeyPatch.context() as patch:
        if level is not None:
            patch.setenv("OXMERGE_SIMD", level)
        report = _core.execute([(plan, directory)], digests=True, **{"memory": 4 << 30, **options})
    if level is not None:
        assert report["simd"] == level
    known: list[bytes] = []
    plan.write_tensors(known.append, report["digests"][0])
    return {**directory_bytes(directory), "tensors": b"".join(known)}, report


@pytest.fixture(scope="module", params=METHODS)
def case(
    request: pytest.FixtureRequest, family: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[_core.Plan, dict[str, bytes]]:
    """A plan, and the shards that it gives with the default settings."""
    folder = tmp_path_factory.mktemp("case")
    recipe = Recipe.from_yaml(recipe_of(folder, family, request.param))
    plan = build_plan(recipe, seed=7, shard_size=6_500_000).table
    shards, _ = shards_of(plan, folder / "reference")
    assert shards
    return plan, shards


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_change_no_byte(
    tmp_path: Path, case: tuple[_core.Plan, dict[str, bytes]], name: str
) -> None:
    plan, expected = case
    shards, report = shards_of(plan, tmp_path / "out", **SETTINGS[name])
    assert shards == expected
    if SETTINGS[name].get("memory", ...) is None:
        assert report["memory"]["worker_bytes"] < 6 << 20


def test_inputs_on_the_disk_give_the_same(
    tmp_path: Path, case: tuple[_core.Plan, dict[str, bytes]], family: Path
) -> None:
    plan, expected = case
    evict(family)
    assert shards_of(plan, tmp_path / "out")[0] == expected


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small tensors of few kinds and all sorts: random, equal in all models, constant, NaN."""
    folder = tmp_path_factory.mktemp("neighbours")
    shapes = {f"{number:02}": [(8, 16), (5,), (64, 33)][number % 3] for number in range(36)}
    base = random_arrays(shapes, seed=0)
    for seed, name in enumerate(["base", *"abc"]):
        tensors = tuned(base, seed, 1e-3 * seed)
        for number, values in enumerate(tensors.values()):
            if number % 12 in (3, 4):
                values[...] = base[f"{number:02}"]
            elif number % 12 == 7:
                values[...] = number + seed
            elif number % 12 == 9:
                values.flat[:: 3 + seed] = np.nan
        write_model(folder / name, tensors, "BF16")
    return folder


#: Not those of sums over the model, which make every tensor by itself.
ALONE = [name for name in METHODS if name not in {"metagpt", "nan"}]


@pytest.mark.parametrize("name", [*ALONE, "ties, nothing kept"])
def test_small_neighbours_are_made_as_each_alone(
    tmp_path: Path, neighbours: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    nothing = {**METHODS["ties_0.5"], "each": {"density": 0.0}}
    monkeypatch.setitem(METHODS, "ties, nothing kept", nothing)
    recipe = recipe_of(tmp_path, neighbours, name)
    oxmerge.merge(recipe, tmp_path / "out", threads=2)
    alone = oxmerge.lazy(recipe)
    with oxmerge.open(tmp_path / "out") as together:
        assert set(together) == set(alone)
        for each in together:
            assert together[each][...].tobytes() == alone[each][...].tobytes(), each


@pytest.mark.parametrize("name", ["linear", "ties_0.5", "dare_ties", "nuslerp_columns"])
def test_the_whole_directory_is_the_same(tmp_path: Path, family: Path, name: str) -> None:
    recipe = recipe_of(tmp_path, family, name)
    plan = build_plan(Recipe.from_yaml(recipe)).table
    one, other = tmp_path / "one", tmp_path / "other"
    common: dict[str, Any] = {"seed": 3, "shard_size": "5MB"}
    oxmerge.merge(recipe, one, threads=5, memory="4GiB", read_path="positioned", **common)
    # What has been used since is resident as well.
    memory = least_memory(plan) + (8 << 20)
    report = oxmerge.merge(recipe, other, threads=1, memory=memory, read_path="mapped", **common)
    assert report.files == 2
    assert directory_bytes(one) == directory_bytes(other)
    expected = {"config.json", "model.safetensors.index.json", "README.md"}
    assert expected <= directory_bytes(one).keys()


def test_what_counts_does_change_bytes(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "dare_ties")
    changes: dict[str, Any] = {"0": {}, "1": {"seed": 1}, "2": {"shard_size": "1MB"}}
    for name, options in changes.items():
        oxmerge.merge(recipe, tmp_path / name, memory="4GiB", **options)
    first, other_seed, other_size = (directory_bytes(tmp_path / name) for name in "012")
    assert first.keys() == other_seed.keys() != other_size.keys()
    assert first["model.safetensors"] != other_seed["model.safetensors"]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    options=st.fixed_dictionaries(
        {
            "threads": st.integers(1, 9),
            "read_path": st.sampled_from(["auto", "mapped", "positioned"]),
            "largest_piece": st.none() | st.integers(1, 70),
            "direct": st.booleans(),
            "extra": st.integers(0, 64 << 20),
            "level": st.sampled_from([None, *LEVELS]),
        }
    )
)
def test_random_settings_change_no_byte(
    tmp_path_factory: pytest.TempPathFactory, family: Path, options: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("random")
    plan = build_plan(Recipe.from_yaml(recipe_of(folder, family, "ties_0.5"))).table
    expected, _ = shards_of(plan, folder / "reference")
    memory = least_memory(plan) + (8 << 20) + options.pop("extra")
    shards, _ = shards_of(plan, folder / "out", memory=memory, **options)
    assert shards == expected


def test_a_level_that_the_machine_lacks_is_refused(
    tmp_path: Path, case: tuple[_core.Plan, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OXMERGE_SIMD", "mmx")
    with pytest.raises(oxmerge.OxmergeError, match="mmx"):
        _core.execute([(case[0], tmp_path)], memory=4 << 30)
    assert not list(tmp_path.iterdir())
