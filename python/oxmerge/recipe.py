"""Recipes: what the user asked for. Pure data, which knows no model files.

The YAML dialect is mergekit's. `dialect` reads it and collects every fault; this file holds what
comes out of that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from oxmerge.errors import RecipeError
from oxmerge.problems import Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    Scalar = bool | int | float | str
    Settings = Mapping[str, "Setting"]

__all__ = ["Choice", "Recipe", "Setting", "Slice", "Source"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One alternative of a setting.

    Attributes
    ----------
    values : tuple of bool, int, float or str
        One value, or the points of a gradient over the layers. Empty: no value at all.
    filter : str, optional
        Only tensors whose name contains it are meant; None means every tensor.
    """

    values: tuple[Scalar, ...]
    filter: str | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """What a recipe says of one parameter in one place: the first choice that matches counts.

    Attributes
    ----------
    where : str
        The place in the recipe, for messages.
    choices : tuple of Choice
        In the order they are written.
    """

    where: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """An entry of `models`, or of a slice's `sources`.

    Attributes
    ----------
    model : str
        The model reference, as written.
    where : str
        The place in the recipe, for messages.
    layer_range : tuple of int, optional
        The source's first layer and the one after its last. None in `models`.
    parameters : mapping of str to Setting
        Settings for this model only.
    """

    model: str
    where: str
    layer_range: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of output layers, and where they come from.

    Attributes
    ----------
    where : str
        The place in the recipe, for messages.
    sources : tuple of Source
        In listed order.
    base_model : str, optional
        The base for this slice, instead of the recipe's.
    parameters : mapping of str to Setting
        Settings for this slice.
    """

    where: str
    sources: tuple[Source, ...]
    base_model: str | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge as asked for. Exactly one of `models` and `slices` is not empty.

    Attributes
    ----------
    method : str
        The merge method's name.
    models : tuple of Source
        Whole models, in listed order.
    slices : tuple of Slice
        Output slices, in order.
    base_model : str, optional
        The base, and the donor of names and config.
    parameters : mapping of str to Setting
        Settings for everything.
    dtype, out_dtype : str, optional
        Element types by their safetensors names (``BF16``).
    text : str
        The recipe as it was written; as JSON, which is YAML too, if it came as a mapping.
    folder : str, optional
        The folder of the recipe's file, where relative paths may start.
    warnings : tuple of Problem
        What has no effect where it stands.
    """

    method: str
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    base_model: str | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    text: str = ""
    folder: str | None = None
    warnings: tuple[Problem, ...] = ()

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, object], *, text: str | None = None, folder: str | None = None
    ) -> Recipe:
        """Return the recipe that a mapping, as parsed from YAML or JSON, describes.

        Parameters
        ----------
        mapping : mapping
            The recipe's keys and values.
        text : str, optional
            The text it was parsed from; the mapping as JSON unless given.
        folder : str, optional
            Where relative paths may start, after the working directory.

        Raises
        ------
        RecipeError
            With every fault in the recipe.
        """
        from oxmerge.dialect import read_recipe  # noqa: PLC0415 - it needs this module

        return read_recipe(mapping, text=_as_json(mapping) if text is None else text, folder=folder)

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> Recipe:
        """Return the recipe in a YAML file or text.

        Parameters
        ----------
        source : str or path
            A path; or text, which is told by a line break or a colon and a space in it.

        Raises
        ------
        RecipeError
            With every fault in the recipe.
        FileNotFoundError
            If `source` is a path and there is no such file.
        """
        mapping, text, folder = _parsed(source)
        return cls.from_mapping(mapping, text=text, folder=folder)

    @classmethod
    def from_text(cls, text: str, *, folder: str | None = None) -> Recipe:
        """Return the recipe in YAML text, whose relative paths may start in `folder`."""
        from oxmerge.yaml_text import parse_yaml  # noqa: PLC0415 - it needs PyYAML

        return cls.from_mapping(parse_yaml(text), text=text, folder=folder)

    @staticmethod
    def mapping_of(
        source: str | os.PathLike[str] | Mapping[str, object] | Recipe,
    ) -> tuple[dict[str, object], str | None]:
        """Return what a YAML file or text, or a recipe's, says as plain data, and its folder.

        Parameters and errors are those of `from_yaml`, but only the YAML is checked.
        """
        if isinstance(source, Recipe):
            from oxmerge.yaml_text import parse_yaml  # noqa: PLC0415 - it needs PyYAML

            return dict(parse_yaml(source.text)), source.folder
        if isinstance(source, Mapping):
            return dict(source), None
        mapping, _, folder = _parsed(source)
        return dict(mapping), folder


def _parsed(source: str | os.PathLike[str]) -> tuple[dict[str, object], str, str | None]:
    """Return a recipe's mapping, its text, and the folder of its file."""
    from oxmerge.yaml_text import parse_yaml  # noqa: PLC0415 - it needs PyYAML

    if isinstance(source, str) and ("\n" in source or ": " in source):
        return parse_yaml(source), source, None
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise TypeError(
            f"a recipe is a path, YAML text or a `Recipe`, not a {kind}; of a mapping, "
            "`Recipe.from_mapping` makes one"
        )
    path = os.path.abspath(source)
    text = _read_text(path)
    return parse_yaml(text, path), text, os.path.dirname(path)


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        advice = "name a recipe in YAML, as UTF-8"
        problem = Problem("recipe", "not a text file", file=path, found=str(error), advice=advice)
        raise RecipeError("cannot read the recipe", problems=[problem]) from error


def _as_json(mapping: Mapping[str, object]) -> str:
    import json  # noqa: PLC0415 - a recipe from a file does not need it
    import re  # noqa: PLC0415

    text = json.dumps(mapping, indent=2, default=str, skipkeys=True)
    # JSON escapes an emoji as two halves, which YAML does not put together.
    pair = r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}"
    return re.sub(pair, lambda found: json.loads(f'"{found[0]}"'), text) + "\n"
