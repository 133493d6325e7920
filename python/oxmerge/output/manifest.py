"""The manifest of a merge, `oxmerge.json`: how an output came to be, and what it is.

It depends on the recipe, the inputs, the seed, the shard size and the version of oxmerge only: it
has no times, and no paths but those that the recipe has. `python/MANIFEST.md` says what a reader
may rely on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import TYPE_CHECKING

from oxmerge import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from oxmerge.planning.plans import Plan
    from oxmerge.problems import Problem

__all__ = ["MANIFEST_NAME", "MANIFEST_VERSION", "manifest_bytes", "manifest_writer", "plan_digest"]

MANIFEST_NAME = "oxmerge.json"
#: Another number when a reader of this one would misread a later one.
MANIFEST_VERSION = 1
#: Room for all but the tensors, the settings and the recipe, whose exact size is known only later.
_HEAD_BYTES = 64 << 10
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Parts of a warning that say where things lie on this machine.
_LOCAL = frozenset(("file", "recipe"))


def manifest_writer(
    plan: Plan,
    digests: _core.Digests | None,
    warnings: Iterable[Problem],
    *,
    hash_inputs: bool,
) -> Callable[[int], None]:
    """Return what writes the manifest of a finished merge to an open file.

    Parameters
    ----------
    plan : Plan
        What was merged.
    digests : _core.Digests, optional
        What is known of the output tensors, unless they were made without.
    warnings : iterable of Problem
        Those of the plan, and those that came up in the run.
    hash_inputs : bool
        Whether to read all input files once more for their SHA-256.
    """
    head = {
        "oxmerge_manifest": MANIFEST_VERSION,
        **_versions(plan),
        "plan": plan_digest(plan),
        "seed": plan.seed,
        "shard_size": plan.shard_size,
        "recipe": plan.recipe_text,
        "settings": [{"shared": shared, "own": own} for shared, own in plan.table.settings()],
        "inputs": _inputs(plan, hash_inputs=hash_inputs),
        "donor": plan.models[plan.donor],
        "base": None if plan.base is None else plan.models[plan.base],
        "files": [{"name": name, "size": size} for name, size in plan.shards],
        "warnings": [_told(warning) for warning in warnings],
    }
    # ASCII: a path need not be Unicode, and a lone surrogate is legal as an escape only.
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())

    def write(to: int) -> None:
        # The list of tensors is long: it is never in memory as a whole.
        with open(to, "wb", closefd=False) as file:
            file.write(f'{{\n{lines},\n"tensors": '.encode())
            plan.table.write_tensors(file.write, digests)
            file.write(b"\n}\n")

    return write


def manifest_bytes(plan: Plan) -> int:
    """Return the bytes that a manifest takes at the most."""
    settings = len(json.dumps(plan.table.settings()))
    recipe = len(json.dumps(plan.recipe_text))
    return _HEAD_BYTES + settings + recipe + plan.table.tensors_bytes


def plan_digest(plan: Plan) -> str:
    """Return a SHA-256, in hexadecimal, of what decides the output's tensors, on any machine.

    Two merges with the same one have equal weights, if their inputs are equal.
    """
    whole = hashlib.sha256()
    plan.table.write_portable(whole.update)
    return whole.hexdigest()


def _versions(plan: Plan) -> dict[str, Any]:
    """Return what computed: the bits of an output may change when one of these does."""
    build = _core.build_info()
    source = plan.table.source
    written = (
        None if source is None else dict(zip(("module", "function", "digest"), source, strict=True))
    )
    return {
        "oxmerge": build["version"],
        "method": {"name": plan.method, "source": written},
        "numerics": {
            "random_masks": build["generator_version"],
            "sums": build["reduction_version"],
            "comparison": build["comparison_version"],
        },
    }


def _inputs(plan: Plan, *, hash_inputs: bool) -> list[dict[str, Any]]:
    """Return each model with its files: those of its tensors, and what else was read beside."""
    files = plan.input_files
    of_models = plan.table.files_of_models()
    weights = {file for used in of_models for file in used}
    folders = [os.path.dirname(file["path"]) for file in files]
    inputs = []
    for reference, pinned, used in zip(plan.models, plan.pinned, of_models, strict=True):
        own = {folders[file] for file in used}
        beside = [at for at, folder in enumerate(folders) if folder in own and at not in weights]
        described = [_file(files[at], hash_it=hash_inputs) for at in [*used, *beside]]
        inputs.append({"model": reference, "pinned": pinned, "files": described})
    return inputs


def _file(file: Mapping[str, Any], *, hash_it: bool) -> dict[str, Any]:
    """Return an input file. The Hub names what is large by its SHA-256, and so does its cache."""
    path = file["path"]
    folder, blob = os.path.split(os.path.realpath(path))
    is_cached = os.path.basename(folder) == "blobs"
    names = (file.get("remote", {}).get("etag", ""), blob if is_cached else "")
    known = next(filter(_SHA256.fullmatch, names), None)
    if hash_it and os.path.isfile(path):
        with open(path, "rb") as opened:
            known = hashlib.file_digest(opened, "sha256").hexdigest()
    etag = file.get("remote", {}).get("etag")
    told = {"etag": etag} if etag and known is None else {}  # of a store, which tells no more
    return {"name": os.path.basename(path), "size": file["size"], "sha256": known, **told}


def _told(warning: Problem) -> dict[str, Any]:
    return {name: value for name, value in warning.as_dict().items() if name not in _LOCAL}
