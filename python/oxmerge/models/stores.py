"""Models in object stores and on web servers: ``s3://``, ``gs://`` and ``https://`` addresses.

The `obstore` library talks to stores, and asks again for what passes; credentials and endpoints are
those of the environment. It is imported here alone, and only when such a model is named. Stores
list what they have. A web server is asked for the files that a model may have (`remote.py`), and so
is a store that refuses to list them.

Weights are not kept. The small files beside them are, in a folder of the user's cache that is
called by what the store says of all files of the model: so they are never those of another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from importlib.util import find_spec
from urllib.parse import SplitResult, quote, urlsplit

from oxmerge.errors import InputChangedError, RemoteError
from oxmerge.models.remote import at_address, is_server, look
from oxmerge.models.side_by_side import side_by_side
from oxmerge.models.vocabularies import TOKENIZER_FILES
from oxmerge.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from obstore import GetOptions

    from oxmerge.models.remote import RemoteFile

__all__ = [
    "WEIGHTS",
    "StoredModel",
    "fetch_adapter",
    "fetch_small",
    "file_of",
    "find_model",
    "is_address",
]

#: Seconds to wait for a connection, for a byte, and for one that is asked for again and again.
_CONNECT, _PATIENCE, _LONGEST = 10, 30, 180
#: Bytes of a piece.
_PIECE = 1 << 20
#: Files that a message shows; files of a model's folder, each some 500 bytes in memory; bytes of a
#: small file.
_SHOWN = 8
_MOST_FILES = 100_000
_MOST_SMALL = 256 << 20
#: Larger than the index of any model: parsing it takes a multiple of that.
_MOST_INDEX = 16 << 20
_LISTING = ("s3", "s3a", "gs")
_WEB = ("https", "http")
#: Settings of the environment that are sent as they are.
_SENT = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION",
    "AWS_DEFAULT_REGION",
)  # fmt: skip
#: What names another server than Amazon's, in the order in which the library takes them.
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
#: Statuses of what is not there.
_ABSENT = (404, 410)
#: The status of what may not be read; of what is not there too, where nobody is told what there is.
_FORBIDDEN = 403
#: Weights that a model on a web server may have, in the order in which they are looked for.
_WEIGHTS = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json",
    "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip
#: How the names of files of weights end.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
#: Files that a model on a web server may have beside its weights.
_BESIDE = (
    *TOKENIZER_FILES, "config.json", "adapter_config.json", "generation_config.json", "README.md",
    "LICENSE",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def is_address(reference: str) -> bool:
    """Tell whether a reference is the address of a model in a store, or on a web server."""
    scheme, separator, _ = reference.partition("://")
    return bool(separator) and scheme in (*_LISTING, *_WEB)


def file_of(address: str, size: int, etag: str) -> RemoteFile:
    """Return the file at an address, which is known."""
    is_listed = address.partition("://")[0] in _LISTING
    return StoreFile(address, size, etag) if is_listed else at_address(address, size, etag)


@dataclass(frozen=True, slots=True)
class StoreFile:
    """A `RemoteFile` in a store.

    Attributes
    ----------
    label : str
        Its address.
    size : int
        Bytes.
    etag : str
        What the store calls its content; if it has no name for that, when it was last changed.
    sha256 : None
        Stores do not tell it.
    """

    label: str
    size: int
    etag: str
    sha256: str | None = field(default=None, init=False)

    def read(self, start: int, stop: int) -> bytes:
        """Return a range of its bytes; see `RemoteFile`."""
        return b"".join(self.pieces(start, stop))

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Return a range of its bytes, piece by piece; see `RemoteFile`."""
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"no bytes {start} to {stop} of {self.size} (`{self.label}`)")
        if start == stop:
            return
        import obstore  # noqa: PLC0415 - only when a store is asked

        store, path = store_of(self.label)
        options: GetOptions = {"range": (start, stop)}
        if self.etag.startswith('"'):  # no other can be asked for
            options["if_match"] = self.etag
        left = stop - start
        with _told(self.label):
            answer = obstore.get(store, path, options=options)
            size, etag = answer.meta["size"], _etag_of(answer.meta)
            if (size, etag) != (self.size, self.etag):
                raise InputChangedError(
                    _CHANGED,
                    file=self.label,
                    expected=f"{self.size} bytes, ETag {self.etag}",
                    found=f"{size} bytes, ETag {etag}",
                    advice=_AGAIN,
                )
            for piece in answer.stream(min_chunk_size=_PIECE):
                left -= len(piece)
                if left < 0:
                    break
                yield bytes(piece)
        if left != 0:
            raise RemoteError(
                f"bytes {start} to {stop} did not come as they were asked for",
                file=self.label,
                found="more" if left < 0 else f"{left} bytes less",
                advice="start again; if it stays so, tell those who run the server",
            )


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in a store.

    Attributes
    ----------
    folder : str
        Where its small files are here.
    inside : str
        The file that was named, if it was not the whole folder.
    files : mapping of str to RemoteFile
        Its files, by their names in its folder, with ``/``.
    """

    folder: str
    inside: str
    files: Mapping[str, RemoteFile]


def find_model(address: str) -> StoredModel:
    """Return what a store has at an address, of a folder or of a file with weights.

    Raises
    ------
    RemoteError
        If there is no model, it cannot be had, or `obstore` is not installed.
    """
    parts = _parts_of(address)
    if parts.scheme in _LISTING and find_spec("obstore") is None:
        raise RemoteError(
            "to read from a store needs the `obstore` library",
            file=address,
            advice="install it: `pip install obstore`",
        )
    if parts.query or parts.fragment:
        raise RemoteError(
            "an address with a query is not supported: it may expire, and would be in the card",
            file=address,
            advice="name the folder or the file alone, with credentials in the environment",
        )
    _, at, host = parts.netloc.rpartition("@")
    if at:
        raise RemoteError(
            "an address with a password is not supported: it would be in the card",
            file=f"{parts.scheme}://…@{host}",
            advice="name it without, with credentials in the environment",
        )
    whole = address.rstrip("/")
    is_file = whole.endswith((*WEIGHTS, ".index.json"))
    folder, inside = whole.rsplit("/", 1) if is_file else (whole, "")
    find = _listed_or_asked_for if parts.scheme in _LISTING else _asked_for
    files = {name: file for name, file in find(folder, inside).items() if _is_within(name)}
    if not any(name.endswith(WEIGHTS) for name in files):
        raise RemoteError(
            "there is no model, neither in safetensors nor in files of torch",
            file=address,
            found=", ".join(f"`{name}`" for name in sorted(files)[:_SHOWN]) or "no files",
            advice="name the folder of a model, or a file of its weights",
        )
    told = [whole, [(name, file.size, file.etag) for name, file in sorted(files.items())]]
    name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    return StoredModel(os.path.join(_cache(), name), inside, files)


def _parts_of(address: str) -> SplitResult:
    """Return the parts of an address, of a server or bucket that can be one."""
    try:
        parts = urlsplit(address)
        found = None if parts.hostname and parts.port != 0 else "no host"
    except ValueError as error:  # brackets, or a port that is no number
        found = str(error)
    if found is not None:
        advice = "write it as https://host/folder, or s3://bucket/folder"
        message = "the address is none that a server or a store can have"
        raise RemoteError(message, file=address, found=found, advice=advice)
    return parts


def fetch_small(folder: str, files: Mapping[str, RemoteFile]) -> None:
    """Fetch small files into a folder, unless they are there.

    Raises
    ------
    RemoteError
        If one cannot be had.
    """
    os.makedirs(folder, exist_ok=True)
    lacking = {
        path: file
        for name, file in files.items()
        if not _is_here(path := os.path.join(folder, name), file.size)
    }
    side_by_side(lambda each: _fetch(*each), lacking.items())


def _is_here(path: str, size: int) -> bool:
    """Tell whether a file is in the cache, whole: a power cut may have left less of it."""
    return os.path.isfile(path) and os.path.getsize(path) == size


def fetch_adapter(label: str, size: int, etag: str) -> str:
    """Fetch the weights of an adapter, which are read in any order, and return where they are.

    Raises
    ------
    RemoteError, InputChangedError
        If they cannot be had.
    """
    told = hashlib.sha256(json.dumps([label, size, etag]).encode()).hexdigest()[:32]
    path = os.path.join(_cache(), told, "adapter_model")
    if not _is_here(path, size):
        _fetch(path, file_of(label, size, etag), most=None)
    return path


def _fetch(path: str, file: RemoteFile, most: int | None = _MOST_SMALL) -> None:
    if most is not None and file.size > most:
        raise RemoteError(
            "a file beside the weights is too large for what it should be",
            file=file.label,
            expected=f"at most {format_size(most, binary=True)}",
            found=format_size(file.size, binary=True),
            advice="copy the model without it",
        )
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".oxmerge-", delete=False) as part:
        try:
            for piece in file.pieces(0, file.size):
                part.write(piece)
            part.flush()
            # Its size alone tells later runs that it is whole.
            os.fsync(part.fileno())
            part.close()
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise


def _cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "oxmerge", "stores")


def _is_within(name: str) -> bool:
    is_plain = not {"", ".", ".."} & set(name.split("/"))
    return is_plain and "\\" not in name and "\0" not in name


# What there is.


def listed(folder: str, *, most: int | None = _MOST_FILES) -> dict[str, RemoteFile]:
    """Return the files of a folder, as the store lists them; RemoteError if they are too many."""
    import obstore  # noqa: PLC0415 - only when a store is asked

    store, prefix = store_of(folder)
    files: dict[str, RemoteFile] = {}
    with _told(folder):
        for chunk in obstore.list(store, prefix or None):
            for meta in chunk:
                name = meta["path"].removeprefix(prefix).lstrip("/")
                files[name] = StoreFile(f"{folder}/{name}", meta["size"], _etag_of(meta))
            if most is not None and len(files) > most:
                raise RemoteError(
                    "too many files for a model",
                    file=folder,
                    expected=f"at most {most}",
                    advice="name the folder of one model",
                )
    return files


def _listed_or_asked_for(folder: str, inside: str) -> dict[str, RemoteFile]:
    """Return the files of a folder in a store: not everyone who may read them may list them."""
    try:
        return listed(folder)
    except _RefusedError:
        files, _ = _asked(folder, [inside] if inside else _WEIGHTS)
        if not files:
            raise
    return _asked_for(folder, inside)


def _asked_for(folder: str, inside: str) -> dict[str, RemoteFile]:
    """Return those files that a model may have which a web server or a store has."""
    first = [inside] if inside else _WEIGHTS
    files, refused = _asked(folder, [*first, *_BESIDE])
    if not any(name in files for name in first):
        _check_weights(folder, [name for name in first if name in refused], refused)
    index = next((name for name in first if name in files), None)
    index = index if index is not None and index.endswith(".json") else None
    if index is None:
        return files
    try:
        text = files[index].read(0, min(files[index].size, _MOST_INDEX))
        shards = set(json.loads(text)["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return files  # what is wrong with it is told when it is opened
    wanted = sorted(name for name in shards if isinstance(name, str) and _is_within(name))
    weights, refused = _asked(folder, wanted[:_MOST_FILES])
    _check_weights(folder, list(refused), refused)
    return files | weights


def _asked(folder: str, names: Iterable[str]) -> tuple[dict[str, RemoteFile], dict[str, int]]:
    """Return the files of a server that it gives, and the statuses of those that it refuses.

    One that is not there is neither.
    """
    in_store = folder.partition("://")[0] in _LISTING

    def ask(name: str) -> RemoteFile | int:
        return _look_in_store(f"{folder}/{name}") if in_store else look(f"{folder}/{quote(name)}")

    found = dict(zip(wanted := list(names), side_by_side(ask, wanted), strict=True))
    files: dict[str, RemoteFile] = {}
    refused: dict[str, int] = {}
    for name, each in found.items():
        if not isinstance(each, int):
            files[name] = each
        elif each not in _ABSENT:
            refused[name] = each
    return files, refused


def _look_in_store(label: str) -> StoreFile | int:
    """Return the file at an address, or the status with which a store refuses it."""
    import obstore  # noqa: PLC0415 - only when a store is asked

    store, path = store_of(label)
    try:
        with _told(label):
            meta = obstore.head(store, path)
    except InputChangedError:
        return _ABSENT[0]
    except _RefusedError:
        return _FORBIDDEN
    return StoreFile(label, meta["size"], _etag_of(meta))


def _check_weights(folder: str, names: Sequence[str], refused: Mapping[str, int]) -> None:
    """Raise RemoteError if the server refuses one of these files."""
    for name in names:
        raise RemoteError(
            "the server refuses the weights: they are not there, or may not be read",
            file=f"{folder}/{quote(name)}",
            found=f"status {refused[name]}",
            advice="check the address, and that the file is public; servers that do not say what "
            "they have refuse what is not there, too",
        )


def _etag_of(meta: Mapping[str, Any]) -> str:
    return str(meta["e_tag"] or meta["last_modified"])


def store_of(address: str) -> tuple[Any, str]:
    """Return the store that an address is in, and the path there."""
    parts = urlsplit(address)
    return _open(parts.scheme, parts.netloc), parts.path.strip("/")


@lru_cache(maxsize=16)
def _open(scheme: str, netloc: str) -> Any:  # noqa: ANN401 - of obstore
    from obstore.store import from_url  # noqa: PLC0415 - only when a store is asked

    root = f"{scheme}://{netloc}"
    settings: Mapping[str, str] = os.environ if scheme in {"s3", "s3a"} else {}
    endpoints = [name for name in _ENDPOINTS if name in settings]
    # With these the library panics.
    wrong = [name for name in endpoints if not is_server(settings[name])]
    wrong += [name for name in _SENT if not re.fullmatch("[!-~]*", settings.get(name, ""))]
    if wrong:
        raise RemoteError(
            f"the environment's {wrong[0]} cannot be used",
            file=root,
            advice="write an endpoint as https://host, keys and regions without spaces and line "
            "breaks; or unset it",
        )
    # Who sets an endpoint without TLS means it.
    plain = bool(endpoints) and settings[endpoints[0]].startswith("http://")
    owner = "GOOGLE" if scheme == "gs" else "AWS"
    asked = os.environ.get(f"{owner}_ALLOW_HTTP", "").lower() in {"1", "true", "yes", "on"}
    with _told(root):
        return from_url(
            root,
            client_options={
                "connect_timeout": timedelta(seconds=_CONNECT),
                "read_timeout": timedelta(seconds=_PATIENCE),
                "timeout": timedelta(hours=1),  # of a whole range, on however slow a line
                "allow_http": plain or asked,
            },
            retry_config={"retry_timeout": timedelta(seconds=_LONGEST)},
        )


# What goes wrong.


class _RefusedError(RemoteError):
    """The store gives that to others only, or lists keys that the library does not take."""


_CHANGED = "the file changed after it was first read"
_AGAIN = "start again: a new plan takes the file as it is now"
_NETWORK = "check the address, the network and the endpoint, and start again"
_CREDENTIALS = (
    "check the credentials in the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS "
    "and so on) and what they may read and list"
)
#: What the library says of a list that is refused, for which it has no error of its own.
_FORBIDDEN_LIST = "status code: 403"
#: What errors of the library are called after which files are asked for by name.
_REFUSALS = ("PermissionDeniedError", "InvalidPathError")
#: What errors of the library are called, and what to do.
_ADVICE = {
    "PermissionDeniedError": _CREDENTIALS,
    "UnauthenticatedError": _CREDENTIALS,
    "NotSupportedError": "a server that sends no ranges cannot be read: download the model",
    "UnknownConfigurationKeyError": "check the environment",
    "InvalidPathError": "check the address",
}


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Have errors of the library raised as those of oxmerge."""
    try:
        yield
    except FileNotFoundError:
        raise InputChangedError(_CHANGED, file=address, found="no file", advice=_AGAIN) from None
    except ValueError as error:  # what it says of a path that no store can have
        raise RemoteError(
            "the address is none that a store can have",
            file=address,
            found=str(error)[:300],
            advice=_ADVICE["InvalidPathError"],
        ) from None
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            raise
        kind = type(error).__name__
        if kind == "PreconditionError":
            raise InputChangedError(_CHANGED, file=address, advice=_AGAIN) from None
        found = str(error).partition("\n")[0].strip()[:300]
        if _FORBIDDEN_LIST in found:
            kind = "PermissionDeniedError"
        raise (_RefusedError if kind in _REFUSALS else RemoteError)(
            "the store cannot be read",
            file=address,
            found=found,
            advice=_ADVICE.get(kind, _NETWORK),
        ) from None
