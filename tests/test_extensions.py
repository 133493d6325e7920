"""What stands under `oxmerge`: kept tensors, mismatches, scales by depth, other names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from oxmerge import _core
from oxmerge.models.names import position
from oxmerge.planning.parameters import interpolate
from oxmerge.recipe.patterns import Rename, check_rename
from writers import Arrays, directory_bytes, random_arrays, read_tensors, tuned, write_model

if TYPE_CHECKING:
    from oxmerge.planning.plans import Plan

DEPTH = 3
CONFIG = {"model_type": "test", "num_hidden_layers": DEPTH}
SHAPES = {
    "model.embed_tokens.weight": (40, 8),
    **{
        f"model.layers.{layer}.{rest}": shape
        for layer in range(DEPTH)
        for rest, shape in {"attn.weight": (8, 8), "mlp.weight": (300, 257), "norm": (8,)}.items()
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (40, 8),
}
MEMORY = "16GiB"


@pytest.fixture
def folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A base and two fine-tunes of it, in the working directory."""
    base = random_arrays(SHAPES, 0)
    write_model(tmp_path / "base", base, "BF16", CONFIG)
    for seed, name in enumerate("ab", start=1):
        write_model(tmp_path / name, tuned(base, seed, 0.01), "BF16", CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(method: str, *models: str, base: str | None = "base", **more: Any) -> dict[str, Any]:
    extensions = {
        key: more.pop(key)
        for key in ("keep", "on_mismatch", "layer_scale", "rename")
        if key in more
    }
    listed = [{"model": name, "parameters": {"weight": 0.5}} for name in models]
    found: dict[str, Any] = {"merge_method": method, "models": listed, **more}
    if base is not None:
        found["base_model"] = base
    return {**found, "oxmerge": extensions} if extensions else found


def planned(asked: Any, **options: Any) -> Plan:
    return oxmerge.plan(asked, memory=MEMORY, **options)


def merged(asked: Any, out: str = "out", **options: Any) -> dict[str, Any]:
    oxmerge.merge(asked, out, **{"memory": MEMORY, "overwrite": True, **options})
    return read_tensors(Path(out) / "model.safetensors")


def model(name: str) -> dict[str, Any]:
    return read_tensors(Path(name) / "model.safetensors")


def widened(name: str, tensor: str) -> np.ndarray[Any, Any]:
    bits = np.frombuffer(model(name)[tensor][2], np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def faults(asked: Any, **options: Any) -> list[str]:
    with pytest.raises((oxmerge.RecipeError, oxmerge.PlanError)) as caught:
        planned(asked, **options)
    return [str(problem) for problem in caught.value.problems]


# What is kept.


def test_what_is_kept_has_the_bytes_of_one_model(folder: Path) -> None:
    plain = merged(recipe("ties", "a", "b"))
    kept = merged(recipe("ties", "a", "b", keep=["*norm*", "lm_head.*"]))
    assert kept.keys() == plain.keys()
    for name in plain:
        is_kept = "norm" in name or name.startswith("lm_head")
        assert kept[name] == (model("base") if is_kept else plain)[name]
    ours = merged(recipe("ties", "a", "b", keep={"*.1.*": "a", "*norm*": "base", "*.0.*": "b"}))
    for name in plain:
        # The first pattern counts.
        keeper = {".1.": "a", "norm": "base", ".0.": "b"}
        whose = next((keeper[part] for part in keeper if part in name), None)
        assert ours[name] == (plain if whose is None else model(whose))[name]


def test_a_model_may_be_there_for_what_is_kept_only(folder: Path) -> None:
    asked = recipe("task_arithmetic", "a", keep={"lm_head.*": "b"})
    kept = merged(asked)
    assert kept["lm_head.weight"] == model("b")["lm_head.weight"]
    account = planned(asked).accounting[-1]
    assert (account.model, len(account.copied), account.dropped_count) == ("b", 1, len(SHAPES) - 1)
    (reason,) = account.dropped
    assert reason == "the model is no input, it gives what is kept from it"


def test_kept_tensors_are_accounted_for_and_explained(folder: Path) -> None:
    Path("recipe.yml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 1}\noxmerge:\n  keep:\n  - '*.norm'\n  - lm_head.*\n"
    )
    plan = planned("recipe.yml")
    a, _, base = plan.accounting
    assert base.copied.names == ["model.layers.{0..2}.norm", "lm_head.weight"]
    assert a.dropped.keys() == {
        "that of `base` is taken (oxmerge.keep[0])",
        "that of `base` is taken (oxmerge.keep[1])",
    }
    assert not plan.warnings
    note = "3 tensors kept from `base` (oxmerge.keep[0]): model.layers.{0..2}.norm"
    assert note in plan.notes
    assert note in str(plan)
    assert note in plan.card
    told = plan.explain("model.layers.1.norm").splitlines()
    assert told[1:2] == ["  keep = true: oxmerge.keep[0] (line 7)"]
    assert len(told) == 3
    plan.save("plan.json")
    again = oxmerge.load_plan("plan.json", memory=MEMORY)
    assert (again.notes, again.digest()) == (plan.notes, plan.digest())
    assert again.explain("lm_head.weight") == plan.explain("lm_head.weight")
    assert merged(again, "out2") == merged(plan)


def test_kept_tensors_are_written_in_the_type_that_is_asked_for(folder: Path) -> None:
    kept = merged(recipe("ties", "a", keep=["lm_head.*"], dtype="float32"))["lm_head.weight"]
    assert kept[0] == "F32"
    assert kept[2] == widened("base", "lm_head.weight").tobytes()


def test_only_a_star_stands_for_something(folder: Path) -> None:
    odd = {"a[0].weight": (8,), "a0.weight": (8,), "a1.weight": (8,)}
    for seed, name in enumerate(("base", "a")):
        shutil.rmtree(folder / name)
        write_model(folder / name, random_arrays(odd, seed), "F32", CONFIG)
    plain = merged(recipe("ties", "a"))
    kept = merged(recipe("ties", "a", keep=["a[0].*"]))
    assert plain["a[0].weight"] != kept["a[0].weight"] == model("base")["a[0].weight"]
    assert all(kept[name] == plain[name] for name in ("a0.weight", "a1.weight"))
    (warning,) = planned(recipe("ties", "a", keep=["a?.weight"])).warnings
    assert warning.code == "no-effect"


def test_patterns_that_are_for_nothing_are_told(folder: Path) -> None:
    plan = planned(recipe("ties", "a", keep=["vision.*"]))
    assert [str(each).splitlines()[0] for each in plan.warnings] == [
        "oxmerge.keep[0]: no tensor of the output is called so"
    ]
    assert "no model `nowhere`" in faults(recipe("ties", "a", keep={"*": "nowhere"}))[0]


def test_layers_are_kept_by_slices(folder: Path) -> None:
    slices = [
        {
            "sources": [
                {"model": "base", "layer_range": [0, 2]},
                {"model": "a", "layer_range": [1, 3]},
            ]
        },
        {
            "sources": [
                {"model": "base", "layer_range": [1, 2]},
                {"model": "a", "layer_range": [0, 1]},
            ]
        },
    ]
    asked: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": slices,
        "parameters": {"weight": 1},
        "oxmerge": {"keep": {"*.mlp.*": "a", "lm_head.*": "b"}},
    }
    kept = merged(asked)
    for layer, source in enumerate((1, 2, 0)):
        name = f"model.layers.{source}.mlp.weight"
        assert kept[f"model.layers.{layer}.mlp.weight"] == model("a")[name]
    assert kept["lm_head.weight"] == model("b")["lm_head.weight"]
    asked["oxmerge"] = {"keep": {"*.mlp.*": "b"}}
    (fault,) = faults(asked)
    assert "the slice of a layer does not list `b`, which the layer is kept from" in fault


# What does not match.


def test_a_mismatch_is_an_error_unless_the_base_is_asked_for(folder: Path) -> None:
    arrays = random_arrays(SHAPES, 7)
    arrays["model.embed_tokens.weight"] = np.zeros((41, 8), np.float32)
    arrays["lm_head.weight"] = np.zeros((41, 8), np.float32)
    del arrays["model.layers.1.norm"], arrays["model.layers.2.norm"]
    write_model(folder / "odd", arrays, "BF16", CONFIG)
    codes = [problem.split(":")[0] for problem in faults(recipe("ties", "a", "odd"))]
    assert len(codes) == 2
    assert faults(recipe("ties", "a", "odd", on_mismatch="error")) == faults(
        recipe("ties", "a", "odd")
    )
    asked = recipe("ties", "a", "odd", on_mismatch="base")
    plan = planned(asked, strict=True)
    why = "2 tensors from `base` alone, since `odd` {} (oxmerge.on_mismatch): {}"
    assert plan.notes == (
        why.format("has them in another shape", "model.embed_tokens.weight, lm_head.weight"),
        why.format("lacks them", "model.layers.{1..2}.norm"),
    )
    assert "keep = true: oxmerge.on_mismatch" in plan.explain("lm_head.weight")
    taken = merged(asked)
    sound = merged(recipe("ties", "a", "odd", keep=["*embed*", "lm_head*", "*.1.norm", "*.2.norm"]))
    assert taken == sound
    for name in ("lm_head.weight", "model.layers.1.norm"):
        assert taken[name] == model("base")[name]


def test_without_a_base_the_donor_is_taken(folder: Path) -> None:
    arrays = random_arrays(SHAPES, 7)
    del arrays["model.norm.weight"]
    write_model(folder / "less", arrays, "BF16", CONFIG)
    taken = merged(recipe("linear", "a", "less", base=None, on_mismatch="base"))
    assert taken["model.norm.weight"] == model("a")["model.norm.weight"]
    assert faults(recipe("linear", "a", "less", base=None))


def test_a_base_that_is_no_input_is_kept_from_as_well(folder: Path) -> None:
    asked = recipe("linear", "a", "b", keep=["*norm*"], on_mismatch="base")
    plain = merged(recipe("linear", "a", "b"))
    for name, tensor in merged(asked).items():
        assert tensor == (model("base") if "norm" in name else plain)[name]


def test_depths_have_to_agree_all_the_same(folder: Path) -> None:
    fewer = {name: shape for name, shape in SHAPES.items() if ".2." not in name}
    write_model(
        folder / "flat", random_arrays(fewer, 3), "BF16", {**CONFIG, "num_hidden_layers": 2}
    )
    found = faults(recipe("ties", "flat", on_mismatch="base"))
    assert any("layer counts differ" in fault for fault in found)


# Scales by depth.


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "sce", "expo"])
def test_a_scale_of_one_changes_no_byte(folder: Path, method: str) -> None:
    models = "a" if method == "expo" else "ab"
    plain = merged(recipe(method, *models))
    assert merged(recipe(method, *models, layer_scale=1)) == plain
    assert merged(recipe(method, *models, layer_scale=[1, 1])) == plain
    assert merged(recipe(method, *models, layer_scale=0)) == {
        name: (kind, shape, data) for name, (kind, shape, data) in model("base").items()
    }


def test_task_vectors_grow_with_depth(folder: Path) -> None:
    scaled = merged(
        recipe("task_arithmetic", "a", "b", layer_scale={"from": 0.5, "to": 1.5}, dtype="float32")
    )
    half = np.float32(0.5)
    for name in SHAPES:
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        base, a, b = (widened(each, name) for each in ("base", "a", "b"))
        # LiNeS: alpha + beta * layer / (depth - 1); alpha outside of the layers.
        factor = np.float32(0.5 + 1.0 * layer / (DEPTH - 1))
        expected = base + factor * (half * (a - base) + half * (b - base))
        assert scaled[name][2] == expected.tobytes(), name


@pytest.mark.parametrize("method", ["ties", "dare_linear", "breadcrumbs", "consensus_ta"])
def test_a_scale_is_a_lambda_for_each_layer(folder: Path, method: str) -> None:
    scales = {".0.": 0.25, ".1.": 0.5, ".2.": 0.75}
    each = {
        part: merged(recipe(method, "a", "b", parameters={"lambda": scale}))
        for part, scale in scales.items()
    }
    scaled = merged(recipe(method, "a", "b", layer_scale=[0.25, 0.75]))
    for name in SHAPES:
        part = next((part for part in scales if part in name), ".0.")
        assert scaled[name] == each[part][name]


@pytest.mark.parametrize("method", ["slerp", "nearswap", "multislerp", "arcee_fusion"])
def test_what_adds_to_no_base_is_scaled_by_its_difference(folder: Path, method: str) -> None:
    more: dict[str, Any] = {"dtype": "float32"}
    if method in {"slerp", "nearswap"}:
        more["parameters"] = {"t": 0.4}
    plain = merged(recipe(method, "a", **more))
    scaled = merged(recipe(method, "a", layer_scale=0.25, **more))
    for name in SHAPES:
        base = widened("base", name)
        whole = np.frombuffer(plain[name][2], np.float32)
        expected = base + np.float32(0.25) * (whole - base)
        found = np.frombuffer(scaled[name][2], np.float32)
        # What `arcee_fusion` adds is known before it is added, and not rounded.
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-9)
        if method != "arcee_fusion":
            assert scaled[name][2] == expected.tobytes()


def test_depth_is_that_of_the_output(folder: Path) -> None:
    sources = [
        [{"model": name, "layer_range": layers} for name in ("base", "a")]
        for layers in ([0, 2], [1, 3])
    ]
    asked = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [{"sources": each} for each in sources],
        "parameters": {"weight": 1},
        "oxmerge": {"layer_scale": {"from": 0, "to": 0.75}},
    }
    plan = planned(asked)
    wide = [tensor for tensor in plan.tensors if tensor.name.endswith("mlp.weight")]
    assert [tensor.parameters["layer_scale"] for tensor in wide] == [0, 0.25, 0.5, 0.75]
    told = plan.explain("model.layers.1.norm")
    assert (
        "layer_scale = 0.25: oxmerge.layer_scale, gradient [0.0, 0.75] at position 0.333333" in told
    )


def test_scales_may_have_filters(folder: Path) -> None:
    asked = recipe("ties", "a", layer_scale=[{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}])
    tensors = planned(asked).tensors
    found = {tensor.name: tensor.parameters["layer_scale"] for tensor in tensors}
    assert found["model.layers.1.mlp.weight"] == found["lm_head.weight"] == 0.5
    assert found["model.layers.2.mlp.weight"] == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "linear",
            "`layer_scale` scales what a method adds to the base, and `linear` has none here",
        ),
        ("nuslerp", "`nuslerp` has none here"),
    ],
)
def test_a_method_without_a_base_refuses_a_scale(folder: Path, method: str, message: str) -> None:
    (fault,) = faults(recipe(method, "a", "b", base=None, layer_scale=0.5))
    assert message in fault


def test_values_of_scales_are_checked(folder: Path) -> None:
    (fault,) = faults(recipe("ties", "a", layer_scale="x"))
    assert "`layer_scale` is a finite number" in fault
    plan = planned(recipe("ties", "a", layer_scale=50))
    assert "usually from -10 to 10" in str(plan.warnings[0])


@given(st.integers(2, 200), st.floats(0, 2), st.floats(0, 2))
def test_a_range_is_lines(depth: int, alpha: float, beta: float) -> None:
    for layer in range(depth):
        found = interpolate((alpha, alpha + beta), position(layer, depth))
        assert isinstance(found, float)
        assert abs(found - (alpha + beta * layer / (depth - 1))) <= 1e-15 * 8


def test_a_sweep_over_scales_is_those_merges(folder: Path) -> None:
    asked = recipe("ties", "a", "b", layer_scale={"from": 0.1, "to": 1}, keep=["*norm*"])
    oxmerge.sweep(asked, "w{from}", {"oxmerge.layer_scale.from": [0.25, 0.5]}, memory=MEMORY)
    for first in (0.25, 0.5):
        asked["oxmerge"]["layer_scale"]["from"] = first
        assert read_tensors(Path(f"w{first}/model.safetensors")) == merged(asked)


# Other names.

LLAVA = {
    "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    **{
        f"language_model.model.layers.{at}.w": f"model.language_model.layers.{at}.w"
        for at in range(DEPTH)
    },
    "language_model.lm_head.weight": "lm_head.weight",
    "vision_tower.patch.weight": "model.vision_tower.patch.weight",
    "multi_modal_projector.linear.weight": "model.multi_modal_projector.linear.weight",
}


def write_named(names: list[str], folder: str, seed: int, **config: Any) -> Arrays:
    generator = np.random.default_rng(seed)
    arrays = {name: generator.standard_normal((4, 5), np.float32) for name in names}
    write_model(Path(folder), arrays, "F32", {**CONFIG, **config})
    return arrays


@pytest.mark.parametrize("direction", [1, -1])
def test_known_conversions_are_matched(folder: Path, direction: int) -> None:
    olds, news = [*LLAVA], [*LLAVA.values()]
    ours, theirs = (olds, news)[::direction]
    one, other = write_named(ours, "one", 1), write_named(theirs, "other", 2)
    plan = planned(recipe("linear", "one", "other", base=None), strict=True)
    (note,) = plan.notes
    assert note.startswith(
        "the tensors of `other` are matched with those of `one` by other names: `"
    )
    assert note in str(plan)
    told = plan.explain(ours[1])
    assert f"other: {theirs[1]}, F32" in told
    found = merged(recipe("linear", "one", "other", base=None))
    half = np.float32(0.5)
    for here, there in zip(ours, theirs, strict=True):
        assert found[here][2] == (half * one[here] + half * other[there]).tobytes()
    plan.save("plan.json")
    assert oxmerge.load_plan("plan.json", memory=MEMORY).explain(ours[1]) == told


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["model.layers.0.w", "lm_head.weight"], ["layers.0.w"]),
        (["layers.0.w", "norm.w"], ["model.layers.0.w", "model.norm.w", "lm_head.weight"]),
        (["visual.p", "model.layers.0.w"], ["model.visual.p", "model.language_model.layers.0.w"]),
        (["model.layers.0.w"], ["model.language_model.layers.0.w", "model.visual.p"]),
        (["x.LayerNorm.gamma", "x.w"], ["x.LayerNorm.weight", "x.w"]),
    ],
)
def test_the_other_conversions(folder: Path, one: list[str], other: list[str]) -> None:
    config = {"num_hidden_layers": 1}
    write_named(one, "one", 1, **config)
    write_named(other, "other", 2, **config)
    plan = planned(recipe("linear", "one", "other", base=None, on_mismatch="base"))
    assert sum(len(tensor.sources) == 2 for tensor in plan.tensors) == min(
        sum(not name.startswith("lm_head") for name in names) for names in (one, other)
    )
    assert "by other names" in plan.notes[0]


def test_what_is_nearly_a_conversion_is_left_alone(folder: Path) -> None:
    write_named(["model.layers.0.w", "model.norm.w", "model.x"], "one", 1)
    write_named(["layers.0.w", "norm.w", "y"], "other", 2)
    found = faults(recipe("linear", "one", "other", base=None))
    assert "`other` lacks a tensor" in found[0]


def test_equal_names_are_left_alone(folder: Path) -> None:
    assert not planned(recipe("ties", "a", "b")).notes


def test_a_recipe_may_rename(folder: Path) -> None:
    arrays = random_arrays(SHAPES, 5)
    strange = {
        name.replace("model.layers", "transformer.h").replace("model.", "transformer."): array
        for name, array in arrays.items()
    }
    write_model(folder / "strange", strange, "BF16", CONFIG)
    write_model(folder / "same", arrays, "BF16", CONFIG)
    rename = {"strange": {"transformer.h.*": "model.layers.*", "transformer.*": "model.*"}}
    assert faults(recipe("ties", "a", "strange"))
    asked = recipe("ties", "a", "strange", rename=rename)
    assert merged(asked) == merged(recipe("ties", "a", "same"))
    plan = planned(asked)
    assert "by other names: `transformer.h.*` as `model.layers.*`" in plan.notes[0]
    assert "strange: transformer.h.1.norm" in plan.explain("model.layers.1.norm")
    lazily = oxmerge.lazy(asked)["model.layers.1.norm"]
    assert lazily.tobytes() == merged(asked)["model.layers.1.norm"][2]


def test_renames_are_checked(folder: Path) -> None:
    def fault(rename: Any) -> str:
        return faults(recipe("ties", "a", rename=rename))[0]

    assert "`other` is no model of this recipe" in fault({"other": {"*": "*"}})
    assert "the output has the names of `base`" in fault({"base": {"*": "x.*"}})
    assert "two tensors of `a` would have one name" in fault({"a": {"*.0.norm": "*.1.norm"}})
    plan = planned(recipe("ties", "a", rename={"a": {"none": "nothing"}}))
    assert "no tensor of `a` is called `none`" in str(plan.warnings[0])


@settings(max_examples=200)
@given(st.lists(st.text("ab.", max_size=4), min_size=2, max_size=5), st.data())
def test_a_name_is_put_together_from_what_the_stars_stand_for(
    parts: list[str], data: st.DataObject
) -> None:
    inner = [data.draw(st.text("cd", max_size=3)) for _ in parts[1:]]
    name = parts[0] + "".join(map("".join, zip(inner, parts[1:], strict=True)))
    rule = Rename("*".join(parts), "*".join("#" * len(parts)))
    found = rule(name)
    assert found is not None
    # Undone, it is the name again, whatever the stars were taken for.
    assert rule.reverse(found) == name


def test_stars_cost_no_more_than_a_name() -> None:
    assert Rename("*a" * 16, "*" * 16)("a" * 15 + "b" * 100_000) is None
    fault = check_rename("*" * 17, "*" * 17)
    assert fault is not None
    assert "at most 16" in fault[0]


# All of it.


def everything() -> dict[str, Any]:
    return recipe(
        "dare_ties",
        "a",
        "b",
        keep={"*.1.attn*": "b"},
        on_mismatch="base",
        layer_scale={"from": 0.3, "to": 1.1},
    )


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1, "read_path": "mapped"},
        {"threads": 5, "read_path": "positioned"},
        {"memory": 96 << 20},
        {"device": "torch"},
    ],
)
def test_settings_change_no_byte(folder: Path, options: dict[str, Any]) -> None:
    oxmerge.merge(everything(), "one", memory=MEMORY)
    if "memory" in options:  # besides what the process of the tests has
        options = {"memory": options["memory"] + _core.peak_memory()}
    oxmerge.merge(everything(), "other", **{"memory": MEMORY, **options})
    assert directory_bytes(folder / "one") == directory_bytes(folder / "other")


def test_a_recipe_may_be_a_mapping_a_text_or_a_plan(folder: Path) -> None:
    expected = merged(everything())
    text = json.dumps(everything(), indent=1)
    assert merged(text, "of-text") == expected
    assert merged(oxmerge.Recipe.from_mapping(everything()), "of-recipe") == expected
    lazily = oxmerge.lazy(everything())
    for name, (_, _, data) in expected.items():
        assert lazily[name].tobytes() == data


def test_methods_in_python_are_extended_as_the_built_in_ones(folder: Path) -> None:
    extensions: dict[str, Any] = {
        "keep": ["*norm*"],
        "layer_scale": {"from": 0.25, "to": 2},
        "on_mismatch": "base",
    }
    allowed: dict[str, Any] = {"allow_methods": ["written_methods"]}
    written = recipe("written_methods:stock", "a", "b", **extensions)
    assert merged(written, **allowed) == merged(recipe("model_stock", "a", "b", **extensions))
    planned(written, **allowed).save("plan.json")
    again = oxmerge.load_plan("plan.json", memory=MEMORY, **allowed)
    assert merged(again, "out2", **allowed) == merged(written, **allowed)


def test_a_function_of_arrays_refuses_a_scale(folder: Path) -> None:
    def asked(**more: Any) -> dict[str, Any]:
        return recipe("written_methods:by_row", "a", "b", **more)

    allowed: dict[str, Any] = {"allow_methods": ["written_methods"]}
    kept = merged(asked(keep=["*norm*"]), **allowed)
    assert kept["model.norm.weight"] == model("base")["model.norm.weight"]
    (fault,) = faults(asked(layer_scale=0.5), **allowed)
    assert "this method is a function of arrays" in fault


def test_tensors_may_be_kept_from_an_earlier_merge(folder: Path) -> None:
    first = {**recipe("linear", "a", "b", base=None), "name": "first"}
    last = recipe("ties", "a", keep={"lm_head.*": "first"})
    text = f"{json.dumps(first, indent=1)}\n---\n{json.dumps(last, indent=1)}\n"
    of_first = merged(recipe("linear", "a", "b", base=None), "first-alone")
    assert merged(text, "of-two")["lm_head.weight"] == of_first["lm_head.weight"]


def test_keys_are_checked(folder: Path) -> None:
    asked = recipe("ties", "a", keep=["*"])
    (fault,) = faults({**asked, "oxmerge": {"kep": ["*"]}})
    assert "unknown key `kep`" in fault
    assert "did you mean `keep`?" in fault
    (fault,) = faults({**recipe("ties", "a"), "on_mismatch": "base"})
    assert "put it under `oxmerge` at the top level" in fault
    found = faults({**asked, "oxmerge": {"keep": "x", "on_mismatch": "skip", "rename": [1]}})
    assert len(found) == 3
    assert "says `error` or `base`: found 'skip'" in found[1]


def test_a_plan_that_keeps_of_two_models_is_refused(folder: Path) -> None:
    planned(recipe("ties", "a", keep=["lm_head.*"])).save("plan.json")
    text = Path("plan.json").read_text()
    assert text.count('"keep":true') == 1
    at = text.index('"shared":{', text.index('"settings"'))
    spoilt = text[:at] + text[at:].replace('"shared":{"', '"shared":{"keep":true,"', 1)
    Path("plan.json").write_text(spoilt)
    with pytest.raises(oxmerge.PlanError, match="a tensor that is kept has one source"):
        oxmerge.load_plan("plan.json")


def test_a_vision_model_is_kept_beside_a_text_merge(tmp_path: Path) -> None:
    whole = zoo.qwen2_vl()
    text = {name: row for name, row in whole.tensors.items() if not name.startswith("visual.")}
    zoo.write(tmp_path / "base", whole)
    zoo.write(tmp_path / "text", zoo.Specimen(whole.config, text))
    asked = recipe("ties", "text", on_mismatch="base")
    plan = zoo.plan_in(tmp_path, oxmerge.Recipe.from_mapping(asked))
    (note,) = plan.notes
    count = len(whole.tensors) - len(text)
    assert note.startswith(f"{count} tensors from `base` alone, since `text` lacks them")
