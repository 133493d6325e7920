"""The arithmetic of a merge in torch operations, with the bits of the SIMD engine.

The engine plans, reads, schedules and writes as ever; where it would run a program on a piece of a
tensor, it calls a `Program` here. That walks the very same instructions and effects, one torch
operation for each (a few for the composite ones), over the whole piece instead of chunks of it. So
a method does not know where it runs, and what runs on a GPU is tested on torch's CPU, but for the
device.

Copies and streams are here, and the walk; `torch_kernels` has the operations.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import TYPE_CHECKING, Any

import torch

from oxmerge import torch_kernels as kernels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    Inputs = Sequence[tuple[str, memoryview] | None]
    #: Name of the operation, slot of its result, slots that nobody needs afterwards, operands.
    Instruction = tuple[str, int, Sequence[int], tuple[Any, ...]]
    #: Name, and what it is of; a slot is an int, a number a float.
    Effect = tuple[Any, ...]
    #: Axis, first entry, and the numbers as bytes of f64.
    Vector = tuple[str, int, bytearray]
    #: The vectors of a program, and a byte an element for each ranking: 1 where it is kept, else 0.
    Given = tuple[Sequence[Vector], Sequence[bytearray]]

__all__ = ["Backend", "Program", "Worker", "explain"]

#: How elements are stored.
STORED = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


# What torch has once for the whole process. Merges may overlap.

_LOCK = threading.Lock()
#: For each merge under way, the threads that torch had before the first of them.
_THREADS: list[int] = []
#: For each GPU in use, its share before, the bytes that were taken, and what merges may take.
_SHARES: dict[torch.device, tuple[float, int, list[int]]] = {}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Leave each worker one thread: there are more of them than cores."""
    with _LOCK:
        _THREADS.append(_THREADS[0] if _THREADS else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            # Each thread has a number of its own too: all that enter put it back.
            torch.set_num_threads(_THREADS.pop())


@contextlib.contextmanager
def _limited(device: torch.device, vram: int) -> Iterator[None]:
    """Let the process take `vram` bytes of a GPU, beside what it has there."""
    with _LOCK:
        if device not in _SHARES:
            _SHARES[device] = _share(device), torch.cuda.memory_reserved(device), []
        merges = _SHARES[device][2]
        merges.append(vram)
    try:
        with _LOCK:
            _set_limit(device)
        yield
    finally:
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
        with _LOCK:
            merges.remove(vram)
            _set_limit(device)
            if not merges:
                del _SHARES[device]


def _set_limit(device: torch.device) -> None:
    share, taken, merges = _SHARES[device]
    if merges:
        total = torch.cuda.get_device_properties(device).total_memory
        share = min(share, (taken + sum(merges)) / total)
    torch.cuda.set_per_process_memory_fraction(share, device)


def _share(device: torch.device) -> float:
    """Return the share of a GPU that the process may take; torch before 2.8 does not tell it."""
    tell = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if tell is None else tell(device)


class Backend:
    """The devices of a run.

    Parameters
    ----------
    devices : sequence of str
        Torch's names of them: ``cpu``, or ``cuda:0`` and so on. Workers take turns.
    vram : int
        Bytes that the tensors on one device may take; a GPU's allocator is held to it while the
        backend is entered.
    """

    def __init__(self, devices: Sequence[str], vram: int) -> None:
        self.devices = [torch.device(device) for device in devices]
        self.vram = vram
        self.is_host = all(device.type == "cpu" for device in self.devices)
        self._running_sums = {device: kernels.running_sum_on(device) for device in self.devices}
        self._next = itertools.cycle(self.devices)
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Limit torch's threads and what the allocators of GPUs take, for the whole process."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_one_thread())
            for device in self.devices:
                if device.type == "cuda":
                    stack.enter_context(_limited(device, self.vram))
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Put everything back, and let go of the devices' memory."""
        self._held.close()

    @property
    def name(self) -> str:
        """What to call the devices in a report."""
        if self.is_host:
            return "torch on the CPU"
        names = (f"{device} ({torch.cuda.get_device_name(device)})" for device in self.devices)
        return ", ".join(names)

    def worker(self) -> Worker:
        """Return what one more thread computes with."""
        device = next(self._next)
        return Worker(device, self._running_sums[device])


class Worker:
    """One thread's stream and staging buffers.

    Copies to a device, arithmetic and copies back follow each other in the stream, while the
    streams of other workers do the same: so copies of one piece overlap with arithmetic of another.
    """

    def __init__(self, device: torch.device, running_sum: kernels.RunningSum) -> None:
        self.device = device
        self.running_sum = running_sum
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staging: dict[int, torch.Tensor] = {}

    def program(
        self,
        instructions: Sequence[Instruction],
        effects: Sequence[Effect],
        row: int,
        line: int,
        double: bool,  # noqa: FBT001 - called from the engine
    ) -> Program:
        """Make a program ready to run over elements of a tensor."""
        return Program(self, instructions, effects, row, line, double=double)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Enter the stream; leave it when all is done."""
        with torch.inference_mode():
            if self.stream is None:
                yield
            else:
                with torch.cuda.stream(self.stream):
                    yield
                self.stream.synchronize()

    def upload(self, buffer: memoryview, dtype: torch.dtype, place: int) -> torch.Tensor:
        """Return the elements in `buffer`, on the device: where they are, or a copy."""
        flat = torch.frombuffer(buffer, dtype=torch.uint8)
        if self.stream is not None:
            staged = self._pinned(place, len(flat)).copy_(flat)
            flat = staged.to(self.device, non_blocking=True)
        elif flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype)

    def download(self, values: torch.Tensor, buffer: memoryview) -> None:
        """Put the bytes of `values` into `buffer`."""
        flat = values.contiguous().view(torch.uint8)
        target = torch.frombuffer(buffer, dtype=torch.uint8)
        if self.stream is None:
            target.copy_(flat)
        else:
            staged = self._pinned(-1, len(flat)).copy_(flat, non_blocking=True)
            self.stream.synchronize()
            target.copy_(staged)

    def _pinned(self, place: int, size: int) -> torch.Tensor:
        """Return page-locked memory, which a device copies from and to by itself."""
        buffer = self._staging.get(place)
        if buffer is None or len(buffer) < size:
            options = {"dtype": torch.uint8, "device": "cpu", "pin_memory": True}
            self._staging[place] = buffer = torch.empty(size, **options)
        return buffer[:size]


class Program:
    """A program, ready to run over elements of one tensor.

    Buffers are lent for the time of a call: no tensor over one may outlive it.

    Parameters
    ----------
    worker : Worker
        Where it runs.
    instructions : sequence of Instruction
        What to compute.
    effects : sequence of Effect
        What to do with it.
    row, line : int
        Elements of a row (the last dimension), and of a line across the first.
    double : bool
        Whether the working type is f64 instead of f32.
    """

    def __init__(
        self,
        worker: Worker,
        instructions: Sequence[Instruction],
        effects: Sequence[Effect],
        row: int,
        line: int,
        *,
        double: bool,
    ) -> None:
        self.worker = worker
        self.device = worker.device
        self.instructions = instructions
        self.effects = effects
        self.row = row
        self.line = line
        self.real = torch.float64 if double else torch.float32

    def run(
        self,
        start: int,
        count: int,
        inputs: Inputs,
        given: Given,
        column: int,
        buffers: Sequence[memoryview],
    ) -> None:
        """Compute elements from `start` on, the first of them in `column`.

        Each effect has a buffer for what it finds.
        """
        with self.worker.at_work():
            stored = [
                None if each is None else self.worker.upload(each[1], STORED[each[0]], place)
                for place, each in enumerate(inputs)
            ]
            frame = _Frame(self, start, count, column, stored, given)
            for name, out, dead, operands in self.instructions:
                value = getattr(frame, name)(*operands)
                for slot in dead:
                    del frame.slots[slot]
                frame.slots[out] = value
            for (effect, *of), buffer in zip(self.effects, buffers, strict=True):
                getattr(frame, effect)(buffer, *of)


class _Frame:
    """The values of one piece; a method for each operation and effect of `formula/program.rs`."""

    def __init__(
        self,
        program: Program,
        start: int,
        count: int,
        column: int,
        inputs: list[torch.Tensor | None],
        given: Given,
    ) -> None:
        self.start = start
        self.length = count
        self.column = column
        self.inputs = inputs
        self.vectors, self.marks = given
        self.worker = program.worker
        self.row = program.row
        self.line = program.line
        self.real = program.real
        self.device = program.device
        self.slots: dict[int, torch.Tensor] = {}

    def number(self, number: float) -> torch.Tensor:
        """Return a number, which is of the working type already, as a tensor."""
        return torch.full((), number, dtype=self.real, device=self.device)

    def argument(self, argument: float) -> torch.Tensor:
        """Return the values in a slot, or a number."""
        return self.slots[argument] if isinstance(argument, int) else self.number(argument)

    def whole(self, argument: float) -> torch.Tensor:
        """Return an argument with one value an element."""
        return self.argument(argument).expand(self.length)

    def load(self, index: int) -> torch.Tensor:
        stored = self.inputs[index]
        assert stored is not None, "an input that the program loads was read"
        return stored.to(self.real)

    def fill(self, number: float) -> torch.Tensor:
        return self.number(number).expand(self.length)

    def spread(self, index: int) -> torch.Tensor:
        axis, first, values = self.vectors[index]
        vector = torch.frombuffer(values, dtype=torch.float64).to(self.device).to(self.real)
        entries = torch.arange(self.start, self.start + self.length, device=self.device)
        if axis == "column":
            entries %= self.line
        else:
            entries //= self.row
        return vector[entries.sub_(first)]

    def unary(self, op: str, a: int) -> torch.Tensor:
        return kernels.UNARY[op](self.slots[a])

    def binary(self, op: str, a: float, b: float) -> torch.Tensor:
        return kernels.BINARY[op](self.argument(a), self.argument(b)).expand(self.length)

    def select(self, mask: int, yes: float, no: float) -> torch.Tensor:
        return torch.where(self.slots[mask] == 0, self.argument(no), self.argument(yes))

    def weighted_sum(self, terms: Sequence[tuple[float, int]]) -> torch.Tensor:
        products = (self.slots[slot] * self.number(weight) for weight, slot in terms)
        total = next(products)
        for product in products:
            total += product
        return total

    def elect(self, terms: Sequence[tuple[float, int]], average: bool) -> torch.Tensor:  # noqa: FBT001
        vote = self.weighted_sum(terms)
        positive = vote >= 0
        zero = self.number(0.0)
        total = torch.zeros_like(vote)
        share = torch.zeros_like(vote)
        magnitudes = torch.zeros_like(vote)
        for weight, slot in terms:
            number = self.number(weight)
            value = self.slots[slot] * number
            agrees = torch.where(positive, value > 0, value < 0)
            total += torch.where(agrees, value, zero)
            share += torch.where(agrees, number, zero)
            magnitudes += torch.where(agrees, number.abs(), zero)
        if average:
            # Nothing is divided by weights that cancel each other.
            cancels = share.abs() <= magnitudes * self.number(1e-6)
            total /= share.masked_fill_(cancels, 1.0)
        return total.masked_fill_(vote.isnan(), torch.nan)

    def kept(self, a: int, threshold: int, equals_end: int) -> torch.Tensor:
        """Return what lies above the threshold, or on it before element `equals_end`."""
        ranks = kernels.ordinals(self.slots[a])
        end = min(max(equals_end - self.start, 0), self.length)
        kept = ranks > threshold
        kept[:end] |= ranks[:end] == threshold
        return kept.to(self.real)

    def random(
        self, keep_below: int, key: tuple[int, int], stream: tuple[int, int]
    ) -> torch.Tensor:
        elements = range(self.start, self.start + self.length)
        return kernels.random_mask(key, stream, elements, keep_below, self.device).to(self.real)

    def marked(self, index: int) -> torch.Tensor:
        kept = torch.frombuffer(self.marks[index], dtype=torch.uint8)
        return kept.to(self.device).to(self.real)

    # Effects.

    def store(self, buffer: memoryview, a: float, dtype: str) -> None:
        """Round values to the type of an output."""
        self.worker.download(kernels.narrow(self.whole(a), STORED[dtype]), buffer)

    def reduce(
        self, buffer: memoryview, kind: str, a: float, b: float | None, segment: int
    ) -> None:
        """Put an f64 for each `segment` elements into the buffer."""
        terms = kernels.terms(kind, self.whole(a), None if b is None else self.whole(b))
        sums = kernels.reduce_segments(kind, terms, segment, self.worker.running_sum)
        self.worker.download(sums, buffer)

    def largest_by_rank(
        self, buffer: memoryview, a: float, spans: tuple[int, int, int], count: int
    ) -> None:
        """Put a byte an element into the buffer: 1 for the `count` largest of a vector."""
        place, _ = kernels.places(self.whole(a), self.start, spans)
        self.worker.download((place < count).view(torch.uint8), buffer)

    def random_by_rank(
        self,
        buffer: memoryview,
        a: float,
        spans: tuple[int, int, int],
        probabilities: tuple[float, float],
        key: tuple[int, int],
        stream: tuple[int, int],
    ) -> None:
        """Put a byte an element into the buffer: 1 where its draw is below its rank's bound."""
        place, last = kernels.places(self.whole(a), self.start, spans)
        bounds = kernels.bounds_of_ranks(place, last, *probabilities)
        elements = range(self.start, self.start + self.length)
        kept = kernels.draws(key, stream, elements, self.device) < bounds
        self.worker.download(kept.view(torch.uint8), buffer)

    def columns(self, buffer: memoryview, kind: str, a: float, b: float | None) -> None:
        """Add to the f64 that the buffer has for each column."""
        terms = kernels.terms(kind, self.whole(a), None if b is None else self.whole(b))
        sums = self.worker.upload(buffer, torch.float64, -2).clone()
        kernels.add_rows(kind, terms, self.column, sums, self.worker.running_sum)
        self.worker.download(sums, buffer)

    def count(
        self, buffer: memoryview, a: float, low: int, high: int, shift: int, bins: int, segment: int
    ) -> None:
        """Count ordinals for a search.

        The buffer of i64 takes those above the interval, those inside for each segment, and the
        bins.
        """
        counts = kernels.count(self.whole(a), low, high, shift, bins, segment)
        self.worker.download(counts, buffer)


# Errors.


def explain(error: BaseException) -> tuple[str, str | None]:
    """Return what to tell about an exception of a device, and what to do."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the device has no memory left",
            "use less of it (`--vram`, or `vram=` in Python), or end what else uses the device",
        )
    text = str(error).strip().splitlines()
    return f"torch failed: {text[0] if text else type(error).__name__}", None
