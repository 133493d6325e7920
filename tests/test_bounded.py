"""What a stranger's texts cost: no more than their size, in time, in memory and in messages."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
import yaml
from oxmerge.cli import main
from oxmerge.errors import OxmergeError, RecipeError
from oxmerge.json_files import read_json
from oxmerge.output.journal import JOURNAL_NAME
from oxmerge.output.resume import RESUME_NAME
from oxmerge.recipe.extent import MOST_VALUES
from oxmerge.recipe.keys import show
from oxmerge.recipe.recipe import MOST_BYTES, Recipe
from writers import random_arrays, write_model, write_recipe

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

RECIPE = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"


def laughs(levels: int = 12, width: int = 9) -> str:
    """Return YAML whose last anchor stands for `width ** levels` values."""
    lines = ["x0: &x0 [lol]"]
    for level in range(1, levels + 1):
        aliases = ", ".join([f"*x{level - 1}"] * width)
        lines.append(f"x{level}: &x{level} [{aliases}]")
    return "\n".join(lines) + "\n"


def merges(levels: int = 12, width: int = 9) -> str:
    """Return YAML whose mappings take over each other's keys."""
    lines = ["x0: &x0 {a: 1}"]
    for level in range(1, levels + 1):
        aliases = ", ".join([f"*x{level - 1}"] * width)
        lines.append(f"x{level}: &x{level} {{<<: [{aliases}], k{level}: 1}}")
    return "\n".join(lines) + "\n"


#: Places that a value can stand in.
PLACES = [
    "name: *x12\n",
    "whatever: *x12\n",
    "dtype: *x12\n",
    "merge_method: *x12\n",
    "base_model: *x12\n",
    "models: *x12\n",
    "models: [*x12]\n",
    "models: [{model: *x12}]\n",
    "models: [{model: a, parameters: {weight: *x12}}]\n",
    "parameters: {weight: *x12}\n",
    "parameters: {weight: [{filter: *x12, value: 1}]}\n",
    "parameters: {weight: [{value: *x12}]}\n",
    "slices: [{sources: *x12}]\n",
    "slices: [{sources: [{model: a, layer_range: *x12}]}]\n",
    "tokenizer: *x12\n",
    "tokenizer: {source: *x12}\n",
    "chat_template: *x12\n",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bomb", [laughs(), merges()], ids=["laughs", "merges"])
def test_aliases_cost_no_more_than_their_text(bomb: str, place: str) -> None:
    for use in (Recipe.from_yaml, Recipe.documents_of, oxmerge.plan):
        started = time.process_time()
        with pytest.raises(RecipeError, match="stands for more than 100000 values") as caught:
            use(bomb + place)
        assert time.process_time() - started < 2
        assert len(str(caught.value)) < 400


CYCLES = [
    "a: &a [*a]\n",
    "a: &a {b: *a}\n",
    "a: &a {<<: *a}\n",
    "parameters: {weight: &a [1, *a]}\n",
    "models: &a [*a]\n",
]


@pytest.mark.parametrize("text", CYCLES)
def test_a_value_that_contains_itself(text: str) -> None:
    with pytest.raises(RecipeError, match="line 1: a value contains itself") as caught:
        Recipe.from_yaml(text + RECIPE)
    assert len(str(caught.value)) < 200


def test_aliases_that_stand_for_a_recipe_are_taken() -> None:
    models = "\n".join("- {model: m, parameters: *p}" for _ in range(400))
    values = ", ".join(map(str, range(200)))
    text = f"x: &p {{weight: [{values}]}}\nmerge_method: linear\nmodels:\n{models}\n"
    recipe = Recipe.from_yaml(text)
    assert len(recipe.models) == 400
    assert recipe.warnings == ()


def test_more_values_than_a_recipe_has_are_not_read() -> None:
    started = time.process_time()
    with pytest.raises(RecipeError, match=f"line 3: more than {MOST_VALUES} values"):
        Recipe.from_yaml(RECIPE + "x: [" + "1," * 200_000 + "]\n")
    assert time.process_time() - started < 20


def test_a_text_that_is_too_long(tmp_path: Path) -> None:
    text = RECIPE + "#" * MOST_BYTES
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    for source in (text, path, "/dev/zero"):
        with pytest.raises(RecipeError, match=f"longer than {MOST_BYTES} bytes"):
            Recipe.from_yaml(source)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def shared(levels: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(levels):
        value = [value] * 9
    return value


def cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


class Endless(Mapping[str, object]):
    """A mapping of mappings, made as they are asked for."""

    def __getitem__(self, key: str) -> object:
        return Endless()

    def __iter__(self) -> Iterator[str]:
        return iter("a")

    def __len__(self) -> int:
        return 1


VALUES: dict[str, tuple[Any, str]] = {
    "deep": (nested(100_000), "nested too deeply"),
    "shared": (shared(12), "stands for more than"),
    "cyclic": (cyclic(), "a value contains itself"),
    "endless": (Endless(), "nested too deeply"),
    "digits": (10**100_000, "a number of about 100000 digits"),
    "long": ([1] * 1_000_000, "stands for more than"),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("key", ["name", "dtype", "models", "base_model", "whatever"])
def test_values_of_mappings(name: str, key: str) -> None:
    value, expected = VALUES[name]
    mapping = {"merge_method": "linear", "models": [{"model": "a"}], key: value}
    started = time.process_time()
    with pytest.raises(RecipeError, match=expected) as caught:
        Recipe.from_mapping(mapping)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 400


def test_depth_counts_also_by_aliases() -> None:
    value: list[Any] = nested(40)
    with pytest.raises(RecipeError, match="nested too deeply"):
        Recipe.from_mapping(
            {
                "a": value,
                "b": [[[[[[value]]]]]] * 2,
                "c": [[nested(55), [value]]],
                "d": [[[[[[[[[[[[[[[[[[[[[[[[[[value]]]]]]]]]]]]]]]]]]]]]]]]]],
            }
        )


LONG = "k" * 100_000
#: Recipes with a name or a value of any length.
LONG_TEXTS = [
    f"{RECIPE}? {LONG}\n: 1\n",
    f"{RECIPE}? {LONG}\n: {LONG}\n? {LONG}\n: 1\n",
    f"{RECIPE}dtype: {LONG}\n",
    f"{RECIPE}dtype: [{LONG}, {LONG}]\n",
    f"{RECIPE}models: {LONG}\n",
    f"merge_method: linear\nmodels: [{LONG}]\n",
    f"merge_method: linear\nmodels: [{{model: [{LONG}]}}]\n",
    f"merge_method: [{LONG}]\nmodels: [{{model: a}}]\n",
    f"merge_method: {LONG}\nmodels: [{{model: a}}]\n",
    f"merge_method: linear\nmodels: [{{model: {LONG}}}]\n",
    f"merge_method: linear\nmodels: [{{model: {LONG}+{LONG}}}]\n",
    f"merge_method: linear\nmodels: [{{model: {LONG}@{LONG}}}]\n",
    f"merge_method: linear\nmodels: [{{model: {LONG}/{LONG}/{LONG}}}]\n",
    f"{RECIPE}parameters: {{? {LONG} : {LONG}}}\n",
    f"{RECIPE}parameters: {{weight: {{filter: [{LONG}], value: 1}}}}\n",
    f"{RECIPE}parameters: {{weight: {{? {LONG} : 1, value: 1}}}}\n",
    f"{RECIPE}tokenizer: {LONG}\n",
    f"{RECIPE}tokenizer_source: {LONG}\n",
    f"{RECIPE}chat_template: {LONG}\n",
    f"{RECIPE}x: *{LONG}\n",
    f"{RECIPE}x: !{LONG} y\n",
    f"{RECIPE}x: [{LONG}\n",
    f"{RECIPE}x: 0x{'f' * 100_000}\n",
    f"{RECIPE}dtype: {'9' * 4000}\n",
    f"merge_method: linear\nmodels: [{'1, ' * 3_000}]\n",
]


@pytest.mark.parametrize("text", LONG_TEXTS, ids=range(len(LONG_TEXTS)))
def test_messages_show_a_line_of_a_value(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    assert main(["plan", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert max(map(len, told.splitlines())) < 1000
    assert len(told) < 20_000
    with pytest.raises(OxmergeError) as caught:
        oxmerge.plan(path)
    assert len(repr(caught.value)) < 20_000


SHOWN: list[tuple[object, str]] = [
    ("a" * 1000, f"'{'a' * 29}...{'a' * 28}'"),
    ([1, "b"], "[1, 'b']"),
    ([{"a": 1}], "[{...}]"),
    ({"a": 1}, "a mapping"),
    (10**5000, "a number of 5000 digits"),
    (cyclic(), "[[[[...]]]]"),
    (shared(30), "[[[..."),
    (list(range(100)), "[0, 1, 2, 3, 4, 5, ...]"),
    (None, "None"),
    (True, "True"),
    (1.5, "1.5"),
]


@pytest.mark.parametrize(("value", "expected"), SHOWN, ids=range(len(SHOWN)))
def test_shown_values(value: object, expected: str) -> None:
    text = show(value)
    assert text == expected or (expected.endswith("...") and text.startswith(expected[:-3]))
    assert len(text) <= 62


def test_names_in_files_are_shortened(tmp_path: Path) -> None:
    name = "layers." + "n" * 100_000
    write_model(tmp_path / "a", random_arrays({name: (2,)}, 0))
    write_model(tmp_path / "b", random_arrays({name: (3,)}, 0))
    recipe = write_recipe(tmp_path / "r.yml", "linear", ["a", "b"], each={"weight": 1})
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(recipe)
    assert len(str(caught.value)) < 1000
    with oxmerge.open(tmp_path / "a") as checkpoint, pytest.raises(KeyError) as missing:
        checkpoint[name + "!"]
    assert len(str(missing.value)) < 1000


# JSON of a hundred megabytes.

MB = 1_000_000


def peak(code: str, *arguments: str) -> tuple[float, str]:
    """Run Python; return the MB that `code` took on top, and what it printed."""
    program = (
        "import sys, oxmerge, oxmerge.merging\n"
        "def high():\n"
        "    text = open('/proc/self/status').read()\n"
        "    return int(text.split('VmHWM:')[1].split()[0]) / 1000\n"
        f"before = high()\n{code}\nprint(high() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *lines, taken = done.stdout.splitlines()
    return float(taken), "\n".join(lines)


TRY = "try:\n    {}\nexcept oxmerge.OxmergeError as error:\n    print(error)"
OPEN = TRY.format("print(len(oxmerge.open(sys.argv[1])))")
PLAN = TRY.format("oxmerge.plan(sys.argv[1])")

#: What makes texts of about a hundred MB, which do not stay in memory.
CONFIGS = {
    "lists": lambda: b'{"a": [' + b"[]," * (98 * MB // 3) + b"1]}",
    "objects": lambda: b'{"a": {' + b'"b":{},' * (98 * MB // 7) + b'"b":1}}',
    "keys": lambda: b"{" + b'"a":0,' * (98 * MB // 6) + b'"b":1}',
    "deep": lambda: b'{"a":' + b"[" * (49 * MB) + b"]" * (49 * MB) + b"}",
    "text": lambda: b'{"a": "' + b"x" * (98 * MB) + b'"}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_huge_config(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "a", random_arrays({"x": (2,)}, 0))
    (tmp_path / "a/config.json").write_bytes(CONFIGS[name]())
    taken, printed = peak(OPEN, str(tmp_path / "a"))
    assert printed == "1"
    assert taken < 200
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [tmp_path / "a"])
    taken, printed = peak(PLAN, str(recipe))
    assert "config.json`: cannot be read: longer than 16000000 bytes" in printed
    assert taken < 200


INDEXES = {
    "metadata": lambda: (
        b'{"metadata":{"x":['
        + b"{}," * (98 * MB // 3)
        + b'1]},"weight_map":{"x":"model.safetensors"}}'
    ),
    "keys": lambda: b"{" + b'"m":0,' * (98 * MB // 6) + b'"weight_map":{"x":"model.safetensors"}}',
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_huge_index(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "a", random_arrays({"x": (2,)}, 0))
    (tmp_path / "a/model.safetensors.index.json").write_bytes(INDEXES[name]())
    taken, printed = peak(OPEN, str(tmp_path / "a"))
    assert printed == "1"
    assert taken < 200


def test_an_index_of_a_million_tensors(tmp_path: Path) -> None:
    places = {
        f"model.layers.{at}.mlp.experts.{at}.up_proj.weight": f"model-{at % 99:05d}.safetensors"
        for at in range(1_000_000)
    }
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": places}, separators=(",", ":")))
    size = path.stat().st_size / MB
    taken, printed = peak(OPEN, str(tmp_path))
    assert "shards that the index names are missing" in printed
    assert taken < 4 * size


def test_huge_metadata_in_a_header(tmp_path: Path) -> None:
    header = b'{"__metadata__":{' + b'"a":"",' * (98 * MB // 7) + b'"b":""}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    taken, printed = peak(OPEN, str(path))
    assert printed == "0"
    assert taken < 200


def test_a_header_of_a_million_tensors(tmp_path: Path) -> None:
    entries = (f'"{at:x}":{{"dtype":"U8","shape":[],"data_offsets":[{at},{at + 1}]}}'
               for at in range(1_000_000))  # fmt: skip
    header = f"{{{','.join(entries)}}}".encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 1_000_000)
    taken, printed = peak(OPEN.replace("oxmerge.open", "oxmerge._core.open_checkpoint"), str(path))
    assert printed == "1000000"
    assert taken < 6 * len(header) / MB


#: Where in a saved plan a value is put before others, how many of them, and what is said.
PLANS = {
    "beside": ('"left_out": [', b"[],", 33 * MB, "what is saved with the table with more values"),
    "names": ('"names":[', b'"",', 33 * MB, "the plan's table with more values"),
    "just as many names": ('"names":[', b'"",', 25 * MB, ""),
    "settings": ('"own":[', b"{},", 5 * MB, "the plan's settings with more values"),
    "text": ('"warnings": [', b" ", 201 * MB, "the plan is too long"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_huge_plan(tmp_path: Path, name: str) -> None:
    key, value, count, told = PLANS[name]
    write_model(tmp_path / "a", random_arrays({"x": (2,)}, 0))
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [tmp_path / "a"])
    path = tmp_path / "plan.json"
    oxmerge.plan(recipe).save(path)
    before, found, after = path.read_text().partition(key)
    assert found
    path.write_bytes((before + key).encode() + value * count + after.encode())
    taken, printed = peak(TRY.format("oxmerge.load_plan(sys.argv[1])"), str(path))
    assert told in printed
    assert taken < 1000


#: Manifests of a hundred MB: what stands in them again and again, behind which text.
MANIFESTS = {
    "tensors": (
        b'{\n"a": 1,\n"tensors": [\n',
        b'{"name":"%d","dtype":"F32","shape":[]},\n',
        2_400_000,
    ),
    "long line": (b'{\n"a": [', b"[],", 33 * MB),
    "head": (b"{\n", b'"a": [[],[],[],[],[],[],[],[],[]],\n', 2_900_000),
    "one tensor": (b'{\n"a": 1,\n"tensors": [\n{"shape": [', b"0,", 50 * MB),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_huge_manifest(tmp_path: Path, name: str) -> None:
    start, value, count = MANIFESTS[name]
    many = b"".join(value % at for at in range(count)) if b"%" in value else value * count
    (tmp_path / "oxmerge.json").write_bytes(start + many)
    taken, printed = peak(TRY.format("oxmerge.verify(sys.argv[1])"), str(tmp_path))
    assert "the manifest cannot be read" in printed
    assert taken < 1000


@pytest.mark.parametrize("name", CONFIGS)
def test_a_huge_config_of_an_adapter(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "a", random_arrays({"x.weight": (2, 2)}, 0))
    write_model(tmp_path / "lora", random_arrays({"x.weight": (2, 2)}, 0))
    (tmp_path / "lora" / "adapter_config.json").write_bytes(CONFIGS[name]())
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [f"{tmp_path}/a+{tmp_path}/lora"])
    taken, printed = peak(PLAN, str(recipe))
    assert "longer than 16000000 bytes" in printed
    assert taken < 200


#: What a dead run may have left, as someone else would write it.
LEFT: dict[str, tuple[str, Callable[[], bytes]]] = {
    "renames": (JOURNAL_NAME, lambda: b'{"version":1,"ours":{"a":[' + b"0," * (49 * MB) + b"0]}}"),
    "finished": (
        RESUME_NAME,
        lambda: b"0" * 16 + b' {"tensors":[' + b'[0,"",null],' * (8 * MB) + b"]}\n",
    ),
    "lines": (RESUME_NAME, lambda: b"\n" * (100 * MB)),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_huge_journal(tmp_path: Path, name: str) -> None:
    file, data = LEFT[name]
    write_model(tmp_path / "a", random_arrays({"x": (2,)}, 0))
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [tmp_path / "a"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_bytes(data())
    merge = TRY.format("oxmerge.merge(sys.argv[1], sys.argv[2])")
    taken, printed = peak(merge, str(recipe), str(tmp_path / "out"))
    assert printed == ""
    assert taken < 200


@pytest.mark.parametrize("name", ["modules.json", "tokenizer_config.json", "README.md"])
def test_huge_files_beside_the_weights(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "a", random_arrays({"x": (2,)}, 0))
    start = b"---\n" if name == "README.md" else b""
    (tmp_path / "a" / name).write_bytes(start + CONFIGS["lists"]())
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [tmp_path / "a"], chat_template="auto")
    taken, printed = peak(PLAN, str(recipe))
    assert printed == ""
    assert taken < 100


def test_the_most_that_a_config_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": [' + b"[]," * 499_000 + b"1]}")
    assert len(read_json(path)[0]["a"]) == 499_001
    path.write_bytes(b'{"a": [' + b"0," * 1_000_001 + b"1]}")
    with pytest.raises(ValueError, match="more than 1000000 values"):
        read_json(path)


def test_a_bomb_in_a_card_is_passed_over(tmp_path: Path) -> None:
    for name in "ab":
        write_model(tmp_path / name, random_arrays({"x": (2,)}, 0))
        (tmp_path / name / "README.md").write_text(f"---\n{laughs()}tags: *x12\n---\n")
    recipe = write_recipe(tmp_path / "r.yml", "linear", ["a", "b"], each={"weight": 1})
    oxmerge.merge(recipe, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["merge", "oxmerge"]
