"""Whether an output is what was made: by its manifest, and by computing it again."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oxmerge.checking.manifests import read_manifest
from oxmerge.cli import main
from oxmerge.errors import MemoryBudgetError, OxmergeError, PlanError
from oxmerge.sizes import parse_size
from writers import (
    directory_bytes,
    random_arrays,
    read_tensors,
    signed,
    tuned,
    write_model,
    write_recipe,
    write_sparse,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EACH = {"weight": 0.5, "density": 0.5}


@pytest.fixture(scope="module")
def made(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe `r.yml`, and what it makes, `out`, in two files."""
    folder = tmp_path_factory.mktemp("made")
    models = [family / "a", family / "b"]
    recipe = write_recipe(folder / "r.yml", "dare_ties", models, base=family / "base", each=EACH)
    oxmerge.merge(recipe, folder / "out", seed=7, shard_size="4MB")
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(made / "out", tmp_path / "out")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command, and return the exit code and what it printed."""
    code = main(["verify", *map(str, arguments)])
    return code, *capsys.readouterr()


def flip(out: Path, name: str, element: int, size: int = 4) -> None:
    """Change the lowest bit of an element of a tensor."""
    for path in out.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        entry = json.loads(data[8 : 8 + length]).get(name)
        if entry is not None:
            data[8 + length + entry["data_offsets"][0] + element * size] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError(name)


def test_an_output_is_what_was_made(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = directory_bytes(made)
    for options in ([], ["--recompute"], ["--recompute", "--recipe", made / "r.yml", "--seed", 7]):
        code, out, _ = run(capsys, made / "out", *options)
        by = "computed again" if options else "by digests"
        assert (code, out) == (0, f"equal: 7 of 7 tensors, {by}\n")
    found = oxmerge.verify(made / "out", recompute=True, threads=3, memory="4GiB")
    assert (found.is_equal, found.tensors, found.of_tensors) == (True, 7, 7)
    assert found.bytes == found.of_bytes == sum(
        len(data) for path in (made / "out").glob("*.safetensors")
        for _, _, data in read_tensors(path).values()
    )  # fmt: skip
    assert directory_bytes(made) == before  # nothing was written


@pytest.mark.parametrize("element", [0, 70_000, 1531 * 909 - 1])
def test_a_flipped_bit_is_found(
    out: Path, element: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(out, "embed.weight", element)
    found = oxmerge.verify(out)
    assert [each.tensor for each in found.deviations] == ["embed.weight"]
    again = oxmerge.verify(out, recompute=True)
    (deviation,) = again.deviations
    index = tuple(map(int, np.unravel_index(element, (1531, 909))))
    assert (deviation.tensor, deviation.index, deviation.elements) == ("embed.weight", index, 1)
    bits = [
        int(re.findall(r"0x(\w+)", text)[0], 16) for text in (deviation.expected, deviation.found)
    ]
    assert bits[0] ^ bits[1] == 1
    code, text, _ = run(capsys, out, "--recompute", "--json")
    assert code == 1
    assert json.loads(text)["deviations"] == [deviation.as_dict()]


def test_many_differences_are_counted_and_the_first_is_told(out: Path) -> None:
    for element in (1_200_000, 65_536, 65_535, 999_999):
        flip(out, "embed.weight", element)
    flip(out, "position_ids", 3, size=8)
    first, second = oxmerge.verify(out, recompute=True).deviations
    assert (first.tensor, first.elements) == ("embed.weight", 4)
    assert first.index == (65_535 // 909, 65_535 % 909)
    assert (second.tensor, second.index) == ("position_ids", (3,))
    assert second.expected == "3 (0x0000000000000003)"


def test_another_recipe_makes_something_else(
    out: Path, made: Path, family: Path, tmp_path: Path
) -> None:
    other = write_recipe(
        tmp_path / "r.yml", "dare_ties", [family / "a", family / "b"],
        base=family / "base", each={"weight": 0.5, "density": 0.25},
    )  # fmt: skip
    found = oxmerge.verify(out, recompute=True, recipe=other, seed=7)
    assert len(found.deviations) >= 5
    # Another seed draws other masks.
    found = oxmerge.verify(out, recompute=True, recipe=made / "r.yml", seed=8)
    assert "embed.weight" in [each.tensor for each in found.deviations]


def test_what_headers_show(out: Path, made: Path) -> None:
    shard = next(path for path in out.glob("*.safetensors") if b'"scale"' in path.read_bytes())
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"scale"', b'"scalf"'))
    found = oxmerge.verify(out)
    assert {each.code for each in found.problems} == {"unreadable-checkpoint"}
    (out / "model.safetensors.index.json").write_text("{}")
    assert not oxmerge.verify(out).is_equal
    shutil.copy(made / "out" / "model.safetensors.index.json", out)
    shard.write_bytes(data[:-1])
    for recompute in (False, True):
        found = oxmerge.verify(out, recompute=recompute)
        assert not found.is_equal
        assert "unreadable-checkpoint" in [each.code for each in found.problems]
    shard.write_bytes(data)
    assert oxmerge.verify(out).is_equal


def test_a_config_that_does_not_fit(tmp_path: Path) -> None:
    config = {"vocab_size": 40, "hidden_size": 8}
    arrays = random_arrays({"model.embed_tokens.weight": (40, 8)}, 1)
    for name in "ab":
        write_model(tmp_path / name, arrays, config=config)
    recipe = write_recipe(
        tmp_path / "r.yml", "linear", [tmp_path / "a", tmp_path / "b"], each={"weight": 1}
    )
    oxmerge.merge(recipe, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"vocab_size": 41}))
    codes = [each.code for each in oxmerge.verify(tmp_path / "out").problems]
    assert codes == ["output-differs", "config-size"]


def test_a_sample_is_the_same_for_one_seed(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sampled(seed: int) -> tuple[int, int, str]:
        found = oxmerge.verify(out, sample=0.01, seed=seed)
        return found.tensors, found.bytes, found.notes[0]

    assert sampled(1) == sampled(1)
    assert len({sampled(seed)[1] for seed in range(20)}) > 1
    flip(out, "scale", 0)
    hits = [not oxmerge.verify(out, sample=0.01, seed=seed).is_equal for seed in range(20)]
    assert any(hits)
    assert not all(hits)
    seed = hits.index(True)
    code, text, _ = run(capsys, out, "--sample", "1%", "--seed", seed, "--recompute")
    assert code == 1
    assert f"chosen by seed {seed}" in text


def test_a_sample_of_what_needs_the_whole_model(tmp_path: Path) -> None:
    """Numbers over the model are found from all inputs, and a share of the tensors is compared."""
    shapes = {"x": (30, 40), "y": (50,), "z": (70, 9)}
    base = random_arrays(shapes, 1)
    write_model(tmp_path / "base", base, "F32")
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, tuned(base, seed), "F32")
    models = [tmp_path / "a", tmp_path / "b"]
    recipe = write_recipe(tmp_path / "r.yml", "metagpt", models, base=tmp_path / "base")
    out = tmp_path / "out"
    oxmerge.merge(recipe, out)
    assert oxmerge.verify(out, recompute=True).is_equal
    flip(out, "x", 41)
    for seed in range(6):
        found = oxmerge.verify(out, recompute=True, sample=0.01, seed=seed)
        assert found.tensors == 1
        assert "all inputs were read" in found.notes[1]
        if not found.is_equal:
            assert [each.index for each in found.deviations] == [(1, 1)]
    assert not oxmerge.verify(out, recompute=True).is_equal


def test_a_sample_needs_the_memory_of_its_tensors(tmp_path: Path) -> None:
    """Long rows are ranked, for which a worker holds some megabytes an input."""
    shapes = {"x": (2, 300_000), **{f"y.{at}": (40,) for at in range(9)}}
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, random_arrays(shapes, seed), "F32")
    models = [tmp_path / "a", tmp_path / "b"]
    recipe = write_recipe(tmp_path / "r.yml", "della", models, base=tmp_path / "base", each=EACH)
    out = tmp_path / "out"
    oxmerge.merge(recipe, out)

    def least(**options: Any) -> int:
        with pytest.raises(MemoryBudgetError) as caught:
            oxmerge.verify(out, recompute=True, memory=1, threads=1, **options)
        asked = (caught.value.expected or "").removeprefix("at least ")
        return parse_size(asked.replace(" ", ""))

    chosen = [(seed, oxmerge.verify(out, sample=1e-6, seed=seed).bytes) for seed in range(9)]
    small = next(seed for seed, size in chosen if size == 160)
    of_all = least()
    assert least(sample=1e-6, seed=small) < of_all - (4 << 20)


def test_several_merges_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that come first are made again in the temporary directory, and removed."""
    for seed, name in enumerate("abc"):
        write_model(tmp_path / name, random_arrays({"x": (300, 40), "y": (50,)}, seed), "BF16")
    first = write_recipe(tmp_path / "1.yml", "linear", ["a", "b"], each={"weight": 0.3})
    last = write_recipe(tmp_path / "2.yml", "slerp", ["c"], base="first", shared={"t": 0.25})
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"name: first\n{first.read_text()}---\n{last.read_text()}")
    oxmerge.merge(recipe, tmp_path / "out", shard_size="20KB")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    before = directory_bytes(tmp_path)
    for options in ([], ["--recipe", recipe], ["--sample", "1%"]):
        code, text, _ = run(capsys, tmp_path / "out", "--recompute", *options)
        assert code == 0
        assert "made again first, and removed: `first`" in text
        assert directory_bytes(tmp_path) == before
    flip(tmp_path / "out", "x", 123, size=2)
    code, text, _ = run(capsys, tmp_path / "out", "--recompute")
    assert code == 1
    assert "element [3, 3], the first of 1" in text
    # An input that is another than then: what is made of it is other bytes.
    shutil.rmtree(tmp_path / "a")
    write_model(tmp_path / "a", random_arrays({"x": (300, 40), "y": (50,)}, 9), "BF16")
    assert len(oxmerge.verify(tmp_path / "out", recompute=True).deviations) == 2
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=9))
    code, _, told = run(capsys, tmp_path / "out", "--recompute")
    assert code == 2
    assert "set `TMPDIR`" in told
    assert not list((tmp_path / "tmp").iterdir())


def test_what_cannot_be_checked_ends_with_two(
    out: Path, made: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        code, text, err = run(capsys, *arguments)
        assert (code, text) == (2, "")
        return err

    assert "no such directory" in refused(tmp_path / "nothing")
    assert "there is no manifest" in refused(family / "a")
    assert "with `--recompute` only" in refused(out, "--recipe", made / "r.yml")
    assert "is no share" in refused(out, "--sample", "0")
    manifest = out / "oxmerge.json"
    text = manifest.read_text()
    manifest.write_text(signed(re.sub(r'"plan": "\w+"', '"plan": "0"', text)))
    assert "another plan" in refused(out, "--recompute")
    manifest.write_text(signed(re.sub(r'"blake3":"\w+",', "", text)))
    assert "made with `--no-digests`" in refused(out)
    assert run(capsys, out, "--recompute")[0] == 0
    manifest.write_text(signed(text.replace("model: ", "model: gone/")))
    told = refused(out, "--recompute")
    assert "no model" in told
    assert "where models have moved" in told
    manifest.write_text(text[: len(text) // 2])
    assert "the manifest cannot be read" in refused(out)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"oxmerge_manifest": 1', '"oxmerge_manifest": 2'),
        lambda text: text.replace('"oxmerge_manifest": 1', '"oxmerge_manifest": true'),
        lambda text: text.replace('"dtype":"I64"', '"dtype":"I65"'),
        lambda text: text.replace('"shape":[77]', '"shape":[-77]'),
        lambda text: text.replace('"shape":[77]', '"shape":[77,' + "1," * 100 + "1]"),
        lambda text: text.replace('"shape":[77]', '"shape":7'),
        lambda text: text.replace('"name":"scale"', '"name":["scale"]'),
        lambda text: text.replace('"name":"scale"', '"name":"embed.weight"'),
        lambda text: re.sub(r'"blake3":"\w', '"blake3":"z', text),
        lambda text: text.replace('"seed": 7', '"seed": "7"'),
        lambda text: text.replace('"files": [', '"files": {"a": [').replace("}],", "}]},", 1),
        lambda _: '{"tensors": [\n' * 3,
        lambda _: "[" * 100_000,
        lambda _: "",
        lambda _: "\x00" * 5_000_000,
        lambda text: json.dumps(json.loads(text)),
    ],
)
def test_a_manifest_that_lies_is_refused(out: Path, damage: Callable[[str], str]) -> None:
    manifest = out / "oxmerge.json"
    damaged = damage(manifest.read_text())
    assert damaged != manifest.read_text()
    manifest.write_text(signed(damaged) if '"sha256": ' in damaged else damaged)
    with pytest.raises(PlanError, match="the manifest cannot be read"):
        oxmerge.verify(out)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_manifest_does_harm(
    data: st.DataObject, made: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = (made / "out" / "oxmerge.json").read_bytes()
    place = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 40))
    junk = data.draw(st.binary(max_size=20))
    folder = tmp_path_factory.mktemp("manifest")
    damaged = text[:place] + junk + text[place + length :]
    if data.draw(st.booleans()):
        damaged = signed(damaged.decode(errors="replace")).encode()
    (folder / "oxmerge.json").write_bytes(damaged)
    try:
        manifest = read_manifest(str(folder))
    except PlanError:
        return
    assert all(isinstance(each.shape, tuple) for each in manifest.tensors.values())


def test_hostile_sizes_and_names_in_a_manifest(out: Path) -> None:
    manifest = out / "oxmerge.json"
    text = manifest.read_text()
    manifest.write_text(signed(text.replace('"shape":[77]', f'"shape":[{10**30},{10**30}]')))
    found = oxmerge.verify(out)
    assert [each.tensor for each in found.problems] == ["position_ids"]
    manifest.write_text(signed(text.replace('"name": "model-00001', '"name": "../out/model-00001')))
    assert {each.code for each in oxmerge.verify(out).problems} == {"output-differs"}
    manifest.write_text(signed(text.replace('"seed": 7', f'"seed": {1 << 64}')))
    with pytest.raises((OxmergeError, ValueError)):
        oxmerge.verify(out, recompute=True)
    manifest.write_text(signed(text.replace('"shard_size": 4000000', '"shard_size": 0')))
    with pytest.raises((OxmergeError, ValueError)):
        oxmerge.verify(out, recompute=True)
    manifest.write_text(signed(text.replace("method: dare_ties", "method: os:system")))
    with pytest.raises(PlanError):  # a manifest runs no code
        oxmerge.verify(out, recompute=True)


def test_it_keeps_to_its_memory(tmp_path: Path, made: Path) -> None:
    for name in "ab":
        write_sparse(tmp_path / name / "model.safetensors", {"x": (4096, 8192), "y": (3,)})
        (tmp_path / name / "config.json").write_text("{}")
    recipe = write_recipe(
        tmp_path / "r.yml", "linear", [tmp_path / "a", tmp_path / "b"], each={"weight": 1}
    )
    oxmerge.merge(recipe, tmp_path / "out", memory="4GiB")
    for recompute in (False, True):
        with pytest.raises(MemoryBudgetError) as caught:
            oxmerge.verify(tmp_path / "out", recompute=recompute, memory=1)
        least = (caught.value.expected or "").removeprefix("at least ").replace(" ", "")
        options: dict[str, Any] = {"recompute": recompute, "memory": least, "threads": 2}
        assert oxmerge.verify(tmp_path / "out", **options).is_equal
