"""The plan: a table that the engine holds, and what defines the output besides."""

from __future__ import annotations

import copy
import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property

from oxmerge.output.contents import disk_bytes, left_out
from oxmerge.planning.explaining import explain
from oxmerge.planning.plan_files import save_plan
from oxmerge.planning.summary import as_dict, summary
from oxmerge.schema import Tensors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oxmerge import _core
    from oxmerge.methods import Method
    from oxmerge.output.side_files import SideFiles
    from oxmerge.planning.accounting import ModelAccount
    from oxmerge.planning.summary import Prediction
    from oxmerge.problems import Problem
    from oxmerge.recipe.recipe import Recipe
    from oxmerge.schema import OutputTensor
    from oxmerge.stages import StandIns

__all__ = ["Plan"]


@dataclass(eq=False, repr=False)
class Plan:
    """A merge that is ready to run; as text, a summary of what it would do.

    `oxmerge.plan` makes one, `oxmerge.load_plan` reads one that was saved; `oxmerge.merge`,
    `oxmerge.sweep` and `oxmerge.lazy` take one instead of a recipe.

    Attributes
    ----------
    about : Method
        What the merge method is.
    table : _core.Plan
        Every output tensor, where its sources lie, and where it goes: what the engine runs.
    recipe_text : str
        The recipe as it was given.
    recipe_folder : str, optional
        Where its relative paths may start, after the working directory.
    shard_size : int
        Bytes in an output file at most.
    models : tuple of str
        The models as the recipe writes them, in order of first mention.
    pinned : tuple of str or None
        What each of them is called on the Hub with its commit, ``org/name@commit``; None of others.
    donor : int
        Which of them gives names, config and tokenizer.
    base : int, optional
        Which of them is the recipe's base.
    layer_map : dict of str to tuple of (int, int)
        With slices: the model and its layer that each output layer takes its names from, by what
        the names of the layers begin with.
    dtype : str, optional
        The float type that most of the output's bytes have; None if there is no float tensor.
    accounting : tuple of ModelAccount
        What becomes of every tensor of every model.
    warnings : tuple of Problem
        What has no effect, and what is left out.
    notes : tuple of str
        What may be taken for something else than it is; which tensors are left to one model, and
        which have other names in the models.
    changes : tuple of str
        What is changed in the config, the notes, and which of the donor's files are not copied; the
        report of a merge tells it.
    config : str, optional
        Text of ``config.json``.
    card : str
        Text of the model card.
    side_files : SideFiles
        The donor's other files.
    tokenizer_memory : int, optional
        Bytes that the process took which built the output's tokenizer, if one was built.
    options : dict
        What the prediction is for: `memory`, `threads`, `device` and `vram`, as `plan` takes them.
    stages : tuple of Plan
        The merges that come first, whose outputs this one reads; their outputs are removed again.
    """

    about: Method
    table: _core.Plan
    recipe_text: str
    recipe_folder: str | None
    shard_size: int
    models: tuple[str, ...]
    pinned: tuple[str | None, ...]
    donor: int
    base: int | None
    layer_map: dict[str, tuple[tuple[int, int], ...]]
    dtype: str | None
    accounting: tuple[ModelAccount, ...]
    warnings: tuple[Problem, ...]
    notes: tuple[str, ...]
    changes: tuple[str, ...]
    config: str | None
    card: str
    side_files: SideFiles
    tokenizer_memory: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    stages: tuple[Plan, ...] = ()
    #: Keeps the files that stand for outputs of `stages`.
    stand_ins: StandIns | None = None

    @property
    def method(self) -> str:
        """The merge method's name."""
        return self.table.method

    @property
    def seed(self) -> int:
        """The seed of random masks."""
        return self.table.seed

    @property
    def input_files(self) -> list[dict[str, Any]]:
        """Every input file as it was when it was first read: weights, then configs and indexes."""
        return self.table.files

    @property
    def all_input_files(self) -> list[dict[str, Any]]:
        """The input files of this merge and those before it, but for what these make; each once."""
        files = {file["path"]: file for plan in (*self.stages, self) for file in plan.input_files}
        made = None if self.stand_ins is None else f"{self.stand_ins.folder}{os.sep}"
        return [file for path, file in files.items() if made is None or not path.startswith(made)]

    @cached_property
    def absent(self) -> list[dict[str, Any]]:
        """The files with weights that are not here, in the order in which a merge reads them."""
        files = (self.input_files[at] for at in self.table.files_of())
        return [file for file in files if "remote" in file]

    @property
    def shards(self) -> list[tuple[str, int]]:
        """The output files, in order: name and bytes."""
        return self.table.shards

    @cached_property
    def tensors(self) -> Tensors:
        """The output tensors, in file order: a sequence whose items are made when asked for."""
        return Tensors(self.table)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of all sources."""
        return self.table.bytes_read

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of all output tensors."""
        return self.table.bytes_written

    @cached_property
    def index(self) -> str | None:
        """The text of the index, if there are several weight files."""
        return None if len(self.shards) == 1 else self.table.index_json()

    @cached_property
    def recipe(self) -> Recipe:
        """What was asked for."""
        from oxmerge.recipe.recipe import Recipe  # noqa: PLC0415 - a merge does not read it again

        return Recipe.from_text(self.recipe_text, folder=self.recipe_folder)

    @cached_property
    def prediction(self) -> Prediction:
        """How it would run with `options`."""
        from oxmerge.merging import predict  # noqa: PLC0415 - it needs this module

        return predict(self, **self.options)

    def with_options(self, options: dict[str, Any]) -> Plan:
        """Return the same plan, with a prediction for other options."""
        plan = copy.copy(self)
        plan.options = options
        plan.stages = tuple(stage.with_options(options) for stage in self.stages)
        vars(plan).pop("prediction", None)
        return plan

    @property
    def disk(self) -> int:
        """Bytes that the output needs on the disk, and the outputs of the merges before it."""
        return disk_bytes(self) + sum(stage.disk for stage in self.stages)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The donor's files that are not in the output in any form, with the reason."""
        return left_out(self.side_files)

    def explain(self, tensor: str | OutputTensor) -> str:
        """Return where a tensor's inputs lie, and where each of its parameters comes from.

        Parameters
        ----------
        tensor : str or OutputTensor
            A tensor of the output, or its name.

        Returns
        -------
        str
            A line for each input and each parameter: the place in the recipe, the slice, the filter
            that chose it, its position in a gradient, or that it is the default.

        Raises
        ------
        PlanError
            If there is no tensor of that name.
        """
        return explain(self, tensor)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, which `oxmerge.load_plan` reads.

        Parameters
        ----------
        path : path
            The file; one that is there is replaced when the new one is complete.
        """
        save_plan(self, path)

    def digest(self) -> str:
        """Return a number, in hexadecimal, for the plan's table."""
        whole = hashlib.sha256()
        self.table.write(whole.update)
        return whole.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as data; ``inputs`` has every tensor of every model."""
        return as_dict(self)

    def __str__(self) -> str:
        """Return it as people read it: a line for each thing, and what becomes of the inputs."""
        return summary(self)

    # A notebook shows this; that of the fields would have every tensor.
    __repr__ = __str__
