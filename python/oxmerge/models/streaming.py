"""What a merge reads of files that are not here, fetched ahead of it into a bounded spool.

The engine knows in which order it will read, and keeps what is needed (`rust/io/spool.rs`). Here
are the threads that ask it what comes next, and put in what servers send, piece by piece.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from contextlib import nullcontext

from oxmerge import _core
from oxmerge.errors import InputChangedError
from oxmerge.models.fetching import is_of_adapter
from oxmerge.models.references import remote_file
from oxmerge.models.side_by_side import side_by_side
from oxmerge.models.stores import is_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Any, Self

    from oxmerge.models.remote import RemoteFile

__all__ = [
    "DEFAULT_SPOOL",
    "RESIDENT",
    "Fetcher",
    "is_streamed",
    "read_whole",
    "spool_bytes",
    "streamed",
]

#: Ranges that are fetched at a time: enough to fill a fast line.
CONNECTIONS = 8
#: Bytes that they take in memory: each a piece, what its connection has beside it, and its thread.
RESIDENT = CONNECTIONS * (4 << 20)
#: Bytes of a range of what is held in memory.
_AT_ONCE = 8 << 20
#: Bytes of the spool, unless given.
DEFAULT_SPOOL = 20_000_000_000
#: Seconds to wait for threads that still wait for their servers when the run is over.
_PATIENCE = 0.5
#: Bytes before the first range of a file that are fetched again to look at the whole of it.
_MOST_BEFORE = 16 << 20
#: Seconds between looks at how far it is.
_GLANCE = 0.1
#: Bytes that are looked at at a time.
_LOOKED_AT = 1 << 20


def is_streamed(file: Mapping[str, Any], *, stream: bool) -> bool:
    """Tell whether a file of a plan comes by a spool: by wish, or since no cache takes it.

    Adapters are small, read in any order, and kept.
    """
    if "remote" not in file:
        return False
    label: str = file["remote"]["label"]
    return not is_of_adapter(label) and (is_address(label) or stream)


def spool_bytes(asked: int | None, folder: str | None = None, needed: int = 0) -> int:
    """Return the bytes of the spool: as asked for, or half of what the output leaves free."""
    if asked is not None or folder is None:
        return DEFAULT_SPOOL if asked is None else asked
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    return min(DEFAULT_SPOOL, max((free - needed) // 2, 0))


def streamed(
    tables: Sequence[_core.Plan],
    size: int,
    folder: str,
    tensors: Sequence[int] | None = None,
    *,
    shards: Sequence[int] | None = None,
    whole: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Fetcher | nullcontext[None]:
    """Return what fetches the files that are not here, for a `with` around the run.

    Parameters
    ----------
    tables : sequence of _core.Plan
        Merges of the same tensors.
    size : int
        Bytes of the spool at the most.
    folder : str
        Where it is made. It has no name there, and is gone with the process at the latest.
    tensors : sequence of int, optional
        The only tensors that will be made.
    shards : sequence of int, optional
        The only shards that will be made.
    whole : bool
        Whether numbers over the model are found from all tensors nevertheless.
    progress : callable, optional
        Is called ten times a second with the bytes that were fetched, that will be at the most, and
        what it is of.

    Raises
    ------
    PlanError
        If the inputs of one tensor need a larger spool.
    OSError
        If it cannot be made, or (ENOSPC) does not have the room.
    """
    all_files = tables[0].files
    used = (all_files[at] for at in tables[0].files_of(None if whole else tensors))
    if not any("remote" in file for file in used):
        return nullcontext()
    files = {at: file for at, file in enumerate(all_files) if "remote" in file}
    only = None if tensors is None else set(tensors)
    spool = _core.Spool(tables, size, folder, only, shards, whole)
    return Fetcher(spool, {at: remote_file(file) for at, file in files.items()}, progress)


def read_whole(
    file: RemoteFile,
    start: int,
    stop: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> bytearray:
    """Return a range of a file that is held in memory whole, by several requests side by side.

    Meanwhile `progress` is called as by `streamed`.
    """
    whole = bytearray(stop - start)
    come = dict.fromkeys(range(start, stop, _AT_ONCE), 0)

    def fetch(first: int) -> None:
        at = first - start
        for piece in file.pieces(first, min(first + _AT_ONCE, stop)):
            whole[at : at + len(piece)] = piece
            at += len(piece)
            come[first] += len(piece)

    def show() -> None:
        if progress is not None:
            progress(sum(come.values()), len(whole), file.label)

    side_by_side(fetch, list(come), None if progress is None else show)
    return whole


class Fetcher:
    """Threads that fill a spool, as a context manager around the run that reads it.

    What keeps a file from being fetched ends the run, and is raised when it has ended.

    Parameters
    ----------
    spool : Spool
        What is to be fetched, and where to.
    files : mapping of int to RemoteFile
        The files that are not here, by their numbers in the plan.
    progress : callable, optional
        See `streamed`.
    """

    def __init__(
        self,
        spool: _core.Spool,
        files: Mapping[int, RemoteFile],
        progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self.spool = spool
        self._files = files
        self._digests = {number: _Digest(spool, file) for number, file in files.items()}
        #: Held by who asks what is next: so digests learn of it in that order.
        self._asking = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._progress = progress
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        """Begin to fetch."""
        for _ in range(CONNECTIONS):
            # One that waits for a server must not keep the process.
            thread = threading.Thread(target=self._work, daemon=True, name="oxmerge-fetch")
            thread.start()
            self._threads.append(thread)
        if self._progress is not None:
            thread = threading.Thread(target=self._tell, daemon=True, args=(self._progress,))
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Stop fetching; raise what went wrong with it, if that is why the run ended."""
        self.spool.stop()
        self._ended.set()
        until = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
        if error is not None and self._failure is not None:
            raise self._failure from None

    def _work(self) -> None:
        try:
            while (wanted := self._next()) is not None:
                self._fetch(*wanted)
        except KeyboardInterrupt:
            pass  # nobody wants it any more
        except BaseException as failure:  # noqa: BLE001 - it is raised where the run ends
            self._failure = self._failure or failure
            self.spool.stop()

    def _tell(self, progress: Callable[[int, int, str], None]) -> None:
        current = ", ".join(sorted({file.label for file in self._files.values()}))
        while not self._ended.wait(_GLANCE):
            progress(self.spool.fetched, self.spool.to_fetch, current)

    def _next(self) -> tuple[int, int, int, int] | None:
        with self._asking:
            wanted = self.spool.next()
            if wanted is not None:
                _, number, start, stop = wanted
                self._digests[number].begin(start, stop)
        return wanted

    def _fetch(self, extent: int, number: int, start: int, stop: int) -> None:
        at = start
        for piece in self._files[number].pieces(start, stop):
            self.spool.put(extent, at, piece)
            at += len(piece)
        self._digests[number].came(extent, start, stop)


class _Digest:
    """Looks whether a file has the SHA-256 that its server told, if all of it passes by in order.

    Ranges come side by side. One that is here before those in front of it waits in the spool until
    they are: they are on their way. When ranges are asked for in another order, or some are left
    out, the file is not looked at any more.

    Parameters
    ----------
    spool : Spool
        Where ranges are.
    file : RemoteFile
        The file.
    """

    def __init__(self, spool: _core.Spool, file: RemoteFile) -> None:
        self._spool = spool
        self._file = file
        self._lock = threading.Lock()
        self._whole = hashlib.sha256()
        self._looks = file.sha256 is not None
        self._is_busy = False
        #: Where the first range began, up to where ranges were asked for, and looked at.
        self._first = self._asked = self._seen = -1
        #: Ranges that wait, by where they begin.
        self._waiting: dict[int, tuple[int, int]] = {}

    def begin(self, start: int, stop: int) -> None:
        """Take down that a range is asked for."""
        with self._lock:
            if self._first < 0:
                self._first = self._asked = self._seen = start
                self._looks = self._looks and start <= _MOST_BEFORE
            if self._looks and start != self._asked:
                self._looks = False
                for extent, _ in self._waiting.values():
                    self._spool.arrived(extent)
            self._asked = stop

    def came(self, extent: int, start: int, stop: int) -> None:
        """Hand a range that came, and those that waited for it, to the engine.

        Raises
        ------
        InputChangedError
            If it was the last of the file, and the bytes are not those that the server told of.
        """
        with self._lock:
            if not self._looks:
                self._spool.arrived(extent)
                return
            self._waiting[start] = (extent, stop)
            if self._is_busy:
                return
            self._is_busy = True
        while (following := self._following()) is not None:
            self._look(*following)

    def _following(self) -> tuple[int, int] | None:
        with self._lock:
            if self._looks and self._seen in self._waiting:
                return self._waiting.pop(self._seen)
            self._is_busy = False
            return None

    def _look(self, extent: int, stop: int) -> None:
        if self._seen == self._first:
            for piece in self._file.pieces(0, self._first):  # the header
                self._whole.update(piece)
        for start in range(self._seen, stop, _LOOKED_AT):
            piece = self._spool.peek(extent, start, min(stop, start + _LOOKED_AT))
            self._whole.update(piece)
        self._seen = stop
        found = self._whole.hexdigest()
        if stop == self._file.size and found != self._file.sha256:
            raise InputChangedError(
                "the file that came is not the one that the server told of",
                file=self._file.label,
                expected=f"SHA-256 {self._file.sha256}",
                found=found,
                advice="start again; if it stays so, tell those who run the server",
            )
        self._spool.arrived(extent)
