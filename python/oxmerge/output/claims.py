"""A directory that one run at a time owns: made if need be, held open, and locked.

Whatever a run does there, it does through the open descriptor. So it stays one directory, also if
its name is given to another meanwhile; and a directory is only ever removed by who holds its lock,
so that none is removed that another run has begun to use.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from oxmerge.errors import OutputError
from oxmerge.signals import put_off

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BusyError", "Claim", "claim", "claimed", "locked_file", "named"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: How often a directory may be removed by other runs, each of which had made it, before this one
#: gets hold of it.
_MOST_TRIES = 1000
#: A run that ends locks what it removes for a moment. That is waited for; a run that works is not.
_MOST_LOCK_TRIES = 10
_SECONDS_BETWEEN_TRIES = 0.02

#: Device and inode.
_Identity = tuple[int, int]


class BusyError(OutputError):
    """Another run owns the directory."""


@dataclass
class Claim:
    """A directory that this run owns.

    Attributes
    ----------
    path : Path
        What the user calls it. For messages: it may have come to name something else.
    descriptor : int
        The directory, open.
    is_locked : bool
        Whether its file system can lock; some network file systems cannot.
    created : list
        The directories that were made for it, outermost first.
    """

    path: Path
    descriptor: int
    is_locked: bool
    created: list[tuple[Path, _Identity]] = field(default_factory=list)

    @property
    def is_held(self) -> bool:
        """Whether it is this run's still."""
        return self.descriptor >= 0

    def release(self) -> None:
        """Let others have it."""
        if self.is_held:
            descriptor, self.descriptor = self.descriptor, -1
            # A process that was forked from this one may have it open too.
            _unlock(descriptor)
            os.close(descriptor)

    def give_up(self) -> None:
        """Release it, and remove what was made for it and is empty."""
        with put_off():
            own = _identity(os.fstat(self.descriptor)) if self.is_held else None
            for folder, identity in reversed(self.created):
                with contextlib.suppress(OSError):
                    if identity == own:
                        _remove_if_same(folder, identity)
                    else:
                        _remove_if_unused(folder, identity)
            self.created.clear()
            self.release()


def named(directory: str | os.PathLike[str]) -> Path:
    """Return the directory that a user names.

    Raises
    ------
    OutputError
        If it has no name: pathlib takes that for the working directory.
    """
    text = os.fspath(directory)
    if not text.strip():
        raise OutputError(
            "the output directory has no name",
            advice="name one; if the name comes from a variable, that is not set",
        )
    return Path(text)


def claim(path: Path, *, shared: bool = False) -> Claim:
    """Make a directory, if it is not there, and become its one owner.

    Of many runs that try at once, one succeeds; or all that want to share it. What these make
    stays: another one may be about to use it.

    Raises
    ------
    OutputError
        If another run owns it, or it is no directory.
    OSError
        If it cannot be made or opened.
    """
    if path.is_symlink() and not path.exists():
        advice = "name a new directory, or make the one that it links to"
        raise OutputError("a link to nowhere", file=str(path), advice=advice)
    held = Claim(path, -1, is_locked=False)
    try:
        for left in reversed(range(_MOST_TRIES)):
            try:
                _make(held)
                held.descriptor = os.open(path, _DIRECTORY)
                held.is_locked = _lock(held, shared=shared)
                # Another run may have removed, before it let go of the lock, what it had made.
                if _identity(os.stat(path)) == _identity(os.fstat(held.descriptor)):
                    if shared:
                        held.created.clear()
                    return held
            except FileNotFoundError:
                if left == 0:
                    raise
            held.release()
    except NotADirectoryError:
        held.give_up()
        if not path.exists():  # it is a part of its path that is no directory
            raise
        raise OutputError(
            "the output is a directory, and this is a file",
            file=str(path),
            advice="name a new directory",
        ) from None
    except BaseException:
        held.give_up()
        raise
    held.give_up()
    raise OutputError("other runs make and remove it all the time", file=str(path))


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Own a directory for the length of a block; see `claim`."""
    held = claim(path)
    try:
        yield
    finally:
        held.give_up()


def _make(held: Claim) -> None:
    path = held.path.absolute()
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
        except FileExistsError:
            continue  # another run was faster
        held.created.append((folder, _identity(os.stat(folder))))
        _flush(folder.parent)


def _lock(held: Claim, *, shared: bool = False) -> bool:
    """Lock the directory; whether its file system can."""
    for left in reversed(range(_MOST_LOCK_TRIES)):
        try:
            return try_lock(held.descriptor, shared=shared)
        except BlockingIOError:
            if left:
                time.sleep(_SECONDS_BETWEEN_TRIES)
    # Not this run's, so not this run's to remove.
    os.close(held.descriptor)
    held.descriptor = -1
    raise BusyError(
        "another run is writing here",
        file=str(held.path),
        advice="wait for it, or name another directory",
    )


@contextlib.contextmanager
def locked_file(name: str, folder: int) -> Iterator[bool]:
    """Hold the lock of a file in an open folder; BlockingIOError if another run has it.

    Yields whether its file system can lock. Network file systems that cannot lock a directory can
    lock a file that is open for writing.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, 0o666, dir_fd=folder)
    except OSError as error:  # which has no path of what is open
        error.filename = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        raise
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open directory; whether its file system can. BlockingIOError if another has it."""
    import fcntl  # noqa: PLC0415 - not on every system

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    import fcntl  # noqa: PLC0415 - not on every system

    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _remove_if_unused(path: Path, identity: _Identity) -> None:
    """Remove an empty directory, unless another run owns it."""
    descriptor = os.open(path, _DIRECTORY | os.O_NOFOLLOW)
    try:
        try_lock(descriptor)
        _remove_if_same(path, identity)
    finally:
        os.close(descriptor)


def _remove_if_same(path: Path, identity: _Identity) -> None:
    if _identity(os.lstat(path)) == identity:
        os.rmdir(path)


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _flush(path: Path) -> None:
    descriptor = os.open(path, _DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
