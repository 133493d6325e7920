"""Which merge an interrupted run was making: whether another one may go on with what it finished.

The engine writes a journal of what is finished into the output directory
(`rust/engine/journal.rs`). Its first record is the *key*: everything that decides the bytes of the
output. A run with another key is refused, with what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from pathlib import Path

from oxmerge import __version__
from oxmerge._core import partial_name
from oxmerge.errors import OutputError
from oxmerge.json_files import parse_json
from oxmerge.output.manifest import plan_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from oxmerge.planning.plans import Plan

__all__ = ["RESUME_NAME", "check_same", "etag_of", "how_to_go_on", "keys_of", "parsed", "state_of"]

#: The journal; see `JOURNAL_NAME` for why no file of a model is called so.
RESUME_NAME = partial_name("oxmerge_resume")
_VERSION = 1
#: Inputs that a message names.
_SHOWN = 3
#: Letters of what a journal says that a message shows: anyone may have written it.
_LONGEST = 40

#: What a key says, and how a message calls it.
_PARTS = {
    "version": "form of journal",
    "oxmerge": "oxmerge",
    "method": "method",
    "seed": "seed",
    "shard_size": "shard size",
}


def keys_of(plans: Sequence[Plan]) -> list[str]:
    """Return the keys of plans that are run together: in one pass, or one after the other."""
    digests = [plan_digest(plan) for plan in plans]
    common = {
        "together": hashlib.sha256(repr(digests).encode()).hexdigest(),
        "inputs": sorted(set().union(*map(_identities, plans))),
    }
    return [
        json.dumps(
            {
                "version": _VERSION,
                "oxmerge": __version__,
                "method": plan.method,
                "seed": plan.seed,
                "shard_size": plan.shard_size,
                "plan": digest,
                **common,
            }
        )
        for plan, digest in zip(plans, digests, strict=True)
    ]


def _identities(plan: Plan) -> set[tuple[str, int, str]]:
    """Return what the input files are known by: name, size and state.

    What merges that come first make is known by how it is made.
    """
    made = None if plan.stand_ins is None else f"{plan.stand_ins.folder}{os.sep}"
    return {
        ("/".join(Path(file["path"]).parts[-2:]), file["size"], state_of(file))
        for file in plan.input_files
        if made is None or not file["path"].startswith(made)
    }


def state_of(file: Mapping[str, Any]) -> str:
    """Return what tells whether a file is the same: an ETag, or when it was written.

    No device: its number can change when the system starts anew.
    """
    return etag_of(file) or f"{file['modified_ns']} {file['inode']}"


def etag_of(file: Mapping[str, Any]) -> str | None:
    """Return the ETag of an input file, if it is of the Hub."""
    if "remote" in file:
        return str(file["remote"]["etag"])
    # In the Hub's cache, where a file may have come to since, contents are called by their ETags.
    content = Path(os.path.realpath(file["path"]))
    return content.name if content.parent.name == "blobs" else None


def check_same(journal: str, key: str, directory: os.PathLike[str]) -> None:
    """Raise OutputError unless the key in a journal is that of this run."""
    if journal == key:
        return
    expected, found = _differences(parsed(journal), json.loads(key))
    raise OutputError(
        "another merge was interrupted here, and what it finished is kept",
        file=str(directory),
        expected=expected,
        found=found,
        advice="start over with `--fresh`, which removes that; or name another directory",
    )


def parsed(text: str) -> dict[str, Any]:
    """Return what a key says, which may be of a stranger: nothing if it is none."""
    try:
        story = parse_json(text.encode())
    except ValueError:
        return {}
    return story if isinstance(story, dict) else {}


def _differences(then: dict[str, Any], now: dict[str, Any]) -> tuple[str, str]:
    """Return what this run has, and what the other one had, where they differ."""
    differs = [name for name in _PARTS if then.get(name) != now[name]]
    expected = [f"{_PARTS[name]} {now[name]}" for name in differs]
    found = [f"{_PARTS[name]} {str(then.get(name))[:_LONGEST]}" for name in differs]
    changed = _changed_inputs(then.get("inputs"), now["inputs"])
    if changed:
        expected.append(f"{changed} as now")
        found.append("another size, time of modification or inode")
    if not expected:
        expected.append("this recipe with these options")
        found.append("others")
    return ", ".join(expected), ", ".join(found)


def _changed_inputs(then: object, now: Sequence[Sequence[object]]) -> str:
    before = then if isinstance(then, list) else []
    changed = [f"`{file[0]}`" for file in now if file not in before]
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return ", ".join(changed[:_SHOWN]) + more


def how_to_go_on(directories: Iterable[os.PathLike[str] | str]) -> str:
    """Return what to tell of outputs that were interrupted."""
    paths = " ".join(shlex.quote(str(path)) for path in directories)
    return (
        "what is finished is kept: the same command goes on from there; "
        f"`oxmerge clean {paths}` removes it"
    )
