"""Whether an output is what was made: `oxmerge.verify`.

By its manifest, each tensor has the hash that was taken when it was made. Or everything is computed
again, by the same engine as a merge, into a sink that compares it with what is there and writes
nothing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, field

import numpy as np

from oxmerge import _core
from oxmerge.arrays.views import numpy_dtype
from oxmerge.checking.headers import Found, look
from oxmerge.checking.manifests import read_manifest
from oxmerge.checking.measuring import BROKEN, Running, open_models, reported
from oxmerge.errors import PlanError, UnsupportedError
from oxmerge.merging import prepare
from oxmerge.models.fetching import fetch
from oxmerge.models.places import size_of
from oxmerge.models.streaming import RESIDENT, is_streamed, spool_bytes, streamed
from oxmerge.options import DEFAULT_SHARD_SIZE, PlanOptions, check_seed
from oxmerge.output.manifest import MANIFEST_NAME, plan_digest
from oxmerge.problems import Findings, Problem, group_problems
from oxmerge.recipe.recipe import Recipe
from oxmerge.schema import DTYPE_SIZES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from oxmerge.checking.manifests import Manifest
    from oxmerge.checking.measuring import Progress
    from oxmerge.merging import Request
    from oxmerge.models.inputs import InputModel
    from oxmerge.planning.plans import Plan

    PathLike = str | os.PathLike[str]

__all__ = ["Deviation", "Verification", "verify"]

#: Of the JSON form: it changes when a key goes or means something else.
SCHEMA = 1
_HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class Deviation:
    """A tensor that is not what it should be.

    Attributes
    ----------
    tensor : str
        Its name.
    expected, found : str
        What it should have been, and what it is: the hash, or the first element that differs.
    index : tuple of int, optional
        Where that element is. None where only the hash is known.
    elements : int, optional
        How many differ.
    """

    tensor: str
    expected: str
    found: str
    index: tuple[int, ...] | None = None
    elements: int | None = None

    def __str__(self) -> str:
        """Return it in one line."""
        if self.index is None:
            return f"tensor `{self.tensor}`: expected BLAKE3 {self.expected}, found {self.found}"
        where = f"element {list(self.index)}, the first of {self.elements} that differ"
        return f"tensor `{self.tensor}`: {where}: expected {self.expected}, found {self.found}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data."""
        index = None if self.index is None else list(self.index)
        return {
            "tensor": self.tensor,
            "expected": self.expected,
            "found": self.found,
            "index": index,
            "elements": self.elements,
        }


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether an output is what was made.

    Attributes
    ----------
    directory : str
        The output.
    how : str
        What its tensors were compared with: ``digests`` or ``recomputed``.
    tensors, bytes : int
        How many tensors were compared, and their bytes.
    of_tensors, of_bytes : int
        How many there are.
    deviations : tuple of Deviation
        Tensors that differ, in the order of the plan.
    problems : tuple of Problem
        What else is not as it should be: files, names, types, shapes, the config.
    notes : tuple of str
        What a reader should know, such as what was taken as a sample.
    """

    directory: str
    how: str
    tensors: int
    bytes: int
    of_tensors: int
    of_bytes: int
    deviations: tuple[Deviation, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.deviations and not self.problems

    @property
    def verdict(self) -> str:
        """What it comes to, in one line."""
        by = "by digests" if self.how == "digests" else "computed again"
        if self.is_equal:
            return f"equal: {self.tensors} of {self.of_tensors} tensors, {by}"
        count = len(self.deviations)
        parts = [f"{count} of {self.tensors} tensors, {by}"] if self.tensors else []
        parts += [f"{len(self.problems)} other problems"] if self.problems else []
        return f"different: {'; '.join(parts)}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data."""
        return {
            "schema": SCHEMA,
            "directory": self.directory,
            "equal": self.is_equal,
            "verdict": self.verdict,
            "how": self.how,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "of_tensors": self.of_tensors,
            "of_bytes": self.of_bytes,
            "deviations": [each.as_dict() for each in self.deviations],
            "problems": [each.as_dict() for each in self.problems],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Return the verdict."""
        return f"{self.directory}: {self.verdict}"


def verify(  # noqa: PLR0913 - the options of the command, keyword only
    directory: PathLike,
    *,
    recompute: bool = False,
    recipe: Request | None = None,
    sample: float = 1.0,
    seed: int = 0,
    allow_methods: Iterable[str] = (),
    memory: int | str | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> Verification:
    """Return whether an output of a merge is what was made. Writes nothing.

    Parameters
    ----------
    directory : path
        The output.
    recompute : bool
        Whether to compute its tensors again from the inputs, and compare their bytes. Unless asked
        for, they are hashed and compared with the manifest, ``oxmerge.json``.
    recipe : path, str, mapping, Recipe or Plan, optional
        What it was made by, for `recompute`; unless given, what the manifest says.
    sample : float
        Which share of the bytes to look at, above 0 and up to 1: whole tensors, chosen by `seed`.
    seed : int
        Chooses the sample; and, with a `recipe`, is the one that the merge had.
    allow_methods : iterable of str
        As for `oxmerge.merge`.
    memory, threads, progress
        As for `oxmerge.merge`; ``bytes_done`` are bytes that were read.

    Returns
    -------
    Verification
        What was compared, and what differs.

    Raises
    ------
    RecipeError, PlanError
        If it cannot be checked, and why: no manifest, one without digests, inputs that are gone or
        others than then.
    MemoryBudgetError, InputChangedError, OSError
        As for `oxmerge.merge`.
    """
    running, folder = Running(memory, threads, progress), os.fspath(directory)
    if not 0 < sample <= 1:
        raise ValueError(f"sample must be above 0 and at most 1, not {sample}")
    if recipe is not None and not recompute:
        raise ValueError("a recipe is of use with recompute=True only")
    if not os.path.isdir(folder):
        raise PlanError("there is no such directory", file=folder, advice="name an output")
    work = _Work(folder, running, sample, check_seed(seed))
    if not recompute:
        work.compare_digests(read_manifest(folder))
    else:
        work.recompute(recipe, tuple(allow_methods))
    return work.result()


@dataclass
class _Work:
    """Goes through an output, and collects what differs.

    `chosen` and `there` are numbers of tensors and of bytes: those looked at, and all.
    """

    folder: str
    running: Running
    sample: float
    seed: int
    how: str = "digests"
    chosen: tuple[int, int] = (0, 0)
    there: tuple[int, int] = (0, 0)
    deviations: list[Deviation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def result(self) -> Verification:
        return Verification(
            directory=self.folder,
            how=self.how,
            tensors=self.chosen[0],
            bytes=self.chosen[1],
            of_tensors=self.there[0],
            of_bytes=self.there[1],
            deviations=tuple(self.deviations),
            problems=group_problems(self.problems),
            notes=tuple(self.notes),
        )

    # By digests.

    def compare_digests(self, manifest: Manifest) -> None:
        """Hash the tensors, and compare them with a manifest."""
        if any(each.blake3 is None for each in manifest.tensors.values()):
            message = "the manifest has no digests: the merge was made with `--no-digests`"
            advice = "compute it again: `--recompute`"
            raise PlanError(message, file=self.folder, advice=advice)
        self._compare_files(manifest)
        model = self._open()
        if model is None:
            return
        listed = [(name, each.dtype, each.shape) for name, each in manifest.tensors.items()]
        found = self._compare_headers(model, listed)
        chosen = self._choose(
            model, [(name, found[name]) for name, _, _ in listed if name in found]
        )
        with reported(self.running, self.chosen[1]) as report:
            hashes = _core.hash_tensors(
                model.checkpoint,
                [at for _, at in chosen],
                memory=self.running.room,
                threads=self.running.threads,
                progress=report,
            )
        for number, (name, _) in enumerate(chosen):
            digest = hashes[number * _HASH_BYTES :][:_HASH_BYTES]
            expected = manifest.tensors[name].blake3 or b""
            if digest != expected:
                self.deviations.append(Deviation(name, expected.hex(), digest.hex()))

    def _compare_files(self, manifest: Manifest) -> None:
        for name, size in manifest.files.items():
            # A name with a separator would be a file elsewhere.
            path = os.path.join(self.folder, os.path.basename(name))
            try:
                found = os.stat(path).st_size
            except (OSError, ValueError):  # a name may hold what no path can
                continue  # told when the checkpoint is opened
            if found != size or name != os.path.basename(name):
                message = f"a file has another size than `{MANIFEST_NAME}` says"
                problem = Problem(
                    "output-differs", message, file=path, expected=str(size), found=str(found)
                )
                self.problems.append(problem)

    def _open(self) -> InputModel | None:
        """Return the output, opened; None if it is so broken that it cannot be."""
        findings = Findings()
        try:
            (model,) = open_models([self.folder], findings, "cannot verify")
        except PlanError as error:
            is_broken = error.problems and all(each.code in BROKEN for each in error.problems)
            if isinstance(error, UnsupportedError) or not is_broken:
                raise
            self.problems += error.problems
            return None
        found = Found()
        look(model, found)
        self.problems += [problem for problem in found.errors if problem.code == "config-size"]
        return model

    def _compare_headers(
        self, model: InputModel, listed: Sequence[tuple[str, str, tuple[int, ...]]]
    ) -> dict[str, int]:
        """Return the number of each tensor that is there as it should be; report the others."""
        numbers = {name: at for at, name in enumerate(model.checkpoint.names())}
        found: dict[str, int] = {}
        for name, dtype, shape in listed:
            at = numbers.pop(name, None)
            if at is None:
                self._report("missing-tensor", "the output lacks a tensor", name)
                continue
            tensor = model.checkpoint.tensor(at)
            there = (tensor.dtype, tuple(tensor.shape))
            if there == (dtype, shape):
                found[name] = at
            else:
                types = [f"{kind} {list(lengths)}" for kind, lengths in ((dtype, shape), there)]
                message = "a tensor of the output has another type or shape"
                self._report("output-differs", message, name, *types)
        for name in numbers:
            self._report("output-differs", "the output has a tensor that was not made", name)
        self.there = len(listed), sum(_size(dtype, shape) for _, dtype, shape in listed)
        return found

    def _report(
        self,
        code: str,
        message: str,
        tensor: str,
        expected: str | None = None,
        found: str | None = None,
    ) -> None:
        self.problems.append(
            Problem(code, message, file=self.folder, tensor=tensor, expected=expected, found=found)
        )

    def _choose(
        self, model: InputModel, tensors: Sequence[tuple[str, int]]
    ) -> list[tuple[str, int]]:
        """Return a sample of tensors, in their order: at random, until there are enough bytes."""
        sizes = {}
        for name, at in tensors:
            tensor = model.checkpoint.tensor(at)
            sizes[name] = size_of(tensor) * DTYPE_SIZES[tensor.dtype]
        chosen = set(sizes)
        if self.sample < 1:
            left = self.sample * sum(sizes.values())
            chosen = set()
            for name in sorted(sizes, key=self._rank):
                if left <= 0:
                    break
                chosen.add(name)
                left -= sizes[name]
            share = f"{len(chosen)} of {len(sizes)} tensors"
            self.notes.append(f"a sample was looked at: {share}, chosen by seed {self.seed}")
        self.chosen = len(chosen), sum(sizes[name] for name in chosen)
        return [(name, at) for name, at in tensors if name in chosen]

    def _rank(self, name: str) -> bytes:
        """Return where a tensor is in an order that is at random, the same on every machine."""
        return hashlib.sha256(f"{self.seed}:{name}".encode(errors="surrogatepass")).digest()

    # By computing again.

    def recompute(self, recipe: Request | None, allowed: tuple[str, ...]) -> None:
        """Make the tensors again, and compare their bytes."""
        self.how = "recomputed"
        if recipe is None:
            plan = self._plan_of(read_manifest(self.folder), allowed)
        else:
            plan = self._prepared(recipe, self.seed, DEFAULT_SHARD_SIZE, allowed)
        model = self._open()
        if model is None:
            return
        listed = [(each.name, each.dtype, tuple(each.shape)) for each in plan.tensors]
        found = self._compare_headers(model, listed)
        numbers = {name: at for at, (name, _, _) in enumerate(listed)}
        chosen = self._choose(model, [(name, found[name]) for name in numbers if name in found])
        pairs = [(numbers[name], at) for name, at in chosen]
        files = plan.table.files
        used = (files[each] for each in plan.table.files_of([at for at, _ in pairs]))
        absent = [file for file in used if "remote" in file and not is_streamed(file, stream=False)]
        table = plan.table.placed(fetch(absent)) if absent else plan.table
        folder = tempfile.gettempdir()  # nothing is written beside the output
        size, tensors = spool_bytes(None, folder), [at for at, _ in pairs]
        with (
            reported(self.running, plan.bytes_read) as report,
            streamed([table], size, folder, tensors) as fetcher,
        ):
            differing = _core.compare_outputs(
                table,
                model.checkpoint,
                pairs,
                memory=self.running.room,
                threads=self.running.threads,
                progress=report,
                spool=None if fetcher is None else fetcher.spool,
                beside=0 if fetcher is None else RESIDENT,
            )
        for at, first, elements, expected, there in differing:
            name, dtype, shape = listed[at]
            index = tuple(int(each) for each in np.unravel_index(first, shape))
            wanted, seen = (_value(bits, dtype) for bits in (expected, there))
            self.deviations.append(Deviation(name, wanted, seen, index, elements))

    def _plan_of(self, manifest: Manifest, allowed: tuple[str, ...]) -> Plan:
        """Return the plan that a manifest tells of."""
        # Models lie where they lay then, or beside the output.
        beside = os.path.dirname(os.path.abspath(self.folder))
        recipe = Recipe.from_text(manifest.recipe, folder=beside)
        plan = self._prepared(recipe, manifest.seed, manifest.shard_size, allowed)
        if plan_digest(plan) != manifest.plan:
            raise PlanError(
                "the recipe gives another plan than the one that the manifest tells of",
                file=os.path.join(self.folder, MANIFEST_NAME),
                expected=manifest.plan,
                found=plan_digest(plan),
                advice="models are others than then, or another version of oxmerge made it: see "
                "`inputs` there; to compare all the same, name the recipe: `--recipe RECIPE`",
            )
        return plan

    def _prepared(
        self, recipe: Request, seed: int, shard_size: int, allowed: tuple[str, ...]
    ) -> Plan:
        options = PlanOptions(
            seed=check_seed(seed),
            shard_size=shard_size,
            # What was merged once may be merged again.
            allow_mismatch=True,
            ignore_unknown=True,
            allow_methods=allowed,
            with_side_files=False,
        )
        plan = prepare(recipe, options)
        if plan.stages:
            message = "not supported yet: computing again a recipe of several merges"
            raise PlanError(message, advice="`oxmerge verify` without `--recompute` checks digests")
        return plan


def _size(dtype: str, shape: Iterable[int]) -> int:
    size = DTYPE_SIZES[dtype]
    for length in shape:
        size *= length
    return size


def _value(bits: bytes, dtype: str) -> str:
    """Return an element as people write it, with its bits where that says more."""
    value = np.frombuffer(bits, numpy_dtype(dtype))[0]
    return f"{value} (0x{bits[::-1].hex()})"
