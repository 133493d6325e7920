"""Adapters that are broken, not whole, or of another model, and references to adapters.

No torch: adapters are written as PEFT writes them, and what is right is worked out with NumPy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
import yaml
from oxmerge.cli import main
from oxmerge.errors import OutputError, PlanError
from oxmerge.models.references import split_adapters
from oxmerge.output.claims import claimed
from safetensors.numpy import save_file
from writers import (
    directory_bytes,
    expert_shapes,
    from_bf16,
    random_arrays,
    read_tensors,
    to_bf16,
    write_file,
    write_model,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from oxmerge.merging import Snapshot

    Arrays = dict[str, NDArray[Any]]

SHAPES = {
    "model.embed_tokens.weight": (30, 8),
    "model.layers.0.self_attn.q_proj.weight": (12, 8),
    "model.layers.0.self_attn.k_proj.weight": (8, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 20),
    "model.layers.1.self_attn.q_proj.weight": (12, 8),
    "model.layers.1.self_attn.k_proj.weight": (8, 8),
    "model.layers.1.mlp.down_proj.weight": (8, 20),
    "model.norm.weight": (8,),
    "lm_head.weight": (30, 8),
}
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 30, "hidden_size": 8}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def config(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **changes}


def pairs(*modules: str, rank: int = 2, seed: int = 5) -> Arrays:
    """Return factors for modules of the model."""
    found: Arrays = {}
    for module in modules:
        rows, columns = SHAPES[f"{module}.weight"]
        shapes = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
        made = random_arrays({f"base_model.model.{module}.{n}": s for n, s in shapes.items()}, seed)
        found |= {name: values * np.float32(20) for name, values in made.items()}
        seed += 1
    return found


ALL_Q = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def write_adapter(folder: Path, tensors: Arrays, said: Any = None) -> Path:
    folder.mkdir(parents=True)
    write_file(folder / "adapter_model.safetensors", tensors)
    text = json.dumps(config() if said is None else said)
    (folder / "adapter_config.json").write_text(text)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", random_arrays(SHAPES, 1), "BF16", CONFIG)


def recipe(*references: Path | str, method: str = "passthrough", **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "models": [{"model": str(each)} for each in references], **more}


def problems(reference: str) -> list[str]:
    with pytest.raises(PlanError) as caught:
        oxmerge.plan(recipe(reference))
    return [str(each) for each in caught.value.problems]


def arrays(folder: Path) -> Arrays:
    found = {}
    for name, (dtype, shape, data) in read_tensors(folder / "model.safetensors").items():
        assert dtype == "BF16"
        found[name] = from_bf16(np.frombuffer(data, np.uint16)).reshape(shape)
    return found


# What is wrong is told, all at once.


def without(tensors: Arrays, name: str) -> Arrays:
    return {key: values for key, values in tensors.items() if key != name}


SOUND = pairs(*ALL_Q)
CASES: dict[str, tuple[Callable[[], Arrays], dict[str, Any], str]] = {
    "another type": (lambda: SOUND, config(peft_type="LOHA"), "adapters of type `LOHA`"),
    "no type": (lambda: SOUND, {"r": 2}, "adapters of type `None`"),
    "pissa": (lambda: SOUND, config(init_lora_weights="pissa_niter_4"), "`pissa_niter_4`"),
    "kasa": (lambda: SOUND, config(kasa_config={"beta": 1}), "KaSA (`kasa_config`)"),
    "replicated": (lambda: SOUND, config(layer_replication=[[0, 2]]), "replicated layers"),
    "rank 0": (lambda: SOUND, config(r=0), "`r` is a whole number above 0"),
    "a rank of text": (lambda: SOUND, config(r="2"), "`r` is a whole number above 0"),
    "infinite": (lambda: SOUND, config(lora_alpha=float("inf")), "`lora_alpha` is a finite number"),
    "no number": (lambda: SOUND, config(lora_alpha=float("nan")), "is a finite number"),
    "larger than any": (lambda: SOUND, config(lora_alpha=10**400), "is a finite number"),
    "a number for a switch": (
        lambda: SOUND,
        config(use_rslora=1),
        "`use_rslora` is true or false: found `1`",
    ),
    "a switch": (lambda: SOUND, config(use_dora="yes"), "`use_dora` is true or false"),
    **{
        of: (lambda: SOUND, config(**{key: {pattern: 2}}), "takes too long to match")
        for of, key, pattern in [
            ("a slow pattern", "rank_pattern", "(a+)+(b*)*"),
            ("a repeated repetition", "rank_pattern", "(.*)*x"),
            ("repeated branches", "alpha_pattern", "(a|aa)+x"),
            ("a blank before a repetition", "alpha_pattern", "(?x:(.*) *)y"),
        ]
    },
    "a name of many letters": (
        lambda: SOUND | {f"{'a' * 5000}.lora_A.weight": np.ones((2, 8), np.float32)},
        config(rank_pattern={r".*\..*x": 4}),
        "patterns take too long to match",
    ),
    "kohya's": (
        lambda: {"lora_te_q.lora_down.weight": np.ones((2, 8), np.float32)},
        config(),
        "expected one that PEFT saves, found a name of kohya's format",
    ),
    "mlx": (lambda: SOUND, {"lora_parameters": {"scale": 20}}, "yet: adapters of MLX"),
    "no pattern": (lambda: SOUND, config(alpha_pattern={"(": 2}), "no regular expression"),
    "a pattern without a number": (
        lambda: SOUND,
        config(alpha_pattern={"q_proj": None}),
        "a number for each pattern",
    ),
    "a rank that lies": (lambda: SOUND, config(r=4), "expected rank 4, found 2 in [2, 8]"),
    "patterns out of order": (
        lambda: SOUND,
        config(rank_pattern={"q_proj": 5, "self_attn.q_proj": 2}),
        "hint: PEFT sorts patterns when it saves",
    ),
    "in torch's own attention": (
        lambda: {k.replace("q_proj", "x.base_layer.out_proj"): v for k, v in SOUND.items()},
        config(),
        "not supported yet: a LoRA on torch's own attention",
    ),
    "a factor alone": (
        lambda: without(SOUND, f"{Q}.lora_B.weight"),
        config(),
        "a factor of the adapter stands alone: expected its `lora_B` too",
    ),
    "of another size": (
        lambda: SOUND | {f"{Q}.lora_A.weight": np.ones((2, 9), np.float32)},
        config(),
        "a pair of factors does not fit the model's tensor",
    ),
    "of another model": (
        lambda: {k.replace("q_proj", "query"): v for k, v in SOUND.items()},
        config(),
        "the model has no tensor that the adapter",
    ),
    "nothing": (
        lambda: SOUND | {f"{Q}.lora_A.weight": np.ones((0,), np.float32)},
        config(),
        "holds no numbers",
    ),
    "whole numbers": (
        lambda: SOUND | {f"{Q}.lora_A.weight": np.ones((2, 8), np.int64)},
        config(),
        "has another type: expected a float type, found I64",
    ),
    "of another kind": (
        lambda: SOUND | {f"{Q}.lora_diag": np.ones((2,), np.float32)},
        config(),
        "a tensor of the adapter is of a kind that is not known",
    ),
    "a magnitude alone": (
        lambda: {f"{Q}.lora_magnitude_vector": np.ones((12,), np.float32)},
        config(use_dora=True),
        "goes with no pair of factors",
    ),
    "a magnitude that lacks": (lambda: SOUND, config(use_dora=True), "has no magnitude"),
    "a magnitude that is short": (
        lambda: pairs(ALL_Q[0]) | {f"{Q}.lora_magnitude_vector": np.ones((11,), np.float32)},
        config(use_dora=True),
        "a magnitude does not fit the model's tensor: expected 12 numbers",
    ),
    "a bias without one": (
        lambda: SOUND | {f"{Q}.lora_B.bias": np.ones((12,), np.float32)},
        config(lora_bias=True),
        "needs a bias of the model",
    ),
    "a tensor in full": (
        lambda: SOUND | {"base_model.model.model.norm.weight": np.ones((9,), np.float32)},
        config(),
        "the adapter's tensor does not fit the model's: expected [8], found [9]",
    ),
    "a tensor twice": (
        lambda: SOUND
        | {
            f"base_model.model.{lead}model.norm.weight": np.ones((8,), np.float32)
            for lead in ("", "_orig_mod.")
        },
        config(),
        "two tensors of the adapter are for the same",
    ),
    "rows that nobody names": (
        lambda: SOUND
        | {
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones(
                (2, 8), np.float32
            )
        },
        config(),
        "does not say which rows are trained",
    ),
    "rows that are not there": (
        lambda: SOUND
        | {
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones(
                (2, 8), np.float32
            )
        },
        config(trainable_token_indices=[3, 30]),
        "trained rows are there once each: expected different ones below 30",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_that_lies_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    make, said, told = CASES[name]
    adapter = write_adapter(tmp_path / "adapter", make(), said)
    found = problems(f"{model}+{adapter}")
    assert any(told in each for each in found), found
    assert all("hint:" in each for each in found)


def test_all_that_is_wrong_is_told_at_once(model: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", without(SOUND, f"{Q}.lora_B.weight"))
    write_adapter(tmp_path / "two", SOUND, config(peft_type="IA3", lora_alpha="six"))
    write_adapter(tmp_path / "three", SOUND, config(r=7))
    references = [f"{model}+{tmp_path / name}" for name in ("one", "two", "three", "four")]
    with pytest.raises(PlanError) as caught:
        oxmerge.plan({**recipe(*references, method="linear"), "parameters": {"weght": 1}})
    text = str(caught.value)
    for told in ("stands alone", "type `IA3`", "`lora_alpha`", "rank 7", "four", "weght"):
        assert told in text


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"peft_type": ["LORA"]}', '{"a": ' * 200 + "1" + "}" * 200]
)
def test_a_config_that_is_none(text: str, model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SOUND)
    (adapter / "adapter_config.json").write_text(text)
    assert len(problems(f"{model}+{adapter}")) == 1


def test_weights_that_are_cut_short(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SOUND)
    weights = adapter / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    assert len(problems(f"{model}+{adapter}")) == 1
    weights.unlink()
    assert "cannot be opened" in problems(f"{model}+{adapter}")[0]
    (adapter / "adapter_config.json").unlink()
    assert "no adapter can be read here" in problems(f"{model}+{adapter}")[0]


def test_a_folder_of_adapters_names_them(model: Path, tmp_path: Path) -> None:
    """PEFT saves adapters that are not the default one in folders below."""
    for name in ("one", "two"):
        write_adapter(tmp_path / "several" / name, SOUND)
    (found,) = problems(f"{model}+{tmp_path / 'several'}")
    assert "hint: name one of the adapters in it: `one`, `two`" in found


def test_a_name_that_no_pattern_can_hold_up(model: Path, tmp_path: Path) -> None:
    """Two repetitions in a pattern take time, but not for ever."""
    said = config(rank_pattern={r".*\..*x": 4}, alpha_pattern={".*a.*b": 2})
    adapter = write_adapter(tmp_path / "adapter", SOUND, said)
    oxmerge.plan(recipe(f"{model}+{adapter}"))


def test_a_file_that_lacks_modules_is_told_of(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pairs(ALL_Q[0]), config())
    (warning,) = oxmerge.plan(recipe(f"{model}+{adapter}")).warnings
    assert "names modules that it does not have" in str(warning)
    assert warning.tensor == "model.layers.1.self_attn.q_proj.weight"


# What is right.


def product(tensors: Arrays, module: str, scale: float) -> NDArray[np.float64]:
    a, b = (tensors[f"base_model.model.{module}.lora_{of}.weight"].astype(float) for of in "AB")
    added: NDArray[np.float64] = scale * (b @ a)
    return added


def close(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    return bool((np.abs(found - expected) <= np.abs(expected) * 2**-8 + 1e-5).all())


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        # A text model that was trained as a part of a model of images and text, and the other way.
        lambda name: name.replace(".model.layers", ".model.language_model.layers"),
        lambda name: name.replace(".model.layers", ".language_model.model.layers"),
        lambda name: name.replace("model.model.layers", "model.layers"),
    ],
)
def test_names_of_several_tools(rename: Callable[[str], str], model: Path, tmp_path: Path) -> None:
    tensors = {rename(name): values for name, values in SOUND.items()}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    oxmerge.fuse(model, tmp_path / "out", [adapter])
    before, after = arrays(model), arrays(tmp_path / "out")
    for name, values in before.items():
        module = name.removesuffix(".weight")
        add = product(SOUND, module, 3) if module in ALL_Q else 0
        assert close(after[name], values + add), name
    assert not np.array_equal(after[f"{ALL_Q[0]}.weight"], before[f"{ALL_Q[0]}.weight"])


def test_several_adapters_add(model: Path, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", SOUND)
    others = pairs(ALL_Q[1], rank=3, seed=9)
    two = write_adapter(tmp_path / "two", others, config(r=3, use_rslora=True))
    oxmerge.fuse(model, tmp_path / "out", [one, f"{two}=-0.5"])
    expected = arrays(model)[f"{ALL_Q[1]}.weight"] + product(SOUND, ALL_Q[1], 3)
    expected = expected + product(others, ALL_Q[1], -0.5 * 6 / 3**0.5)
    assert close(arrays(tmp_path / "out")[f"{ALL_Q[1]}.weight"], expected)


def test_wherever_a_model_may_stand(model: Path, tmp_path: Path) -> None:
    """In base, models, slices and the long form; lazily and as arrays; in any memory."""
    adapters = [
        write_adapter(tmp_path / name, pairs(*ALL_Q, seed=seed), config())
        for seed, name in enumerate("abc")
    ]
    references = [f"{model}+{adapter}" for adapter in adapters]
    for name, reference in zip("abc", references, strict=True):
        oxmerge.merge(recipe(reference, dtype="float32"), tmp_path / f"{name}-fused")
    fused = [tmp_path / f"{name}-fused" for name in "abc"]
    sets = {"density": 0.4, "weight": 0.5}

    def ties(models: list[Any], base: Any) -> dict[str, Any]:
        each = [{"model": model, "parameters": sets} for model in models]
        return {"merge_method": "ties", "base_model": base, "models": each, "dtype": "bfloat16"}

    long = [{"model": str(model), "lora": str(adapter)} for adapter in adapters]
    oxmerge.merge(ties([str(each) for each in fused[1:]], str(fused[0])), tmp_path / "plain")
    plain = (tmp_path / "plain" / "model.safetensors").read_bytes()
    report = oxmerge.merge(ties(references[1:], references[0]), tmp_path / "adapted")
    assert (tmp_path / "adapted" / "model.safetensors").read_bytes() == plain
    # The base's bytes are read once for all three.
    assert report.input_bytes < 2 * sum(2 * np.prod(shape) for shape in SHAPES.values())
    oxmerge.merge(ties(long[1:], long[0]), tmp_path / "long", threads=1)
    assert (tmp_path / "long" / "model.safetensors").read_bytes() == plain
    lazy = oxmerge.lazy(ties(references[1:], references[0]))
    with oxmerge.open(tmp_path / "plain") as merged, oxmerge.open(references[0]) as opened:
        for name in merged:
            assert np.array_equal(lazy[name].view(np.uint16), merged[name].view(np.uint16))
            assert opened.shape_of(name) == SHAPES[name]
        single = read_tensors(fused[0] / "model.safetensors")[f"{ALL_Q[0]}.weight"][2]
        rounded = to_bf16(np.frombuffer(single, np.float32)).tobytes()
        assert opened[f"{ALL_Q[0]}.weight"].tobytes() == rounded
    slices = [
        {"sources": [{"model": references[at], "layer_range": [at, at + 1]}]} for at in (0, 1)
    ]
    oxmerge.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "sliced")
    made = arrays(tmp_path / "sliced")[f"{ALL_Q[1]}.weight"]
    factors = pairs(*ALL_Q, seed=1)
    assert close(made, arrays(model)[f"{ALL_Q[1]}.weight"] + product(factors, ALL_Q[1], 3))


def test_a_saved_plan_keeps_what_adapters_do(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SOUND)
    plan = oxmerge.plan(recipe(f"{model}+{adapter}"))
    plan.save(tmp_path / "plan.json")
    oxmerge.merge(plan, tmp_path / "one")
    oxmerge.merge(oxmerge.load_plan(tmp_path / "plan.json"), tmp_path / "two")
    assert directory_bytes(tmp_path / "one") == directory_bytes(tmp_path / "two")
    text = (tmp_path / "plan.json").read_text()
    for old, new in [
        ('"columns":8', '"columns":7'),
        ('"rank":2', '"rank":2000000'),
        ('"scale":3.0', '"scale":1e400'),
        ('"line":2', '"line":0'),
    ]:
        assert old in text
        (tmp_path / "wrong.json").write_text(text.replace(old, new, 1))
        with pytest.raises(PlanError):
            oxmerge.load_plan(tmp_path / "wrong.json")


def test_an_adapter_that_changes_is_told_of(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SOUND)
    plan = oxmerge.plan(recipe(f"{model}+{adapter}"))
    (adapter / "adapter_config.json").write_text(json.dumps(config(lora_alpha=7)))
    with pytest.raises(oxmerge.InputChangedError):
        oxmerge.merge(plan, tmp_path / "out")


def test_rows_by_token_of_a_model_with_an_adapter(tmp_path: Path) -> None:
    """A vocabulary in another order: the adapted table, row by row."""
    tensors = random_arrays(SHAPES, 1)
    words = [f"w{at}" for at in range(30)]
    folders = []
    for name, order in (("one", words), ("two", words[::-1])):
        write_model(tmp_path / name, tensors, "BF16", CONFIG)
        vocabulary = {
            "type": "WordLevel",
            "vocab": {w: i for i, w in enumerate(order)},
            "unk_token": "w0",
        }
        (tmp_path / name / "tokenizer.json").write_text(
            json.dumps({"version": "1.0", "added_tokens": [], "model": vocabulary})
        )
        folders.append(tmp_path / name)
    factors = random_arrays(
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": (2, 30),
            "base_model.model.model.embed_tokens.lora_embedding_B": (8, 2),
        },
        3,
    )
    factors = {name: values * 20 for name, values in factors.items()}
    adapter = write_adapter(tmp_path / "adapter", factors, config(target_modules=["embed_tokens"]))
    made = {
        "merge_method": "linear",
        "models": [
            {"model": str(folders[0]), "parameters": {"weight": 0}},
            {"model": f"{folders[1]}+{adapter}", "parameters": {"weight": 1}},
        ],
        "parameters": {"normalize": False},
        "tokenizer_source": str(folders[0]),
    }
    oxmerge.merge(made, tmp_path / "out")
    a, b = factors.values()
    table = arrays(folders[1])["model.embed_tokens.weight"] + 3 * (b @ a).T
    assert close(arrays(tmp_path / "out")["model.embed_tokens.weight"], table[::-1])


def test_a_head_that_is_tied_gets_a_life_of_its_own(tmp_path: Path) -> None:
    tensors = without(random_arrays(SHAPES, 1), "lm_head.weight")
    model = write_model(tmp_path / "base", tensors, "BF16", {**CONFIG, "tie_word_embeddings": True})
    adapter = write_adapter(
        tmp_path / "adapter", pairs("lm_head"), config(target_modules=["lm_head"])
    )
    oxmerge.fuse(model, tmp_path / "out", [adapter])
    made = arrays(tmp_path / "out")
    table = arrays(model)["model.embed_tokens.weight"]
    assert np.array_equal(made["model.embed_tokens.weight"], table)
    assert close(made["lm_head.weight"], table + product(pairs("lm_head"), "lm_head", 3))
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("asked", [{}, {"ensure_weight_tying": True}])
def test_a_table_that_is_tied_and_adapted_alone(tmp_path: Path, asked: dict[str, Any]) -> None:
    """The head stays as it was in training, but for rows of both that a later adapter replaces.

    PEFT writes the head's factors if it has tied them: it does not do so for every model.
    """
    tensors = without(random_arrays(SHAPES, 1), "lm_head.weight")
    architectures = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    model = write_model(tmp_path / "base", tensors, "BF16", CONFIG | architectures)
    table = "model.embed_tokens"
    factors = {
        f"base_model.model.{table}.lora_embedding_A": np.ones((2, 30), np.float32),
        f"base_model.model.{table}.lora_embedding_B": np.ones((8, 2), np.float32),
    }
    one = write_adapter(tmp_path / "one", factors, config(target_modules=["embed_tokens"], **asked))
    row = f"base_model.model.{table}.token_adapter.trainable_tokens_delta"
    said = config(trainable_token_indices=[7])
    two = write_adapter(tmp_path / "two", SOUND | {row: np.full((1, 8), 5, np.float32)}, said)
    oxmerge.fuse(model, tmp_path / "out", [one, two])
    made, was = arrays(tmp_path / "out"), arrays(model)[f"{table}.weight"]
    expected = was.copy()
    expected[7] = 5
    assert np.array_equal(made["lm_head.weight"], expected)
    expected = was + 6
    expected[7] = 5
    assert close(made[f"{table}.weight"], expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_of_another_name(tmp_path: Path) -> None:
    embedding = "distilbert.embeddings.word_embeddings.weight"
    shapes: dict[str, tuple[int, ...]] = {embedding: (30, 8), "vocab_projector.bias": (30,)}
    said = {"model_type": "distilbert", "tie_word_embeddings": True}
    model = write_model(tmp_path / "base", random_arrays(shapes, 1), "BF16", said)
    head = "vocab_projector"
    factors = {
        f"base_model.model.{head}.lora_A.weight": np.ones((2, 8), np.float32),
        f"base_model.model.{head}.lora_B.weight": np.ones((30, 2), np.float32),
    }
    adapter = write_adapter(tmp_path / "adapter", factors, config(target_modules=[head]))
    oxmerge.fuse(model, tmp_path / "out", [adapter])
    table = arrays(model)[embedding]
    assert close(arrays(tmp_path / "out")[f"{head}.weight"], table + 6)


def test_a_table_with_more_rows(model: Path, tmp_path: Path) -> None:
    saved = {
        f"base_model.model.{name}.weight": values
        for name, values in random_arrays(
            {"model.embed_tokens": (33, 8), "lm_head": (33, 8)}, 4
        ).items()
    }
    adapter = write_adapter(tmp_path / "adapter", SOUND | saved)
    oxmerge.fuse(model, tmp_path / "out", [adapter])
    made = arrays(tmp_path / "out")
    for name, values in saved.items():
        expected = from_bf16(to_bf16(values))
        assert np.array_equal(made[name.removeprefix("base_model.model.")], expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 33


def test_experts_that_are_stored_together(tmp_path: Path) -> None:
    """Adapters of single experts on a model that stacks them: gate above up, expert by expert."""
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (3, 10, 4),
        "model.layers.0.mlp.experts.down_proj": (3, 4, 5),
    }
    model = write_model(tmp_path / "base", random_arrays(shapes, 1), "BF16", CONFIG)
    tensors: Arrays = {}
    expected = arrays(model)
    for expert in range(3):
        for at, (part, rows, columns) in enumerate(
            [("gate_proj", 5, 4), ("up_proj", 5, 4), ("down_proj", 4, 5)]
        ):
            module = f"model.layers.0.mlp.experts.{expert}.{part}"
            made = random_arrays(
                {
                    f"base_model.model.{module}.lora_A.weight": (2, columns),
                    f"base_model.model.{module}.lora_B.weight": (rows, 2),
                },
                10 * expert + at,
            )
            tensors |= {name: values * 20 for name, values in made.items()}
            add = product(tensors, module, 3)
            if part == "down_proj":
                expected["model.layers.0.mlp.experts.down_proj"][expert] += add
            else:
                start = 5 * (part == "up_proj")
                table = expected["model.layers.0.mlp.experts.gate_up_proj"]
                table[expert, start : start + 5] += add
    adapter = write_adapter(tmp_path / "adapter", tensors, config(target_modules="all-linear"))
    oxmerge.fuse(model, tmp_path / "out", [adapter])
    for name, values in arrays(tmp_path / "out").items():
        assert close(values, expected[name]), name


# References.


def test_experts_that_are_saved_otherwise(tmp_path: Path) -> None:
    """They would be left out, and nothing else would be odd about the model."""
    stacked, apart = (
        "model.layers.0.mlp.experts.down_proj",
        {f"model.layers.0.mlp.experts.{at}.down_proj.weight": (8, 4) for at in range(2)},
    )
    apart |= {
        f"model.layers.0.mlp.experts.{at}.{half}_proj.weight": (4, 8)
        for at in range(2)
        for half in ("gate", "up")
    }
    for name, shapes, saved in (
        ("apart", apart, {stacked: (2, 8, 4)}),
        ("stacked", {stacked: (2, 8, 4)}, dict([next(iter(apart.items()))])),
    ):
        model = write_model(tmp_path / name, random_arrays(shapes, 1), "BF16", CONFIG)
        tensors = {f"base_model.model.{n}": np.ones(s, np.float32) for n, s in saved.items()}
        adapter = write_adapter(tmp_path / f"{name}-adapter", tensors)
        assert "experts that are saved" in problems(f"{model}+{adapter}")[0]


def test_a_plus_may_be_part_of_a_name(model: Path, tmp_path: Path) -> None:
    os.rename(model, tmp_path / "c++")
    for name in ("l+r", "half=0.5"):
        write_adapter(tmp_path / name, SOUND)
    folders = (str(tmp_path),)
    assert split_adapters("c++", folders) == ("c++", ())
    assert split_adapters("c+++l+r", folders) == ("c++", (("l+r", 1.0),))
    assert split_adapters("c+++l+r=0.25+half=0.5", folders) == (
        "c++",
        (("l+r", 0.25), ("half=0.5", 1.0)),
    )
    assert split_adapters("org/name@main+other=-2", folders) == (
        "org/name@main",
        (("other", -2.0),),
    )
    assert split_adapters("m+other=5e-2", folders) == ("m", (("other", 0.05),))
    assert split_adapters("m" + "+a" * 100_000, folders)[1] == ()


@pytest.mark.parametrize("form", ["{}+", "+{}", "{}++{}", "{}+ "])
def test_an_empty_part(form: str, model: Path) -> None:
    with pytest.raises(PlanError, match="an empty model reference"):
        oxmerge.plan(recipe(form.replace("{}", str(model))))


def test_the_shapes_of_real_experts_are_quick_to_plan(tmp_path: Path) -> None:
    """A pair for each of thousands of experts."""
    shapes = expert_shapes(6, (4, 6))
    model = write_model(
        tmp_path / "base", random_arrays(shapes, 1), "BF16", {"num_hidden_layers": 6}
    )
    modules = [name for name in shapes if ".mlp.experts." in name]
    assert len(modules) > 2000
    tensors: Arrays = {}
    for name in modules:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = np.ones((2, 6), np.float32)
        tensors[f"{module}.lora_B.weight"] = np.ones((4, 2), np.float32)
    adapter = write_adapter(tmp_path / "adapter", tensors, config(target_modules="all-linear"))
    plan = oxmerge.plan(recipe(f"{model}+{adapter}"))
    changed = [tensor for tensor in plan.tensors if any(s.is_adapted for s in tensor.sources)]
    assert [tensor.name for tensor in changed] == modules


def test_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "adapter", SOUND)
    weighted = ["--adapter", str(adapter), "--adapter", f"{adapter}=-0.5"]
    assert main(["fuse", str(model), str(tmp_path / "out"), *weighted]) == 0
    expected = arrays(model)[f"{ALL_Q[0]}.weight"] + product(SOUND, ALL_Q[0], 1.5)
    assert close(arrays(tmp_path / "out")[f"{ALL_Q[0]}.weight"], expected)
    assert main(["inspect", f"{model}+{adapter}"]) == 0
    assert "self_attn.q_proj.weight" in capsys.readouterr().out
    assert main(["fuse", str(model), str(tmp_path / "other")]) == 2
    # Without a model the adapters are added up: options of merges would do nothing.
    assert main(["fuse", str(tmp_path / "other"), *weighted, "--seed", "3"]) == 2
    assert main(["fuse", str(model), str(tmp_path / "other"), "--adapter", str(model)]) == 1
    assert "no adapter can be read here" in capsys.readouterr().err
    assert main(["demo", "--kind", "lora", "--directory", str(tmp_path / "demo")]) == 0
    with oxmerge.open(tmp_path / "demo/merged") as fused:
        reference = f"{tmp_path}/demo/demo-base+{tmp_path}/demo/demo-adapter"
        name = "model.layers.0.self_attn.q_proj.weight"
        assert fused[name].tobytes() == oxmerge.open(reference)[name].tobytes()


# Adapters with adapters.

LYING: dict[str, tuple[Callable[[], Arrays], dict[str, Any], str]] = {
    "a factor twice": (
        lambda: SOUND | {f"{Q}.lora_A.default.weight": SOUND[f"{Q}.lora_A.weight"]}, {},
        "two tensors of the adapter are for the same",
    ),
    "whole numbers": (
        lambda: SOUND | {f"{Q}.lora_A.weight": np.ones((2, 8), np.int32)}, {},
        "a factor holds no numbers: expected floats, found I32",
    ),
    "one factor": (lambda: without(SOUND, f"{Q}.lora_B.weight"), {}, "a factor without the other"),
    "another rank": (lambda: SOUND, {"r": 4}, "another rank than its config says"),
    "a name that climbs": (
        lambda: SOUND | {"../../x": np.ones((2, 2), np.float32)}, {},
        "more than pairs of factors",
    ),
    "a bias": (
        lambda: SOUND | {f"{Q}.lora_B.bias": np.ones(12, np.float32)}, {},
        "more than pairs of factors",
    ),
    "too large for its type": (
        lambda: {name: (values * 1e4).astype(np.float16) for name, values in SOUND.items()}, {},
        "has NaN or infinity, and no adapter has",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LYING)
@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_an_adapter_that_cannot_be_merged(tmp_path: Path, name: str, method: str) -> None:
    make, changes, told = LYING[name]
    sound = write_adapter(tmp_path / "sound", SOUND)
    folder = tmp_path / "lying"
    folder.mkdir()
    save_file(make(), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config(**changes)))
    asked = recipe(sound, folder, method=method, dtype="float16", parameters={"weight": 5000})
    with pytest.raises(PlanError) as caught:
        oxmerge.merge(asked, tmp_path / "out")
    assert told in str(caught.value)
    assert all(each.advice for each in caught.value.problems)
    assert not (tmp_path / "out").exists()


def two(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe of two adapters, of which the second one's config has `changes`."""
    one = write_adapter(tmp_path / "one", SOUND, config(base_model_name_or_path="org/base"))
    other = write_adapter(
        tmp_path / "other", SOUND, config(base_model_name_or_path="org/base", **changes)
    )
    return recipe(one, other, method="task_arithmetic", parameters={"weight": 1.0})


@pytest.mark.parametrize(
    "option",
    [
        {"threads": 2}, {"digests": False}, {"resume": False}, {"shard_size": "1GB"},
        {"allow_mismatch": True}, {"allow_methods": ["json"]}, {"read_path": "mapped"},
        {"fresh": True}, {"hash_inputs": True}, {"stream": True}, {"spool": "1GB"},
        {"part": (1, 2)}, {"wait": 5}, {"ray": True},
    ],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_options_that_do_nothing_for_adapters(tmp_path: Path, option: dict[str, Any]) -> None:
    """Each is refused by name, also Ray, which would be asked first for models."""
    [name] = option
    with pytest.raises(PlanError, match=f"the option `{name}` has no effect"):
        oxmerge.merge(two(tmp_path), tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_options_that_count_for_adapters(tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    report = oxmerge.merge(
        two(tmp_path), tmp_path / "out", memory="4GiB", seed=3, strict=True, ignore_unknown=True,
        overwrite=True, allow_nonfinite=True, progress=seen.append, ray=False,
    )  # fmt: skip
    assert [each.tensors for each in seen] == list(range(report.tensors))
    assert all(each.bytes_done < each.bytes_total == report.bytes_written for each in seen)


def test_an_adapter_without_a_pair_of_factors(tmp_path: Path) -> None:
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    adapter = write_adapter(tmp_path / "copies", {name: np.ones((4, 3), np.float32)})
    with pytest.raises(PlanError, match="have no pair of factors"):
        oxmerge.merge(recipe(adapter, method="linear"), tmp_path / "out")
    with pytest.raises(PlanError, match="have no pair of factors"):
        oxmerge.join_adapters(tmp_path / "out", [adapter])
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_bases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_adapter(tmp_path / "a", SOUND, config(base_model_name_or_path="org/base"))
    same = write_adapter(tmp_path / "b", SOUND, config(base_model_name_or_path="org/base/"))
    other = write_adapter(tmp_path / "c", SOUND, config(base_model_name_or_path="org/another"))
    asked = recipe(one, same, other, method="linear", parameters={"weight": 1.0})
    [told] = oxmerge.merge(asked, tmp_path / "out").warnings
    assert "expected `org/base`, found `org/another`" in told
    assert str(other) in told
    with pytest.raises(PlanError, match="another base model"):
        oxmerge.merge(asked, tmp_path / "strict", strict=True)
    with pytest.warns(UserWarning, match="another base model"):
        oxmerge.join_adapters(tmp_path / "joined", [one, other])
    adapters = ["--adapter", str(one), "--adapter", str(other)]
    assert main(["fuse", str(tmp_path / "fused"), *adapters]) == 0
    assert "an adapter says that it is of another base" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("where", ["2 tensors are done", "2 files have their names"])
def test_a_merge_of_adapters_that_is_killed(tmp_path: Path, where: str) -> None:
    """Nothing that is there loads, and the same command makes what a run in one go makes."""
    asked, out = two(tmp_path), tmp_path / "out"
    text = f"""
import os, signal, oxmerge
def die(seen):
    if seen.tensors == 2:
        os.kill(os.getpid(), signal.SIGKILL)
def name(*files, rename=os.replace, count=[]):
    if len(count) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    count.append(rename(*files))
if {where!r} == "2 files have their names":
    os.replace, die = name, None
oxmerge.merge({asked!r}, {str(out)!r}, progress=die)
"""
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == -9
    assert "adapter_config.json" not in os.listdir(out)
    oxmerge.merge(asked, out)
    oxmerge.merge(asked, tmp_path / "whole")
    assert directory_bytes(out) == directory_bytes(tmp_path / "whole")


def test_numbers_that_are_none_in_an_adapter(tmp_path: Path) -> None:
    odd = SOUND | {f"{Q}.lora_A.weight": np.full((2, 8), np.nan, np.float32)}
    adapters = [write_adapter(tmp_path / "odd", odd), write_adapter(tmp_path / "sound", SOUND)]
    asked = recipe(*adapters, method="linear", parameters={"weight": 1.0})
    [told] = oxmerge.merge(asked, tmp_path / "out").warnings
    assert f"tensor `{Q}.lora_A.weight`: elements of the factor are not finite" in told
    with pytest.warns(UserWarning, match="are not finite"):
        oxmerge.join_adapters(tmp_path / "joined", adapters)


def test_a_start_that_nobody_knows(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SOUND, config(init_lora_weights="of_2030"))
    [told] = oxmerge.plan(recipe(f"{model}+{adapter}")).warnings
    assert "whether the adapter's start has changed its base: found `of_2030`" in str(told)


def test_the_card_of_an_adapter(tmp_path: Path) -> None:
    """The Hub reads from it what the adapter is for."""
    oxmerge.merge(two(tmp_path), tmp_path / "out")
    matter = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert matter["base_model"] == ["org/base"]
    assert matter["base_model_relation"] == "adapter"
    assert matter["library_name"] == "peft"


def test_one_run_at_a_time_writes_an_adapter(tmp_path: Path) -> None:
    asked = two(tmp_path)
    with claimed(tmp_path / "out"), pytest.raises(OutputError, match="another run is writing here"):
        oxmerge.merge(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # What a run leaves that is killed is no reason to refuse.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".oxmerge-part-adapter_model.safetensors").write_bytes(b"half")
    oxmerge.merge(asked, tmp_path / "out")
    written = {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "oxmerge_recipe.yml",
    }  # fmt: skip
    assert set(os.listdir(tmp_path / "out")) == written
    with pytest.raises(FileExistsError):
        oxmerge.merge(asked, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="this is a file"):
        oxmerge.merge(asked, tmp_path / "file")
