"""Problems, errors and sizes."""

from __future__ import annotations

import pickle

import pytest
from oxmerge import errors
from oxmerge.problems import Place, Problem, did_you_mean, group_problems, near, shorten
from oxmerge.sizes import format_size, parse_size


def test_a_problem_reads_as_one_or_two_lines() -> None:
    problem = Problem(
        "shape", "shapes differ", Place("models[1]"), "b.safetensors", "x", "[1]", "[2]", "look"
    )
    assert str(problem) == (
        "models[1]: `b.safetensors`: tensor `x`: shapes differ: expected [1], found [2]\n"
        "  hint: look"
    )


def test_a_problem_is_one_line_whatever_is_in_its_names() -> None:
    problem = Problem("shape", "differs", file="f\n", tensors=("x\x1b", "y"), count=2)
    assert str(problem) == r"`f\n`: differs (2 tensors: `x\x1b`, `y`)"


def test_equal_problems_are_one_entry() -> None:
    many = [Problem("missing", "gone", file="f", tensor=f"x.{i}") for i in range(200)]
    other = Problem("missing", "gone too", tensor="y")
    grouped = group_problems([*many[:100], other, *many[100:]])
    assert [str(problem) for problem in grouped] == [
        "`f`: gone (200 tensors: `x.0`, `x.1`, `x.2`, ...)",
        "tensor `y`: gone too",
    ]


@pytest.mark.parametrize(
    ("files", "place"),
    [
        (("m/f0", "m/f0"), "`m/f0`: "),
        (("m/f0", "m/f1"), "`m`: "),
        (("m/f0", "n/f1"), ""),
        (("f0", "f1"), ""),
        (("m/f0", None), ""),
    ],
)
def test_files_that_differ_are_the_folder_they_lie_in(
    files: tuple[str | None, str | None], place: str
) -> None:
    pair = [Problem("missing", "gone", file=file, tensor=f"x{i}") for i, file in enumerate(files)]
    assert str(*group_problems(pair)) == f"{place}gone (2 tensors: `x0`, `x1`)"


def test_the_same_problem_twice_is_one() -> None:
    problem = Problem("missing", "gone", tensor="x")
    assert group_problems([problem, problem]) == (problem,)


def test_suggestions() -> None:
    assert did_you_mean("dare-ties", ["dare_ties", "ties"]) == "did you mean `dare_ties`?"
    assert did_you_mean("xyz", ["dare_ties", "ties"]) is None


SINGLE = [
    errors.CheckpointError,
    errors.UnsupportedError,
    errors.MemoryBudgetError,
    errors.InputChangedError,
    errors.OutputError,
    errors.PlanError,
    errors.RecipeError,
]


@pytest.mark.parametrize("kind", SINGLE)
def test_errors_keep_their_parts_and_can_be_pickled(kind: type[errors.OxmergeError]) -> None:
    error = kind("bad header", file="f", tensor="x", expected="1", found="2", advice="look")
    assert str(error) == "`f`: tensor `x`: bad header: expected 1, found 2\n  hint: look"
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert (copy.file, copy.advice) == ("f", "look")


def test_errors_with_problems() -> None:
    problems = (Problem("a", "one", advice="do"), Problem("b", "two"))
    error = errors.PlanError("cannot merge", problems=problems)
    assert str(error) == "cannot merge: 2 problems\n- one\n    hint: do\n- two"
    assert pickle.loads(pickle.dumps(error)).problems == problems
    assert str(errors.PlanError("cannot merge", problems=problems[1:])) == "cannot merge: two"
    assert isinstance(error, ValueError)
    assert isinstance(error, errors.OxmergeError)


def test_the_text_of_an_error_is_in_its_repr() -> None:
    error = errors.CheckpointError("bad header", file="f", found="x", advice="look")
    assert repr(error) == "CheckpointError('`f`: bad header: found x\\n  hint: look')"
    problems = (Problem("a", "one", advice="do"), Problem("b", "two"))
    for kind in (errors.PlanError, errors.RecipeError):
        text = repr(kind("cannot merge", problems=problems))
        assert text.startswith(f"{kind.__name__}('cannot merge: 2 problems")
        assert "one" in text
        assert "two" in text
    assert repr(errors.OxmergeError()) == "OxmergeError('')"


def test_what_is_not_supported_is_one_error() -> None:
    lora, other = Problem("unsupported", "a LoRA", Place("models[0]")), Problem("recipe", "a typo")
    for kind in (errors.PlanError, errors.RecipeError):
        assert type(kind.of("cannot merge", [lora, lora])) is errors.UnsupportedError
        assert type(kind.of("cannot merge", [lora, other])) is kind
        assert type(kind.of("cannot merge", [])) is kind
        assert kind.of("cannot merge", [lora]).problems == (lora,)
    for general in (errors.PlanError, errors.RecipeError, errors.CheckpointError, ValueError):
        assert issubclass(errors.UnsupportedError, general)
    assert errors.UnsupportedError("packed").as_problem().code == "unsupported"


def test_a_report_shows_a_hundred_problems() -> None:
    problems = [Problem("recipe", f"problem {at}") for at in range(250)]
    lines = str(errors.RecipeError("cannot read", problems=problems)).splitlines()
    assert lines[0] == "cannot read: 250 problems"
    assert lines[100:] == ["- problem 99", "and 150 more"]


def test_long_names_are_shortened_in_the_middle() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcd...ijk"
    name = "x" * 1000
    problem = Problem(
        "shape",
        f"`{name}` differs",
        Place(name),
        tensor=name,
        expected=name,
        found=name,
        advice="look",
    )
    assert len(str(problem)) < 1200
    many = Problem("shape", "differs", tensors=(name, name), count=2)
    assert len(str(many)) < 400
    assert problem.tensor == name


NEAR = [
    ("model.layers.31.mlp.up_proj.weight", "model.layers.30.mlp.up_proj.weight"),
    ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight"),
    ("model.layers.0.mpl.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
]


@pytest.mark.parametrize(("word", "expected"), NEAR)
def test_near_names_of_many(word: str, expected: str) -> None:
    known = [
        f"model.layers.{layer}.{part}.weight"
        for layer in range(31)
        for part in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "input_layernorm")
    ]
    found = near(word, known)
    assert expected in found
    assert len(found) <= 3


SIZES: list[tuple[str | int, int]] = [
    (0, 0),
    (123, 123),
    ("123", 123),
    ("256MiB", 1 << 28),
    ("2GiB", 2 << 30),
    ("1.5GiB", 3 << 29),
    ("1KiB", 1024),
    ("1TiB", 1 << 40),
    ("5GB", 5 * 10**9),
    ("5gb", 5 * 10**9),
    ("1.5GB", 1_500_000_000),
    ("0.1GB", 100_000_000),
    ("3 kB", 3000),
    ("2TB", 2 * 10**12),
    ("5B", 5 * 10**9),
    ("5b", 5 * 10**9),
    ("200M", 200 * 10**6),
    ("7k", 7000),
]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-5GB", -1, "1e9", "5 G B", "1.GB", "٣GB", True])
def test_no_sizes(text: str | int) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


SHOWN: list[tuple[int, bool, str]] = [
    (0, False, "0 B"),
    (999, False, "999 B"),
    (1000, False, "1 kB"),
    (4_983_000_000, False, "4.98 GB"),
    (999_999_999, False, "1 GB"),
    (13_500_000_000, False, "13.5 GB"),
    (141_000_000_000, False, "141 GB"),
    (1_410_000_000_000_000, False, "1410 TB"),
    (1 << 28, True, "256 MiB"),
    (1536, True, "1.5 KiB"),
]


@pytest.mark.parametrize(("size", "binary", "text"), SHOWN)
def test_shown_sizes(size: int, binary: bool, text: str) -> None:
    assert format_size(size, binary=binary) == text
