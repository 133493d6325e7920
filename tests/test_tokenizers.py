"""Recipes that ask for a tokenizer or a chat template: taken where the output has it already."""

from __future__ import annotations

import json
import shutil
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
        "oxmerge.json",
        "oxmerge_recipe.yml",
    }


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
    message = "the tokens of `b` cannot be matched: it has its tokens in a `tokenizer.model` only"
    advice = (
        "put a `tokenizer.json` beside it: in Python with transformers, "
        '`AutoTokenizer.from_pretrained("b").save_pretrained("b")`'
    )
    refused = [] if is_taken else [(message, advice)]
    assert problems(tmp_path, tokenizer_source="base") == refused


@pytest.mark.parametrize("asked", [{"tokenizer": {"pad_to_multiple_of": 8}}, {}], ids=str)
def test_a_donor_that_only_its_program_reads(tmp_path: Path, asked: dict[str, Any]) -> None:
    make(tmp_path / "a", tokenizer_json="", tekken_json="{}")
    make(tmp_path / "b", tokenizer_json="" if asked else tokenizer(TOKENS), tekken_json="{}")
    ((message, advice),) = problems(tmp_path, **(asked or {"tokenizer_source": "union"}))
    assert message == (
        "the tokens of `a` cannot be matched: it has its tokens in a `tekken.json` only"
    )
    assert advice == "take the repository of the same model that has a `tokenizer.json`"


def test_a_union_needs_a_tokenizer_json(tmp_path: Path) -> None:
    make(tmp_path / "a", tokenizer_json="", vocab_json=json.dumps(TOKENS))
    make(tmp_path / "b", tokenizer_json=tokenizer({**TOKENS, "d": 3}))
    ((message, _),) = problems(tmp_path, tokenizer_source="union")
    assert (
        message == "the tokens of `a` cannot be matched: it has its tokens in a `vocab.json` only"
    )
    assert problems(tmp_path, tokenizer_source="base") == []


def test_tokenizers_that_cannot_be_read(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", tokenizer_json="{")
    recipe = write_recipe(tmp_path / "r.yml", "linear", ["a", "b"], each={"weight": 1},
                          tokenizer_source="base")  # fmt: skip
    with pytest.raises(
        oxmerge.PlanError, match=r"b/tokenizer.json`: the vocabulary cannot be read"
    ):
        oxmerge.plan(recipe)
    (tmp_path / "b/tokenizer.json").write_text(tokenizer({"a": 0, "b": 0}))
    with pytest.raises(oxmerge.PlanError, match="two tokens have the id 0"):
        oxmerge.plan(recipe)
    (tmp_path / "b/tokenizer.json").write_text(tokenizer({"a": 0, "b": 1 << 60}))
    oxmerge.plan(recipe)  # there is no such row
    (tmp_path / "a/tokenizer.json").write_text(tokenizer({"a": 0, "b": 1 << 60}))
    with pytest.raises(oxmerge.PlanError, match="is more than any vocabulary has"):
        oxmerge.plan(recipe)


def test_the_same_tokens_beside_another_config(tmp_path: Path) -> None:
    for name, config in {"a": "{}", "b": "[]"}.items():
        folder = make(tmp_path / name, tokenizer_json="", tokenizer_config_json=config)
        (folder / "tokenizer.model").write_bytes(b"x")
    assert problems(tmp_path, tokenizer_source="base") == []


def test_the_tokenizer_of_a_model_that_has_none(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", tokenizer_json="")
    ((message, _),) = problems(tmp_path, tokenizer_source="b")
    assert message == "the tokens of `b` cannot be matched: it has no tokenizer"


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    recipe = write_recipe(tmp_path / "r.yml", "linear", ["a", "b"], each={"weight": 1},
                          tokenizer_source="org/nowhere")  # fmt: skip
    with pytest.raises(oxmerge.PlanError, match="or write `base` for the tokenizer of the donor"):
        oxmerge.plan(recipe)


ONE, TWO = "{% for m in messages %}one{% endfor %}", "{% for m in messages %}two{% endfor %}"
NAMED = [{"name": "tool", "template": TWO}, {"name": "default", "template": ONE}]
#: What three models have for a template, and which of them `auto` takes; none: the first one's.
AUTO: list[tuple[tuple[object, object, object], str | None]] = [
    ((None, None, None), None),
    ((ONE, None, None), None),
    ((ONE, ONE, TWO), None),
    ((ONE, TWO, None), None),  # mergekit takes any of them
    ((ONE, TWO, TWO), TWO),
    ((None, TWO, None), TWO),
    ((NAMED, ONE + "\n", TWO), None),
    ((TWO, NAMED, ONE), ONE),
    ((7, [], [1]), None),
]


@pytest.mark.parametrize(("templates", "taken"), AUTO)
def test_the_usual_chat_template(
    tmp_path: Path, templates: tuple[object, ...], taken: str | None
) -> None:
    for name, text in zip("abc", templates, strict=True):
        make(tmp_path / name, tokenizer_config_json=template(text))
    assert written(tmp_path, list("abc"), chat_template="auto") == taken
    own = templates[0] if taken is None else taken
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert config["chat_template"] == own


def written(tmp_path: Path, models: list[str], **more: Any) -> str | None:
    """Merge, and return the chat template in a file of its own."""
    recipe = write_recipe(tmp_path / "r.yml", "linear", models, each={"weight": 1}, **more)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    oxmerge.merge(recipe, tmp_path / "out")
    path = tmp_path / "out/chat_template.jinja"
    return path.read_text() if path.exists() else None


def test_another_chat_template(tmp_path: Path) -> None:
    make(tmp_path / "a", tokenizer_config_json=template(TWO), chat_template_jinja=ONE)
    make(tmp_path / "b", tokenizer_config_json=template(TWO))
    (tmp_path / "a/chat_template.json").write_text("{}")
    # Its own, in which nothing changes.
    assert written(tmp_path, ["a", "b"], chat_template=ONE) == ONE
    assert (tmp_path / "out/chat_template.json").exists()
    for text in (TWO, ONE + "\n"):
        assert written(tmp_path, ["a", "b"], chat_template=text) == text
        config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
        assert config == {"chat_template": text}
        assert not (tmp_path / "out/chat_template.json").exists()


SAID = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "alpaca": "Be kind.\n\n### Instruction:\nHello\n\n### Response:\nHi</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be kind.\n\nHello [/INST] Hi</s>[INST] Bye [/INST]",
}


@pytest.mark.parametrize("name", RENDERED)
def test_chat_templates_by_name(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    make(tmp_path / "a", tokenizer_config_json=json.dumps(about))
    make(tmp_path / "b")
    assert written(tmp_path, ["a", "b"], chat_template=name)
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    said = loaded.apply_chat_template(SAID, tokenize=False, add_generation_prompt=True)
    assert said == RENDERED[name]


@pytest.mark.parametrize("text", ["chatlm", "{{x}}", "no template, but a long text"])
def test_what_is_no_chat_template(tmp_path: Path, text: str) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    recipe = write_recipe(
        tmp_path / "r.yml", "linear", ["a", "b"], each={"weight": 1}, chat_template=text
    )
    with pytest.raises(oxmerge.PlanError) as caught:
        oxmerge.plan(recipe)
    (problem,) = caught.value.problems
    assert problem.message == f"`{text}` is no chat template, and the name of none"
    assert "`chatml`" in (problem.advice or "")
