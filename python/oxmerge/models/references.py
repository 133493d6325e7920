"""Model references: how people name a model, and where that model lies.

A reference is a path, the name of a model on the Hub, or an address in a store. One function
resolves it, for recipes, `inspect`, `open` and `lazy`. A path wins when it is there; what else was
looked at is said. What it resolves to is pinned: a model of the Hub is one commit from then on.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from types import MappingProxyType
from urllib.parse import quote

from oxmerge import _core
from oxmerge.errors import CheckpointError, InputChangedError, RemoteError, UnsupportedError
from oxmerge.models import hub, stores
from oxmerge.models.hub_cache import Commit, HubName, cache_folder, cached_commits, find_cached
from oxmerge.models.side_by_side import side_by_side
from oxmerge.models.vocabularies import TOKENIZER_FILES, is_of_tokenizer
from oxmerge.problems import UNSUPPORTED, Problem, near, printable
from oxmerge.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oxmerge._core import Checkpoint
    from oxmerge.models.remote import RemoteFile

__all__ = [
    "FOLDERS",
    "Located",
    "error_of",
    "fetch_beside",
    "open_located",
    "parse_reference",
    "remote_file",
    "resolve_reference",
    "split_adapters",
    "with_revision",
]

#: Adapters on one model; what one is multiplied by.
_MOST_PARTS = 32
_NUMBER = re.compile(r"-?(?:\d{1,9}\.?\d{0,17}|\.\d{1,17})(?:e-?\d{1,2})?")
#: What people copy from a browser.
_PAGE = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/(?P<name>[^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve|raw|commit)/(?P<revision>[^/?#]+)(?:/(?P<inside>[^?#]+))?)?/?(?:[?#].*)?"
)
_NAME_ONE = "name the folder of a model, or a safetensors file"
#: Files of a model that a message shows.
_SHOWN = 8
#: Small files of a model that planning reads, besides its tokenizer and indexes of weights.
_PLANNED = frozenset(
    ("README.md", "adapter_config.json", "config.json", "generation_config.json", "modules.json")
)
_INDEX = ".index.json"
_USUAL = ("model.safetensors", "pytorch_model.bin")
#: The bytes that most headers fit; all headers of a model.
_FIRST = 128 << 10
_MOST_HEADERS = 100_000_000
_LENGTH = 8
_ZIP = b"PK\x03\x04"
#: Folders that people put models into; nobody on the Hub is called so.
FOLDERS = frozenset((
    "adapter", "adapters", "checkpoints", "data", "lora", "loras", "merged", "merges", "model",
    "models", "output", "outputs", "weights",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Located:
    """Where a model lies.

    Attributes
    ----------
    path : str
        Its folder, or its file; of a model of the Hub, in the Hub's cache.
    pinned : str, optional
        What it is called on the Hub with its commit, ``org/name@commit``.
    absent : mapping of str to RemoteFile
        The files of its folder that are not here, by their names there.
    by_name : bool
        Whether it was named as the Hub does, and not by its path, so that the Hub may be asked.
    revision : str, optional
        The revision that was asked for of a path, which has none.
    warnings : tuple of Problem
        What is odd about the reference.
    """

    path: str
    pinned: str | None = None
    absent: Mapping[str, RemoteFile] = field(default_factory=lambda: MappingProxyType({}))
    by_name: bool = False
    revision: str | None = None
    warnings: tuple[Problem, ...] = ()

    @property
    def identity(self) -> str:
        """What tells two models apart: the real path, and a revision that nobody knows."""
        path = os.path.realpath(self.path)
        return path if self.revision is None else f"{path}@{self.revision}"


def parse_reference(text: str) -> str | Problem:
    """Return a reference as it can be resolved, or why it cannot.

    Parameters
    ----------
    text : str
        A path or a name, also with adapters: ``model+adapter``.
    """
    if not text.strip():
        return Problem("wrong-value", "an empty model reference", advice="name the model's folder")
    if os.path.exists(os.path.expanduser(text)):
        return text  # whatever letters it has
    if page := _PAGE.fullmatch(text):
        revision = f"@{page['revision']}" if page["revision"] else ""
        inside = f"/{page['inside']}" if page["inside"] else ""
        message = f"`{text}` is a page of the Hub, and no folder of a model"
        advice = f"write its name, `{page['name']}{revision}{inside}`"
        return Problem(UNSUPPORTED, message, advice=advice)
    if stores.is_address(text):
        return text
    if "://" in text and not text.startswith("hf://"):
        message = f"not supported: such an address of a model (`{text}`)"
        advice = "write s3://, gs://, https:// or hf://; or download it, and name its folder"
        return Problem(UNSUPPORTED, message, advice=advice)
    return text


def with_revision(name: str, revision: str) -> str:
    """Return the short form of a name and a revision that are written apart."""
    return f"{name}@{revision if revision.startswith('refs/') else quote(revision, safe='')}"


def split_adapters(
    reference: str, folders: tuple[str, ...]
) -> tuple[str, tuple[tuple[str, float], ...]]:
    """Return the model of a reference, and its adapters with what each is multiplied by.

    Parameters
    ----------
    reference : str
        ``model+adapter+other=0.5``. What is there under the whole name is a model, and a last part
        that is there with its ``=`` is an adapter.
    folders : tuple of str
        Where a relative path may start.
    """

    def is_there(name: str) -> bool:
        return any(map(os.path.exists, _places(name, folders)))

    def weighted(name: str) -> tuple[str, float]:
        path, sign, weight = name.rpartition("=")
        is_weight = sign and _NUMBER.fullmatch(weight) and not is_there(name)
        return (path, float(weight)) if is_weight else (name, 1.0)

    parts = reference.split("+")
    if len(parts) == 1 or len(parts) > _MOST_PARTS:
        return reference, ()
    found: list[tuple[str, float]] = []
    while parts:
        # The longest name that is there: a `+` may be part of it.
        names = ("+".join(parts[:count]) for count in range(len(parts), 1, -1))
        each = (weighted(name) if found else (name, 1.0) for name in names)
        name, weight = next((one for one in each if is_there(one[0])), (parts[0], 1.0))
        count = name.count("+") + 1
        found.append((name, weight) if count > 1 or not found else weighted(parts[0]))
        parts = parts[count:]
    return found[0][0], tuple(found[1:])


def resolve_reference(reference: str, folders: tuple[str, ...]) -> Located | Problem:
    """Find the file or directory that a reference names.

    Parameters
    ----------
    reference : str
        As the recipe writes it: a path, where ``~`` is the home directory; or ``org/name``,
        ``org/name@revision``, ``org/name/folder``, each also behind ``hf://``; or the address of a
        folder or a file, ``s3://``, ``gs://`` or ``https://``.
    folders : tuple of str
        Where a relative path may start, in order: the working directory, the recipe's folder.

    Returns
    -------
    Located or Problem
        Where it lies, or a problem that names every place tried.
    """
    parsed = parse_reference(reference)
    if isinstance(parsed, Problem):
        return parsed
    if stores.is_address(reference):
        return _in_store(reference)
    places = _places(reference, folders)
    for place in filter(os.path.exists, places):
        return _local(place)
    named = HubName.parse(reference)
    is_folder = named is not None and named.name.partition("/")[0].lower() in FOLDERS
    if named is not None and (named.is_address or not is_folder):
        return _without_revision(reference, named, folders) or _on_hub(
            reference, named, [] if named.is_address else places
        )
    base, _, revision = reference.rpartition("@")
    for place in filter(os.path.exists, _places(base, folders)):
        return _with_no_revision(reference, place, revision)
    return _not_found(reference, places, "", _NAME_ONE)


def _without_revision(reference: str, named: HubName, folders: tuple[str, ...]) -> Located | None:
    """Return the path that is what a name says without its revision, if it is there."""
    if named.revision is None or named.is_address:
        return None
    path = f"{named.name}/{named.inside}".rstrip("/")
    places = filter(os.path.exists, _places(path, folders))
    found = (_with_no_revision(reference, place, named.revision or "") for place in places)
    return next(found, None)


def _with_no_revision(reference: str, place: str, revision: str) -> Located:
    message = f"`{reference}` is taken to be a path, which has no revisions"
    advice = "to name the model on the Hub, write `hf://` before it"
    warning = Problem("no-effect", message, file=place, advice=advice)
    return Located(place, revision=revision, warnings=(warning,))


def _places(path: str, folders: tuple[str, ...]) -> list[str]:
    if not path:
        return []
    path = os.path.expanduser(path)
    return list(dict.fromkeys(os.path.abspath(os.path.join(folder, path)) for folder in folders))


def _local(path: str) -> Located:
    """Return where a path leads; in the Hub's cache, which model and commit that is."""
    folder, name = os.path.split(path)
    if name.startswith("models--") and os.path.isdir(os.path.join(path, "snapshots")):
        named = HubName.parse(name.removeprefix("models--").replace("--", "/", 1))
        # The cache's folder of a model stands for what the cache has as its main branch.
        with suppress(OSError):
            if named and os.path.samefile(folder, cache_folder()):
                commit = find_cached(named.name)
                if commit and os.path.isdir(commit.folder):
                    return Located(commit.folder, commit.label_of(""))
    found = Commit.of_path(path)
    return Located(path, None if found is None else found[0].label_of(found[1]))


def error_of(problem: Problem) -> Exception:
    """Return the exception for a reference that leads nowhere, where there is no report."""
    if problem.code == "missing-model":
        return FileNotFoundError(errno.ENOENT, str(problem))
    kind = UnsupportedError if problem.code == UNSUPPORTED else RemoteError
    return kind(problem.message, file=problem.file, found=problem.found, advice=problem.advice)


def _in_store(address: str) -> Located | Problem:
    """Fetch the small files that planning reads; tell which others are not here."""
    try:
        model = stores.find_model(address)
        planned = {name: file for name, file in model.files.items() if _is_planned(name, "")}
        stores.fetch_small(model.folder, planned)
    except (RemoteError, InputChangedError) as error:
        return error.as_problem("unreachable-model")
    absent = {
        name: file
        for name, file in model.files.items()
        if not os.path.isfile(os.path.join(model.folder, name))
    }
    path = os.path.join(model.folder, model.inside) if model.inside else model.folder
    return Located(path, absent=MappingProxyType(absent))


# The Hub.


def _on_hub(reference: str, named: HubName, places: list[str]) -> Located | Problem:
    commit = find_cached(named.name, named.revision)
    if commit is not None and not _lacking(commit, named.inside):
        return _in_cache(commit, named.inside)
    reason = hub.why_not()
    if reason is not None:
        return _without_hub(reference, named, commit, places, *reason)
    found, revision = commit, named.revision
    try:
        if commit is not None:
            revision = commit.hash  # the name stays that commit, whatever it has become by now
        found = commit or hub.find_commit(named.name, named.revision)
        return _at_hub(found, named, revision)
    except RemoteError as error:
        # Of a commit that is known the weights are the same: what is lacking is beside them.
        if commit is not None and not _lacking(commit, named.inside, weights_only=True):
            return _in_cache(commit, named.inside, str(error))
        if places and found is None:
            error.message = f"there is no path `{reference}`, and {error.message}"
        return error.as_problem()


def _without_hub(
    reference: str,
    named: HubName,
    commit: Commit | None,
    places: list[str],
    why: str,
    advice: str,
) -> Located | Problem:
    """Return what the cache has, though not all, if the weights are there."""
    if commit is None:
        others = [f"`{named.name}@{commit}`" for commit in cached_commits(named.name)[:_SHOWN]]
        but = f" but {', '.join(others)}" if others else ""
        seen = f", the Hub's cache `{cache_folder()}` has no `{named}`{but}, and {why}"
        return _not_found(reference, places, seen, f"{advice}; or {_NAME_ONE}")
    lacking = _lacking(commit, named.inside, weights_only=True)
    if not lacking:
        return _in_cache(commit, named.inside, why)
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    message = f"the Hub's cache lacks files of `{named}`, and {why}"
    found = f"no `{lacking[0]}`{more}"
    folder = commit.folder
    return Problem("unreachable-model", message, file=folder, found=found, advice=advice)


def _in_cache(commit: Commit, inside: str, why: str | None = None) -> Located:
    warnings = () if why is None else (_may_lack(commit, why),)
    return Located(commit.path_of(inside), commit.label_of(inside), by_name=True, warnings=warnings)


def _may_lack(commit: Commit, why: str) -> Problem:
    message = "the Hub's cache may lack files beside the weights, and they were not fetched"
    return Problem("unreachable-model", message, file=commit.folder, found=why)


def _lacking(commit: Commit, inside: str, *, weights_only: bool = False) -> list[str]:
    """Return the files that a commit should have of a model, and has not.

    That are the weights; and what planning reads, as far as the cache knows what there is, or else
    a config and a tokenizer.
    """
    path = commit.path_of(inside)
    try:
        weights = _core.weight_files(path, ())
    except UnsupportedError:
        return []  # which is told when it is opened
    except (CheckpointError, OSError):
        return [inside or "model.safetensors"]
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    lacking = [name for name in weights if not os.path.isfile(os.path.join(folder, name))]
    files, prefix = commit.files(), _prefix(inside, is_file=folder != path)
    # A lone file of another name may be another format of what the model has under the usual one.
    if folder == path and not any(map(_is_usual, os.listdir(folder))):
        lacking += [
            name
            for name in files or ()
            if name.startswith(prefix) and _is_usual(name.removeprefix(prefix))
        ]
        if files is None and not weights_only:
            return ["model.safetensors"]
    if weights_only or lacking:
        return lacking
    if files is not None:
        wanted = (name for name in files if _is_planned(name, prefix))
        return [name for name in wanted if not os.path.isfile(commit.path_of(name))]
    here = frozenset(os.listdir(folder))
    wanted_sets = {"config.json": {"config.json"}, "tokenizer.json": set(TOKENIZER_FILES)}
    return [name for name, any_of in wanted_sets.items() if not here & any_of]


def _is_usual(name: str) -> bool:
    """Tell whether weights are looked for under that name first."""
    return name in _USUAL or (name.endswith(_INDEX) and "/" not in name)


def _prefix(inside: str, *, is_file: bool) -> str:
    """Return what the names of the files in a model's folder begin with."""
    folder = inside.rpartition("/")[0] if is_file else inside
    return f"{folder}/" if folder else ""


def _is_planned(name: str, prefix: str) -> bool:
    """Tell whether planning reads a file of that folder of a model."""
    rest = name.removeprefix(prefix)
    is_index = rest.endswith(_INDEX) and "/" not in rest
    return name.startswith(prefix) and (rest in _PLANNED or is_index or is_of_tokenizer(rest))


def _at_hub(commit: Commit, named: HubName, revision: str | None) -> Located:
    """Fetch the small files that planning reads; tell which others are not here.

    `revision` is what the cache is told that the commit is.
    """
    listed, inside = hub.list_files(commit), named.inside
    prefix = _prefix(inside, is_file=inside in listed)
    in_folder = [name for name in listed if name.startswith(prefix)]
    if not in_folder:
        raise RemoteError(
            f"`{named}` has no `{inside}`" if inside else f"`{named}` has no files",
            file=commit.label_of(""),
            found=", ".join(f"`{name}`" for name in sorted(listed)[:_SHOWN]) or None,
            advice="name a folder or a file that it has",
        )
    weights = [name for name in in_folder if name.endswith(stores.WEIGHTS)]
    if weights and not any("/" not in name.removeprefix(prefix) for name in weights):
        folders = sorted({name.rpartition("/")[0] for name in weights})
        raise RemoteError(
            f"`{named}` has weights only in folders",
            file=commit.label_of(inside),
            found=", ".join(f"`{folder}`" for folder in folders[:_SHOWN]),
            advice=f"name one of them: `{named}/{folders[0]}`",
        )
    planned = [name for name in in_folder if _is_planned(name, prefix)]
    hub.fetch_small(commit, planned, revision)
    absent = {
        name.removeprefix(prefix): hub.file_of(commit, name, listed[name].size, listed[name].etag)
        for name in in_folder
        if not os.path.isfile(commit.path_of(name))
    }
    return Located(
        commit.path_of(inside), commit.label_of(inside), MappingProxyType(absent), by_name=True
    )


def fetch_beside(located: Located, is_wanted: Callable[[str], bool]) -> list[Problem]:
    """Fetch files beside the weights that are not here; return what is odd.

    Parameters
    ----------
    located : Located
        The model.
    is_wanted : callable
        Tells of a file's name, with ``/``, whether it is.

    Raises
    ------
    RemoteError
        If one cannot be had.
    """
    wanted_of_store = {
        name: file
        for name, file in located.absent.items()
        if stores.is_address(file.label) and is_wanted(name)
    }
    if wanted_of_store:
        is_folder = os.path.isdir(located.path)
        folder = located.path if is_folder else os.path.dirname(located.path)
        stores.fetch_small(folder, wanted_of_store)
        return []
    found = Commit.of_label(located.pinned or "") if located.by_name else None
    if found is None or located.warnings:  # which say so already
        return []
    commit, inside = found
    files = commit.files()
    reason = hub.why_not()
    if files is None and reason is not None:
        return [_may_lack(commit, reason[0])]
    names = hub.list_files(commit) if files is None else files
    prefix = _prefix(inside, is_file=os.path.isfile(located.path) or inside in names)
    in_folder = (name for name in names if name.startswith(prefix))
    wanted = [name for name in in_folder if is_wanted(name.removeprefix(prefix))]
    lacking = [name for name in wanted if not os.path.isfile(commit.path_of(name))]
    large = [name for name in lacking if names[name].size > hub.MOST_SMALL]
    lacking = [name for name in lacking if name not in large]
    if lacking and reason is not None:
        return [_may_lack(commit, reason[0])]
    if lacking or files is None:
        hub.fetch_small(commit, lacking or wanted[:1], commit.hash)
    return [_too_large(commit, name) for name in large]


def _too_large(commit: Commit, name: str) -> Problem:
    message = "a large file beside the weights is not fetched, and the output will lack it"
    advice = "put it into the output, if it is of use there"
    return Problem("odd-checkpoint", message, file=commit.label_of(name), advice=advice)


def remote_file(file: Mapping[str, object]) -> RemoteFile:
    """Return the remote file that a plan has as one of its files.

    Raises
    ------
    RemoteError
        If it is none that can be fetched.
    """
    remote = file["remote"]
    label = str(remote["label"]) if isinstance(remote, Mapping) else ""
    etag, size = str(remote["etag"]) if isinstance(remote, Mapping) else "", int(str(file["size"]))
    if stores.is_address(label):
        return stores.file_of(label, size, etag)
    found = Commit.of_label(label)
    if found is None:
        raise RemoteError("the plan names a file that cannot be fetched", file=label)
    return hub.file_of(*found, size, etag)


# Headers.


def open_located(located: Located) -> Checkpoint:
    """Open a checkpoint from its headers, of which those of files that are not here are fetched.

    Raises
    ------
    CheckpointError
        If a header or the index is broken.
    UnsupportedError
        If the weights are quantised, or in another format.
    RemoteError
        If a header cannot be had.
    """
    if not located.absent:
        return _core.open_checkpoint(located.path)
    files = {name: file for name, file in located.absent.items() if "/" not in name}
    rows = [(name, file.size, file.label, file.etag) for name, file in files.items()]
    unread = [(*row, b"", None) for row in rows]
    wanted = [name for name in _core.weight_files(located.path, unread) if name in files]
    starts = dict(zip(wanted, _starts(tuple(files[name] for name in wanted)), strict=True))
    return _core.open_checkpoint(
        located.path, [(*row, *starts.get(row[0], (b"", None))) for row in rows]
    )


@lru_cache(maxsize=4)  # a sweep opens the same models often
def _starts(files: tuple[RemoteFile, ...]) -> list[tuple[bytes, _Rest | None]]:
    """Return the first bytes of files, up to the ends of their headers, or what reads on."""
    return side_by_side(_Starts(), files)


class _Starts:
    """Fetches the first bytes of files, up to the ends of their headers."""

    def __init__(self) -> None:
        self._left = _MOST_HEADERS
        self._lock = Lock()

    def spend(self, count: int) -> bool:
        """Take so many bytes of what the headers of all files may have; tell whether they may."""
        with self._lock:
            self._left -= count
            return self._left >= 0

    def __call__(self, file: RemoteFile) -> tuple[bytes, _Rest | None]:
        start = file.read(0, min(file.size, _FIRST))
        if start.startswith(_ZIP):  # a file of torch, whose tensors are told at its end
            end = max(file.size - _FIRST, 0)
            return start, _Rest(file, ((0, start), (end, file.read(end, file.size))), self.spend)
        end = _LENGTH + int.from_bytes(start[:_LENGTH], "little")
        may = self.spend(end - _LENGTH)
        # What is wrong with a length is told when the header is read; no bytes are fetched for it.
        if len(start) < end <= min(file.size, _LENGTH + _MOST_HEADERS):
            if not may:
                raise _too_much(file)
            start += file.read(len(start), end)
        return start[:end], None


class _Rest:
    """Reads ranges of a file of torch. Nearly all that is asked for is at its two ends.

    The others are kept, as headers are: who opens the model again does not fetch them again, and
    they count once.
    """

    def __init__(
        self,
        file: RemoteFile,
        known: tuple[tuple[int, bytes], ...],
        spend: Callable[[int], bool],
    ) -> None:
        self._file = file
        self._known = known
        self._spend = spend
        self._others: dict[tuple[int, int], bytes] = {}

    def __call__(self, start: int, stop: int) -> bytes:
        for at, known in self._known:
            if at <= start and stop <= at + len(known):
                return known[start - at : stop - at]
        if (start, stop) not in self._others:
            if not self._spend(stop - start):
                raise _too_much(self._file)
            self._others[start, stop] = self._file.read(start, stop)
        return self._others[start, stop]


def _too_much(file: RemoteFile) -> CheckpointError:
    return CheckpointError(
        "the headers of the model's files are larger than any model's",
        file=file.label,
        expected=f"at most {format_size(_MOST_HEADERS)} in all",
        advice="get the model from where it was first published",
    )


# Nothing found.


def _not_found(reference: str, places: list[str], seen: str, advice: str) -> Problem:
    tried = " or ".join(f"`{place}`" for place in places)
    there = f": there is no {tried}" if tried else ""
    message = f"no model `{reference}`{there}{seen}"
    for place in filter(os.path.islink, places):
        found = f"a link to `{printable(os.readlink(place))}`"
        advice = "put the model where the link leads, or name where it is"
        return Problem("missing-model", message, found=found, advice=advice)
    if meant := _meant(reference, places):
        advice = f"did you mean `{meant}`? If not, {advice}"
    return Problem("missing-model", message, advice=advice)


def _meant(reference: str, places: list[str]) -> str | None:
    """Return the reference to a file or folder that is there, of almost the same name."""
    for place in places:
        folder, name = os.path.split(place)
        with suppress(OSError):
            for found in near(name, os.listdir(folder), 1):
                return printable(os.path.join(os.path.dirname(reference), found))
    return None
