"""Which of the donor's files go into the output as they are.

A model directory holds more than weights: tokenizer, chat template, generation config, image
processor, custom code, a licence. All of it is copied byte for byte, under the same name, except
what the merge writes anew, weights and their indexes in any format, training state, hidden folders,
and what an earlier merge has left there. The default is to copy, so that a kind of file that is
invented tomorrow is not lost.

The same goes for folders, with one exception: those that the donor's `modules.json` names are
further parts of a sentence-transformers pipeline, which does not load without them, so their
weights are copied too.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from oxmerge.errors import InputChangedError
from oxmerge.file_state import FileState
from oxmerge.json_files import open_at_once, read_json
from oxmerge.output.card import REPORT_NAME
from oxmerge.problems import Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from io import FileIO
    from typing import IO, BinaryIO

_INDEXES = ("*.index.json",)
_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack",
    "*.onnx", "*.onnx_data*", "*.onnx.data", "*.npz", "*.pkl", "*.pickle", "*.tflite", "*.nemo",
    "*.pb", "*.ot", "*.mlmodel", "*.keras", "*.engine",
    "consolidated*", "pytorch_model*", "tf_model*", "flax_model*",
)  # fmt: skip
_TRAINING = (
    "optimizer*", "scheduler.*", "scheduler", "rng_state*", "random_states*", "scaler.*",
    "trainer_state.json", "training_args.*", "events.out.tfevents*", "global_step*",
    "checkpoint-*", "zero_to_fp32.py", "latest",
)  # fmt: skip
_WRITTEN_ANEW = ("readme.md", "config.json")
_PARTIAL = ".*.oxmerge-partial"
_EARLIER_MERGE = ("mergekit_config.y*ml", "oxmerge.json", "oxmerge_*", _PARTIAL)
# The first that matches is the reason given.
_REASONS = (
    ("of an earlier merge", _EARLIER_MERGE),
    ("training state", _TRAINING),
    ("an index of weights", _INDEXES),
    ("weights", _WEIGHTS),
)
# Weights that a loader may pick up from a model directory by itself.
_LOADED_BY_NAME = (
    "*.safetensors", "pytorch_model*.bin", "model*.bin", "consolidated*", "tf_model*.h5",
    "flax_model*.msgpack", "adapter_model*",
)  # fmt: skip
#: Why files are left out that the output has in another form.
WRITTEN_ANEW = "written anew"
_CHUNK = 64 << 20
#: Folders in folders.
_DEEPEST = 128


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file to copy: its name in the output (with `/`), where it is, and its state then."""

    name: str
    source: Path
    state: FileState

    @contextmanager
    def open(self) -> Iterator[FileIO]:
        """Yield the file, open for reading; InputChangedError if it is, or becomes, another."""
        try:
            file = open(self.source, "rb", buffering=0, opener=open_at_once)  # noqa: SIM115
        except FileNotFoundError:
            raise self._changed("the file is gone since it was first read") from None
        with file:
            self._check(file)
            yield file
            self._check(file)

    def _check(self, file: IO[bytes]) -> None:
        now = FileState.of(os.fstat(file.fileno()))
        if now != self.state:
            raise self._changed("the file changed after it was first read", now)

    def _changed(self, message: str, now: FileState | None = None) -> InputChangedError:
        return InputChangedError(
            message,
            file=str(self.source),
            expected=now and _told(self.state),
            found=now and _told(now),
            advice="start again once nothing writes to the inputs",
        )


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that is not copied, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class SideFiles:
    """The donor's files besides its weights, sorted by name, and what stands against a copy."""

    copied: tuple[SideFile, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    problems: tuple[Problem, ...] = ()
    #: Files of other content than the donor's, by name.
    texts: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Return the bytes that they take."""
        return sum(map(len, self.texts.values())) + sum(file.state.size for file in self.copied)


def find_side_files(donor: Path, merged: frozenset[str] = frozenset()) -> SideFiles:
    """Sort the files of `donor` into those to copy and those to leave out.

    Links to files are followed, as model caches are made of them; links to folders are not. A
    donor that is a single file has no side files. Each file to copy is opened once, so that one
    that cannot be read is told of before anything is merged.

    Parameters
    ----------
    donor
        The directory.
    merged
        The names of the weights in it that are merged, and of their index.
    """
    if not donor.is_dir():
        return SideFiles()
    search = _Search(donor, merged, _pipeline_folders(donor))
    search.folder("", donor)
    return SideFiles(
        tuple(sorted(search.copied, key=lambda file: file.name)),
        tuple(sorted(search.left_out, key=lambda entry: entry.name)),
        tuple(search.problems),
    )


def is_side_file(name: str, donor: Path) -> bool:
    """Tell whether a file of the donor would be copied, by its name with ``/``."""
    *folders, last = name.split("/")
    if any(folder.startswith(".") or _matches(folder, _TRAINING) for folder in folders):
        return False
    reason = _reason_to_leave(last)
    is_whole = bool(folders) and folders[0] in _pipeline_folders(donor)
    return reason is None or (is_whole and reason in {"weights", "an index of weights"})


def folder_of(model: str) -> Path:
    """Return the directory of a model that is named by its index file, else the model itself."""
    path = Path(model)
    return path.parent if path.is_file() and is_index(path.name) else path


def is_loadable_weight(name: str) -> bool:
    """Tell whether a loader may take a file of that name for (part of) a model."""
    return _matches(name, _LOADED_BY_NAME) or is_index(name)


def is_index(name: str) -> bool:
    """Tell whether a file of that name says where weights are."""
    return _matches(name, _INDEXES)


def copy_bytes(reader: BinaryIO, to: int) -> None:
    """Copy what an open file holds to an open new one."""
    if _copy_in_kernel(reader.fileno(), to) == 0:
        with open(to, "wb", buffering=0, closefd=False) as writer:
            shutil.copyfileobj(reader, writer, _CHUNK)


def _copy_in_kernel(reader: int, writer: int) -> int:
    """Copy without a detour through this process where the system can; the number of bytes."""
    total = 0
    if not hasattr(os, "copy_file_range"):
        return 0
    while True:
        try:
            count = os.copy_file_range(reader, writer, _CHUNK)
        except OSError:
            if total:
                raise
            return 0
        if count == 0:
            return total
        total += count


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    lowered = name.lower()
    return any(fnmatchcase(lowered, pattern) for pattern in patterns)


def _reason_to_leave(name: str) -> str | None:
    """Return why a file of that name is not copied, or None."""
    return next((reason for reason, patterns in _REASONS if _matches(name, patterns)), None)


def _pipeline_folders(donor: Path) -> frozenset[str]:
    """Return the top-level folders that `modules.json` names."""
    try:
        modules, _ = read_json(donor / "modules.json")
    except (OSError, ValueError):
        return frozenset()
    entries = modules if isinstance(modules, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return frozenset(
        path for path in paths if isinstance(path, str) and re.fullmatch(r"[^./][^/]*", path)
    )


class _Search:
    """The walk through a donor's directory."""

    def __init__(self, donor: Path, merged: frozenset[str], pipeline: frozenset[str]) -> None:
        self.donor = str(donor)
        self.merged = merged
        self.pipeline = pipeline
        self.copied: list[SideFile] = []
        self.left_out: list[LeftOut] = []
        self.problems: list[Problem] = []

    def folder(self, prefix: str, folder: Path, *, whole: bool = False) -> None:
        """Sort everything in `folder`; with `whole`, weights are copied too."""
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._unreadable(prefix or str(folder), error)
            return
        for entry in found:
            try:
                self._sort(prefix + entry.name, entry, prefix, whole=whole)
            except OSError as error:
                self._unreadable(prefix + entry.name, error)

    def _sort(self, name: str, entry: os.DirEntry[str], prefix: str, *, whole: bool) -> None:
        if os.path.isdir(entry.path):  # False where it cannot be told, which opening it will tell
            self._enter(name, Path(entry.path), entry)
            return
        reason = _reason_to_leave(entry.name)
        if not prefix and (_matches(name, _WRITTEN_ANEW) or name in self.merged):
            reason = WRITTEN_ANEW
        if whole and reason in {"weights", "an index of weights"}:
            reason = None
        if reason is None:
            self._file(name, Path(entry.path))
        else:
            self._leave(name, reason)

    def _file(self, name: str, path: Path) -> None:
        try:
            kind = path.stat().st_mode
        except FileNotFoundError:
            self._leave(name, "a link to nowhere")
            return
        if not stat.S_ISREG(kind):
            self._leave(name, "not a regular file")
        elif not _is_unicode(name):
            message = f"the name of `{_as_text(name)}` is not UTF-8"
            self._problem(message, advice="rename it, or remove it from the model")
        else:
            with open(path, "rb", buffering=0, opener=open_at_once) as file:
                state = FileState.of(os.fstat(file.fileno()))
            self.copied.append(SideFile(name, path, state))

    def _enter(self, name: str, path: Path, entry: os.DirEntry[str]) -> None:
        if entry.name.startswith("."):
            reason: str | None = "hidden"
        elif entry.is_symlink():
            reason = "a link to a folder"
        elif _matches(entry.name, _TRAINING):
            reason = "training state"
        else:
            reason = None
        if reason is None and _is_of_a_merge(path):
            reason = "of an earlier merge"  # perhaps the one that this merge replaces
        if reason is not None:
            self._leave(name + "/", reason)
        elif name.count("/") == _DEEPEST:
            self._problem(f"folders are nested deeper than {_DEEPEST} levels: `{_as_text(name)}`")
        else:
            self.folder(name + "/", path, whole=name.split("/", 1)[0] in self.pipeline)

    def _leave(self, name: str, reason: str) -> None:
        self.left_out.append(LeftOut(_as_text(name), reason))

    def _unreadable(self, name: str, error: OSError) -> None:
        found = os.strerror(error.errno).lower() if error.errno else str(error)
        advice = "check its permissions and links, or remove it from the model"
        self._problem(f"`{_as_text(name)}` cannot be read", found=found, advice=advice)

    def _problem(
        self, message: str, *, found: str | None = None, advice: str | None = None
    ) -> None:
        problem = Problem("side-file", message, file=self.donor, found=found, advice=advice)
        self.problems.append(problem)


def _as_text(name: str) -> str:
    """Return a name with what is not UTF-8 as escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _is_of_a_merge(path: Path) -> bool:
    """Tell whether a folder holds a merge, finished or not. One that cannot be read does not."""
    try:
        names = os.listdir(path)
    except OSError:
        return False  # which is told when it is entered
    return any(name == REPORT_NAME or fnmatchcase(name, _PARTIAL) for name in names)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _told(state: FileState) -> str:
    return f"inode {state.inode}, {state.size} bytes, modified at {state.modified_ns} ns"
