"""Sweeps: the same merge with other parameters, several times in one pass over the inputs."""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
import string
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from oxmerge.claims import named
from oxmerge.errors import RecipeError
from oxmerge.merging import merge_together
from oxmerge.planning import DEFAULT_SHARD_SIZE
from oxmerge.plans import Plan
from oxmerge.recipe import Recipe
from oxmerge.saving import is_saved_plan, load_plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from oxmerge.merging import MergeReport, Request, Snapshot

    Scalar = bool | int | float | str
    Axes = Mapping[str, Scalar | Iterable[Any]]
    PathLike = str | os.PathLike[str]

__all__ = ["Variant", "parse_values", "sweep", "variants"]

#: More outputs than that are a slip of the keyboard.
MOST_VARIANTS = 256
#: Digits that a value of a range keeps, of its larger end: 0.3, not 0.30000000000000004.
_DIGITS = 12
#: Digits of a value in the name of a directory: the fewest that tell all values apart.
_DIGITS_OF_NAMES = range(6, 17)
_STEP = re.compile(r"([^\[\].]+)|\[(\d{1,9})\]")
_RANGE = re.compile(r"([^:,]+):([^:,]+):(\d+)")


@dataclass(frozen=True, slots=True)
class Variant:
    """One merge of a sweep.

    Attributes
    ----------
    settings : dict
        What it sets, by the place in the recipe.
    directory : str
        Where it goes.
    recipe : Recipe
        The recipe with everything set.
    """

    settings: dict[str, Scalar]
    directory: str
    recipe: Recipe


def parse_values(text: str) -> list[Scalar]:
    """Return the values that `text` lists.

    Parameters
    ----------
    text : str
        Values with commas between them, ``0.1,0.5,0.9``; or the first, the last and how many,
        evenly spaced, ``0.1:0.9:9``.

    Raises
    ------
    RecipeError
        If it is neither.

    Examples
    --------
    >>> parse_values("0.1:0.4:4"), parse_values("true,false"), parse_values("1")
    ([0.1, 0.2, 0.3, 0.4], [True, False], [1])
    """
    spaced = _RANGE.fullmatch(text)
    if spaced is None:
        return [_scalar(value, text) for value in text.split(",")]
    try:
        first, last, count = float(spaced[1]), float(spaced[2]), int(spaced[3])
    except ValueError:
        raise _no_values(text) from None
    if count == 0 or count > MOST_VARIANTS:
        raise RecipeError(
            f"`{text}` has {count} values", advice=f"ask for 1 to {MOST_VARIANTS} of them"
        )
    return _spaced(first, last, count)


def _spaced(first: float, last: float, count: int) -> list[Scalar]:
    largest = max(abs(first), abs(last))
    if not math.isfinite(largest) or not math.isfinite(last - first):
        raise _not_finite(f"{first}:{last}:{count}")
    decimals = max(_DIGITS - math.floor(math.log10(largest)), 0) if largest else 0
    step = (last - first) / max(count - 1, 1)
    return [round(first + step * at, decimals) for at in range(count)]


def _scalar(value: str, text: str) -> Scalar:
    from oxmerge.yaml_text import parse_yaml  # noqa: PLC0415 - it needs PyYAML

    if not value.strip():
        raise _no_values(text)
    try:
        parsed = parse_yaml(f"value: {value}")["value"]
    except RecipeError:
        raise _no_values(text) from None
    if not isinstance(parsed, bool | int | float | str):
        raise _no_values(text)
    return parsed


def _no_values(text: str) -> RecipeError:
    advice = "write 0.1,0.5,0.9, or 0.1:0.9:9 for nine values from 0.1 to 0.9"
    return RecipeError(f"`{text}` lists no values", advice=advice)


def _not_finite(text: object) -> RecipeError:
    return RecipeError(f"`{text}` is not finite", advice="sweep over finite numbers")


def _no_place(place: str, step: object, at: object = None) -> RecipeError:
    found = f"nothing at `{step}` that it could stand in"
    if isinstance(step, int) and isinstance(at, list):
        found = f"{len(at)} entries and no `[{step}]`, counting from [0]"
    return RecipeError(
        f"there is no `{place}` in the recipe",
        found=found,
        advice="write the keys with dots between them: models[0].parameters.weight",
    )


def _listed(values: Scalar | Iterable[Any]) -> list[Scalar]:
    """Return the values of an axis, which may be one, a sequence, or text that lists them."""
    if isinstance(values, str):
        listed = parse_values(values)
    else:
        listed = list(values) if isinstance(values, Iterable) else [values]
        # Numbers of other packages, as those of `numpy.arange`, as Python's.
        listed = [value.tolist() if hasattr(value, "tolist") else value for value in listed]
    for value in listed:
        if isinstance(value, float) and not math.isfinite(value):
            raise _not_finite(value)
    return listed


def variants(
    recipe: PathLike | Mapping[str, object] | Recipe,
    pattern: PathLike,
    axes: Axes,
    *,
    together: bool = False,
) -> list[Variant]:
    """Return the merges of a sweep: every combination of the values of `axes`.

    Parameters
    ----------
    recipe, pattern, axes, together
        As in `sweep`.

    Raises
    ------
    RecipeError
        If a place is not in the recipe, or two merges would go to the same directory.
    """
    values = {place: _listed(listed) for place, listed in axes.items()}
    if not values or not all(values.values()):
        raise RecipeError(
            "a sweep needs something to vary",
            advice="name a place and its values: models[0].parameters.weight=0.1:0.9:9",
        )
    mapping, folder = Recipe.mapping_of(recipe)
    named(pattern)
    pattern = os.fspath(pattern)
    names = _Names(values)
    made = [
        _variant(mapping, folder, names.fill(pattern, number, settings), settings)
        for number, settings in enumerate(_combinations(values, together=together))
    ]
    _check_directories(made, pattern)
    return made


def _combinations(
    values: Mapping[str, Sequence[Scalar]], *, together: bool
) -> Iterator[dict[str, Scalar]]:
    counts = [len(listed) for listed in values.values()]
    if together and len(set(counts)) > 1:
        raise RecipeError(
            "places that vary together need as many values each", found=f"{counts} values"
        )
    combined = (
        zip(*values.values(), strict=True) if together else itertools.product(*values.values())
    )
    for number, combination in enumerate(combined):
        if number == MOST_VARIANTS:
            raise RecipeError(
                f"the values make more than {MOST_VARIANTS} merges", advice="sweep in parts"
            )
        yield dict(zip(values, combination, strict=True))


def _variant(
    mapping: Mapping[str, object],
    folder: str | None,
    directory: str,
    settings: dict[str, Scalar],
) -> Variant:
    for place, value in settings.items():
        mapping = _replaced(mapping, _steps(place), value, place)
    return Variant(settings, directory, Recipe.from_mapping(mapping, folder=folder))


def _steps(place: str) -> list[str | int]:
    """Return the keys and positions of a place such as ``models[0].parameters.weight``."""
    steps = [name or int(index) for name, index in _STEP.findall(place)]
    written = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    if not steps or written.lstrip(".") != place:
        raise _no_place(place, place)
    return steps


def _replaced(at: Any, steps: Sequence[str | int], value: Scalar, place: str) -> Any:  # noqa: ANN401
    """Return `at` with another value at the end of `steps`.

    What is on the way there is copied, and nothing is changed: other places may share it, by an
    alias of YAML's.
    """
    step, *rest = steps
    fits = isinstance(at, dict) if isinstance(step, str) else isinstance(at, list)
    if not fits or (isinstance(step, int) and step >= len(at)):
        raise _no_place(place, step, at)
    copied = copy.copy(at)
    if rest:
        inner = at.get(step, {}) if isinstance(step, str) else at[step]
        copied[step] = _replaced(inner, rest, value, place)
    else:
        copied[step] = value
    return copied


class _Names(string.Formatter):
    """Fills in patterns of directories.

    Parameters
    ----------
    values : mapping of str to sequence
        All values of each place.
    """

    def __init__(self, values: Mapping[str, Sequence[Scalar]]) -> None:
        self.names = [re.split(r"[.\]]", place)[-1] for place in values]
        self.plain = _format(itertools.chain(*values.values()))

    def fill(self, pattern: str, number: int, settings: Mapping[str, Scalar]) -> str:
        """Return the directory of the merge with these settings."""
        values = list(settings.values())
        uses = Counter(self.names)
        named = {n: v for n, v in zip(self.names, values, strict=True) if n and uses[n] == 1}
        fields = {**named, "n": number}
        try:
            return self.vformat(pattern, values, fields)
        except (LookupError, OverflowError, TypeError, ValueError) as error:
            known = ", ".join(f"{{{name}}}" for name in [*range(len(values)), *fields])
            name = error.args[0] if isinstance(error, KeyError) else None
            found = f"several places that end in `{name}`" if uses[name] > 1 else None
            raise RecipeError(
                f"cannot fill in `{pattern}`", found=found, advice=f"it may hold {known}"
            ) from None

    def get_field(
        self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, str]:
        """Return a value: nothing is looked up in it."""
        name = int(field_name) if field_name.isdecimal() else field_name
        return self.get_value(name, args, kwargs), field_name

    def format_field(self, value: Any, format_spec: str) -> str:  # noqa: ANN401
        """Return a value as text: a float with as few digits as will do, unless asked otherwise."""
        plain = isinstance(value, float) and not format_spec
        return format(value, self.plain if plain else format_spec)


def _format(values: Iterable[Scalar]) -> str:
    """Return a format for floats that tells numbers apart: with few digits, or all there are."""
    numbers = {value for value in values if isinstance(value, int | float)}
    for digits in _DIGITS_OF_NAMES:
        short = f".{digits}g"
        texts = {f"{each:{short if isinstance(each, float) else ''}}" for each in numbers}
        if len(texts) == len(numbers):
            return short
    return ""


def _check_directories(made: Sequence[Variant], pattern: str) -> None:
    if len({variant.directory for variant in made}) < len(made):
        places = ", ".join(f"{{{at}}} ({place})" for at, place in enumerate(made[0].settings))
        raise RecipeError(
            f"`{pattern}` gives several merges the same directory",
            advice=f"put {places} or {{n}} into it",
        )


def sweep(  # noqa: PLR0913 - the options of the command, keyword only
    recipe: Request,
    pattern: PathLike,
    axes: Axes,
    *,
    together: bool = False,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    vram: int | str | None = None,
    seed: int = 0,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    strict: bool = False,
    read_path: str = "auto",
    progress: Callable[[Snapshot], None] | None = None,
) -> list[MergeReport]:
    """Merge several times with other parameters, in one pass over the inputs.

    Each output is byte for byte what `merge` would write. The inputs are read once for all of them,
    and statistics that they have in common are computed once.

    Parameters
    ----------
    recipe : path, str, mapping, Recipe or Plan
        What to merge: a file, YAML text, its keys and values, or a recipe; or a plan, of which the
        recipe, the seed and the shard size are used.
    pattern : path or str
        Where the outputs go. ``{0}``, ``{1}``… stand for the values in the order of `axes`,
        ``{weight}`` for that of the one place that ends so, ``{n}`` for a running number from 0.
        Formats are Python's: ``{n:03}``, ``{weight:.2f}``.
    axes : mapping of str to str, number or iterable
        What to vary: a place in the recipe, such as ``models[0].parameters.weight``, and its
        value or values, one by one or as text: ``"0.1,0.5"``, or ``"0.1:0.9:9"`` for nine of them.
    together : bool
        Vary all places in step instead of in every combination.
    memory, threads, device, vram, seed, shard_size, overwrite, strict, read_path, progress
        As in `merge`; for all outputs together. Unless given, threads are fewer: each has more
        to write.

    Returns
    -------
    list of MergeReport
        One for each output. Times, rates, memory and bytes read are those of the whole sweep.

    Raises
    ------
    RecipeError
        If a place is not in the recipe, or two merges would go to the same directory.
    PlanError
        If the merges do not read the same tensors.
    OSError, OxmergeError
        As `merge`. Outputs that are complete by then are kept, the others leave nothing.

    Examples
    --------
    >>> import oxmerge
    >>> reports = oxmerge.sweep(
    ...     "recipe.yml", "out/w{weight}", {"models[0].parameters.weight": "0.1:0.9:9"}
    ... )
    >>> len(reports), reports[0].directory
    (9, 'out/w0.1')
    """
    if isinstance(recipe, str | os.PathLike) and is_saved_plan(recipe):
        recipe = load_plan(recipe)
    if isinstance(recipe, Plan):
        seed, shard_size = recipe.seed, recipe.shard_size
        recipe = recipe.recipe
    made = variants(recipe, pattern, axes, together=together)
    return merge_together(
        [(variant.recipe, variant.directory) for variant in made],
        memory=memory,
        threads=threads,
        device=device,
        vram=vram,
        seed=seed,
        shard_size=shard_size,
        overwrite=overwrite,
        strict=strict,
        read_path=read_path,
        progress=progress,
    )
