"""The command line of mergekit, with `oxmerge merge` in front."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from oxmerge.cli import main
from oxmerge.cli.mergekit import _FLAGS

if TYPE_CHECKING:
    from pathlib import Path

#: Every option that mergekit 0.1.5 has for all of its merges, but those that ours has too.
OPTIONS = (
    "--cuda",
    "--no-cuda",
    "--low-cpu-memory",
    "--no-low-cpu-memory",
    "--copy-tokenizer",
    "--no-copy-tokenizer",
    "--clone-tensors",
    "--no-clone-tensors",
    "--trust-remote-code",
    "--no-trust-remote-code",
    "--lazy-unpickle",
    "--no-lazy-unpickle",
    "--write-model-card",
    "--no-write-model-card",
    "--safe-serialization",
    "--no-safe-serialization",
    "-v",
    "-vv",
    "-vvv",
    "--verbose",
    "--read-to-gpu",
    "--no-read-to-gpu",
    "--multi-gpu",
    "--no-multi-gpu",
    "--gpu-rich",
    "--async-write",
    "--no-async-write",
    "--no-allow-crimes",
    "--no-quiet",
    "--no-unsafe-truncate-embeddings",
    "--unsafe-truncate-embeddings",
)
WITH_VALUE = {
    "--transformers-cache": "cache",
    "--lora-merge-cache": "cache",
    "--lora-merge-dtype": "bfloat16",
    "--out-shard-size": "5B",
    "--random-seed": "7",
    "--num-threads": "2",
    "-j": "2",
    "--write-threads": "2",
    "--intermediate-dir": "stages",
    "-I": "stages",
}
REFUSED = {
    "--no-copy-tokenizer",
    "--no-write-model-card",
    "--no-safe-serialization",
    "--unsafe-truncate-embeddings",
}


def test_every_option_is_known() -> None:
    known = {name for flag in _FLAGS for name in flag.names}
    assert known == {*OPTIONS, *WITH_VALUE, "--lazy", "--no-lazy"}


def test_options_are_taken_and_said_in_a_line(
    twins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [name for name in OPTIONS if name not in REFUSED]
    given += [word for pair in WITH_VALUE.items() for word in pair]
    recipe, out = str(twins / "linear.yml"), str(tmp_path / "out")
    assert main(["merge", recipe, out, "--allow-crimes", *given]) == 0
    lines = capsys.readouterr().err.splitlines()
    for name in (*(name for name in OPTIONS if name not in REFUSED), *WITH_VALUE):
        (line,) = (line for line in lines if line.startswith(f"note: `{name}`, of mergekit, is"))
        assert len(line) <= 100


def test_options_with_values_have_their_effect(
    twins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = str(twins / "linear.yml"), tmp_path / "out"
    assert main(["merge", recipe, str(out), "--out-shard-size", "100k", "-j", "1"]) == 0
    assert len(list(out.glob("*.safetensors"))) == 2
    assert "1 thread," in capsys.readouterr().err


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_what_would_give_another_output_is_refused(
    twins: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(twins / "linear.yml"), str(out), option]) == 2
    assert f"`{option}`, of mergekit, is not there" in capsys.readouterr().err
    assert not out.exists()


def test_the_help_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--help"]) == 0
    assert "lazy-unpickle" not in capsys.readouterr().out


@pytest.mark.parametrize("size", ["0", "=-1"])
def test_no_size_of_a_file_is_no_limit(
    size: str, twins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = [f"--out-shard-size{size}"] if size[0] == "=" else ["--out-shard-size", size]
    assert main(["merge", str(twins / "linear.yml"), str(tmp_path / "out"), *option]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    capsys.readouterr()
    assert main(["plan", str(twins / "linear.yml"), "--quiet", *option]) == 0
    assert capsys.readouterr().err == ""
