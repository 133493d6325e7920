"""Planning: from a recipe and its checkpoints' headers to a plan that the engine can run.

Everything that headers can show is checked here, before a byte of tensor data is read. Planning
goes on after each problem as far as it can, so that one report has them all.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import MappingProxyType

from oxmerge.checking.headers import Found, look_at_vocabulary
from oxmerge.errors import PlanError, ProblemsError, RecipeError, RemoteError
from oxmerge.json_files import read_object
from oxmerge.methods import Method, built_in_methods, find_method
from oxmerge.models.inputs import InputModel, Inputs
from oxmerge.models.names import is_vocabulary
from oxmerge.models.references import fetch_beside
from oxmerge.models.vocabularies import folder_beside
from oxmerge.options import DEFAULT_SHARD_SIZE, check_allowed, check_seed
from oxmerge.output.chat_templates import choose_template
from oxmerge.output.config import Restacked, edit_config, json_text
from oxmerge.output.contents import card_of, config_of, notes_on
from oxmerge.output.side_files import SideFiles, find_side_files, folder_of, is_side_file
from oxmerge.output.token_ids import GENERATION_CONFIG, edit_tokens
from oxmerge.output.tokenizers import OutputTokenizer, side_files_with
from oxmerge.planning.assembly import Assembler
from oxmerge.planning.belonging import Belonging
from oxmerge.planning.keeping import Keeping
from oxmerge.planning.ledger import Ledger
from oxmerge.planning.parameters import SettingReader
from oxmerge.planning.plans import Plan
from oxmerge.planning.sections import Section, SectionBuilder
from oxmerge.planning.targets import ModuleTargets, SlicedTargets, whole_targets
from oxmerge.planning.tokens import TokenPlanner
from oxmerge.problems import Findings, Problem, group_problems
from oxmerge.schema import Tensors, is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any

    from oxmerge import _core
    from oxmerge.planning.accounting import ModelAccount
    from oxmerge.planning.targets import Run
    from oxmerge.planning.tokens import Alignment
    from oxmerge.recipe.recipe import Recipe

__all__ = ["build_plan"]


def build_plan(  # noqa: PLR0913 - the options of `plan`
    recipe: Recipe,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    seed: int = 0,
    strict: bool = False,
    with_side_files: bool = False,
    allow_mismatch: bool = False,
    findings: Findings | None = None,
    stages: Mapping[str, str | None] = MappingProxyType({}),
    allow_methods: Iterable[str] = (),
) -> Plan:
    """Return the plan of a merge. Reads headers, configs and tokenizers only.

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
    allow_mismatch : bool
        Whether models may be of another type than the donor.
    findings : Findings, optional
        What was wrong with the recipe when it was read.
    stages : mapping of str to str or None
        Where the outputs of earlier merges lie, by their names; None for one that cannot be made.
    allow_methods : iterable of str
        Modules that a method written in Python may come from.

    Raises
    ------
    PlanError
        With every problem that the headers show; `RecipeError` if some were found before.
    TypeError, ValueError
        If `seed` is no whole number, or `seed` or `shard_size` is out of range.
    """
    seed = check_seed(seed)
    if shard_size < 1:
        raise ValueError(f"shard size must be at least one byte, not {shard_size}")
    planner = _Planner(
        recipe,
        findings or Findings(),
        stages,
        check_allowed(allow_methods),
        with_side_files=with_side_files,
        allow_mismatch=allow_mismatch,
    )
    return planner.plan(shard_size, seed, strict=strict)


class _Planner:
    """Goes through the steps of one plan, which add what they find to one collection."""

    def __init__(
        self,
        recipe: Recipe,
        findings: Findings,
        stages: Mapping[str, str | None],
        allowed: tuple[str, ...],
        *,
        with_side_files: bool,
        allow_mismatch: bool,
    ) -> None:
        self.recipe = recipe
        self.error = RecipeError if findings.problems else PlanError
        self.findings = findings
        findings.warnings[:0] = recipe.warnings
        self.allowed = allowed
        self.with_side_files = with_side_files
        self.allow_mismatch = allow_mismatch
        self.side_files = SideFiles()
        folders = (os.getcwd(), recipe.folder)
        self.folders = tuple(folder for folder in folders if folder is not None)
        asked = recipe.extensions
        self.stages = stages
        self.inputs = Inputs(
            self.folders, stages, findings, recipe.donor, asked.rename, recipe.inputs
        )
        self.reader = SettingReader(findings)
        self.sliced: list[SlicedTargets] = []
        self.modules: ModuleTargets | None = None
        self.alignment: Alignment | None = None
        self.lacks_tokens = False
        self.token_notes: list[str] = []
        self.cause: BaseException | None = None

    def plan(self, shard_size: int, seed: int, *, strict: bool) -> Plan:
        method, is_known = self.method()
        sections = self.sections(method)
        donor = self.donor(sections)
        self.keeping = Keeping(self.recipe.extensions, self.inputs, self.findings)
        self.inputs.check_renames()
        problems, warnings = self.findings.problems, self.findings.warnings
        targets = [] if donor is None else list(self.targets(sections, donor))
        table: _core.Plan | None = None
        fates: list[_core.Fates] = []
        if donor is not None:
            self.align(donor, sections)
            table, fates = self.assemble(targets, donor, seed, shard_size)
            if is_known:
                table = self.with_method(method, table)
        self.check_config(donor)
        self.look_beside(donor)
        self.look_at_inputs()
        self.compare_models(sections, donor, table)
        self.check_effects(sections)
        if donor is None and not problems and not self.inputs.lacks_reported:
            message = "there is no model to take the names from"
            problems.append(Problem("missing-key", message, advice="list a model"))
        if donor is None or table is None or problems:
            raise self.failure(strict=strict) from self.cause
        ledger = Ledger(self.inputs.models, fates, self.keeping.passed_over)
        accounting = ledger.close(sections, donor, self.modules)
        warnings += ledger.warnings
        if strict and warnings:
            raise self.failure(strict=True)
        return self.result(method, table, donor, accounting, shard_size)

    def method(self) -> tuple[Method, bool]:
        """Return the recipe's method, or one that takes anything after reporting that."""
        if not self.recipe.method:
            return Method("", takes_anything=True), False  # which is reported
        where = self.recipe.place("merge_method")
        found = find_method(self.recipe.method, where, self.allowed)
        if isinstance(found, Problem):
            self.findings.problems.append(found)
            return Method(self.recipe.method, takes_anything=True), False
        return found, True

    def sections(self, method: Method) -> list[Section]:
        methods = (*built_in_methods().values(), method)
        builder = SectionBuilder(
            self.recipe, method, methods, self.inputs, self.reader, self.findings
        )
        self.builder = builder
        return builder.build()

    def donor(self, sections: list[Section]) -> InputModel | None:
        """Return the model that names and config come from: the base, else the first listed."""
        if self.recipe.base_model is not None:
            return self.inputs.open(self.recipe.base_model, self.recipe.place("base_model"))
        return sections[0].donor.model if sections else None

    def targets(self, sections: list[Section], donor: InputModel) -> Iterable[Run]:
        if not sections:
            return []
        found = self.builder.modules if self.recipe.modules else None
        if found is not None:
            carried = self.builder.carried(donor)
            self.modules = ModuleTargets(sections, carried, found, donor, self.findings)
            self.sliced = self.modules.sliced
            runs = list(self.modules)
            if not any(run.section.is_carried for run in runs):
                self.builder.check_ignored_base()
            return runs
        if not self.recipe.slices:
            return whole_targets(sections[0], donor)
        if donor.stack is None:
            self.builder.report_no_stack(donor, None)
        self.sliced = [SlicedTargets(sections, donor, self.findings)]
        return self.sliced[0]

    def align(self, donor: InputModel, sections: list[Section]) -> None:
        """Find which rows of the models stand for which tokens, where the recipe asks for that."""
        if self.recipe.tokenizer is not None:
            tokens = TokenPlanner(self.recipe, self.inputs, donor, sections, self.findings)
            self.alignment = tokens.align(self.recipe.tokenizer)
            self.lacks_tokens = tokens.found_problems

    def assemble(
        self, targets: list[Run], donor: InputModel, seed: int, shard_size: int
    ) -> tuple[_core.Plan, list[_core.Fates]]:
        assembler = Assembler(
            self.recipe,
            donor,
            self.inputs.models,
            seed,
            self.keeping,
            self.reader,
            self.findings,
            self.alignment,
        )
        assembler.compare_depths(targets)
        for run in targets:
            assembler.assemble(run)
        # Rows that cannot be compared for a reason that is told with the tokenizer.
        if self.lacks_tokens:
            problems = self.findings.problems
            problems[:] = [each for each in problems if not _is_of_rows(each)]
        return assembler.finish(shard_size)

    def with_method(self, method: Method, table: _core.Plan) -> _core.Plan:
        """Return the table with the formulas of a method in Python; report what it cannot make."""
        if method.written is not None:
            try:
                table = method.written.write_formulas(table)
            except PlanError as error:
                self.findings.problems.append(error.as_problem("unfit-formula"))
                self.cause = error.__cause__
                return table
        self.check_with_engine(table)
        return table

    def check_with_engine(self, table: _core.Plan) -> None:
        for found in table.problems():
            self.findings.problems.append(Problem("unfit-formula", **found))

    def check_config(self, donor: InputModel | None) -> None:
        """Find the layer lists and position rules of the config that the new depth breaks."""
        if donor is None or not donor.config:
            return
        try:
            edit_config(donor.config, stacks=self.stacks_of(donor))
        except PlanError as error:
            self.findings.problems += error.problems

    def look_beside(self, donor: InputModel | None) -> None:
        """Find the files beside the weights, and those among them that cannot be copied."""
        if donor is None:
            return
        problems = self.findings.problems
        tokenizer = None if self.alignment is None else self.alignment.tokenizer
        if tokenizer is None and donor.tokens is not None:
            tokenizer = OutputTokenizer(donor.reference, donor.tokens)
        own = folder_beside(donor.path)
        template = None
        if self.recipe.chat_template is not None:
            folders = [model.tokenizer_folder for model in self.inputs.models]
            whose = own if tokenizer is None else tokenizer.folder
            template, problem = choose_template(self.recipe.chat_template, folders, whose)
            problems += [] if problem is None else [problem]
        if self.with_side_files:
            self.fetch_side_files(donor)
            found = find_side_files(folder_of(donor.path), donor.file_names)
            self.side_files = side_files_with(found, own, tokenizer, template)
            problems += self.side_files.problems
            self.look_at_generation(donor)

    def look_at_inputs(self) -> None:
        """Warn of inputs that are odd by themselves, as far as no file has to be read for that."""
        found = Found()
        for model in self.inputs.models:
            look_at_vocabulary(model, found)
        self.findings.warnings += found.errors

    def fetch_side_files(self, donor: InputModel) -> None:
        """Have the files here that the output copies from the donor."""
        folder = folder_of(donor.path)
        try:
            odd = fetch_beside(donor.located, lambda name: is_side_file(name, folder))
        except RemoteError as error:
            self.findings.problems.append(error.as_problem())
        else:
            self.findings.warnings += odd

    def look_at_generation(self, donor: InputModel) -> None:
        """Have the config of generation name the same tokens."""
        config = read_object(os.path.join(folder_beside(donor.path), GENERATION_CONFIG))
        edited, notes = self.with_tokens(config, donor, GENERATION_CONFIG)
        self.token_notes += (f"{GENERATION_CONFIG}: {note}" for note in notes)
        if edited != config:
            texts = {**self.side_files.texts, GENERATION_CONFIG: json_text(edited).encode()}
            copied = [each for each in self.side_files.copied if each.name != GENERATION_CONFIG]
            self.side_files = replace(self.side_files, copied=tuple(copied), texts=texts)

    def with_tokens(
        self, config: dict[str, Any], donor: InputModel, name: str
    ) -> tuple[dict[str, Any], list[str]]:
        """Return a config of the donor for the tokens of the output, and notes on that."""
        found = self.alignment
        if found is None:
            return config, []
        instead = read_object(os.path.join(found.tokenizer.folder, name))
        rows = None if found.total == found.rows_of[donor.index] else found.total
        return edit_tokens(config, rows, found.ids, instead)

    def compare_models(
        self, sections: list[Section], donor: InputModel | None, table: _core.Plan | None
    ) -> None:
        """Find models that do not belong together, whatever their tensors are called."""
        if donor is None or table is None:
            return
        belonging = Belonging(donor, self.findings, allow_mismatch=self.allow_mismatch)
        belonging.fold_sizes(self.inputs.models)
        belonging.compare_configs(self.inputs.models, sections)
        belonging.compare_layers(sections)
        if self.alignment is None:
            belonging.compare_tokenizers(self.inputs.models, Tensors(table))

    def check_effects(self, sections: list[Section]) -> None:
        """Find filters, patterns and gradients that have decided nothing."""
        if not self.findings.problems:  # else a filter may have had no chance
            self.findings.warnings += self.reader.unused_filters()
            self.findings.warnings += self.keeping.unused()
        self.findings.warnings += self.gradient_warnings(sections)

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
        return [Problem("no-effect", message, file=stackless[0].path, advice=advice)]

    def failure(self, *, strict: bool) -> ProblemsError:
        problems, warnings = self.findings.problems, self.findings.warnings
        if strict:
            problems, warnings = problems + warnings, []
        return self.error.of("cannot merge", problems, warnings)

    def result(
        self,
        method: Method,
        table: _core.Plan,
        donor: InputModel,
        accounting: tuple[ModelAccount, ...],
        shard_size: int,
    ) -> Plan:
        base = self.recipe.base_model
        models = tuple(model.reference for model in self.inputs.models)
        dtype = _main_dtype(table.bytes_by_dtype())
        config, changes = config_of(
            donor,
            dtype=dtype,
            stacks=self.stacks_of(donor),
            writes_head=table.has_name_ending("lm_head.weight"),
            edit=lambda config: self.with_tokens(config, donor, "config.json"),
        )
        extended = self.extension_notes(donor)
        notes = (*self.recipe.notes, *extended)
        plan = Plan(
            table=table,
            about=method,
            recipe_text=self.recipe.text,
            recipe_folder=self.recipe.folder,
            shard_size=shard_size,
            models=models,
            donor=donor.index,
            pinned=tuple(model.pinned for model in self.inputs.models),
            base=None if base is None else donor.index,
            layer_map={
                each.stack.prefix: each.layer_map for each in self.sliced if each.stack is not None
            },
            dtype=dtype,
            accounting=accounting,
            warnings=group_problems(self.findings.warnings),
            notes=notes,
            changes=(
                *changes,
                *self.token_notes,
                *notes,
                *notes_on(self.side_files),
                *self.pins(),
            ),
            config=config,
            card=card_of(self.recipe, method, self.inputs.models, donor, extended, self.stages),
            side_files=self.side_files,
            tokenizer_memory=None if self.alignment is None else self.alignment.memory,
        )
        plan.recipe = self.recipe  # it need not be read again
        return plan

    def pins(self) -> Iterator[str]:
        """Yield which commits the models are."""
        for model in self.inputs.models:
            if model.pinned is not None:
                yield f"`{model.reference}` is `{model.pinned}`"

    def extension_notes(self, donor: InputModel) -> tuple[str, ...]:
        """Return which tensors have other names, are tied, or are left to one model."""
        called = (
            f"the tensors of `{model.reference}` are matched with those of `{donor.reference}` by "
            f"other names: {', '.join(map(str, model.renamed))}"
            for model in self.inputs.models
            if model.renamed
        )
        tied = (
            f"`{model.reference}` ties its head to the embedding, and has the same bytes for both: "
            f"{', '.join(model.tied)} is left out"
            for model in self.inputs.models
            if model.tied
        )
        untied = (
            f"`{model.reference}` ties its head to the embedding, and other models have a head of "
            f"their own: {', '.join(model.untied)} of it is its embedding"
            for model in self.inputs.models
            if model.untied
        )
        return (*called, *tied, *untied, *self.keeping.notes())

    def stacks_of(self, donor: InputModel) -> list[Restacked]:
        """Return what becomes of the donor's layers, where slices say."""
        maps = {each.stack: each.layer_map for each in self.sliced if each.stack is not None}
        return [
            Restacked(
                stack,
                None
                if stack not in maps
                else [(self.inputs.models[model].config, layer) for model, layer in maps[stack]],
            )
            for stack in donor.layout.stacks.values()
            if maps
        ]


def _is_of_rows(problem: Problem) -> bool:
    return problem.code == "tensor-shape" and is_vocabulary(problem.tensor or "")


def _main_dtype(sizes: Mapping[str, int]) -> str | None:
    floats = (dtype for dtype in sizes if is_float(dtype))
    return max(floats, key=lambda dtype: sizes[dtype], default=None)
