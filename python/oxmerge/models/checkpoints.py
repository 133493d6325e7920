"""Open a checkpoint and look at its tensors as arrays, without loading it."""

from __future__ import annotations

import os
from functools import cached_property
from math import prod
from typing import Any

from oxmerge.arrays.views import kind_of, numpy_dtype
from oxmerge.cli.progress import watched_download
from oxmerge.models.fetching import fetch
from oxmerge.models.hub_cache import HubName
from oxmerge.models.references import (
    Located,
    error_of,
    open_located,
    remote_file,
    resolve_reference,
    split_adapters,
)
from oxmerge.models.streaming import is_streamed, read_whole
from oxmerge.models.tensor_mapping import TensorMapping
from oxmerge.problems import Problem
from oxmerge.schema import DTYPE_NAMES, DTYPE_SIZES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from oxmerge import _core
    from oxmerge.arrays.views import Framework

__all__ = ["OpenCheckpoint", "open_checkpoint"]


class OpenCheckpoint(TensorMapping["_core.TensorInfo"]):
    """The tensors of a checkpoint by name, in file order, as arrays that read when touched.

    Arrays are views of the mapped files, and keep their mapping alive: they can be used after the
    checkpoint is closed. Those of NumPy are read-only, and BF16 is ``ml_dtypes.bfloat16``. Those of
    torch, which has nothing read-only, may be written to: what is written stays in memory, and is
    seen by the arrays of the same file alone.

    A file is mapped when a tensor of it is looked up first, which raises InputChangedError if it is
    not the file whose header was read. From then on it must stay as it is: arrays see what is
    written to it, and reading one past its new end kills the process.

    Of a model in a store, a tensor is fetched each time it is looked up, into memory of its own.

    Attributes
    ----------
    path : str
        What was opened.
    warnings : list of str
        What is odd about it.
    """

    def __init__(self, path: str | os.PathLike[str], framework: Framework = "np") -> None:
        self._kind = kind_of(framework)
        self._checkpoint = _open(path)
        self._tensors = {tensor.name: tensor for tensor in self._checkpoint.tensors}
        changed = filter(self._checkpoint.is_changed, range(len(self._checkpoint)))
        self._changed = frozenset(self._checkpoint.tensor(at).name for at in changed)
        self._reference = os.fspath(path)
        self._framework: Framework = framework
        self._files: list[dict[str, Any]] = self._checkpoint.files
        self._maps: dict[int, Any] = {}
        self._closed = False
        self.path: str = self._checkpoint.path
        self.warnings: list[str] = self._checkpoint.warnings

    def __getitem__(self, name: str) -> Any:
        """Return a tensor as an array of its shape."""
        tensor = self._known(name)
        if name in self._changed:
            return self._adapted[name]
        count = prod(tensor.shape)
        if self._kind == "torch":
            return self._torch_tensor(tensor, count)
        import numpy as np  # noqa: PLC0415

        dtype = numpy_dtype(tensor.dtype)
        if count == 0:
            return np.empty(tensor.shape, dtype)
        memory, start = self._bytes(tensor, count * dtype.itemsize)
        return np.frombuffer(memory, dtype, count, start).reshape(tensor.shape)

    @cached_property
    def _adapted(self) -> Mapping[str, Any]:
        """The tensors that adapters change, each computed when it is looked up."""
        from oxmerge.arrays.lazily import lazy  # noqa: PLC0415 - seldom needed

        recipe = {"merge_method": "passthrough", "models": [{"model": self._reference}]}
        return lazy(recipe, framework=self._framework)

    def _torch_tensor(self, tensor: _core.TensorInfo, count: int) -> Any:
        import torch  # noqa: PLC0415

        dtype, size = getattr(torch, DTYPE_NAMES[tensor.dtype]), DTYPE_SIZES[tensor.dtype]
        if count == 0:
            return torch.empty(tensor.shape, dtype=dtype, device="cpu")
        memory, start = self._bytes(tensor, count * size)
        flat = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=count * size)
        if start % size:  # torch wants elements where the processor does
            flat = flat.clone()
        return flat.view(dtype).reshape(tensor.shape)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without mapping its file."""
        return self._known(name).shape

    def dtype_of(self, name: str) -> str:
        """Return the element type of a tensor by its safetensors name, without mapping its file."""
        return self._known(name).dtype

    @property
    def files(self) -> list[dict[str, Any]]:
        """The files that it reads: path, size, device and inode of each, and more."""
        return self._files

    def __repr__(self) -> str:
        """Tell what was opened."""
        closed = ", closed" if self._closed else ""
        return f"<OpenCheckpoint {self.path!r}: {len(self)} tensors{closed}>"

    def close(self) -> None:
        """Let go of the files; arrays that are still in use keep theirs."""
        self._maps.clear()
        self._closed = True

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _bytes(self, tensor: _core.TensorInfo, size: int) -> tuple[Any, int]:
        """Return memory that has a tensor, and where it begins there."""
        file = self._files[tensor.file]
        if not is_streamed(file, stream=False) or self._closed:
            return self._map(tensor.file), tensor.start
        with watched_download() as show:
            memory = read_whole(remote_file(file), tensor.start, tensor.start + size, show)
        return memory if self._kind == "torch" else memoryview(memory).toreadonly(), 0

    def _map(self, file: int) -> Any:
        if self._closed:
            raise ValueError(f"the checkpoint `{self.path}` is closed")
        if file not in self._maps:
            # The places of the tensors are those of the header that was read: so must be the file.
            self._fetch(file)
            self._maps[file] = self._checkpoint.map(file, writable=self._kind == "torch")
        return self._maps[file]

    def _fetch(self, file: int) -> None:
        """Download a file that is not here."""
        described = self._files[file]
        if "remote" in described:
            with watched_download() as show:
                self._checkpoint = self._checkpoint.placed(fetch([described], show))
            self._files[:] = self._checkpoint.files


def _located(path: str | os.PathLike[str]) -> Located:
    """Return where a model lies. What is no name of the Hub is a path, and opening it tells."""
    path = os.fspath(path)
    found = resolve_reference(path, (os.curdir,))
    if not isinstance(found, Problem):
        return found
    if found.code == "missing-model" and not HubName.parse(path):
        return Located(path)
    raise error_of(found)


def _open(path: str | os.PathLike[str]) -> _core.Checkpoint:
    if split_adapters(os.fspath(path), (os.curdir,))[1]:
        from oxmerge.models.inputs import open_model  # noqa: PLC0415 - seldom needed

        return open_model(os.fspath(path)).checkpoint
    return open_located(_located(path))


def open_checkpoint(path: str | os.PathLike[str], framework: Framework = "np") -> OpenCheckpoint:
    """Open a checkpoint: a file of safetensors or torch, or a directory with one or with shards.

    Of a model of the Hub, headers are fetched, and the files of the tensors that are looked up.

    Parameters
    ----------
    path : path
        The file or directory; a name on the Hub, such as ``org/name@revision``; an address in a
        store, such as ``s3://bucket/model``; or one of these with adapters, ``model+adapter``,
        whose changes are computed when a tensor is looked up.
    framework : {"np", "pt"}
        What the arrays are, as in safetensors: of NumPy, or of torch.

    Returns
    -------
    OpenCheckpoint
        A mapping from tensor names to arrays; a context manager.

    Raises
    ------
    CheckpointError
        If a header or the index is broken.
    PlanError
        If an adapter does not fit the model.
    UnsupportedError
        If the weights are quantised.
    RemoteError
        If the Hub does not give the model.
    ImportError
        If torch is asked for and not installed.
    """
    return OpenCheckpoint(path, framework)
