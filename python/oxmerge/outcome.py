"""What the output directory will hold besides its weights: decided before any tensor is read."""

from __future__ import annotations

from dataclasses import dataclass

from oxmerge import _core
from oxmerge.card import CARD_NAME, RECIPE_NAME, REPORT_NAME, model_card
from oxmerge.output_config import edit_config, json_text
from oxmerge.publish import Contents
from oxmerge.side_files import WRITTEN_ANEW, SideFiles, folder_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oxmerge.planning import MergePlan
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
    merge_plan : MergePlan
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

    merge_plan: MergePlan
    config: str | None
    index: str | None
    card: str
    recipe: str
    side_files: SideFiles
    notes: tuple[str, ...]

    @classmethod
    def of(cls, merge_plan: MergePlan) -> Outcome:
        """Return what belongs to `merge_plan`.

        Raises
        ------
        PlanError
            If the donor's config cannot describe the output.
        """
        side_files = merge_plan.side_files
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
        return self.contents.names

    @property
    def bytes(self) -> int:
        """Bytes that the output directory takes."""
        weights = sum(int(shard["size"]) for shard in self.merge_plan.plan.shards)
        texts = (self.config, self.index, self.card, self.recipe)
        text_bytes = sum(len(text.encode()) for text in texts if text is not None)
        return weights + text_bytes + self.side_files.total_bytes + _REPORT_BYTES

    @property
    def contents(self) -> Contents:
        """What goes into the output directory; the report comes last."""
        return Contents(
            shards=[shard["file_name"] for shard in self.merge_plan.plan.shards],
            index=self.index,
            config=self.config,
            side_files=self.side_files.copied,
            texts={CARD_NAME: self.card, RECIPE_NAME: self.recipe},
            late=[REPORT_NAME],
        )

    def late_texts(self, report: dict[str, Any]) -> dict[str, str]:
        """Return the files that tell of the run."""
        return {REPORT_NAME: json_text({**report, "left_out": list(self.left_out)})}


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


def _config(merge_plan: MergePlan) -> tuple[str | None, tuple[str, ...]]:
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
        writes_head=any(
            tensor.name.endswith("lm_head.weight") for tensor in merge_plan.plan.tensors
        ),
    )
    return json_text(edited), tuple(notes)


def _has_config(path: str) -> bool:
    return (folder_of(path) / "config.json").is_file()


def method_description(name: str) -> dict[str, Any]:
    """Return what the engine says of a merge method."""
    return next(each for each in _core.methods() if each["name"] == name)


def _index(merge_plan: MergePlan) -> str | None:
    plan = merge_plan.plan
    if len(plan.shards) == 1:
        return None
    names = [shard["file_name"] for shard in plan.shards]
    return _core.index_json([(t.name, names[t.shard], t.bytes) for t in plan.tensors])


def _card(merge_plan: MergePlan, recipe: str) -> str:
    method = merge_plan.plan.method
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
