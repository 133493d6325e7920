"""The engine's kernels and methods on arrays in memory.

The arrays are bfloat16, and the output goes into one that is there. They are larger than the caches
unless the record says otherwise, so a run finds nothing of what the run before it left.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from oxmerge import build_info, kernels, merge_tensors
from oxmerge.arrays import numpy_dtype
from oxmerge.bench.cases import DENSITY, WEIGHTS, cases
from oxmerge.bench.crew import Crew, pieces_of, take
from oxmerge.bench.machine import cores
from oxmerge.bench.measure import Job, Taken, UnavailableError, timed
from oxmerge.bench.record import Row
from oxmerge.demo import draw_weights
from oxmerge.errors import OxmergeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from oxmerge.bench.cases import Case

    Array = NDArray[Any]

_MODELS = 3
_CHUNK = 1 << 20
_ITEM = 2  # bytes of a bfloat16
_DTYPE = "bfloat16"
_SIMD = "OXMERGE_SIMD"  # read by the engine at each call

SCALED = ("weighted_sum of 2", "top_k_mask", "slerp", "ties", "dare_ties")
"""What is measured with each number of threads and each instruction set."""


@dataclass(frozen=True, slots=True)
class Arrays:
    """Arrays of bfloat16: a base and two fine-tunes, and one for results."""

    inputs: tuple[Array, ...]
    output: Array

    @classmethod
    def draw(cls, elements: int) -> Arrays:
        """Draw random weights as those of the demo are. Every page has been written to."""
        inputs = tuple(np.empty(elements, np.uint16) for _ in range(_MODELS))
        pieces = pieces_of(elements, _CHUNK)

        def fill(_: int) -> int:
            for start, count in take(pieces):
                random = np.random.Generator(np.random.SFC64([0, start]))
                weights = draw_weights(random, count, _MODELS)
                for array, bits in zip(inputs, weights, strict=True):
                    array[start : start + count] = bits
            return 0

        with Crew(cores()) as crew:
            crew.run(fill)
        output = np.ones(elements, np.uint16)
        bfloat16 = numpy_dtype("BF16")
        return cls(tuple(bits.view(bfloat16) for bits in inputs), output.view(bfloat16))

    @property
    def elements(self) -> int:
        """Elements of each array."""
        return self.output.size


@dataclass(frozen=True, slots=True)
class _Work:
    """A call: its name, the bytes that it reads and writes for each element, and itself."""

    name: str
    read: int
    written: int
    call: Callable[[int], object]


def kernel_jobs(arrays: Arrays, methods: Iterable[Mapping[str, Any]]) -> Iterator[Job]:
    """Yield every kernel and method, with as many threads as there are cores."""
    for work in _all(arrays, methods):
        yield _job("kernels", work, arrays, cores(), build_info()["simd"])


def thread_jobs(
    arrays: Arrays, methods: Iterable[Mapping[str, Any]], counts: Sequence[int]
) -> Iterator[Job]:
    """Yield some kernels and methods with each number of threads."""
    for work in _scaled(arrays, methods):
        for threads in counts:
            yield _job("threads", work, arrays, threads, build_info()["simd"])


def simd_jobs(arrays: Arrays, methods: Iterable[Mapping[str, Any]]) -> Iterator[Job]:
    """Yield some kernels and methods with each instruction set."""
    for work in _scaled(arrays, methods):
        for level in build_info()["simd_available"]:
            job = _job("simd", work, arrays, cores(), level)
            yield replace(job, run=_at_level(level, job.run))


def _job(part: str, work: _Work, arrays: Arrays, threads: int, level: str) -> Job:
    elements = arrays.elements
    row = Row(
        part,
        work.name,
        "oxmerge",
        "memory",
        work.read * elements,
        work.written * elements,
        threads,
        level,
        elements,
    )

    def run() -> None:
        try:
            work.call(threads)
        except (OxmergeError, TypeError, ValueError) as error:
            # A method that needs more than its description tells.
            raise UnavailableError(str(error)) from error

    return Job(row, timed(run), warm_up=True)


def _at_level(level: str, run: Callable[[], Taken]) -> Callable[[], Taken]:
    def forced() -> Taken:
        with _forced_level(level):
            return run()

    return forced


@contextmanager
def _forced_level(level: str) -> Iterator[None]:
    before = os.environ.get(_SIMD)
    os.environ[_SIMD] = level
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SIMD]
        else:
            os.environ[_SIMD] = before


def _all(arrays: Arrays, methods: Iterable[Mapping[str, Any]]) -> list[_Work]:
    return [*_kernels(arrays), *(_method(case, arrays) for case in cases(methods))]


def _scaled(arrays: Arrays, methods: Iterable[Mapping[str, Any]]) -> list[_Work]:
    return [work for work in _all(arrays, methods) if work.name in SCALED]


def _kernels(arrays: Arrays) -> Iterator[_Work]:
    base, one, two = arrays.inputs
    out, count, half = arrays.output, arrays.elements, round(DENSITY * arrays.elements)
    flags = out.view(np.bool_)[:count]
    wide = one.astype(np.float32)
    three = (*WEIGHTS, 0.5)

    def weighted_sum(tensors: Sequence[Array], weights: Sequence[float], threads: int) -> object:
        return kernels.weighted_sum(tensors, weights, out=out, threads=threads)

    yield _Work("weighted_sum of 2", 4, 2, lambda n: weighted_sum([one, two], WEIGHTS, n))
    yield _Work("weighted_sum of 3", 6, 2, lambda n: weighted_sum([base, one, two], three, n))
    yield _Work(
        "task_vector",
        4,
        2,
        lambda n: kernels.task_vector(one, base, out=out, threads=n),
    )
    yield _Work(
        "convert from float32",
        4,
        2,
        lambda n: kernels.convert(wide, _DTYPE, out=out, threads=n),
    )
    yield _Work(
        "top_k_mask",
        2,
        2,
        lambda n: kernels.top_k_mask(one, half, out=out, threads=n),
    )
    yield _Work(
        "sign_consensus",
        4,
        2,
        lambda n: kernels.sign_consensus([one, two], WEIGHTS, out=out, threads=n),
    )
    yield _Work(
        "random_mask", 0, 1, lambda n: kernels.random_mask(count, DENSITY, out=flags, threads=n)
    )
    yield _Work("kth_magnitude", 2, 0, lambda n: kernels.kth_magnitude(one, half, threads=n))
    yield _Work("norm", 2, 0, lambda n: kernels.norm(one, threads=n))
    yield _Work("dot", 4, 0, lambda n: kernels.dot(one, two, threads=n))
    yield _Work("gram of 3", 6, 0, lambda n: kernels.gram([base, one, two], threads=n))
    yield _Work("ulp_distance", 4, 0, lambda n: kernels.ulp_distance(one, two, threads=n))


def _method(case: Case, arrays: Arrays) -> _Work:
    base = arrays.inputs[0] if case.has_base else None
    tensors = arrays.inputs[1 : 1 + case.models - case.has_base]
    names = dict.fromkeys(name for values in case.each for name in values)
    parameters: dict[str, Any] = {
        name: [values[name] for values in case.each] for name in names
    } | case.shared

    def call(threads: int) -> object:
        return merge_tensors(
            case.method,
            tensors,
            base,
            out=arrays.output,
            threads=threads,
            **parameters,
        )

    return _Work(case.method, _ITEM * case.models, _ITEM, call)
