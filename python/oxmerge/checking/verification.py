"""Whether an output is what was made: `oxmerge.verify`.

By its manifest, each tensor has the hash that was taken when it was made. Or everything is computed
again, by the same engine as a merge, into a sink that compares it with what is there and writes
nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np

from oxmerge import _core
from oxmerge.arrays.views import numpy_dtype
from oxmerge.checking.headers import Found, look
from oxmerge.checking.manifests import read_manifest
from oxmerge.checking.measuring import BROKEN, Running, open_models, reported
from oxmerge.errors import OutputError, PlanError, ProblemsError, UnsupportedError
from oxmerge.json_files import NO_FILE, naming, open_at_once
from oxmerge.merging import merge_stages, prepare
from oxmerge.models.fetching import fetch
from oxmerge.models.places import size_of
from oxmerge.models.streaming import RESIDENT, is_streamed, spool_bytes, streamed
from oxmerge.models.vocabularies import is_of_tokenizer
from oxmerge.options import PlanOptions, RunOptions, check_seed
from oxmerge.output.manifest import MANIFEST_NAME, plan_digest
from oxmerge.output.side_files import is_loadable_weight
from oxmerge.problems import Findings, Problem, group_problems
from oxmerge.recipe.recipe import Recipe
from oxmerge.schema import DTYPE_SIZES
from oxmerge.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from io import BufferedReader
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
#: Codes of models that are not where they were.
_GONE = frozenset(("missing-model", "unreachable-model"))
#: What loaders read beside weights, config and tokenizer, as patterns.
_READ = (
    "*.py", "generation_config.json", "*processor_config.json", "adapter_config.json",
    "hf_quant_config.json", "quant*_config.json", "additional_chat_templates",
)  # fmt: skip
#: How the header of a weight file of a merge begins, behind its length.
_LENGTH, _BEGINS = 8, b'{"__metadata__":{"format":"pt"}'


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
    """Return whether an output of a merge is what was made. Writes nothing that stays.

    Of a recipe of several merges, those that come first are made again in the temporary directory.

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
        Methods that need numbers over the whole model read all inputs for those.
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
    OutputError
        If the temporary directory has no room for what earlier merges make.
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
        with reported(self.running, lambda: self.chosen[1]) as report:
            hashes = _core.hash_tensors(
                model.checkpoint,
                [at for _, at in chosen],
                memory=self.running.room,
                threads=self.running.threads,
                progress=report,
            )
        for number, (name, _) in enumerate(chosen):
            digest = hashes[number * _HASH_BYTES : (number + 1) * _HASH_BYTES]
            expected = manifest.tensors[name].blake3 or b""
            if digest != expected:
                self.deviations.append(Deviation(name, expected.hex(), digest.hex()))

    def _compare_files(self, manifest: Manifest) -> None:
        """Compare the files that are there with those of a manifest; tensors come later."""
        for name, size in manifest.files.items():
            self._compare_file(name, size, None)
        for name, (size, digest) in manifest.beside.items():
            self._compare_file(name, size, digest)
        made = {*manifest.files, *manifest.beside}
        with os.scandir(self.folder) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            if name in made:
                continue
            if is_loadable_weight(name):
                message = "a file of weights that was not made: a loader may take it"
                self._report_file(name, message, advice="move it away")
            elif is_of_tokenizer(name) or any(fnmatchcase(name, each) for each in _READ):
                message = "a file that was not made, and that loaders read"
                self._report_file(name, message, advice="move it away")

    def _compare_file(self, name: str, size: int, digest: str | None) -> None:
        """Compare a file by size, and by digest or, if it has tensors, by how its header begins."""
        # A name that leads out of the directory would be a file elsewhere.
        path = os.path.join(self.folder, name)
        if os.path.isabs(name) or not {"", ".", ".."}.isdisjoint(name.split("/")):
            self._report_file(name, f"`{MANIFEST_NAME}` tells of a file that is not in the output")
            return
        try:
            folder = os.path.dirname(os.path.realpath(path))
            with naming(path), open(path, "rb", opener=open_at_once) as file:
                status = os.fstat(file.fileno())
                is_same = status.st_size == size and stat.S_ISREG(status.st_mode)
                found = _digest(file, digest) if is_same else None
        except ValueError:  # a name may hold what no path can
            self._report_file(name, f"`{MANIFEST_NAME}` tells of a file that cannot be there")
            return
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            self._report_file(name, "a file that was made is not there")
            return
        if not is_same:
            message = f"a file has another size than `{MANIFEST_NAME}` says"
            self._report_file(name, message, expected=str(size), found=str(status.st_size))
        elif found is not None and found != digest:
            self._report_file(name, "a file is not what was made", expected=digest, found=found)
        elif os.path.islink(path) and os.path.basename(folder) != "blobs":  # as in the Hub's cache
            message = "a file is a link, and was made as a file: what it leads to may change"
            self._report_file(name, message, found=folder)

    def _report_file(
        self,
        name: str,
        message: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        advice: str | None = None,
    ) -> None:
        path = os.path.join(self.folder, name)
        self.problems.append(
            Problem(
                "output-differs", message, file=path, expected=expected, found=found, advice=advice
            )
        )

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
        manifest = None
        if recipe is None:
            manifest = read_manifest(self.folder)
            self._compare_files(manifest)
            # Models lie where they lay then, or beside the output.
            beside = os.path.dirname(os.path.abspath(self.folder))
            recipe = Recipe.from_text(manifest.recipe, folder=beside)
        options = PlanOptions(
            seed=(self.seed or None) if manifest is None else check_seed(manifest.seed),
            shard_size=None if manifest is None else manifest.shard_size,
            # What was merged once may be merged again.
            allow_mismatch=True,
            ignore_unknown=True,
            allow_methods=allowed,
            with_side_files=False,
        )
        try:
            plan = prepare(recipe, options)
        except ProblemsError as error:
            if manifest is not None and not _GONE.isdisjoint(each.code for each in error.problems):
                error.add_note("where models have moved, name a recipe that says so: `--recipe`")
            raise
        if manifest is not None and not plan.stages:
            self._check_plan(plan, manifest)
        model = self._open()
        if model is None:
            return
        listed = [(each.name, each.dtype, tuple(each.shape)) for each in plan.tensors]
        found = self._compare_headers(model, listed)
        numbers = {name: at for at, (name, _, _) in enumerate(listed)}
        chosen = self._choose(model, [(name, found[name]) for name in numbers if name in found])
        pairs = [(numbers[name], at) for name, at in chosen]
        with contextlib.ExitStack() as stack:
            if plan.stages:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="oxmerge-"))
                plan = self._after_stages(plan, options, folder)
                if manifest is not None:
                    self._check_plan(plan, manifest)
            self._compare_bytes(plan, model, pairs)

    def _after_stages(self, plan: Plan, options: PlanOptions, folder: str) -> Plan:
        """Make what earlier merges made, below `folder`; return the plan of the last one."""
        needed, free = sum(stage.disk for stage in plan.stages), shutil.disk_usage(folder).free
        if needed > free:
            raise OutputError(
                "there is no room for what the earlier merges make, which is made again first",
                file=folder,
                expected=f"{format_size(needed)} free",
                found=format_size(free),
                advice="set `TMPDIR` to a folder on a larger disk",
            )
        # Tokenizers and configs of theirs are read by the later ones.
        planning = replace(options, with_side_files=True)
        running = RunOptions(
            self.running.memory,
            self.running.threads,
            progress=self.running.progress,
            digests=False,
            resume=False,
        )
        places, _ = merge_stages(plan, folder, planning, running)
        names = ", ".join(f"`{name}`" for name in places)
        self.notes.append(f"made again first, and removed: {names}, {format_size(needed)}")
        return prepare(plan.recipe, options, places)

    def _compare_bytes(
        self, plan: Plan, model: InputModel, pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Make tensors of a plan, and compare each with one of the output: pairs of numbers."""
        of_all = len(pairs) < len(plan.table) and plan.table.needs_all()
        if of_all:
            self.notes.append(
                "the method needs numbers over the whole model: all inputs were read for those"
            )
        files = plan.table.files
        used = plan.table.files_of(None if of_all else [at for at, _ in pairs])
        absent = [files[each] for each in used if files[each].get("remote")]
        absent = [file for file in absent if not is_streamed(file, stream=False)]
        table = plan.table.placed(fetch(absent)) if absent else plan.table
        folder = tempfile.gettempdir()  # nothing is written beside the output
        size, tensors = spool_bytes(None, folder), [at for at, _ in pairs]
        with (
            reported(self.running, lambda: plan.bytes_read) as report,
            streamed([table], size, folder, tensors, whole=of_all) as fetcher,
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
            tensor = plan.tensors[at]
            index = tuple(int(each) for each in np.unravel_index(first, tuple(tensor.shape)))
            wanted, seen = (_value(bits, tensor.dtype) for bits in (expected, there))
            self.deviations.append(Deviation(tensor.name, wanted, seen, index, elements))

    def _check_plan(self, plan: Plan, manifest: Manifest) -> None:
        """Raise PlanError unless a plan is the one that a manifest tells of."""
        if plan_digest(plan) != manifest.plan:
            raise PlanError(
                "the recipe gives another plan than the one that the manifest tells of",
                file=os.path.join(self.folder, MANIFEST_NAME),
                expected=manifest.plan,
                found=plan_digest(plan),
                advice="models are others than then, or another version of oxmerge made it: see "
                "`inputs` there; to compare all the same, name the recipe: `--recipe RECIPE`",
            )


def _digest(file: BufferedReader, expected: str | None) -> str | None:
    """Return the SHA-256 of a file if one is expected; else how its header begins, if amiss."""
    if expected is not None:
        return hashlib.file_digest(file, "sha256").hexdigest()
    begins = file.read(_LENGTH + len(_BEGINS))[_LENGTH:]
    return None if begins == _BEGINS else begins.decode(errors="replace")


def _size(dtype: str, shape: Iterable[int]) -> int:
    size = DTYPE_SIZES[dtype]
    for length in shape:
        size *= length
    return size


def _value(bits: bytes, dtype: str) -> str:
    """Return an element as people write it, with its bits where that says more."""
    value = np.frombuffer(bits, numpy_dtype(dtype))[0]
    return f"{value} (0x{bits[::-1].hex()})"
