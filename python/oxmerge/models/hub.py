"""Models on the Hub: which commit a name means, which files it has, and their bytes.

Only what is asked for is fetched: small files into the Hub's cache, headers by ranges, weights when
a merge needs them. All of it goes through the `huggingface_hub` library, which knows about tokens,
proxies, endpoints and the cache's layout. It is imported here and in `download.py` alone.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from functools import partial
from glob import escape
from importlib.util import find_spec
from urllib.parse import urlsplit

from oxmerge.errors import InputChangedError, RemoteError
from oxmerge.models.download import describe, stay_within
from oxmerge.models.hub_cache import (
    Commit,
    HubFile,
    cache_folder,
    cached_names,
    is_offline,
    is_size,
)
from oxmerge.models.remote import HttpFile, is_server, retried
from oxmerge.problems import did_you_mean, shorten
from oxmerge.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any

__all__ = [
    "endpoint",
    "fetch_small",
    "file_of",
    "find_commit",
    "find_library",
    "list_files",
    "told",
    "why_not",
]

INSTALL = "install the library: `pip install huggingface_hub`"
_LOG_IN = "sign in with `hf auth login`"
SIGN_IN = f"{_LOG_IN}, or set HF_TOKEN"
_ANOTHER_TOKEN = f"set HF_TOKEN anew, or {_LOG_IN}"
#: Small files that are fetched at a time; a small file is no larger.
_AT_ONCE = 8
MOST_SMALL = 256 << 20
_SECONDS = 30.0
_ENDPOINT = "https://huggingface.co"
_PORTS = {"https": 443, "http": 80}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def why_not() -> tuple[str, str] | None:
    """Return why the Hub cannot be asked here, and what to do; None if it can."""
    if is_offline():
        return "the Hub may not be asked", "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
    return find_library() or _cannot_ask()


def find_library() -> tuple[str, str] | None:
    """Return that the library is not there, and what to do; None if it is."""
    if find_spec("huggingface_hub") is None:
        return "to ask the Hub needs the `huggingface_hub` library", INSTALL
    return None


def _cannot_ask() -> tuple[str, str] | None:
    """Return what the environment says that no request can be made of, and what to do."""
    if not is_server(endpoint()):  # the library cannot even be imported with some
        message = f"HF_ENDPOINT is no address of a server (`{shorten(endpoint())}`)"
        return message, "write it as https://host, or unset it"
    from huggingface_hub import get_token  # noqa: PLC0415 - only when the Hub is asked

    try:
        token = get_token() or ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        return f"the token for the Hub cannot be read ({reason.lower()})", _ANOTHER_TOKEN
    if not (token.isascii() and token.isprintable()):
        return "the token for the Hub has letters that no token has", _ANOTHER_TOKEN
    return None


def endpoint() -> str:
    """Return the address of the Hub, or of its mirror."""
    return (os.environ.get("HF_ENDPOINT") or _ENDPOINT).rstrip("/")


def find_commit(name: str, revision: str | None) -> Commit:
    """Return the commit that a revision of a model is now, by the Hub.

    Raises
    ------
    RemoteError
        If there is no such model or revision, or it may not be had.
    """
    commit, files = _info(name, revision)
    _listed[commit] = files
    return commit


def list_files(commit: Commit) -> Mapping[str, HubFile]:
    """Return the files of a commit, by their names with ``/``."""
    if commit not in _listed:
        _listed[commit] = commit.files() or _info(commit.name, commit.hash)[1]
    return _listed[commit]


#: What commits have: that does not change, and a sweep asks often.
_listed: dict[Commit, Mapping[str, HubFile]] = {}


def _info(name: str, revision: str | None) -> tuple[Commit, Mapping[str, HubFile]]:
    from huggingface_hub import HfApi  # noqa: PLC0415 - only when the Hub is asked

    api = HfApi(endpoint=endpoint())
    ask = partial(api.model_info, name, revision=revision, files_metadata=True, timeout=_SECONDS)
    info = _asked(ask, name, revision)
    if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise RemoteError("the Hub tells no commit", file=name, found=str(info.sha)[:80])
    files = {file: found for file, found in map(_listed_file, info.siblings or ()) if found}
    return Commit(name, info.sha), files


def _listed_file(entry: Any) -> tuple[str, HubFile | None]:  # noqa: ANN401 - of the library
    """Return a file of a listing; None for one whose name or size cannot be."""
    name, size, etag = entry.rfilename, entry.size, entry.blob_id
    if entry.lfs is not None:
        size, etag = entry.lfs.size, entry.lfs.sha256
    is_within = isinstance(name, str) and not {"", ".", ".."} & set(name.split("/"))
    is_told = is_size(size) and isinstance(etag, str)
    if not is_within or not is_told or "\\" in name or "\0" in name:
        return str(name), None
    return name, HubFile(size, etag)


def file_of(commit: Commit, name: str, size: int, etag: str) -> HttpFile:
    """Return a file of a commit to be read by ranges.

    Parameters
    ----------
    commit : Commit
        The commit.
    name : str
        The file's name, with ``/``.
    size, etag
        As `list_files` tells them.
    """

    def locate() -> tuple[str, dict[str, str]]:
        return _locate(commit, name, size, etag)

    sha256 = etag if _SHA256.fullmatch(etag) else None
    return HttpFile(commit.label_of(name), size, etag, sha256, locate)


def _locate(commit: Commit, name: str, size: int, etag: str) -> tuple[str, dict[str, str]]:
    """Return where a file can be read now, and what to send there."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # noqa: PLC0415 - as above
    from huggingface_hub.utils import build_hf_headers  # noqa: PLC0415

    url = hf_hub_url(commit.name, name, revision=commit.hash, endpoint=endpoint())
    ask = partial(get_hf_file_metadata, url, timeout=_SECONDS, endpoint=endpoint())
    found = _asked(ask, commit.name, commit.hash, name)
    for what, expected, told in (
        ("size", size, found.size), ("ETag", etag, found.etag),
        ("commit", commit.hash, found.commit_hash),
    ):  # fmt: skip
        if told != expected:
            raise InputChangedError(
                "the Hub's listing and its files do not fit each other",
                file=commit.label_of(name),
                expected=f"{what} {expected}",
                found=f"{what} {told}",
                advice="start again; if it stays so, tell those who run the Hub or its mirror",
            )
    address: str = found.location
    # A token is for the Hub, and not for the store that it sends its readers to.
    return address, build_hf_headers() if _is_here(address) else {}


def _is_here(address: str) -> bool:
    """Tell whether an address is of the Hub's own server, however either is written."""
    return is_server(address) and _origin(address) == _origin(endpoint())


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def fetch_small(commit: Commit, names: Iterable[str], revision: str | None) -> None:
    """Fetch small files of a commit into the Hub's cache, which is told what the commit has.

    Parameters
    ----------
    commit : Commit
        The commit.
    names : iterable of str
        The files, with ``/``.
    revision : str, optional
        What the commit was named by: the cache is told that it is.

    Raises
    ------
    RemoteError
        If one cannot be had.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - as above

    listed, names = list_files(commit), list(names)
    for name in names:
        if listed[name].size > MOST_SMALL and not os.path.isfile(commit.path_of(name)):
            raise RemoteError(
                "a file beside the weights is too large for what it should be",
                file=commit.label_of(name),
                expected=f"at most {format_size(MOST_SMALL, binary=True)}",
                found=format_size(listed[name].size, binary=True),
                advice="download the model, remove the file, and name the folder",
            )

    def fetch(revision: str) -> str:
        ask = partial(
            snapshot_download, commit.name, revision=revision, cache_dir=cache_folder(),
            endpoint=endpoint(), etag_timeout=_SECONDS, max_workers=_AT_ONCE,
            allow_patterns=[escape(name) for name in names],
        )  # fmt: skip
        folder: str = _asked(ask, commit.name, revision)
        return folder

    stay_within()
    with _no_bars():
        # Also of a model that has weights alone.
        _asked(partial(os.makedirs, commit.folder, exist_ok=True), commit.name, revision)
        # By its name, so that the cache knows that; unless it is another commit by now.
        if os.path.basename(fetch(revision or "main")) != commit.hash:
            fetch(commit.hash)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Have the library show no progress: small files come at once."""
    from huggingface_hub import utils  # noqa: PLC0415 - as above

    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _asked(ask: Callable[[], Any], name: str, revision: str | None, file: str | None = None) -> Any:  # noqa: ANN401 - what the library returns
    """Return what the library returns; ask again for what passes, and tell of what does not."""
    try:
        return retried(ask)
    except Exception as error:
        if not _is_known(error):
            raise
        raise told(describe(error), name, revision, file) from error


def _is_known(error: Exception) -> bool:
    """Tell whether the library raises an error for what it has met, or for what it was sent."""
    modules = {each.__module__.partition(".")[0] for each in type(error).__mro__}
    return isinstance(error, (OSError, ValueError, LookupError, TypeError, RecursionError)) or any(
        each.startswith(("httpx", "huggingface_hub")) for each in modules
    )


def told(
    error: Mapping[str, Any], name: str, revision: str | None, file: str | None = None
) -> RemoteError:
    """Return the error for what `describe` says, in words for who wrote the recipe."""
    kinds, status = set(error["kinds"]), error["status"]
    if error["errno"] is not None and "TransportError" not in kinds:
        return RemoteError(
            "the Hub's cache cannot be used",
            file=cache_folder(),
            found=error["text"],
            advice="check its permissions and its disk; HF_HUB_CACHE names another folder",
        )
    # Of what is not there the Hub says 401 to those alone who sent no token.
    if status == 401 and not _is_anonymous():  # noqa: PLR2004 - unauthorised
        kinds.add(_NOT_TAKEN)
    what = name if revision is None else f"{name}@{revision}"
    words = {
        "name": name, "revision": revision, "file": file, "what": what, "endpoint": endpoint(),
        "sign_in": _sign_in(),
    }  # fmt: skip
    of_error = (each for each in _STORIES if kinds & set(each[0]) or status in each[1])
    _, _, message, advice = next(of_error, ((), (), "the Hub cannot be read", _NETWORK))
    meant = did_you_mean(name, cached_names()) if message == _NO_MODEL else None
    advice = f"{meant} If not, {advice}" if meant else advice
    return RemoteError(
        message.format(**words),
        file=what if file is None else f"{what}/{file}",
        found=f"{error['text']}" if status is None else f"status {status}: {error['text']}",
        advice=advice.format(**words),
    )


#: A kind of error for which the library has no name.
_NOT_TAKEN = "not taken"
_NO_MODEL = "the Hub has no model `{name}`, or it is private"
_SPELLING = "check how the name is spelt; for a private model, {sign_in}"
_NETWORK = "check the network, and start again: what is complete is kept"
#: What an error of the library is called, statuses that mean the same, what it says, what to do.
_STORIES: tuple[tuple[tuple[str, ...], tuple[int, ...], str, str], ...] = (
    (("GatedRepoError",), (), "`{name}` is given only to those who asked for it",
     "ask for access at {endpoint}/{name}, and {sign_in}"),
    (("DisabledRepoError",), (), "`{name}` is disabled on the Hub", "use another model"),
    (("RevisionNotFoundError",), (), "`{name}` has no revision `{revision}` on the Hub",
     "see {endpoint}/{name}/refs for its branches and tags"),
    (("LocalEntryNotFoundError", "TransportError"), (), "the Hub cannot be reached", _NETWORK),
    (("EntryNotFoundError",), (), "`{what}` has no file `{file}`", "start again"),
    ((_NOT_TAKEN,), (), "the Hub does not take the token", _ANOTHER_TOKEN),
    (("RepositoryNotFoundError",), (401,), _NO_MODEL, _SPELLING),
    (("OfflineModeIsEnabled",), (), "the Hub may not be asked",
     "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"),
    ((), (429,), "the Hub limits how often it may be asked", "wait some minutes, or {sign_in}"),
    ((), (403,), "the Hub does not give `{what}` with these rights",
     "check what the token may read, or {sign_in}"),
    ((), (404,), _NO_MODEL, _SPELLING),
    (("HFValidationError",), (), "`{name}` is no name that the Hub has", "check how it is spelt"),
    (("ValueError", "LookupError", "TypeError", "RecursionError"), (),
     "what answers at {endpoint} is not the Hub",
     "check HF_ENDPOINT, and whether the network first asks to sign in"),
)  # fmt: skip


def _sign_in() -> str:
    return SIGN_IN if _is_anonymous() else "check that the token is of an account that has it"


def _is_anonymous() -> bool:
    from huggingface_hub import get_token  # noqa: PLC0415 - as above

    return get_token() is None
