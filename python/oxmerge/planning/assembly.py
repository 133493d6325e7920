"""Assembly: finding the sources of each output tensor, and checking that they agree.

Shapes must be equal exactly. Nothing broadcasts, nothing is cut, nothing is skipped.

The engine goes through the tensors of a run, of which there may be thousands. What stands here is
done once for a run (its parameters), and for each tensor that does not agree (what to say of it).
"""

from __future__ import annotations

import json

from oxmerge import _core
from oxmerge.models.names import is_head, is_vocabulary
from oxmerge.models.vocabularies import token_files
from oxmerge.problems import UNSUPPORTED, Problem
from oxmerge.schema import is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from oxmerge.models.inputs import InputModel
    from oxmerge.planning.keeping import Column, Keeping, KeptOfRun
    from oxmerge.planning.parameters import SettingReader
    from oxmerge.planning.targets import Run, Target
    from oxmerge.planning.tokens import Alignment
    from oxmerge.problems import Findings
    from oxmerge.recipe.recipe import Recipe, Scalar

    TensorInfo = _core.TensorInfo

    Found = list[tuple[InputModel, TensorInfo]]

__all__ = ["Assembler"]

_SAME_SIZE = "use models of one architecture and size"


class Assembler:
    """Makes output tensors of runs, and collects what does not agree.

    Parameters
    ----------
    recipe : Recipe
        What the user asked for.
    donor : InputModel
        The model that the output is like.
    models : list of InputModel
        Every model.
    seed : int
        Of random masks.
    keeping : Keeping
        Says which tensors are left to one model, and takes down which those are.
    reader : SettingReader
        Takes what is wrong with parameters.
    findings : Findings
        Takes missing tensors, differences of shape and type.
    alignment : Alignment, optional
        How rows are taken by token, where they are.
    """

    def __init__(
        self,
        recipe: Recipe,
        donor: InputModel,
        models: list[InputModel],
        seed: int,
        keeping: Keeping,
        reader: SettingReader,
        findings: Findings,
        alignment: Alignment | None = None,
    ) -> None:
        self._keeping = keeping
        self._problems = findings.problems
        self._alignment = alignment
        self._reader = reader
        self._donor = donor
        self._unequal: dict[tuple[int, str], int] = {}
        self._quantised = [model.is_quantised for model in models]
        self._settings: dict[str, int] = {}
        others = [
            file
            for model in models
            for file in (model.config_file, model.checkpoint.index, *model.adapter_files)
            if file
        ]
        opened = [(model.reference, model.checkpoint) for model in models]
        dtype = recipe.out_dtype or recipe.dtype
        self._table = _core.Assembly(
            recipe.method, seed, opened, json.dumps(others), dtype, recipe.dtype == "F64"
        )
        if alignment is not None:
            self._table.align(alignment.rows, set(alignment.names))
        if any(part.is_run for part in (*recipe.slices, *recipe.modules)):
            self._table.like_layers_of(donor.index, set(donor.layout.stacks))

    def compare_depths(self, runs: Iterable[Run]) -> None:
        """Report stacks that are not as deep as the donor's, where whole models are merged.

        Their layers are not compared.
        """
        for run in runs:
            if run.place is None or run.section.is_run:
                continue
            prefix, depth = run.place.stack.prefix, run.place.stack.depth
            for source in run.section.sources:
                other = source.model.layout.stacks.get(prefix)
                key = source.model.index, prefix
                if other is not None and other.depth != depth and key not in self._unequal:
                    self._unequal[key] = min(other.depth, depth)
                    self._report_depths(source.model, prefix, depth, other.depth)

    def _report_depths(self, model: InputModel, prefix: str, expected: int, found: int) -> None:
        message = f"layer counts differ: `{prefix}` of `{model.reference}`"
        donor = f"{expected}, as in `{self._donor.reference}`"
        advice = "choose layers with `slices`"
        self._problems.append(
            Problem(
                "layer-count",
                message,
                file=model.path,
                expected=donor,
                found=str(found),
                advice=advice,
            )
        )

    def assemble(self, run: Run) -> None:
        """Add the output tensors of a run, but for those of which something was reported."""
        donor, section = run.donor, run.section
        keeping = self._keeping.of(run)
        models = (source.model for source in section.sources)
        columns = [*zip(models, run.leads, strict=True), *keeping.columns]
        is_like = section.is_run and section.donor.model is not self._donor
        found = self._table.find(
            donor.index,
            list(run.tensors),
            run.donor_lead,
            run.lead,
            [(model.index, lead) for model, lead in columns],
            is_like,
            self._quantised,
            (keeping.inputs, keeping.kept, keeping.otherwise),
        )
        keeping.kept = found.kept()
        left_out = self._without_rows(found, donor, keeping)
        for at, is_twice in found.odd:
            like = donor.checkpoint.tensor(found.tensor(at))
            shapes = self._table.shapes_in_layers(found, at, run.donor_lead) if is_like else []
            before = len(self._problems)
            kept = keeping.kept.get(at)
            used = columns[: keeping.inputs] if kept is None else [columns[kept]]
            complete = self._look(run.target(like.name), like, shapes, used, is_twice=is_twice)
            if not complete or len(self._problems) > before:
                left_out.add(at)
        settings = self._resolve(run, found, keeping, left_out)
        if section.is_sound:
            self._table.add(found, settings, section.base, left_out)
        if keeping.kept:
            self._keeping.take_down(keeping, run, self._table, found)

    def finish(self, shard_size: int) -> tuple[_core.Plan, list[_core.Fates]]:
        """Lay the output out, and return the plan's table and what becomes of every tensor."""
        return self._table.finish(shard_size)

    # Parameters.

    def _resolve(
        self, run: Run, found: _core.Run, keeping: KeptOfRun, left_out: set[int]
    ) -> list[int | None]:
        """Return the number of the settings of each group of a run; None where some are missing."""
        section = run.section
        own = [list(source.resolver.filters) for source in section.sources]
        filters = [[*section.shared.filters, *section.scale.filters], *own]
        settings: list[int | None] = []
        for group, (first, has_parameters) in enumerate(self._table.group(found, filters)):
            if first in keeping.kept:
                where = keeping.place(keeping.kept[first]).in_text
                origin = {"shared": {"keep": {"where": where}}, "own": [{}]}
                settings.append(self._enter(run, {"keep": True}, [{}], origin))
            elif not has_parameters:
                settings.append(self._enter(run, {}, [{} for _ in section.sources], {}))
            else:
                settings.append(self._settings_of(run, found, group, first, left_out))
        return settings

    def _settings_of(
        self, run: Run, found: _core.Run, group: int, first: int, left_out: set[int]
    ) -> int | None:
        """Return the number of the settings of a group whose first tensor is `first`."""
        if first in left_out:
            sound = (at for at in found.members(group) if at not in left_out)
            first = next(sound, -1)
            if first < 0:
                return None
        section = run.section
        own = [(source.resolver, run.position) for source in section.sources]
        resolvers = [(section.scale, run.depth), (section.shared, run.position), *own]

        def resolve(at: int) -> list[dict[str, Scalar] | None]:
            named = zip(resolvers, self._names(found, at, len(own)), strict=True)
            return [resolver.resolve(name, position) for (resolver, position), name in named]

        before = len(self._problems)
        values = resolve(first)
        if len(self._problems) > before:
            # Every tensor of the group is told of.
            for at in found.members(group):
                if at != first and at not in left_out:
                    resolve(at)
        if any(each is None for each in values):
            return None
        scale, shared, *each = (each or {} for each in values)
        named = zip(resolvers, self._names(found, first, len(own)), strict=True)
        scale_origin, shared_origin, *origins = (
            resolver.origins(name, position) for (resolver, position), name in named
        )
        origin = {"shared": shared_origin | scale_origin, "own": origins}
        return self._enter(run, shared | scale, each, origin)

    def _names(self, found: _core.Run, at: int, inputs: int) -> list[str]:
        """Return the names that filters look at: twice that in the output, then those of inputs."""
        name, sources = self._table.names(found, at)
        return [name, name, *(source or "" for source in sources[:inputs])]

    def _enter(
        self,
        run: Run,
        shared: dict[str, Scalar],
        own: list[dict[str, Scalar]],
        origin: dict[str, Any],
    ) -> int:
        """Return the number of settings; equal ones have one."""
        if run.section.is_run:
            origin["slice"] = run.section.where.in_text
        described = json.dumps(origin)
        key = json.dumps([shared, own]) + described
        if key not in self._settings:
            self._settings[key] = self._table.add_settings(shared, own, described)
        return self._settings[key]

    # Finding.

    def _look(
        self,
        target: Target,
        like: TensorInfo,
        shapes: list[list[int]],
        columns: list[Column],
        *,
        is_twice: bool,
    ) -> bool:
        """Report what is wrong with a tensor of these models; False if one lacks it."""
        found: Found = []
        for model, lead in columns:
            name = lead + target.rest
            tensor = model.checkpoint.get(name)
            if tensor is None:
                self._report_missing(target, model, name)
            else:
                found.append((model, tensor))
        if len(found) < len(columns):
            return False
        self._compare(target, like, found)
        first = 1 if self._is_by_token(like) else 0  # of which models have numbers of their own
        if shapes and like.shape[first:] not in [tuple(shape[first:]) for shape in shapes]:
            self._report_unlike_layers(target, like, shapes)
        if is_twice:
            message = "two tensors of the output would have this name"
            advice = "take the first and the last slice from models that name their tensors alike"
            self._problems.append(
                Problem("duplicate-tensor", message, tensor=target.name, advice=advice)
            )
        return True

    def _report_missing(self, target: Target, model: InputModel, name: str) -> None:
        place = target.run.place
        if not name or (place and self._is_beyond(model, place.stack.prefix, place.layer)):
            return  # reported with the layers
        donor = self._donor_of(target).reference
        if is_head(name) and not any(map(is_head, model.checkpoint.names())):
            self._report_tied(target, model, name)
            return
        message = f"`{model.reference}` lacks a tensor"
        expected = f"what the donor `{donor}` has"
        advice = "use models of one architecture; or download it again, if it is not complete"
        self._problems.append(
            Problem(
                "missing-tensor",
                message,
                file=model.path,
                tensor=name,
                expected=expected,
                found="nothing",
                advice=advice,
            )
        )

    def _is_beyond(self, model: InputModel, prefix: str, layer: int) -> bool:
        least = self._unequal.get((model.index, prefix))
        return least is not None and layer >= least

    def _report_tied(self, target: Target, model: InputModel, name: str) -> None:
        donor = self._donor_of(target).reference
        message = f"`{model.reference}` has no head of its own, the donor `{donor}` has one"
        advice = (
            "if its head is its embedding, say so: `tie_word_embeddings: true` in its config.json"
        )
        self._problems.append(
            Problem("missing-head", message, file=model.path, tensor=name, advice=advice)
        )

    def _without_rows(self, found: _core.Run, donor: InputModel, keeping: KeptOfRun) -> set[int]:
        """Return tensors kept from a model that lacks the row of a token; report them."""
        lacking: set[int] = set()
        if self._alignment is None or not self._alignment.given:
            return lacking
        for at, column in keeping.kept.items():
            name = donor.checkpoint.tensor(found.tensor(at)).name
            model, place = keeping.columns[column - keeping.inputs][0], keeping.place(column)
            for given in self._alignment.given if name in self._alignment.names else ():
                if model.index not in given.takers or model.index == given.giver:
                    continue
                lacking.add(at)
                message = (
                    f"the row of `{given.asked.token}` is to be that of `{given.asked.model}`, in "
                    f"a tensor that is kept from `{model.reference}` ({place.in_text})"
                )
                advice = "keep the tensor from the model that gives the row, or leave the token out"
                problem = Problem(
                    "wrong-value", message, given.asked.where, tensor=name, advice=advice
                )
                self._problems.append(problem)
        return lacking

    # Comparing.

    def _compare(self, target: Target, like: TensorInfo, found: Found) -> None:
        expected = tuple(like.shape)
        for model, tensor in found:
            if self._alignment is not None and self._is_by_token(like):
                # Rows are taken by token: each model has its own number of them.
                expected = (self._alignment.rows_of[model.index], *like.shape[1:])
                self._check_vocabulary(model, tensor)
            if tuple(tensor.shape) != expected:
                self._report_shape(target, model, tensor, expected)
            elif tensor.dtype != like.dtype:
                self._check_types(target, model, tensor, like)
            if not is_float(tensor.dtype):
                self._check_quantised(model, tensor, len(found))

    def _is_by_token(self, like: TensorInfo) -> bool:
        """Tell whether the rows of a tensor are taken by token."""
        return self._alignment is not None and like.name in self._alignment.names

    def _check_vocabulary(self, model: InputModel, tensor: TensorInfo) -> None:
        if is_float(tensor.dtype) and 0 not in tensor.shape:
            return
        message = f"not supported yet: rows by token of such a tensor of `{model.reference}`"
        self._problems.append(
            Problem(
                UNSUPPORTED,
                message,
                file=model.file_of(tensor),
                tensor=tensor.written,
                expected="rows of floats",
                found=f"{tensor.dtype} {list(tensor.shape)}",
                advice="use the model's 16-bit weights",
            )
        )

    def _report_shape(
        self, target: Target, model: InputModel, tensor: TensorInfo, expected: tuple[int, ...]
    ) -> None:
        donor = self._donor_of(target).reference
        message = f"`{model.reference}` has a tensor of another shape than the donor `{donor}`"
        self._problems.append(
            Problem(
                "tensor-shape",
                message,
                file=model.file_of(tensor),
                tensor=tensor.written,
                expected=str(list(expected)),
                found=str(list(tensor.shape)),
                advice=self._shape_advice(model, tensor, expected),
            )
        )

    def _shape_advice(
        self, model: InputModel, tensor: TensorInfo, expected: tuple[int, ...]
    ) -> str:
        same_rest = tuple(tensor.shape)[1:] == expected[1:] and len(tensor.shape) == len(expected)
        if not same_rest or not is_vocabulary(tensor.name):
            return _SAME_SIZE
        if self._alignment is not None:
            return "the embedding and the head of a model must have a row for the same tokens"
        if not all(token_files(each.tokenizer_folder) for each in (self._donor, model)):
            return (
                "the vocabularies differ; with a `tokenizer.json` beside each model, "
                "`tokenizer_source: union` matches their rows by token"
            )
        return (
            "the vocabularies differ; match their rows by token with one of these lines: "
            "`tokenizer_source: union` (the output has the tokens of all models), "
            "`tokenizer_source: base` (those of the donor), or "
            f"`tokenizer_source: {json.dumps(model.reference, ensure_ascii=False)}`"
        )

    def _donor_of(self, target: Target) -> InputModel:
        """Return the model whose tensor the target is like: with slices, the slice's donor."""
        section = target.run.section
        return section.donor.model if section.is_run else self._donor

    def _check_types(
        self, target: Target, model: InputModel, tensor: TensorInfo, like: TensorInfo
    ) -> None:
        if is_float(tensor.dtype) and is_float(like.dtype):
            return
        donor = self._donor_of(target).reference
        message = (
            f"`{model.reference}` has a tensor of another type than the donor `{donor}`, "
            "and only floats can be converted"
        )
        self._problems.append(
            Problem(
                "tensor-dtype",
                message,
                file=model.file_of(tensor),
                tensor=tensor.written,
                expected=like.dtype,
                found=tensor.dtype,
                advice="use models that were saved in one way",
            )
        )

    def _check_quantised(self, model: InputModel, tensor: TensorInfo, inputs: int) -> None:
        if inputs == 1 or len(tensor.shape) < 2 or not model.is_quantised:  # noqa: PLR2004
            return
        message = f"not supported yet: merging the quantised weights of `{model.reference}`"
        advice = "use the model's 16-bit weights"
        file = model.file_of(tensor)
        self._problems.append(
            Problem(UNSUPPORTED, message, file=file, tensor=tensor.written, advice=advice)
        )

    def _report_unlike_layers(
        self, target: Target, like: TensorInfo, shapes: list[list[int]]
    ) -> None:
        """Report that a slice's own donor does not fit the model that gives the config."""
        model = target.run.section.donor.model
        message = f"`{model.reference}` does not fit the donor `{self._donor.reference}`"
        self._problems.append(
            Problem(
                "tensor-shape",
                message,
                file=model.file_of(like),
                tensor=like.name,
                expected=" or ".join(sorted(map(str, shapes))),
                found=str(list(like.shape)),
                advice=self._shape_advice(model, like, tuple(shapes[0])),
            )
        )
