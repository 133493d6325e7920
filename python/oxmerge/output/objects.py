"""An output in an object store: what lies there, what is written, what is removed.

A store renames nothing, and shows an object when all of it has come. So each file is written under
its last name, and what makes a model of them comes last. An upload that ends half way is taken
back; a process that is killed leaves pieces of one that nobody sees, and that the store keeps until
a rule of the bucket removes them.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from oxmerge.errors import InputChangedError, OutputError, RemoteError
from oxmerge.models.stores import listed, store_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from oxmerge.models.remote import RemoteFile

__all__ = ["MOST_BYTES", "RESIDENT", "Objects", "Uploads"]

#: Bytes of a piece of an upload, the least that S3 takes; how many are under way; and how many
#: there may be of one object.
_PIECE = 5 << 20
_AT_ONCE = 6
_MOST_PIECES = 10_000
#: Bytes that an object may have.
MOST_BYTES = _PIECE * _MOST_PIECES
#: Bytes that an upload takes in memory: its pieces, the one that is filled, and connections.
RESIDENT = (_AT_ONCE + 2) * _PIECE
#: Bytes that are read of a file at a time.
_READ = 1 << 20
#: Bytes of a record that a part has left.
_MOST_RECORD = 16_000_000
#: Seconds to wait for an upload to be taken back.
_PATIENCE = 10.0
_SCHEMES = ("s3", "s3a", "gs")


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects below an address.

    Attributes
    ----------
    address : str
        ``s3://bucket/path`` or ``gs://bucket/path``.
    """

    address: str

    @classmethod
    def at(cls, address: str | os.PathLike[str]) -> Objects:
        """Return those below an address that a user gives.

        Raises
        ------
        OutputError
            If nothing can be written there, or `obstore` is not installed.
        """
        address = os.fspath(address)
        parts = urlsplit(address)
        advice = "write s3://bucket/path or gs://bucket/path, with credentials in the environment"
        if parts.scheme not in _SCHEMES or not parts.netloc:
            raise OutputError("no store that can be written to", file=address, advice=advice)
        if "@" in parts.netloc or parts.query or parts.fragment:
            shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
            raise OutputError("an address with more than a path", file=shown, advice=advice)
        try:
            import obstore  # noqa: F401, PLC0415 - optional
        except ImportError:
            raise OutputError(
                "to write to a store needs the `obstore` library",
                file=address,
                advice="install it: `pip install 'oxmerge[remote]'`",
            ) from None
        return cls(address.rstrip("/"))

    def files(self) -> dict[str, RemoteFile]:
        """Return what is there, by names with ``/``: of each weight file several, in work."""
        return listed(self.address, most=None)

    def read(self, file: RemoteFile) -> bytes | None:
        """Return a record, nothing if it is longer than any; None if it is gone, or another."""
        if file.size > _MOST_RECORD:
            return b""
        try:
            return file.read(0, file.size)
        except InputChangedError:
            return None

    def fetch(self, file: RemoteFile, path: Path) -> None:
        """Write an object into a local file, which is there when all of it has come."""
        coming = path.with_name(f"{path.name}.coming")
        with open(coming, "wb") as to:
            to.writelines(file.pieces(0, file.size))
            to.flush()
            os.fsync(to.fileno())
        os.replace(coming, path)

    def put(self, name: str, data: bytes) -> None:
        """Write a small object."""
        import obstore  # noqa: PLC0415 - optional

        store, place = store_of(f"{self.address}/{name}")
        with self._told(name):
            obstore.put(store, place, data, use_multipart=False)

    def upload(self, name: str, path: Path, stopped: threading.Event) -> None:
        """Write a local file of any size, piece by piece.

        When it is `stopped`, what has come is taken back, and `KeyboardInterrupt` raised.
        """
        import obstore  # noqa: PLC0415 - optional

        store, place = store_of(f"{self.address}/{name}")
        with self._told(name):
            pieces = _pieces(path, stopped)
            obstore.put(store, place, pieces, chunk_size=_PIECE, max_concurrency=_AT_ONCE)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects that are there."""
        import obstore  # noqa: PLC0415 - optional

        store, folder = store_of(self.address)
        places = [f"{folder}/{name}".lstrip("/") for name in names]
        with self._told(""):
            if places:
                obstore.delete(store, places)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Have errors of the library raised as those of oxmerge."""
        try:
            yield
        except (OutputError, RemoteError):
            raise
        except Exception as error:
            is_of_store = isinstance(error, FileNotFoundError) or type(error).__module__.startswith(
                "obstore"
            )
            if not is_of_store:
                raise
            raise OutputError(
                "the store cannot be written to",
                file=f"{self.address}/{name}".rstrip("/"),
                found=str(error).partition("\n")[0].strip()[:300],
                advice="check the address, the credentials in the environment and what they may "
                "write, and the network; then run it again",
            ) from None


def _pieces(path: Path, stopped: threading.Event) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(_READ):
            if stopped.is_set():
                raise KeyboardInterrupt
            yield piece


class Uploads:
    """Uploads, one at a time, beside what is computed meanwhile: a context manager.

    What one meets is raised when the next is begun, or at the end.
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        # What `Thread.join` would tell, were it not wrong after Ctrl-C has ended it (Python 3.11).
        self._ended: threading.Event | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        """Begin with none."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Wait for the last one; or have it taken back, after a failure."""
        if error is None:
            self.wait()
        elif self._ended is not None:
            self.stopped.set()
            self._ended.wait(_PATIENCE)

    def begin(self, upload: Callable[[], None]) -> None:
        """Begin an upload when the one before is over."""
        self.wait()
        self._ended = threading.Event()
        # One that waits for a server must not keep the process.
        threading.Thread(target=self._run, args=(upload, self._ended), daemon=True).start()

    def wait(self) -> None:
        """Wait for the upload that is under way; raise what it met."""
        while self._ended is not None and not self._ended.wait(1):
            pass
        self._ended = None
        if self._failure is not None:
            raise self._failure

    def _run(self, upload: Callable[[], None], ended: threading.Event) -> None:
        try:
            upload()
        except BaseException as failure:  # noqa: BLE001 - it is raised by who waits
            self._failure = failure
        finally:
            ended.set()
