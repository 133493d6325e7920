"""Where the arithmetic of a merge is done, and which device to expect to be the fastest.

A merge reads, computes and writes at the same time, so it takes as long as the slowest of them. For
most merges that is the disk, and then no device can make it faster. Where it is not, a GPU has to
make up for the time that loading torch takes. `choose` measures before it believes.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from oxmerge import _core
from oxmerge.errors import DeviceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from oxmerge.planning.plans import Plan
    from oxmerge.torch_backend import Backend

__all__ = ["DEFAULT_VRAM", "UNTRIED", "Choice", "choose", "open_backend"]

#: Bytes that the tensors on one device may take.
DEFAULT_VRAM = 4 << 30
#: What is said wherever a GPU is asked for.
UNTRIED = "not yet run on a GPU: `cuda` was only ever tested as `torch`, on torch's CPU"
#: Loading torch and measuring it may cost a twentieth of a merge, not more: that is noise.
_LEAST_SECONDS = 200.0
#: What a device has to save before it is chosen.
_LEAST_GAIN = 0.1
#: Reads that measure a disk: each of so many bytes, so many at a time and in all.
_PROBE_BYTES, _PROBES_AT_ONCE, _PROBES = 4 << 20, 8, 32


@dataclass(frozen=True, slots=True)
class Choice:
    """A device, and why.

    Attributes
    ----------
    device : str
        ``cpu`` or ``cuda``.
    reason : str
        What speaks for it, in plain words.
    """

    device: str
    reason: str


def open_backend(device: str, vram: int | None) -> Backend | None:
    """Return what computes on `device`; None if that is the engine itself.

    Parameters
    ----------
    device : str
        ``cpu``; ``torch``, which is torch on the CPU; ``cuda``, which is every visible GPU; or
        ``cuda:0`` and so on.
    vram : int, optional
        Bytes that the tensors on one device may take.

    Raises
    ------
    DeviceError
        If torch is not installed or cannot be loaded, or the device is not there.
    """
    if device == "cpu":
        return None
    if not _has_torch():
        raise DeviceError(f"the device `{device}` needs torch: pip install torch")
    try:
        from oxmerge import torch_backend  # noqa: PLC0415 - loads torch, which takes seconds
    except Exception as error:
        # An installation that is broken fails in many ways.
        raise DeviceError(
            f"torch is installed, but cannot be loaded: {error}",
            advice="install torch anew, or use --device cpu",
        ) from error

    names = ["cpu"] if device == "torch" else _gpus(device)
    return torch_backend.Backend(names, DEFAULT_VRAM if vram is None else vram)


def _gpus(device: str) -> list[str]:
    """Return the GPUs that `device` names, as torch calls them."""
    import torch  # noqa: PLC0415

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise DeviceError(
            f"there is no GPU for the device `{device}`",
            found=f"torch {torch.__version__} without a GPU that it can use",
            advice="use --device cpu",
        )
    _, _, number = device.partition(":")
    if number and int(number) >= count:
        known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise DeviceError(f"there is no device `{device}`", expected=known)
    return [device] if number else [f"cuda:{at}" for at in range(count)]


def choose(plans: Sequence[Plan], threads: int | None, vram: int | None, *, load: bool) -> Choice:
    """Return the device that is expected to be the fastest for merges of the same tensors.

    Looks for a GPU; only if there is one, measures the CPU for some milliseconds for each merge,
    and how fast the disk reads. It is taken to write as fast.

    Parameters
    ----------
    plans : sequence of Plan
        What is to be done, in one pass over the inputs.
    threads : int, optional
        Workers.
    vram : int, optional
        Bytes that the tensors on one device may take.
    load : bool
        Whether torch may be loaded to measure the GPU, where it could be worth it.
    """
    if not _has_gpu():
        return Choice("cpu", "there is no GPU here")
    if not _has_torch():
        return Choice("cpu", "a GPU needs torch, which is not installed")
    return _compare(plans, threads, vram, load=load)


def _compare(plans: Sequence[Plan], threads: int | None, vram: int | None, *, load: bool) -> Choice:
    """Compare a GPU, which is there, with the CPU and the disk."""
    moved = plans[0].bytes_read + sum(each.bytes_written for each in plans)
    moving = moved / disk_rate(plans[0].input_files)
    computing = _computing(plans, threads, None)
    rates = f"reading and writing takes {moving:.1f} s, computing {computing:.1f} s"
    if computing < moving * (1 + _LEAST_GAIN):
        return Choice("cpu", f"the disk is the limit: {rates}")
    if computing < _LEAST_SECONDS:
        return Choice("cpu", f"the work is too short to load torch for: {rates}")
    if not load:
        return Choice("cuda", f"computing is the limit, {rates}; `--device auto` measures the GPU")
    try:
        with open_backend("cuda", vram) or nullcontext() as backend:
            seconds = max(moving, _computing(plans, threads, backend))
    except DeviceError as error:
        return Choice("cpu", f"the GPU cannot be used: {error.message}")
    with_gpu = f"{rates}, {seconds:.1f} s with the GPU"
    if seconds > (1 - _LEAST_GAIN) * computing:
        return Choice("cpu", f"the GPU would not be faster: {with_gpu}")
    return Choice("cuda", with_gpu)


def _computing(plans: Sequence[Plan], threads: int | None, backend: Backend | None) -> float:
    """Return the seconds that all merges take where nothing waits for the disk."""
    seconds = 0.0
    for plan in plans:
        moved = plan.bytes_read + plan.bytes_written
        seconds += moved / _core.rehearse(plan.table, threads, backend)
    return seconds


def _has_gpu() -> bool:
    """Return whether there may be a GPU that CUDA knows, without loading anything."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _has_torch() -> bool:
    return find_spec("torch") is not None


def disk_rate(files: Sequence[dict[str, Any]]) -> float:
    """Return the bytes a second that come from the disk of the largest file, past the page cache.

    Infinite for a file system that has no disk below it.
    """
    path = max(files, key=lambda file: int(file["size"]))["path"]
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return float("inf")
    try:
        return _probe(descriptor)
    except OSError:
        return float("inf")
    finally:
        os.close(descriptor)


def _probe(descriptor: int) -> float:
    # Rarely needed.
    import mmap  # noqa: PLC0415
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    places = max(1, os.fstat(descriptor).st_size // _PROBE_BYTES)
    count = min(_PROBES, places)

    def read(probe: int) -> int:
        # A map begins on a page, as reads past the page cache demand.
        with mmap.mmap(-1, _PROBE_BYTES) as buffer:
            return os.preadv(descriptor, [buffer], probe * places // count * _PROBE_BYTES)

    started = time.perf_counter()
    with ThreadPoolExecutor(_PROBES_AT_ONCE) as pool:
        read_bytes = sum(pool.map(read, range(count)))
    return read_bytes / (time.perf_counter() - started)
