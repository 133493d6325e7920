"""What a run writes down before it begins to replace files, for the next run if it is killed.

By name, size, time and inode: so the next run knows what the dead one put in place, and what it was
allowed to replace, from what anyone else has put there. And by what plan: the same merge may even
replace a model that is complete, as one of a sweep that was killed later.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

from oxmerge._core import partial_name
from oxmerge.json_files import parse_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from oxmerge.file_state import FileState

__all__ = ["JOURNAL_NAME", "MOST_BYTES", "Journal"]

#: No file of a model is called so: what begins with `oxmerge_` is not copied from a donor.
JOURNAL_NAME = partial_name("oxmerge_journal")
#: More than that no run writes.
MOST_BYTES = 16_000_000
_VERSION = 1

#: Inode, size, time of modification. No device: its number can change when the system starts anew.
_Mark = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Journal:
    """Which files are the dead run's, and which it was to replace.

    Attributes
    ----------
    purpose : str
        What was being made: a digest of the plan.
    last : str
        The file that makes the model complete; empty where there is no journal.
    ours, old : mapping of str to tuple
        By name, the marks of the files that it put in place, and of those that it may have removed.
    folders : tuple of str
        Folders that it made for them, the inner ones first.
    """

    purpose: str = ""
    last: str = ""
    ours: Mapping[str, _Mark] = field(default_factory=dict)
    old: Mapping[str, _Mark] = field(default_factory=dict)
    folders: tuple[str, ...] = ()

    def is_ours(self, name: str, state: FileState) -> bool:
        """Tell whether a file was put in place by the dead run."""
        return self.ours.get(name) == mark(state)

    def may_replace(self, name: str, state: FileState) -> bool:
        """Tell whether a file is one that the dead run put in place, or was to replace."""
        return self.is_ours(name, state) or self.old.get(name) == mark(state)

    def to_json(self) -> bytes:
        """Return it as text."""
        story = {
            "version": _VERSION,
            "purpose": self.purpose,
            "last": self.last,
            "ours": self.ours,
            "old": self.old,
            "folders": self.folders,
        }
        return json.dumps(story).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Journal | None:
        """Return what a text says; None if it is not whole."""
        try:
            story = parse_json(text)
            if story["version"] != _VERSION:
                return None
            ours, old = (
                {_name(name): tuple(map(int, each)) for name, each in story[part].items()}
                for part in ("ours", "old")
            )
            told = (str(story["purpose"]), str(story["last"]))
            return cls(*told, ours, old, tuple(map(_name, story["folders"])))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return None


def _name(text: str) -> str:
    """Return the name of a file; ValueError if none can have it."""
    if b"\0" in os.fsencode(text):
        raise ValueError("a name with a NUL")
    return text


def mark(state: FileState) -> _Mark:
    """Return what a file is known by."""
    return (state.inode, state.size, state.modified_ns)
