"""Planning: from a recipe and its checkpoints' headers to a plan that the engine can run.

Everything that headers can show is checked here, before a byte of tensor data is read. Planning
goes on after each problem as far as it can, so that one report has them all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from oxmerge import _core
from oxmerge.assembly import Assembler
from oxmerge.errors import PlanError
from oxmerge.inputs import InputModel, Inputs
from oxmerge.ledger import Ledger
from oxmerge.methods import Method, find_method, read_methods
from oxmerge.options import check_seed
from oxmerge.output_config import edit_config
from oxmerge.parameters import SettingReader
from oxmerge.problems import Problem, group_problems
from oxmerge.schema import OutputTensor, Plan, is_float
from oxmerge.sections import Section, SectionBuilder
from oxmerge.side_files import SideFiles, find_side_files, folder_of
from oxmerge.targets import SlicedTargets, Target, whole_targets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from oxmerge.accounting import ModelAccount
    from oxmerge.recipe import Recipe

__all__ = ["DEFAULT_SHARD_SIZE", "MergePlan", "build_plan"]

#: Bytes in an output shard at most, as in mergekit.
DEFAULT_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A plan, and what finishing the output needs besides.

    Attributes
    ----------
    plan : Plan
        What the engine runs.
    recipe : Recipe
        What the user asked for.
    models : tuple of InputModel
        The models, opened, in order of first mention.
    donor : int
        Which of them gives names, config and tokenizer.
    base : int, optional
        Which of them is the recipe's base.
    layer_map : tuple of (int, int), optional
        With slices: the model and its layer that each output layer takes its names from.
    donor_depth : int, optional
        With slices: how many layers the donor has.
    dtype : str, optional
        The float type that most of the output's bytes have; None if there is no float tensor.
    accounting : tuple of ModelAccount
        What becomes of every tensor of every model.
    warnings : tuple of Problem
        What has no effect, and what is left out.
    side_files : SideFiles
        The donor's other files, if they were looked for.
    """

    plan: Plan
    recipe: Recipe
    models: tuple[InputModel, ...]
    donor: int
    base: int | None
    layer_map: tuple[tuple[int, int], ...] | None
    donor_depth: int | None
    dtype: str | None
    accounting: tuple[ModelAccount, ...]
    warnings: tuple[Problem, ...]
    side_files: SideFiles

    def to_json(self) -> str:
        """Return the plan as the engine reads it."""
        return self.plan.to_json()


def build_plan(
    recipe: Recipe,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    seed: int = 0,
    strict: bool = False,
    with_side_files: bool = False,
) -> MergePlan:
    """Return the plan of a merge. Reads headers and configs only.

    Parameters
    ----------
    recipe : Recipe
        What to merge.
    shard_size : int
        Bytes in an output shard at most.
    seed : int
        Of random masks, from 0 to 2**64 - 1.
    strict : bool
        Whether warnings count as problems.
    with_side_files : bool
        Whether the donor's other files will be copied, and must be such that they can be.

    Raises
    ------
    PlanError
        With every problem that the headers show.
    TypeError, ValueError
        If `seed` is no whole number, or `seed` or `shard_size` is out of range.
    """
    seed = check_seed(seed)
    if shard_size < 1:
        raise ValueError(f"shard size must be at least one byte, not {shard_size}")
    planner = _Planner(recipe, with_side_files=with_side_files)
    return planner.plan(shard_size, seed, strict=strict)


class _Planner:
    """Goes through the steps of one plan, and gathers their problems and warnings."""

    def __init__(self, recipe: Recipe, *, with_side_files: bool) -> None:
        self.recipe = recipe
        self.with_side_files = with_side_files
        self.side_files = SideFiles()
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = list(recipe.warnings)
        folders = (os.getcwd(), recipe.folder)
        self.inputs = Inputs(tuple(folder for folder in folders if folder is not None))
        self.reader = SettingReader()
        self.sliced: SlicedTargets | None = None
        self.methods = read_methods(_core.methods())

    def plan(self, shard_size: int, seed: int, *, strict: bool) -> MergePlan:
        method, is_known = self.method()
        sections = self.sections(method)
        donor = self.donor(sections)
        targets = [] if donor is None else list(self.targets(sections, donor))
        ledger = Ledger(self.inputs.models)
        tensors = [] if donor is None else self.assemble(targets, donor, ledger)
        plan = self.lay_out(tensors, shard_size, seed)
        if is_known and tensors:
            self.check_with_engine(plan)
        self.check_config(donor)
        self.look_beside(donor)
        self.gather(sections)
        if donor is None and not self.problems:
            message = "there is no model to take the names from"
            self.problems.append(Problem("recipe", message, advice="list a model"))
        if donor is None or self.problems:
            raise self.failure(self.problems + (self.warnings if strict else []))
        accounting = ledger.close(sections, donor, is_sliced=self.sliced is not None)
        self.warnings += ledger.warnings
        if strict and self.warnings:
            raise self.failure(self.warnings)
        return self.result(plan, donor, accounting)

    def method(self) -> tuple[Method, bool]:
        """Return the recipe's method, or one that takes anything after reporting that."""
        found = find_method(self.recipe.method, self.methods)
        if isinstance(found, Problem):
            self.problems.append(found)
            return Method(self.recipe.method), False
        return found, True

    def sections(self, method: Method) -> list[Section]:
        builder = SectionBuilder(self.recipe, method, self.methods, self.inputs, self.reader)
        sections = builder.build()
        self.problems += builder.problems
        self.warnings += builder.warnings
        return sections

    def donor(self, sections: list[Section]) -> InputModel | None:
        """Return the model that names and config come from: the base, else the first listed."""
        if self.recipe.base_model is not None:
            return self.inputs.open(self.recipe.base_model)
        return sections[0].donor.model if sections else None

    def targets(self, sections: list[Section], donor: InputModel) -> Iterable[Target]:
        if not sections:
            return []
        if not self.recipe.slices:
            return whole_targets(sections[0], donor)
        self.sliced = SlicedTargets(sections, donor)
        return self.sliced

    def assemble(
        self, targets: list[Target], donor: InputModel, ledger: Ledger
    ) -> list[OutputTensor]:
        assembler = Assembler(self.recipe, donor, self.inputs.models, ledger)
        if not self.recipe.slices and targets:
            assembler.compare_depths(targets[0].section)
        assembled = (assembler.assemble(target) for target in targets)
        tensors = [tensor for tensor in assembled if tensor is not None]
        self.problems += assembler.problems
        return tensors

    def lay_out(self, tensors: list[OutputTensor], shard_size: int, seed: int) -> Plan:
        wanted = [(tensor.name, tensor.dtype, list(tensor.shape)) for tensor in tensors]
        shards, places = _core.lay_out(wanted, shard_size) if wanted else ((), ())
        placed = [
            tensor.placed(shard, start)
            for tensor, (shard, start) in zip(tensors, places, strict=True)
        ]
        placed.sort(key=lambda tensor: (tensor.shard, tensor.start))
        files: list[dict[str, Any]] = []
        for model in self.inputs.models:
            files += model.checkpoint.files
        for model in self.inputs.models:
            files += [file for file in (model.config_file, model.checkpoint.index) if file]
        return Plan(self.recipe.method, seed, tuple(files), tuple(placed), tuple(shards))

    def check_with_engine(self, plan: Plan) -> None:
        for found in _core.check_plan(plan.to_json()):
            self.problems.append(
                Problem(
                    "method",
                    found["message"],
                    tensor=found.get("tensor"),
                    expected=found.get("expected"),
                    found=found.get("found"),
                    advice=found.get("advice"),
                )
            )

    def check_config(self, donor: InputModel | None) -> None:
        """Find the layer lists and position rules of the config that the new depth breaks."""
        if self.sliced is None or donor is None or donor.stack is None or not donor.config:
            return
        models = self.inputs.models
        layers = [(models[model].config, layer) for model, layer in self.sliced.layer_map]
        try:
            edit_config(donor.config, layer_map=layers, donor_depth=donor.stack.depth)
        except PlanError as error:
            self.problems += error.problems

    def look_beside(self, donor: InputModel | None) -> None:
        """Find the donor's other files, and those among them that cannot be copied."""
        if self.with_side_files and donor is not None:
            self.side_files = find_side_files(folder_of(donor.path), donor.file_names)
            self.problems += self.side_files.problems

    def gather(self, sections: list[Section]) -> None:
        """Take over what the steps have collected on the way."""
        self.problems = self.inputs.problems + self.problems + self.reader.problems
        self.warnings += self.inputs.warnings
        if self.sliced is not None:
            self.problems += self.sliced.problems
        if not self.problems:  # else a filter may have had no chance
            self.warnings += self.reader.unused_filters()
        self.warnings += self.gradient_warnings(sections)

    def gradient_warnings(self, sections: list[Section]) -> list[Problem]:
        stackless = [
            each.model
            for section in sections
            for each in section.sources
            if not each.model.layout.stacks
        ]
        if self.recipe.slices or not stackless or not self.reader.has_gradients():
            return []
        message = "gradients have no effect beyond their first value: no layers are known"
        advice = "layers are told by a config.json that counts them"
        return [Problem("layers", message, file=stackless[0].path, advice=advice)]

    def failure(self, problems: list[Problem]) -> PlanError:
        return PlanError("cannot merge", problems=group_problems(problems))

    def result(
        self, plan: Plan, donor: InputModel, accounting: tuple[ModelAccount, ...]
    ) -> MergePlan:
        base = self.recipe.base_model
        stack = donor.stack if self.sliced is not None else None
        return MergePlan(
            plan=plan,
            recipe=self.recipe,
            models=tuple(self.inputs.models),
            donor=donor.index,
            base=None if base is None else donor.index,
            layer_map=None if self.sliced is None else self.sliced.layer_map,
            donor_depth=None if stack is None else stack.depth,
            dtype=_main_dtype(plan.tensors),
            accounting=accounting,
            warnings=group_problems(self.warnings),
            side_files=self.side_files,
        )


def _main_dtype(tensors: Iterable[OutputTensor]) -> str | None:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if is_float(tensor.dtype):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)
