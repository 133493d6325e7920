"""What the output directory will hold besides its weights: decided before any tensor is read."""

from __future__ import annotations

from oxmerge.output.card import (
    CARD_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    hub_name,
    model_card,
    pinned_recipe,
    read_metadata,
)
from oxmerge.output.config import edit_config, json_text
from oxmerge.output.manifest import MANIFEST_NAME, manifest_bytes
from oxmerge.output.publish import Contents
from oxmerge.output.side_files import WRITTEN_ANEW, SideFiles, folder_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from typing import Any

    from oxmerge.methods import Method
    from oxmerge.models.inputs import InputModel
    from oxmerge.output.config import Restacked
    from oxmerge.output.side_files import LeftOut
    from oxmerge.planning.plans import Plan
    from oxmerge.recipe.recipe import Recipe

__all__ = [
    "card_of",
    "config_of",
    "contents_of",
    "disk_bytes",
    "late_texts",
    "left_out",
    "notes_on",
]

#: Files left out that a note names; the report has all.
_SHOWN = 8
#: Room for the run report, whose exact size is known only afterwards.
_REPORT_BYTES = 64 << 10


def contents_of(plan: Plan) -> Contents:
    """Return what goes into the output directory; manifest and report come last."""
    return Contents(
        shards=[name for name, _ in plan.shards],
        index=plan.index,
        config=plan.config,
        side_files=plan.side_files.copied,
        texts={**plan.side_files.texts, CARD_NAME: plan.card, RECIPE_NAME: _recipe_of(plan)},
        late=[MANIFEST_NAME, REPORT_NAME],
    )


def _recipe_of(plan: Plan) -> str:
    return pinned_recipe(plan.recipe_text, _pins(zip(plan.models, plan.pinned, strict=True)))


def _pins(models: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Return the commits of the models that are written without them."""
    return {model: pin for model, pin in models if pin is not None and pin != model}


def late_texts(
    plan: Plan, report: dict[str, Any], manifest: Callable[[int], None]
) -> dict[str, str | Callable[[int], None]]:
    """Return the files that tell of the run, as texts or as what writes them."""
    report = {**report, "left_out": list(plan.left_out)}
    return {MANIFEST_NAME: manifest, REPORT_NAME: json_text(report)}


def disk_bytes(plan: Plan) -> int:
    """Return the bytes that the output directory takes."""
    weights = sum(size for _, size in plan.shards)
    texts = (plan.config, plan.index, plan.card, _recipe_of(plan))
    text_bytes = sum(len(text.encode()) for text in texts if text is not None)
    late_bytes = manifest_bytes(plan) + _REPORT_BYTES
    return weights + text_bytes + plan.side_files.total_bytes + late_bytes


def left_out(side_files: SideFiles) -> tuple[str, ...]:
    """Return the donor's files that are not in the output in any form, with the reason."""
    return tuple(f"{entry.name}: {entry.reason}" for entry in _left_out(side_files))


def _left_out(side_files: SideFiles) -> list[LeftOut]:
    return [entry for entry in side_files.left_out if entry.reason != WRITTEN_ANEW]


def notes_on(side_files: SideFiles) -> tuple[str, ...]:
    """Say which of the donor's files are not copied, and which may mislead a loader."""
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


def config_of(
    donor: InputModel,
    *,
    dtype: str | None,
    stacks: Sequence[Restacked],
    writes_head: bool,
    edit: Callable[[dict[str, Any]], tuple[dict[str, Any], list[str]]] | None = None,
) -> tuple[str | None, tuple[str, ...]]:
    """Return the text of the output's config, and notes on what was changed.

    Parameters
    ----------
    donor : InputModel
        The model that it comes from.
    dtype : str, optional
        The float type of most of the output.
    stacks : sequence of Restacked
        What becomes of the donor's layers.
    writes_head : bool
        Whether the output has a head of its own.
    edit : callable, optional
        Edits it further, and returns notes on that.

    Raises
    ------
    PlanError
        If the donor's config cannot describe the output.
    """
    if not donor.config and not _has_config(donor.path):
        return None, ()
    edited, notes = edit_config(donor.config, dtype=dtype, stacks=stacks, writes_head=writes_head)
    if edit is not None:
        edited, more = edit(edited)
        notes += more
    return json_text(edited), tuple(notes)


def _has_config(path: str) -> bool:
    return (folder_of(path) / "config.json").is_file()


def card_of(
    recipe: Recipe,
    about: Method,
    models: Sequence[InputModel],
    donor: InputModel,
    notes: Sequence[str],
    stages: Collection[str] = (),
) -> str:
    """Return the model card of a merge by the method `about`.

    `notes` are on tensors that are an exception, `stages` the models that are made for the merge:
    those that they were made from stand for them.
    """
    hub_names: list[str | None] = []
    for model in sorted(models, key=lambda model: model is not donor):
        if model.reference in stages:
            hub_names += read_metadata(model.path).base_models
        else:
            hub_names.append(hub_name(model.reference, model.path))
    return model_card(
        method=recipe.method,
        models=[model.reference for model in models],
        pinned=_pins((model.reference, model.pinned) for model in models),
        hub_names=hub_names,
        metadata=read_metadata(folder_of(donor.path)),
        base=None if recipe.base_model is None else donor.reference,
        recipe_text=recipe.text,
        method_title=about.title,
        paper=about.paper,
        notes=notes,
    )
