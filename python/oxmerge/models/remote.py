"""Files that are somewhere else, read by ranges of bytes.

Planning reads headers so, and a merge that keeps nothing on the disk reads weights so. What is read
is pinned: a range that is not the one asked for, or not of the same file, is never taken.

Servers are asked by `urllib3`, whose answers cost little more than their bytes do. It is imported
here alone, and only when a server is asked.
"""

from __future__ import annotations

import importlib
import os
import random
import re
import threading
import time
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Protocol
from urllib.parse import unquote, urlsplit

from oxmerge.errors import InputChangedError, RemoteError
from oxmerge.models.download import cause_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from typing import Any

__all__ = ["HttpFile", "RemoteFile", "at_address", "is_server", "look", "retried"]

#: How often a range is asked for in vain before that is an error; with fewer bytes than these an
#: answer was in vain. And how often other questions are asked, when little is lost yet.
_ATTEMPTS, _PROGRESS = 10, 64 << 10
_QUESTIONS = 6
#: Seconds to wait before asking again: first, at most, and at most if the server says how long; for
#: what takes longer nobody waits.
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_ASKED = 0.5, 8.0, 60.0
#: Seconds without a connection, and without an answer, or a byte of it.
_CONNECT, _PATIENCE = 10.0, 30.0
#: Connections to a server that are kept for the next request; bytes of a piece.
_KEPT = 8
_PIECE = 1 << 20
#: How often a server may name another address.
_REDIRECTS = 5
#: The status of those who ask too often, and statuses that another attempt may mend.
_LIMITED = 429
_PASSING = frozenset((408, 425, _LIMITED, 500, 502, 503, 504))
#: Statuses of a signed address that is no longer taken.
_EXPIRED = frozenset((400, 401, 403, 404, 410))
_NETWORK = "check the network, and start again: what is complete is kept"
#: How long to wait, as `Retry-After` says it, and as `RateLimit` does: `"api";r=0;t=55`.
_SECONDS_TOLD = re.compile(r"(?:^|;\s*t=)(\d{1,6})(?=$|;)")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


class RemoteFile(Protocol):
    """A file that is read over a network: of the Hub, or of an object store.

    Attributes
    ----------
    label : str
        What messages call it, such as ``org/name@commit/model.safetensors``. No two files have
        the same label.
    size : int
        Bytes.
    etag : str
        What the server calls its content.
    sha256 : str, optional
        The SHA-256 of its bytes, in hexadecimal, if the server told it.
    """

    @property
    def label(self) -> str: ...  # noqa: D102 - above
    @property
    def size(self) -> int: ...  # noqa: D102 - above
    @property
    def etag(self) -> str: ...  # noqa: D102 - above
    @property
    def sha256(self) -> str | None: ...  # noqa: D102 - above

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`, all of them.

        Any number of threads may read at once.

        Raises
        ------
        RemoteError
            If they cannot be had: with the file, the range, what the server said, and what to do.
        InputChangedError
            If the file is no longer the one that this describes.
        ValueError
            If the range does not lie within the file.
        """
        ...

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield what `read` returns piece by piece, as it comes: so none of it need be held."""
        ...


class _Now:
    """Where a file can be read at the moment, and what it was when it was first read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._address: tuple[str, Mapping[str, str]] | None = None
        self._tag: list[str | None] = []

    def address(
        self, locate: Callable[[], tuple[str, Mapping[str, str]]]
    ) -> tuple[str, Mapping[str, str], bool]:
        """Return the address, the headers to send there, and whether it was found just now."""
        with self._lock:
            is_new = self._address is None
            if self._address is None:
                self._address = locate()
            return (*self._address, is_new)

    def forget(self, address: str) -> None:
        """Have the next one who asks find an address anew, if it is still that one."""
        with self._lock:
            if self._address is not None and self._address[0] == address:
                self._address = None

    def first_tag(self, tag: str | None) -> str | None:
        """Return the tag of the first answer, which is this one if there was none."""
        with self._lock:
            self._tag = self._tag or [tag]
            return self._tag[0]


@dataclass(frozen=True)
class HttpFile:
    """A `RemoteFile` behind an address.

    Attributes
    ----------
    label, size, etag, sha256
        As in `RemoteFile`.
    locate : callable
        Returns an address of the file, and the headers to send there. It is asked again when the
        server does not take the address any more, as signed ones expire.
    tag : str, optional
        What the server there calls its content, if that is known: that of the Hub's files may be
        another one than `etag`. Unless it is, the first answer says it.
    """

    label: str
    size: int
    etag: str
    sha256: str | None
    locate: Callable[[], tuple[str, Mapping[str, str]]] = field(repr=False, compare=False)
    tag: str | None = None
    _now: _Now = field(default_factory=_Now, repr=False, compare=False)

    def read(self, start: int, stop: int) -> bytes:
        """Return a range of its bytes; see `RemoteFile`."""
        return b"".join(self.pieces(start, stop))

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield a range of its bytes, piece by piece; see `RemoteFile`."""
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"no bytes {start} to {stop} of {self.size} (`{self.label}`)")
        at, attempt = start, 0
        while at < stop:
            before, answer = at, self._ask(at, stop)
            try:
                while True:
                    piece = next(answer)
                    at += len(piece)
                    yield piece
            except StopIteration as end:
                failure: _Failure | None = end.value
            if failure is None:
                continue
            attempt = 0 if at - before >= _PROGRESS else attempt + 1
            if attempt == _ATTEMPTS or not failure.passes:
                raise self._error(failure, start, stop)
            failure.wait(attempt)

    def _ask(self, start: int, stop: int) -> Generator[bytes, None, _Failure | None]:
        """Yield what one request gives of a range; return why it did not give all."""
        address, headers, is_new = self._now.address(self.locate)
        _check_library(address)
        from urllib3.exceptions import HTTPError  # noqa: PLC0415 - only when a server is asked

        asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            answer = ask("GET", address, asked)
        except HTTPError as error:
            return _of_transport(error)
        try:
            if answer.status in _EXPIRED and not is_new:
                self._now.forget(address)
                return _Failure("the address has expired", after=0)
            if answer.status != 206:  # noqa: PLR2004 - partial content
                return _of_status(answer.status, answer.reason, answer.headers)
            self._check(answer, start, stop)
            wanted = stop - start
            for piece in answer.stream(_PIECE, decode_content=False):
                yield piece[:wanted]
                wanted -= len(piece)
                if wanted < 0:
                    return _Failure("more bytes came than were asked for", passes=False)
        except HTTPError as error:
            return _of_transport(error)
        finally:
            answer.close()  # which keeps the connection, if all of the answer was read
        return None if wanted == 0 else _Failure(f"{wanted} bytes did not come")

    def _check(self, answer: Any, start: int, stop: int) -> None:  # noqa: ANN401 - of urllib3
        """Raise InputChangedError if an answer is of another file, or of another range."""
        told = answer.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(told)
        asked = f"bytes {start}-{stop - 1}/{self.size}"
        if found is None or told != asked:
            raise self._changed("the server sent another range than was asked for", asked, told)
        tag = _tag_of(answer.headers)
        first = self.tag or self._now.first_tag(tag)
        if tag != first:
            raise self._changed("the file changed after it was first read", str(first), str(tag))

    def _changed(self, message: str, expected: str, found: str) -> InputChangedError:
        advice = "start again: a new plan takes the file as it is now"
        return InputChangedError(
            message, file=self.label, expected=expected, found=found or "nothing", advice=advice
        )

    def _error(self, failure: _Failure, start: int, stop: int) -> RemoteError:
        return RemoteError(
            f"bytes {start} to {stop} cannot be fetched",
            file=self.label,
            found=failure.reason,
            advice=failure.advice,
        )


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a request did not give what was asked for, and whether to ask again, after how long."""

    reason: str
    passes: bool = True
    after: float | None = None
    advice: str = _NETWORK

    def wait(self, attempt: int) -> None:
        """Wait as long as the server asked for, else longer with each attempt."""
        seconds = min(_FIRST_WAIT * 2 ** max(attempt - 1, 0), _LONGEST_WAIT)
        seconds *= random.uniform(0.5, 1)  # noqa: S311 - that not all ask again at once
        time.sleep(seconds if self.after is None else self.after)


def _of_status(status: int, phrase: str | None, headers: Mapping[str, str]) -> _Failure:
    said = headers.get("X-Error-Message") or phrase
    reason = f"status {status}" + (f" ({said})" if said else "")
    if status == 200:  # noqa: PLR2004 - the whole file
        return _Failure(
            "the whole file instead of a range",
            passes=False,
            advice="the server, or a proxy before it, sends no ranges: download the model instead",
        )
    if status not in _PASSING:
        return _Failure(reason, passes=False, advice="check the name, the token and its rights")
    # Other answers tell by `RateLimit` what is left.
    limit = headers.get("RateLimit", "") if status == _LIMITED else ""
    after = _SECONDS_TOLD.search(headers.get("Retry-After") or limit)
    seconds = float(after[1]) if after else None
    is_soon = seconds is None or seconds <= _LONGEST_ASKED
    if status == _LIMITED:
        advice = "the server limits how often it may be asked: wait some minutes, or sign in"
        return _Failure(reason, passes=is_soon, after=seconds, advice=advice)
    return _Failure(reason, passes=is_soon, after=seconds)


def ask(method: str, address: str, headers: Mapping[str, str]) -> Any:  # noqa: ANN401 - of urllib3
    """Return the answer of a server, before its bytes are read; it may be another server's by then.

    Raises
    ------
    urllib3.exceptions.HTTPError
        If there is none.
    RemoteError
        If `urllib3` is not installed.
    """
    _check_library(address)
    # Only when a server is asked: these take megabytes, which merges of local models do without.
    from urllib.request import getproxies, proxy_bypass  # noqa: PLC0415

    from urllib3 import Retry  # noqa: PLC0415

    parts = urlsplit(address)
    proxies = {} if proxy_bypass(parts.netloc) else getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    is_secure = parts.scheme == "https"
    pool = _pool(proxy, os.environ.get("SSL_CERT_FILE"), is_secure=is_secure)
    # How long to wait is for the caller to say: a server may ask for a day.
    retries = Retry(
        connect=0, read=0, other=0, redirect=_REDIRECTS, raise_on_redirect=False,
        respect_retry_after_header=False,
    )  # fmt: skip
    return pool.request(method, address, headers=headers, preload_content=False, retries=retries)


def _check_library(address: str) -> None:
    """Raise RemoteError if what asks servers is not installed."""
    if find_spec("urllib3") is None:
        raise RemoteError(
            "to read from a server needs the `urllib3` library",
            file=address.partition("?")[0],
            advice="install it: `pip install urllib3`",
        )


@lru_cache(maxsize=8)
def _pool(proxy: str | None, authorities: str | None, *, is_secure: bool) -> Any:  # noqa: ANN401 - of urllib3
    """Return connections to servers, by a proxy if there is one.

    `ssl` itself reads the file of `authorities`, which the environment names: here it says only
    that connections made with another file are others.
    """
    from urllib3 import PoolManager, ProxyManager, Timeout, make_headers  # noqa: PLC0415 - as above

    options: dict[str, Any] = {
        "maxsize": _KEPT,
        "timeout": Timeout(connect=_CONNECT, read=_PATIENCE),
    }
    if is_secure:
        import ssl  # noqa: PLC0415 - as above

        certificates = options["ssl_context"] = ssl.create_default_context()
        # A small container has none of its own. They are those that the Hub's library takes.
        if authorities is None and find_spec("certifi") is not None:
            certificates.load_verify_locations(importlib.import_module("certifi").where())
    if proxy is None:
        return PoolManager(**options)
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    user = None if parts.username is None else f"{parts.username}:{parts.password or ''}"
    return ProxyManager(
        parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(),
        proxy_headers=make_headers(proxy_basic_auth=user and unquote(user)),
        **options,
    )


def is_server(address: str) -> bool:
    """Tell whether a text is the address of a server, of which requests can be made."""
    try:
        parts = urlsplit(address)
        return parts.scheme in {"https", "http"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets, or a port that is no number
        return False


def look(address: str) -> HttpFile | int:
    """Return the file that a web server has at an address, or the status that it refuses it with.

    Raises
    ------
    RemoteError
        If the server cannot be reached, or says that it fails.
    """
    _check_library(address)
    from urllib3.exceptions import HTTPError  # noqa: PLC0415 - only when a server is asked

    attempt = 0
    while True:
        try:
            answer = ask("HEAD", address, {"Accept-Encoding": "identity"})
            answer.close()
            failure = _of_status(answer.status, answer.reason, answer.headers)
            if answer.status == 200:  # noqa: PLR2004 - there it is
                return _found(address, answer.headers)
            if not failure.passes and answer.status not in _PASSING:
                return int(answer.status)
        except HTTPError as error:
            failure = _of_transport(error)
        attempt += 1
        if attempt == _QUESTIONS or not failure.passes:
            raise RemoteError(
                "the server cannot be read", file=address, found=failure.reason,
                advice=failure.advice,
            )  # fmt: skip
        failure.wait(attempt)


def at_address(address: str, size: int, tag: str) -> HttpFile:
    """Return a file of a web server that is known."""
    return HttpFile(address, size, tag, None, lambda: (address, {}), tag)


def _found(address: str, headers: Mapping[str, str]) -> HttpFile:
    size = headers.get("Content-Length", "")
    if not re.fullmatch(r"\d{1,18}", size):
        raise RemoteError(
            "the server does not tell how large a file is",
            file=address,
            found=size[:80] or "no Content-Length",
            advice="download the model, and name its folder",
        )
    return at_address(address, int(size), _tag_of(headers) or "")


def _tag_of(headers: Mapping[str, str]) -> str | None:
    """Return what a server calls the content of a file; if it does not, when that changed last."""
    return headers.get("ETag") or headers.get("Last-Modified")


def retried(ask: Callable[[], Any]) -> Any:  # noqa: ANN401 - what it returns
    """Return what a call returns that asks a server, and asks again for what passes."""
    attempt = 0
    while True:
        try:
            return ask()
        except Exception as error:
            cause = cause_of(error)
            answer = getattr(cause, "response", None)
            if answer is not None:
                failure = _of_status(answer.status_code, answer.reason_phrase, answer.headers)
            else:
                failure = _Failure(_told(cause), passes=_is_of_transport(cause))
            attempt += 1
            if attempt == _QUESTIONS or not failure.passes:
                raise
            failure.wait(attempt)


def _of_transport(error: Exception) -> _Failure:
    told = _told(error)
    if "CERTIFICATE_VERIFY_FAILED" in told:
        advice = "name a file with the certificate of the server's authority: SSL_CERT_FILE"
        return _Failure(told, passes=False, advice=advice)
    return _Failure(told)


def _is_of_transport(error: Exception) -> bool:
    """Tell whether an error is one of httpx about the connection, whichever httpx that is."""
    return any(each.__name__ == "TransportError" for each in type(error).__mro__)


def _told(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error  # an error that tells of attempts has one
    told = cause.args[0] if isinstance(cause, Exception) and cause.args else cause
    return str(told) or type(error).__name__
