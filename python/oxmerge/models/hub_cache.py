"""The Hub's cache on this machine, read without any library: names, commits, and what is there.

It is a folder for each model: ``refs`` has the commit of a branch or tag, ``snapshots`` a folder
for each commit with links to ``blobs``. A snapshot may lack files, since programs fetch only those
that they use. This module writes nothing there.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote

from oxmerge.json_files import read_json, read_start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["HubName", "Snapshot", "cache_folder", "cached_names", "find_snapshot", "is_offline"]

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REFERENCE = re.compile(
    rf"(?P<address>hf://(?:models/)?)?(?P<name>{_PART}(?:/{_PART})?)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<inside>.+))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Fewer letters of a commit are too few to be taken for it.
_SHORT_COMMIT = re.compile(r"[0-9a-f]{7,39}")
#: A path into the cache, up to the snapshot.
_SNAPSHOT = re.compile(r"(.*/models--([\w.-]+)/snapshots/([0-9a-f]{40}))(?:/(.*))?", re.ASCII)
#: What environment variables say for yes.
_YES = frozenset(("1", "ON", "YES", "TRUE"))
#: A branch that models have unless they say otherwise.
_MAIN = "main"
#: Bytes of a file that has a commit.
_MOST_REF = 1024


@dataclass(frozen=True, slots=True)
class HubName:
    """What a reference to a model on the Hub says.

    Attributes
    ----------
    name : str
        ``org/name``, or ``name`` of models from before there were organisations.
    revision : str, optional
        A branch, a tag, or a commit, which may be shortened.
    inside : str
        A folder or file of the model, with ``/``; empty for all of it.
    is_address : bool
        Whether it is written as an address, ``hf://org/name``, which no path is.
    """

    name: str
    revision: str | None = None
    inside: str = ""
    is_address: bool = False

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """Return what a text says, ``org/name@revision/folder``; None if it is no such name.

        Revision and folder may be left out. A slash in a revision is written ``%2F``, but for the
        Hub's own ``refs/pr/1``.

        Examples
        --------
        >>> HubName.parse("org/name@v1.0/onnx")
        HubName(name='org/name', revision='v1.0', inside='onnx', is_address=False)
        """
        found = _REFERENCE.fullmatch(text)
        if found is None:
            return None
        name, revision = found["name"], found["revision"]
        revision = None if revision is None else unquote(revision)
        inside = found["inside"] or ""
        parts = inside.rstrip("/").split("/") if inside else []
        is_name = "--" not in name and ".." not in name and not name.endswith(".git")
        if not is_name or not _are_plain(parts):
            return None
        if revision is not None and not _are_plain(revision.split("/")):
            return None
        return cls(name, revision, "/".join(parts), found["address"] is not None)

    def __str__(self) -> str:
        """Return the name with its revision."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def _are_plain(parts: list[str]) -> bool:
    """Tell whether the parts of a path stay within a folder."""
    return not any(part in {"", ".", ".."} or "\0" in part or "\\" in part for part in parts)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A commit of a model in the cache.

    Attributes
    ----------
    name : str
        The model's name on the Hub.
    commit : str
        The whole commit.
    """

    name: str
    commit: str

    @property
    def folder(self) -> str:
        """Where its files are, or would be."""
        return os.path.join(_folder_of(self.name), "snapshots", self.commit)

    def path_of(self, inside: str) -> str:
        """Return where a file or folder of it is, or would be."""
        return os.path.join(self.folder, *inside.split("/")) if inside else self.folder

    def label_of(self, inside: str) -> str:
        """Return what messages call a file or folder of it."""
        return f"{self.name}@{self.commit}" + (f"/{inside}" if inside else "")

    @classmethod
    def of_label(cls, label: str) -> tuple[Snapshot, str] | None:
        """Return the snapshot and the file that a label calls so."""
        named = HubName.parse(label)
        if named is None or named.revision is None or not _COMMIT.fullmatch(named.revision):
            return None
        return cls(named.name, named.revision), named.inside

    @classmethod
    def of_path(cls, path: str) -> tuple[Snapshot, str] | None:
        """Return the snapshot that a path leads into, and to which file or folder of it."""
        found = _SNAPSHOT.fullmatch(os.path.abspath(path))
        return found and (cls(found[2].replace("--", "/"), found[3]), found[4] or "")

    def files(self) -> dict[str, int] | None:
        """Return the files that it should have, with their bytes, if the cache tells."""
        path = os.path.join(_folder_of(self.name), "trees", f"{self.commit}.json")
        try:
            listed, _ = read_json(path)
        except (OSError, ValueError):
            return None
        files = listed.get("files") if isinstance(listed, dict) else None
        if not isinstance(files, dict):
            return None
        sizes = {name: _size_of(entry) for name, entry in files.items()}
        return {name: size for name, size in sizes.items() if size is not None}


def _size_of(entry: Any) -> int | None:  # noqa: ANN401 - it may be anything
    size = entry.get("size") if isinstance(entry, dict) else None
    return size if isinstance(size, int) else None


def cache_folder() -> str:
    """Return where the Hub's libraries keep what they fetch, by the environment."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if value := os.environ.get(name):
            return os.path.join(os.path.expandvars(os.path.expanduser(value)), below).rstrip("/")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.join(os.path.expandvars(os.path.expanduser(home)), "huggingface", "hub")


def is_offline() -> bool:
    """Tell whether the environment forbids to ask the Hub."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in _YES


def cached_names() -> list[str]:
    """Return the names of the models that the cache has something of."""
    with suppress(OSError):
        folders = (each.removeprefix("models--") for each in os.listdir(cache_folder()))
        return sorted(each.replace("--", "/") for each in folders)
    return []


def find_snapshot(name: str, revision: str | None = None) -> Snapshot | None:
    """Return the commit that the cache has for a revision; files of it may be lacking.

    A branch is what it was when something was last fetched from it.

    Parameters
    ----------
    name : str
        The model.
    revision : str, optional
        A branch, a tag, or a commit, which may be shortened; ``main`` unless given.
    """
    revision = revision or _MAIN
    folder = _folder_of(name)
    if _COMMIT.fullmatch(revision):
        snapshot = Snapshot(name, revision)
        return snapshot if os.path.isdir(snapshot.folder) else None
    with suppress(OSError, ValueError):
        text, _ = read_start(os.path.join(folder, "refs", *revision.split("/")), _MOST_REF)
        commit = text.decode("ascii").strip()
        if _COMMIT.fullmatch(commit):
            return Snapshot(name, commit)
    if _SHORT_COMMIT.fullmatch(revision):
        with suppress(OSError):
            found = [
                each
                for each in os.listdir(os.path.join(folder, "snapshots"))
                if each.startswith(revision) and _COMMIT.fullmatch(each)
            ]
            return Snapshot(name, found[0]) if len(found) == 1 else None
    return None


def _folder_of(name: str) -> str:
    return os.path.join(cache_folder(), f"models--{name.replace('/', '--')}")
