"""What options may be. Apart, so that the command line need not load what uses them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from operator import index

from oxmerge.sizes import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from oxmerge.merging import Snapshot

__all__ = [
    "DEFAULT_SHARD_SIZE",
    "MOST_SEED",
    "MOST_THREADS",
    "READ_PATHS",
    "PlanOptions",
    "RunOptions",
    "check_allowed",
    "check_completing",
    "check_device",
    "check_part",
    "check_seed",
    "check_threads",
    "sort_options",
    "whole",
]

#: Bytes in an output shard at most, as in mergekit.
DEFAULT_SHARD_SIZE = 5_000_000_000
#: The largest seed of random masks.
MOST_SEED = (1 << 64) - 1
#: More threads than that are a slip of the keyboard.
MOST_THREADS = (1 << 32) - 1

#: How inputs can be read.
READ_PATHS = ("auto", "mapped", "positioned", "direct")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What decides a plan besides the recipe; the parameters of `oxmerge.plan` of these names.

    Attributes
    ----------
    seed : int, optional
        None for that of a plan that is made, else 0.
    shard_size : int or str, optional
        None for that of a plan that is made, else `DEFAULT_SHARD_SIZE`.
    with_side_files : bool
        Whether the donor's other files will be copied, and must be such that they can be.
    """

    seed: int | None = None
    shard_size: int | str | None = None
    strict: bool = False
    allow_mismatch: bool = False
    ignore_unknown: bool = False
    allow_methods: Iterable[str] = ()
    with_side_files: bool = True

    def __post_init__(self) -> None:
        """Take the modules down: they may come from an iterator."""
        object.__setattr__(self, "allow_methods", check_allowed(self.allow_methods))


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What decides how a merge runs; the parameters of `oxmerge.merge` of these names.

    Attributes
    ----------
    beside : int
        Bytes that others in this process may have resident, within `memory`.
    """

    memory: int | str | None = None
    threads: int | None = None
    device: str = "cpu"
    vram: int | str | None = None
    overwrite: bool = False
    read_path: str = "auto"
    progress: Callable[[Snapshot], None] | bool | None = None
    digests: bool = True
    hash_inputs: bool = False
    allow_nonfinite: bool = False
    resume: bool = True
    fresh: bool = False
    stream: bool = False
    spool: int | str | None = None
    part: tuple[int, int] | None = None
    finish: bool = False
    wait: float = 600
    ray: str | bool | None = None
    parts: int | None = None
    beside: int = 0

    @property
    def keeps(self) -> bool:
        """Whether finished tensors are kept: their digests vouch for them."""
        return self.resume and self.digests

    def __post_init__(self) -> None:
        """Raise `TypeError` or `ValueError` for what is out of range."""
        if self.ray is False:  # as if it were not given
            object.__setattr__(self, "ray", None)
        check_threads(self.threads)
        check_device(self.device)
        if self.vram is not None and self.device == "cpu":
            raise ValueError('vram has no effect on the CPU; pass device="cuda", or leave vram out')
        if self.spool is not None and parse_size(self.spool) == 0:
            raise ValueError("spool must be more than nothing")
        self._check_parts()
        if self.read_path not in READ_PATHS:
            known = ", ".join(READ_PATHS)
            raise ValueError(f"read_path must be one of {known}, not {self.read_path!r}")
        if not (
            self.progress is None or isinstance(self.progress, bool) or callable(self.progress)
        ):
            raise TypeError(f"progress must be a function of a snapshot, not {self.progress!r}")

    def _check_parts(self) -> None:
        on_ray = self.ray is not None
        if self.part is not None:
            check_part(self.part)
            if on_ray:
                raise ValueError("ray makes all parts: leave part out")
            check_completing(
                finish=self.finish,
                hash_inputs=self.hash_inputs,
                allow_nonfinite=self.allow_nonfinite,
            )
        elif self.finish:
            raise ValueError("finish is for the last part: pass part, or leave finish out")
        if self.parts is not None:
            if not on_ray:
                raise ValueError("parts is how many are made on ray: pass ray, or leave parts out")
            if whole(self.parts, "parts") < 1:
                raise ValueError(f"parts must be at least 1, not {self.parts}")
        if (self.part is not None or on_ray) and not self.keeps:
            raise ValueError("parts need digests and resume: others learn from them what is made")


def sort_options(given: Mapping[str, Any]) -> tuple[PlanOptions, RunOptions]:
    """Return the options among what a function was given, by the names of both classes' fields.

    Raises
    ------
    TypeError, ValueError
        For what is out of range.
    """
    planning, running = (
        {field.name: given[field.name] for field in fields(each) if field.name in given}
        for each in (PlanOptions, RunOptions)
    )
    return PlanOptions(**planning), RunOptions(**running)


def whole(value: Any, what: str) -> int:  # noqa: ANN401 - it is what it is to find out
    """Return a whole number of any package; raise `TypeError` for others."""
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{what} must be a whole number, not {value!r}") from None


def check_seed(seed: Any) -> int:  # noqa: ANN401 - see `whole`
    """Return a seed; raise `TypeError` or `ValueError` unless it is a whole number in range."""
    number = whole(seed, "seed")
    if not 0 <= number <= MOST_SEED:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, not {number}")
    return number


def check_threads(threads: Any) -> None:  # noqa: ANN401 - see `whole`
    """Raise `TypeError` or `ValueError` unless `threads` is None, or a whole number in range."""
    if threads is not None and whole(threads, "threads") < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    if threads is not None and threads > MOST_THREADS:
        raise ValueError(f"threads must be at most {MOST_THREADS}, not {threads}")


def check_allowed(modules: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that methods may come from; raise `TypeError` unless they are names."""
    listed = () if isinstance(modules, str) else tuple(modules)
    if isinstance(modules, str) or not all(isinstance(each, str) for each in listed):
        raise TypeError(f"allow_methods is a list of names of modules, not {modules!r}")
    return listed


def check_part(part: Any) -> None:  # noqa: ANN401 - see `whole`
    """Raise `TypeError` or `ValueError` unless it is a number from 1, and of how many parts."""
    if not isinstance(part, tuple) or len(part) != 2:  # noqa: PLR2004
        raise TypeError(f"part must be its number and how many there are, not {part!r}")
    number, parts = whole(part[0], "part"), whole(part[1], "part")
    if not 1 <= number <= parts:
        raise ValueError(f"part must be from 1 to {parts} of {parts}, not {number}")


def check_completing(*, finish: bool, hash_inputs: bool, allow_nonfinite: bool) -> None:
    """Raise `ValueError` if a part that completes nothing is told how to."""
    if not finish and (hash_inputs or allow_nonfinite):
        name = "hash_inputs" if hash_inputs else "allow_nonfinite"
        raise ValueError(f"{name} is for the part that completes the output: add finish to it")


def check_device(device: str) -> None:
    """Raise `ValueError` unless `device` is one that can be asked for.

    Parameters
    ----------
    device : str
        ``cpu``; ``cuda``, which is every visible GPU; ``cuda:0`` and so on; ``torch``, which is the
        same way on torch's CPU; or ``auto``.

    Examples
    --------
    >>> check_device("cuda:1")
    >>> check_device("gpu")
    Traceback (most recent call last):
    ValueError: device must be cpu, torch, cuda, cuda:N or auto, not 'gpu'
    """
    known = r"(?a:cpu|torch|auto|cuda(:\d{1,3})?)"
    if not isinstance(device, str) or re.fullmatch(known, device) is None:
        raise ValueError(f"device must be cpu, torch, cuda, cuda:N or auto, not {device!r}")
