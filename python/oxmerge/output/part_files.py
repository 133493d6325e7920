"""What the runs of a merge in parts leave for each other in the output directory.

They share a folder there, and nothing else: they may run on other machines, at other times. Each
part has in it

- ``3of16/``, the output directory of this part alone: its weight files and its journal;
- ``3of16.key``, what it is a part of, and on which machine;
- ``3of16.lock``, which its run holds;
- ``3of16.numbers``, what it found in a sweep over its tensors (`rust/engine/part.rs`);
- ``3of16.done``, once all of it is made.

Besides there are ``plan``, which `oxmerge.finish` reads, and ``finish.lock``, which that holds; and
``earlier/1/`` and so on, the outputs of merges that come first, with such a folder of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import os
import re
import socket
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

from oxmerge import __version__
from oxmerge._core import partial_name
from oxmerge.errors import OutputError
from oxmerge.file_state import FileState
from oxmerge.json_files import read_object
from oxmerge.output.claims import BusyError, locked_file
from oxmerge.output.manifest import plan_digest
from oxmerge.output.publish import PARTS_NAME, OutputDirectory
from oxmerge.output.resume import etag_of, parsed, state_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from oxmerge.planning.plans import Plan

__all__ = [
    "DONE",
    "KEY",
    "PLAN_NAME",
    "Keys",
    "Made",
    "PartFiles",
    "Purpose",
    "join",
    "missing_parts",
    "parts_in",
    "read_done",
    "seal_of",
    "shards_of_parts",
    "shown",
]

PLAN_NAME = "plan"
_VERSION = 2
#: How a key is called; in a store, with a hash of what it says.
KEY = re.compile(r"([1-9][0-9]{0,5})of([1-9][0-9]{0,5})\.(?:[0-9a-f]{16}\.)?key")
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
    "sweep": "sweep",
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
    states : tuple of str
        When each input was written, and its inode: what tells on one machine, and for one path,
        that it was changed meanwhile.
    host, machine : str
        What this machine is called, and what tells it from others of that name.
    """

    key: str
    paths: tuple[str, ...]
    marks: tuple[dict[str, str], ...]
    states: tuple[str, ...]
    host: str
    machine: str

    @classmethod
    def of(cls, plan: Plan, parts: int, together: Sequence[Plan] = ()) -> Purpose:
        """Return that of a plan in so many parts: reads a few bytes of every input.

        A plan of a sweep is made `together` with others.
        """
        recipe = plan.recipe_text.encode(errors="backslashreplace")
        sweep = repr([plan_digest(each) for each in together])
        inputs = plan.all_input_files
        story = {
            "version": _VERSION,
            "oxmerge": __version__,
            "parts": parts,
            "seed": plan.seed,
            "shard_size": plan.shard_size,
            "recipe": hashlib.sha256(recipe).hexdigest(),
            "plan": plan_digest(plan),
            "sweep": hashlib.sha256(sweep.encode()).hexdigest(),
            # Neither paths nor inodes nor times: they may be others on another machine.
            "inputs": [[Path(file["path"]).name, file["size"]] for file in inputs],
        }
        return cls(
            json.dumps(story),
            tuple(os.path.abspath(file["path"]) for file in inputs),
            tuple(map(_marks, inputs)),
            tuple(map(state_of, inputs)),
            socket.gethostname(),
            _machine(),
        )

    @classmethod
    def read(cls, story: Mapping[str, Any]) -> Purpose | None:
        """Return what another part has written down; None if no part writes such a thing."""
        kinds = {"key": str, "paths": list, "marks": list, "states": list, "host": str}
        if not all(isinstance(story.get(name), kind) for name, kind in kinds.items()):
            return None
        paths, marks, states = story["paths"], story["marks"], story["states"]
        if not all(isinstance(each, dict) for each in marks):
            return None
        texts = [*paths, *states, *chain.from_iterable(each.values() for each in marks)]
        inputs = parsed(story["key"]).get("inputs")
        counts = [len(each) for each in (inputs, paths, marks, states) if isinstance(each, list)]
        if not all(isinstance(text, str) for text in texts) or counts != [len(paths)] * 4:
            return None
        return cls(
            story["key"], tuple(paths), tuple(marks), tuple(states), story["host"],
            str(story.get("machine")),
        )  # fmt: skip

    def story(self) -> dict[str, Any]:
        """Return what other parts read."""
        return asdict(self)

    def seal(self) -> dict[str, Any]:
        """Return what a complete output keeps of this: digests, since outputs are published.

        In how many parts it was made is not in them.
        """
        about = {name: said for name, said in parsed(self.key).items() if name != "parts"}
        return {
            "merge": _digest(about),
            "marks": [
                {kind: _digest(kind, mark) for kind, mark in each.items()} for each in self.marks
            ],
            "place": _digest(self.machine, self.paths),
            "states": _digest(self.states),
        }

    def is_sealed(self, seal: object) -> bool:
        """Tell whether an output was made of this, and of inputs as they are here now."""
        if not isinstance(seal, dict):
            return False
        own, marks = self.seal(), seal.get("marks")
        is_same_place = seal.get("place") == own["place"]
        known = ("merge", "states") if is_same_place else ("merge",)
        return (
            all(seal.get(name) == own[name] for name in known)
            and isinstance(marks, list)
            and len(marks) == len(self.marks)
            and all(map(_agree, own["marks"], marks))
        )

    def check_same(self, story: Mapping[str, Any], part: int, directory: str) -> None:
        """Raise OutputError unless what another part has written down says the same."""
        other = self.read(story)
        if other is None:
            raise OutputError(
                f"what part {part} has written down of itself is damaged",
                file=directory,
                advice="make all parts anew: `oxmerge clean` removes what was made",
            )
        there, here = f"as part {part} on {other.host[:_LONGEST]}", f"on {self.host}"
        mine, theirs = parsed(self.key), parsed(other.key)
        for name, what in _NAMES.items():
            if mine[name] != theirs.get(name):
                raise OutputError(
                    f"another {what} than that of the parts that were made here",
                    file=directory,
                    expected=f"{str(theirs.get(name))[:_LONGEST]}, {there}",
                    found=f"{str(mine[name])[:_LONGEST]} {here}",
                    advice=_ADVICE,
                )
        if len(self.paths) != len(other.paths):  # of one plan there are as many
            raise OutputError(
                "other inputs than those of the parts", file=directory, advice=_ADVICE
            )
        for at, path in enumerate(self.paths):
            file, other_file = mine["inputs"][at], theirs["inputs"][at]
            marks, other_marks = self.marks[at], other.marks[at]
            if file != other_file or not _agree(marks, other_marks):
                raise OutputError(
                    f"the input `{file[0]}` is another file than part {part} has",
                    file=path,
                    expected=f"{_told(other_file, other_marks)}, {there} has `{other.paths[at]}`",
                    found=f"{_told(file, marks)} {here}",
                    advice=_ADVICE,
                )
            # Of another machine neither time nor inode need be the same.
            is_same_place = (other.machine, other.paths[at]) == (self.machine, path)
            if is_same_place and other.states[at] != self.states[at]:
                raise OutputError(
                    f"the input `{file[0]}` has changed since part {part} was begun",
                    file=path,
                    expected=f"time and inode {other.states[at][:_LONGEST]}",
                    found=self.states[at],
                    advice="make all parts anew: `oxmerge clean` removes what was made",
                )


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode(errors="backslashreplace")).hexdigest()


def _machine() -> str:
    """Return what tells machines apart; containers of one machine have names of their own."""
    with contextlib.suppress(OSError):
        return (
            f"{Path('/etc/machine-id').read_text(encoding='ascii').strip()} {socket.gethostname()}"
        )
    return socket.gethostname()


def _told(file: object, marks: Mapping[str, str]) -> str:
    name, size = file if isinstance(file, list) and len(file) == 2 else (file, "other")  # noqa: PLR2004
    shown = [f"`{str(name)[:_LONGEST]}`", f"{str(size)[:_LONGEST]} bytes"]
    return ", ".join([*shown, *(f"{kind[:16]} {mark[:16]}" for kind, mark in marks.items())])


def _marks(file: Mapping[str, Any]) -> dict[str, str]:
    etag = etag_of(file)
    marks = {} if etag is None else {"ETag": etag}
    return marks if "remote" in file else marks | {"sample": _sample(file["path"], file["size"])}


def _agree(marks: Mapping[str, str], others: object) -> bool:
    """Tell whether marks of an input are the same, of those kinds that both machines have."""
    if not isinstance(others, dict):
        return False
    return all(marks[kind] == others[kind] for kind in marks.keys() & others.keys())


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


class Keys(Protocol):
    """Where runs of a merge in parts write down what they are parts of: a folder, or a store."""

    @property
    def directory(self) -> str | Path:
        """What users call it."""

    def keys(self) -> Mapping[str, tuple[int, Mapping[str, Any]]]:
        """Return the part and the story of each run that is written down, by name."""

    def write_key(self, name: str, story: Mapping[str, Any]) -> None:
        """Write one down, as a whole or not at all."""

    def remove_key(self, name: str) -> None:
        """Take it back."""


def join(keys: Keys, name: str, purpose: Purpose, story: Mapping[str, Any]) -> None:
    """Write down what a run is a part of; OutputError if others are parts of something else.

    Others may write theirs at the same time. So it is looked both before and after: of two that are
    parts of different merges, at least the one that writes last sees the other. Who gives way takes
    back only what it has written.
    """

    def check() -> Mapping[str, object]:
        found = keys.keys()
        for part, other in found.values():
            purpose.check_same(other, part, str(keys.directory))
        return found

    before = check()
    keys.write_key(name, story)
    try:
        check()
    except OutputError:
        if name not in before:
            keys.remove_key(name)
        raise


def seal_of(
    stories: Mapping[str, tuple[int, Mapping[str, Any]]], key: str
) -> dict[str, Any] | None:
    """Return the seal of what runs of that key made; None if none has written down what it is."""
    purposes = (Purpose.read(story) for _, story in stories.values())
    return next((each.seal() for each in purposes if each and each.key == key), None)


#: What is written down of how a part was made, and of which type; see `_core.execute`.
DONE: dict[str, type | tuple[type, ...]] = {
    "bytes_read": int, "bytes_written": int, "seconds": (int, float), "peak_memory": int,
    "memory": dict, "simd": str, "device": str, "notes": (list, tuple), "kept": int,
    "tensors": int, "input_bytes": int, "host": str,
}  # fmt: skip


def read_done(story: object) -> dict[str, Any] | None:
    """Return what is written down of how a part was made; None if no part writes such a thing."""
    if not isinstance(story, dict):
        return None
    is_whole = all(isinstance(story.get(name), kind) for name, kind in DONE.items())
    sizes = ("predicted", "budget", "workers")
    is_whole = is_whole and all(isinstance(story["memory"].get(name), int) for name in sizes)
    texts = [*story["notes"], story.get("run", "")] if is_whole else [None]
    return story if all(isinstance(text, str) for text in texts) else None


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
        """Be the only run of this part; BusyError if there is one."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked_file(f"{self.name}.lock", self.folder))
            except BlockingIOError:
                raise BusyError(
                    f"another run makes part {self.part}",
                    file=str(self.directory),
                    advice="wait for it, or make another part",
                ) from None
            yield

    def is_free(self, *, own: bool = False) -> bool:
        """Tell whether no run makes this part, and none has made it.

        What was begun on another machine is not free, unless it is this run's `own`: not every file
        system shows the locks of other machines.
        """
        story = {} if own else self._read(f"{self.name}.key") or {}
        if self.made() is not None or story.get("machine", _machine()) != _machine():
            return False
        try:
            with locked_file(f"{self.name}.lock", self.folder) as is_locked:
                return is_locked or own
        except BlockingIOError:
            return False

    def join(self, purpose: Purpose) -> None:
        """Write down what this is a part of; OutputError if others are parts of something else."""
        join(self, f"{self.name}.key", purpose, purpose.story())

    def keys(self) -> dict[str, tuple[int, Mapping[str, Any]]]:
        """Return what runs here have written down; see `Keys`."""
        found: dict[str, tuple[int, Mapping[str, Any]]] = {}
        for name in sorted(os.listdir(self.folder)):
            match = KEY.fullmatch(name)
            story = match and self._read(name)
            if match and story:
                found[name] = int(match[1]), story
        return found

    def write_key(self, name: str, story: Mapping[str, Any]) -> None:
        """Write down what a run is a part of; see `Keys`."""
        self._write(name, story)

    def remove_key(self, name: str) -> None:
        """Take that back; see `Keys`."""
        os.unlink(name, dir_fd=self.folder)

    def save(self, plan: Plan) -> None:
        """Leave the plan for who finishes, unless another part has."""
        place = self.directory / PARTS_NAME
        if not (place / PLAN_NAME).exists():
            name = f"{self.name}.plan"
            with contextlib.suppress(FileNotFoundError):  # of a dead run of this part
                os.unlink(place / partial_name(f"{name}.{os.getpid()}"))
            plan.save(place / name)
            os.replace(place / name, place / PLAN_NAME)

    def unswept(self) -> list[int]:
        """Return the parts that have not found their numbers, and that no run makes."""
        others = [self.of(part) for part in range(1, self.parts + 1) if part != self.part]
        return [other.part for other in others if not other.is_swept() and other.is_free()]

    def is_swept(self) -> bool:
        """Tell whether this part has found its numbers."""
        return f"{self.name}.numbers" in os.listdir(self.folder)

    def made(self) -> Made | None:
        """Return what this part has made, if all of it is there as it was left."""
        done = self._read(f"{self.name}.done")
        if done is None:
            return None
        try:
            shards = {name: FileState(**state) for name, state in done["shards"].items()}
            how = read_done(done["done"])
            return None if how is None else Made(str(done["key"]), shards, how)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def write_made(self, made: Made) -> None:
        """Write down that all of this part is made."""
        shards = {name: state._asdict() for name, state in made.shards.items()}
        self._write(f"{self.name}.done", {"key": made.key, "shards": shards, "done": made.done})

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

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return what a file says; None if there is none that was written as such."""
        return read_object(f"/proc/self/fd/{self.folder}/{name}") or None

    def _write(self, name: str, story: Mapping[str, Any]) -> None:
        """Write a file that is there as a whole or not at all."""
        unfinished = partial_name(f"{name}.{socket.gethostname()}.{os.getpid()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(unfinished, flags, 0o666, dir_fd=self.folder), "wb") as file:
                file.write(json.dumps(story).encode())
                file.flush()
                os.fsync(file.fileno())
            os.rename(unfinished, name, src_dir_fd=self.folder, dst_dir_fd=self.folder)
            os.fsync(self.folder)
        except OSError as error:  # which has no path of what is open
            error.filename = str(self.directory / PARTS_NAME / name)
            raise


def parts_in(directory: Path) -> int:
    """Return how many parts the merge has of which some were made in an output; 0 if none was."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(directory / PARTS_NAME)
    for name in names:
        match = KEY.fullmatch(name)
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
