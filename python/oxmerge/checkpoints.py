"""Open a checkpoint and look at its tensors as arrays, without loading it."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from math import prod

from oxmerge import _core
from oxmerge.arrays import numpy_dtype
from oxmerge.problems import no_such_key

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    import numpy as np

__all__ = ["OpenCheckpoint", "open_checkpoint"]


class OpenCheckpoint(Mapping[str, "np.ndarray[Any, Any]"]):
    """The tensors of a checkpoint by name, in file order, as arrays that read when touched.

    Arrays are read-only views of the mapped files, and keep their mapping alive: they can be used
    after the checkpoint is closed. BF16 is ``ml_dtypes.bfloat16`` if that package is installed,
    else raw ``uint16``, whose dtype tells oxmerge's functions what it is.

    A file is mapped when a tensor of it is looked up first, which raises InputChangedError if it is
    not the file whose header was read. From then on it must stay as it is: arrays see what is
    written to it, and reading one past its new end kills the process.

    Attributes
    ----------
    path : str
        What was opened.
    warnings : list of str
        What is odd about it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._checkpoint = _core.open_checkpoint(os.fspath(path))
        self._tensors = {tensor.name: tensor for tensor in self._checkpoint.tensors}
        self._files: list[dict[str, Any]] = self._checkpoint.files
        self._maps: dict[int, mmap.mmap] = {}
        self._closed = False
        self.path: str = self._checkpoint.path
        self.warnings: list[str] = self._checkpoint.warnings

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        """Return a tensor as a read-only array of its shape."""
        import numpy as np  # noqa: PLC0415

        if name not in self._tensors:
            raise no_such_key("tensor", name, self._tensors)
        tensor = self._tensors[name]
        dtype = numpy_dtype(tensor.dtype)
        count = prod(tensor.shape)
        if count == 0:
            return np.empty(tensor.shape, dtype)
        flat = np.frombuffer(self._map(tensor.file), dtype, count, tensor.start)
        return flat.reshape(tensor.shape)

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - as of any mapping
        """Return a tensor, or `default` if there is none of that name."""
        return self[name] if name in self else default  # noqa: SIM401 - this is it

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a tensor of that name, without mapping its file."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in file order."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        """Tell whether it is the same object: comparing tensors would read them all."""
        return self is other

    def __hash__(self) -> int:
        """Return a number for this object."""
        return id(self)

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

    def _map(self, file: int) -> mmap.mmap:
        if self._closed:
            raise ValueError(f"the checkpoint `{self.path}` is closed")
        if file not in self._maps:
            with open(self._files[file]["path"], "rb") as stream:
                # The places of the tensors are those of the header that was read.
                _core.check_unchanged(json.dumps([self._files[file]]))
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def open_checkpoint(path: str | os.PathLike[str]) -> OpenCheckpoint:
    """Open a checkpoint: a safetensors file, or a directory with one or with shards.

    Parameters
    ----------
    path : path
        The file or directory.

    Returns
    -------
    OpenCheckpoint
        A mapping from tensor names to arrays; a context manager.

    Raises
    ------
    CheckpointError
        If a header or the index is broken.
    UnsupportedError
        If the weights are quantised.
    """
    return OpenCheckpoint(path)
