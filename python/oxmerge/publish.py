"""How an output directory comes to be: all at once, or not at all.

Every file is first written under a temporary name in the output directory and flushed. Only then
are they renamed, in an order in which no moment shows half a model:

1. an old index and config are removed: from here on the old model does not load;
2. the new shards are renamed in;
3. old weights that are not among the new are removed;
4. the side files, the card, the recipe and the report are renamed in;
5. the index follows, and `config.json` comes last: from here on the new model loads.

A directory without index and config loads nowhere, so a failure between 1 and 5, or a power cut,
leaves something that is plainly unfinished, never a mixture that passes for a model. Up to step 1
an old model stays as it was.

`discard` is the only place that decides what happens to unfinished work.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from oxmerge._core import partial_name
from oxmerge.errors import OutputError
from oxmerge.side_files import SideFile, copy_bytes, is_index, is_loadable_weight
from oxmerge.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

PARTIAL_SUFFIX = partial_name("").removeprefix(".")
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
_SIGNS_OF_A_MODEL = (CONFIG_NAME, INDEX_NAME, "model.safetensors", "oxmerge_report.json")


@dataclass
class OutputDirectory:
    """A directory that one run writes to.

    Attributes
    ----------
    path
        The directory.
    overwrite
        Whether a model that is there may be replaced.
    created
        The directories that were made for it, outermost first.
    placed
        Files under their final names that this run put there, with their device and inode.
    finished
        Whether the new model is complete; nothing is discarded after that.
    """

    path: Path
    overwrite: bool
    created: list[Path] = field(default_factory=list)
    placed: dict[Path, tuple[int, int] | None] = field(default_factory=dict)
    finished: bool = False
    lock: int | None = None

    def partial(self, name: str) -> Path:
        """Return where the file that will be called `name` is written first."""
        return self.path / partial_name(name)

    def release(self) -> None:
        """Let other runs write to the directory."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


@dataclass(frozen=True)
class Contents:
    """What a finished output directory holds.

    Attributes
    ----------
    shards
        Names of the weight files; each lies complete under its partial name.
    index
        Text of the index, or None for a single shard.
    config
        Text of `config.json`, or None if the donor has none.
    side_files
        The donor's files to copy.
    texts
        Further files by name: the card, the recipe, the report.
    """

    shards: Sequence[str]
    index: str | None = None
    config: str | None = None
    side_files: Sequence[SideFile] = ()
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all files, with those of an index and a config that there may not be."""
        copied = (file.name for file in self.side_files)
        return (*self.shards, *copied, *self.texts, INDEX_NAME, CONFIG_NAME)


def prepare_output(
    directory: str | os.PathLike[str],
    *,
    overwrite: bool,
    input_files: Iterable[Mapping[str, Any]],
    needed_bytes: int,
    names: Iterable[str] = (),
) -> OutputDirectory:
    """Check that the output can go to `directory`, and make it ready.

    Temporary files that a crashed run left there are removed.

    Parameters
    ----------
    directory
        New or empty; with `overwrite`, it may hold a model.
    overwrite
        Replace the model that is there.
    input_files
        The plan's input files: mappings with `device` and `inode`.
    needed_bytes
        Exact size of all that will be written.
    names
        The files that will be written, as `Contents` names them.

    Raises
    ------
    FileExistsError
        If the directory holds something and `overwrite` is not set.
    OutputError
        If the output would replace an input, or the directory holds something else than a model
        or something in the place of a file, or another run writes there.
    OSError
        If it cannot be written to, or (ENOSPC) does not have the space.
    """
    output = OutputDirectory(Path(directory), overwrite)
    input_files = tuple(input_files)
    if output.path.is_symlink() and not output.path.exists():
        advice = "name a new directory, or make the one that it links to"
        raise OutputError("a link to nowhere", file=str(output.path), advice=advice)
    if output.path.exists():
        _check_existing(output, {(file["device"], file["inode"]) for file in input_files})
        _check_places(output, names)
    _check_space(output.path, needed_bytes)
    try:
        _create(output)
        _lock(output)
        # Again: another run may have finished here before this one got the lock.
        _check_existing(output, {(file["device"], file["inode"]) for file in input_files})
        _remove_partials(output.path)
        _probe(output)
    except BaseException:
        discard(output)
        raise
    return output


def commit(output: OutputDirectory, contents: Contents) -> list[str]:
    """Turn the partial files into a finished model directory.

    Parameters
    ----------
    output
        From `prepare_output`.
    contents
        What goes in; its shards are already there under their partial names.

    Returns
    -------
    list of str
        A note for each file that was in the directory before and still is.
    """
    names = _stage(output, contents)
    with _undisturbed():
        _switch(output, contents, names)
    output.release()
    return _leftovers(output)


def discard(output: OutputDirectory) -> None:
    """Remove what an unfinished run wrote, and nothing else; do nothing after a finished one.

    That is: partial files, files that were already renamed in (without config and index they are
    no use), and the directories that were made for the output, as far as they are empty. What
    cannot be removed is left: the error that ended the run is the one to report.
    """
    if not output.finished:
        # Back to front: the config, if it is there, is the last that was placed and goes first.
        for path, identity in reversed(output.placed.items()):
            with contextlib.suppress(OSError):
                if identity is not None and _identity_of(path) == identity:
                    os.unlink(path)
        if output.lock is not None:
            with contextlib.suppress(OSError):
                _remove_partials(output.path)
        for folder in reversed(output.created):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
    output.release()


# Checks before anything is written.


def _check_existing(output: OutputDirectory, inputs: set[tuple[int, int]]) -> None:
    path = output.path
    if not path.is_dir():
        raise OutputError(
            "the output is a directory, and this is a file",
            file=str(path),
            advice="name a new directory",
        )
    entries = [entry for entry in _entries(path) if not entry.name.endswith(PARTIAL_SUFFIX)]
    for entry in entries:
        if _identity(entry) & inputs:
            raise OutputError(
                f"the output would replace `{entry.name}`, which is an input of the merge",
                file=str(path),
                advice="name another directory",
            )
    if not entries:
        return
    if not output.overwrite:
        raise FileExistsError(errno.EEXIST, "the output directory is not empty", str(path))
    names = {entry.name for entry in _entries(path)}
    # With partial files beside them, entries are what a crashed run of ours had already put there.
    is_ours = bool(names & set(_SIGNS_OF_A_MODEL)) or len(entries) < len(names)
    if not is_ours:
        raise OutputError(
            "the directory holds something, but no model that could be replaced",
            file=str(path),
            advice="name a new directory, or empty this one",
        )


def _check_places(output: OutputDirectory, names: Iterable[str]) -> None:
    for name in names:
        _check_place(output, name)


def _check_place(output: OutputDirectory, name: str) -> None:
    """Find out now what would make a rename fail, or lead out of the directory, later on."""
    target = output.path / name
    folders = [output.path / folder for folder in _folders([name])]
    blocked = [
        path for path in folders if path.is_symlink() or (path.exists() and not path.is_dir())
    ]
    if target.is_dir() and not target.is_symlink():
        blocked.append(target)
    if blocked:
        raise OutputError(
            f"`{name}` has to be written here, and something else is in its place",
            file=str(blocked[0]),
            advice="move it away, or name another directory",
        )


def _entries(path: Path) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _identity(entry: os.DirEntry[str]) -> set[tuple[int, int]]:
    """Return device and inode of the entry, and of what it links to."""
    found = set()
    for follow in (False, True):
        with contextlib.suppress(OSError):
            status = os.stat(entry.path, follow_symlinks=follow)
            found.add((status.st_dev, status.st_ino))
    return found


def _check_space(path: Path, needed: int) -> None:
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize + _partial_bytes(path)
    if needed > free:
        message = f"not enough space: {format_size(needed)} needed, {format_size(free)} free"
        raise OSError(errno.ENOSPC, message, str(path))


def _partial_bytes(path: Path) -> int:
    """Return the space that partial files of a crashed run will give back."""
    if not path.is_dir():
        return 0
    partials = (entry for entry in _entries(path) if _is_partial(entry))
    return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in partials)


def _create(output: OutputDirectory) -> None:
    missing = [folder for folder in (output.path, *output.path.parents) if not folder.exists()]
    for folder in reversed(missing):
        os.mkdir(folder)
        output.created.append(folder)
        _flush(folder.parent)


def _lock(output: OutputDirectory) -> None:
    """Keep other runs out: they would take this one's partial files for those of a crash."""
    import fcntl  # noqa: PLC0415 - not on every system

    descriptor = os.open(output.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        advice = "wait for it, or name another directory"
        raise OutputError(
            "another run is writing here", file=str(output.path), advice=advice
        ) from None
    except OSError:
        # Some network file systems cannot lock. Then there is no guard, as in most programs.
        pass
    output.lock = descriptor


def _is_partial(entry: os.DirEntry[str]) -> bool:
    is_ours = entry.name.startswith(".") and entry.name.endswith(PARTIAL_SUFFIX)
    return is_ours and not entry.is_dir(follow_symlinks=False)


def _remove_partials(path: Path) -> None:
    for entry in _entries(path):
        if _is_partial(entry):
            os.unlink(entry.path)


def _probe(output: OutputDirectory) -> None:
    _write(output.partial("probe"), b"")
    os.unlink(output.partial("probe"))


# The transaction.


def _stage(output: OutputDirectory, contents: Contents) -> list[str]:
    """Bring everything to disk under partial names; the final names besides the shards."""
    texts = dict(contents.texts)
    names = [file.name for file in contents.side_files if file.name not in texts]
    # Again: much can have happened here while the weights were written.
    _check_places(output, contents.names)
    for name in contents.shards:
        _flush(output.partial(name))
    for file in contents.side_files:
        if file.name in names:
            copy_bytes(file.source, output.partial(file.name))
    if contents.index is not None:
        _write(output.partial(INDEX_NAME), contents.index.encode())
    if contents.config is not None:
        _write(output.partial(CONFIG_NAME), contents.config.encode())
    for name, text in texts.items():
        _write(output.partial(name), text.encode())
    _flush(output.path)
    return [*names, *texts]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off Ctrl-C: between the old model and the new there is nothing to go back to."""
    is_main = threading.current_thread() is threading.main_thread()
    # A handler that another program's own code has set, with Python inside it, is left alone:
    # Python could not put it back.
    if not is_main or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def _switch(output: OutputDirectory, contents: Contents, names: Iterable[str]) -> None:
    if output.overwrite:
        _remove_old(output.path, lambda name: name == CONFIG_NAME or is_index(name))
    shards, last = list(contents.shards), _last_names(contents)
    for name in shards:
        if name not in last:
            _place(output, name)
    if output.overwrite:
        kept = set(shards)
        _remove_old(output.path, lambda name: is_loadable_weight(name) and name not in kept)
    for name in names:
        _place(output, name)
    for folder in _folders(names):
        _flush(output.path / folder)
    for name in last:
        _flush(output.path)
        _place(output, name)
    output.finished = True
    _flush(output.path)


def _folders(names: Iterable[str]) -> list[PurePath]:
    """Return the folders that files of these names lie in; for each name, the inner ones first."""
    parents = (folder for name in names for folder in PurePath(name).parents if folder.name)
    return list(dict.fromkeys(parents))


def _last_names(contents: Contents) -> list[str]:
    """Return what makes a directory a model: index and config, else the one shard itself."""
    last = [INDEX_NAME] if contents.index is not None else []
    last += [CONFIG_NAME] if contents.config is not None else []
    return last or list(contents.shards)


def _remove_old(path: Path, is_old: Callable[[str], bool]) -> None:
    removed = False
    for entry in _entries(path):
        if is_old(entry.name) and not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
            removed = True
    if removed:
        _flush(path)


def _place(output: OutputDirectory, name: str) -> None:
    """Give a partial file its name."""
    target = output.path / name
    for folder in reversed(_folders([name])):
        if not (output.path / folder).is_dir():
            os.mkdir(output.path / folder)
            output.created.append(output.path / folder)
    partial = output.partial(name)
    # Noted before the rename, so that no interrupt between the two can lose it; and by identity,
    # so that an old file of that name is not taken for ours if the rename fails.
    output.placed[target] = _identity_of(partial)
    os.rename(partial, target)


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return (status.st_dev, status.st_ino)


def _write(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """Bring a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leftovers(output: OutputDirectory) -> list[str]:
    ours = {path.relative_to(output.path).parts[0] for path in output.placed}
    try:
        entries = _entries(output.path)
    except OSError:
        return []  # The model is complete; that is what counts.
    return [
        f"`{entry.name}` was in the output directory before and is still there"
        for entry in entries
        if entry.name not in ours and not entry.is_dir(follow_symlinks=False)
    ]
