"""Recipes that ask for a tokenizer or a chat template: taken where the output has it already."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
from oxmerge.errors import UnsupportedError
from writers import directory_bytes, random_arrays, write_model, write_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TOKENS = {"a": 0, "b": 1, "c": 2}
ROWS = 6
OTHER_WAYS = (
    "merge this recipe with mergekit, or give the models one vocabulary first, as "
    "`mergekit-tokensurgeon` does"
)


def tokenizer(tokens: Mapping[str, int], added: Mapping[str, int] | None = None) -> str:
    """Return a `tokenizer.json`."""
    listed = [{"id": at, "content": text} for text, at in (added or {}).items()]
    model = {"type": "BPE", "vocab": dict(tokens), "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": listed, "model": model})


def template(text: object) -> str:
    """Return a `tokenizer_config.json`."""
    return json.dumps({"chat_template": text})


def make(folder: Path, rows: int = ROWS, **files: str | bytes) -> Path:
    """Write a model with a tokenizer, and files whose names have `_` before the ending."""
    arrays = random_arrays({"model.embed_tokens.weight": (rows, 2), "x": (3,)}, rows)
    write_model(folder, arrays)
    for name, content in {"tokenizer_json": tokenizer(TOKENS), **files}.items():
        stem, _, ending = name.rpartition("_")
        data = content.encode() if isinstance(content, str) else content
        if data:
            (folder / f"{stem}.{ending}").write_bytes(data)
    return folder


def problems(tmp_path: Path, models: list[str] | None = None, **more: Any) -> list[tuple[str, Any]]:
    """Return message and advice of what is refused when the recipe in `tmp_path` is planned."""
    recipe = write_recipe(
        tmp_path / "r.yml", "linear", models or ["a", "b"], each={"weight": 1}, **more
    )
    try:
        oxmerge.plan(recipe)
    except UnsupportedError as error:
        found = error.problems
    else:
        return []
    assert all(problem.code == "unsupported" and problem.is_in_recipe for problem in found)
    return [(problem.message, problem.advice) for problem in found]


DONORS = ["base", "a", "./a", "ABSOLUTE", "ABSOLUTE/", "model:a", {"path": "a"}, {"model": "a"}]


@pytest.mark.parametrize("source", DONORS, ids=str)
def test_the_tokenizer_of_the_donor(tmp_path: Path, source: Any) -> None:
    # Another spelling of the same tokens.
    make(tmp_path / "a")
    make(tmp_path / "b", tokenizer_json=tokenizer(TOKENS) + "\n")
    if isinstance(source, str):
        source = source.replace("ABSOLUTE", str(tmp_path / "a"))
    assert problems(tmp_path, tokenizer_source=source) == []
    if source != "model:a":  # the form of a time that had no `tokenizer`
        assert problems(tmp_path, tokenizer={"source": source}) == []
    recipe = tmp_path / "r.yml"
    oxmerge.merge(recipe, tmp_path / "with")
    write_recipe(recipe, "linear", ["a", "b"], each={"weight": 1})
    oxmerge.merge(recipe, tmp_path / "without")
    one, other = directory_bytes(tmp_path / "with"), directory_bytes(tmp_path / "without")
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == {
        "README.md",
        "oxmerge_recipe.yml",
    }


def test_the_base_model_is_the_donor(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", tokenizer_json=tokenizer(TOKENS, {"d": 3}))
    recipe = tmp_path / "r.yml"
    each = {"weight": 1}
    write_recipe(recipe, "task_arithmetic", ["a"], base="b", each=each, tokenizer_source="b")
    with pytest.raises(UnsupportedError, match="their text: those of `a` and the donor `b` differ"):
        oxmerge.plan(recipe)
    (tmp_path / "a/tokenizer.json").write_text(tokenizer(TOKENS, {"d": 3}))
    oxmerge.plan(recipe)


UNIONS: list[dict[str, Any]] = [
    {"tokenizer_source": "union"},
    {"tokenizer": {"source": "union"}},
    {"tokenizer": {}},
    {"tokenizer": {"source": None, "tokens": {}, "pad_to_multiple_of": 1}},
]


@pytest.mark.parametrize("union", UNIONS, ids=str)
def test_a_union_of_the_same_tokens(tmp_path: Path, union: dict[str, Any]) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", tokenizer_json=tokenizer({"a": 0, "b": 1}, {"c": 2}))
    assert problems(tmp_path, **union) == []


def test_a_union_that_has_more_tokens(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", tokenizer_json=tokenizer(TOKENS, {"<x>": 4}))
    message = "not supported yet: a union of tokenizers: `b` has tokens that the donor `a` lacks"
    advice = "write `base`, which leaves those tokens out of the output"
    assert problems(tmp_path, tokenizer_source="union") == [(message, advice)]
    assert problems(tmp_path, tokenizer_source="base") == []


@pytest.mark.parametrize("source", ["base", "union", "a"])
@pytest.mark.parametrize(
    "tokens", [{"a": 0, "b": 2, "c": 1}, {"a": 0, "b": 1}, {"a": 0, "b": 1, "x": 2}], ids=str
)
def test_other_tokens(tmp_path: Path, source: str, tokens: dict[str, int]) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", tokenizer_json=tokenizer(tokens))
    message = (
        "not supported yet: matching tokens by their text: those of `b` and the donor `a` differ"
    )
    assert problems(tmp_path, tokenizer_source=source) == [(message, OTHER_WAYS)]


def test_vocabularies_of_other_sizes_are_reported_with_it(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", rows=7, tokenizer_json=tokenizer({**TOKENS, "d": 3}))
    recipe = write_recipe(
        tmp_path / "r.yml", "linear", ["a", "b"], each={"weight": 1}, tokenizer_source="union"
    )
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(recipe)
    assert [problem.code for problem in caught.value.problems] == ["unsupported", "tensor-shape"]


@pytest.mark.parametrize("source", ["base", "union"])
def test_a_model_without_a_tokenizer_has_that_of_the_donor(tmp_path: Path, source: str) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", tokenizer_json="")
    assert problems(tmp_path, tokenizer_source=source) == []


@pytest.mark.parametrize(
    ("own", "theirs", "is_taken"), [(b"x", b"x", True), (b"x", b"y", False), (b"", b"y", False)]
)
def test_tokenizers_that_only_their_program_reads(
    tmp_path: Path, own: bytes, theirs: bytes, *, is_taken: bool
) -> None:
    make(tmp_path / "a", tokenizer_json="", tokenizer_model=own)
    make(tmp_path / "b", tokenizer_json="", tokenizer_model=theirs)
    message = "cannot tell whether `b` and the donor `a` have the same tokens"
    advice = "leave it out, if they have: the output has the donor's tokenizer"
    refused = [] if is_taken else [(message, advice)]
    assert problems(tmp_path, tokenizer_source="base") == refused


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", tokenizer_json="{")
    ((message, _),) = problems(tmp_path, tokenizer_source="base")
    assert message == "cannot tell whether `b` and the donor `a` have the same tokens"


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", tokenizer_json=tokenizer(TOKENS) + "\n")
    make(tmp_path / "c", tokenizer_json=tokenizer({**TOKENS, "d": 3}))
    make(tmp_path / "twin")
    message = "not supported yet: the tokenizer of another model than the donor `a` (`{}`)"
    copy = (
        "write `base` for the donor's; where this one has the same tokens with the same ids, copy "
        "its files over those of the output"
    )
    for source, advice in {"b": copy, "c": OTHER_WAYS, "org/nowhere": copy}.items():
        assert problems(tmp_path, tokenizer_source=source) == [(message.format(source), advice)]
    assert problems(tmp_path, tokenizer_source="twin") == []


def test_what_else_a_tokenizer_may_ask_for(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    asked = {"source": "base", "tokens": {"d": {"source": "b"}}, "pad_to_multiple_of": 64}
    assert problems(tmp_path, tokenizer=asked) == [
        (
            "not supported yet: rows for single tokens (`tokens`)",
            "leave it out, or take mergekit for this recipe",
        ),
        (
            "not supported yet: another number of rows (`pad_to_multiple_of`)",
            "leave it out: the output has as many rows as the donor",
        ),
    ]


ONE, TWO = "{% for m in messages %}one{% endfor %}", "{% for m in messages %}two{% endfor %}"
NAMED = [{"name": "tool", "template": TWO}, {"name": "default", "template": ONE}]
#: What three models have for a template, and whether the first one's is what `auto` takes.
AUTO: list[tuple[tuple[object, object, object], bool]] = [
    ((None, None, None), True),
    ((ONE, None, None), True),
    ((ONE, ONE, TWO), True),
    ((ONE, TWO, None), True),  # mergekit takes any of them
    ((ONE, TWO, TWO), False),
    ((None, TWO, None), False),
    ((NAMED, ONE + "\n", TWO), True),
    ((TWO, NAMED, ONE), False),
    ((7, [], [1]), True),
]


@pytest.mark.parametrize(("templates", "is_taken"), AUTO)
def test_the_usual_chat_template(
    tmp_path: Path, templates: tuple[object, ...], *, is_taken: bool
) -> None:
    for name, text in zip("abc", templates, strict=True):
        make(tmp_path / name, tokenizer_config_json=template(text))
    found = problems(tmp_path, ["a", "b", "c"], chat_template="auto")
    assert bool(found) is not is_taken
    if found:
        ((message, advice),) = found
        assert message.endswith("a chat template that most models have and the donor `a` has not")
        assert advice == (
            "leave it out, and save that of `b` in the output as `chat_template.jinja`"
        )


def test_a_chat_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    make(tmp_path / "a", tokenizer_config_json=template(TWO), chat_template_jinja=ONE)
    make(tmp_path / "b", tokenizer_config_json=template(TWO))
    assert problems(tmp_path, chat_template=ONE) == []
    for text in (TWO, "chatml", ONE + "\n"):
        ((message, advice),) = problems(tmp_path, chat_template=text)
        assert message == "not supported yet: another chat template than the donor's"
        assert advice == (
            "leave it out, and save the template in the output as `chat_template.jinja`"
        )


def test_the_advice_on_templates_works(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    donor = make(tmp_path / "a", tokenizer_config_json=template(ONE))
    (donor / "chat_template.jinja").write_text(TWO)
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(donor)
    assert loaded.chat_template == TWO
