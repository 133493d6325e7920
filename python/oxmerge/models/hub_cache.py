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
    from typing import Any, TypeGuard

__all__ = [
    "Commit",
    "HubFile",
    "HubName",
    "cache_folder",
    "cached_commits",
    "cached_names",
    "find_cached",
    "is_offline",
    "is_size",
]

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REFERENCE = re.compile(
    rf"(?P<address>hf://(?:models/)?)?(?P<name>{_PART}(?:/{_PART})?)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<inside>.+))?",
    re.ASCII,
)
_HASH = re.compile(r"[0-9a-f]{40}")
#: Fewer letters of a commit are too few to be taken for it.
_SHORT_HASH = re.compile(r"[0-9a-f]{7,39}")
#: A path into the cache, up to the commit.
_INTO_HASH = re.compile(r"(.*/models--([\w.-]+)/snapshots/([0-9a-f]{40}))(?:/(.*))?", re.ASCII)
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
        # Of a path the first folder is nobody's name.
        is_path = "/" not in name and revision is None and found["address"] is None and parts
        if not is_name or is_path or not _are_plain(parts):
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
class HubFile:
    """A file as the Hub lists it.

    Attributes
    ----------
    size : int
        Bytes.
    etag : str
        The SHA-256 of a large file, in hexadecimal; of a small one, Git's SHA-1.
    """

    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit of a model on the Hub, which the cache may have a snapshot of.

    Attributes
    ----------
    name : str
        The model's name on the Hub.
    hash : str
        Its number, whole.
    """

    name: str
    hash: str

    @property
    def folder(self) -> str:
        """Where its files are, or would be."""
        return os.path.join(_folder_of(self.name), "snapshots", self.hash)

    def path_of(self, inside: str) -> str:
        """Return where a file or folder of it is, or would be."""
        return os.path.join(self.folder, *inside.split("/")) if inside else self.folder

    def label_of(self, inside: str) -> str:
        """Return what messages call a file or folder of it."""
        return f"{self.name}@{self.hash}" + (f"/{inside}" if inside else "")

    @classmethod
    def of_label(cls, label: str) -> tuple[Commit, str] | None:
        """Return the commit and the file that a label calls so."""
        named = HubName.parse(label)
        if named is None or named.revision is None or not _HASH.fullmatch(named.revision):
            return None
        return cls(named.name, named.revision), named.inside

    @classmethod
    def of_path(cls, path: str) -> tuple[Commit, str] | None:
        """Return the commit that a path leads into, and to which file or folder of it."""
        found = _INTO_HASH.fullmatch(os.path.abspath(path))
        return found and (cls(found[2].replace("--", "/", 1), found[3]), found[4] or "")

    def files(self) -> dict[str, HubFile] | None:
        """Return the files that it has on the Hub, if the cache tells."""
        path = os.path.join(_folder_of(self.name), "trees", f"{self.hash}.json")
        try:
            listed, _ = read_json(path)
        except (OSError, ValueError):
            return None
        files = listed.get("files") if isinstance(listed, dict) else None
        if not isinstance(files, dict):
            return None
        found = ((name, _cached_file(entry)) for name, entry in files.items())
        return {name: file for name, file in found if file and _are_plain(name.split("/"))}


def _cached_file(entry: Any) -> HubFile | None:  # noqa: ANN401 - it may be anything
    if not isinstance(entry, dict):
        return None
    size, etag = entry.get("lfs_size"), entry.get("lfs_sha256")
    if etag is None:
        size, etag = entry.get("size"), entry.get("blob_id")
    if is_size(size) and isinstance(etag, str):
        return HubFile(size, etag)
    return None


def is_size(value: object) -> TypeGuard[int]:
    """Tell whether a value from elsewhere can be the bytes of a file."""
    return isinstance(value, int) and 0 <= value < 1 << 63


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
        folders = os.listdir(cache_folder())
        models = (each.removeprefix("models--") for each in folders if each.startswith("models--"))
        return sorted(each.replace("--", "/", 1) for each in models)
    return []


def cached_commits(name: str) -> list[str]:
    """Return the commits of a model that the cache has something of."""
    with suppress(OSError):
        names = os.listdir(os.path.join(_folder_of(name), "snapshots"))
        return sorted(filter(_HASH.fullmatch, names))
    return []


def find_cached(name: str, revision: str | None = None) -> Commit | None:
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
    if _HASH.fullmatch(revision):
        commit = Commit(name, revision)
        return commit if os.path.isdir(commit.folder) else None
    with suppress(OSError, ValueError):
        text, _ = read_start(os.path.join(folder, "refs", *revision.split("/")), _MOST_REF)
        number = text.decode("ascii").strip()
        if _HASH.fullmatch(number):
            return Commit(name, number)
    if _SHORT_HASH.fullmatch(revision):
        found = [each for each in cached_commits(name) if each.startswith(revision)]
        return Commit(name, found[0]) if len(found) == 1 else None
    return None


def _folder_of(name: str) -> str:
    return os.path.join(cache_folder(), f"models--{name.replace('/', '--')}")
