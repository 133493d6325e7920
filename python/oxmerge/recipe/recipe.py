"""Recipes: what the user asked for. Pure data, which knows no model files.

The YAML dialect is mergekit's. `dialect` reads it and collects every fault; this file holds what
comes out of that.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from oxmerge.errors import RecipeError
from oxmerge.problems import Findings, Place, Problem
from oxmerge.recipe.extent import MOST_VALUES, TooMuch, check_extent
from oxmerge.schema import DTYPE_NAMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import IO

    from oxmerge.recipe.patterns import Rename

    Scalar = bool | int | float | str
    Settings = Mapping[str, "Setting"]

__all__ = [
    "MOST_ROWS",
    "UNREAD",
    "Choice",
    "Extensions",
    "Keep",
    "Recipe",
    "Renames",
    "Setting",
    "Slice",
    "Source",
    "Template",
    "TokenRow",
    "Tokenizer",
    "sound",
]

#: Stands for a reference to a model that cannot be read, which is reported already.
UNREAD = ""
#: More rows than any vocabulary has.
MOST_ROWS = 1 << 22
#: More bytes than any recipe has; PyYAML takes a hundred times as many to read them.
MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Choice:
    """One alternative of a setting.

    Attributes
    ----------
    values : tuple of bool, int, float or str
        One value, or the points of a gradient over the layers. Empty: no value at all.
    filter : str, optional
        Only tensors whose name contains it are meant; None means every tensor.
    is_read : bool
        False for one that cannot be read, which is reported already.
    """

    values: tuple[Scalar, ...]
    filter: str | None = None
    is_read: bool = True


@dataclass(frozen=True, slots=True)
class Setting:
    """What a recipe says of one parameter in one place: the first choice that matches counts.

    Attributes
    ----------
    where : Place
        The place in the recipe, for messages.
    choices : tuple of Choice
        In the order they are written.
    """

    where: Place
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """An entry of `models`, or of a slice's `sources`.

    Attributes
    ----------
    model : str
        The model reference, as written.
    where : Place
        The place in the recipe, for messages.
    layer_range : tuple of int, optional
        The source's first layer and the one after its last. None in `models`.
    parameters : mapping of str to Setting
        Settings for this model only.
    """

    model: str
    where: Place
    layer_range: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of output layers, and where they come from.

    Attributes
    ----------
    where : Place
        The place in the recipe, for messages.
    sources : tuple of Source
        In listed order.
    base_model : str, optional
        The base for this slice, instead of the recipe's.
    parameters : mapping of str to Setting
        Settings for this slice.
    module : str, optional
        The module that it is for, unless that is all of the model.
    module_parameters : mapping of str to Setting
        Settings for all slices of that module, after those of the slice.
    is_run : bool
        Whether it is a run of layers; else it is of whole models.
    """

    where: Place
    sources: tuple[Source, ...]
    base_model: str | None = None
    parameters: Settings = field(default_factory=dict)
    module: str | None = None
    module_parameters: Settings = field(default_factory=dict)
    is_run: bool = False


@dataclass(frozen=True, slots=True)
class TokenRow:
    """What a recipe says of the row of one token.

    Attributes
    ----------
    where : Place
        The place in the recipe, for messages.
    token : str
        The token.
    kind : str, optional
        What a model gets that lacks it: ``zero``, the row that `model` has for the token
        (``model``), or another row of `model` (``row``). None: what is usual.
    model : str
        The model reference, for ``model`` and ``row``.
    of : int or str
        For ``row``: the number of the row, or the token that it stands for.
    force : bool
        Whether models that have the token get it, too.
    """

    where: Place
    token: str
    kind: str | None = None
    model: str = ""
    of: int | str = 0
    force: bool = False


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What a recipe says of the output's tokenizer.

    Attributes
    ----------
    where : Place
        The place in the recipe, for messages.
    source : str
        ``base``, ``union``, or a model reference.
    tokens : tuple of TokenRow
        Tokens that get rows of their own; those that are new are added.
    multiple : int, optional
        What the number of rows is a multiple of.
    """

    where: Place
    source: str
    tokens: tuple[TokenRow, ...] = ()
    multiple: int | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """What a recipe says of the output's chat template.

    Attributes
    ----------
    where : Place
        The place in the recipe, for messages.
    text : str
        ``auto``, the name of a template, or a template.
    """

    where: Place
    text: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Tensors that are left to one model.

    Attributes
    ----------
    where : Place
        The place in the recipe, for messages.
    pattern : str
        What they are called in the output, as a shell would match it.
    model : str, optional
        The model; the base, or the donor where there is none, unless given.
    """

    where: Place
    pattern: str
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Renames:
    """How a model's tensors are called.

    Attributes
    ----------
    where : Place
        The place in the recipe, for messages.
    model : str
        The model reference, as written.
    rules : tuple of Rename
        From its names to those of the donor; the first that is for a name counts.
    """

    where: Place
    model: str
    rules: tuple[Rename, ...]


@dataclass(frozen=True, slots=True)
class Extensions:
    """What stands under `oxmerge`.

    Attributes
    ----------
    keep : tuple of Keep
        Tensors that are left to one model; the first that is for a name counts.
    on_mismatch : Place, optional
        Where it says to take the base's tensor where a model lacks it or has another shape.
    layer_scale : Setting, optional
        A factor, by depth, of what the method adds to the base.
    rename : tuple of Renames
        How the tensors of models are called.
    """

    keep: tuple[Keep, ...] = ()
    on_mismatch: Place | None = None
    layer_scale: Setting | None = None
    rename: tuple[Renames, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge as asked for. Exactly one of `models`, `slices` and `modules` is not empty.

    Attributes
    ----------
    method : str
        The merge method's name.
    models : tuple of Source
        Whole models, in listed order.
    slices : tuple of Slice
        Output slices, in order.
    modules : tuple of Slice
        Modules with the whole models that each is made of, or the slices of each one after the
        other; other modules are the donor's.
    base_model : str, optional
        The base, and the donor of names and config.
    parameters : mapping of str to Setting
        Settings for everything.
    module_parameters : mapping of str to Setting
        Settings of the module `default`, which is all of the model, where `models` or `slices`
        stand in it; before `parameters`.
    dtype, out_dtype : str, optional
        Element types by their safetensors names (``BF16``). The output has `out_dtype`, else
        `dtype`, else the smallest that holds its inputs. Arithmetic is in float32, and in float64
        where an input or the output is, or `dtype`.
    tokenizer : Tokenizer, optional
        What the output's tokenizer is to be; that of the donor unless given.
    chat_template : Template, optional
        What its chat template is to be; likewise.
    extensions : Extensions
        What other tools do not have.
    places : mapping of str to Place
        Where its keys stand.
    name : str, optional
        What later merges of the same file call its output.
    stages : tuple of Recipe
        The merges of the same file whose outputs it reads, in the order in which they run.
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
    modules: tuple[Slice, ...] = ()
    base_model: str | None = None
    parameters: Settings = field(default_factory=dict)
    module_parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: Template | None = None
    extensions: Extensions = Extensions()
    places: Mapping[str, Place] = field(default_factory=dict)
    name: str | None = None
    stages: tuple[Recipe, ...] = ()
    text: str = ""
    folder: str | None = None
    warnings: tuple[Problem, ...] = ()

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every entry that names a model."""
        parts = (*self.slices, *self.modules)
        return (*self.models, *(source for part in parts for source in part.sources))

    def place(self, key: str) -> Place:
        """Return where a key of the top level stands."""
        return self.places.get(key) or Place(key)

    @property
    def donor(self) -> str | None:
        """The model that names and config come from: the base, else the first that is listed."""
        part = next(iter((*self.slices, *self.modules)), Slice(Place(), self.models))
        listed = [self.base_model, part.base_model, *(source.model for source in part.sources)]
        return next(filter(None, listed), None)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The models that are listed, and the bases, each once."""
        parts = (*self.slices, *self.modules, Slice(Place(), self.models))
        listed = [(part.base_model, *(source.model for source in part.sources)) for part in parts]
        every = dict.fromkeys((self.base_model, *(each for part in listed for each in part)))
        return tuple(each for each in every if each is not None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not wrong, but may be taken for something else than it is."""
        if self.out_dtype is None or self.dtype not in ("F16", "BF16"):
            return ()
        dtype, out_dtype = DTYPE_NAMES[self.dtype], DTYPE_NAMES[self.out_dtype]
        note = f"`dtype: {dtype}` rounds nothing: arithmetic is in float32, or in float64 where "
        return (f"{note}inputs or output are; the output is {out_dtype}, by `out_dtype`",)

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, object],
        *,
        text: str | None = None,
        folder: str | None = None,
        ignore_unknown: bool = False,
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
        ignore_unknown : bool
            Whether a key that is not known is a warning.

        Raises
        ------
        RecipeError
            With every fault in the recipe; `UnsupportedError` if it only asks for what cannot be
            done yet.
        """
        from oxmerge.recipe.dialect import read_recipe  # noqa: PLC0415 - it needs this module

        mapping = _plain_mapping(mapping)
        findings = Findings(ignore_unknown=ignore_unknown)
        text = as_json(mapping) if text is None else text
        return sound(read_recipe(mapping, findings, text=text, folder=folder), findings)

    @classmethod
    def from_yaml(
        cls, source: str | os.PathLike[str] | IO[bytes], *, ignore_unknown: bool = False
    ) -> Recipe:
        """Return the recipe in a YAML file or text.

        Parameters
        ----------
        source : str, path or file
            A path; text, which is told by a line break or a colon and a space in it; or a file that
            is open for reading bytes, such as ``sys.stdin.buffer``.
        ignore_unknown : bool
            Whether a key that is not known is a warning.

        Raises
        ------
        RecipeError
            With every fault in the recipe; `UnsupportedError` if it only asks for what cannot be
            done yet.
        FileNotFoundError
            If `source` is a path and there is no such file.
        """
        findings = Findings(ignore_unknown=ignore_unknown)
        return sound(cls.read(source, findings), findings)

    @classmethod
    def from_text(cls, text: str, *, folder: str | None = None) -> Recipe:
        """Return the recipe in YAML text, whose relative paths may start in `folder`.

        Keys that are not known were passed over when it was first read.
        """
        from oxmerge.recipe.documents import read_documents  # noqa: PLC0415 - it needs this module
        from oxmerge.recipe.yaml_text import parse_documents  # noqa: PLC0415 - it needs PyYAML

        findings = Findings(ignore_unknown=True)
        documents = parse_documents(text, None, findings)
        return sound(read_documents(documents, findings, text=text, folder=folder), findings)

    @classmethod
    def read(
        cls,
        source: str | os.PathLike[str] | IO[bytes] | Mapping[str, object],
        findings: Findings,
    ) -> Recipe:
        """Return a recipe as far as it can be read, and add what is wrong to `findings`.

        `source` is that of `from_yaml` or of `from_mapping`; `RecipeError` is raised for what is
        not even a mapping.
        """
        from oxmerge.recipe.dialect import read_recipe  # noqa: PLC0415 - it needs this module
        from oxmerge.recipe.documents import read_documents  # noqa: PLC0415 - the same
        from oxmerge.recipe.yaml_text import parse_documents  # noqa: PLC0415 - it needs PyYAML

        if isinstance(source, Mapping):
            source = _plain_mapping(source)
            return read_recipe(source, findings, text=as_json(source))
        text, path = _text_of(source)
        documents = parse_documents(text, path, findings)
        folder = None if path is None else os.path.dirname(os.path.abspath(path))
        return read_documents(documents, findings, text=text, folder=folder, file=path)

    @staticmethod
    def documents_of(
        source: str | os.PathLike[str] | IO[bytes] | Mapping[str, object] | Recipe,
    ) -> tuple[list[Mapping[str, object]], str, str | None]:
        """Return what the merges of a YAML file or text, or a recipe's, say, its text and folder.

        Parameters and errors are those of `from_yaml`, but only the YAML is checked.
        """
        if isinstance(source, Mapping):
            source = _plain_mapping(source)
            return [source], as_json(source), None
        from oxmerge.recipe.yaml_text import parse_documents  # noqa: PLC0415 - it needs PyYAML

        if isinstance(source, Recipe):
            text, path, folder = source.text, None, source.folder
        else:
            text, path = _text_of(source)
            folder = None if path is None else os.path.dirname(os.path.abspath(path))
        findings = Findings()
        documents = parse_documents(text, None, findings)
        if findings.problems:
            raise RecipeError.of("cannot use the recipe", findings.problems)
        return [*documents], text, folder

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Mapping[str, object]],
        *,
        text: str,
        folder: str | None = None,
        ignore_unknown: bool = False,
    ) -> Recipe:
        """Return the recipe that some mappings are, of which `text` is the text.

        Raises
        ------
        RecipeError
            With every fault in them.
        """
        from oxmerge.recipe.documents import read_documents  # noqa: PLC0415 - it needs this module

        findings = Findings(ignore_unknown=ignore_unknown)
        return sound(read_documents(documents, findings, text=text, folder=folder), findings)


def sound(recipe: Recipe, findings: Findings) -> Recipe:
    """Return a recipe of which nothing is wrong."""
    if findings.problems:
        raise RecipeError.of("cannot use the recipe", findings.problems, recipe.warnings)
    return recipe


def _plain_mapping(mapping: Mapping[str, object]) -> dict[str, object]:
    """Return a recipe that was made in Python with values as YAML has them.

    Numbers and arrays of NumPy and torch become numbers and lists, and types their names.
    """
    try:
        check_extent(mapping, _parts)
        plain: dict[str, object] = _plain(mapping)  # type: ignore[assignment]
        check_extent(plain, _parts)
    except TooMuch as error:
        problem = Problem("not-a-recipe", str(error), advice=error.advice)
        raise RecipeError("cannot use the recipe", problems=[problem]) from None
    return plain


def _plain(value: object) -> object:
    """Return a value as YAML has it; one that is no part of a recipe as it is."""
    kind = value if isinstance(value, type) else type(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if kind is value or kind.__name__.lower().endswith("dtype"):
        return kind.__name__ if kind.__module__ in ("numpy", "ml_dtypes") else str(value)
    shape = getattr(value, "shape", None)
    is_array = isinstance(shape, tuple) and hasattr(value, "tolist")
    if is_array and math.prod(shape) <= MOST_VALUES:  # type: ignore[arg-type]
        return value.tolist()  # type: ignore[attr-defined]
    return value


def _parts(value: object) -> Iterable[object] | None:
    """Return the values in a value of a recipe."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple | set | frozenset) else None


def _text_of(source: str | os.PathLike[str] | IO[bytes]) -> tuple[str, str | None]:
    """Return a recipe's text, and its file as it was named."""
    if isinstance(source, str) and ("\n" in source or ": " in source):
        return source, None
    if not isinstance(source, str | os.PathLike):
        if hasattr(source, "read"):
            return _read_text(source, None), None
        kind = type(source).__name__
        raise TypeError(
            f"a recipe is a path, YAML text or a `Recipe`, not a {kind}; of a mapping, "
            "`Recipe.from_mapping` makes one"
        )
    path = os.fspath(source)
    with open(path, "rb") as file:
        return _read_text(file, path), path


def _read_text(file: IO[bytes], path: str | None) -> str:
    """Return the text of a file, with the ends of lines that Python has."""
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise too_long(path)
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        advice = "name a recipe in YAML, as UTF-8"
        problem = Problem(
            "not-a-recipe", "not a text file", file=path, found=str(error), advice=advice
        )
        raise RecipeError("cannot read the recipe", problems=[problem]) from error


def too_long(path: str | None = None) -> RecipeError:
    """Return the error for a text that is longer than a recipe."""
    advice = "name a recipe: it takes some lines for each model"
    message = f"longer than {MOST_BYTES} bytes"
    problem = Problem("not-a-recipe", message, file=path, advice=advice)
    return RecipeError("cannot read the recipe", problems=[problem])


def as_json(mapping: Mapping[str, object]) -> str:
    """Return a recipe's keys and values as JSON, which is YAML too."""
    import json  # noqa: PLC0415 - a recipe from a file does not need it
    import re  # noqa: PLC0415

    text = json.dumps(mapping, indent=2, default=_as_data, skipkeys=True)
    # JSON escapes an emoji as two halves, which YAML does not put together.
    pair = r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}"
    return re.sub(pair, lambda found: json.loads(f'"{found[0]}"'), text) + "\n"


def _as_data(value: object) -> object:
    """Return a value that JSON lacks as one that it has."""
    return dict(value) if isinstance(value, Mapping) else str(value)
