"""Parameters: precedence, gradients, filters and kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oxmerge.methods import Parameter
from oxmerge.planning.parameters import Resolver, SettingReader, convert, interpolate
from oxmerge.problems import Findings
from oxmerge.recipe.recipe import Recipe

if TYPE_CHECKING:
    from oxmerge.recipe.recipe import Scalar, Settings

GRADIENTS: list[tuple[tuple[Scalar, ...], float, Scalar]] = [
    ((3.0,), 0.7, 3.0),
    ((0.0, 1.0), 0.0, 0.0),
    ((0.0, 1.0), 0.25, 0.25),
    ((0.0, 1.0), 1.0, 1.0),
    ((0.0, 1.0, 0.0), 0.5, 1.0),
    ((0.0, 1.0, 0.0), 0.75, 0.5),
    ((1.0, 2.0, 3.0, 4.0, 5.0), 0.75, 4.0),
    ((False, True), 0.99, False),
    ((False, True), 1.0, True),
]


@pytest.mark.parametrize(("values", "position", "expected"), GRADIENTS)
def test_gradients(values: tuple[Scalar, ...], position: float, expected: Scalar) -> None:
    assert interpolate(values, position) == expected


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_within_its_points(points: list[float], position: float) -> None:
    value = interpolate(tuple(points), position)
    assert isinstance(value, float)
    assert min(points) - 1e-9 <= value <= max(points) + 1e-9


KINDS: list[tuple[Scalar, str, Scalar | None]] = [
    (True, "float", 1.0),
    (3, "float", 3.0),
    ("1e-5", "float", 1e-5),
    ("abc", "float", None),
    (float("nan"), "float", None),
    ("inf", "float", None),
    (10**400, "float", None),
    (5, "int", 5),
    (5.0, "int", 5),
    ("5", "int", 5),
    (5.5, "int", None),
    (True, "int", 1),
    (1, "bool", True),
    (0.0, "bool", False),
    ("yes", "bool", True),
    ("Off", "bool", False),
    (0.5, "bool", None),
    (2, "bool", None),
    ("maybe", "bool", None),
]


@pytest.mark.parametrize(("value", "kind", "expected"), KINDS)
def test_kinds(value: Scalar, kind: str, expected: Scalar | None) -> None:
    if expected is None:
        with pytest.raises(ValueError):  # noqa: PT011 - the value is the message
            convert(value, kind)
    else:
        converted = convert(value, kind)
        assert converted == expected
        assert type(converted) is type(expected)


WEIGHT = Parameter("weight", "float", None, True, "input")
NORMALIZE = Parameter("normalize", "bool", True, False, "shared")
STEPS = Parameter("steps", "int", 10, False, "shared")
SCALE = Parameter("scale", "float", None, False, "input")


def settings(**values: object) -> Settings:
    mapping = {"merge_method": "m", "models": [{"model": "a"}], "parameters": values}
    return Recipe.from_mapping(mapping).parameters


def resolve(
    parameter: Parameter, *levels: Settings, name: str = "x.mlp.weight", position: float = 0.0
) -> tuple[Scalar | None, list[str]]:
    findings = Findings()
    reader = SettingReader(findings)
    resolver = Resolver((parameter,), levels, reader, " for model `a`")
    values = resolver.resolve(name, position) or {}
    return values.get(parameter.name), [str(problem) for problem in findings.problems]


def test_the_nearest_level_counts() -> None:
    assert resolve(WEIGHT, settings(weight=1), settings(weight=2)) == (1.0, [])
    assert resolve(WEIGHT, settings(), settings(weight=2)) == (2.0, [])


def test_a_level_without_a_match_is_passed_over() -> None:
    near = settings(weight=[{"filter": "attn", "value": 1}])
    assert resolve(WEIGHT, near, settings(weight=2)) == (2.0, [])
    assert resolve(WEIGHT, near, settings(weight=2), name="x.attn.w") == (1.0, [])


def test_an_empty_list_is_passed_over() -> None:
    assert resolve(WEIGHT, settings(weight=[]), settings(weight=2)) == (2.0, [])
    matched = settings(weight=[{"filter": "mlp", "value": []}, {"value": 1}])
    assert resolve(WEIGHT, matched, settings(weight=2)) == (2.0, [])


def test_the_first_match_counts() -> None:
    level = settings(weight=[{"filter": "mlp", "value": 1}, {"filter": "mlp.weight", "value": 2}])
    assert resolve(WEIGHT, level) == (1.0, [])


def test_filters_are_substrings_and_case_counts() -> None:
    level = settings(weight=[{"filter": "MLP", "value": 1}, {"filter": "*", "value": 2}])
    assert resolve(WEIGHT, level) == (2.0, [])
    level = settings(weight=[{"filter": "m*p", "value": 1}, {"value": 2}])
    assert resolve(WEIGHT, level) == (2.0, [])


def test_defaults_and_nothing() -> None:
    assert resolve(NORMALIZE) == (True, [])
    assert resolve(SCALE) == (None, [])


def test_a_missing_parameter_is_reported() -> None:
    value, problems = resolve(WEIGHT, name="lm_head.weight")
    assert value is None
    assert problems == [
        (
            "tensor `lm_head.weight`: `weight` is required for model `a`\n"
            "  hint: write it under `parameters` at the top level"
        )
    ]


def test_a_value_of_the_wrong_kind_is_reported_once() -> None:
    findings = Findings()
    reader = SettingReader(findings)
    level = settings(weight=["x", 1])
    for _ in range(2):
        Resolver((WEIGHT,), (level,), reader, "").resolve("a", 0.5)
    assert [str(problem) for problem in findings.problems] == [
        (
            "parameters.weight: `weight` is a finite number: found 'x'\n"
            "  hint: write a finite number, or a list of such for a gradient"
        )
    ]


def test_a_whole_number_may_have_a_gradient_of_whole_numbers() -> None:
    assert resolve(STEPS, settings(steps=[0, 4]), position=0.5) == (2, [])
    assert resolve(STEPS, settings(steps=[0, 3]), position=0.5)[1] == [
        (
            "tensor `x.mlp.weight`: `steps` is a whole number, but its gradient is not\n"
            "  hint: write one whole number, the same for every layer"
        )
    ]


def test_a_truth_value_goes_by_steps() -> None:
    level = settings(normalize=[0, 1])
    assert resolve(NORMALIZE, level, position=0.9) == (False, [])
    assert resolve(NORMALIZE, level, position=1.0) == (True, [])


def test_filters_without_effect_are_found() -> None:
    reader = SettingReader(Findings())
    level = settings(weight=[{"filter": "mpl", "value": 1}, {"value": 2}])
    Resolver((WEIGHT,), (level,), reader, "").resolve("a.mlp", 0.5)
    assert [str(warning) for warning in reader.unused_filters()] == [
        (
            "parameters.weight: filter `mpl` has no effect\n"
            "  hint: no tensor that gets this far has it in its name"
        )
    ]
