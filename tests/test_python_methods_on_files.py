"""Merge methods written in Python, on files: where built-in ones work, and how they are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import oxmerge
import pytest
import written_methods
from oxmerge import formula, method, per_model, python_methods, shared
from oxmerge.cli import main
from oxmerge.errors import MemoryBudgetError, PlanError
from oxmerge.formula import compute, weighted_sum, where
from writers import directory_bytes, random_arrays, tuned, write_model, write_recipe, write_sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

MODULE = "written_methods"
NAMES = ("stock", "crumbs", "selected", "sharpened", "by_row", "turned", "in_torch")


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Methods that a test makes are gone after it."""
    before = dict(python_methods._METHODS)
    yield
    python_methods._METHODS.clear()
    python_methods._METHODS.update(before)


def recipe_of(folder: Path, family: Path, name: str, **options: Any) -> Path:
    """Write a recipe of three models by a method of `written_methods`, or a built-in one."""
    known = getattr(written_methods, name, None)
    weighs = name == "breadcrumbs_ties" or (known and "weight" in known.parameters)
    each = {"weight": 0.3} | ({"density": 0.6} if "crumbs" in name else {}) if weighs else None
    models = [family / model for model in "abc"]
    method = f"{MODULE}:{name}" if known else name
    path = folder / f"{name}.yml"
    return write_recipe(path, method, models, base=family / "base", each=each, **options)


def merge(recipe: Any, directory: Path, **options: Any) -> dict[str, bytes]:
    oxmerge.merge(recipe, directory, **{"memory": "4GiB", "allow_methods": [MODULE]} | options)
    return directory_bytes(directory)


@pytest.mark.parametrize(
    ("ours", "theirs", "shared"),
    [
        ("stock", "model_stock", None),
        ("crumbs", "breadcrumbs_ties", None),
        ("selected", "sce", {"select_topk": 0.3}),
    ],
)
def test_the_bytes_are_those_of_the_methods_in_rust(
    tmp_path: Path, family: Path, ours: str, theirs: str, shared: Any
) -> None:
    merged = merge(recipe_of(tmp_path, family, ours), tmp_path / "ours")
    expected = merge(recipe_of(tmp_path, family, theirs, shared=shared), tmp_path / "theirs")
    assert merged["model.safetensors"] == expected["model.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_settings_change_no_byte(tmp_path: Path, family: Path, name: str) -> None:
    recipe = recipe_of(tmp_path, family, name)
    expected = merge(recipe, tmp_path / "reference")
    settings: dict[str, dict[str, Any]] = {
        "one": {"threads": 1, "read_path": "mapped"},
        "many": {"threads": 7, "read_path": "positioned"},
        "torch": {"device": "torch"},
    }
    for setting, options in settings.items():
        assert merge(recipe, tmp_path / setting, **options) == expected, setting
    with pytest.raises(MemoryBudgetError) as caught:
        oxmerge.plan(recipe, memory="1MiB", threads=1, allow_methods=[MODULE])
    least = int((caught.value.expected or "").split()[2]) + 32
    assert merge(recipe, tmp_path / "least", memory=f"{least}MiB") == expected
    oxmerge.plan(recipe, allow_methods=[MODULE]).save(tmp_path / "plan.json")
    assert merge(tmp_path / "plan.json", tmp_path / "by_plan") == expected
    if name != "sharpened":  # a number over the model is not of one tensor
        lazy = oxmerge.lazy(recipe, allow_methods=[MODULE])
        with oxmerge.open(tmp_path / "reference") as files:
            assert all(lazy[name].tobytes() == files[name].tobytes() for name in files)


@pytest.mark.parametrize("name", ["crumbs", "sharpened", "by_row"])
def test_a_sweep_gives_what_each_merge_gives(tmp_path: Path, family: Path, name: str) -> None:
    recipe = recipe_of(tmp_path, family, name)
    axes = {"models[a].parameters.weight": "0.1,0.4"}
    options: dict[str, Any] = {"memory": "4GiB", "allow_methods": [MODULE]}
    oxmerge.sweep(recipe, tmp_path / "w{weight}", axes, memory="4GiB", allow_methods=iter([MODULE]))
    text = recipe.read_text()
    for weight in ("0.1", "0.4"):
        recipe.write_text(text.replace("weight: 0.3", f"weight: {weight}", 1))
        assert merge(recipe, tmp_path / f"alone{weight}") == directory_bytes(
            tmp_path / f"w{weight}"
        )
    recipe.write_text(text)
    with pytest.raises(oxmerge.RecipeError, match="make no difference"):
        oxmerge.sweep(recipe, tmp_path / "x{t}", {"parameters.t": "0.1,0.4"}, **options)


def test_what_is_ranked_and_then_cut_is_of_each_small_neighbour(tmp_path: Path) -> None:
    """What rows keep is remembered for the combine, beside passes that all of a kind share."""

    @method(base="required")
    def cut(base: Any, models: Any) -> Any:
        vectors = [model - base for model in models]
        masks = [formula.random_mask_by_rank(abs(v), 0.2, 0.9, i) for i, v in enumerate(vectors)]
        kept = [where(mask, v, 0) for mask, v in zip(masks, vectors, strict=True)]
        kept = [where(formula.largest(abs(v), 20), v, 0) for v in kept]
        return base + weighted_sum([0.5] * len(kept), kept)

    shapes = {f"{number:02}": [(8, 16), (64, 33)][number % 2] for number in range(24)}
    base = random_arrays(shapes, seed=0)
    write_model(tmp_path / "base", base, "F32")
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, tuned(base, seed), "F32")
    models = [tmp_path / "a", tmp_path / "b"]
    recipe = write_recipe(tmp_path / "r.yml", "cut", models, base=tmp_path / "base")
    oxmerge.merge(recipe, tmp_path / "out", memory="4GiB")
    alone = oxmerge.lazy(recipe)
    with oxmerge.open(tmp_path / "out") as together:
        for name in shapes:
            assert together[name][...].tobytes() == alone[name][...].tobytes(), name
            changed = np.count_nonzero(together[name][...] != base[name])
            assert 20 <= changed <= 40, name


def test_the_function_runs_once_for_each_setting(tmp_path: Path) -> None:
    calls, tensors = [], []

    @method(base="required")
    def counted(base: Any, models: Any, *, weight: Any = per_model(1.0)) -> Any:
        calls.append(weight)
        return base + weighted_sum(weight, [model - base for model in models])

    @method
    def named(models: Any, *, tensor: Any) -> Any:
        tensors.append((tensor.name, tensor.shape, tensor.dtype, tensor.elements))
        return models[0] * (2 if tensor.name.endswith("bias") else 1)

    arrays = random_arrays(
        {f"layers.{at}.{n}": (9, 7) for at in range(3) for n in ("w", "bias")}, 1
    )
    arrays["layers.0.bias"][0] = np.nan
    for seed, name in enumerate("xyz"):
        write_model(tmp_path / name, tuned(arrays, seed), "F32")
    filters = [{"filter": "bias", "value": 0.5}, {"value": 0.25}]
    recipe = write_recipe(
        tmp_path / "r.yml", "counted", [tmp_path / "y", tmp_path / "z"], base=tmp_path / "x",
        each=[{"weight": filters}, {}],
    )  # fmt: skip
    merge(recipe, tmp_path / "out")
    assert sorted(calls) == [[0.25, 1.0], [0.5, 1.0]]
    write_recipe(recipe, "named", [tmp_path / "x"])
    merge(recipe, tmp_path / "named")
    assert sorted(tensors)[1] == ("layers.0.w", (9, 7), "F32", 63)
    with oxmerge.open(tmp_path / "named") as found, oxmerge.open(tmp_path / "x") as source:
        name = "layers.1.bias"
        assert np.array_equal(found[name], 2 * source[name])


# How a method is found.


def test_a_recipe_alone_runs_no_code(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "methods_of_a_stranger.py").write_text(
        "import oxmerge\n\n@oxmerge.method\ndef mine(models):\n    return models[0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = write_recipe(tmp_path / "r.yml", "methods_of_a_stranger:mine", [twins / "a"])
    for allowed in ([], ["methods_of_a_strange"], ["methods_of_a_stranger.mine"], ["os"]):
        with pytest.raises(PlanError, match="a recipe runs no code that is not allowed"):
            oxmerge.plan(recipe, allow_methods=allowed)
    assert "methods_of_a_stranger" not in sys.modules
    out, allow = str(tmp_path / "out"), ["--allow-methods", "methods_of_a_stranger"]
    assert main(["merge", str(recipe), out]) == 2
    assert "--allow-methods methods_of_a_stranger" in capsys.readouterr().err
    assert main(["plan", str(recipe), "--save", str(tmp_path / "plan.json"), *allow]) == 0
    assert main(["merge", str(recipe), out, *allow]) == 0
    capsys.readouterr()
    assert main(["methods", "methods_of_a_stranger:mine", *allow]) == 0
    assert capsys.readouterr().out.startswith("methods_of_a_stranger:mine: mine")
    assert main(["methods", "methods_of_a_stranger:mine"]) == 2
    with pytest.raises(TypeError, match="a list of names of modules"):
        oxmerge.plan(recipe, allow_methods="methods_of_a_stranger")
    # A plan is a stranger's too, and says which function it was made by.
    plan = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="a recipe runs no code that is not allowed"):
        oxmerge.load_plan(plan)
    allowed = ["methods_of_a_stranger"]
    assert oxmerge.load_plan(plan, allow_methods=allowed).method == "methods_of_a_stranger:mine"
    saved = json.loads(plan.read_text())
    assert saved["table"]["source"]["module"] == "methods_of_a_stranger"
    for change in ({"digest": "0" * 64}, {"function": "other"}):
        saved["table"]["source"] |= change
        plan.write_text(json.dumps(saved))
        with pytest.raises(PlanError, match="is not what it was when the plan was made"):
            oxmerge.load_plan(plan, allow_methods=allowed)
    saved["table"]["method"] = "linear"
    plan.write_text(json.dumps(saved))
    with pytest.raises(PlanError, match="found one of oxmerge's own"):
        oxmerge.load_plan(plan, allow_methods=allowed)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise RuntimeError('not today')", "cannot be loaded: RuntimeError: not today"),
        ("x = 1", "cannot be loaded: AttributeError"),
        ("def mine(models): return models[0]", "decorate the function"),
    ],
)
def test_a_module_without_the_method_is_told(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str
) -> None:
    module = f"module_{abs(hash(text))}"
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = write_recipe(tmp_path / "r.yml", f"{module}:mine", [twins / "a"])
    with pytest.raises(PlanError, match=told):
        oxmerge.plan(recipe, allow_methods=[module])


def install(folder: Path, package: str, points: str) -> None:
    """Make a package that is installed in `folder`, with entry points."""
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[oxmerge.methods]\n{points}\n")


def test_installed_packages_offer_methods(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "offers", "offered_method = offered_methods:mine\nlost = offered_methods:no")
    (tmp_path / "offered_methods.py").write_text(
        "import oxmerge\n\n@oxmerge.method\ndef mine(models):\n"
        "    '''Offered.\n\n    From https://example.org/paper.\n    '''\n    return models[0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = write_recipe(tmp_path / "r.yml", "offered_method", [twins / "a"])
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "[Offered (`offered_method`)](https://example.org/paper)" in card
    oxmerge.plan(recipe).save(tmp_path / "plan.json")
    assert str(oxmerge.load_plan(tmp_path / "plan.json")).startswith("method    offered_method")
    capsys.readouterr()
    assert main(["methods"]) == 0
    listed = capsys.readouterr()
    assert "offered_method" in listed.out
    assert "`lost` of `offers` cannot be loaded" in listed.err
    write_recipe(recipe, "offered_metod", [twins / "a"])
    with pytest.raises(PlanError, match="did you mean `offered_method`"):
        oxmerge.plan(recipe)
    merged = oxmerge.merge_tensors("offered_method", [np.ones(3, "f4")])
    assert (merged == 1).all()


def test_two_methods_of_one_name_are_told(twins: Path) -> None:
    def one(models: Any) -> Any:
        return models[0]

    def other(models: Any) -> Any:
        return models[0]

    other.__module__ = "elsewhere"
    for function in (one, other):
        method(name="twice_there")(function)
    recipe = {"merge_method": "twice_there", "models": [{"model": str(twins / "a")}]}
    with pytest.raises(PlanError, match="two modules have a merge method `twice_there`"):
        oxmerge.plan(recipe)


def test_parameters_are_those_of_a_built_in_method(tmp_path: Path, twins: Path) -> None:
    @method(models=(2, 2))
    def checked(
        models: Any, *, share: Any = shared(0.5, min=0, max=1), weight: Any = per_model()
    ) -> Any:
        return share * weighted_sum(weight, models)

    models = [twins / "a", twins / "b"]
    path = tmp_path / "r.yml"
    write_recipe(path, "checked", models, each={"weigth": 1}, shared={"share": 50, "extra": 1})
    with pytest.raises(PlanError) as caught:
        oxmerge.plan(path)
    told = str(caught.value)
    for part in ("did you mean `weight`", "`share`", "from 0 to 1", "did you mean `0.5`", "extra"):
        assert part in told
    write_recipe(path, "checked", models[:1], each={"weight": 1})
    with pytest.raises(PlanError, match="takes exactly 2 models"):
        oxmerge.plan(path)
    write_recipe(path, "checked", models, each={"weight": [0.1, 0.2]}, shared={"share": 0.25})
    plan = oxmerge.plan(path)
    assert "share = 0.25: parameters.share" in plan.explain("x")


# What goes wrong.


def test_what_fails_leaves_nothing(
    tmp_path: Path, twins: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @method
    def fails_early(models: Any, *, t: Any = shared(0.0)) -> Any:
        return models[0] * (1 / t)

    @method
    def fails_late(models: Any) -> Any:
        return models[0] * compute(lambda one: 1 / (one - one), formula.norm(models[0]))

    @method
    def fails_in_a_sweep(models: Any) -> Any:
        whole = formula.norm(models[0], over="model")
        return models[0] * compute(lambda one: 1 / (one - one), whole)

    @method(sees="rows")
    def fails_in_rows(models: Any) -> Any:
        raise RuntimeError(f"no rows of {models[0].shape}")

    @method
    def fits_nothing(models: Any) -> Any:
        return models[0] * (formula.count("row") + formula.count("column"))

    expected = {
        "fails_early": "ZeroDivisionError",
        "fails_late": "ZeroDivisionError",
        "fails_in_a_sweep": "ZeroDivisionError",
        "fails_in_rows": "RuntimeError: no rows of",
        "fits_nothing": "of a row and of a column at once",
    }
    for name, told in expected.items():
        recipe = write_recipe(tmp_path / "r.yml", name, [twins / "a"])
        for device in ("cpu", "torch"):
            with pytest.raises(PlanError, match=told) as caught:
                merge(recipe, tmp_path / "out", device=device)
            assert f"`{name}`" in str(caught.value)
            assert __file__ in str(caught.value)
        assert main(["merge", str(recipe), str(tmp_path / "out")]) in {1, 2}
        told_to_people = capsys.readouterr().err
        assert told in told_to_people
        assert "panicked" not in told_to_people
        assert os.listdir(tmp_path) == ["r.yml"]
        if name == "fails_late":
            lazy = oxmerge.lazy(recipe)
            with pytest.raises(PlanError, match="ZeroDivisionError"):
                lazy["x"]


def test_a_tensor_that_does_not_fit_is_refused_with_the_number(tmp_path: Path) -> None:
    shapes = {"large": (4096, 4096), "small": (3,)}
    write_sparse(tmp_path / "sparse" / "model.safetensors", shapes)
    models = [tmp_path / "sparse"]

    @method(sees="tensor")
    def kept(models: Any) -> Any:
        return models[0]

    recipe = write_recipe(tmp_path / "r.yml", "kept", models)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(MemoryBudgetError, match=r"at least \d+ MiB") as caught:
        oxmerge.merge(recipe, tmp_path / "out", memory=resident + (64 << 20))
    wanted = int((caught.value.expected or "").split()[2]) << 20
    # Bytes of bfloat16 in and out; float32 arrays in and out and as bytes, and as much again.
    assert wanted - resident > 4096 * 4096 * (2 + 2 + 2 * 3 * 4)
    assert sorted(os.listdir(tmp_path)) == ["r.yml", "sparse"]
    report = oxmerge.merge(recipe, tmp_path / "out", memory=wanted + (16 << 20))
    assert report.threads == 1


CHILD = """
import json, sys
import oxmerge
recipe, directory, memory = sys.argv[1:]
report = oxmerge.merge(recipe, directory, memory=memory, allow_methods=["written_methods"])
print(json.dumps(report.as_dict()))
"""


@pytest.mark.parametrize("name", ["sharpened", "selected", "by_row"])
def test_the_budget_holds(tmp_path: Path, name: str) -> None:
    shapes = {"rows": (30_000, 4096), "long": (40_000_000,), "small": (77,)}
    shapes |= {"long": (2, 300_000)} if name != "selected" else {}
    for model in ("base", "a", "b", "c"):
        write_sparse(tmp_path / model / "model.safetensors", shapes)
    recipe = recipe_of(tmp_path, tmp_path, name)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", CHILD, str(recipe), str(tmp_path / "out"), "160MiB"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["peak_memory"] <= 160 << 20


def test_types_of_the_output(tmp_path: Path, family: Path) -> None:
    recipe = recipe_of(tmp_path, family, "by_row", out_dtype="bfloat16")
    merged = merge(recipe, tmp_path / "out")
    assert merged
    with oxmerge.open(tmp_path / "out") as found, oxmerge.open(family / "base") as base:
        name = "layers.0.weight"
        assert found[name].dtype == ml_dtypes.bfloat16
        vectors = []
        for model in "abc":
            with oxmerge.open(family / model) as source:
                vectors.append(source[name].astype("f4") - base[name].astype("f4"))
        parts = [np.float32(0.3) * np.sort(vector, axis=-1) for vector in vectors]
        expected = (base[name].astype("f4") + sum(parts)).astype(ml_dtypes.bfloat16)
        assert np.array_equal(found[name].view("u2"), expected.view("u2"))
