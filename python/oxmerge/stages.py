"""Recipes of several merges: earlier ones make models that later ones read.

A later merge can only be planned from the headers of what the earlier ones write. So each of them
is planned first, and a *stand-in* is written for its output: headers, config, what is built of the
tokenizer and links to what is copied, without a byte of weights. So what is wrong with any is told
before the first runs.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from oxmerge.errors import OutputError, PlanError, ProblemsError, RecipeError
from oxmerge.output.card import CARD_NAME
from oxmerge.problems import Findings, Problem, group_problems
from oxmerge.schema import DTYPE_SIZES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from oxmerge.planning.plans import Plan
    from oxmerge.recipe.recipe import Recipe

    #: Plans a recipe whose models may be outputs of earlier merges, which lie at these places.
    Planner = Callable[[Recipe, Mapping[str, str | None], Findings], Plan]

__all__ = ["StandIns", "plan_stages"]


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
        raise RecipeError.of("cannot merge", group_problems(findings.problems))
    problems: list[Problem] = []
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
            places[name] = None  # later merges that read it report nothing of it
        else:
            plans[-1].stand_ins = stand_ins
            if stage is not recipe:
                places[name] = _made_stand_in(plans[-1], Path(stand_ins.folder, str(number)))
    problems = findings.problems + problems
    if problems:
        kind = RecipeError if findings.problems else PlanError
        raise kind.of("cannot merge", group_problems(problems))
    return tuple(plans)


class StandIns:
    """A folder of stand-ins, which lives as long as a plan that refers to them."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="oxmerge-")
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


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
    with open(folder / "model.safetensors", "wb") as file:
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
