"""The budget holds, and the peak is what was predicted: measured by the process itself.

Inputs are holes in sparse files, but for the places where a selection takes its sample: random
numbers there make it use whole histograms.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from memory_group import memory_group
from oxmerge.demo import LINEAR, SIZES, make_demo
from writers import (
    evict,
    random_arrays,
    to_bf16,
    write_experts,
    write_model,
    write_recipe,
    write_sparse,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memory_group import Group

pytestmark = pytest.mark.slow

MIB = 1 << 20
BUDGET = 56 * MIB
ROW = 4096
#: Eight times the budget in bf16.
SHAPE = (8 * BUDGET // 2 // ROW, ROW)

CHILD = """
import json, sys
import oxmerge
recipe, directory, memory, read_path, threads = sys.argv[1:]
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
mapped = []
report = oxmerge.merge(
    recipe,
    directory,
    memory=int(memory),
    read_path=read_path,
    threads=int(threads) or None,
    allow_methods=["written_methods"],
    progress=lambda _: mapped.append(status("RssFile")),
)
print(json.dumps({**report.as_dict(), "measured": status("VmHWM"), "mapped": mapped}))
"""

#: Arguments of `write_recipe`, and how many models.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "linear, 2": (2, {"method": "linear", "each": {"weight": 1}}),
    "linear, 10": (10, {"method": "linear", "each": {"weight": 1}}),
    "slerp": (1, {"method": "slerp", "base": True, "shared": {"t": 0.3}}),
    "ties, 2": (2, {"method": "ties", "base": True, "each": {"weight": 1, "density": 0.5}}),
    "ties, 5": (5, {"method": "ties", "base": True, "each": {"weight": 1, "density": 0.5}}),
    "rows": (
        2,
        {"method": "nuslerp", "each": {"weight": 1}, "shared": {"nuslerp_flatten": False}},
    ),
    "columns": (
        2,
        {
            "method": "nuslerp",
            "each": {"weight": 1},
            "shared": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        },
    ),
}


def merge(
    recipe: Path,
    *,
    memory: int = BUDGET,
    read_path: str = "auto",
    threads: int = 0,
    group: Group | None = None,
) -> subprocess.CompletedProcess[str]:
    """Merge in a process of its own, which prints the report and its peak."""
    arguments = (recipe, recipe.parent / "out", memory, read_path, threads)
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
        preexec_fn=None if group is None else group.enter,
    )


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def check(report: dict[str, Any]) -> None:
    """Check the peak against budget and prediction."""
    peak, predicted = report["measured"], report["predicted_memory"]
    assert peak <= report["memory"]
    assert abs(peak - predicted) <= 0.15 * predicted, f"{peak / MIB:.1f} of {predicted / MIB:.1f}"
    # The system counts pages a thread, and adds them up now and then.
    assert report["peak_memory"] <= peak + MIB


def write_sampled(path: Path, seed: int) -> None:
    """Write a sparse model with numbers where the engine's sample looks: 512 places."""
    write_sparse(path, {"x.weight": SHAPE})
    generator = np.random.default_rng(seed)
    elements = SHAPE[0] * SHAPE[1]
    start = path.stat().st_size - 2 * elements
    with path.open("r+b") as file:
        for place in range(512):
            file.seek(start + 2 * (place * (elements // 512)))
            file.write(to_bf16(generator.standard_normal(256, np.float32)).tobytes())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Eleven models of one tensor of eight times the budget."""
    folder = tmp_path_factory.mktemp("large")
    for index in range(11):
        write_sampled(folder / str(index) / "model.safetensors", index)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed, with what was merged into it."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("name", "read_path"),
    [
        # A few models with one thread, so that mapped pieces have room.
        ("linear, 2", "mapped"),
        ("linear, 2", "positioned"),
        ("linear, 10", "mapped"),
        ("linear, 10", "positioned"),
        # `CLASSES` has these for fewer models.
        ("ties, 5", "positioned"),
        ("rows", "mapped"),
        ("columns", "positioned"),
    ],
)
def test_a_tensor_of_eight_budgets(work: Path, large: Path, name: str, read_path: str) -> None:
    count, options = CASES[name]
    models = [large / str(index) for index in range(1, count + 1)]
    base = large / "0" if "base" in options else None
    recipe = write_recipe(work / "r.yml", models=models, **{**options, "base": base})
    threads = 1 if count <= 2 else 0
    report = report_of(merge(recipe, read_path=read_path, threads=threads))
    assert report["bytes_written"] == 8 * BUDGET
    check(report)


#: One of each class of methods: arguments of `write_recipe`, and how many models.
CLASSES: dict[str, tuple[int, dict[str, Any]]] = {
    "element by element": CASES["linear, 2"],
    "Gram matrix": CASES["slerp"],
    "selection": (1, CASES["ties, 2"][1]),
    "rows": (2, {"method": "model_stock", "base": True, "shared": {"filter_wise": True}}),
    "ranking": (1, {**CASES["ties, 2"][1], "method": "della"}),
    "whole model": (1, {"method": "metagpt", "base": True}),
    "in Python": (2, {"method": "written_methods:stock", "base": True}),
    "adapter": (1, {"method": "passthrough"}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_where_the_system_kills(work: Path, large: Path, name: str) -> None:
    """A tenth more than the budget is all that the system gives, with its own memory and caches."""
    count, options = CLASSES[name]
    models: list[Path | str] = [large / str(index) for index in range(1, count + 1)]
    if name == "adapter":
        models = [f"{models[0]}+{write_adapter(work / 'lora')}"]
    base = large / "0" if "base" in options else None
    recipe = write_recipe(work / "r.yml", models=models, **{**options, "base": base})
    with memory_group(BUDGET * 11 // 10) as group:
        if group is None:
            pytest.skip("this process may not limit the memory of others")
        report = report_of(merge(recipe, group=group))
        assert group.kills() == 0
    assert report["bytes_written"] == 8 * BUDGET
    check(report)


def write_adapter(folder: Path) -> Path:
    """Write an adapter of rank 16 of the tensor of `large`."""
    folder.mkdir()
    shapes = {"lora_A": (16, SHAPE[1]), "lora_B": (SHAPE[0], 16)}
    low = {f"base_model.model.x.{name}.weight": shape for name, shape in shapes.items()}
    write_sparse(folder / "adapter_model.safetensors", low, "F32")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["x"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["linear, 2", "linear, 10"])
def test_inputs_on_the_disk(work: Path, large: Path, name: str) -> None:
    count, options = CASES[name]
    models = [large / str(index) for index in range(count)]
    recipe = write_recipe(work / "r.yml", models=models, **options)
    evict(large)
    check(report_of(merge(recipe)))


@pytest.mark.parametrize("read_path", ["mapped", "positioned"])
def test_many_threads_share_the_budget(work: Path, large: Path, read_path: str) -> None:
    recipe = write_recipe(work / "r.yml", "linear", [large / "0", large / "1"], each={"weight": 1})
    report = report_of(merge(recipe, read_path=read_path, threads=16))
    assert report["threads"] == 16
    check(report)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("rows", (2, 48 * MIB)),
        ("rows", (16 * MIB, 1)),
        ("rows", (96 * MIB,)),
        ("columns", (48 * MIB, 2)),
        ("columns", (96 * MIB,)),
        ("columns", (2, 48 * MIB)),
        ("columns", (8, 3000, 4096)),
        ("columns", (700, 140_000)),
    ],
)
def test_long_and_short_rows(work: Path, name: str, shape: tuple[int, ...]) -> None:
    for model in "ab":
        write_sparse(work / model / "model.safetensors", {"x": shape})
    options = CASES[name][1]
    recipe = write_recipe(work / "r.yml", models=[work / "a", work / "b"], **options)
    # Two long columns have a number for each element of a row, which takes room of its own; and
    # where bands meet, what is hashed waits for its other half.
    budget = BUDGET + (16 * MIB if name == "columns" else 0)
    report = report_of(merge(recipe, threads=2, memory=budget))
    assert report["measured"] <= budget


@pytest.mark.parametrize("read_path", ["mapped", "positioned"])
def test_rows_by_token(work: Path, read_path: str) -> None:
    """Embeddings in other orders, with means for missing tokens and for padding."""
    tokens, width = 40_000, 4800
    order = np.random.default_rng(3).permutation(tokens)
    for model, ids in {"a": range(tokens), "b": order[: tokens - 2000], "c": order[900:]}.items():
        folder = work / model
        write_sparse(folder / "model.safetensors", {"embed_tokens.weight": (len(ids), width)})
        model_of = {"type": "WordLevel", "unk_token": "t0"}
        vocabulary = {f"t{token}": row for row, token in enumerate(ids)}
        text = json.dumps({"added_tokens": [], "model": {**model_of, "vocab": vocabulary}})
        (folder / "tokenizer.json").write_text(text)
    recipe = write_recipe(
        work / "r.yml",
        "ties",
        [work / "b", work / "c"],
        base=work / "a",
        each={"weight": 1, "density": 0.5},
        tokenizer={"source": "base", "pad_to_multiple_of": 1 << 12},
    )
    report = report_of(merge(recipe, read_path=read_path, memory=72 * MIB))
    assert report["bytes_written"] == 2 * width * 40_960
    check(report)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_kept_masks_stay_within_the_budget(work: Path, method: str) -> None:
    """Six tensors whose random masks have room in the budget only a few at a time."""
    for model in ("base", "a", "b"):
        shapes = {f"{number}": (30 * MIB + 777 * number,) for number in range(6)}
        write_sparse(work / model / "model.safetensors", shapes)
    recipe = write_recipe(
        work / "r.yml",
        method,
        [work / "a", work / "b"],
        base=work / "base",
        each={"weight": 1, "density": 0.5},
    )
    check(report_of(merge(recipe, memory=80 * MIB)))


@pytest.mark.parametrize("shape", [(9000, 4096), (300, 60_000), (1_000_001,), (12, 1500, 1024)])
def test_ranked_rows_stay_within_the_budget(work: Path, shape: tuple[int, ...]) -> None:
    """Short rows, longer ones, one that is ranked a part at a time, and stacked experts."""
    for model in ("base", "a", "b"):
        write_sparse(work / model / "model.safetensors", {"x": shape, "y": shape})
    recipe = write_recipe(
        work / "r.yml",
        "della",
        [work / "a", work / "b"],
        base=work / "base",
        each={"weight": 1, "density": 0.5},
    )
    for memory in (96 * MIB, 160 * MIB):
        report = report_of(merge(recipe, memory=memory))
        assert report["measured"] <= memory
        shutil.rmtree(work / "out")


@pytest.mark.parametrize("memory", [64 * MIB, 160 * MIB])
def test_kept_numbers_about_rows_stay_within_the_budget(work: Path, memory: int) -> None:
    """Short rows, and many: with room for their numbers and keys, and with less."""
    for model in ("base", "a"):
        write_sparse(work / model / "model.safetensors", {"x": (400_000, 64), "y": (300_000, 96)})
    recipe = write_recipe(work / "r.yml", "arcee_fusion", [work / "a"], base=work / "base")
    report = report_of(merge(recipe, memory=memory))
    assert report["measured"] <= memory


def test_tensors_of_all_kinds_one_after_the_other(work: Path) -> None:
    """Buffers that one tensor needed do not add up with those of the next."""
    for model, dtypes in {"a": ("F32", "BF16"), "b": ("BF16", "F32")}.items():
        for part, dtype in enumerate(dtypes):
            shapes = {f"{part}.{i}": (11 * MIB + 12345 * i + i,) for i in range(4)}
            write_sparse(work / model / f"{part}.safetensors", shapes, dtype)
        names = {f"{part}.{i}": f"{part}.safetensors" for part in range(2) for i in range(4)}
        index = {"metadata": {}, "weight_map": names}
        (work / model / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe = write_recipe(
        work / "r.yml", "linear", [work / "a", work / "b"], each={"weight": 1}, dtype="bfloat16"
    )
    for threads in (1, 4):
        report = report_of(merge(recipe, threads=threads))
        check(report)
        shutil.rmtree(work / "out")


def test_the_mapped_path_does_map(work: Path, large: Path) -> None:
    count, options = CASES["ties, 2"]
    models = [large / str(index) for index in range(count)]
    recipe = write_recipe(work / "r.yml", models=models, **{**options, "base": large / "3"})
    most = {}
    for read_path in ("mapped", "positioned"):
        # TIES keeps keys beside its pieces: with less, they are too small to be mapped.
        report = report_of(merge(recipe, memory=64 * MIB, read_path=read_path, threads=1))
        check(report)
        most[read_path] = max(report["mapped"])
        shutil.rmtree(work / "out")
    assert most["mapped"] > most["positioned"] + 6 * MIB


def test_many_files_are_not_resident_from_the_start(work: Path) -> None:
    for model in "ab":
        names = {}
        for part in range(30):
            write_sparse(work / model / f"{part}.safetensors", {f"x.{part}": (3 * MIB,)})
            names[f"x.{part}"] = f"{part}.safetensors"
            (work / model / f"{part}.safetensors").read_bytes()  # Into large pages of the cache.
        index = {"metadata": {}, "weight_map": names}
        (work / model / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe = write_recipe(work / "r.yml", "linear", [work / "a", work / "b"], each={"weight": 1})
    check(report_of(merge(recipe, read_path="mapped", threads=1)))


def test_merging_again_takes_no_more(work: Path, large: Path) -> None:
    recipe = write_recipe(work / "r.yml", "linear", [large / "0", large / "1"], each={"weight": 1})
    again = "oxmerge.merge(recipe, directory + '2', memory=int(memory))\nprint("
    twice = CHILD.replace("print(", again)
    command = [
        sys.executable,
        "-c",
        twice,
        str(recipe),
        str(work / "out"),
        str(BUDGET),
        "auto",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert report_of(done)["measured"] <= BUDGET


@pytest.mark.parametrize("name", ["linear, 2", "ties, 5", "columns"])
def test_too_little_memory_is_refused_with_what_would_do(work: Path, name: str) -> None:
    count, options = CASES[name]
    tensors = random_arrays({"x": (3000, 1001), "y": (5,)}, 0)
    models = [write_model(work / str(index), tensors, "BF16") for index in range(count)]
    base = models[0] if "base" in options else None
    recipe = write_recipe(work / "r.yml", models=models, **{**options, "base": base})
    refused = merge(recipe, memory=MIB)
    assert refused.returncode == 1
    assert not (work / "out").exists()
    error = refused.stderr.splitlines()[-2:]
    needed = re.search(r"expected at least (\d+) MiB, found 1 MiB", error[0])
    assert needed is not None
    assert error[1] == (
        f'  hint: allow more: `--memory {needed[1]}MiB`, or `memory="{needed[1]}MiB"` in Python'
    )
    report = report_of(merge(recipe, memory=int(needed[1]) * MIB))
    assert report["measured"] <= report["memory"]


#: Tensors of models with so many layers of 256 experts each.
MANY = {61: 45_337, 131: 100_007}


@pytest.fixture(scope="module", params=MANY)
def many(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Three models of many small tensors."""
    folder = tmp_path_factory.mktemp("many")
    for seed, name in enumerate("abc"):
        write_experts(folder / name, request.param, seed)
    (folder / "tensors").write_text(str(MANY[request.param]))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_many_small_tensors(work: Path, many: Path, method: str) -> None:
    models = [many / name for name in "abc"]
    base = models.pop(0) if method == "ties" else None
    each = {"weight": 0.5} if method == "linear" else {"weight": 0.5, "density": 0.5}
    recipe = write_recipe(work / "r.yml", method, models, base=base, each=each)
    with memory_group(256 * MIB * 11 // 10) as group:  # and no other limit where there is none
        report = report_of(merge(recipe, memory=256 * MIB, threads=8, group=group))
        assert group is None or group.kills() == 0
    assert report["tensors"] == int((many / "tensors").read_text())
    assert report["threads"] == 8
    check(report)


def only_shards(plan: Path, wanted: list[int]) -> Path:
    """Write the part of a saved plan that makes these shards, which is a plan too."""
    saved = json.loads(plan.read_text())
    table = saved["table"]
    number = {shard: place for place, shard in enumerate(wanted)}
    table["shards"] = [table["shards"][shard] for shard in wanted]
    rows = (row for row in table["tensors"] if row[3] in number)
    table["tensors"] = [[*row[:3], number[row[3]], *row[4:]] for row in rows]
    part = plan.with_name("part.json")
    part.write_text(json.dumps(saved))
    return part


def fill(plan: Path) -> None:
    """Write numbers where the sparse inputs of a saved plan are read."""
    table = json.loads(plan.read_text())["table"]
    generator = np.random.default_rng(0)
    for _, _, shape, *_, sources in table["tensors"]:
        elements = int(np.prod(table["shapes"][shape]))
        for file, start in (source[-2:] for source in sources):
            numbers = to_bf16(generator.standard_normal(min(elements, 1 << 20), np.float32))
            with Path(table["files"][file]["path"]).open("r+b") as into:
                into.seek(start)
                into.write(np.resize(numbers, elements).tobytes())


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_some_shards_of_671_billion_parameters(work: Path, method: str) -> None:
    """Three models of the layout and the real sizes of DeepSeek-V3, in sparse files."""
    models = make_demo(work / "models", "experts-671b", spreads=(1e-4, 1e-4)).models
    each = {"weight": 0.5} if method == "linear" else {"weight": 0.5, "density": 0.5}
    base, *others = models
    recipe = write_recipe(
        work / "r.yml",
        method,
        others if method == "ties" else models,
        base=base if method == "ties" else None,
        each=each,
    )
    plan = oxmerge.plan(recipe, shard_size=64 * MIB)
    assert len(plan.table) == 45_395
    assert sum(size for _, size in plan.shards) > 2 * 671_000_000_000
    plan.save(work / "plan.json")
    wanted = list(range(100, len(plan.shards), 4_000))
    fill(only_shards(work / "plan.json", wanted))
    # A plan says when its files were written.
    oxmerge.plan(recipe, shard_size=64 * MIB).save(work / "plan.json")
    part = only_shards(work / "plan.json", wanted)
    report = report_of(merge(part, memory=256 * MIB, threads=4))
    assert report["threads"] == 4
    names = {path.name for path in (work / "out").glob("*.safetensors")}
    assert names == {plan.shards[shard][0] for shard in wanted}
    check(report)


@pytest.mark.parametrize("size", ["1b", "70b"])
def test_an_adapter_of_all_linear_layers(
    work: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of a model of 1.1 or 70 billion parameters: what a tensor needs, others do too."""
    monkeypatch.setitem(SIZES, size, replace(SIZES[size], filled=False))
    [base] = make_demo(work / "models", size, spreads=()).models
    factors = {}
    for tensor in SIZES[size].tensors():
        module = tensor.name.removesuffix(".weight")
        if module.endswith(LINEAR):
            rows, columns = tensor.shape
            factors[f"base_model.model.{module}.lora_A.weight"] = (16, columns)
            factors[f"base_model.model.{module}.lora_B.weight"] = (rows, 16)
    adapter = work / "adapter"
    write_sparse(adapter / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": [*LINEAR]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    recipe = write_recipe(work / "r.yml", "passthrough", [f"{base}+{adapter}"])
    plan = oxmerge.plan(recipe, shard_size=MIB)
    plan.save(work / "plan.json")
    # The embedding comes first, then the layer, a tensor a shard.
    part = only_shards(work / "plan.json", [*range(1, 10)])
    with memory_group(256 * MIB * 11 // 10) as group:  # and no other limit where there is none
        report = report_of(merge(part, memory=256 * MIB, group=group))
        assert group is None or group.kills() == 0
    with oxmerge.open(work / "out") as made:
        assert {name.split(".")[-2] for name in made} >= set(LINEAR)
    check(report)


def test_many_small_tensors_where_memory_is_short(work: Path, many: Path) -> None:
    """What is refused is hinted at, and the hint is enough."""
    models = [many / name for name in "abc"]
    recipe = write_recipe(work / "r.yml", "linear", models, each={"weight": 1})
    refused = merge(recipe, memory=MIB)
    needed = re.search(r"expected at least (\d+) MiB", refused.stderr)
    assert needed is not None
    report = report_of(merge(recipe, memory=int(needed[1]) * MIB))
    assert report["measured"] <= report["memory"]
