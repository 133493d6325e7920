"""Models with different tokenizers: their rows are merged by token, and the output has a tokenizer.

Tokenizers are trained on the spot. Weights are small whole numbers, so that sums and means are exact
and the rows can be worked out with NumPy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from writers import directory_bytes, write_file, write_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
    ends: tuple[str, str] = ("<s>", "</s>"),
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
    begin, end = (ids.get(token) for token in ends)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": rows, "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16", "bos_token_id": begin, "eos_token_id": end,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": begin, "eos_token_id": [end, ids["<unk>"]], "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": ends[0], "eos_token": ends[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return Model(folder, rows, ids, tensors)


def merge(
    tmp_path: Path, models: Sequence[Model], *, base: Model | None = None, out: str = "out", **more: Any
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


def row_of(token: str, name: str, models: Sequence[Model], base: Model | None) -> NDArray[Any]:
    """Return the merged row of a token, by the rules: each its own, else base, only one, or mean."""
    own = [m.tensors[name][m.ids[token]] if m.ids.get(token, m.rows) < m.rows else None for m in models]
    having = [row for row in own if row is not None]
    of_base = None if base is None else own[models.index(base)]
    default = np.zeros(models[0].tensors[name].shape[1:])
    if having:
        default = having[0] if len(having) == 1 else of_base
        default = np.mean(having, axis=0) if default is None else default
    return np.mean([default if row is None else row for row in own], axis=0, dtype=np.float64)


def check_rows(out: Path, name: str, models: Sequence[Model], base: Model | None = None) -> None:
    """Check every row of a token in a merged tensor."""
    rows = read(out, name)
    for token, number in vocabulary(out).items():
        expected = row_of(token, name, models, base).astype(np.float32)
        assert np.allclose(rows[number], expected, rtol=1e-6, atol=0), (name, token)


def check_loads(out: Path, models: Sequence[Model]) -> None:
    """Check that transformers loads the model, and takes text apart and together with its tokens."""
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = loaded.get_vocab()
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size > max(ids.values())
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


def test_holes_are_filled_from_the_base(tmp_path: Path) -> None:
    models = [make(tmp_path / n, train("BPE", n), seed=s) for s, n in enumerate("abc")]
    for base in models:
        out = merge(tmp_path, models, base=base, out=base.folder.name + "-out",
                    tokenizer={"source": "union"})  # fmt: skip
        for name in HEADS:
            check_rows(out, name, models, base)
