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
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from oxmerge.card import REPORT_NAME
from oxmerge.json_files import read_json

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
_EARLIER_MERGE = ("mergekit_config.y*ml", "oxmerge_*", ".*.oxmerge-partial")
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


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file to copy: its name in the output (with `/`), where it is, its bytes."""

    name: str
    source: Path
    size: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that is not copied, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class SideFiles:
    """The donor's files besides its weights, sorted by name."""

    copied: tuple[SideFile, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def total_bytes(self) -> int:
        """Return the bytes that copying takes."""
        return sum(file.size for file in self.copied)


def find_side_files(donor: Path, merged: frozenset[str] = frozenset()) -> SideFiles:
    """Sort the files of `donor` into those to copy and those to leave out.

    Links to files are followed, as model caches are made of them; links to folders are not. A
    donor that is a single file has no side files.

    Parameters
    ----------
    donor
        The directory.
    merged
        The names of the weights in it that are merged, and of their index.
    """
    if not donor.is_dir():
        return SideFiles((), ())
    search = _Search(merged, _pipeline_folders(donor))
    search.folder("", donor)
    return SideFiles(
        tuple(sorted(search.copied, key=lambda file: file.name)),
        tuple(sorted(search.left_out, key=lambda entry: entry.name)),
    )


def is_loadable_weight(name: str) -> bool:
    """Tell whether a loader may take a file of that name for (part of) a model."""
    return _matches(name, _LOADED_BY_NAME) or is_index(name)


def is_index(name: str) -> bool:
    """Tell whether a file of that name says where weights are."""
    return _matches(name, _INDEXES)


def copy_bytes(source: Path, target: Path) -> None:
    """Copy a file's bytes to a new file and flush it. Neither links nor modes are carried over."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(source, "rb", buffering=0) as reader:
        expected = os.fstat(reader.fileno()).st_size
        with open(os.open(target, flags, 0o666), "wb", buffering=0) as writer:
            copied = _copy_in_kernel(reader.fileno(), writer.fileno())
            if copied == 0:
                shutil.copyfileobj(reader, writer, _CHUNK)
            written = os.fstat(writer.fileno()).st_size
            if written != expected:
                message = f"copied {written} of {expected} bytes: did the file change?"
                raise OSError(None, message, str(source))
            os.fsync(writer.fileno())


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

    def __init__(self, merged: frozenset[str], pipeline: frozenset[str]) -> None:
        self.merged = merged
        self.pipeline = pipeline
        self.copied: list[SideFile] = []
        self.left_out: list[LeftOut] = []

    def folder(self, prefix: str, folder: Path, *, whole: bool = False) -> None:
        """Sort everything in `folder`; with `whole`, weights are copied too."""
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name = prefix + entry.name
            if entry.is_dir():
                self._enter(name, Path(entry.path), entry)
                continue
            reason = _reason_to_leave(entry.name)
            if not prefix and (_matches(name, _WRITTEN_ANEW) or name in self.merged):
                reason = WRITTEN_ANEW
            if whole and reason in {"weights", "an index of weights"}:
                reason = None
            self._file(name, Path(entry.path), reason)

    def _file(self, name: str, path: Path, reason: str | None) -> None:
        try:
            status = path.stat()
        except FileNotFoundError:
            self.left_out.append(LeftOut(name, reason or "a link to nowhere"))
            return
        if reason is None and not stat.S_ISREG(status.st_mode):
            reason = "not a regular file"
        if reason is None:
            self.copied.append(SideFile(name, path, status.st_size))
        else:
            self.left_out.append(LeftOut(name, reason))

    def _enter(self, name: str, path: Path, entry: os.DirEntry[str]) -> None:
        if entry.name.startswith("."):
            reason: str | None = "hidden"
        elif entry.is_symlink():
            reason = "a link to a folder"
        elif (path / REPORT_NAME).exists():
            reason = "of an earlier merge"  # perhaps the one that this merge replaces
        else:
            reason = "training state" if _matches(entry.name, _TRAINING) else None
        if reason is None:
            self.folder(name + "/", path, whole=name.split("/", 1)[0] in self.pipeline)
        else:
            self.left_out.append(LeftOut(name + "/", reason))
