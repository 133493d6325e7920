"""The files of a model that say which tokens there are, and comparing those of two models."""

from __future__ import annotations

import filecmp
import os
from fnmatch import fnmatchcase
from functools import lru_cache

from oxmerge import _core
from oxmerge.file_state import states_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from oxmerge.file_state import FileState

__all__ = [
    "KINDS",
    "OPAQUE",
    "TOKENIZER_FILES",
    "compare",
    "folder_beside",
    "is_of_tokenizer",
    "present",
    "same_files",
    "token_files",
    "vocabularies",
]

#: Files that tell each token's id, by kind. A kind is there if its first file is.
KINDS = (
    ("tokenizer.json",), ("vocab.json", "added_tokens.json"), ("vocab.txt", "added_tokens.json"),
)  # fmt: skip
#: Files that only their own programs read: their bytes can be compared.
OPAQUE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json")

#: Everything that tells tokens.
_TOKENS = (*dict.fromkeys(name for names in KINDS for name in names), *OPAQUE)
#: Everything that makes a tokenizer what it is.
TOKENIZER_FILES = (
    *_TOKENS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
#: The same, and what only its own programs and others' templates need, as patterns.
_ALL = (
    *TOKENIZER_FILES, "tokenizer.model*", "sentencepiece*.model", "chat_template.*",
    "additional_chat_templates/*", "tokenization_*.py",
)  # fmt: skip


def is_of_tokenizer(name: str) -> bool:
    """Tell whether a file of a model, by its name with ``/``, makes its tokenizer what it is."""
    return any(fnmatchcase(name, pattern) for pattern in _ALL)


def folder_beside(path: str) -> str:
    """Return the folder in which a model's config and tokenizer lie."""
    return path if os.path.isdir(path) else os.path.dirname(path)


def present(folder: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of the names that are files in a folder."""
    return tuple(name for name in names if os.path.isfile(os.path.join(folder, name)))


def vocabularies(one: str, other: str) -> tuple[list[str], list[str]] | None:
    """Return the files that tell the tokens in two folders; None if a folder has none.

    They are of the first kind that both have, else of the first that each has.
    """
    found = [_by_kind(folder) for folder in (one, other)]
    if not all(found):
        return None
    for ours in found[0]:
        for theirs in found[1]:
            if os.path.basename(ours[0]) == os.path.basename(theirs[0]):
                return ours, theirs
    return found[0][0], found[1][0]


def token_files(folder: str) -> list[str]:
    """Return the files that tell the tokens in a folder, of the first kind that it has."""
    return next(iter(_by_kind(folder)), [])


def same_files(one: str, other: str, *, only_tokens: bool = False) -> bool:
    """Tell whether two folders have the same tokenizer: each file that makes it, byte for byte.

    Parameters
    ----------
    one, other : str
        The folders.
    only_tokens : bool
        Whether only the files count that tell tokens.
    """
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    names = _TOKENS if only_tokens else TOKENIZER_FILES
    shared = present(one, names)
    if not shared or shared != present(other, names):
        return False
    try:
        _, different, unreadable = filecmp.cmpfiles(one, other, shared, shallow=False)
    except OSError:
        return False
    return not different and not unreadable


def _by_kind(folder: str) -> list[list[str]]:
    there = (present(folder, names) for names in KINDS)
    return [
        [os.path.join(folder, name) for name in files]
        for names, files in zip(KINDS, there, strict=True)
        if names[0] in files
    ]


def compare(one: Sequence[str], other: Sequence[str], rows: int) -> dict[str, Any] | None:
    """Return how two vocabularies differ in the ids below `rows`, as the engine tells it.

    Files are read once as long as they do not change: a sweep plans the same merge often.
    """
    return _compare(states_of(one), states_of(other), rows)


@lru_cache(maxsize=64)
def _compare(
    one: tuple[tuple[str, FileState], ...],
    other: tuple[tuple[str, FileState], ...],
    rows: int,
) -> dict[str, Any] | None:
    files, others = ([path for path, _ in states] for states in (one, other))
    return _core.compare_vocabularies(files, others, rows)
