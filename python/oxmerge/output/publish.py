"""How an output directory comes to be: all at once, or not at all.

One run owns the directory, from before its first file to after its last, and reaches it by an open
descriptor only. Every file is first written under a temporary name and flushed. Only then are they
renamed, in an order in which no moment shows half a model:

1. an old index and config are removed: from here on the old model does not load;
2. the new shards are renamed in;
3. old weights that are not among the new are removed;
4. the side files, the card, the recipe and the report are renamed in;
5. the index follows, and `config.json` comes last: from here on the new model loads.

A directory without index and config loads nowhere, so a failure between 1 and 5, or a power cut,
leaves something that is plainly unfinished, never a mixture that passes for a model. Up to step 1
an old model stays as it was. A journal, written before, tells the next run which files are a dead
run's, and which that was allowed to replace: so it need not be allowed again. Another one, of the
engine, tells which tensors are finished (`resume.py`): the weight files stay with it.

`discard` is the only place that decides what happens to unfinished work.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from oxmerge import _core
from oxmerge._core import partial_name
from oxmerge.errors import OutputError
from oxmerge.file_state import FileState
from oxmerge.json_files import read_start
from oxmerge.models.stores import is_address
from oxmerge.output.claims import BusyError, Claim, claim, locked_file, named
from oxmerge.output.journal import JOURNAL_NAME, MOST_BYTES, Journal, mark
from oxmerge.output.resume import RESUME_NAME, check_same
from oxmerge.output.side_files import SideFile, copy_bytes, is_index, is_loadable_weight
from oxmerge.signals import put_off
from oxmerge.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

PARTIAL_SUFFIX = partial_name("").removeprefix(".")
STAGES_NAME = partial_name("stages")
PARTS_NAME = partial_name("parts")
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
_SIGNS_OF_A_MODEL = (CONFIG_NAME, INDEX_NAME, "model.safetensors", "oxmerge_report.json")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Letters that a message shows of a name that anyone may have given.
_LONGEST = 40
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class NoPartsError(OutputError):
    """There are no parts of a merge: nobody has made some, or another run has completed them."""


@dataclass(frozen=True, slots=True)
class _Partial:
    """A file that is complete, under a temporary name."""

    name: str
    state: FileState


@dataclass
class OutputDirectory:
    """A directory that one run writes to.

    Attributes
    ----------
    claim
        The directory, owned.
    overwrite
        Whether a model that is there may be replaced.
    purpose
        What is being made: everything that decides the bytes; see `oxmerge.output.resume`.
    is_remote
        Whether it is on a network mount, where times may be told differently a moment later.
    journal
        That of a run that was killed here while it replaced files; an empty one if there is none.
    resume
        Whether finished tensors are kept, and those of an earlier run are gone on with.
    is_resumed
        Whether an earlier run left some.
    weights
        The names of the weight files.
    places
        Where in the directory weight files wait that are not under their partial names, by name.
    complete
        By its final name, each file that waits for its name.
    placed
        The final names that this run has given, in order.
    folders
        The folders in it that this run has made, outermost first.
    finished
        Whether the new model is complete; nothing is discarded after that.
    address
        Where in an object store its files go when it is finished; the weight files are there.
    """

    claim: Claim
    overwrite: bool
    purpose: str = ""
    is_remote: bool = False
    journal: Journal = field(default_factory=Journal)
    resume: bool = False
    is_resumed: bool = False
    weights: tuple[str, ...] = ()
    places: dict[str, str] = field(default_factory=dict)
    complete: dict[str, _Partial] = field(default_factory=dict)
    placed: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    finished: bool = False
    address: str | None = None

    @property
    def path(self) -> Path:
        """What the user calls it, for messages."""
        return self.claim.path

    @property
    def descriptor(self) -> int:
        """The directory, open."""
        return self.claim.descriptor

    def may_replace(self, name: str, state: FileState) -> bool:
        """Tell whether a file that is there may go."""
        return self.overwrite or self.journal.may_replace(name, state)

    def is_written(self, name: str, now: FileState) -> bool:
        """Tell whether a file is the one that this run wrote for that name."""
        return self.is_same(self.complete[name].state, now)

    def is_same(self, before: FileState, now: FileState) -> bool:
        """Tell whether a file is the one it was, as it was left."""
        times = (0, 0) if self.is_remote else (before.modified_ns, now.modified_ns)
        return before[:3] == now[:3] and times[0] == times[1]


@dataclass(frozen=True)
class Contents:
    """What a finished output directory holds, but for what only the end of the run can tell.

    Attributes
    ----------
    shards
        Names of the weight files.
    index
        Text of the index, or None for a single shard.
    config
        Text of `config.json`, or None if the donor has none.
    side_files
        The donor's files to copy.
    texts
        Further files by name: the card, the recipe.
    late
        Names of the files that come with `commit`: the manifest and the report.
    """

    shards: Sequence[str]
    index: str | None = None
    config: str | None = None
    side_files: Sequence[SideFile] = ()
    texts: Mapping[str, str | bytes] = field(default_factory=dict)
    late: Sequence[str] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all files, with those of an index and a config that there may not be."""
        copied = (file.name for file in self.side_files)
        return (*self.shards, *copied, *self.texts, *self.late, INDEX_NAME, CONFIG_NAME)

    @property
    def written(self) -> dict[str, bytes]:
        """The texts by name, as they are written; they come before copied files of their names."""
        texts = {INDEX_NAME: self.index, CONFIG_NAME: self.config, **self.texts}
        return {
            name: text.encode(errors="backslashreplace") if isinstance(text, str) else text
            for name, text in texts.items()
            if text is not None
        }


def prepare_output(  # noqa: PLR0913 - of this package only
    directory: str | os.PathLike[str],
    *,
    overwrite: bool,
    input_files: Iterable[Mapping[str, Any]],
    needed_bytes: int,
    names: Iterable[str] = (),
    purpose: str = "",
    resume: bool = False,
    fresh: bool = False,
    parts: bool = False,
) -> OutputDirectory:
    """Check that the output can go to `directory`, make it ready, and own it.

    What an interrupted run has left there is removed, but for what this run goes on with.

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
    purpose
        What is being made: the same merge may go on where one was interrupted.
    resume
        Keep what was finished by the same merge; refuse to go on where another one was interrupted.
    fresh
        Remove what was finished.
    parts
        Take what parts of the merge have made there.

    Raises
    ------
    FileExistsError
        If the directory holds something and `overwrite` is not set.
    OutputError
        If the output would replace an input, or the directory holds something else than a model
        or something in the place of a file, or another run writes there, or it has no name; or if
        another merge was interrupted there.
    OSError
        If it cannot be written to, or (ENOSPC) does not have the space.
    """
    output = OutputDirectory(claim(named(directory)), overwrite, purpose, resume=resume)
    try:
        with _told_in_full(output):
            output.is_remote = _core.is_remote(f"/proc/self/fd/{output.descriptor}")
            output.journal = _read_journal(output)
            names = tuple(names)
            output.weights = tuple(n for n in names if is_loadable_weight(n) and not is_index(n))
            if parts:
                _require_parts(output)
            elif not fresh:
                _refuse_parts(output)
            else:
                _refuse_running_parts(output)
            output.is_resumed = parts or (not fresh and _is_resumed(output))
            inputs = {(file["device"], file["inode"]) for file in input_files}
            _check_existing(output, inputs, names)
            _check_places(output, names)
            _check_space(output, needed_bytes)
            _remove_leftovers(output)
            _probe(output)
    except BaseException:
        # What is there is as it was.
        output.claim.give_up()
        raise
    return output


def share_output(
    directory: str | os.PathLike[str],
    *,
    overwrite: bool,
    input_files: Iterable[Mapping[str, Any]],
    names: Iterable[str],
) -> OutputDirectory:
    """Check that parts of a merge can go to `directory`, and own it together with other parts.

    Parameters and errors are those of `prepare_output`; nothing is removed.
    """
    output = OutputDirectory(claim(named(directory), shared=True), overwrite)
    try:
        with _told_in_full(output):
            names = tuple(names)
            output.journal = _read_journal(output)
            inputs = {(file["device"], file["inode"]) for file in input_files}
            _check_existing(output, inputs, names)
            _check_places(output, names)
            _refuse_a_whole(output)
            with contextlib.suppress(FileExistsError):
                os.mkdir(PARTS_NAME, dir_fd=output.descriptor)
    except BaseException:
        output.claim.give_up()
        raise
    return output


def stage(output: OutputDirectory, contents: Contents) -> None:
    """Write everything but the weights, under temporary names: what can fail, fails before them.

    Parameters
    ----------
    output
        From `prepare_output`.
    contents
        What goes in.

    Raises
    ------
    InputChangedError
        If a side file is not what it was when the merge was planned.
    OSError
        If a file cannot be read or written.
    """
    texts = contents.written
    for file in contents.side_files:
        if file.name not in texts:
            with file.open() as reader, _told_in_full(output):
                _complete(output, file.name, partial(copy_bytes, reader))
    with _told_in_full(output):
        _write_texts(output, texts)


def commit(
    output: OutputDirectory,
    contents: Contents,
    shards: Sequence[FileState],
    late: Mapping[str, str | Callable[[int], None]],
) -> list[str]:
    """Turn the partial files into a finished model directory, and own it still: see `close`.

    Parameters
    ----------
    output
        From `prepare_output`, and staged.
    contents
        What goes in; its shards lie there under their partial names.
    shards
        Which files they are, and how they were left.
    late
        Further files by name: the manifest and the report, as texts or as what writes them.

    Returns
    -------
    list of str
        A note for each file that was in the directory before and still is.

    Raises
    ------
    OutputError
        If a file is not the one that was written, or something is in the place of one.
    FileExistsError
        If, without `overwrite`, others have put a file of one of the names there.
    OSError
        If a file cannot be written or renamed.
    """
    with _told_in_full(output):
        _write_texts(output, late)
        for name, state in zip(contents.shards, shards, strict=True):
            place = output.places.get(name, partial_name(name))
            output.complete[name] = _Partial(place, state)
        os.fsync(output.descriptor)
        # Again: much can have happened here while the weights were written.
        _check_places(output, contents.names)
        _check_partials(output)
        with put_off():
            _write_journal(output, contents)
            _switch(output, contents)
            _remove_folders_of_runs(output)
        return [*_moved(output), *_leftovers(output)]


def close(output: OutputDirectory, *, keep: bool = False) -> None:
    """Let others have a finished directory. Those of a sweep are closed when all are finished.

    With `keep` its journals stay: the same merge finds what is in it, and has nothing to do.
    """
    for name in () if keep else (RESUME_NAME, JOURNAL_NAME):
        with contextlib.suppress(OSError):  # it does no harm there, and the model is complete
            os.unlink(name, dir_fd=output.descriptor)
    output.claim.release()


def discard(output: OutputDirectory, *, keep: bool = False) -> bool:
    """Remove what an unfinished run wrote, and nothing else; do nothing after a finished one.

    That is: partial files, files that were already renamed in (without config and index they are
    no use), and the directories that were made for the output, as far as they are empty. What
    cannot be removed is left: the error that ended the run is the one to report.

    Parameters
    ----------
    output
        From `prepare_output`.
    keep
        Leave the journal of finished tensors, if there is one, and the weight files with them.

    Returns
    -------
    bool
        Whether something is kept, with which another run goes on.
    """
    with put_off():
        if output.finished:
            close(output)
            return False
        output.is_resumed = False
        if output.claim.is_held:
            with contextlib.suppress(OSError):
                output.is_resumed = keep and output.resume and _has_finished(output)
                _roll_back(output)
        output.claim.give_up()
        return output.is_resumed


def clean(directory: str | os.PathLike[str]) -> bool:
    """Remove what an interrupted run left in an output directory, and the directory if it is empty.

    A model that is there stays as it is.

    Parameters
    ----------
    directory : path or str
        The output of that run: a directory, or the address of one in an object store.

    Returns
    -------
    bool
        Whether there was something to remove.

    Raises
    ------
    OutputError
        If a run is writing there.
    OSError
        If there is no such directory, or something cannot be removed.

    Examples
    --------
    >>> import os
    >>> import oxmerge
    >>> os.makedirs("merged", exist_ok=True)
    >>> oxmerge.clean("merged")
    False
    """
    if is_address(os.fspath(directory)):
        from oxmerge.in_store import clean_in_store  # noqa: PLC0415 - it needs this module

        return clean_in_store(directory)
    path = named(directory)
    status = os.stat(path)
    output = OutputDirectory(claim(path), overwrite=False)
    try:
        with _told_in_full(output):
            _refuse_running_parts(output)
            output.journal = _read_journal(output)
            is_left = any(entry.name.endswith(PARTIAL_SUFFIX) for entry in _entries(output))
            _remove_leftovers(output)
            output.journal = Journal()
            _remove_partials(output)
            if is_left:
                output.claim.created.append((path.absolute(), (status.st_dev, status.st_ino)))
    finally:
        output.claim.give_up()
    return is_left


def _roll_back(output: OutputDirectory) -> None:
    # Back to front: the config, if it is there, is the last that was placed and goes first.
    for name in reversed(output.placed):
        _take_back(output, name, output.is_written)
    _remove_folders(output, reversed(output.folders))
    output.journal = _read_journal(output)
    _remove_partials(output)


# Checks before anything is written.


def _check_existing(
    output: OutputDirectory, inputs: set[tuple[int, int]], names: Iterable[str]
) -> None:
    entries = [entry for entry in _entries(output) if not entry.name.endswith(PARTIAL_SUFFIX)]
    for entry in entries:
        if _identities(entry) & inputs:
            raise OutputError(
                f"the output would replace `{entry.name}`, which is an input of the merge",
                file=str(output.path),
                advice="name another directory",
            )
    if not entries:
        return
    has_partials = len(entries) < len(_entries(output))
    if not output.overwrite:
        if output.journal.last and not _is_in_the_way(output, entries, names):
            return
        raise FileExistsError(errno.EEXIST, "the output directory is not empty", ".")
    # With partial files beside them, entries are what a crashed run of ours had already put there.
    if not has_partials and not {entry.name for entry in entries} & set(_SIGNS_OF_A_MODEL):
        raise OutputError(
            "the directory holds something, but no model that could be replaced",
            file=str(output.path),
            advice="name a new directory, or empty this one",
        )


def _is_in_the_way(
    output: OutputDirectory, entries: Iterable[os.DirEntry[str]], names: Iterable[str]
) -> bool:
    """Tell whether a file has to go that is none of a dead run's."""
    weights = (entry.name for entry in entries if _is_part_of_a_model(entry.name))
    found = ((name, _find(output, name)) for name in (*weights, *names))
    return any(state is not None and not output.may_replace(name, state) for name, state in found)


def _is_part_of_a_model(name: str) -> bool:
    return name == CONFIG_NAME or is_loadable_weight(name)


def _check_places(output: OutputDirectory, names: Iterable[str]) -> None:
    """Find out now what would make a rename fail, or replace what it may not, later on."""
    for name in names:
        state = _find(output, name)
        if state is not None and not output.may_replace(name, state):
            message = "another program has put a file there meanwhile"
            raise FileExistsError(errno.EEXIST, message, name)


def _find(output: OutputDirectory, name: str) -> FileState | None:
    """Return the file that has this name in the output, if there is one."""
    try:
        with _place(output, name) as (folder, last):
            status = os.stat(last, dir_fd=folder, follow_symlinks=False)
        is_blocked = stat.S_ISDIR(status.st_mode)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        is_blocked = True
    if is_blocked:
        raise OutputError(
            f"`{name}` has to be written here, and something else is in its place",
            file=str(output.path / name),
            advice="move it away, or name another directory",
        )
    return FileState.of(status)


def _identities(entry: os.DirEntry[str]) -> set[tuple[int, int]]:
    """Return device and inode of the entry, and of what it links to."""
    found = set()
    for follow in (False, True):
        with contextlib.suppress(OSError):
            status = entry.stat(follow_symlinks=follow)
            found.add((status.st_dev, status.st_ino))
    return found


def _check_space(output: OutputDirectory, needed: int) -> None:
    status = os.fstatvfs(output.descriptor)
    free = status.f_bavail * status.f_frsize + _leftover_bytes(output)
    if needed > free:
        message = f"not enough space: {format_size(needed)} needed, {format_size(free)} free"
        raise OSError(errno.ENOSPC, message, ".")


# What a run that was killed has left.


def _read_journal(output: OutputDirectory) -> Journal:
    """Return the journal of a run that had begun to replace files, if it did not end."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(JOURNAL_NAME, flags, dir_fd=output.descriptor)
    except OSError:
        return Journal()
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            return Journal()
        journal = Journal.from_json(file.read())
    if journal is None:
        return Journal()
    placed = [name for name in journal.ours if _is_there(output, name, journal.is_ours)]
    is_begun = placed or not all(_is_there(output, old, journal.may_replace) for old in journal.old)
    is_complete = journal.last in placed
    is_this = bool(output.purpose) and journal.purpose == output.purpose
    return journal if is_begun and (is_this or not is_complete) else Journal()


def is_just_complete(directory: Path) -> bool:
    """Tell whether a run has completed a model here, and died before it had removed the rest."""
    try:
        text, _ = read_start(directory / JOURNAL_NAME, MOST_BYTES)
        journal = Journal.from_json(text) or Journal()
        state = FileState.of(os.stat(directory / journal.last, follow_symlinks=False))
    except (OSError, ValueError):
        return False
    return journal.is_ours(journal.last, state)


def _is_there(output: OutputDirectory, name: str, is_it: Callable[[str, FileState], bool]) -> bool:
    with contextlib.suppress(OutputError):
        state = _find(output, name)
        return state is not None and is_it(name, state)
    return False


def _has_finished(output: OutputDirectory) -> bool:
    """Tell whether there are finished tensors of this merge, or of one before it."""
    if _core.journal_key(output.descriptor, output.path) is not None or _has_parts(output):
        return True
    return any(name == RESUME_NAME for name, _ in _files_of_stages(output))


def _has_parts(output: OutputDirectory) -> bool:
    return any(entry.name == PARTS_NAME for entry in _entries(output))


def _require_parts(output: OutputDirectory) -> None:
    """Raise NoPartsError unless parts of a merge are here."""
    if not _has_parts(output):
        raise no_parts(output.path)


def no_parts(directory: Path | str, *, is_model: bool = False) -> NoPartsError:
    """Return the error for an output in which no part was made, or for one that is complete."""
    return NoPartsError(
        "there are no parts of a merge",
        file=str(directory),
        found="a model that is complete" if is_model else None,
        advice="nothing is left to do, if that is what was asked for"
        if is_model
        else "make them with `oxmerge merge RECIPE OUT --part 1/N` and so on",
    )


def _refuse_parts(output: OutputDirectory) -> None:
    """Raise OutputError if parts of a merge were made here: this run would make all of it again."""
    if _has_parts(output):
        raise OutputError(
            "parts of a merge were made here",
            file=str(output.path),
            advice="make the others with `--part`, and complete them with `oxmerge finish`; or "
            "start over with `--fresh`, which removes them",
        )


def _refuse_running_parts(output: OutputDirectory) -> None:
    """Raise BusyError if a run makes a part here, or completes the parts.

    Where directories can be locked, none runs while this one owns the output; elsewhere, as on NFS,
    the locks of files tell.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = os.open(PARTS_NAME, _FOLDER, dir_fd=output.descriptor)
        except FileNotFoundError:
            return
        stack.callback(os.close, folder)
        for name in sorted(os.listdir(folder)):
            if not name.endswith(".lock"):
                continue
            try:
                stack.enter_context(locked_file(name, folder))
            except BlockingIOError:
                raise BusyError(
                    "another run makes a part of a merge here",
                    file=str(output.path),
                    found=f"the lock `{name[:_LONGEST]}`",
                    advice="wait for it, or end it",
                ) from None
            except OSError:
                continue  # no run has made that


def _refuse_a_whole(output: OutputDirectory) -> None:
    """Raise OutputError if a merge that is not in parts was begun here."""
    is_begun = any(entry.name.endswith(PARTIAL_SUFFIX) for entry in _entries(output))
    if is_begun and not _has_parts(output):
        raise OutputError(
            "a merge that is not in parts was begun here",
            file=str(output.path),
            advice="go on with it, without `--part`; or remove what it has left with "
            "`oxmerge clean`",
        )


def _is_resumed(output: OutputDirectory) -> bool:
    """Tell whether an earlier run left finished tensors that this one goes on with."""
    if not output.resume:
        return False
    journal = _core.journal_key(output.descriptor, output.path)
    if journal is not None:
        check_same(journal, output.purpose, output.path)
    return _has_finished(output)


def _files_of_stages(output: OutputDirectory) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the name and the status of each file that earlier merges have made."""
    with contextlib.suppress(FileNotFoundError):
        for _, _, names, folder in os.fwalk(STAGES_NAME, dir_fd=output.descriptor):
            for name in names:
                yield name, os.stat(name, dir_fd=folder, follow_symlinks=False)


def _leftover_bytes(output: OutputDirectory) -> int:
    """Return the space that the files of an earlier run will give back, or have already."""
    found = [(entry, entry.stat(follow_symlinks=False)) for entry in _entries(output)]
    files = [
        status
        for entry, status in found
        if _is_partial(entry) or output.journal.is_ours(entry.name, FileState.of(status))
    ]
    files += [status for _, status in _files_of_stages(output)]
    return sum(status.st_blocks * 512 for status in files)


def _remove_leftovers(output: OutputDirectory) -> None:
    journal = output.journal
    is_complete = _is_there(output, journal.last, journal.is_ours)
    if output.is_resumed or not is_complete:
        for name in journal.ours:
            _take_back(output, name, journal.is_ours)
        _remove_folders(output, journal.folders)
    _remove_partials(output)


def stages_folder(output: OutputDirectory) -> str:
    """Make the folder for what earlier merges make, and return where it is.

    It lies in the output, under a partial name: it goes with the other partial files, unless a run
    goes on with what is in it.
    """
    with _told_in_full(output), contextlib.suppress(FileExistsError):
        os.mkdir(STAGES_NAME, dir_fd=output.descriptor)
    return os.path.join(os.path.abspath(output.path), STAGES_NAME)


def _remove_folders_of_runs(output: OutputDirectory) -> None:
    """Remove what earlier merges have made, and what is left of parts."""
    for name in (STAGES_NAME, PARTS_NAME):
        shutil.rmtree(name, ignore_errors=True, dir_fd=output.descriptor)


def _is_partial(entry: os.DirEntry[str]) -> bool:
    is_ours = entry.name.startswith(".") and entry.name.endswith(PARTIAL_SUFFIX)
    return is_ours and not entry.is_dir(follow_symlinks=False)


def _remove_partials(output: OutputDirectory) -> None:
    """Remove all partial files, but for journals that say something and what they speak of."""
    failure = None
    if not output.is_resumed:
        _remove_folders_of_runs(output)
    kept = {JOURNAL_NAME} if output.journal.last else set()
    kept |= {RESUME_NAME, *map(partial_name, output.weights)} if output.is_resumed else set()
    for entry in _entries(output):
        if _is_partial(entry) and entry.name not in kept:
            try:
                os.unlink(entry.name, dir_fd=output.descriptor)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure


def _probe(output: OutputDirectory) -> None:
    name = partial_name("probe")
    try:
        _write(output, name, b"")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=output.descriptor)


# Writing under temporary names.


def _write_texts(
    output: OutputDirectory, texts: Mapping[str, str | Callable[[int], None]] | Mapping[str, bytes]
) -> None:
    for name, text in texts.items():
        data = text.encode(errors="backslashreplace") if isinstance(text, str) else text
        write = partial(_write_all, data) if isinstance(data, bytes) else data
        _complete(output, name, write)


def _complete(output: OutputDirectory, name: str, write: Callable[[int], None]) -> None:
    """Write and flush what will be called `name`."""
    # By number: a name may be too long for more letters, or not be told from others without `/`.
    temporary = partial_name(str(len(output.complete)))
    output.complete[name] = _Partial(temporary, _write_file(output, temporary, write))


def _write_file(output: OutputDirectory, name: str, write: Callable[[int], None]) -> FileState:
    descriptor = os.open(name, _NEW_FILE, 0o666, dir_fd=output.descriptor)
    try:
        write(descriptor)
        os.fsync(descriptor)
        return FileState.of(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _write_all(data: bytes, to: int) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(to, view) :]


def _write(output: OutputDirectory, name: str, data: bytes) -> None:
    _write_file(output, name, partial(_write_all, data))


def _check_partials(output: OutputDirectory) -> None:
    for name, written in output.complete.items():
        try:
            status = os.stat(written.name, dir_fd=output.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            raise _not_as_written(output, name, "gone") from None
        if not output.is_written(name, FileState.of(status)):
            raise _not_as_written(output, name, "another file, or changed")


def _not_as_written(output: OutputDirectory, name: str, found: str) -> OutputError:
    return OutputError(
        f"what was written for `{name}` is no longer there as it was written",
        file=str(output.path),
        found=found,
        advice="see to it that nothing else writes to this directory, and merge again",
    )


# The transaction.


def _write_journal(output: OutputDirectory, contents: Contents) -> None:
    old = {}
    parts = (entry.name for entry in _entries(output) if _is_part_of_a_model(entry.name))
    for name in dict.fromkeys((*parts, *output.complete)):
        with contextlib.suppress(OutputError):  # a folder, which stays
            state = _find(output, name)
            if state is not None and output.may_replace(name, state):
                old[name] = mark(state)
    journal = Journal(
        purpose=output.purpose,
        last=last_names(contents)[-1],
        ours={name: mark(written.state) for name, written in output.complete.items()},
        old=old,
        folders=tuple(f for f in _folders(output.complete) if not _has_folder(output, f)),
    )
    temporary = partial_name("journal")
    _write(output, temporary, journal.to_json())
    at = output.descriptor
    os.rename(temporary, JOURNAL_NAME, src_dir_fd=at, dst_dir_fd=at)
    os.fsync(at)
    output.journal = journal


def _switch(output: OutputDirectory, contents: Contents) -> None:
    shards, last = list(contents.shards), last_names(contents)
    weights, known = set(shards), {*shards, *last}
    others = [name for name in output.complete if name not in known]
    _remove_old(output, lambda name: name == CONFIG_NAME or is_index(name))
    for name in shards:
        if name not in last:
            _rename(output, name)
    _remove_old(output, lambda name: is_loadable_weight(name) and name not in weights)
    for name in others:
        _rename(output, name)
    for folder in _folders(others):
        with _place(output, f"{folder}/") as (inner, _):
            os.fsync(inner)
    for name in last:
        os.fsync(output.descriptor)
        _rename(output, name, completes=name == last[-1])
    os.fsync(output.descriptor)


def _folders(names: Iterable[str]) -> list[str]:
    """Return the folders that files of these names lie in; for each name, the inner ones first."""
    parents = (folder for name in names for folder in PurePosixPath(name).parents if folder.name)
    return list(map(str, dict.fromkeys(parents)))


def last_names(contents: Contents) -> list[str]:
    """Return what makes a directory a model: index and config, else the one shard itself.

    Where that is not here, the report ends it.
    """
    last = [INDEX_NAME] if contents.index is not None else []
    last += [CONFIG_NAME] if contents.config is not None else []
    return last or list(contents.shards) or list(contents.late[-1:])


def _remove_old(output: OutputDirectory, is_old: Callable[[str], bool]) -> None:
    removed = False
    for entry in _entries(output):
        if is_old(entry.name) and not entry.is_dir(follow_symlinks=False):
            state = FileState.of(entry.stat(follow_symlinks=False))
            if output.may_replace(entry.name, state):
                os.unlink(entry.name, dir_fd=output.descriptor)
                removed = True
    if removed:
        os.fsync(output.descriptor)


def _rename(output: OutputDirectory, name: str, *, completes: bool = False) -> None:
    """Give a partial file its name; with `completes`, the model is there then."""
    with _place(output, name, make=True) as (folder, last):
        # Noted before the rename, so that no interrupt between the two can lose it.
        output.placed.append(name)
        os.rename(output.complete[name].name, last, src_dir_fd=output.descriptor, dst_dir_fd=folder)
        output.finished = completes
        now = FileState.of(os.stat(last, dir_fd=folder, follow_symlinks=False))
        if not output.is_written(name, now):
            # It came from under our temporary name, so it is no one's.
            os.unlink(last, dir_fd=folder)
            output.finished = False
            raise _not_as_written(output, name, "another file, or changed")


# The directory, by its descriptor.


def _entries(output: OutputDirectory) -> list[os.DirEntry[str]]:
    with os.scandir(output.descriptor) as entries:
        return sorted(entries, key=lambda entry: entry.name)


@contextlib.contextmanager
def _place(output: OutputDirectory, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the folder that a file of that name lies in, open, and the name it has there.

    Neither links nor `..` lead out of the output.
    """
    *folders, last = name.split("/")
    if ".." in (*folders, last) or name.startswith("/"):
        raise OutputError(f"`{name}` leads out of the output", file=str(output.path))
    with contextlib.ExitStack() as stack:
        at = output.descriptor
        for depth, folder in enumerate(folders, start=1):
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, dir_fd=at)
                    output.folders.append("/".join(folders[:depth]))
            at = os.open(folder, _FOLDER, dir_fd=at)
            stack.callback(os.close, at)
        yield at, last


def _has_folder(output: OutputDirectory, folder: str) -> bool:
    try:
        with _place(output, f"{folder}/"):
            return True
    except FileNotFoundError:
        return False


def _take_back(output: OutputDirectory, name: str, is_it: Callable[[str, FileState], bool]) -> None:
    """Remove a file that was put in place, if it is the one that is meant.

    Weights get their temporary name back, where a run goes on with them.
    """
    if not (output.is_resumed and name in output.weights):
        _remove_if(output, name, is_it)
    elif _is_there(output, name, is_it):
        at = output.descriptor
        os.rename(name, partial_name(name), src_dir_fd=at, dst_dir_fd=at)


def _remove_if(output: OutputDirectory, name: str, is_it: Callable[[str, FileState], bool]) -> None:
    """Remove a file, if it is the one that is meant."""
    with contextlib.suppress(OSError, OutputError), _place(output, name) as (folder, last):
        state = FileState.of(os.stat(last, dir_fd=folder, follow_symlinks=False))
        if is_it(name, state):
            os.unlink(last, dir_fd=folder)


def _remove_folders(output: OutputDirectory, folders: Iterable[str]) -> None:
    """Remove those folders that are empty."""
    for name in folders:
        with contextlib.suppress(OSError, OutputError), _place(output, name) as (folder, last):
            os.rmdir(last, dir_fd=folder)


@contextlib.contextmanager
def _told_in_full(output: OutputDirectory) -> Iterator[None]:
    """Put the directory before the names in errors of the system, which are relative to it."""
    try:
        yield
    except OSError as error:
        name = error.filename
        is_full = isinstance(name, str) and Path(name).is_relative_to(output.path)  # the engine's
        if isinstance(name, str | None) and not is_full:
            error.filename = str(output.path / (name or ""))
        raise


def _moved(output: OutputDirectory) -> list[str]:
    """Return a note if the directory is not where it was when the run began."""
    with contextlib.suppress(OSError):
        there = os.stat(output.path)
        if os.path.samestat(there, os.fstat(output.descriptor)):
            return []
    now = os.readlink(f"/proc/self/fd/{output.descriptor}")
    return [f"`{output.path}` was moved meanwhile: the output is in `{now}`"]


def _leftovers(output: OutputDirectory) -> list[str]:
    ours = {PurePosixPath(name).parts[0] for name in output.placed}
    try:
        entries = _entries(output)
    except OSError:
        return []  # The model is complete; that is what counts.
    return [
        f"`{entry.name}` was in the output directory before and is still there"
        for entry in entries
        if entry.name not in ours
        and entry.name not in {JOURNAL_NAME, RESUME_NAME}
        and not entry.is_dir(follow_symlinks=False)
    ]
