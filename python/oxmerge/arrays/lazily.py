"""A merge as a mapping: tensors are computed when they are asked for, and no file is written."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

from oxmerge import _core
from oxmerge.arrays.in_memory import check_options
from oxmerge.arrays.views import empty, kind_of
from oxmerge.cli.progress import watched_download
from oxmerge.merging import prepare
from oxmerge.models.fetching import fetch
from oxmerge.models.streaming import DEFAULT_SPOOL, is_streamed, streamed
from oxmerge.models.tensor_mapping import TensorMapping
from oxmerge.options import PlanOptions
from oxmerge.stages import weights_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from oxmerge.arrays.views import Framework, Kind
    from oxmerge.merging import Request
    from oxmerge.planning.plans import Plan
    from oxmerge.problems import Problem
    from oxmerge.schema import OutputTensor

__all__ = ["LazyMerge", "lazy"]


class LazyMerge(TensorMapping[int]):
    """The tensors of a merge by name, in file order; each is computed when it is looked up.

    Nothing is kept: a tensor that is looked up twice is computed twice. The inputs must stay where
    they are.

    Attributes
    ----------
    warnings : tuple of Problem
        What has no effect in the recipe, and what of the inputs is left out.
    """

    def __init__(
        self,
        plan: Plan,
        kind: Kind,
        threads: int | None,
        earlier: Mapping[str, _Earlier] = MappingProxyType({}),
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self._earlier = earlier
        self._lock = lock or nullcontext()
        self._tensors = plan.tensors.by_place()
        self._plan = plan
        self._table = plan.table
        self._engine = _core.OnDemand(plan.table)
        self._kind: Kind = kind
        self._threads = threads
        self.warnings: tuple[Problem, ...] = plan.warnings

    #: Looking a tensor up takes as long as merging it.
    is_computed = True

    def __getitem__(self, name: str) -> Any:
        """Compute a tensor."""
        at = self._known(name)
        tensor = self._plan.tensors[at]
        with self._lock:
            self._make_inputs(tensor)
            return self._compute(at, tensor)

    def _make_inputs(self, tensor: OutputTensor) -> None:
        """Have the tensors here that earlier merges make and that this one is made of."""
        files = self._table.files if self._earlier else []
        for source in tensor.sources if self._earlier else ():
            earlier = self._earlier.get(files[source.file]["path"])
            if earlier is not None:
                earlier.make(source.start)

    def _compute(self, at: int, tensor: OutputTensor) -> Any:
        files = self._table.files
        absent = [file for each in self._table.files_of([at]) if "remote" in (file := files[each])]
        with watched_download() if absent else nullcontext() as show:
            self._fetch([each for each in absent if not is_streamed(each, stream=False)], show)
            merged = empty(tensor.shape, tensor.dtype, self._kind)
            folder = tempfile.gettempdir()
            with streamed([self._table], DEFAULT_SPOOL, folder, [at], progress=show) as fetcher:
                spool = None if fetcher is None else fetcher.spool
                engine = self._engine if spool is None else _core.OnDemand(self._table, spool)
                engine.compute(at, merged.exporter, self._threads)
        return merged.array

    def _fetch(
        self, files: Sequence[Mapping[str, Any]], show: Callable[[int, int, str], None] | None
    ) -> None:
        """Download files that are not here."""
        if files:
            self._table = self._table.placed(fetch(files, show))
            self._engine = _core.OnDemand(self._table)

    def __repr__(self) -> str:
        """Tell what it is a merge of."""
        return f"<LazyMerge by {self._plan.method!r}: {len(self)} tensors>"

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without computing it."""
        return self._plan.tensors[self._known(name)].shape

    def dtype_of(self, name: str) -> str:
        """Return the element type of a tensor by its safetensors name, without computing it."""
        return self._plan.tensors[self._known(name)].dtype

    @property
    def files(self) -> tuple[dict[str, Any], ...]:
        """The files that it reads: path, size, device and inode of each, and more."""
        return tuple(self._plan.input_files)


class _Earlier:
    """The output of a merge that comes first: tensors are computed when later ones need them.

    They are put where they are missing in the stand-in, whose size and time stay as they are.

    Parameters
    ----------
    plan : Plan
        Its plan.
    path : str
        The stand-in's file of weights.
    merge : LazyMerge
        Computes its tensors, as arrays of NumPy.
    """

    def __init__(self, plan: Plan, path: str, merge: LazyMerge) -> None:
        self._path = path
        self._merge = merge
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        self._missing: dict[int, str] = {}
        for tensor in plan.tensors:
            if tensor.bytes:
                self._missing[start] = tensor.name
            start += tensor.bytes

    def make(self, start: int) -> None:
        """Compute the tensor that begins there, unless it is there."""
        name = self._missing.get(start)
        if name is None:
            return
        array = self._merge[name]
        status = os.stat(self._path)
        try:
            with open(self._path, "r+b") as file:
                file.seek(start)
                file.write(array.reshape(-1).view("u1"))
        finally:
            # Also after Ctrl-C: with another time it would be taken for an input that changed.
            os.utime(self._path, ns=(status.st_atime_ns, status.st_mtime_ns))
        del self._missing[start]


def _with_earlier(plan: Plan, kind: Kind, threads: int | None) -> LazyMerge:
    """Return the last of several merges, which has the others compute what it needs."""
    lock = threading.RLock()
    earlier: dict[str, _Earlier] = {}
    for number, stage in enumerate(plan.stages):
        path = weights_of(plan, number)
        merge = LazyMerge(stage, "numpy", threads, dict(earlier), lock)
        earlier[path] = _Earlier(stage, path, merge)
    return LazyMerge(plan, kind, threads, earlier, lock)


def lazy(
    recipe: Request,
    *,
    framework: Framework = "np",
    seed: int | None = None,
    threads: int | None = None,
    strict: bool = False,
    allow_mismatch: bool = False,
    ignore_unknown: bool = False,
    allow_methods: Iterable[str] = (),
) -> LazyMerge:
    """Return the merge of a recipe as a mapping whose tensors are computed when asked for.

    The bits are those that `oxmerge.merge` writes. So a model can be loaded straight from a recipe:
    ``model.load_state_dict(oxmerge.lazy(recipe, framework="pt"), assign=True)``. Of a model that
    was made on the ``meta`` device, what the checkpoint does not hold stays there: see
    ``python/SCRIPTS.md``.

    Parameters
    ----------
    recipe : path, str, mapping, Recipe or Plan
        What to merge: a file, YAML text, its keys and values, a recipe, or a plan.
    framework : {"np", "pt"}
        What the tensors are, as in safetensors: of NumPy, where BF16 is ``ml_dtypes.bfloat16``, or
        of torch.
    seed : int, optional
        Of the random masks that some methods draw; 0 unless given. A plan has its own.
    threads : int, optional
        As many as there are cores, unless given.
    strict : bool
        Whether warnings count as problems.
    allow_mismatch : bool
        Whether models may be of another type than the one whose config the output has.
    ignore_unknown : bool
        Whether keys and parameters of the recipe that are not known are warnings.
    allow_methods : iterable of str
        Modules whose functions a recipe may name as its method: see `oxmerge.merge`.

    Returns
    -------
    LazyMerge
        A mapping from names to arrays. Looking one up reads the inputs of that tensor only, and
        raises InputChangedError if a file is not what it was.

    Raises
    ------
    RecipeError, PlanError
        With every problem that the recipe and the headers show.
    ImportError
        If torch is asked for and not installed.

    Notes
    -----
    Reads headers, configs and tokenizers, once. A tensor costs what merging it costs (``oxmerge
    methods NAME`` tells), and the memory of the result; its inputs are read in pieces. It is
    computed on the CPU. Of a recipe of several merges, what the earlier ones make is kept in the
    temporary directory, as far as it is needed, while the mapping lives.

    Examples
    --------
    >>> import oxmerge
    >>> model = oxmerge.lazy("recipe.yml")
    >>> list(model)
    ['model.embed_tokens.weight', 'model.norm.weight']
    >>> model["model.norm.weight"].shape
    (16,)
    """
    check_options(0 if seed is None else seed, threads)
    kind = kind_of(framework)
    plan = prepare(
        recipe,
        PlanOptions(
            seed,
            strict=strict,
            allow_mismatch=allow_mismatch,
            ignore_unknown=ignore_unknown,
            allow_methods=allow_methods,
            with_side_files=False,
        ),
    )
    if plan.stages:
        return _with_earlier(plan, kind, threads)
    return LazyMerge(plan, kind, threads)
