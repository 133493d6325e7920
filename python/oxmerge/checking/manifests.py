"""Reading manifests, `oxmerge.json`: what `output/manifest.py` writes. They are not trusted.

A manifest has a line for each of up to 100,000 tensors. So it is read line by line, as it is
written, and never is in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass

from oxmerge.errors import PlanError
from oxmerge.json_files import naming, open_at_once
from oxmerge.options import check_seed
from oxmerge.output.manifest import MANIFEST_NAME, MANIFEST_VERSION
from oxmerge.schema import DTYPE_SIZES
from oxmerge.sizes import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

__all__ = ["Listed", "Manifest", "read_manifest"]

#: A line that is longer is none of a tensor, and none of a recipe.
_LONGEST_LINE = 4_000_000
_MOST_HEAD = 16_000_000
#: More tensors than any model has.
_MOST_TENSORS = 2_000_000
_TENSORS = '"tensors": ['
_HASH = re.compile(r"[0-9a-f]{64}")
_MOST_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class Listed:
    """A tensor as a manifest lists it.

    Attributes
    ----------
    dtype : str
        Its element type.
    shape : tuple of int
        Its shape.
    blake3 : bytes or None
        The hash of its bytes, if it is known.
    """

    dtype: str
    shape: tuple[int, ...]
    blake3: bytes | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says.

    Attributes
    ----------
    oxmerge : str
        The version that wrote it.
    numerics : dict of str to int
        Versions of what bits depend on.
    plan : str
        The digest of the plan.
    seed, shard_size : int
        As they were asked for.
    recipe : str
        The text of the recipe.
    files : dict of str to int
        The weight files, and their sizes.
    beside : dict of str to (int, str)
        Files beside them, with size and SHA-256.
    tensors : dict of str to Listed
        The output tensors, in the plan's order.
    """

    oxmerge: str
    numerics: dict[str, int]
    plan: str
    seed: int
    shard_size: int
    recipe: str
    files: dict[str, int]
    beside: dict[str, tuple[int, str]]
    tensors: dict[str, Listed]


def read_manifest(folder: str) -> Manifest:
    """Return what the manifest in a folder says.

    Raises
    ------
    PlanError
        If there is none, or if it is not as oxmerge writes it.
    """
    path = os.path.join(folder, MANIFEST_NAME)
    try:
        with naming(path), open(path, "rb", opener=open_at_once) as file:
            return _read(file)
    except FileNotFoundError:
        message = f"there is no manifest, `{MANIFEST_NAME}`"
        advice = "a merge writes one; with `--recompute --recipe RECIPE` it is not needed"
        raise PlanError(message, file=folder, advice=advice) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error} is not there" if isinstance(error, KeyError) else str(error)
        message = f"the manifest cannot be read: {reason}"
        advice = "with `--recompute --recipe RECIPE` it is not needed"
        raise PlanError(message, file=path, advice=advice) from None


def _read(file: IO[bytes]) -> Manifest:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise ValueError("it is not a regular file")
    lines = _Lines(file)
    head = _read_head(lines)
    version = _of(head, "oxmerge_manifest", int)
    if version != MANIFEST_VERSION:
        raise ValueError(f"it is of version {version}, and this oxmerge reads {MANIFEST_VERSION}")
    tensors: dict[str, Listed] = {}
    for line in iter(lines.next, "],"):
        name, listed = _listed(json.loads(line.removesuffix(",")))
        if name in tensors or len(tensors) == _MOST_TENSORS:
            raise ValueError(f"tensor `{name}` is there twice, or there are too many")
        tensors[name] = listed
    found = lines.digest.hexdigest()
    if [lines.next(), lines.next(), file.read(1)] != [f'"sha256": "{found}"', "}", b""]:
        raise ValueError("its own SHA-256 is another: it was changed after it was written")
    numerics = _of(head, "numerics", dict)
    files = {_of(each, "name", str): _of(each, "size", int) for each in _of(head, "files", list)}
    beside = {
        _of(each, "name", str): (_of(each, "size", int), _of(each, "sha256", str))
        for each in _of(head, "beside", list)
    }
    return Manifest(
        oxmerge=_of(head, "oxmerge", str),
        numerics={key: value for key, value in numerics.items() if type(value) is int},
        plan=_of(head, "plan", str),
        seed=check_seed(_of(head, "seed", int)),
        shard_size=parse_size(_of(head, "shard_size", int)),
        recipe=_of(head, "recipe", str),
        files=files,
        beside=beside,
        tensors=tensors,
    )


def _read_head(lines: _Lines) -> dict[str, Any]:
    """Return all that stands before the list of tensors."""
    texts: list[str] = []
    size = 0
    for line in iter(lines.next, _TENSORS):
        texts.append(line)
        size += len(line)
        if size > _MOST_HEAD:
            raise ValueError("it says too much before the tensors")
    head = json.loads("\n".join(texts).removesuffix(",") + "}")
    if not isinstance(head, dict):
        raise TypeError("it is no object")
    return head


class _Lines:
    """The lines of a file, and the digest of those that were read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def next(self) -> str:
        line = self._file.readline(_LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise ValueError("it ends too early, or a line is too long")
        self.digest.update(line)
        return line.decode().strip()


def _listed(entry: object) -> tuple[str, Listed]:
    dtype, shape = _of(entry, "dtype", str), _of(entry, "shape", list)
    if dtype not in DTYPE_SIZES or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"there is no type `{dtype}` of {len(shape)} dimensions")
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"{shape} is no shape")
    found = entry.get("blake3") if isinstance(entry, dict) else None
    if found is not None and (not isinstance(found, str) or not _HASH.fullmatch(found)):
        raise ValueError(f"`{found}` is no hash")
    digest = None if found is None else bytes.fromhex(found)
    return _of(entry, "name", str), Listed(dtype, tuple(shape), digest)


def _of(entry: object, key: str, kind: type) -> Any:  # noqa: ANN401 - of that kind
    value = entry[key] if isinstance(entry, dict) else None
    if type(value) is not kind:
        raise TypeError(f"`{key}` is not what it should be")
    return value
