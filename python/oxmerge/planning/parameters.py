"""Parameters: from what a recipe says to one value for each tensor and input.

A setting is looked for on several levels, the nearest first: the source, the slice, the top. On a
level the first choice whose filter matches the tensor's name counts; a level where none does is
passed over. A list of numbers is a gradient over the layers of a slice: piecewise linear in the
layer's position, which runs from 0 to 1. A list of truth values goes by steps.

Only + - * / is used here, so that every machine computes the same values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice

from oxmerge.methods import DIALECT_PARAMETERS, IDLE_PARAMETERS
from oxmerge.problems import Problem, did_you_mean, near
from oxmerge.recipe.keys import without_effect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from oxmerge.methods import Method, Parameter
    from oxmerge.problems import Findings, Place
    from oxmerge.recipe.recipe import Choice, Scalar, Setting, Settings

__all__ = [
    "KINDS",
    "Resolver",
    "SettingReader",
    "check_settings",
    "convert",
    "interpolate",
    "limits_advice",
    "plain_number",
]

_TRUE = frozenset(("1", "on", "t", "true", "y", "yes"))
_FALSE = frozenset(("0", "off", "f", "false", "n", "no"))
#: What a parameter of a kind is, in words.
KINDS = {
    "float": "a finite number",
    "int": "a whole number",
    "bool": "true or false",
}
#: Stands in for a value that cannot be read, so that planning can go on to the next problem.
_NEUTRAL: dict[str, Scalar] = {"float": 1.0, "int": 1, "bool": True}
_NUMBER = re.compile(r"[-\u2212]?(?:\d+(?:\.\d*)?|\.\d+)", re.ASCII)
_DECIMAL_COMMA = re.compile(r"(-?\d+),(\d+)", re.ASCII)
_COMMENT = re.compile(rf"({_NUMBER.pattern})\s*(#|//)", re.ASCII)
_SEVERAL = re.compile(rf"[\s\[(]*{_NUMBER.pattern}(?:[\s,;]+{_NUMBER.pattern})+[\s\])]*", re.ASCII)
#: Codes of what is told of keys when a recipe is read.
_FAULTS = frozenset(("unknown-key", "wrong-value"))
_MOST_FAULTS = 100
#: Percent that make a whole.
_PERCENT = 100


def interpolate(values: tuple[Scalar, ...], position: float) -> Scalar:
    """Return the value of a gradient at a position from 0 to 1.

    Parameters
    ----------
    values : tuple
        One or more points. Numbers are joined by straight lines; truth values hold from their point
        up to the next, so the last one counts at 1 only.
    position : float
        The layer's position in its slice.

    Examples
    --------
    >>> interpolate((0.0, 1.0, 0.5), 0.25), interpolate((False, True), 0.75)
    (0.5, False)
    """
    if len(values) == 1:
        return values[0]
    scaled = position * (len(values) - 1)
    index = int(scaled)
    here = values[index]
    if isinstance(here, bool):
        return here
    there = values[min(len(values) - 1, index + 1)]
    fraction = scaled - index
    return (1 - fraction) * here + fraction * there  # type: ignore[operator]


def convert(value: Scalar, kind: str) -> Scalar:
    """Return `value` as a parameter of that kind takes it.

    Parameters
    ----------
    value : bool, int, float or str
        As the recipe has it. Numbers may be text, truth values may be 0 and 1 or yes and no.
    kind : str
        ``float``, ``int`` or ``bool``.

    Raises
    ------
    ValueError
        If it cannot be one.
    """
    if kind == "float":
        return _to_float(value)
    return _to_int(value) if kind == "int" else _to_bool(value)


def _to_float(value: Scalar) -> float:
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(value) from error
    if number - number != 0:  # infinite, or not a number
        raise ValueError(value)
    return number


def _to_int(value: Scalar) -> int:
    if isinstance(value, int):
        return int(value)
    number = _to_float(value)
    if not number.is_integer():
        raise ValueError(value)
    return int(number)


def _to_bool(value: Scalar) -> bool:
    if value in (0, 1):
        return bool(value)
    text = value.lower() if isinstance(value, str) else ""
    if text not in _TRUE | _FALSE:
        raise ValueError(value)
    return text in _TRUE


def plain_number(value: Scalar) -> str:
    """Return a number as a recipe writes it: ``53``, not ``53.0``."""
    return repr(value).removesuffix(".0")


def _meant(text: str) -> str | None:
    """Return the advice for a text in which people see a number.

    Examples
    --------
    >>> _meant("50 %"), _meant("0.1 0.2")
    ('did you mean `0.5`?', 'did you mean `[0.1, 0.2]`?')
    """
    text = text.strip()
    if comma := _DECIMAL_COMMA.fullmatch(text):
        return f"did you mean `{comma[1]}.{comma[2]}`? decimals have a point, not a comma"
    number = _NUMBER.match(text)
    if number is not None and text[number.end() :].strip() == "%":
        return f"did you mean `{plain_number(float(_signed(number[0])) / _PERCENT)}`?"
    if _SEVERAL.fullmatch(text):
        numbers = ", ".join(map(_signed, _NUMBER.findall(text)))
        return f"did you mean `[{numbers}]`?"
    if comment := _COMMENT.match(text):
        return f"did you mean `{_signed(comment[1])}`? comments begin with ` #`"
    if number is not None and text[number.end() :].strip() in {"", ",", ";"}:
        return f"did you mean `{_signed(number[0])}`?"
    return None


def _signed(number: str) -> str:
    """Return a number with the minus of keyboards."""
    return number.replace("\u2212", "-")


def limits_advice(value: float, parameter: Parameter) -> str:
    """Return what a value beyond the limits of a parameter was probably meant to be.

    Examples
    --------
    >>> from oxmerge.methods import Parameter, Range
    >>> density = Parameter("density", "float", 1.0, False, "other", Range(0, 1))
    >>> limits_advice(53, density), limits_advice(-0.5, density), limits_advice(1.5, density)
    ('did you mean `0.53`, which is 53 %?', 'did you mean `0.5`?', 'write a number from 0 to 1')
    """
    limits, magnitude = parameter.limits, abs(value)
    if magnitude in limits:
        return f"did you mean `{plain_number(magnitude)}`?"
    is_share = (limits.least, limits.most) == (0, 1)
    if is_share and magnitude <= _PERCENT and float(magnitude).is_integer():
        share, percent = plain_number(magnitude / _PERCENT), plain_number(magnitude)
        return f"did you mean `{share}`, which is {percent} %?"
    return f"write a number {limits}"


@dataclass(slots=True)
class ReadChoice:
    """A choice with its values converted.

    Attributes
    ----------
    values : tuple
        Of the parameter's kind.
    filter : str, optional
        As in the recipe.
    where : Place
        As in the recipe.
    used : bool
        Whether it has decided any value so far.
    """

    values: tuple[Scalar, ...]
    filter: str | None
    where: Place
    used: bool = False


class SettingReader:
    """Converts settings once, however many slices they serve.

    Parameters
    ----------
    findings : Findings
        Takes values of the wrong kind or beyond the limits, missing ones, and what is probably a
        slip.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self._read: dict[tuple[int, str], tuple[ReadChoice, ...]] = {}
        self._kept: list[Setting] = []

    def read(self, setting: Setting, parameter: Parameter) -> tuple[ReadChoice, ...]:
        """Return the choices of a setting with values of the parameter's kind."""
        key = (id(setting), parameter.kind)
        if key not in self._read:
            self._kept.append(setting)  # holds on to it, so that its id stays its own
            self._read[key] = tuple(
                self._convert(choice, setting, parameter) for choice in setting.choices
            )
        return self._read[key]

    def _convert(self, choice: Choice, setting: Setting, parameter: Parameter) -> ReadChoice:
        if not choice.is_read:
            return ReadChoice((_NEUTRAL[parameter.kind],), choice.filter, setting.where)
        try:
            values = tuple(convert(value, parameter.kind) for value in choice.values)
        except ValueError as error:
            found = repr(error.args[0]) if error.args else None
            message = f"`{parameter.name}` is {KINDS[parameter.kind]}"
            advice = f"write {KINDS[parameter.kind]}, or a list of such for a gradient"
            if parameter.kind == "float":
                written = next((each for each in choice.values if isinstance(each, str)), "")
                advice = _meant(written) or advice
            self.findings.problems.append(
                Problem(
                    "parameter-value", message, setting.where, found=_plain(found), advice=advice
                )
            )
            values = (_NEUTRAL[parameter.kind],)
        else:
            self._check_ranges(values, setting, parameter)
        return ReadChoice(values, choice.filter, setting.where)

    def _check_ranges(
        self, values: tuple[Scalar, ...], setting: Setting, parameter: Parameter
    ) -> None:
        """Report the first value beyond the limits, else the first that is probably a slip."""
        numbers = [value for value in values if not isinstance(value, bool | str)]
        for value in numbers:
            if value not in parameter.limits:
                message = f"`{parameter.name}` is {parameter.limits}"
                advice = limits_advice(value, parameter)
                found = plain_number(value)
                self.findings.problems.append(
                    Problem("parameter-limits", message, setting.where, found=found, advice=advice)
                )
                return
        for value in numbers:
            if value not in parameter.usual:
                message = f"`{parameter.name}` is usually {parameter.usual}"
                advice = "it is used as it is; check that no decimal point is missing"
                found = plain_number(value)
                self.findings.warnings.append(
                    Problem("parameter-unusual", message, setting.where, found=found, advice=advice)
                )
                return

    def unused_filters(self) -> list[Problem]:
        """Return a warning for each filter that has decided nothing."""
        return [
            Problem(
                "no-effect",
                f"filter `{choice.filter}` has no effect",
                choice.where,
                advice="no tensor that gets this far has it in its name",
            )
            for choices in self._read.values()
            for choice in choices
            if choice.filter is not None and not choice.used
        ]

    def has_gradients(self) -> bool:
        """Tell whether any setting read so far depends on the layer."""
        return any(len(choice.values) > 1 for choices in self._read.values() for choice in choices)


def _plain(text: str | None) -> str | None:
    prefix = "could not convert string to float: "
    return None if text is None else text.strip('"').removeprefix(prefix)


class Resolver:
    """Resolves the parameters of one input of one slice, or those that its inputs share.

    Parameters
    ----------
    parameters : tuple of Parameter
        The parameters to resolve.
    levels : tuple of mapping of str to Setting
        Where to look, the nearest first.
    reader : SettingReader
        Converts the settings, and takes the problems.
    whose : str
        Completes "`weight` is required" in a message.
    where : Place, optional
        Where they would be given first.
    """

    def __init__(
        self,
        parameters: tuple[Parameter, ...],
        levels: tuple[Settings, ...],
        reader: SettingReader,
        whose: str,
        where: Place | None = None,
    ) -> None:
        self._reader = reader
        self._whose = whose
        self._where = where
        self._misspelt = _misspelt(parameters, levels, reader.findings, where)
        self._chains = [(each, _chain(each, levels, reader)) for each in parameters]
        constant = all(_is_constant(chain) for _, chain in self._chains)
        self._constant = self._resolve("", 0.0) if constant and self._is_complete() else None

    @property
    def filters(self) -> tuple[str, ...]:
        """The filters that choose among its values, each once."""
        choices = (choice for _, chain in self._chains for level in chain for choice in level)
        filters = (choice.filter for choice in choices if choice.filter is not None)
        return tuple(dict.fromkeys(filters))

    def origins(self, name: str, position: float) -> dict[str, dict[str, object]]:
        """Return where the value of each parameter comes from, unless it is the default.

        Parameters are those of `resolve`. ``where`` is the place in the recipe, ``filter`` what
        chose it, ``gradient`` the points and ``position`` the place among them.
        """
        found = {}
        for parameter, chain in self._chains:
            choice = _chosen(chain, name)
            if choice is not None:
                found[parameter.name] = _origin(choice, position)
        return found

    def _is_complete(self) -> bool:
        return all(chain or not parameter.required for parameter, chain in self._chains)

    def resolve(self, name: str, position: float) -> dict[str, Scalar] | None:
        """Return the values for a tensor, without those that are nothing.

        Parameters
        ----------
        name : str
            The tensor's name, which filters look at.
        position : float
            The layer's position in its slice, from 0 to 1.

        Returns
        -------
        dict or None
            Values by parameter name; None if a required one is missing, which is then reported.
        """
        return self._constant if self._constant is not None else self._resolve(name, position)

    def _resolve(self, name: str, position: float) -> dict[str, Scalar] | None:
        values: dict[str, Scalar] = {}
        complete = True
        for parameter, chain in self._chains:
            value = _evaluate(chain, name, position)
            if value is None:
                value = parameter.default
                complete = complete and self._may_lack(parameter, name)
            elif parameter.kind == "int" and not isinstance(value, int):
                value = self._whole(parameter, value, name)
            if value is not None:
                values[parameter.name] = value
        return values if complete else None

    def _may_lack(self, parameter: Parameter, name: str) -> bool:
        if parameter.required and parameter.name not in self._misspelt:
            message = f"`{parameter.name}` is required{self._whose}"
            advice = "write it under `parameters` at the top level"
            if self._where is not None:
                advice = "give it there, or for all under `parameters` at the top level"
            problem = Problem("missing-parameter", message, self._where, tensor=name, advice=advice)
            self._reader.findings.problems.append(problem)
        return not parameter.required

    def _whole(self, parameter: Parameter, value: Scalar, name: str) -> Scalar:
        try:
            return convert(value, "int")
        except ValueError:
            message = f"`{parameter.name}` is a whole number, but its gradient is not"
            advice = "write one whole number, the same for every layer"
            problem = Problem("parameter-value", message, tensor=name, advice=advice)
            self._reader.findings.problems.append(problem)
            return _NEUTRAL["int"]


def _misspelt(
    parameters: tuple[Parameter, ...],
    levels: tuple[Settings, ...],
    findings: Findings,
    where: Place | None,
) -> set[str]:
    """Return parameters that a name or a key which is reported was probably meant to be.

    That they are missing would be the same fault told twice.
    """
    names = [parameter.name for parameter in parameters]
    of_levels = {"", where.path if where else ""}
    faulty = (each.where.path for each in findings.problems if each.code in _FAULTS and each.where)
    # Of many faults the first ones will do: each model asks again. Items of a list have no name.
    parted = (path.rpartition(".") for path in islice(faulty, _MOST_FAULTS))
    keys = [key for level, _, key in parted if level in of_levels and not key.endswith("]")]
    if any(near(key, [*names, "parameters"], 1) == ["parameters"] for key in keys):
        return {*names}
    reported = {each.where for each in findings.problems if each.code == "unknown-parameter"}
    settings = (pair for level in levels if reported for pair in level.items())
    unknown = [name for name, setting in settings if setting.where in reported]
    return {match for name in keys + unknown for match in near(name, names)}


def _chain(
    parameter: Parameter, levels: tuple[Settings, ...], reader: SettingReader
) -> list[tuple[ReadChoice, ...]]:
    settings = (level[parameter.name] for level in levels if parameter.name in level)
    return [reader.read(setting, parameter) for setting in settings if setting.choices]


def _is_constant(chain: list[tuple[ReadChoice, ...]]) -> bool:
    return not chain or (chain[0][0].filter is None and len(chain[0][0].values) == 1)


def _evaluate(chain: list[tuple[ReadChoice, ...]], name: str, position: float) -> Scalar | None:
    choice = _chosen(chain, name)
    return None if choice is None else interpolate(choice.values, position)


def _chosen(chain: list[tuple[ReadChoice, ...]], name: str) -> ReadChoice | None:
    for level in chain:
        for choice in level:
            if choice.filter is None or choice.filter in name:
                choice.used = True
                if choice.values:
                    return choice
                break  # an empty list is no value: on to the next level
    return None


def _origin(choice: ReadChoice, position: float) -> dict[str, object]:
    origin: dict[str, object] = {"where": choice.where.in_text}
    if choice.filter is not None:
        origin["filter"] = choice.filter
    if len(choice.values) > 1:
        origin |= {"gradient": list(choice.values), "position": position}
    return origin


def check_settings(
    settings: Settings, method: Method, known: Iterable[str], findings: Findings, *, level: str
) -> None:
    """Check the names of the parameters that stand in one place of a recipe.

    Parameters
    ----------
    settings : mapping of str to Setting
        What stands there.
    method : Method
        The recipe's method.
    known : iterable of str
        The parameters of all methods.
    findings : Findings
        Takes names that no method has, and names that have no effect there.
    level : str
        ``all`` where shared parameters count; ``input`` under a model, ``base`` under the base.
    """
    own = {parameter.name: parameter for parameter in method.parameters}
    everything = set(known) | own.keys() | DIALECT_PARAMETERS
    for name, setting in settings.items():
        if name in everything or name in IDLE_PARAMETERS:
            effect = _without_effect(name, own, method, level)
            if effect is not None and not method.takes_anything:
                message = f"parameter `{name}` has no effect{effect[0]}"
                problem = Problem("no-effect", message, setting.where, advice=effect[1])
                findings.warnings.append(problem)
        elif (idle := without_effect(name)) is not None:
            problem = Problem("no-effect", idle[0], setting.where, advice=idle[1])
            findings.warnings.append(problem)
        else:
            close = did_you_mean(name, own) or did_you_mean(name, everything)
            advice = close or (_parameters_of(own) if own else "no method has one like it")
            message = f"unknown parameter `{name}`"
            problem = Problem("unknown-parameter", message, setting.where, advice=advice)
            findings.unknown(problem, is_corrected=close is not None)


def _without_effect(
    name: str, own: Mapping[str, Parameter], method: Method, level: str
) -> tuple[str, str] | None:
    """Return where a parameter has no effect, and what to do about it; None if it has one."""
    if name not in own:
        advice = IDLE_PARAMETERS.get(name) or _parameters_of(own)
        return f" with method `{method.name}`", advice
    if level != "all" and own[name].per == "shared":
        return " under a model", "it acts under `parameters` of a slice or at the top level"
    if level == "base" and own[name].per == "other":
        return " on the base model", "it acts on the other models"
    return None if own[name].acts else (" on the result", "it may be left out")


def _parameters_of(own: Mapping[str, Parameter]) -> str:
    return "its parameters: " + (", ".join(f"`{each}`" for each in own) or "none")
