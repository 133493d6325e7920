"""Ranges of parameters, as the methods tell them: what is refused, and what is warned about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import oxmerge
import pytest
from oxmerge import _core, kernels
from oxmerge.errors import PlanError
from oxmerge.methods import Range
from oxmerge.recipe.recipe import Recipe
from writers import write_model

if TYPE_CHECKING:
    from pathlib import Path

    from oxmerge.planning.plans import Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("base", "a", "b")):
        write_model(folder / name, {"w": np.full(8, 1 + number, np.float32)}, "F32")
    return folder


def plan(folder: Path, method: str, *each: Any, strict: bool = False, **shared: Any) -> Plan:
    """Plan a merge with these parameters of the models, and of all."""
    models = [{"model": n, "parameters": p} for n, p in zip("ab", each, strict=False)]
    mapping: dict[str, Any] = {"merge_method": method, "models": models, "parameters": shared}
    if method not in {"linear", "passthrough"}:
        mapping["base_model"] = "base"
    return oxmerge.plan(Recipe.from_mapping(mapping, folder=str(folder)), strict=strict)


def refused(folder: Path, *each: Any, method: str = "ties", **shared: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        plan(folder, method, *each, **shared)
    return [str(problem) for problem in caught.value.problems]


NO_SHARE = "`density` is from 0 to 1: found "


@pytest.mark.parametrize(
    ("density", "found", "advice"),
    [
        (53, "53", "did you mean `0.53`, which is 53 %?"),
        (100, "100", "did you mean `1`, which is 100 %?"),
        (-1, "-1", "did you mean `1`?"),
        (-0.5, "-0.5", "did you mean `0.5`?"),
        (-53.0, "-53", "did you mean `0.53`, which is 53 %?"),
        (1.0000001, "1.0000001", "write a number from 0 to 1"),
        (5.5, "5.5", "write a number from 0 to 1"),
        ("101", "101", "write a number from 0 to 1"),
        ([0.1, 53, -1], "53", "did you mean `0.53`, which is 53 %?"),
        ([{"filter": "w", "value": [0.5, 2]}], "2", "did you mean `0.02`, which is 2 %?"),
    ],
)
def test_what_can_be_no_density_is_refused(
    folder: Path, density: Any, found: str, advice: str
) -> None:
    problems = refused(folder, {"weight": 1, "density": density}, {"weight": 1})
    where = "models[0].parameters.density: "
    assert problems == [f"{where}{NO_SHARE}{found}\n  hint: {advice}"]


def test_on_every_level_and_all_at_once(folder: Path) -> None:
    one = {"weight": 1, "density": 2}
    assert len(refused(folder, one, one, density=-1)) == 3
    # Also for a model that is not there.
    models = [{"model": "none", "parameters": one}]
    mapping = {"merge_method": "ties", "base_model": "base", "models": models}
    with pytest.raises(PlanError) as caught:
        oxmerge.plan(Recipe.from_mapping(mapping, folder=str(folder)))
    codes = [problem.code for problem in caught.value.problems]
    assert codes.count("parameter-limits") == 1
    assert len(codes) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), ".nan", "-inf", "nan"])
@pytest.mark.parametrize("name", ["weight", "density"])
def test_no_number_is_refused_in_words(folder: Path, name: str, value: Any) -> None:
    [problem] = refused(folder, {"weight": 1, name: value})
    assert problem.startswith(f"models[0].parameters.{name}: `{name}` is a finite number: found ")
    with pytest.raises(ValueError, match=f"^`{name}` is a finite number, not "):
        kernels.ties([np.ones(2)], np.ones(2), **{"weight": 1, name: value})


@pytest.mark.parametrize(
    ("method", "each", "shared", "warning"),
    [
        ("slerp", [{}], {"t": 5}, "parameters.t: `t` is usually from -0.5 to 1.5: found 5"),
        ("slerp", [{}], {"t": [0, 5, 1]}, "`t` is usually from -0.5 to 1.5: found 5"),
        ("ties", [{"weight": 100}], {}, "`weight` is usually from -10 to 10: found 100"),
        ("ties", [{"weight": 1}], {"lambda": -50}, "`lambda` is usually from -10 to 10: found -50"),
        ("linear", [{"weight": 100}], {}, "`weight` is usually from -10 to 10: found 100"),
        ("nuslerp", [{"weight": 1}, {"weight": 30}], {}, "`weight` is usually from -10 to 10"),
        ("passthrough", [{"scale": 70.7}], {}, "`scale` is usually from -10 to 10: found 70.7"),
    ],
)
def test_what_is_probably_a_slip_is_warned_about(
    folder: Path, method: str, each: Any, shared: Any, warning: str
) -> None:
    warnings = [str(problem) for problem in plan(folder, method, *each, **shared).warnings]
    [found] = [text for text in warnings if "usually" in text]
    assert warning in found
    assert found.endswith("hint: it is used as it is; check that no decimal point is missing")
    with pytest.raises(PlanError, match="is usually from"):
        plan(folder, method, *each, **shared, strict=True)


@pytest.mark.parametrize(
    ("method", "each", "shared"),
    [
        ("linear", [{"weight": -1}, {"weight": 3}], {}),
        ("slerp", [{}], {"t": 0.5}),
        ("slerp", [{}], {"t": 1.2}),
        ("ties", [{"weight": 1.5, "density": 1}, {"weight": -0.2, "density": 0}], {"lambda": -1}),
        ("dare_linear", [{"weight": 2, "density": 1e-9}], {"lambda": 1.8}),
        ("passthrough", [{"scale": 0}], {}),
    ],
)
def test_what_people_write_is_taken_without_a_word(
    folder: Path, method: str, each: Any, shared: Any
) -> None:
    plan(folder, method, *each, **shared, strict=True)


def test_in_memory() -> None:
    tensors, base = [np.ones(2, np.float32)] * 2, np.ones(2, np.float32)
    dicts = [{"w": each} for each in tensors]
    message = "^`density` is from 0 to 1, not 53; did you mean `0.53`, which is 53 %\\?$"
    options: dict[str, Any] = {"weight": 1, "density": [0.5, 53]}
    with pytest.raises(ValueError, match=message):
        oxmerge.merge_tensors("dare_ties", tensors, base, **options)
    with pytest.raises(ValueError, match=message):
        oxmerge.merge_state_dicts("dare_ties", dicts, {"w": base}, **options)
    with pytest.raises(ValueError, match=message):
        kernels.dare_ties(tensors, base, **options)
    # A script computes its weights, as those of a running mean: only limits count.
    oxmerge.merge_tensors("linear", tensors, weight=[1000, 1])


def test_what_does_not_act_is_told(folder: Path) -> None:
    outlook = plan(folder, "task_arithmetic", {"weight": 1, "density": 0.5}, rescale=True)
    assert [problem.message for problem in outlook.warnings] == [
        "parameter `rescale` has no effect on the result",
        "parameter `density` has no effect on the result",
    ]


def test_every_description_has_its_range() -> None:
    for method in _core.methods():
        for parameter in method["parameters"]:
            default, limits = parameter["default"], Range(*parameter["limits"])
            if not isinstance(default, bool | None):
                assert default in limits
                assert default in Range(*parameter["usual"])
            if parameter["kind"] == "float":
                assert str(limits) or str(Range(*parameter["usual"]))
    assert "from 0 to 1" in (kernels.ties.__doc__ or "")


def test_words() -> None:
    ranges = [Range(0, 1), Range(0), Range(None, 2.5), Range()]
    assert [str(each) for each in ranges] == ["from 0 to 1", "at least 0", "at most 2.5", ""]
    assert [-1 in each for each in ranges] == [False, False, True, True]
