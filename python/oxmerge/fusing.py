"""Fusing: a model with adapters, written as a model."""

from __future__ import annotations

import os

from oxmerge.merging import merge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from oxmerge.merging import MergeReport

    PathLike = str | os.PathLike[str]

__all__ = ["fuse"]


def fuse(
    model: PathLike,
    directory: PathLike,
    adapters: Iterable[PathLike],
    **options: Any,  # noqa: ANN401 - those of `merge`
) -> MergeReport:
    """Put adapters into a model: W + s·B·A of every tensor that they change, rounded once.

    It is the merge ``{"merge_method": "passthrough", "models": [{"model": "model+adapter"}]}``.

    Parameters
    ----------
    model : path
        The model that the adapters were trained on.
    directory : path
        The output: new or empty, unless ``overwrite=True``.
    adapters : iterable of path
        LoRAs as PEFT saves them; their products are added. ``"adapter=0.5"`` takes half of one.
    **options
        Those of `oxmerge.merge`.

    Returns
    -------
    MergeReport
        How it went.

    Raises
    ------
    PlanError
        If an adapter is broken, not whole, or does not fit the model; and as `oxmerge.merge` does.

    Examples
    --------
    >>> import oxmerge
    >>> report = oxmerge.fuse("models/base", "fused/", ["adapters/chat", "adapters/code=0.5"])
    """
    reference = "+".join(os.fspath(each) for each in (model, *adapters))
    recipe = {"merge_method": "passthrough", "models": [{"model": reference}]}
    return merge(recipe, directory, **options)
