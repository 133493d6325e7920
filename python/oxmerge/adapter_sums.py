"""Adapters without a model: several of them as one.

A sum of products is a product of longer factors: w₁·s₁·B₁·A₁ + w₂·s₂·B₂·A₂ is
[w₁·s₁·B₁ w₂·s₂·B₂] times A₁ above A₂. That is exact but for the rounding of the scaled factors, and
its rank is the sum of the ranks.

What keeps or drops single elements of the products (TIES, DARE) gives no low rank. So it is done to
the factors instead, as PEFT does (`adapter_methods.py`): ranks have to be equal, and the product is
not what the method would make of the products. Where that is wanted, the adapters are put on their
model, and those are merged.
"""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod
from typing import Any

from oxmerge import _core
from oxmerge.adapter_factors import FactorPlan, JoinedTensors
from oxmerge.adapter_methods import ADAPTER_METHODS
from oxmerge.arrays.saving import save
from oxmerge.cli.progress import watched
from oxmerge.errors import MemoryBudgetError, OutputError, PlanError, RecipeError
from oxmerge.merging import Snapshot, resident
from oxmerge.methods import built_in_methods
from oxmerge.models.adapter_config import FILE_NAME
from oxmerge.models.adapters import WEIGHTS
from oxmerge.models.references import resolve_reference, split_adapters
from oxmerge.output.card import (
    CARD_NAME,
    RECIPE_NAME,
    Metadata,
    hub_name,
    model_card,
    pinned_recipe,
)
from oxmerge.output.claims import claimed, named
from oxmerge.planning.parameters import Resolver, SettingReader, check_settings
from oxmerge.problems import UNSUPPORTED, Findings, Problem, group_problems
from oxmerge.schema import DTYPE_SIZES
from oxmerge.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from oxmerge.adapter_factors import Share
    from oxmerge.methods import Method
    from oxmerge.models.references import Located
    from oxmerge.options import PlanOptions, RunOptions
    from oxmerge.recipe.recipe import Recipe

    PathLike = str | os.PathLike[str]

__all__ = ["AdapterRun", "join_adapters", "merge_adapters"]

#: Methods that are sums of products, by what they are called; PEFT calls them `cat`.
_SUMS = ("linear", "task_arithmetic", "cat")
#: Bytes of what is loaded on the way, NumPy above all.
_BESIDE = 24 << 20
#: Options that count in a merge of adapters; all others are refused.
_OPTIONS = (
    "memory", "overwrite", "progress", "allow_nonfinite", "seed", "strict", "ignore_unknown",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """How a merge of adapters went; `merging.py` makes a report of it."""

    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    predicted: int
    warnings: tuple[str, ...]


def join_adapters(
    directory: PathLike, adapters: Iterable[PathLike], *, overwrite: bool = False
) -> list[str]:
    """Write several adapters of one model as one, whose product is the sum of theirs.

    A recipe whose models are adapters does the same, and TIES and DARE; see `oxmerge.merge`.

    Parameters
    ----------
    directory : path
        The folder of the new adapter: new or empty, unless `overwrite`.
    adapters : iterable of path
        LoRAs as PEFT saves them, each also with what it is multiplied by: ``"adapter=0.5"``.
    overwrite : bool
        Whether to replace an adapter that is there.

    Returns
    -------
    list of str
        The files that were written.

    Raises
    ------
    PlanError
        If an adapter is broken, or more than products of two factors: with magnitudes, biases,
        saved modules or trained tokens, or for parameters of experts.
    FileExistsError, OutputError
        If something is there, or another run writes there.

    Warns
    -----
    UserWarning
        If adapters name different base models: shapes alone do not tell.

    Notes
    -----
    Ranks add up. Factors are of the widest type that one of them has. Takes the memory of the
    factors of a module.

    Examples
    --------
    >>> import oxmerge
    >>> files = oxmerge.join_adapters("adapters/both", ["adapters/chat", "adapters/code=0.5"])
    """
    names = [os.fspath(each) for each in adapters]
    findings = Findings()
    plan = FactorPlan("cat", findings)
    # The first part of a reference is a model.
    for name, weight in split_adapters("+".join((os.curdir, *names)), (os.getcwd(),))[1]:
        located = resolve_reference(name, (os.getcwd(),))
        if isinstance(located, Problem):
            findings.problems.append(located)
        else:
            plan.add(located, partial(_whole, weight))
    plan.finish()
    if findings.problems:
        raise PlanError.of("cannot join the adapters", findings.problems, findings.warnings)
    merged = JoinedTensors(plan, plan.dtype)
    files = _write(os.fspath(directory), merged, plan.config(), {}, overwrite=overwrite)
    for problem in group_problems([*findings.warnings, *_odd(merged)]):
        warnings.warn(str(problem), stacklevel=2)
    return files


def _whole(weight: float, _: str) -> Share:
    return weight, 1.0


# A recipe of adapters.


def merge_adapters(
    recipe: Recipe,
    located: Sequence[Located],
    findings: Findings,
    directory: PathLike,
    planning: PlanOptions,
    running: RunOptions,
    *,
    memory: int,
) -> AdapterRun:
    """Merge the adapters of a recipe into an adapter.

    Parameters
    ----------
    recipe : Recipe
        What to merge, whose models are adapters.
    located : sequence of Located
        Where the adapters lie.
    findings : Findings
        What is wrong with the recipe, to which everything else is added.
    directory : path
        The folder of the new adapter.
    planning, running : PlanOptions, RunOptions
        Those that count are in `_OPTIONS`, and others are refused.
    memory : int
        Bytes that the process may have resident.

    Raises
    ------
    RecipeError, PlanError
        With all that is wrong.
    MemoryBudgetError
        If the factors of a module do not fit the memory.
    FileExistsError, OutputError
        If something is there.
    """
    started = time.perf_counter()
    error = RecipeError if findings.problems else PlanError
    findings.warnings[:0] = recipe.warnings
    _check_options((planning, running), findings)
    _check_keys(recipe, findings)
    plan = _planned(recipe, located, findings)
    plan.finish()
    if findings.problems or (planning.strict and findings.warnings):
        problems, odd = findings.problems, findings.warnings
        if planning.strict:
            problems, odd = problems + odd, []
        raise error.of("cannot merge the adapters", problems, odd)
    dtype = recipe.out_dtype or recipe.dtype or plan.dtype
    needed = resident() + _BESIDE
    needed += max(each.bytes(dtype) for each in plan.tensors.values())
    if needed > memory:
        raise MemoryBudgetError(
            "the factors of a module do not fit the memory budget",
            expected=f"at most {format_size(memory, binary=True)} resident",
            found=format_size(needed, binary=True),
            advice=f"give it `--memory {needed // (1 << 20) + 1}MiB`",
        )
    pairs = zip(recipe.models, located, strict=True)
    pinned = {each.model: where.pinned for each, where in pairs if where.pinned}
    texts = {
        CARD_NAME: _card(recipe, plan, pinned),
        RECIPE_NAME: pinned_recipe(recipe.text, pinned),
    }
    with watched(running.progress) as progress:
        merged = JoinedTensors(
            plan,
            dtype,
            planning.seed or 0,
            allow_nonfinite=running.allow_nonfinite,
            watch=None if progress is None else _watch(plan, dtype, progress),
        )
        _write(os.fspath(directory), merged, plan.config(), texts, overwrite=running.overwrite)
    findings.warnings += _odd(merged)
    return AdapterRun(
        tensors=len(plan.tensors),
        bytes_read=sum(each.stored for each in plan.tensors.values()),
        bytes_written=sum(prod(each.shape) for each in plan.tensors.values()) * DTYPE_SIZES[dtype],
        seconds=time.perf_counter() - started,
        predicted=needed,
        warnings=tuple(map(str, group_problems(findings.warnings))),
    )


def _card(recipe: Recipe, plan: FactorPlan, pinned: Mapping[str, str]) -> str:
    """Return the card: as PEFT's are, it names the model that the adapters are for."""
    method = built_in_methods().get(recipe.method)
    return model_card(
        method=recipe.method,
        method_title=None if method is None else method.title,
        models=[each.model for each in recipe.models],
        pinned=pinned,
        hub_names=[hub_name(each, each) for each in plan.bases()],
        metadata=Metadata("peft", tags=("lora",), relation="adapter"),
        base=None,
        recipe_text=recipe.text,
    )


def _odd(merged: JoinedTensors) -> list[Problem]:
    """Return a warning for each factor that has NaN or infinity."""
    message = "elements of the factor are not finite"
    advice = "find where they come from: `oxmerge check ADAPTER/adapter_model.safetensors`"
    return [Problem("non-finite", message, tensor=name, advice=advice) for name in merged.nonfinite]


def _watch(
    plan: FactorPlan, dtype: str, progress: Callable[[Snapshot], None]
) -> Callable[[str], None]:
    """Return what tells `progress` of each tensor that is begun; they come in the plan's order."""
    size = DTYPE_SIZES[dtype]
    read = {name: each.stored for name, each in plan.tensors.items()}
    made = {name: prod(each.shape) * size for name, each in plan.tensors.items()}
    begun: list[str] = []

    def watch(name: str) -> None:
        done = sum(made[each] for each in begun)
        loaded = sum(read[each] for each in begun)
        peak = _core.peak_memory()
        progress(Snapshot(done, sum(made.values()), loaded, len(begun), name, peak))
        begun.append(name)

    return watch


def _check_options(given: Iterable[PlanOptions | RunOptions], findings: Findings) -> None:
    """Report options of a merge that one of adapters does not have."""
    for options in given:
        for option in fields(options):
            name = option.name
            if name not in _OPTIONS and getattr(options, name) != option.default:
                message = f"the option `{name}` has no effect on a merge of adapters"
                problem = Problem("no-effect", message, advice="leave it out")
                findings.problems.append(problem)


def _check_keys(recipe: Recipe, findings: Findings) -> None:
    """Report keys of a recipe that are about models."""
    given = {
        "tokenizer": recipe.tokenizer, "chat_template": recipe.chat_template,
        "oxmerge": None if recipe.extensions == type(recipe.extensions)() else recipe.extensions,
    }  # fmt: skip
    for name in (name for name, value in given.items() if value is not None):
        message = f"`{name}` is for models, and this is a merge of adapters"
        problem = Problem("no-effect", message, recipe.place(name), advice="leave it out")
        findings.problems.append(problem)


def _method(recipe: Recipe, findings: Findings) -> Method:
    """Return the method, or the sum after reporting that there is no such method for adapters."""
    known, name = built_in_methods(), recipe.method
    if name in ADAPTER_METHODS:
        return ADAPTER_METHODS[name].described()
    if name not in _SUMS and name:
        message = f"not supported for adapters: the method `{name}`"
        if name.endswith("svd"):
            message = f"not supported yet: `{name}`, which cuts the rank of a sum"
        listed = ", ".join(f"`{each}`" for each in (*_SUMS, *ADAPTER_METHODS))
        advice = f"use one of {listed}; or put each on the model, `model+adapter`, and merge those"
        where = recipe.place("merge_method")
        findings.problems.append(Problem(UNSUPPORTED, message, where, advice=advice))
    return known["linear"] if name == "linear" else replace(known["task_arithmetic"], name=name)


def _planned(recipe: Recipe, located: Sequence[Located], findings: Findings) -> FactorPlan:
    """Return the adapters of a recipe with the parameters that it gives to each."""
    method, reader = _method(recipe, findings), SettingReader(findings)
    known = [each.name for one in built_in_methods().values() for each in one.parameters]
    check_settings(recipe.parameters, method, known, findings, level="all")
    shared = Resolver(method.shared_parameters(), (recipe.parameters,), reader, "")
    own = []
    for source in recipe.models:
        check_settings(source.parameters, method, known, findings, level="input")
        levels = (source.parameters, recipe.parameters)
        whose = f" for adapter `{source.model}`"
        parameters = method.parameters_of(base=False)
        own.append(Resolver(parameters, levels, reader, whose))

    def weight_in_sum(at: int, name: str) -> float:
        weights = [float((each.resolve(name, 0) or {}).get("weight", 1)) for each in own]
        settings = shared.resolve(name, 0) or {}
        if method.name != "linear":
            return weights[at] * float(settings.get("lambda", 1))
        total = sum(weights) if settings.get("normalize", True) else 1.0
        if total == 0:
            return _report_sum(findings)
        return weights[at] / total

    def share(at: int, name: str) -> Share:
        if method.written is None:
            return weight_in_sum(at, name), 1.0
        values = own[at].resolve(name, 0) or {}
        return float(values.get("weight", 1)), float(values.get("density", 1))

    plan = FactorPlan(recipe.method, findings)
    for at, where in enumerate(located):
        plan.add(where, partial(share, at))
    if reader.has_gradients():
        message = "not supported yet: gradients over the layers of adapters"
        advice = "give one number, or numbers with filters"
        findings.problems.append(Problem(UNSUPPORTED, message, advice=advice))
    findings.warnings += reader.unused_filters()
    return plan


def _report_sum(findings: Findings) -> float:
    message, advice = "the weights sum to zero", "give others, or `normalize: false`"
    problem = Problem("unfit-formula", message, advice=advice)
    if problem not in findings.problems:
        findings.problems.append(problem)
    return 0.0


# Writing.


def _write(
    folder: str,
    merged: JoinedTensors,
    config: Mapping[str, Any],
    texts: Mapping[str, str],
    *,
    overwrite: bool,
) -> list[str]:
    """Write an adapter; return its files. The config comes last: without it nothing loads."""
    contents = {**texts, FILE_NAME: json.dumps(config, indent=2) + "\n"}
    parts = {name: os.path.join(folder, _core.partial_name(name)) for name in contents}
    weights = f".oxmerge-part-{WEIGHTS[0]}"
    parts[WEIGHTS[0]] = os.path.join(folder, weights)
    # Names of parts are those of every run; and a folder that is made for nothing goes again.
    with claimed(named(folder)):
        # No other run is here, so parts that are there are of one that has died.
        left = {os.path.basename(part) for part in parts.values()}
        left.add(_core.partial_name(weights))  # what `save` calls it before all of it is there
        if os.path.exists(parts[FILE_NAME]):  # it died while it gave names, of which this is last
            left |= parts.keys() - {FILE_NAME}
        _check_folder(folder, merged, left, overwrite=overwrite)
        try:
            save(merged, parts[WEIGHTS[0]], overwrite=True)
            for name, text in contents.items():
                with open(parts[name], "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, FILE_NAME))
            for name in (WEIGHTS[0], *contents):
                os.replace(parts[name], os.path.join(folder, name))
        finally:
            for part in parts.values():
                with suppress(FileNotFoundError):
                    os.unlink(part)
    return [os.path.join(folder, name) for name in (WEIGHTS[0], *contents)]


def _check_folder(folder: str, merged: JoinedTensors, left: set[str], *, overwrite: bool) -> None:
    """Raise if an adapter must not be written to a folder."""
    if set(os.listdir(folder)) - left and not overwrite:
        raise FileExistsError(errno.EEXIST, "the output directory is not empty", folder)
    if os.path.exists(os.path.join(folder, "config.json")):
        message, advice = "a model is there, which an adapter must not replace", "name a new folder"
        raise OutputError(message, file=folder, advice=advice)
    if any(os.path.samefile(os.path.dirname(str(f["path"])), folder) for f in merged.files):
        message = "the output would replace an adapter that is read"
        raise OutputError(message, file=folder, advice="name another folder")
