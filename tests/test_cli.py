"""The command line, with an engine that only pretends."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
from oxmerge import _core
from oxmerge.cli import VERBS, main
from oxmerge.cli.engine import Engine
from oxmerge.cli.printer import Printer
from oxmerge.cli.progress import (
    Estimate,
    PlainProgress,
    progress_line,
    show_progress,
    watched,
)
from oxmerge.errors import (
    CheckpointError,
    MemoryBudgetError,
    OutputError,
    OxmergeError,
    PlanError,
    RecipeError,
)
from oxmerge.merging import Snapshot
from oxmerge.models.references import Located
from oxmerge.problems import Problem
from oxmerge.sizes import format_duration
from writers import random_arrays, tuned, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator

METHODS: list[dict[str, Any]] = [
    {
        "name": "linear",
        "title": "Linear",
        "formula": "weighted average of the models " * 4,
        "class": "elementwise",
        "cost": "one read of every input",
        "paper": "https://example.org/linear",
        "differs": "",
        "contract": {"base": "ignored", "inputs": [1, None], "others": [0, None]},
        "parameters": [],
    },
    {
        "name": "slerp",
        "title": "Spherical interpolation",
        "formula": "a·sin((1-t)θ)/sin θ\n+ b·sin(tθ)/sin θ",
        "class": "gram",
        "cost": "2 reads of each input, 1 write",
        "paper": "https://example.org/slerp",
        "differs": "others round more often",
        "contract": {"base": "required", "inputs": [2, 2], "others": [1, 1]},
        "parameters": [
            {
                "name": "t",
                "kind": "float",
                "default": None,
                "required": True,
                "per": "shared",
                "limits": [None, None],
                "usual": [-0.5, 1.5],
                "acts": True,
                "help": "; ".join(["0 gives the base, 1 the other model"] * 4),
            },
            {
                "name": "flatten",
                "kind": "bool",
                "default": True,
                "required": False,
                "per": "shared",
                "limits": [None, None],
                "usual": [None, None],
                "acts": True,
                "help": "one vector a tensor",
            },
        ],
    },
]


@dataclass
class Report:
    """A merge that did not happen."""

    directory: str = "out"
    tensors: int = 75
    files: int = 2
    bytes_read: int = 2_000_000_000
    bytes_written: int = 1_000_000_000
    input_bytes: int = 1_500_000_000
    seconds: float = 1.5
    peak_memory: int = 180 << 20
    memory: int = 256 << 20
    threads: int = 4
    simd: str = "avx512"
    device: str = "cpu"
    warnings: tuple[object, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors, "seconds": self.seconds}


@dataclass
class Plan:
    """A plan of nothing."""

    tensors: int = 75
    warnings: tuple[object, ...] = ()

    def __str__(self) -> str:
        return "method    slerp"

    def as_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors}


@dataclass
class Tensor:
    name: str
    shape: tuple[int, ...]
    start: int
    dtype: str = "BF16"
    file: int = 0


@dataclass
class Checkpoint:
    tensors: list[Tensor]
    path: str = "model.safetensors"
    files: tuple[dict[str, Any], ...] = ({"path": "model.safetensors"},)
    index: None = None
    warnings: tuple[str, ...] = ()


SNAPSHOT = Snapshot(
    bytes_done=500_000_000,
    bytes_total=1_000_000_000,
    bytes_read=1_000_000_000,
    tensors=38,
    tensor="model.layers.3.mlp.up_proj.weight",
    peak_memory=180 << 20,
)


class FakeEngine(Engine):
    """Records what it is asked, and raises what it is told to."""

    def __init__(self, error: BaseException | None = None, **results: Any) -> None:
        self.error = error
        self.results = results
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def _answer(self, name: str, *args: Any, **options: Any) -> Any:
        progress = options.pop("progress", None)
        self.calls.append((name, args, options))
        if progress is not None:
            progress(SNAPSHOT)
        if self.error is not None:
            raise self.error
        return self.results.get(name)

    def merge(self, recipe: str, directory: str, **options: Any) -> Any:
        return self._answer("merge", recipe, directory, **options) or Report(directory)

    def sweep(self, recipe: str, pattern: str, axes: Any, **options: Any) -> Any:
        reports = [Report("out/0.1"), Report("out/0.9", warnings=("odd",))]
        return self._answer("sweep", recipe, pattern, axes, **options) or reports

    def plan(self, recipe: str, **options: Any) -> Any:
        return self._answer("plan", recipe, **options) or Plan()

    def methods(self) -> Any:
        return self._answer("methods") or METHODS

    def open_checkpoint(self, reference: str) -> tuple[Located, Any]:
        return Located(reference), self._answer("open_checkpoint", reference)


Output = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line: exit code, standard output, standard error."""

    def call(*arguments: str, engine: FakeEngine | None = None) -> Output:
        code = main(arguments, engine=engine or FakeEngine())
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# Arguments.

#: What is passed on of options that were not given.
SWITCHES = {
    "overwrite": False,
    "read_path": "auto",
    "resume": True,
    "fresh": False,
    "digests": True,
    "hash_inputs": False,
    "allow_nonfinite": False,
}


def test_merge_passes_on_only_what_was_given(run: Any) -> None:
    engine = FakeEngine()
    assert run("merge", "r.yml", "out", engine=engine)[0] == 0
    assert engine.calls == [("merge", ("r.yml", "out"), {"strict": False, **SWITCHES})]


def test_merge_passes_on_everything(run: Any) -> None:
    engine = FakeEngine()
    line = "merge r.yml out --memory 2GiB --threads 3 --seed 7 --shard-size 5B --overwrite"
    more = ("--strict", "--read-path=mapped", "--device", "cuda:1", "--vram=3GiB")
    run(*line.split(), *more, "--allow-mismatch", engine=engine)
    assert engine.calls[0][2] == {
        "memory": 2 << 30,
        "threads": 3,
        "device": "cuda:1",
        "vram": 3 << 30,
        "seed": 7,
        "shard_size": 5_000_000_000,
        "strict": True,
        "allow_mismatch": True,
        **SWITCHES,
        "overwrite": True,
        "read_path": "mapped",
    }


def test_sweep_passes_on_its_axes(run: Any) -> None:
    engine = FakeEngine()
    places = ["--set", "parameters.t=0.1,0.9", "--set", "models[0].parameters.weight=1:2:2"]
    code, _, err = run("sweep", "r.yml", "out/{t}", *places, "--together", engine=engine)
    assert code == 0
    axes = {"parameters.t": "0.1,0.9", "models[0].parameters.weight": "1:2:2"}
    options = {"together": True, "strict": False, **SWITCHES}
    assert engine.calls == [("sweep", ("r.yml", "out/{t}", axes), options)]
    assert err == (
        "warning: odd\n"
        "wrote `out/0.1`: 75 tensors in 2 files, 1 GB in 1.5 s\n"
        "wrote `out/0.9`: 75 tensors in 2 files, 1 GB in 1.5 s\n"
        "2 merges in one pass: 2.33 GB/s (inputs and output once), peak memory 180 MiB of "
        "256 MiB, 4 threads, avx512\n"
    )


def test_sweep_takes_the_options_of_merge(run: Any) -> None:
    engine = FakeEngine()
    line = "sweep r.yml out/{n} --set a=1 --read-path direct --seed 3 --device torch --vram 1GB"
    assert run(*line.split(), engine=engine)[0] == 0
    options = engine.calls[0][2]
    assert (options["read_path"], options["seed"], options["vram"]) == ("direct", 3, 10**9)


@pytest.mark.parametrize("axis", ["parameters.t", "=1", "parameters.t="])
def test_sweep_refuses_an_axis_without_place_or_values(run: Any, axis: str) -> None:
    code, _, err = run("sweep", "r.yml", "out/{t}", "--set", axis)
    assert code == 2
    assert err.startswith(f"error: `--set {axis}` sets nothing\nhint: write --set PLACE=VALUES")


def test_plan_passes_on_its_options(run: Any) -> None:
    engine = FakeEngine()
    run("plan", "r.yml", "--memory", "1GB", "--strict", "--seed", "0", engine=engine)
    options = {"strict": True, "memory": 1_000_000_000, "seed": 0}
    assert engine.calls == [("plan", ("r.yml",), options)]


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("mrege r.yml out", "unknown command `mrege`", "did you mean `merge`?"),
        (
            "xyz",
            "unknown command `xyz`",
            "known are: merge, fuse, sweep, finish",
        ),
        ("-q merge r out", "`-q` before a command", "write options after it"),
        ("merge r out --memroy 1GB", "unknown option `--memroy`", "did you mean `--memory`?"),
        ("merge r out --mem=1GB", "unknown option `--mem`", "did you mean `--memory`?"),
        ("merge r out --device gpu", "device must be cpu, torch, cuda, cuda:N or auto", "see"),
        ("merge r out --vram lots", "not a size: 'lots'", "see"),
        ("merge r out --vram 1GB", "`--vram` has no effect on the CPU", "add `--device cuda`"),
        ("plan r --vram 1GB --device cpu", "`--vram` has no effect on the CPU", "add"),
        ("plan r --overwrite", "unknown option `--overwrite`", "known are:"),
        ("merge r.yml", "the following arguments are required: OUT", "see `oxmerge merge --help`"),
        ("plan a b", "unrecognized arguments: b", "see `oxmerge plan --help`"),
        ("merge r out --memory lots", "not a size: 'lots'", "see"),
        ("merge r out --memory 0", "must be more than nothing", "see"),
        ("merge r out --threads 0", "`0` is not a whole number from 1", "see"),
        ("merge r out --threads 4294967296", "is not a whole number from 1 to 4294967295", "see"),
        ("merge r out --seed 18446744073709551616", "is not a whole number", "see"),
        ("merge r out --seed 1.5", "`1.5` is not a whole number from 0", "see"),
        ("merge r out --read-path fast", "invalid choice: 'fast'", "see"),
        ("r.yml out", "unknown command `r.yml`", "to merge by a recipe: `oxmerge merge r.yml OUT`"),
        ("--seed 1 merge r", "`--seed` before a command", "write options after it: `oxmerge merge"),
        ("methods slurp", "unknown method `slurp`", "did you mean `slerp`?"),
        ("methods SLERP", "unknown method `SLERP`", "did you mean `slerp`?"),
    ],
)
def test_usage_errors(run: Any, line: str, message: str, hint: str) -> None:
    code, out, err = run(*line.split())
    assert code == 2
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert second.startswith(f"hint: {hint}")


def test_nothing_asked_shows_the_overview(run: Any) -> None:
    code, out, err = run()
    assert (code, err) == (2, "")
    assert all(f"  {verb} " in out for verb in VERBS)
    assert run("--help") == (0, out, "")


def test_help_of_a_verb_is_the_verbs(run: Any) -> None:
    for word in ("help", "--help", "-h"):
        assert run(word, "plan") == run("plan", "--help")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_fits_a_terminal(run: Any, verb: str) -> None:
    code, out, err = run(verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: oxmerge {verb}")
    assert "--json" in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_options_that_do_not_work_yet_do_not_exist(run: Any) -> None:
    _, out, _ = run("merge", "--help")
    assert "--resume" not in out


# What is printed.


def test_merge_ends_with_two_lines(run: Any) -> None:
    code, out, err = run("merge", "r.yml", "out")
    assert (code, out) == (0, "")
    assert err == (
        "wrote `out`: 75 tensors in 2 files, 1 GB in 1.5 s\n"
        "1.67 GB/s (inputs and output once), peak memory 180 MiB of 256 MiB, 4 threads, avx512\n"
    )


def test_merge_quiet_says_nothing(run: Any) -> None:
    engine = FakeEngine(merge=Report(warnings=("beware",)))
    assert run("merge", "r.yml", "out", "--quiet", engine=engine) == (0, "", "")


def test_merge_json_is_data_alone(run: Any) -> None:
    _, out, err = run("merge", "r.yml", "out", "--json")
    assert json.loads(out) == {"tensors": 75, "seconds": 1.5}
    assert err.startswith("wrote")


def test_warnings_and_their_hints(run: Any) -> None:
    problem = Problem("parameter", "`weight` has no effect", advice="put it under `models`")
    _, _, err = run("plan", "r.yml", engine=FakeEngine(plan=Plan(warnings=(problem,))))
    assert err == "warning: `weight` has no effect\nhint: put it under `models`\n"


def test_plan(run: Any) -> None:
    assert run("plan", "r.yml") == (0, "method    slerp\n", "")
    assert json.loads(run("plan", "r.yml", "--json")[1]) == {"tensors": 75}


def test_methods(run: Any) -> None:
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    assert out.startswith(
        "linear  elementwise  Linear: one read of every input\n"
        "slerp   gram         Spherical interpolation: 2 reads of each input, 1 write\n"
    )
    assert "\nwith any of them: keep, layer_scale\n" in out
    assert max(len(line) for line in out.splitlines()) < 80
    assert json.loads(run("methods", "--json")[1]) == {"methods": METHODS}


def test_one_method(run: Any) -> None:
    code, out, err = run("methods", "slerp")
    assert (code, err) == (0, "")
    assert out == (
        "slerp: Spherical interpolation\n"
        "\n"
        "formula     a·sin((1-t)θ)/sin θ\n"
        "            + b·sin(tθ)/sin θ\n"
        "base        required\n"
        "inputs      exactly 2 models, exactly 1 model besides the base\n"
        "class       gram\n"
        "cost        2 reads of each input, 1 write\n"
        "paper       https://example.org/slerp\n"
        "differs     others round more often\n"
        "\n"
        "parameters\n"
        "  t (float, one for all models, required)\n"
        "      0 gives the base, 1 the other model; 0 gives the base, 1 the other model;\n"
        "      0 gives the base, 1 the other model; 0 gives the base, 1 the other model;\n"
        "      usually from -0.5 to 1.5\n"
        "  flatten (bool, one for all models, default true)\n"
        "      one vector a tensor\n"
        "\n"
        "with any method, under `oxmerge:` in the recipe\n"
        "  keep: the tensor is that of one model\n"
        "  layer_scale: a factor of what the method adds to the base\n"
        "\n"
        "example\n"
        "  merge_method: slerp\n"
        '  base_model: "models/base"\n'
        "  models:\n"
        '    - model: "models/a"\n'
        "  parameters:\n"
        "    t: 0.4\n"
        "  dtype: bfloat16\n"
    )
    assert json.loads(run("methods", "slerp", "--json")[1]) == METHODS[1]


def test_the_example_of_each_method_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = random_arrays({"w": (40, 300), "b": (7,)}, 0)
    for seed, name in enumerate(["base", "a", "b", "c"]):
        write_model(tmp_path / "models" / name, tuned(base, seed), "BF16")
    monkeypatch.chdir(tmp_path)
    for method in _core.methods():
        assert main(["methods", method["name"]]) == 0
        page = capsys.readouterr().out
        example = textwrap.dedent(page.partition("\nexample\n")[2])
        oxmerge.merge(oxmerge.Recipe.from_yaml(example), tmp_path / method["name"])


def checkpoint() -> Checkpoint:
    """Build a small model with experts in some layers and a tied head."""
    tensors = [Tensor("model.embed_tokens.weight", (100, 8), 0)]
    start = 1600
    for layer in range(4):
        tensors.append(Tensor(f"model.layers.{layer}.norm.weight", (8,), start, "F32"))
        start += 32
        for expert in range(2 if layer != 2 else 0):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up.weight"
            tensors.append(Tensor(name, (16, 8), start))
            start += 256
    tensors.append(Tensor("lm_head.weight", (100, 8), 0))
    tensors.append(Tensor("scale", (), start, "I8"))
    return Checkpoint(tensors)


def test_inspect(run: Any, tmp_path: Path) -> None:
    text_config = {"tie_word_embeddings": True, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text_config}))
    code, out, err = run("inspect", str(tmp_path), engine=FakeEngine(open_checkpoint=checkpoint()))
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == [
        "files       1, 4.87 kB of weights",
        "tensors     13",
        "parameters  2,401 (2.40k)",
        "dtype       BF16: 8 tensors, 4.74 kB",
        "dtype       F32: 4 tensors, 128 B",
        "dtype       I8: 1 tensors, 1 B",
        "tied        output head = input embedding, says the config, though a head is stored",
        "",
        "model.layers: 4 layers",
        "  norm.weight                                    F32   8",
        "  mlp.experts.#.up.weight                        BF16  16 x 8, layers 0-1, 3, 2 each",
        "",
        "outside of layers",
        "  model.embed_tokens.weight                      BF16  100 x 8",
        "  lm_head.weight                                 BF16  100 x 8",
        "  scale                                          I8    scalar",
    ]


def test_inspect_knows_the_layers_that_merging_knows(run: Any, tmp_path: Path) -> None:
    engine = FakeEngine(open_checkpoint=checkpoint())
    for count, stacks in ((3, {"model.layers": 3}), (7, {})):
        (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": count}))
        for model in (tmp_path, tmp_path / "model.safetensors"):
            out = run("inspect", str(model), "--json", engine=engine)[1]
            assert json.loads(out)["stacks"] == stacks


def test_inspect_json(run: Any) -> None:
    engine = FakeEngine(open_checkpoint=checkpoint())
    data = json.loads(run("inspect", "nowhere", "--json", engine=engine)[1])
    assert data["parameters"] == 2401
    assert data["stacks"] == {"model.layers": 4}
    assert len(data["tensors"]) == 13
    assert data["files"] == ["model.safetensors"]


def test_demo_makes_and_merges(run: Any, tmp_path: Path) -> None:
    engine = FakeEngine()
    folder = tmp_path / "demo"
    code, out, err = run("demo", "--directory", str(folder), engine=engine)
    assert (code, out) == (0, "")
    assert engine.calls == [
        (
            "merge",
            (str(folder / "recipe.yml"), str(folder / "merged")),
            {"overwrite": True, "fresh": True},
        )
    ]
    assert "made two checkpoints of 53.5 MB each" in err
    told, _, commands = err.partition("\n\nwhat to try next:\n")
    assert told.splitlines()[-2].startswith("wrote `")
    verbs = [shlex.split(command)[3] for command in commands.splitlines()]
    assert verbs == ["inspect", "plan", "sweep", "methods", "bench"]


def test_a_recipe_from_standard_input(tmp_path: Path, twins: Path) -> None:
    recipe = (twins / "linear.yml").read_bytes()

    def run(*arguments: str, text: bytes = recipe) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "oxmerge", *arguments]
        return subprocess.run(command, input=text, cwd=twins, capture_output=True, check=False)

    assert run("merge", "-", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out/oxmerge_recipe.yml").read_bytes() == recipe
    assert b"method    linear" in run("plan", "-").stdout
    swept = ["--set", "models[0].parameters.weight=0.1,0.2"]
    assert run("sweep", "-", str(tmp_path / "w{weight}"), *swept).returncode == 0
    assert (tmp_path / "w0.2/model.safetensors").exists()
    if os.path.exists("/dev/fd/0"):  # as in `oxmerge plan <(sed … recipe.yml)`
        assert b"method    linear" in run("plan", "/dev/fd/0").stdout
    for text, told in (
        (b"", b"found nothing"),
        (b"\xff", b"not a text file"),
        (b"a: [", b"line 1"),
    ):
        failed = run("plan", "-", text=text)
        assert failed.returncode == 2
        assert told in failed.stderr
    closed = process(
        "import os, sys; os.close(0); sys.stdin = None\n"
        "from oxmerge.cli import main; sys.exit(main(['plan', '-']))"
    )
    assert (closed.returncode, closed.stderr.splitlines()[0]) == (
        2,
        "error: there is no standard input",
    )


def test_exit_code_of_what_is_not_supported(tmp_path: Path, run: Any) -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    write_model(tmp_path / "a", random_arrays({"x": (2,)}, 0), config=config)
    (tmp_path / "r.yml").write_text("merge_method: linear\nmodels: [{model: a}]\n")
    assert run("plan", str(tmp_path / "r.yml"), engine=Engine())[0] == 1
    assert run("inspect", str(tmp_path / "a"), engine=Engine())[0] == 1


# Failure.

ERRORS: list[tuple[BaseException, int, str]] = [
    (
        RecipeError("this recipe cannot be read", problems=[Problem("recipe", "a", advice="b")]),
        2,
        "error: this recipe cannot be read\n  - a\n    hint: b\n",
    ),
    (
        PlanError(
            "the models do not fit",
            problems=[
                Problem("shape", "shapes differ", tensor="x", expected="[1]", found="[2]"),
                Problem("missing", "not there", advice="look"),
                Problem("missing", "nor\nthis", advice="look"),
            ],
            advice="or do without",
        ),
        1,
        (
            "error: the models do not fit\n"
            "  - tensor `x`: shapes differ: expected [1], found [2]\n"
            "  - not there\n    hint: look\n"
            "  - nor\\nthis\n    hint: look\n"
            "hint: or do without\n"
        ),
    ),
    (
        CheckpointError("cut short", file="m.safetensors", expected="10 bytes", found="9"),
        1,
        "error: `m.safetensors`: cut short: expected 10 bytes, found 9\n",
    ),
    (
        MemoryBudgetError("too little", advice="give 300 MiB"),
        1,
        "error: too little\nhint: give 300 MiB\n",
    ),
    (OutputError("in use", file="out"), 1, "error: `out`: in use\n"),
    (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "r.yml"),
        1,
        "error: `r.yml`: no such file or directory\n",
    ),
    (
        FileExistsError(errno.EEXIST, "the output directory is not empty", "out"),
        1,
        (
            "error: `out`: the output directory is not empty\n"
            "hint: name a new directory, or replace the model that is there with `--overwrite`\n"
        ),
    ),
    (
        OSError(errno.ENOSPC, "not enough space: 141 GB needed, 2 GB free", "out"),
        1,
        (
            "error: `out`: not enough space: 141 GB needed, 2 GB free\n"
            "hint: free some space, or name a directory on another disk\n"
        ),
    ),
    (
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "r.yml/out"),
        1,
        (
            "error: `r.yml/out`: not a directory\n"
            "hint: a part of this path is a file: name another directory\n"
        ),
    ),
    (OSError("odd"), 1, "error: odd\n"),
    (MemoryError(), 1, "error: out of memory\n"),
    (KeyboardInterrupt(), 130, "error: interrupted\n"),
]


@pytest.mark.parametrize(("error", "code", "text"), ERRORS)
def test_errors_in_plain_text(run: Any, error: BaseException, code: int, text: str) -> None:
    found = run("merge", "r.yml", "out", "-q", engine=FakeEngine(error))
    assert found == (code, "", text)


@pytest.mark.parametrize(("error", "code", "text"), ERRORS)
def test_errors_as_data(run: Any, error: BaseException, code: int, text: str) -> None:
    found_code, out, err = run("plan", "r.yml", "--json", engine=FakeEngine(error))
    assert (found_code, err) == (code, "")
    data = json.loads(out)["error"]
    assert data["kind"] == type(error).__name__
    assert data["message"] in text or data["message"].lower() in text
    assert len(data.get("problems", [])) == text.count("\n  - ")


def test_usage_errors_as_data(run: Any) -> None:
    code, out, err = run("plan", "--json", "--strct", "r.yml")
    assert (code, err) == (2, "")
    assert json.loads(out)["error"]["advice"] == "did you mean `--strict`?"


def test_a_defect_is_not_dressed_up() -> None:
    with pytest.raises(ZeroDivisionError):
        main(["plan", "r.yml"], engine=FakeEngine(ZeroDivisionError()))


def test_the_numbers_of_system_errors_are_not_for_people(run: Any) -> None:
    error = OSError(errno.EIO, "failed to read: Input/output error (os error 5); look", "m")
    _, _, err = run("plan", "r", engine=FakeEngine(error))
    assert err == "error: `m`: failed to read: Input/output error; look\n"


def test_every_error_of_the_package_is_told(run: Any) -> None:
    for kind in OxmergeError.__subclasses__():
        assert run("plan", "r", engine=FakeEngine(kind("what", advice="how")))[2] == (
            "error: what\nhint: how\n"
        )


# Progress and streams.


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_plain_progress_speaks_every_few_seconds() -> None:
    lines: list[str] = []
    times = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    progress = PlainProgress(lines.append, lambda: next(times))
    for _ in range(4):
        progress(SNAPSHOT)
    assert lines[0] == (
        " 50%  500 MB of 1 GB  0.25 GB/s  6.0 s left  peak 180 MiB  "
        "model.layers.3.mlp.up_proj.weight"
    )
    assert len(lines) == 2


@pytest.mark.parametrize("width", range(5, 200, 3))
def test_a_line_of_any_width_has_the_percentage(width: int) -> None:
    line = progress_line(SNAPSHOT, 2.0, 6.0, width)
    assert line.startswith(" 50%")
    assert len(line) <= width
    if width >= 100:
        assert " 50%  ##########----------  500 MB of 1 GB  " in line


def test_names_are_shortened_in_a_narrow_line() -> None:
    line = progress_line(replace(SNAPSHOT, tensor="model.layers.3." + "x" * 90), 2.0, 6.0, 80)
    assert line.startswith(" 50%  500 MB of 1 GB  0.75 GB/s  6.0 s left  peak 180 MiB  model.")
    assert "..." in line
    assert len(line) == 80
    assert progress_line(SNAPSHOT, 2.0, 6.0, 20) == " 50%  500 MB of 1 GB"
    assert progress_line(SNAPSHOT, 2.0, 6.0, 19) == " 50%  0.75 GB/s"


def test_the_time_left_is_shown_when_it_no_longer_swings() -> None:
    estimate = Estimate()
    total = 1000
    shown = []
    for tick in range(1, 300):
        seconds = tick / 10
        # The first five seconds go into a tensor that is read several times; then 40 a second.
        done = 2 if seconds < 5 else min(2 + 40 * (seconds - 5), total)
        snapshot = replace(SNAPSHOT, bytes_done=int(done), bytes_total=total)
        shown.append((seconds, estimate.left(snapshot, seconds)))
    first, left = next((seconds, left) for seconds, left in shown if left is not None)
    end = 5 + (total - 2) / 40
    assert 5 < first < 25
    assert left == pytest.approx(end - first, abs=4)
    assert all(left is not None for seconds, left in shown if seconds >= first)
    even = Estimate()
    assert even.left(replace(SNAPSHOT, bytes_done=10), 1.0) is None
    assert even.left(replace(SNAPSHOT, bytes_done=0), 4.0) is None


@pytest.mark.parametrize("columns", [30, 60, 200])
def test_a_bar_in_a_terminal_of_any_width(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with show_progress(Printer(messages=stream)) as progress:
        assert progress is not None
        progress(SNAPSHOT)
    drawn = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", stream.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", drawn) if line.strip()]
    assert lines
    assert all(line.startswith(" 50%") and len(line) <= columns for line in lines)


class Notebook:
    """What stands for IPython in a notebook."""

    def __init__(self) -> None:
        self.kernel = self
        self.lines: list[str] = []

    def get_ipython(self) -> Notebook:
        return self

    def display(self, line: object, *, display_id: bool) -> Notebook:
        assert display_id
        return self.update(line)

    def update(self, line: object) -> Notebook:
        self.lines.append(repr(line))
        return self


def test_a_notebook_shows_progress_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook()
    for name in ("IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, name, notebook)
    for asked in (None, True):
        notebook.lines.clear()
        with watched(asked) as progress:
            assert progress is not None
            progress(SNAPSHOT)
        first, line, last = notebook.lines
        assert (first, last) == ("", "")
        assert line.startswith(" 50%  ##########----------  500 MB of 1 GB")
    with watched(False) as progress:
        assert progress is None


def test_progress_in_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with watched(None) as progress:
        assert progress is None
    with watched(True) as progress:
        assert progress is not None
        progress(SNAPSHOT)
    assert " 50%" in stream.getvalue()
    lines: list[Snapshot] = []
    with watched(lines.append) as progress:
        assert progress is not None
        progress(SNAPSHOT)
    assert lines == [SNAPSHOT]


def test_a_merge_shows_what_it_is_asked_to(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    @contextmanager
    def noted(progress: object) -> Iterator[None]:
        asked.append(progress)
        yield None

    monkeypatch.setattr("oxmerge.merging.watched", noted)
    oxmerge.merge(twins / "linear.yml", tmp_path / "a")
    oxmerge.merge(twins / "linear.yml", tmp_path / "b", progress=True)
    swept = {"models[0].parameters.weight": "0.1,0.2"}
    oxmerge.sweep(twins / "linear.yml", tmp_path / "w{0}", swept, progress=False)
    assert asked == [None, True, False]


def test_progress_before_the_first_byte() -> None:
    assert "? left" in progress_line(replace(SNAPSHOT, bytes_done=0, bytes_total=0), 0.0)


def test_a_bar_where_someone_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with show_progress(Printer(messages=stream)) as progress:
        assert progress is not None
        progress(replace(SNAPSHOT, tensor="odd[/name]"))
    assert "500 MB of 1 GB" in stream.getvalue()
    assert "odd[/name]" in stream.getvalue()


def test_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    with show_progress(Printer(quiet=True)) as progress:
        assert progress is None
    monkeypatch.setenv("OXMERGE_NO_PROGRESS", "1")
    with show_progress(Printer()) as progress:
        assert progress is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (59.0, "59.0 s"), (61.0, "1 min 1 s"), (3700.0, "1 h 1 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_colour_only_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for variable, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", variable)
        stream = Terminal()
        Printer(messages=stream).error("bad")
        assert ("\x1b[" in stream.getvalue()) is coloured
    plain = io.StringIO()
    Printer(messages=plain).error("bad")
    assert plain.getvalue() == "error: bad\n"


def test_a_poor_encoding_does_not_break_the_output() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Printer(output=stream).data("θ")
    stream.flush()
    assert raw.getvalue() == b"\\u03b8\n"


def test_what_terminals_obey_is_shown_as_escapes() -> None:
    stream = io.StringIO()
    printer = Printer(output=stream, messages=stream)
    printer.data("a\x1b[2Jb\nc\u202e")
    printer.lines(["d\ne", "f"])
    printer.say("x\r\x07\x9b\ny")
    printer.warnings(["odd\nerror: forged"])
    printer.error("bad\x1b[1m", [("one\x00", "two\x7f")])
    assert stream.getvalue().splitlines() == [
        r"a\x1b[2Jb",
        r"c\u202e",
        r"d\ne",
        "f",
        r"x\r\x07\x9b\ny",
        r"warning: odd\nerror: forged",
        r"error: bad\x1b[1m",
        r"  - one\x00",
        r"    hint: two\x7f",
    ]


# As a process.


def process(code: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with the package on its path."""
    folder = Path(sys.modules["oxmerge.cli"].__file__ or "").parents[2]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
        **settings,
    )


def test_the_version_imports_nothing_heavy() -> None:
    done = process(
        "import sys; from oxmerge.cli import main; code = main(['--version']); "
        "print({'rich', 'yaml', 'numpy', 'torch', 'safetensors', 'oxmerge.planning.planner'} "
        "& set(sys.modules), code)"
    )
    assert done.stderr == ""
    version, loaded = done.stdout.splitlines()
    assert version.startswith("oxmerge ")
    assert loaded == "set() 0"


def test_a_closed_pipe_is_no_error() -> None:
    done = process(
        "import os, sys\n"
        "from oxmerge.cli import main\n"
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)\n"
        "class Engine:\n"
        "    def methods(self):\n"
        "        keys = ['name', 'class', 'title', 'cost']\n"
        "        return [dict.fromkeys(keys, 'x' * 100000)]\n"
        "    def installed_methods(self): return []\n"
        "sys.stderr.write(str(main(['methods'], engine=Engine())))\n"
    )
    assert done.stderr == "0"
    assert done.returncode == 0


CLOSED_PIPE = (
    "import os, sys\n"
    "from oxmerge.cli import main\n"
    "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, {stream})\n"
)


def test_a_merge_goes_on_when_nobody_reads_its_progress() -> None:
    done = process(
        CLOSED_PIPE.format(stream=2) + "from oxmerge.cli import progress\n"
        "progress._SECONDS_BETWEEN_LINES = 0\n"
        "class Snapshot:\n"
        "    bytes_done = bytes_total = bytes_read = peak_memory = 1; tensor = 'x'\n"
        "    bytes_fetched = bytes_to_fetch = 0\n"
        "class Engine:\n"
        "    def merge(self, recipe, directory, *, progress, **options):\n"
        "        for _ in range(3): progress(Snapshot)\n"
        "        print('merged', flush=True)\n"
        "        raise MemoryError\n"
        "sys.exit(main(['merge', 'r.yml', 'out'], engine=Engine()))\n"
    )
    assert (done.returncode, done.stdout) == (1, "merged\n")


def test_a_closed_pipe_of_the_engine_is_an_error(run: Any) -> None:
    error = BrokenPipeError(errno.EPIPE, "Broken pipe", "out/model.safetensors")
    code, _, err = run("merge", "r.yml", "out", engine=FakeEngine(error))
    assert (code, err) == (1, "error: `out/model.safetensors`: broken pipe\n")


def test_a_failure_keeps_its_code_when_nobody_reads_the_data() -> None:
    done = process(
        CLOSED_PIPE.format(stream=1) + "sys.exit(main(['methods', 'slurp', '--json']))\n"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown method `slurp`\n")


@pytest.mark.parametrize("line", ["--help", "methods --json"])
def test_data_that_cannot_be_written_is_a_failure(line: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "oxmerge", *line.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no space left on device\nhint: ")


def test_a_process_without_streams_has_an_exit_code() -> None:
    done = process(
        "import sys\n"
        "from oxmerge.cli import main\n"
        "sys.stdout = sys.stderr = None\n"
        "sys.exit(main(['methods']) + main(['methods', 'slurp']))\n"
    )
    assert done.returncode == 2
