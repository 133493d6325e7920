"""Recipes of several merges: earlier ones make models that later ones read.

A later merge can only be planned from the headers of what the earlier ones write. So each of them
is planned first, and a *stand-in* is written for its output: headers, config, what is built of the
tokenizer and links to what is copied, without a byte of weights. So what is wrong with any is told
before the first runs.

Plans that a sweep makes of one file share what they have in common (`Order`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

from oxmerge.errors import OutputError, PlanError, ProblemsError, RecipeError
from oxmerge.output.card import CARD_NAME
from oxmerge.output.resume import keys_of
from oxmerge.planning.effects import effect_of
from oxmerge.problems import Findings
from oxmerge.recipe.documents import reads
from oxmerge.schema import DTYPE_SIZES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from oxmerge.merging import MergeReport
    from oxmerge.planning.plans import Plan
    from oxmerge.recipe.recipe import Recipe

    #: Plans a recipe whose models may be outputs of earlier merges, which lie at these places.
    Planner = Callable[[Recipe, Mapping[str, str | None], Findings], Plan]

__all__ = ["Order", "Stage", "StandIns", "places_of", "plan_stages", "weights_of"]

_WEIGHTS = "model.safetensors"


def plan_stages(recipe: Recipe, findings: Findings, plan: Planner) -> tuple[Plan, ...]:
    """Return the plans of a recipe's merges, in the order in which they run.

    Parameters
    ----------
    recipe : Recipe
        The last merge, with the earlier ones as `stages`.
    findings : Findings
        What was wrong when they were read.
    plan : callable
        Plans one merge.

    Raises
    ------
    PlanError
        With every problem of all merges; `RecipeError` if some were found when they were read.
    """
    if any(problem.code == "stages" for problem in findings.problems):
        raise RecipeError.of("cannot merge", findings.problems, recipe.warnings)
    problems, warnings = [*findings.problems], [*findings.warnings]
    plans: list[Plan] = []
    places: dict[str, str | None] = {}
    try:
        stand_ins = StandIns()
    except OSError as error:
        raise _unusable(error) from error
    for number, stage in enumerate((*recipe.stages, recipe)):
        mine = Findings(ignore_unknown=findings.ignore_unknown)
        name = stage.name or ""
        try:
            plans.append(plan(stage, places, mine))
        except ProblemsError as error:
            problems += error.problems
            warnings += error.warnings
            places[name] = None  # later merges that read it report nothing of it
        else:
            plans[-1].stand_ins = stand_ins
            if stage is not recipe:
                places[name] = _made_stand_in(plans[-1], Path(stand_ins.folder, str(number)))
    if problems:
        kind = RecipeError if findings.problems else PlanError
        warnings += (warning for each in plans for warning in each.warnings)
        raise kind.of("cannot merge", problems, warnings)
    return tuple(plans)


@dataclass(eq=False, slots=True)
class Stage:
    """A merge whose output others read.

    Attributes
    ----------
    plan : Plan
        Its plan.
    needs : dict of str to Stage
        The merges whose outputs it reads, by name.
    key : str
        What decides its bytes.
    host : int
        In which of the output directories it lies: one that is finished when nothing reads it more.
    place : str
        Where it lies.
    report : MergeReport, optional
        What it did.
    """

    plan: Plan
    needs: dict[str, Stage]
    key: str
    host: int = 0
    place: str = ""
    report: MergeReport | None = None

    @property
    def places(self) -> dict[str, str | None]:
        """Where the outputs that it reads lie."""
        return places_of(self.needs)


def places_of(stages: Mapping[str, Stage]) -> dict[str, str | None]:
    """Return where the outputs of merges lie."""
    return {name: stage.place for name, stage in stages.items()}


class Order:
    """In which order, and which together, the merges of some plans of one file are run.

    Parameters
    ----------
    plans : sequence of Plan
        The plans of the last merges, with the earlier ones as their `stages`.

    Attributes
    ----------
    stages : list of list of Stage
        The earlier merges of each plan. Equal ones are one.
    needs : list of dict of str to Stage
        Those that the last merge of each plan reads, by name.
    passes : list of list of Stage
        Each to be run in one pass, after those before: merges of one name that read the same.
    groups : list of list of int
        Numbers of plans whose last merges are run in one pass, since they read the same.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._known: dict[tuple[object, ...], Stage] = {}
        self.stages: list[list[Stage]] = []
        self.needs: list[dict[str, Stage]] = []
        passes: dict[tuple[object, ...], list[Stage]] = {}
        groups: dict[tuple[int, ...], list[int]] = {}
        for at, plan in enumerate(plans):
            mine: dict[str, Stage] = {}
            for each in plan.stages:
                stage = self._stage(each, mine)
                mine[each.recipe.name or ""] = stage
                together = passes.setdefault((each.recipe.name, *_ids(stage.needs)), [])
                if stage not in together:
                    together.append(stage)
            self.stages.append(list(mine.values()))
            self.needs.append(_needs(plan, mine))
            groups.setdefault(_ids(self.needs[at]), []).append(at)
        self.passes = list(passes.values())
        self.groups = list(groups.values())
        for group in self.groups:  # the last one that reads an output keeps it until it is done
            for stage in self.needs[group[0]].values():
                stage.host = group[0]

    def _stage(self, plan: Plan, mine: Mapping[str, Stage]) -> Stage:
        needs = _needs(plan, mine)
        what = (plan.recipe.name, effect_of(plan), *_ids(needs))
        if what not in self._known:
            key = json.loads(keys_of([plan])[0])
            before = [hashlib.sha256(stage.key.encode()).hexdigest() for stage in needs.values()]
            self._known[what] = Stage(plan, needs, json.dumps({**key, "before": before}))
        return self._known[what]


def _needs(plan: Plan, mine: Mapping[str, Stage]) -> dict[str, Stage]:
    return {name: mine[name] for name in reads(plan.recipe) if name in mine}


def _ids(stages: Mapping[str, Stage]) -> tuple[int, ...]:
    return tuple(map(id, stages.values()))


class StandIns:
    """A folder of stand-ins, which lives as long as a plan that refers to them."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="oxmerge-")
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def weights_of(plan: Plan, number: int) -> str:
    """Return where the weights of a plan's earlier merge are stood in for, by its number."""
    folder = "" if plan.stand_ins is None else plan.stand_ins.folder
    return os.path.join(folder, str(number), _WEIGHTS)


def _made_stand_in(plan: Plan, folder: Path) -> str:
    try:
        return _stand_in(plan, folder)
    except OSError as error:
        raise _unusable(error) from error


def _unusable(error: OSError) -> OutputError:
    """Return the error for a temporary directory in which no stand-in can be made."""
    message = "what earlier merges will make cannot be written down in the temporary directory"
    file = None if error.filename is None else os.fspath(error.filename)
    advice = "set `TMPDIR` to a folder that can be written to, or merge one recipe after the other"
    return OutputError(message, file=file, found=(error.strerror or "").lower(), advice=advice)


def _stand_in(plan: Plan, folder: Path) -> str:
    """Write what a merge's output will look like from outside, and return where."""
    folder.mkdir()
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in plan.tensors:
        start, end = end, end + tensor.elements * DTYPE_SIZES[tensor.dtype]
        shape = list(tensor.shape)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / _WEIGHTS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / CARD_NAME).write_text(plan.card)
    if plan.config is not None:
        (folder / "config.json").write_text(plan.config)
    for side_file in plan.side_files.copied:
        link = folder / side_file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(side_file.source)
    for name, data in plan.side_files.texts.items():
        (folder / name).write_bytes(data)
    return str(folder)
