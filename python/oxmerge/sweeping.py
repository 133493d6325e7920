"""Sweeps: the same merge with other parameters, several times in one pass over the inputs."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath

from oxmerge.errors import RecipeError, all_of
from oxmerge.merging import check_made, merge_together, prepare
from oxmerge.options import sort_options
from oxmerge.output.claims import named
from oxmerge.planning.effects import effect_of
from oxmerge.planning.plan_files import is_saved_plan, load_plan
from oxmerge.planning.plans import Plan
from oxmerge.problems import Findings, Problem, did_you_mean
from oxmerge.recipe.documents import read_documents
from oxmerge.recipe.recipe import Recipe, as_json, sound
from oxmerge.recipe.yaml_edit import cut_documents, set_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
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
#: A key, or a position or a model's name in brackets.
_STEP = re.compile(r"([^\[\].]+)|\[([^\[\]]+)\]")
_POSITION = re.compile(r"\d{1,9}", re.ASCII)
#: The merge of several that a place is in.
_MERGE = re.compile(r"\[([^\[\]]+)\]\.?")
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
    paths : dict
        The places as the recipe's problems have them, by what they are called here: the name of the
        merge, if it is not the last one, and the place in it.
    """

    settings: dict[str, Scalar]
    directory: str
    recipe: Recipe
    paths: dict[str, tuple[str | None, str]]


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
    from oxmerge.recipe.yaml_text import parse_yaml  # noqa: PLC0415 - it needs PyYAML

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
        advice="write the keys with dots between them: models[chat].parameters.weight",
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
    ignore_unknown: bool = False,
) -> list[Variant]:
    """Return the merges of a sweep: every combination of the values of `axes`.

    Parameters
    ----------
    recipe, pattern, axes, together, ignore_unknown
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
            advice="name a place and its values: models[chat].parameters.weight=0.1:0.9:9",
        )
    named(pattern)
    source = _Source(recipe, ignore_unknown=ignore_unknown)
    pattern = os.fspath(pattern)
    names = _Names(values)
    combined = list(_combinations(values, together=together))
    recipes = all_of(partial(source.recipe_with, settings) for settings in combined)
    made = [
        Variant(
            settings,
            names.fill(pattern, number, settings),
            recipe,
            {place: source.path(place) for place in settings},
        )
        for number, (settings, recipe) in enumerate(zip(combined, recipes, strict=True))
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


class _Source:
    """The recipe that a sweep begins with: what it says, as it is written, and where."""

    def __init__(
        self, recipe: PathLike | Mapping[str, object] | Recipe, *, ignore_unknown: bool
    ) -> None:
        self._ignore_unknown = ignore_unknown
        self._documents, text, self._folder = Recipe.documents_of(recipe)
        # Each with its document's text; a recipe of several merges is cut.
        self._texts = [text] if len(self._documents) == 1 else cut_documents(text)
        self._last = 0
        if len(self._documents) > 1:
            # With a name that is wrong, nobody knows which merge is the last.
            findings = Findings(ignore_unknown=ignore_unknown)
            last = sound(read_documents(self._documents, findings, text=text), findings)
            self._last = [each.get("name") for each in self._documents].index(last.name)

    def _recipe(self, documents: Sequence[Mapping[str, object]], text: str) -> Recipe:
        return Recipe.from_documents(
            documents, text=text, folder=self._folder, ignore_unknown=self._ignore_unknown
        )

    def find(self, place: str) -> tuple[int, list[str | int]]:
        """Return which document a place is in, and its keys and positions there.

        In a recipe of several merges ``[first].parameters.t`` is in the one called `first`; a place
        that does not say so is in the last.
        """
        at, within = self._last, place
        found = _MERGE.match(place)
        if found is not None and len(self._documents) > 1:
            names = [str(each.get("name", "")) for each in self._documents]
            if found[1] not in names:
                known = ", ".join(f"`[{name}]`" for name in names if name)
                raise RecipeError(f"there is no merge `{place}` in the recipe", advice=known)
            at, within = names.index(found[1]), place[found.end() :]
        return at, _steps(within, self._documents[at])

    def path(self, place: str) -> tuple[str | None, str]:
        """Return the name of the merge that a place is in, and the place as problems have it."""
        at, steps = self.find(place)
        name = self._documents[at].get("name")
        return name if isinstance(name, str) and at != self._last else None, _path(steps)

    def recipe_with(self, settings: Mapping[str, Scalar]) -> Recipe:
        """Return the recipe with values at places; its text differs there only."""
        from oxmerge.recipe.yaml_text import parse_documents  # noqa: PLC0415 - it needs PyYAML

        documents, texts = [*self._documents], [*self._texts]
        for place, value in settings.items():
            at, steps = self.find(place)
            before = documents[at]
            documents[at] = _replaced(before, steps, value, place)
            with contextlib.suppress(LookupError, ValueError):
                texts[at] = set_value(texts[at], steps, before, documents[at])
        text = "".join(texts)
        parsed = parse_documents(text, None, Findings())
        if parsed == documents:
            return self._recipe(parsed, text)
        # What is written in a way that cannot be edited is written anew.
        return self._recipe(documents, "---\n".join(map(as_json, documents)))


def _steps(place: str, mapping: Mapping[str, object]) -> list[str | int]:
    """Return the keys and positions of a place such as ``models[1].parameters.weight``.

    A model's name stands for its position: ``models[chat]``.
    """
    found = _STEP.findall(place)
    written = "".join(f"[{inner}]" if inner else f".{key}" for key, inner in found)
    if not found or written.lstrip(".") != place:
        raise _no_place(place, place)
    steps: list[str | int] = []
    at: Any = mapping
    for key, inner in found:
        step: str | int = key
        if inner:
            is_position = _POSITION.fullmatch(inner)
            step = int(inner) if is_position else _position_of(inner, at, place)
        steps.append(step)
        try:
            at = at[step]
        except (LookupError, TypeError):
            at = None  # reported where it is replaced
    return steps


def _path(steps: Sequence[str | int]) -> str:
    """Return steps as a place in the recipe."""
    written = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return "".join(written).lstrip(".")


def _position_of(name: str, entries: object, place: str) -> int:
    """Return the position of the entry whose model is called `name`.

    Its name is what the recipe calls it, or the end of that: ``chat`` is ``models/chat`` too.
    """
    listed = entries if isinstance(entries, list) else []
    paths = [PurePosixPath(_model_of(entry)).parts for entry in listed]
    asked = PurePosixPath(name).parts
    exact = [at for at, path in enumerate(paths) if path == asked]
    matches = exact or [at for at, path in enumerate(paths) if path[-len(asked) :] == asked]
    if len(matches) == 1:
        return matches[0]
    names = [str(PurePosixPath(*path)) for path in paths if path]
    if matches:
        found = ", ".join(f"[{at}] `{names[at]}`" for at in matches)
        raise RecipeError(
            f"`{name}` in `{place}` may be several models",
            found=found,
            advice="write more of the path, or the position in the list",
        )
    ends = [PurePosixPath(each).name for each in names]
    known = ", ".join(f"`{each}`" for each in names)
    raise RecipeError(
        f"there is no `{place}` in the recipe",
        found=f"no model `{name}` there",
        advice=did_you_mean(name, ends) or (f"its models: {known}" if known else None),
    )


def _model_of(entry: object) -> str:
    """Return the model of an entry, as the recipe writes it; nothing if it has none."""
    while isinstance(entry, Mapping):
        entry = entry.get("model") or entry.get("path")
    return entry if isinstance(entry, str) else ""


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
        inner = at.get(step) if isinstance(step, str) else at[step]
        copied[step] = _replaced({} if inner is None else inner, rest, value, place)
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


class _Effects:
    """Finds the places whose values make no difference to any output.

    Parameters
    ----------
    made : sequence of Variant
        The merges.
    replan : callable
        Returns the plan with other settings.
    together : bool
        Whether the places vary in step: then no two merges differ in one place only.
    """

    def __init__(
        self,
        made: Sequence[Variant],
        replan: Callable[[dict[str, Scalar]], Plan],
        *,
        together: bool,
    ) -> None:
        self._made = made
        self._replan = replan
        self._together = together

    def check(self, plans: Sequence[Plan]) -> None:
        """Raise RecipeError with every such place, and why."""
        effects = [effect_of(plan) for plan in plans]
        idle = [place for place in self._made[0].settings if self._is_idle(place, effects)]
        if idle:
            problems = [_no_effect(place, self._made[0], plans[0]) for place in idle]
            raise RecipeError("cannot sweep", problems=problems)

    def _is_idle(self, place: str, effects: Sequence[str]) -> bool:
        values = list(dict.fromkeys(variant.settings[place] for variant in self._made))
        if len(values) == 1:
            return False
        merges = zip(self._made, effects, strict=True)
        if self._together:
            return all(self._alone(place, values, variant) == now for variant, now in merges)
        seen: dict[tuple[Scalar, ...], set[str]] = {}
        for variant, effect in merges:
            others = tuple(v for other, v in variant.settings.items() if other != place)
            seen.setdefault(others, set()).add(effect)
        return all(len(found) == 1 for found in seen.values())

    def _alone(self, place: str, values: Sequence[Scalar], variant: Variant) -> str:
        """Return what another value of a place does, all else being as in a merge."""
        value = next(value for value in values if value != variant.settings[place])
        return effect_of(self._replan({**variant.settings, place: value}))


def _no_effect(place: str, variant: Variant, plan: Plan) -> Problem:
    """Return why a place makes no difference, as far as it is known."""
    (merge, path), name = variant.paths[place], place.rpartition(".")[2]
    merges = {each.name: each for each in variant.recipe.stages}
    entries = (entry.parameters for entry in merges.get(merge, variant.recipe).sources)
    nearer = [parameters[name].where.in_text for parameters in entries if name in parameters]
    plans = {each.recipe.name: each for each in plan.stages}
    warnings = plans.get(merge, plan).warnings
    told = [each for each in warnings if each.where and each.where.path == path]
    found, advice = "every tensor has the same formula with each value", "name another place"
    if told:
        found, advice = told[0].message, told[0].advice or advice
    elif nearer and path.split("[")[0] in {f"parameters.{name}", "slices"}:
        found = f"what stands at a model counts: {nearer[0]}"
        advice = "name that, or take it out"
    message = f"the values of `{place}` make no difference"
    return Problem("no-effect", message, found=found, advice=advice)


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
    stream: bool = False,
    spool: int | str | None = None,
    seed: int | None = None,
    shard_size: int | str | None = None,
    overwrite: bool = False,
    strict: bool = False,
    allow_mismatch: bool = False,
    ignore_unknown: bool = False,
    allow_methods: Iterable[str] = (),
    read_path: str = "auto",
    progress: Callable[[Snapshot], None] | bool | None = None,
    digests: bool = True,
    hash_inputs: bool = False,
    allow_nonfinite: bool = False,
    resume: bool = True,
    fresh: bool = False,
    part: tuple[int, int] | None = None,
    finish: bool = False,
    wait: float = 600,
) -> list[MergeReport]:
    """Merge several times with other parameters, in one pass over the inputs.

    Each output is byte for byte what `merge` would write. The inputs are read once for all of them,
    and statistics that they have in common are computed once. The recipe beside each is the text
    that was given, with other values at the places and nothing else changed.

    Parameters
    ----------
    recipe : path, str, mapping, Recipe or Plan
        What to merge: a file, YAML text, its keys and values, or a recipe; or a plan, of which the
        recipe, the seed and the shard size are used.
    pattern : path or str
        Where the outputs go: directories, or addresses in an object store. ``{0}``, ``{1}``… stand
        for the values in the order of `axes`, ``{weight}`` for that of the one place that ends so,
        ``{n}`` for a running number from 0. Formats are Python's: ``{n:03}``, ``{weight:.2f}``.
    axes : mapping of str to str, number or iterable
        What to vary: a place in the recipe, such as ``models[chat].parameters.weight``, and its
        value or values, one by one or as text: ``"0.1,0.5"``, or ``"0.1:0.9:9"`` for nine of them.
        In brackets is a model's name, the last parts of its path or all of it, or the position in
        the list, from 0. In a file of several merges, a place within one that comes first begins
        with its name: ``[first].models[code].parameters.weight``. What the places do not change is
        merged once.
    together : bool
        Vary all places in step instead of in every combination.
    memory, threads, device, vram, stream, spool, seed, shard_size, overwrite, read_path, progress
    resume, fresh
    strict, allow_mismatch, ignore_unknown, allow_methods
    digests, hash_inputs, allow_nonfinite
    part, finish, wait
        As in `merge`; for all outputs together. Unless given, threads are fewer: each has more
        to write.

    Returns
    -------
    list of MergeReport
        One for each output. Times, rates, memory and bytes read are those of the whole sweep.

    Raises
    ------
    RecipeError
        If a place is not in the recipe, a model's name may be several, the values of a place make
        no difference, or two merges would go to the same directory.
    PlanError
        If the merges do not read the same tensors, or some compute in float64 and some do not.
    OSError, OxmergeError
        As `merge`. Outputs that are complete by then stay.

    Examples
    --------
    >>> import oxmerge
    >>> reports = oxmerge.sweep(
    ...     "recipe.yml", "out/w{weight}", {"models[code].parameters.weight": "0.1:0.9:9"}
    ... )
    >>> len(reports), reports[0].directory
    (9, 'out/w0.1')
    """
    planning, running = sort_options(locals())
    if isinstance(recipe, str | os.PathLike) and is_saved_plan(recipe):
        recipe = load_plan(recipe, allow_methods=planning.allow_methods)
    if isinstance(recipe, Plan):
        check_made(recipe, planning)
        planning = replace(planning, seed=recipe.seed, shard_size=recipe.shard_size)
        recipe = recipe.recipe
    if not isinstance(recipe, str | os.PathLike | Mapping | Recipe):
        recipe = Recipe.from_yaml(recipe, ignore_unknown=ignore_unknown)
    source = _Source(recipe, ignore_unknown=ignore_unknown)
    made = variants(recipe, pattern, axes, together=together, ignore_unknown=ignore_unknown)
    replanning = replace(planning, strict=False, with_side_files=False)

    def replan(settings: dict[str, Scalar]) -> Plan:
        return prepare(source.recipe_with(settings), replanning)

    effects = _Effects(made, replan, together=together)
    merges = [(variant.recipe, variant.directory) for variant in made]
    return merge_together(merges, planning, running, check=effects.check)
