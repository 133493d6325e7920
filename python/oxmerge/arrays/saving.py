"""Writing arrays that a script has made: a safetensors file, or a model directory in shards.

The files are the engine's own, as those of a merge are: room is reserved first, each array goes to
its place as it comes, past the page cache where that is faster, and nothing has its name before all
of it is on the disk. So a mapping may be larger than memory. (The safetensors package writes a file
from a dict of all its tensors.)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from oxmerge import _core
from oxmerge.arrays.state_dicts import check_mapping
from oxmerge.arrays.views import is_narrow, view
from oxmerge.errors import OutputError, PlanError
from oxmerge.file_state import FileState
from oxmerge.output.claims import named, try_lock
from oxmerge.output.publish import (
    CONFIG_NAME,
    INDEX_NAME,
    Contents,
    close,
    commit,
    discard,
    prepare_output,
    stage,
)
from oxmerge.planning.planner import DEFAULT_SHARD_SIZE
from oxmerge.problems import Problem, group_problems
from oxmerge.schema import DTYPE_SIZES
from oxmerge.signals import put_off
from oxmerge.sizes import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import Any

    PathLike = str | os.PathLike[str]

__all__ = ["save"]

_SUFFIX = ".safetensors"
#: Data begin on a page of the disk.
_PAGE = 4096
#: The length of a header, before it; and what readers take at the most.
_LENGTH, _MOST_HEADER = 8, 100_000_000
#: What safetensors calls the types of 8 bits that NumPy (with ml_dtypes) and torch have.
_NARROW = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_SIZES = DTYPE_SIZES | dict.fromkeys(_NARROW.values(), 1)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the output."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * _SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file: its tensors in the order they are given, and the first byte of each."""

    name: str
    tensors: tuple[_Tensor, ...]
    starts: dict[str, int]
    header: str
    size: int


def save(
    tensors: Mapping[str, Any],
    path: PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
    shard_size: int | str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write arrays by name to a safetensors file, or to a directory in shards.

    Parameters
    ----------
    tensors : mapping
        Arrays by name: of NumPy, bfloat16 and float8 of ml_dtypes among them; of torch, on any
        device; what has the buffer protocol or DLPack. One that `oxmerge.open` or `oxmerge.lazy`
        returned may be larger than memory: its tensors are looked up one after the other, and
        not kept.
    path : path
        A name that ends with ``.safetensors``: that file. Any other: a directory, new or empty, for
        ``model.safetensors``, or for shards and their index.
    metadata : mapping of str to str, optional
        Text for the headers, beside ``format``, which is ``pt`` unless it is given.
    shard_size : int or str, optional
        Bytes of tensors in a shard at the most, such as ``"2GB"``; of a directory, 5 GB unless
        given. A larger tensor gets a shard of its own.
    overwrite : bool
        Whether to replace a file, or the weights in a directory that holds a model. Its config and
        other files stay.

    Returns
    -------
    list of str
        The files that were written; the index, if there is one, comes last.

    Raises
    ------
    PlanError
        With every tensor that cannot be saved: of a type that the format does not have, say.
    TypeError, ValueError
        If it is no mapping, or an option is none.
    FileExistsError
        If something is there, and `overwrite` is not set.
    OutputError
        If the output would replace an input, or another run writes there.
    OSError
        If it cannot be written; with ENOSPC, before anything is.

    Notes
    -----
    Files have temporary names until all of them are on the disk; after an error, what was there is
    still there. Arrays that share memory, as tied weights do, are written under each of their
    names. Arrays are looked up twice, the first time for shape and type, but those of an opened
    checkpoint or a lazy merge.

    Examples
    --------
    >>> import numpy as np
    >>> import oxmerge
    >>> _ = oxmerge.save({"w": np.float32([1, 2])}, "average.safetensors")
    >>> oxmerge.open("average.safetensors")["w"].tolist()
    [1.0, 2.0]
    """
    check_mapping(tensors, "tensors")
    metadata = _checked_metadata(metadata)
    path = named(path)
    is_file = path.name.endswith(_SUFFIX) and not path.is_dir()
    if is_file and shard_size is not None:
        raise ValueError("a file has no shards; name a directory, or leave shard_size out")
    most = 0 if is_file else parse_size(DEFAULT_SHARD_SIZE if shard_size is None else shard_size)
    described = _described(tensors)
    if is_file:
        shards = _lay_out(described, 0, metadata, path.name.removesuffix(_SUFFIX))
        return _save_file(path, shards[0], tensors, overwrite=overwrite)
    shards = _lay_out(described, most, metadata, "model")
    return _save_directory(path, shards, tensors, overwrite=overwrite)


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    found = {"format": "pt"}
    if metadata is None:
        return found
    if not isinstance(metadata, Mapping):
        kind = type(metadata).__name__
        raise TypeError(f"metadata must be a mapping of text to text, not a {kind}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must be text, not {key!r}: {value!r}; pass `str` of it")
        found[key] = value
    return found


# What there is to write.


def _described(tensors: Mapping[str, Any]) -> list[_Tensor]:
    """Return name, type and shape of each tensor.

    Raises
    ------
    PlanError
        With each that cannot be saved.
    """
    found, problems = [], []
    of: Any = tensors  # one of ours knows its tensors from headers
    has_headers = hasattr(of, "dtype_of") and hasattr(of, "shape_of")
    for name in tensors:
        try:
            _check_name(name)
            if has_headers:
                found.append(_Tensor(name, of.dtype_of(name), of.shape_of(name)))
            else:
                code, array = _stored(tensors[name])
                found.append(_Tensor(name, code, tuple(array.shape)))
        except (TypeError, ValueError) as error:
            problems.append(Problem("unsaved-tensor", str(error), tensor=str(name)))
    if problems:
        raise PlanError("the tensors cannot be saved", problems=group_problems(problems))
    return found


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"its name is of {type(name).__name__}; names of tensors must be text")
    if name == "__metadata__":
        raise ValueError("the format has another use for this name; give it another")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is no valid Unicode; give it another") from None


def _stored(array: Any) -> tuple[str, Any]:
    """Return the safetensors type of an array, and the array on the CPU, as what exports it."""
    device = getattr(array, "device", None)
    if getattr(device, "type", "cpu") not in {"cpu", "meta"}:
        array = array.detach().cpu()
    if not is_narrow(array):
        found = view(array, "it")
        return found.code, found
    name = str(array.dtype).removeprefix("torch.")
    if name not in _NARROW:
        raise TypeError(f"it is of {name}, which the format does not have; convert it to bfloat16")
    bits = array.view("u1") if hasattr(array, "__array_interface__") else None
    if bits is None:
        import torch  # noqa: PLC0415 - the array is of it

        bits = array.detach().view(torch.uint8)
    return _NARROW[name], view(bits, "it")


# Where it goes.


def _lay_out(
    tensors: Sequence[_Tensor], most: int, metadata: Mapping[str, str], base: str
) -> list[_Shard]:
    groups = list(_groups(tensors, most))
    if len(groups) == 1:
        return [_shard(f"{base}{_SUFFIX}", groups[0], metadata)]
    names = (f"{base}-{at:05}-of-{len(groups):05}{_SUFFIX}" for at in range(1, len(groups) + 1))
    return [_shard(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def _groups(tensors: Iterable[_Tensor], most: int) -> Iterator[list[_Tensor]]:
    """Divide tensors among shards of at most `most` bytes; of 0, into one."""
    group: list[_Tensor] = []
    size = 0
    for tensor in tensors:
        if group and most and size + tensor.bytes > most:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.bytes
    yield group


def _shard(name: str, tensors: Sequence[_Tensor], metadata: Mapping[str, str]) -> _Shard:
    header: dict[str, Any] = {"__metadata__": metadata}
    offsets, end = {}, 0
    # Large elements first: so each lies at a multiple of its size.
    for tensor in sorted(tensors, key=lambda tensor: -_SIZES[tensor.dtype]):
        offsets[tensor.name], end = end, end + tensor.bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offsets[tensor.name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(_LENGTH + len(text)) % _PAGE)
    if len(text) > _MOST_HEADER:
        message = "a header is longer than the format allows"
        raise PlanError(message, found=f"{len(text)} bytes", advice="choose a smaller shard_size")
    data = _LENGTH + len(text)
    starts = {name: data + offset for name, offset in offsets.items()}
    return _Shard(name, tuple(tensors), starts, text.decode(), data + end)


def _index(shards: Sequence[_Shard]) -> str | None:
    if len(shards) == 1:
        return None
    rows = [(tensor.name, shard.name, tensor.bytes) for shard in shards for tensor in shard.tensors]
    return _core.index_json(rows)


def _input_files(tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(getattr(tensors, "files", ()))


# Writing.


def _fill(file: _core.Shard, shard: _Shard, tensors: Mapping[str, Any]) -> FileState:
    """Write the tensors of a shard, one after the other."""
    for expected in shard.tensors:
        code, array = _stored(tensors[expected.name])
        if (code, tuple(array.shape)) != (expected.dtype, expected.shape):
            raise OutputError(
                "it is another array than the first time it was looked up",
                tensor=expected.name,
                expected=f"{expected.dtype} of shape {expected.shape}",
                found=f"{code} of shape {tuple(array.shape)}",
                advice="save a mapping that does not change meanwhile",
            )
        file.write(shard.starts[expected.name], array.exporter)
    return FileState(*file.finish())


def _save_directory(
    path: Path, shards: Sequence[_Shard], tensors: Mapping[str, Any], *, overwrite: bool
) -> list[str]:
    index = _index(shards)
    names = [shard.name for shard in shards]
    config = _read_config(path) if overwrite else None
    contents = Contents(names, index, config)
    output = prepare_output(
        path,
        overwrite=overwrite,
        input_files=_input_files(tensors),
        needed_bytes=sum(shard.size for shard in shards),
        names=contents.names,
    )
    try:
        stage(output, contents)
        states = []
        for shard in shards:
            partial = _core.partial_name(shard.name)
            file = _core.Shard(output.descriptor, path, partial, shard.header, shard.size)
            states.append(_fill(file, shard, tensors))
        commit(output, contents, states, {})
    except BaseException:
        discard(output)
        raise
    close(output)
    written = names if index is None else [*names, INDEX_NAME]
    return [os.fspath(path / name) for name in written]


def _read_config(path: Path) -> str | None:
    """Return the config that is there: of the model whose weights are replaced, it stays."""
    try:
        return (path / CONFIG_NAME).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _save_file(
    path: Path, shard: _Shard, tensors: Mapping[str, Any], *, overwrite: bool
) -> list[str]:
    folder, name, partial = path.parent, path.name, _core.partial_name(path.name)
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(folder, os.O_DIRECTORY) as descriptor:
        _check_target(path, _input_files(tensors), overwrite=overwrite)
        _remove_dead(path, partial, descriptor)
        file = _create(path, partial, descriptor, shard)
        with _opened(partial, os.O_NOFOLLOW, descriptor) as held:
            ours = os.fstat(held)
            try:
                # Others see by the lock that it is not a dead run's.
                try_lock(held)
                _fill(file, shard, tensors)
                with put_off():
                    _check_ours(path, partial, descriptor, ours)
                    _give_name(partial, name, descriptor, overwrite=overwrite)
                    os.fsync(descriptor)
            except BaseException:
                with contextlib.suppress(OSError, OutputError):
                    _check_ours(path, partial, descriptor, ours)
                    os.unlink(partial, dir_fd=descriptor)
                raise
    return [os.fspath(path)]


@contextlib.contextmanager
def _opened(path: PathLike, flags: int, folder: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_target(path: Path, inputs: Iterable[Mapping[str, Any]], *, overwrite: bool) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        if not path.is_symlink():
            return
        advice = "name a new file, or make the one that it links to"
        raise OutputError("a link to nowhere", file=str(path), advice=advice) from None
    if any((status.st_dev, status.st_ino) == (file["device"], file["inode"]) for file in inputs):
        message = "the output would replace a file that the tensors are read from"
        raise OutputError(message, file=str(path), advice="name another file")
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "there is a file of that name", str(path))


def _remove_dead(path: Path, partial: str, folder: int) -> None:
    """Remove what a run that was killed has left, unless a living one is writing it."""
    try:
        with _opened(partial, os.O_NOFOLLOW | os.O_NONBLOCK, folder) as held:
            try_lock(held)
            os.unlink(partial, dir_fd=folder)
    except FileNotFoundError:
        return
    except BlockingIOError:
        raise _another_run(path) from None


def _create(path: Path, partial: str, folder: int, shard: _Shard) -> _core.Shard:
    try:
        return _core.Shard(folder, path.parent, partial, shard.header, shard.size)
    except FileExistsError:
        raise _another_run(path) from None
    except BaseException:  # a full disk, say
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=folder)
        raise


def _another_run(path: Path) -> OutputError:
    advice = "wait for it, or name another file"
    return OutputError("another run is writing it", file=str(path), advice=advice)


def _check_ours(path: Path, partial: str, folder: int, ours: os.stat_result) -> None:
    try:
        found = os.stat(partial, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        found = None
    if found is None or (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino):
        message = "another program has replaced what was written for it"
        raise OutputError(message, file=str(path), advice="save it again")


def _give_name(partial: str, name: str, folder: int, *, overwrite: bool) -> None:
    """Rename the file; without `overwrite`, only if there is none of that name meanwhile."""
    if not overwrite:
        try:
            os.link(partial, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with contextlib.suppress(FileNotFoundError):
                os.stat(name, dir_fd=folder, follow_symlinks=False)
                raise FileExistsError(errno.EEXIST, "there is a file of that name", name) from None
        else:
            os.unlink(partial, dir_fd=folder)
            return
    os.rename(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
