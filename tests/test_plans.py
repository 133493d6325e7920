"""Plans: what takes one, what it explains, and that one that was saved is checked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
import zoo
from oxmerge.cli import main
from oxmerge.recipe.recipe import Recipe
from writers import directory_bytes, write_model, write_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Saved = dict[str, Any]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and a recipe with filters, a gradient and defaults."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in "ab":
        zoo.write(folder / name, zoo.llama(5))
        (folder / name / "tokenizer.json").write_text(f'"of {name}"')
    (folder / "recipe.yml").write_text(
        "merge_method: ties\n"
        "base_model: a\n"
        "models:\n"
        "- model: b\n"
        "  parameters:\n"
        "    density:\n"
        "    - filter: mlp\n"
        "      value: [0.2, 0.8]\n"
        "    - value: 0.5\n"
        "parameters:\n"
        "  weight: 0.7\n"
    )
    return folder


def merged(what: Any, out: Path, **options: Any) -> dict[str, bytes]:
    oxmerge.merge(what, out, memory="16GiB", **options)
    return directory_bytes(out)


def test_whatever_asks_for_a_merge_gives_the_same_bytes(shelf: Path, tmp_path: Path) -> None:
    path = shelf / "recipe.yml"
    recipe = Recipe.from_yaml(path)
    plan = oxmerge.plan(path, memory="16GiB")
    plan.save(tmp_path / "plan.json")
    expected = merged(path, tmp_path / "0")
    requests: list[Any] = [
        recipe,
        plan,
        oxmerge.load_plan(tmp_path / "plan.json"),
        tmp_path / "plan.json",
    ]
    for number, request in enumerate(requests, start=1):
        assert merged(request, tmp_path / str(number)) == expected
    wanted = plan.tensors.names[3]
    for request in requests:
        array = oxmerge.lazy(request)[wanted]
        assert array.tobytes() == oxmerge.lazy(path)[wanted].tobytes()
    axes = {"parameters.weight": "0.7"}
    for number, request in enumerate(requests):
        oxmerge.sweep(request, tmp_path / f"s{number}", axes, memory="16GiB")
        swept = directory_bytes(tmp_path / f"s{number}")
        assert swept["model.safetensors"] == expected["model.safetensors"]


def test_a_mapping_is_planned(shelf: Path) -> None:
    models = [{"model": str(shelf / name), "parameters": {"weight": 1}} for name in "ab"]
    plan = oxmerge.plan({"merge_method": "linear", "models": models}, memory="16GiB")
    assert len(plan.tensors) == len(zoo.llama(5).tensors)


def test_a_plan_keeps_its_seed_and_shards(shelf: Path, tmp_path: Path) -> None:
    plan = oxmerge.plan(shelf / "recipe.yml", seed=3, shard_size=4000, memory="16GiB")
    plan.save(tmp_path / "plan.json")
    loaded = oxmerge.load_plan(tmp_path / "plan.json")
    assert (loaded.seed, loaded.shard_size, loaded.digest()) == (3, 4000, plan.digest())
    assert merged(loaded, tmp_path / "out", seed=3) == merged(
        shelf / "recipe.yml", tmp_path / "out2", seed=3, shard_size=4000
    )
    for seed in (4, 0):
        with pytest.raises(ValueError, match=f"own seed, 3: make another for {seed}"):
            oxmerge.merge(loaded, tmp_path / "out3", seed=seed)
        with pytest.raises(ValueError, match=f"own seed, 3: make another for {seed}"):
            oxmerge.sweep(loaded, tmp_path / "{n}", {"dtype": ["float16"]}, seed=seed)
    with pytest.raises(ValueError, match="the plan has its own shard_size, 4000"):
        oxmerge.merge(loaded, tmp_path / "out3", shard_size=5000)


def test_a_loaded_plan_says_what_the_plan_said(shelf: Path, tmp_path: Path) -> None:
    plan = oxmerge.plan(shelf / "recipe.yml", memory="16GiB")
    plan.save(tmp_path / "plan.json")
    loaded = oxmerge.load_plan(tmp_path / "plan.json", memory="16GiB")
    told, again = plan.as_dict(), loaded.as_dict()
    assert told.pop("memory") > 0
    assert again.pop("memory") > 0
    assert again == told
    assert loaded.tensors[7] == plan.tensors[7]
    for name in plan.tensors.names:
        assert loaded.explain(name) == plan.explain(name)
    assert loaded.recipe == plan.recipe


def test_every_number_is_explained(shelf: Path) -> None:
    plan = oxmerge.plan(shelf / "recipe.yml", memory="16GiB")
    (up,) = (name for name in plan.tensors.names if "layers.2." in name and "up_proj" in name)
    lines = [line.strip() for line in plan.explain(up).splitlines()]
    place = "models[0].parameters.density (line 6), filter `mlp`"
    assert f"density = 0.5: {place}, gradient [0.2, 0.8] at position 0.5" in lines
    assert "weight = 0.7: parameters.weight (line 11)" in lines
    assert "lambda = 1.0: default" in lines
    norm = plan.explain(plan.tensors.find("model.norm.weight") or "")
    assert "density = 0.5: models[0].parameters.density (line 6)\n" in norm
    with pytest.raises(oxmerge.PlanError, match=r"did you mean `model\.norm\.weight`"):
        plan.explain("model.norm.weigt")


def test_slices_are_explained(shelf: Path) -> None:
    source = {"model": str(shelf / "a"), "layer_range": [0, 2]}
    other = {"model": str(shelf / "b"), "layer_range": [1, 3]}
    slices = [{"sources": [source]}, {"sources": [other]}]
    plan = oxmerge.plan({"merge_method": "passthrough", "slices": slices}, memory="16GiB")
    (up,) = (name for name in plan.tensors.names if "layers.3." in name and "up_proj" in name)
    first, source_line = plan.explain(up).splitlines()[:2]
    assert first.endswith(", of slices[1]")
    assert source_line.strip().startswith(f"{shelf}/b: model.layers.2.")


def test_the_command_line_explains_and_saves(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "plan.json"
    arguments = ["plan", str(shelf / "recipe.yml"), "--memory", "16GiB"]
    assert main([*arguments, "--explain", "*.layers.3.*up_proj*", "--save", str(saved)]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[0].startswith("model.layers.3.mlp.up_proj.weight: BF16 [")
    assert "at position 0.75\n" in told.out
    assert "saved the plan as" in told.err
    # Only `*` stands for something.
    assert main([*arguments, "--explain", "*.layers.[3].*"]) != 0
    assert "*.layers.[3].*" in capsys.readouterr().err
    assert main(["merge", str(saved), str(tmp_path / "out"), "--memory", "16GiB", "-q"]) == 0
    assert directory_bytes(tmp_path / "out") == merged(shelf / "recipe.yml", tmp_path / "out2")


def change(*steps: Any, to: Any) -> Callable[[Saved], None]:
    """Return what sets a value somewhere in a saved plan."""

    def apply(saved: Saved) -> None:
        at: Any = saved
        for step in steps[:-1]:
            at = at[step]
        at[steps[-1]] = to

    return apply


def overlap(saved: Saved) -> None:
    saved["table"]["tensors"][1][4] -= 2


def hole(saved: Saved) -> None:
    saved["table"]["tensors"][-1][4] += 2


def empty_shard(saved: Saved) -> None:
    saved["table"]["shards"].append({"file_name": "other.safetensors", "size": 16})


def duplicate(saved: Saved) -> None:
    saved["table"]["tensors"][1][0] = saved["table"]["tensors"][0][0]


def overflow(saved: Saved) -> None:
    """Make an output wider than its input, which is as large as a file may be."""
    saved["table"]["shapes"] = [[2**62]] * len(saved["table"]["shapes"])
    for file in saved["table"]["files"]:
        file["size"] = 2**64 - 1
    saved["table"]["tensors"][0][1] = "F64"


TABLE = ("table", "tensors", 0)
INPUT = (*TABLE, 7, 0)
ORIGIN = ("table", "settings", 0, "origin")
SHARE = ("output", "accounting", 0, "merged")
NOT_ORIGIN = "what says where parameters come from is not as it should be"
WRONG: dict[str, tuple[Callable[[Saved], None], str]] = {
    "version": (change("oxmerge_plan", to=1), "saved by another version of oxmerge.*plan version"),
    "method": (change("table", "method", to="tiez"), "there is no merge method `tiez`"),
    "a key": (change("table", "more", to=1), "unknown field `more`"),
    "name": (change(*TABLE, 0, to=10**6), "the plan has no name of that number"),
    "negative": (change(*TABLE, 0, to=-1), "invalid value: integer `-1`"),
    "dtype": (change(*TABLE, 1, to="F8"), "unknown variant `F8`"),
    "integers of floats": (change(*TABLE, 1, to="I64"), "type cannot become the tensor's"),
    "another shape": (change(*INPUT, 4, to=1), "an input has another shape"),
    "shape": (change(*TABLE, 2, to=99), "the plan has no shape of that number"),
    "sizes": (change("table", "shapes", 0, to=[2**40, 2**40]), "past the end of its file"),
    "shard": (change(*TABLE, 3, to=1), "the plan has no shard of that number"),
    "settings": (change(*TABLE, 5, to=99), "the plan has no settings of that number"),
    "base": (change(*TABLE, 6, to=2), "a tensor's base is none of its inputs"),
    "inputs": (change(*TABLE, 7, to=[]), "parameters for other inputs than it has"),
    "kind of input": (change(*INPUT, 0, to="row"), "there is no kind of input `row`"),
    "input of another kind": (change(*INPUT, 0, to="rows"), "an input ends early"),
    "model": (change(*INPUT, 1, to=7), "the plan has no model of that number"),
    "file": (change(*INPUT, 5, to=7), "the plan has no file of that number"),
    "past the end": (change(*INPUT, 6, to=10**9), "an input lies past the end of its file"),
    "overflow": (change(*INPUT, 6, to=2**64 - 1), "an input lies past the end of its file"),
    "a wide output": (overflow, "an output tensor's size overflows"),
    "overlap": (overlap, "overlaps what is before it"),
    "hole": (hole, "leaves a hole after what is before it"),
    "file without tensors": (empty_shard, "an output file has no tensors"),
    "twice": (duplicate, "the output cannot have this tensor name, or not twice"),
    "size": (change("table", "shards", 0, "size", to=5000), "another size than its tensors"),
    "path": (change("table", "shards", 0, "file_name", to="../x.safetensors"), "a plain name"),
    "config": (change("table", "shards", 0, "file_name", to="config.json"), "a plain name"),
    "parameter": (
        change("table", "settings", 0, "shared", "weight", to=1.0),
        "`weight` is no such parameter of method `ties`",
    ),
    "switch": (
        change("table", "settings", 0, "shared", "normalize", to=1.5),
        "`normalize` is true or false",
    ),
    "missing": (
        change("table", "settings", 0, "shared", to={}),
        "the parameter `rescale` has no value",
    ),
    "origin": (change(*ORIGIN, to="recipe"), NOT_ORIGIN),
    "origins of inputs": (change(*ORIGIN, "own", to=[{}]), NOT_ORIGIN),
    "origin of a parameter": (change(*ORIGIN, "shared", to={"weight": 7}), NOT_ORIGIN),
    "points": (
        change(*ORIGIN, "shared", to={"weight": {"where": "x", "gradient": 1, "position": 0}}),
        NOT_ORIGIN,
    ),
    "gradient without position": (
        change(*ORIGIN, "shared", to={"weight": {"where": "x", "gradient": [1]}}),
        NOT_ORIGIN,
    ),
    "zero byte": (
        change("table", "files", 0, "path", to="/m/x\0.safetensors"),
        "no path of a file has a zero byte",
    ),
    "count": (change(*SHARE, "count", to=-1), "`count` in the plan is out of range"),
    "memory": (
        change("output", "tokenizer_memory", to=-1),
        "`tokenizer_memory` in the plan is out of range",
    ),
    "source": (
        change("output", "side_files", 0, "source", to="\0"),
        "a file beside the weights must have a path",
    ),
    "donor": (change("output", "donor", to=7), "there is no model of that number"),
    "card": (change("output", "card", to=None), "`card` in the plan is not as it should be"),
    "side file": (
        change("output", "side_files", 0, "name", to="../../x"),
        "a name within its directory",
    ),
    "side file that is the config": (
        change("output", "side_files", 0, "name", to="config.json"),
        "two files of the output have one name",
    ),
    "side file that is an index": (
        change("output", "side_files", 0, "name", to="model.safetensors.index.json"),
        "two files of the output have one name",
    ),
    "text": (change("output", "texts", to={"a/../../x": ""}), "a name within its directory"),
    "text that is a file": (
        change("output", "texts", to={"tokenizer.json": "", "config.json": ""}),
        "two files of the output have one name",
    ),
    "text that is none": (change("output", "texts", to={"x": 1}), "must be text"),
    "output": (change("output", to=[]), "`models` in the plan is not as it should be"),
    "table": (change("table", to=[]), "the plan's table cannot be read"),
}


def rows(at: int, to: Any) -> Callable[[Saved], None]:
    """Return what sets a part of the first input whose rows are taken by token."""

    def apply(saved: Saved) -> None:
        tensors = saved["table"]["tensors"]
        found = next(each for tensor in tensors for each in tensor[7] if each[0] == "rows")
        found[at] = to

    return apply


def maps(to: list[Any]) -> Callable[[Saved], None]:
    """Return what replaces every map of rows."""

    def apply(saved: Saved) -> None:
        saved["table"]["maps"] = [to for _ in saved["table"]["maps"]]

    return apply


def first_rows(count: int) -> list[Any]:
    return [count, {"part": {"part": 0, "first": 0}}]


HUGE = 2**32 - 1
WRONG_ROWS: dict[str, tuple[Callable[[Saved], None], str]] = {
    "map": (rows(5, 99), "the plan has no map of that number"),
    "own part": (rows(6, 2), "the plan has no part of that number"),
    "no part": (rows(7, []), "the plan has no part of that number"),
    "part of no file": (
        rows(7, [[99, 0, "F32", 4, None]] * 2),
        "the plan has no file of that number",
    ),
    "past the end": (rows(7, [[0, 2**63, "F32", 4, None]] * 2), "an input lies past the end"),
    "many rows": (rows(7, [[0, 0, "F32", 2**62, None]] * 2), "an input lies past the end"),
    "no floats": (rows(7, [[0, 0, "I32", 4, None]] * 2), "rows can be taken of floats only"),
    "few rows": (rows(7, [[0, 0, "F32", 4, None]] * 2), "a row is taken from where there is none"),
    "type": (rows(3, "F64"), "an input has another type than its rows"),
    "shape": (rows(4, 1), "the plan has no shape of that number"),
    "fewer rows than the tensor": (maps([first_rows(3)]), "other rows than the tensor"),
    "no rows": (maps([]), "other rows than the tensor"),
    "too many rows": (maps([first_rows(HUGE)]), "more rows than a vocabulary has"),
    "a row beyond": (
        maps([[2, {"part": {"part": 0, "first": HUGE}}], first_rows(8)]),
        "a row is taken from where there is none",
    ),
    "a part beyond": (
        maps([[10, {"part": {"part": HUGE, "first": 0}}]]),
        "a row is taken from where there is none",
    ),
    "a mean of none": (maps([[1, {"mean": []}], first_rows(9)]), "the mean of no rows"),
    "a mean of what is not above": (maps([[1, "mean_above"], first_rows(9)]), "mean of no rows"),
    "a mean before the end": (
        maps([first_rows(8), [1, "mean_above"], [1, "zero"]]),
        "that are the mean of those above come last",
    ),
    "unknown": (maps([[10, "median"]]), "unknown variant `median`"),
}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe for two models whose rows are taken by token."""
    folder = tmp_path_factory.mktemp("vocabularies")
    for name, step in {"a": 1, "b": 3}.items():
        ids = {f"t{number}": number * step % 10 for number in range(10)}
        write_model(folder / name, {"embed_tokens.weight": np.ones((10, 4), np.float32)})
        text = json.dumps({"model": {"type": "WordLevel", "vocab": ids}})
        (folder / name / "tokenizer.json").write_text(text)
    each = {"weight": 1}
    write_recipe(folder / "r.yml", "linear", ["a", "b"], each=each, tokenizer_source="base")
    return folder


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_what_is_wrong_with_saved_rows_is_named(
    vocabularies: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "plan.json"
    oxmerge.plan(vocabularies / "r.yml").save(path)
    oxmerge.merge(path, tmp_path / "sound")
    saved = json.loads(path.read_text())
    edit, message = WRONG_ROWS[name]
    edit(saved)
    path.write_text(json.dumps(saved, separators=(",", ":")))
    with pytest.raises(oxmerge.PlanError, match=message):
        oxmerge.merge(path, tmp_path / "out")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_saved_plan_is_named(shelf: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "plan.json"
    oxmerge.plan(shelf / "recipe.yml", memory="16GiB").save(path)
    saved = json.loads(path.read_text())
    edit, message = WRONG[name]
    edit(saved)
    path.write_text(json.dumps(saved, separators=(",", ":")))
    with pytest.raises(oxmerge.PlanError, match=message):
        oxmerge.load_plan(path)
    with pytest.raises(oxmerge.PlanError, match=message):
        oxmerge.merge(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b'{"oxmerge_plan":2}', b"null"])
def test_what_is_no_plan_is_told(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    with pytest.raises(oxmerge.PlanError, match="this is no plan that oxmerge saved"):
        oxmerge.load_plan(path)


def test_a_plan_whose_inputs_changed_is_not_merged(shelf: Path, tmp_path: Path) -> None:
    models = [zoo.write(tmp_path / name, zoo.llama(1)) for name in "ab"]
    recipe = write_recipe(tmp_path / "r.yml", "linear", models, each={"weight": 1})
    oxmerge.plan(recipe, memory="16GiB").save(tmp_path / "plan.json")
    zoo.write(tmp_path / "c", zoo.llama(1))
    (tmp_path / "c" / "model.safetensors").replace(tmp_path / "b" / "model.safetensors")
    plan = oxmerge.load_plan(tmp_path / "plan.json")
    with pytest.raises(oxmerge.InputChangedError):
        oxmerge.merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_that_cannot_be_saved_leaves_nothing(shelf: Path, tmp_path: Path) -> None:
    plan = oxmerge.plan(shelf / "recipe.yml", memory="16GiB")
    with pytest.raises(OSError, match="No such file"):
        plan.save(tmp_path / "nowhere" / "plan.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        plan.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
