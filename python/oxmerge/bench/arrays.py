"""The engine's kernels and methods on arrays in memory, and the yardstick: copies by memcpy.

The arrays are bfloat16, and the output goes into one that is there. They are larger than the caches
unless the record says otherwise, so a run finds nothing of what the run before it left.

The yardsticks are copies: of an array to another, to a small one that stays in the cache (reads
alone), and from such a one (writes alone). Each is done in several ways, and the fastest counts.
They have none of the engine's code.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from oxmerge import build_info, kernels, merge_tensors
from oxmerge.arrays.views import numpy_dtype
from oxmerge.bench.cases import DENSITY, WEIGHTS
from oxmerge.bench.crew import Crew, pieces_of, take
from oxmerge.bench.machine import cores
from oxmerge.bench.measure import Job, Taken, UnavailableError, timed
from oxmerge.bench.record import Row
from oxmerge.demo import TUNING_SPREAD, draw_weights
from oxmerge.errors import OxmergeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from oxmerge.bench.cases import Case
    from oxmerge.bench.crew import Crews

    Array = NDArray[Any]

_MODELS = 3
_CHUNK = 1 << 20
_ITEM = 2  # bytes of a bfloat16
_SIMD = "OXMERGE_SIMD"  # read by the engine at each call

SCALED = ("weighted_sum of 2", "top_k_mask", "slerp", "ties", "dare_ties")
"""What is measured with each number of threads and each instruction set."""
_COPIES = {"copy": (1, 1), "read": (1, 0), "write": (0, 1)}
"""The yardsticks: how many arrays are read, and how many written."""
_COPIED_AT_ONCE = (1 << 14, 1 << 16, 1 << 18)
_LINE = 64  # bytes
_LEAST_BYTES = 256 << 20  # so many are copied in a run, for the threads' start not to matter


@dataclass(frozen=True, slots=True)
class Arrays:
    """Arrays of bfloat16: a base and two fine-tunes, and one for results."""

    inputs: tuple[Array, ...]
    output: Array

    @classmethod
    def draw(cls, elements: int, crew: Crew) -> Arrays:
        """Draw random weights as those of the demo are. Every page has been written to."""
        inputs = tuple(np.empty(elements, np.uint16) for _ in range(_MODELS))
        pieces = pieces_of(elements, _CHUNK)

        def fill(_: int) -> int:
            for start, count in take(pieces):
                random = np.random.Generator(np.random.SFC64([0, start]))
                weights = draw_weights(random, count, [TUNING_SPREAD] * (_MODELS - 1))
                for array, bits in zip(inputs, weights, strict=True):
                    array[start : start + count] = bits
            return 0

        crew.run(fill)
        bfloat16, output = numpy_dtype("BF16"), np.ones(elements, np.uint16)
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


def copy_jobs(arrays: Arrays, counts: Sequence[int], crews: Crews) -> Iterator[Job]:
    """Yield the yardsticks, with each number of threads."""
    size = arrays.output.nbytes
    for name, (reads, writes) in _COPIES.items():
        for threads in counts:
            row = Row("memory", name, "memcpy", "memory", reads * size, writes * size, threads)
            run = _best_copy(arrays, name, crews.of(threads))
            yield Job(replace(row, elements=arrays.elements), run, warm_up=True)


def _best_copy(arrays: Arrays, name: str, crew: Crew) -> Callable[[], Taken]:
    """Return what copies in several ways, and takes what the fastest took for one copy."""
    size, threads = arrays.output.nbytes, crew.threads
    times = -(-_LEAST_BYTES // size)
    lines = size // _COPIED_AT_ONCE[0] + 1
    small = crew.buffers("copy", _COPIED_AT_ONCE[-1] + _LINE * lines)

    def copying(piece: int) -> Callable[[], Taken]:
        length = min(piece, size // threads)
        count = size // (threads * length)
        # Row after row to, or from, the same place but for a step: so NumPy takes each row whole.
        shared = [
            as_strided(np.frombuffer(each, np.uint8), (count, length), (_LINE, 1)) for each in small
        ]

        def parts(array: Array) -> list[NDArray[np.uint8]]:
            used = array.view(np.uint8)[: threads * count * length]
            return list(used.reshape(threads, count, length))

        # One array after the other, so that none is found in the cache again.
        sources = [shared] if name == "write" else [parts(each) for each in arrays.inputs]
        targets = shared if name == "read" else parts(arrays.output)

        def copy_part(number: int) -> int:
            for time in range(times):
                np.copyto(targets[number], sources[time % len(sources)][number])
            return 0

        run = timed(lambda: crew.run(copy_part))
        scale = size / (threads * count * length) / times
        return lambda: Taken(run().seconds * scale)

    # A copy can also be made at a go; the small array has no such rows.
    runs = [copying(piece) for piece in (*_COPIED_AT_ONCE, *([size] if name == "copy" else []))]
    return lambda: min((run() for run in runs), key=lambda taken: taken.seconds)


def kernel_jobs(arrays: Arrays, cases: Sequence[Case]) -> Iterator[Job]:
    """Yield every kernel and method, with as many threads as there are cores."""
    for work in _all(arrays, cases):
        yield _job("kernels", work, arrays, cores(), build_info()["simd"])


def thread_jobs(arrays: Arrays, cases: Sequence[Case], counts: Sequence[int]) -> Iterator[Job]:
    """Yield some kernels and methods with each number of threads."""
    for work in _scaled(arrays, cases):
        for threads in counts:
            yield _job("threads", work, arrays, threads, build_info()["simd"])


def simd_jobs(arrays: Arrays, cases: Sequence[Case]) -> Iterator[Job]:
    """Yield some kernels and methods with each instruction set."""
    for work in _scaled(arrays, cases):
        for level in build_info()["simd_available"]:
            job = _job("simd", work, arrays, cores(), level)
            yield replace(job, run=_at_level(level, job.run))


def _job(part: str, work: _Work, arrays: Arrays, threads: int, level: str) -> Job:
    elements = arrays.elements
    moved = (work.read * elements, work.written * elements)
    row = Row(part, work.name, "oxmerge", "memory", *moved, threads, level, elements)

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


def _all(arrays: Arrays, cases: Sequence[Case]) -> list[_Work]:
    return [*_kernels(arrays), *(_method(case, arrays) for case in cases)]


def _scaled(arrays: Arrays, cases: Sequence[Case]) -> list[_Work]:
    return [work for work in _all(arrays, cases) if work.name in SCALED]


def _kernels(arrays: Arrays) -> list[_Work]:
    base, one, two = arrays.inputs
    count, half = arrays.elements, round(DENSITY * arrays.elements)
    flags = arrays.output.view(np.bool_)[:count]
    wide = one.astype(np.float32)
    three = (*WEIGHTS, 0.5)

    def work(
        name: str,
        read: int,
        written: int,
        kernel: Callable[..., object],
        *given: object,
        **named: object,
    ) -> _Work:
        options: dict[str, Any] = {"out": arrays.output, **named} if written else named
        return _Work(name, read, written, lambda n: kernel(*given, **options, threads=n))

    return [
        work("weighted_sum of 2", 4, 2, kernels.weighted_sum, [one, two], WEIGHTS),
        work("weighted_sum of 3", 6, 2, kernels.weighted_sum, [base, one, two], three),
        work("task_vector", 4, 2, kernels.task_vector, one, base),
        work("convert from float32", 4, 2, kernels.convert, wide, "bfloat16"),
        work("top_k_mask", 2, 2, kernels.top_k_mask, one, half),
        work("sign_consensus", 4, 2, kernels.sign_consensus, [one, two], WEIGHTS),
        work("random_mask", 0, 1, kernels.random_mask, count, DENSITY, out=flags),
        work("kth_magnitude", 2, 0, kernels.kth_magnitude, one, half),
        work("norm", 2, 0, kernels.norm, one),
        work("dot", 4, 0, kernels.dot, one, two),
        work("gram of 3", 6, 0, kernels.gram, [base, one, two]),
        work("ulp_distance", 4, 0, kernels.ulp_distance, one, two),
    ]


def _method(case: Case, arrays: Arrays) -> _Work:
    base = arrays.inputs[0] if case.has_base else None
    tensors = arrays.inputs[1 : 1 + case.models - case.has_base]
    names = dict.fromkeys(name for values in case.each for name in values)
    parameters: dict[str, Any] = {
        name: [values[name] for values in case.each] for name in names
    } | case.shared
    options: dict[str, Any] = {"out": arrays.output, **parameters}

    def call(threads: int) -> object:
        return merge_tensors(case.method, tensors, base, threads=threads, **options)

    return _Work(case.method, _ITEM * case.models, _ITEM, call)
