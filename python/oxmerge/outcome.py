"""What the output directory will hold besides its weights: decided before any tensor is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oxmerge import _core
from oxmerge.card import CARD_NAME, RECIPE_NAME, REPORT_NAME, model_card
from oxmerge.output_config import edit_config, json_text
from oxmerge.publish import Contents
from oxmerge.side_files import WRITTEN_ANEW, SideFiles, find_side_files, is_index

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oxmerge.schema import Plan
    from oxmerge.side_files import LeftOut

__all__ = ["Outcome", "method_description"]

#: Files left out that a note names; the report has all.
_SHOWN = 8
#: Room for the run report, whose exact size is known only afterwards.
_REPORT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything around the weights.

    Attributes
    ----------
    merge_plan : Plan
        The plan it belongs to.
    config : str, optional
        Text of ``config.json``.
    index : str, optional
        Text of the index, if there are several weight files.
    card : str
        The model card.
    recipe : str
        The recipe, as given.
    side_files : SideFiles
        The donor's other files.
    notes : tuple of str
        What was changed in the config, what was left out, for people to read.
    """

    merge_plan: Plan
    config: str | None
    index: str | None
    card: str
    recipe: str
    side_files: SideFiles
    notes: tuple[str, ...]

    @classmethod
    def of(cls, merge_plan: Plan) -> Outcome:
        """Return what belongs to `merge_plan`.

        Raises
        ------
        PlanError
            If the donor's config cannot describe the output.
        """
        donor = merge_plan.models[merge_plan.donor]
        side_files = find_side_files(_folder(donor.path), donor.file_names)
        config, notes = _config(merge_plan)
        notes += _notes(side_files)
        recipe = merge_plan.recipe.text
        card = _card(merge_plan, recipe)
        return cls(merge_plan, config, _index(merge_plan), card, recipe, side_files, notes)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The donor's files that are not in the output in any form, with the reason."""
        return tuple(f"{entry.name}: {entry.reason}" for entry in _left_out(self.side_files))

    @property
    def file_names(self) -> tuple[str, ...]:
        """The files that the output directory will hold."""
        return self.contents({}).names

    @property
    def bytes(self) -> int:
        """Bytes that the output directory takes."""
        weights = sum(size for _, size in self.merge_plan.shards)
        texts = (self.config, self.index, self.card, self.recipe)
        text_bytes = sum(len(text.encode()) for text in texts if text is not None)
        return weights + text_bytes + self.side_files.total_bytes + _REPORT_BYTES

    def contents(self, report: dict[str, Any]) -> Contents:
        """Return what `publish.commit` puts in place; `report` tells of the run."""
        story = {**report, "left_out": list(self.left_out)}
        texts = {
            CARD_NAME: self.card,
            RECIPE_NAME: self.recipe,
            REPORT_NAME: json_text(story),
        }
        return Contents(
            shards=[name for name, _ in self.merge_plan.shards],
            index=self.index,
            config=self.config,
            side_files=self.side_files.copied,
            texts=texts,
        )


def _left_out(side_files: SideFiles) -> list[LeftOut]:
    return [entry for entry in side_files.left_out if entry.reason != WRITTEN_ANEW]


def _notes(side_files: SideFiles) -> tuple[str, ...]:
    notes = []
    left_out = [f"`{entry.name}`" for entry in _left_out(side_files)]
    if left_out:
        more = f" and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
        notes.append(f"not copied from the donor: {', '.join(left_out[:_SHOWN])}{more}")
    if any(file.name == "adapter_config.json" for file in side_files.copied):
        notes.append(
            "`adapter_config.json` is copied, but no adapter's weights: a loader that knows PEFT "
            "looks for them, so remove it where it is not wanted"
        )
    return tuple(notes)


def _config(merge_plan: Plan) -> tuple[str | None, tuple[str, ...]]:
    donor = merge_plan.models[merge_plan.donor]
    if not donor.config and not _has_config(donor.path):
        return None, ()
    layer_map = merge_plan.layer_map
    edited, notes = edit_config(
        donor.config,
        dtype=merge_plan.dtype,
        layer_map=None
        if layer_map is None
        else [(merge_plan.models[model].config, layer) for model, layer in layer_map],
        donor_depth=merge_plan.donor_depth,
        writes_head=merge_plan.table.has_name_ending("lm_head.weight"),
    )
    return json_text(edited), tuple(notes)


def _folder(model: str) -> Path:
    """Return the directory of a model that is named by its index file, else the model itself."""
    path = Path(model)
    return path.parent if path.is_file() and is_index(path.name) else path


def _has_config(path: str) -> bool:
    return (_folder(path) / "config.json").is_file()


def method_description(name: str) -> dict[str, Any]:
    """Return what the engine says of a merge method."""
    return next(each for each in _core.methods() if each["name"] == name)


def _index(merge_plan: Plan) -> str | None:
    return None if len(merge_plan.shards) == 1 else merge_plan.table.index_json()


def _card(merge_plan: Plan, recipe: str) -> str:
    method = merge_plan.method
    about = method_description(method)
    models = [model.reference for model in merge_plan.models]
    return model_card(
        method=method,
        models=models,
        base=None if merge_plan.base is None else models[merge_plan.base],
        recipe_text=recipe,
        method_title=about["title"],
        paper=about["paper"],
    )
