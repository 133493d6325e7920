"""What the runs of a merge in parts leave for each other in the output directory.

They share a folder there, and nothing else: they may run on other machines, at other times. Each
part has in it

- ``3of16/``, the output directory of this part alone: its weight files and its journal;
- ``3of16.key``, what it is a part of, and on which machine;
- ``3of16.lock``, which its run holds;
- ``3of16.numbers``, what it found in a sweep over its tensors (`rust/engine/part.rs`);
- ``3of16.done``, once all of it is made.

Besides there are ``plan``, which `oxmerge.finish` reads, and ``finish.lock``, which that holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from oxmerge import __version__
from oxmerge._core import partial_name
from oxmerge.errors import OutputError
from oxmerge.file_state import FileState
from oxmerge.json_files import read_object
from oxmerge.output.claims import locked_file
from oxmerge.output.manifest import plan_digest
from oxmerge.output.publish import PARTS_NAME, OutputDirectory
from oxmerge.output.resume import etag_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from oxmerge.planning.plans import Plan

__all__ = [
    "PLAN_NAME",
    "Made",
    "PartFiles",
    "Purpose",
    "missing_parts",
    "parts_in",
    "shards_of_parts",
    "shown",
]

PLAN_NAME = "plan"
_VERSION = 1
_KEY = re.compile(r"([1-9][0-9]{0,5})of([1-9][0-9]{0,5})\.key")
#: Where in a file a few bytes are compared: at so many places, so many.
_PLACES = 4
_PLACE_BYTES = 4096
#: Numbers of parts that a message names.
_SHOWN = 8
#: Letters that a message shows of what another run has written.
_LONGEST = 40
_ADVICE = (
    "give every part the same recipe, options, inputs and version of oxmerge; "
    "`oxmerge clean` removes what was made"
)

#: What a key says, and how a message calls it.
_NAMES = {
    "version": "form of parts",
    "oxmerge": "oxmerge",
    "parts": "number of parts",
    "seed": "seed",
    "shard_size": "shard size",
    "recipe": "text of the recipe",
    "plan": "plan",
}


def shards_of_parts(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Return the shards of each part, of the sizes of all: as nearly as possible of equal bytes.

    The largest shards are given first, each to the part that has the fewest bytes.
    """
    loads: list[tuple[int, int, list[int]]] = [(0, part, []) for part in range(parts)]
    for shard in sorted(range(len(sizes)), key=lambda shard: (-sizes[shard], shard)):
        load, part, shards = loads[0]
        shards.append(shard)
        heapq.heapreplace(loads, (load + sizes[shard], part, shards))
    return [sorted(shards) for _, _, shards in sorted(loads, key=lambda each: each[1])]


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a part is a part of, as one machine sees it.

    Attributes
    ----------
    key : str
        What all parts have in common, on any machine.
    paths : tuple of str
        Where the inputs are here.
    marks : tuple of dict
        What tells whether an input is the same file: its ETag, where the Hub told one, and a hash
        of a few of its bytes, where it is here.
    """

    key: str
    paths: tuple[str, ...]
    marks: tuple[dict[str, str], ...]

    @classmethod
    def of(cls, plan: Plan, parts: int) -> Purpose:
        """Return that of a plan in so many parts: reads a few bytes of every input."""
        recipe = plan.recipe_text.encode(errors="backslashreplace")
        story = {
            "version": _VERSION,
            "oxmerge": __version__,
            "parts": parts,
            "seed": plan.seed,
            "shard_size": plan.shard_size,
            "recipe": hashlib.sha256(recipe).hexdigest(),
            "plan": plan_digest(plan),
            # Neither paths nor inodes nor times: they may be others on another machine.
            "inputs": [(Path(file["path"]).name, file["size"]) for file in plan.input_files],
        }
        paths = tuple(file["path"] for file in plan.input_files)
        return cls(json.dumps(story), paths, tuple(map(_marks, plan.input_files)))

    def check_same(self, other: Mapping[str, Any], part: int, directory: Path) -> None:
        """Raise OutputError unless what another part has written down says the same."""
        there, here = f"as part {part} on {other['host']}", f"on {socket.gethostname()}"
        mine, theirs = json.loads(self.key), json.loads(other["key"])
        for name, what in _NAMES.items():
            if mine[name] != theirs.get(name):
                raise OutputError(
                    f"another {what} than that of the parts that were made here",
                    file=str(directory),
                    expected=f"{str(theirs.get(name))[:_LONGEST]}, {there}",
                    found=f"{str(mine[name])[:_LONGEST]} {here}",
                    advice=_ADVICE,
                )
        inputs = zip(mine["inputs"], theirs["inputs"], self.marks, other["marks"], strict=True)
        paths = zip(self.paths, other["paths"], strict=True)
        for (file, other_file, marks, other_marks), (path, other_path) in zip(
            inputs, paths, strict=True
        ):
            known = marks.keys() & other_marks.keys()
            if file != other_file or any(marks[kind] != other_marks[kind] for kind in known):
                raise OutputError(
                    f"the input `{file[0]}` is another file on another machine",
                    file=path,
                    expected=f"{_told(other_file, other_marks)}, {there} has `{other_path}`",
                    found=f"{_told(file, marks)} {here}",
                    advice=_ADVICE,
                )


def _told(file: Sequence[Any], marks: Mapping[str, str]) -> str:
    name, size = file
    return ", ".join([f"`{name}`", f"{size} bytes", *(f"{k} {v[:16]}" for k, v in marks.items())])


def _marks(file: Mapping[str, Any]) -> dict[str, str]:
    etag = etag_of(file)
    marks = {} if etag is None else {"ETag": etag}
    return marks if "remote" in file else marks | {"sample": _sample(file["path"], file["size"])}


def _sample(path: str, size: int) -> str:
    """Return a hash of a few bytes at the start, the end and between.

    Another fine-tune has other bytes nearly everywhere, so this tells most files of a size apart
    without reading them.
    """
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for place in range(_PLACES):
            start = max(size - _PLACE_BYTES, 0) * place // (_PLACES - 1)
            found.update(os.pread(file.fileno(), _PLACE_BYTES, start))
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Made:
    """What a part has made."""

    key: str
    shards: dict[str, FileState]
    done: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PartFiles:
    """The files of one part; `folder` is the shared folder, open, and `directory` the output."""

    part: int
    parts: int
    folder: int
    directory: Path

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.part}of{self.parts}"

    @property
    def path(self) -> Path:
        """The output directory of this part alone."""
        return self.directory / PARTS_NAME / self.name

    def of(self, part: int) -> PartFiles:
        """Return those of another part."""
        return PartFiles(part, self.parts, self.folder, self.directory)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only run of this part; OutputError if there is one."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked_file(f"{self.name}.lock", self.folder))
            except BlockingIOError:
                raise OutputError(
                    f"another run makes part {self.part}",
                    file=str(self.directory),
                    advice="wait for it, or make another part",
                ) from None
            yield

    def join(self, purpose: Purpose) -> None:
        """Write down what this is a part of; OutputError if others are parts of something else.

        Others may write theirs at the same time. So it is looked both before and after.
        """
        self._check_others(purpose)
        story = {
            "key": purpose.key,
            "host": socket.gethostname(),
            "paths": purpose.paths,
            "marks": purpose.marks,
        }
        before = self._read("key")
        self._write("key", story)
        try:
            self._check_others(purpose)
        except OutputError:
            if before is None:
                os.unlink(f"{self.name}.key", dir_fd=self.folder)
            raise

    def save(self, plan: Plan) -> None:
        """Leave the plan for who finishes, unless another part has."""
        place = self.directory / PARTS_NAME
        if not (place / PLAN_NAME).exists():
            name = f"{self.name}.plan"
            with contextlib.suppress(FileNotFoundError):  # of a dead run of this part
                os.unlink(place / partial_name(f"{name}.{os.getpid()}"))
            plan.save(place / name)
            os.replace(place / name, place / PLAN_NAME)

    def waits(self) -> bool:
        """Tell whether this part has found its numbers, and another one has not."""
        there = set(os.listdir(self.folder))
        names = [f"{self.of(part).name}.numbers" for part in range(1, self.parts + 1)]
        return names[self.part - 1] in there and not there.issuperset(names)

    def made(self) -> Made | None:
        """Return what this part has made, if all of it is there as it was left."""
        done = self._read("done")
        if done is None:
            return None
        try:
            shards = {name: FileState(**state) for name, state in done["shards"].items()}
            return Made(str(done["key"]), shards, dict(done["done"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def write_made(self, made: Made) -> None:
        """Write down that all of this part is made."""
        shards = {name: state._asdict() for name, state in made.shards.items()}
        self._write("done", {"key": made.key, "shards": shards, "done": made.done})

    def forget_made(self) -> None:
        """Take back that all is made."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.name}.done", dir_fd=self.folder)

    def place_of(self, shard: str) -> str:
        """Return where in the output a weight file of this part waits."""
        return f"{PARTS_NAME}/{self.name}/{partial_name(shard)}"

    def find(self, output: OutputDirectory, made: Made) -> dict[str, tuple[str, FileState]] | None:
        """Return where the weight files wait that were made, and how; None if one is not as it was.

        A run that was killed while it finished the directory has moved some. Devices have another
        number on another machine.
        """
        found = {}
        for shard, before in made.shards.items():
            for place in (self.place_of(shard), partial_name(shard)):
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(place, dir_fd=output.descriptor, follow_symlinks=False)
                    now = FileState.of(status)
                    if output.is_same(before._replace(device=now.device), now):
                        found[shard] = place, now
        return found if len(found) == len(made.shards) else None

    def _check_others(self, purpose: Purpose) -> None:
        for name in sorted(os.listdir(self.folder)):
            match = _KEY.fullmatch(name)
            if match is None:
                continue
            other = PartFiles(int(match[1]), int(match[2]), self.folder, self.directory)
            story = other._read("key")
            if story is not None:
                purpose.check_same(story, other.part, self.directory)

    def _read(self, kind: str) -> dict[str, Any] | None:
        """Return what a file of this part says; None if there is none that was written as such."""
        return read_object(f"/proc/self/fd/{self.folder}/{self.name}.{kind}") or None

    def _write(self, kind: str, story: Mapping[str, Any]) -> None:
        """Write a file that is there as a whole or not at all."""
        name = f"{self.name}.{kind}"
        unfinished = partial_name(f"{name}.{socket.gethostname()}.{os.getpid()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(unfinished, flags, 0o666, dir_fd=self.folder), "wb") as file:
            file.write(json.dumps(story).encode())
            file.flush()
            os.fsync(file.fileno())
        os.rename(unfinished, name, src_dir_fd=self.folder, dst_dir_fd=self.folder)
        os.fsync(self.folder)


def parts_in(directory: Path) -> int:
    """Return how many parts the merge has of which some were made in an output; 0 if none was."""
    names = os.listdir(directory / PARTS_NAME) if (directory / PARTS_NAME).is_dir() else []
    for name in names:
        match = _KEY.fullmatch(name)
        if match:
            return int(match[2])
    return 0


def missing_parts(first: PartFiles) -> list[int]:
    """Return the parts of which not all is made."""
    return [at for at in range(1, first.parts + 1) if first.of(at).made() is None]


def shown(parts: Sequence[int]) -> str:
    """Return numbers of parts for a message."""
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    noun = "part" if len(parts) == 1 else "parts"
    return f"{noun} {', '.join(map(str, parts[:_SHOWN]))}{more}"
