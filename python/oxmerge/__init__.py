"""Merge language models of any size on one machine, in the memory you set.

>>> import oxmerge
>>> report = oxmerge.merge("recipe.yml", "out/", memory="2GiB")  # doctest: +SKIP

Importing the package loads neither numpy nor rich nor PyYAML nor torch.
"""

from __future__ import annotations

from oxmerge._core import build_info
from oxmerge.errors import (
    CheckpointError,
    DeviceError,
    InputChangedError,
    InternalError,
    MemoryBudgetError,
    OutputError,
    OxmergeError,
    PlanError,
    RecipeError,
    RemoteError,
    UnsupportedError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oxmerge import formula as formula
    from oxmerge import kernels as kernels
    from oxmerge.adapter_sums import join_adapters as join_adapters
    from oxmerge.arrays.in_memory import merge_tensors as merge_tensors
    from oxmerge.arrays.lazily import LazyMerge as LazyMerge
    from oxmerge.arrays.lazily import lazy as lazy
    from oxmerge.arrays.saving import save as save
    from oxmerge.arrays.state_dicts import merge_state_dicts as merge_state_dicts
    from oxmerge.checking.differences import diff as diff
    from oxmerge.checking.soundness import check as check
    from oxmerge.checking.verification import verify as verify
    from oxmerge.fusing import fuse as fuse
    from oxmerge.merging import MergeReport as MergeReport
    from oxmerge.merging import merge as merge
    from oxmerge.merging import plan as plan
    from oxmerge.models.checkpoints import OpenCheckpoint as OpenCheckpoint
    from oxmerge.models.checkpoints import open_checkpoint as open  # noqa: A004
    from oxmerge.output.publish import clean as clean
    from oxmerge.planning.plan_files import load_plan as load_plan
    from oxmerge.planning.plans import Plan as Plan
    from oxmerge.problems import Problem as Problem
    from oxmerge.python_methods import method as method
    from oxmerge.python_methods import per_model as per_model
    from oxmerge.python_methods import shared as shared
    from oxmerge.recipe.recipe import Recipe as Recipe
    from oxmerge.sweeping import sweep as sweep

__all__ = [
    "CheckpointError",
    "DeviceError",
    "InputChangedError",
    "InternalError",
    "LazyMerge",
    "MemoryBudgetError",
    "MergeReport",
    "OpenCheckpoint",
    "OutputError",
    "OxmergeError",
    "Plan",
    "PlanError",
    "Problem",
    "Recipe",
    "RecipeError",
    "RemoteError",
    "UnsupportedError",
    "__version__",
    "build_info",
    "check",
    "clean",
    "diff",
    "formula",
    "fuse",
    "join_adapters",
    "kernels",
    "lazy",
    "load_plan",
    "merge",
    "merge_state_dicts",
    "merge_tensors",
    "method",
    "open",
    "per_model",
    "plan",
    "save",
    "shared",
    "sweep",
    "verify",
]


def _build() -> dict[str, str]:
    """Return version and profile; of a wrong `OXMERGE_SIMD`, the first merge tells."""
    try:
        return build_info()
    except PlanError:
        from importlib import metadata  # noqa: PLC0415 - slow

        try:
            version = metadata.version("oxmerge")
        except metadata.PackageNotFoundError:
            version = "unknown"
        return {"version": version, "profile": "unknown"}


__version__: str = _build()["version"]

#: Where the names come from that are loaded when they are first used.
_LAZY = {
    "LazyMerge": ("oxmerge.arrays.lazily", "LazyMerge"),
    "MergeReport": ("oxmerge.merging", "MergeReport"),
    "OpenCheckpoint": ("oxmerge.models.checkpoints", "OpenCheckpoint"),
    "Plan": ("oxmerge.planning.plans", "Plan"),
    "Problem": ("oxmerge.problems", "Problem"),
    "Recipe": ("oxmerge.recipe.recipe", "Recipe"),
    "check": ("oxmerge.checking.soundness", "check"),
    "clean": ("oxmerge.output.publish", "clean"),
    "diff": ("oxmerge.checking.differences", "diff"),
    "fuse": ("oxmerge.fusing", "fuse"),
    "join_adapters": ("oxmerge.adapter_sums", "join_adapters"),
    "lazy": ("oxmerge.arrays.lazily", "lazy"),
    "load_plan": ("oxmerge.planning.plan_files", "load_plan"),
    "merge": ("oxmerge.merging", "merge"),
    "merge_state_dicts": ("oxmerge.arrays.state_dicts", "merge_state_dicts"),
    "merge_tensors": ("oxmerge.arrays.in_memory", "merge_tensors"),
    "method": ("oxmerge.python_methods", "method"),
    "open": ("oxmerge.models.checkpoints", "open_checkpoint"),
    "per_model": ("oxmerge.python_methods", "per_model"),
    "plan": ("oxmerge.merging", "plan"),
    "save": ("oxmerge.arrays.saving", "save"),
    "shared": ("oxmerge.python_methods", "shared"),
    "sweep": ("oxmerge.sweeping", "sweep"),
    "verify": ("oxmerge.checking.verification", "verify"),
}

#: Modules that are part of the interface.
_MODULES = frozenset(("formula", "kernels"))


def __getattr__(name: str) -> object:
    """Load a public name when it is first used."""
    from importlib import import_module  # noqa: PLC0415

    if name in _MODULES:
        return import_module(f"oxmerge.{name}")
    if name not in _LAZY:
        from oxmerge.problems import did_you_mean  # noqa: PLC0415 - only when something is wrong

        meant = None if name.startswith("_") else did_you_mean(name, __all__)
        text = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(f"{text}; {meant}" if meant else text)

    module, attribute = _LAZY[name]
    value: object = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return list(__all__)


if _build()["profile"] == "debug":
    from warnings import warn

    warn(
        "oxmerge was built without optimisation and is very slow; build it with --release",
        RuntimeWarning,
        stacklevel=2,
    )
