"""Files that are somewhere else, read by ranges of bytes.

Planning reads headers so, and a merge that keeps nothing on the disk reads weights so. What is read
is pinned: a range that is not the one asked for, or not of the same file, is never taken.
"""

from __future__ import annotations

import random
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from oxmerge.errors import InputChangedError, RemoteError
from oxmerge.models.download import cause_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import Any

__all__ = ["HttpFile", "RemoteFile", "retried"]

#: How often a range is asked for in vain before that is an error; with fewer bytes than these an
#: answer was in vain.
_ATTEMPTS, _PROGRESS = 6, 64 << 10
#: Seconds to wait before asking again: first, at most, and at most if the server says how long; for
#: what takes longer nobody waits.
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_ASKED = 0.5, 8.0, 60.0
#: Seconds without an answer, or without a byte of it.
_PATIENCE = 30.0
#: Statuses that another attempt may mend.
_PASSING = frozenset((408, 425, 429, 500, 502, 503, 504))
#: Statuses of a signed address that is no longer taken.
_EXPIRED = frozenset((400, 401, 403, 404, 410))
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
        self._address: tuple[str, dict[str, str]] | None = None
        self._etag: list[str | None] = []

    def address(
        self, locate: Callable[[], tuple[str, dict[str, str]]]
    ) -> tuple[str, dict[str, str], bool]:
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

    def first_etag(self, etag: str | None) -> str | None:
        """Return the tag of the first answer, which is this one if there was none."""
        with self._lock:
            self._etag = self._etag or [etag]
            return self._etag[0]


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
    client : callable
        Returns the `httpx` client to use.
    """

    label: str
    size: int
    etag: str
    sha256: str | None
    locate: Callable[[], tuple[str, dict[str, str]]] = field(repr=False, compare=False)
    client: Callable[[], Any] = field(repr=False, compare=False)
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
        asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        client = self.client()
        try:
            with client.stream("GET", address, headers=asked, timeout=_PATIENCE) as answer:
                if answer.status_code in _EXPIRED and not is_new:
                    self._now.forget(address)
                    return _Failure("the address has expired", after=0)
                if answer.status_code != 206:  # noqa: PLR2004 - partial content
                    return _of_status(answer)
                self._check(answer, start, stop)
                wanted = stop - start
                for chunk in answer.iter_raw():
                    yield chunk[:wanted]
                    wanted -= len(chunk)
                    if wanted < 0:
                        return _Failure("more bytes came than were asked for", passes=False)
        except (OSError, RuntimeError) as error:  # of a closed client, too
            return _Failure(_told(error))
        except Exception as error:
            if not _is_of_transport(error):
                raise
            return _Failure(_told(error))
        return None if wanted == 0 else _Failure(f"{wanted} bytes did not come")

    def _check(self, answer: Any, start: int, stop: int) -> None:  # noqa: ANN401 - of httpx
        """Raise InputChangedError if an answer is of another file, or of another range."""
        told = answer.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(told)
        asked = f"bytes {start}-{stop - 1}/{self.size}"
        if found is None or told != asked:
            raise self._changed("the server sent another range than was asked for", asked, told)
        etag = answer.headers.get("ETag")
        first = self._now.first_etag(etag)
        if etag != first:
            raise self._changed("the file changed while it was read", str(first), str(etag))

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
    advice: str = "check the network, and start again: what is complete is kept"

    def wait(self, attempt: int) -> None:
        """Wait as long as the server asked for, else longer with each attempt."""
        seconds = min(_FIRST_WAIT * 2 ** max(attempt - 1, 0), _LONGEST_WAIT)
        seconds *= random.uniform(0.5, 1)  # noqa: S311 - that not all ask again at once
        time.sleep(seconds if self.after is None else self.after)


def _of_status(answer: Any) -> _Failure:  # noqa: ANN401 - of httpx
    status = answer.status_code
    said = answer.headers.get("X-Error-Message") or answer.reason_phrase
    reason = f"status {status}" + (f" ({said})" if said else "")
    if status == 200:  # noqa: PLR2004 - the whole file
        return _Failure(
            "the whole file instead of a range",
            passes=False,
            advice="a proxy on the way may drop ranges: reach the server without it",
        )
    if status not in _PASSING:
        return _Failure(reason, passes=False, advice="check the name, the token and its rights")
    after = answer.headers.get("Retry-After", "")
    seconds = float(after) if re.fullmatch(r"\d{1,6}", after) else None
    is_soon = seconds is None or seconds <= _LONGEST_ASKED
    if status == 429:  # noqa: PLR2004 - too many requests
        advice = "the server limits how often it may be asked: wait some minutes, or sign in"
        return _Failure(reason, passes=is_soon, after=seconds, advice=advice)
    return _Failure(reason, passes=is_soon, after=seconds)


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
                failure = _of_status(answer)
            else:
                failure = _Failure(_told(cause), passes=_is_of_transport(cause))
            attempt += 1
            if attempt == _ATTEMPTS or not failure.passes:
                raise
            failure.wait(attempt)


def _is_of_transport(error: Exception) -> bool:
    """Tell whether an error is one of httpx about the connection, whichever httpx that is."""
    return any(each.__name__ == "TransportError" for each in type(error).__mro__)


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__
