"""Whether a model is sound: a sound one, and what is told when it is broken in each way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
import zoo
from oxmerge.cli import main
from oxmerge.errors import PlanError
from oxmerge.problems import CODES, Problem
from writers import Arrays, random_arrays, write_model, write_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEPTH = 8
LLAMA = zoo.llama(DEPTH)
Q = "model.layers.{}.self_attn.q_proj.weight"


def arrays() -> Arrays:
    """Return a llama with numbers as weights have them; those of norms are about one."""
    found = random_arrays({name: shape for name, (_, shape) in LLAMA.tensors.items()}, 1)
    return {name: x + 1 if "norm" in name else x for name, x in found.items()}


def write(folder: Path, change: Callable[[Arrays, dict[str, Any]], None] | None = None) -> Path:
    """Write that model, changed."""
    tensors, config = arrays(), dict(LLAMA.config)
    if change is not None:
        change(tensors, config)
    return write_model(folder, tensors, "F32", config)


def told(model: Path, **options: Any) -> dict[str, list[str]]:
    """Return the codes of what is told of a model, by severity."""
    found = oxmerge.check(model, **options)
    lists = {"error": found.errors, "warning": found.warnings, "note": found.notes}
    return {name: [each.code for each in problems] for name, problems in lists.items() if problems}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command, and return the exit code and what it printed."""
    code = main(["check", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_a_sound_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "m")
    found = oxmerge.check(model)
    assert (found.is_sound, found.errors, found.warnings, found.notes) == (True, (), (), ())
    assert found.tensors == len(LLAMA.tensors)
    assert run(capsys, model) == (0, "sound: nothing to tell\n", "")


@pytest.mark.parametrize("name", zoo.ZOO)
def test_headers_of_known_architectures_have_nothing_odd(tmp_path: Path, name: str) -> None:
    model = zoo.write(tmp_path / name, zoo.ZOO[name](), files=2)
    assert told(model, quick=True) == {}


# What only weights show.


def nan(tensors: Arrays, _: dict[str, Any]) -> None:
    tensors[Q.format(3)][2, 5] = np.nan
    tensors["lm_head.weight"][0, :3] = np.nan


def infinite(tensors: Arrays, _: dict[str, Any]) -> None:
    tensors[Q.format(3)][2, 5] = -np.inf


def zeros(tensors: Arrays, _: dict[str, Any]) -> None:
    tensors[Q.format(3)][:] = 0


def constant_norm(tensors: Arrays, _: dict[str, Any]) -> None:
    tensors["model.norm.weight"][:] = 1


def large(tensors: Arrays, _: dict[str, Any]) -> None:
    tensors[Q.format(3)] *= 10


def copied_layer(tensors: Arrays, _: dict[str, Any]) -> None:
    for name in list(tensors):
        if name.startswith("model.layers.5."):
            tensors[name] = tensors[name.replace(".5.", ".2.")]


def untied_copy(tensors: Arrays, _: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]


def stored_though_tied(_: Arrays, config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = True


@pytest.mark.parametrize(
    ("change", "severity", "code", "words"),
    [
        (nan, "error", "non-finite", "there are NaN: found 4 of them (2 tensors"),
        (infinite, "error", "non-finite", "there are infinite numbers: found 1 of them"),
        (zeros, "warning", "constant-tensor", "all zeros"),
        (constant_norm, "note", "constant-tensor", "all elements are the same number"),
        (large, "warning", "odd-norm", "expected about 0.0"),
        (
            copied_layer,
            "warning",
            "equal-layers",
            "copies of `model.layers.2`: every tensor is the same, bit for bit: found `model.",
        ),
        (untied_copy, "note", "equal-head", "the head equals `model.embed_tokens.weight`"),
        (stored_though_tied, "warning", "ignored-head", "which is another"),
    ],
)
def test_what_weights_show(
    tmp_path: Path, change: Callable[..., None], severity: str, code: str, words: str
) -> None:
    model = write(tmp_path / "m", change)
    assert told(model) == {severity: [code]}
    assert told(model, quick=True) == {}
    found = oxmerge.check(model)
    (problem,) = [*found.errors, *found.warnings, *found.notes]
    assert words in str(problem)
    assert code in CODES
    assert found.is_sound is (severity != "error")


def test_equal_numbers_of_other_bits_are_no_copy(tmp_path: Path) -> None:
    def mirrored(tensors: Arrays, _: dict[str, Any]) -> None:
        # The same sums, maxima and counts: but another order.
        for name in list(tensors):
            if name.startswith("model.layers.5."):
                like = np.zeros_like(tensors[name])
                like.ravel()[:2] = [1, 2]
                tensors[name] = like
                tensors[name.replace(".5.", ".2.")] = np.roll(like, 16 * 2)

    assert "equal-layers" not in str(told(write(tmp_path / "m", mirrored)))


# Sound ones that are unlike the others.


def gated_queries(tensors: Arrays, _: dict[str, Any]) -> None:
    """As Qwen3-Next: each head's queries, and a gate for each of them."""
    for layer in range(DEPTH):
        tensors[Q.format(layer)] = np.concatenate([tensors[Q.format(layer)]] * 2)


def latent_attention(tensors: Arrays, config: dict[str, Any]) -> None:
    """As DeepSeek-V2: widths of heads that have nothing to do with the model's."""
    config |= {"qk_nope_head_dim": 5, "qk_rope_head_dim": 1}
    for layer in range(DEPTH):
        tensors[Q.format(layer)] = tensors[Q.format(layer)][: 6 * config["num_attention_heads"]]
        del tensors[Q.format(layer).replace("q_proj", "k_proj")]


def shared_block(tensors: Arrays, _: dict[str, Any]) -> None:
    """As Zamba2: a block within a layer, with heads of its own."""
    wide = np.concatenate([tensors[Q.format(1)]] * 3)
    tensors[Q.format(1).replace("self_attn", "shared_transformer.self_attn")] = wide


def one_layer_of_another_kind(tensors: Arrays, _: dict[str, Any]) -> None:
    """As Bamba and Llama 3.2 Vision: one layer has other tensors than all the others."""
    tensors[Q.format(3).replace("self_attn", "cross_attn")] = tensors.pop(Q.format(3))


def rows_for_images(tensors: Arrays, config: dict[str, Any]) -> None:
    """As Llama 3.2 Vision: the embedding has eight rows that the head has not."""
    config["model_type"] = "mllama"
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.concatenate([rows, rows[:8]])


def heads_of_windows(tensors: Arrays, config: dict[str, Any]) -> None:
    """As MiMo-V2: layers that look at a window have more heads for keys."""
    config |= {"swa_num_key_value_heads": 2 * config["num_key_value_heads"]}
    for layer in range(1, DEPTH):
        name = Q.format(layer).replace("q_proj", "k_proj")
        tensors[name] = np.concatenate([tensors[name], tensors[name][::-1]])


def row_for_starts(tensors: Arrays, config: dict[str, Any]) -> None:
    """As Moshi: the embedding has a row more than there are tokens."""
    config["model_type"] = "moshi"
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.concatenate([rows, rows[:1]])


def lists_of_norms(tensors: Arrays, _: dict[str, Any]) -> None:
    """As Flaubert: norms in a list of their own, which many models leave as they begin."""
    for layer in range(DEPTH):
        tensors[f"model.norms.{layer}.weight"] = np.ones(16, np.float32)
        tensors[f"model.norms.{layer}.bias"] = np.zeros(16, np.float32)


def shared_layers(tensors: Arrays, config: dict[str, Any]) -> None:
    """As ALBERT: one layer that is gone through again and again."""
    config["num_hidden_groups"] = 1
    for name in list(tensors):
        if ".layers." in name and ".layers.0." not in name:
            del tensors[name]


def head_by_another_name(tensors: Arrays, _: dict[str, Any]) -> None:
    """As RWKV."""
    tensors["head.weight"] = tensors.pop("lm_head.weight")


@pytest.mark.parametrize(
    "change",
    [
        gated_queries,
        latent_attention,
        shared_block,
        one_layer_of_another_kind,
        rows_for_images,
        heads_of_windows,
        row_for_starts,
        shared_layers,
        head_by_another_name,
    ],
)
def test_what_is_so_by_design_is_no_fault(tmp_path: Path, change: Callable[..., None]) -> None:
    assert told(write(tmp_path / "m", change)) == {}


def test_norms_in_a_list_are_no_copied_layers(tmp_path: Path) -> None:
    assert "equal-layers" not in str(told(write(tmp_path / "m", lists_of_norms)))


def test_a_row_of_zeros_is_a_vector(tmp_path: Path) -> None:
    """As the `final_logits_bias` of BART: only a matrix of zeros was probably lost."""

    def bias(tensors: Arrays, _: dict[str, Any]) -> None:
        tensors["final_logits_bias"] = np.zeros((1, 40), np.float32)

    assert told(write(tmp_path / "m", bias)) == {"note": ["constant-tensor"]}


def test_a_model_without_floats(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", {"ids": np.arange(5), "mask": np.ones(3, bool)})
    assert told(model) == {}


# What headers and files show.


def other_vocabulary(_: Arrays, config: dict[str, Any]) -> None:
    config["vocab_size"] = 41


def other_width(_: Arrays, config: dict[str, Any]) -> None:
    config["hidden_size"] = 17
    config["num_attention_heads"] = 0


def fewer_heads(_: Arrays, config: dict[str, Any]) -> None:
    config["num_key_value_heads"] = 2


def more_layers(_: Arrays, config: dict[str, Any]) -> None:
    config["num_hidden_layers"] = DEPTH + 1


def fewer_layers(_: Arrays, config: dict[str, Any]) -> None:
    config["num_hidden_layers"] = DEPTH - 1


def lost_tensor(tensors: Arrays, _: dict[str, Any]) -> None:
    del tensors[Q.format(3)]


def lost_head(tensors: Arrays, _: dict[str, Any]) -> None:
    del tensors["lm_head.weight"]


def token_beyond(_: Arrays, config: dict[str, Any]) -> None:
    config["eos_token_id"] = [2, 40]


@pytest.mark.parametrize(
    ("change", "severity", "code", "words"),
    [
        (other_vocabulary, "error", "config-size", "number of rows than the config says"),
        (other_width, "error", "config-size", "number of columns than the config says"),
        (fewer_heads, "warning", "config-size", "key and value heads: expected 16, found 8"),
        (more_layers, "error", "config-size", "expected 9, found 8, in `model.layers`"),
        (fewer_layers, "warning", "config-size", "beyond those that the config counts"),
        (lost_tensor, "warning", "uneven-layers", "lacks what all others have"),
        (lost_head, "error", "missing-head", "does not tie it"),
        (token_beyond, "error", "vocabulary-rows", "expected ids below 40, found 40"),
    ],
)
def test_what_headers_show(
    tmp_path: Path, change: Callable[..., None], severity: str, code: str, words: str
) -> None:
    model = write(tmp_path / "m", change)
    assert told(model, quick=True) == {severity: [code]}
    found = oxmerge.check(model, quick=True)
    assert words in str([*found.errors, *found.warnings][0])


def test_what_lies_beside_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "m")
    (model / "modeling_llama.py").write_text("raise SystemExit")
    (model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "a.B"}}')
    (model / "training_args.bin").write_bytes(b"")
    vocabulary = {f"t{number}": number for number in range(43)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": []}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert told(model) == {"error": ["vocabulary-rows"], "warning": ["remote-code", "pickle"]}
    code, out, _ = run(capsys, model)
    assert code == 1
    assert "modeling_llama.py, `auto_map` in tokenizer_config.json" in out
    assert "expected ids below 40, found 42 [vocabulary-rows]" in out
    (model / "tokenizer.json").write_text("[")
    assert told(model)["error"] == ["unreadable-config"]
    (model / "tokenizer.json").unlink()
    assert run(capsys, model)[0] == 0
    assert run(capsys, model, "--strict")[0] == 1


def test_an_index_that_says_otherwise(tmp_path: Path) -> None:
    model = zoo.write(tmp_path / "m", LLAMA, files=2)
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] = 1
    path.write_text(json.dumps(index))
    assert told(model, quick=True) == {"note": ["index-size"]}
    (model / "model-00002-of-00002.safetensors").unlink()
    assert told(model) == {"error": ["unreadable-checkpoint"]}


def test_a_config_that_lies_or_is_missing(tmp_path: Path) -> None:
    model = write(tmp_path / "m")
    nasty = {"vocab_size": {"vocab_size": [10**40]}, "hidden_size": -1, "num_hidden_layers": "8",
             "architectures": {"a": 1}, "eos_token_id": [[10**9], None, True]}  # fmt: skip
    (model / "config.json").write_text(json.dumps(LLAMA.config | nasty))
    assert told(model, quick=True)["error"] == ["config-size"]
    (model / "config.json").write_text("{")
    assert told(model) == {"error": ["unreadable-checkpoint"]}
    (model / "config.json").unlink()
    assert told(model) == {"warning": ["missing-config"]}


def test_codes_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "m", nan)
    code, out, _ = run(capsys, model, "--json")
    data = json.loads(out)
    assert code == 1
    assert data == json.loads(json.dumps(oxmerge.check(model).as_dict()))
    assert data["errors"][0]["code"] == "non-finite"
    assert data["errors"][0]["tensors"] == [Q.format(3), "lm_head.weight"]
    code, out, err = run(capsys, tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert "no model" in err
    with pytest.raises(PlanError, match="cannot check"):
        oxmerge.check(tmp_path / "nothing")


def test_a_model_without_floats_or_elements(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", {"ids": np.arange(9), "none": np.zeros((0, 4), np.float32)})
    assert told(model) == {}


def test_a_plan_warns_of_inputs_that_are_odd_by_themselves(tmp_path: Path) -> None:
    models = [write(tmp_path / "a"), write(tmp_path / "b", token_beyond)]
    each = {"weight": 0.5}
    plan = oxmerge.plan(write_recipe(tmp_path / "r.yml", "linear", models, each=each))
    assert [problem.code for problem in plan.warnings if isinstance(problem, Problem)] == [
        "vocabulary-rows"
    ]
