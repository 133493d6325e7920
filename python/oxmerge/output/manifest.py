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
from oxmerge.output.card import CARD_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from oxmerge.output.publish import Contents
    from oxmerge.planning.plans import Plan
    from oxmerge.problems import Problem

__all__ = ["MANIFEST_NAME", "MANIFEST_VERSION", "manifest_bytes", "manifest_writer", "plan_digest"]

MANIFEST_NAME = "oxmerge.json"
#: Another number when a reader of this one would misread a later one.
MANIFEST_VERSION = 1
#: Room for all but the tensors, the settings and the recipe, whose exact size is known only later.
_HEAD_BYTES = 64 << 10
#: What a file beside the weights takes: names have up to 255 letters, each of six as an escape.
_BESIDE_BYTES = 2048
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: In the address of what runs make on the way to an output; see `PARTS_NAME`.
_IN_WORK = f"/{_core.partial_name('parts')}/"
#: Parts of a warning that say where things lie on this machine.
_LOCAL = frozenset(("file", "recipe"))
#: The code of warnings that tell of the network and not of the merge.
_OF_THE_NETWORK = "unreachable-model"


def manifest_writer(
    plan: Plan,
    contents: Contents,
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
    contents : Contents
        What the output has besides.
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
        "beside": _beside(contents),
        "warnings": [_told(each) for each in warnings if each.code != _OF_THE_NETWORK],
    }
    # ASCII: a path need not be Unicode, and a lone surrogate is legal as an escape only.
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())

    def write(to: int) -> None:
        whole = hashlib.sha256()
        # The list of tensors is long: it is never in memory as a whole.
        with open(to, "wb", closefd=False) as file:

            def put(part: bytes) -> None:
                whole.update(part)
                file.write(part)

            put(f'{{\n{lines},\n"tensors": '.encode())
            plan.table.write_tensors(put, digests)
            put(b",\n")
            file.write(f'"sha256": "{whole.hexdigest()}"\n}}\n'.encode())

    return write


def manifest_bytes(plan: Plan) -> int:
    """Return the bytes that a manifest takes at the most."""
    settings = len(json.dumps(plan.table.settings()))
    recipe = len(json.dumps(plan.recipe_text))
    beside = _BESIDE_BYTES * (len(plan.side_files.copied) + len(plan.side_files.texts))
    return _HEAD_BYTES + settings + recipe + beside + plan.table.tensors_bytes


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


def _beside(contents: Contents) -> list[dict[str, Any]]:
    """Return the files beside the weights, but for the card, which people edit."""
    written = contents.written
    found = {}
    for file in contents.side_files:
        if file.name not in written:
            with file.open() as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            found[file.name] = file.state.size, digest
    for name, data in written.items():
        if name != CARD_NAME:
            found[name] = len(data), hashlib.sha256(data).hexdigest()
    return [
        {"name": name, "size": size, "sha256": digest}
        for name, (size, digest) in sorted(found.items())
    ]


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
    remote = file.get("remote", {})
    is_made = _IN_WORK in remote.get("label", "")  # by a merge that comes first
    etag = None if is_made else remote.get("etag")
    told = {"etag": etag} if etag and known is None else {}  # of a store, which tells no more
    return {"name": os.path.basename(path), "size": file["size"], "sha256": known, **told}


def _told(warning: Problem) -> dict[str, Any]:
    return {name: value for name, value in warning.as_dict().items() if name not in _LOCAL}
