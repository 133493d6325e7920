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
from itertools import islice
from pathlib import Path

from oxmerge import __version__
from oxmerge._core import partial_name
from oxmerge.errors import OutputError
from oxmerge.json_files import parse_json
from oxmerge.output.manifest import plan_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from oxmerge.planning.plans import Plan

__all__ = ["RESUME_NAME", "check_same", "etag_of", "how_to_go_on", "keys_of", "parsed", "state_of"]

#: The journal; see `JOURNAL_NAME` for why no file of a model is called so.
RESUME_NAME = partial_name("oxmerge_resume")
_VERSION = 2
#: Differences of a kind that a message names.
_SHOWN = 3
#: Letters of what a journal says that a message shows: anyone may have written it.
_LONGEST = 160
#: Values and models that a message lists.
_MOST_SHOWN = 8
#: Letters that the parameters take at the most; of more of them no message tells which differ.
_MOST_SETTINGS = 1 << 16

#: What a key says, and how a message calls it.
_PARTS = {
    "version": "form of journal",
    "oxmerge": "oxmerge",
    "method": "method",
    "source": "source of the method",
    "dtype": "dtype",
    "in_f64": "arithmetic in float64",
    "seed": "seed",
    "shard_size": "shard size",
    "models": "models",
    "base": "base model",
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
                "source": plan.table.source,
                "dtype": plan.dtype,
                "in_f64": plan.table.in_f64,
                "seed": plan.seed,
                "shard_size": plan.shard_size,
                "models": plan.models,
                "base": None if plan.base is None else plan.models[plan.base],
                "settings": _settings(plan),
                "plan": digest,
                **common,
            }
        )
        for plan, digest in zip(plans, digests, strict=True)
    ]


def _settings(plan: Plan) -> list[dict[str, Any]]:
    """Return the distinct parameters of tensors, each by what a message calls it."""
    told = []
    of_models = plan.table.models_of_settings()
    for (shared, own), models in zip(plan.table.settings(), of_models, strict=True):
        called = dict(shared)
        for at, (parameters, model) in enumerate(zip(own, models, strict=False), start=1):
            owner = f"input {at}" if model is None else f"`{plan.models[model]}`"
            called.update({f"{name} of {owner}": each for name, each in parameters.items()})
        told.append(called)
    return told if len(json.dumps(told)) <= _MOST_SETTINGS else []


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
    names = [name for name in _PARTS if then.get(name) != now[name]]
    if {"version", "oxmerge"} & set(names):  # the others may mean something else there
        names = [name for name in names if name in ("version", "oxmerge")]
    expected = [f"{_PARTS[name]} {_shown(now[name])}" for name in names]
    found = [f"{_PARTS[name]} {_shown(then.get(name))}" for name in names]
    # No run writes more. To compare them takes time by the square of their number.
    are_few = len(json.dumps(then.get("settings"))) <= _MOST_SETTINGS
    if are_few and not {"version", "oxmerge", "method", "models", "base"} & set(names):
        others = _other_settings(then.get("settings"), now["settings"])
        for name, mine, theirs in islice(others, _SHOWN):
            expected.append(f"{name[:_LONGEST]} {_shown(mine, ' or ')}")
            found.append(f"{name[:_LONGEST]} {_shown(theirs, ' or ')}")
    changed = _changed_inputs(then.get("inputs"), now["inputs"])
    if changed:
        expected.append(f"{changed} as now")
        found.append("another size, time of modification or inode")
    if not expected and then.get("plan") != now["plan"]:
        expected.append("the parameters, slices, tensors and tokens of this recipe")
        found.append("others")
    elif not expected:
        expected.append("the merges that come before this one or are made with it")
        found.append("others")
    return ", ".join(expected), ", ".join(found)


def _other_settings(then: object, now: object) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Yield parameters whose values are others: name, and the values of either run."""
    mine, theirs = _values(now), _values(then)
    for name in sorted(mine.keys() | theirs.keys()):
        values, others = mine.get(name, []), theirs.get(name, [])
        only = [each for each in values if each not in others]
        only_there = [each for each in others if each not in values]
        if only or only_there:  # those come first, since not all may be shown
            yield (
                name,
                only + [each for each in values if each in others],
                only_there + [each for each in others if each in values],
            )


def _values(settings: object) -> dict[str, list[Any]]:
    """Return the distinct values of each parameter in the settings of a key."""
    found: dict[str, list[Any]] = {}
    for each in settings if isinstance(settings, list) else []:
        for name, value in each.items() if isinstance(each, dict) else []:
            values = found.setdefault(name, [])
            if value not in values:
                values.append(value)
    return found


def _shown(value: object, between: str = ", ") -> str:
    if not isinstance(value, list):
        return "none" if value is None else str(value)[:_LONGEST]
    more = f"{between}…" if len(value) > _MOST_SHOWN else ""
    return (between.join(str(each)[:_LONGEST] for each in value[:_MOST_SHOWN]) or "none") + more


def _changed_inputs(then: object, now: Sequence[Sequence[object]]) -> str:
    """Return the inputs of both runs that are not what they were."""
    listed = then if isinstance(then, list) else []
    before = [each for each in listed if isinstance(each, list) and each]
    known = [each[0] for each in before]
    changed = [f"`{file[0]}`" for file in now if file[0] in known and file not in before]
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return ", ".join(changed[:_SHOWN]) + more


def how_to_go_on(directories: Iterable[os.PathLike[str] | str]) -> str:
    """Return what to tell of outputs that were interrupted."""
    paths = " ".join(shlex.quote(str(path)) for path in directories)
    return (
        "what is finished is kept: the same command goes on from there; "
        f"`oxmerge clean {paths}` removes it"
    )
