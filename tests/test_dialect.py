"""The dialect: recipes as people write them mean what mergekit takes them for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import oxmerge
import pytest
import zoo
from oxmerge.planning.effects import effect_of
from writers import random_arrays, write_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    for seed, model in enumerate(("base", "a", "b", "c")):
        specimen = zoo.llama(4)
        shapes = {name: shape for name, (_, shape) in specimen.tensors.items()}
        arrays = random_arrays(shapes, seed)
        write_model(folder / model, arrays, "F32", config=dict(specimen.config))
    return folder


@pytest.fixture(autouse=True)
def _here(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf)


LINEAR = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: W}}\n- {model: b}\n"
REST = "parameters:\n  weight: 0.25\n"
TIES = "merge_method: ties\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1}}]\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: T}\n"
STACK = "merge_method: passthrough\nslices:\n"


def weighted(weight: str) -> str:
    return LINEAR.replace("W", weight) + REST


#: What people write, and what it means.
SAME = {
    "a number as text": (weighted('"0.5"'), weighted("0.5")),
    "a number in octal": (weighted("010"), weighted("8")),
    "a number with an exponent": (SLERP.replace("T", "1e-1"), SLERP.replace("T", "0.1")),
    "a truth for a number": (weighted("yes"), weighted("1.0")),
    "a gradient of one": (weighted("[0.5]"), weighted("0.5")),
    "a gradient of texts": (weighted('["0.2", "0.8"]'), weighted("[0.2, 0.8]")),
    "no gradient": (weighted("[]"), weighted("0.25")),
    "a value by itself": (weighted("{value: 0.5}"), weighted("0.5")),
    "a filter by itself": (
        weighted("{filter: mlp, value: 0.5}"),
        weighted("[{filter: mlp, value: 0.5}]"),
    ),
    "what no filter takes": (
        weighted("[{filter: mlp, value: 0.5}]"),
        weighted("[{filter: mlp, value: 0.5}, {value: 0.25}]"),
    ),
    "a filter for all": (
        weighted("[{filter: '*', value: 0.5}, {filter: mlp, value: 9}]"),
        weighted("0.5"),
    ),
    "a filter is no pattern": (
        weighted("[{filter: 'layers.*.mlp', value: 9}, {value: 0.5}]"),
        weighted("0.5"),
    ),
    "the first that is for all": (
        weighted("[{value: 0.5}, {filter: mlp, value: 9}]"),
        weighted("0.5"),
    ),
    "tags": (weighted("!!float 0.5"), weighted("0.5")),
    "an alias": (
        (
            "merge_method: linear\nmodels:\n- {model: a, parameters: &x {weight: 2}}\n"
            "- {model: b, parameters: *x}\n"
        ),
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 2}\n",
    ),
    "a mapping that is merged in": (
        (
            "merge_method: linear\nmodels:\n- {model: a, parameters: &x {weight: 2}}\n"
            "- {model: b, parameters: {<<: *x, weight: 3}}\n"
        ),
        (
            "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 2}}\n"
            "- {model: b, parameters: {weight: 3}}\n"
        ),
    ),
    "a key of one's own that others refer to": (
        (
            "x-common: &x {weight: 2}\nparams: [&m a, &w 3]\nmerge_method: linear\nmodels:\n"
            "- {model: *m, parameters: *x}\n- {model: b, parameters: {<<: *x, weight: *w}}\n"
        ),
        (
            "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 2}}\n"
            "- {model: b, parameters: {weight: 3}}\n"
        ),
    ),
    "a base of one's own that has the method": (
        (
            "x-base: &base {merge_method: linear, dtype: bfloat16}\nx-parameters: &x {weight: 2}\n"
            "<<: *base\nmodels: [{model: a, parameters: *x}, {model: b, parameters: *x}]\n"
        ),
        (
            "merge_method: linear\ndtype: bfloat16\n"
            "models: [{model: a, parameters: {weight: 2}}, {model: b, parameters: {weight: 2}}]\n"
        ),
    ),
    "keys of one's own that are called alike": (
        (
            "const: &m a\nconst: &n b\nconst: &unused 1\nenv: &env\n  parameters: {weight: 2}\n"
            "merge_method: linear\nmodels:\n- {model: *m, <<: *env}\n- {<<: *env, model: *n}\n"
        ),
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 2}\n",
    ),
    "a directive, documents' ends": (
        f"%YAML 1.1\n---\n# ünïcödé\n{weighted('0.5')}...\n",
        weighted("0.5"),
    ),
    "nothing under a key": (weighted("0.5") + "dtype:\n", weighted("0.5")),
    "empty texts": (
        weighted("0.5") + "dtype: ''\nout_dtype: \"\"\nchat_template: ''\n",
        weighted("0.5"),
    ),
    "types by other names": (
        weighted("0.5") + "dtype: FP32\nout_dtype: bf16\n",
        weighted("0.5") + "dtype: float32\nout_dtype: bfloat16\n",
    ),
    "layers as text": (
        f"{STACK}- sources: [{{model: a, layer_range: ['0', 4.0]}}]\n",
        f"{STACK}- sources: [{{model: a, layer_range: [0, 4]}}]\n",
    ),
    "a slice of no layers between others": (
        (
            f"{STACK}- sources: [{{model: a, layer_range: [0, 2]}}]\n"
            "- sources: [{model: a, layer_range: [1, 1]}]\n"
            "- sources: [{model: a, layer_range: [2, 4]}]\n"
        ),
        f"{STACK}- sources: [{{model: a, layer_range: [0, 4]}}]\n",
    ),
    "a module of all": (
        (
            "merge_method: linear\nmodules:\n  default:\n    models: [{model: a}, {model: b}]\n"
            "    parameters: {weight: [0.1, 0.9]}\nparameters: {weight: 7, normalize: no}\n"
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
            "parameters: {weight: [0.1, 0.9], normalize: false}\n"
        ),
    ),
    "a model by mappings": (
        weighted("1").replace("model: a", "model: {model: {path: a}}"),
        weighted("1"),
    ),
    "what only old releases read": (
        SLERP.replace("{t: T}", "{t: 0.5, embed_slerp: true, geodesic: true}"),
        SLERP.replace("T", "0.5"),
    ),
    "an option in a recipe": (weighted("1") + "random_seed: 4\n", weighted("1")),
    "what acts elsewhere, among parameters": (
        weighted("1").replace(
            "{weight: 0.25", "{weight: 0.25, random_seed: 4, dtype: float16, filter: mlp"
        ),
        weighted("1"),
    ),
    "where the output goes": (weighted("1") + "output_dir: x\nmodel_name: y\n", weighted("1")),
    "a type in a slice": (
        f"{STACK}- {{sources: [{{model: a, layer_range: [0, 4]}}], dtype: float16}}\n",
        f"{STACK}- {{sources: [{{model: a, layer_range: [0, 4]}}]}}\n",
    ),
}


@pytest.mark.parametrize("written", SAME)
def test_what_people_write_is_what_it_means(written: str) -> None:
    effects = {effect_of(oxmerge.plan(text)) for text in SAME[written]}
    assert len(effects) == 1


@pytest.mark.parametrize("no", ["no", "off", "False", '"no"', "0", "0.0", '"off"', "[false]"])
def test_every_spelling_of_no(no: str) -> None:
    written, meant, other = (
        effect_of(oxmerge.plan(TIES + f"parameters: {{normalize: {each}}}\n"))
        for each in (no, "false", "true")
    )
    assert written == meant != other


def test_an_unlisted_base_is_an_input_where_mergekit_takes_it() -> None:
    listed = "models: [{model: a, parameters: {weight: 3}}, {model: b}, {model: base}]\n"
    unlisted = listed.replace(", {model: base}", "")
    for method, parameters in (("linear", "parameters: {weight: 0.5}\n"), ("karcher", "")):
        text = f"merge_method: {method}\nbase_model: base\n"
        one, other = (oxmerge.plan(f"{text}{models}{parameters}") for models in (listed, unlisted))
        assert effect_of(one) == effect_of(other)
        assert not any("is no input" in str(warning) for warning in other.warnings)


def test_loose_tensors_come_from_slices_of_no_layers(tmp_path: Path) -> None:
    """The first slice gives the embedding, and the last one the head."""
    text = STACK + "".join(
        f"- sources: [{{model: {model}, layer_range: [{start}, {end}]}}]\n"
        for model, start, end in (("b", 0, 0), ("a", 0, 4), ("c", 4, 4))
    )
    oxmerge.merge(text, tmp_path / "out")
    models = {name: oxmerge.open(name) for name in "abc"}
    with oxmerge.open(tmp_path / "out") as out:
        for name in out:
            ends = {"model.embed_tokens.weight": "b", "model.norm.weight": "c"}
            of = ends.get(name, "c" if name.startswith("lm_head") else "a")
            np.testing.assert_array_equal(np.asarray(out[name]), np.asarray(models[of][name]))
