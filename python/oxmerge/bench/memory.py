"""The yardstick of what is done in memory: a copy by NumPy, with none of the engine's code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from oxmerge.bench.measure import Job, timed
from oxmerge.bench.record import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from oxmerge.bench.crew import Crew

    Bits = NDArray[np.uint16]


def copy_jobs(source: Bits, target: Bits, crews: Sequence[Crew]) -> Iterator[Job]:
    """Yield a copy of `source` to `target` by each crew. Bytes read and bytes written count."""
    for crew in crews:
        row = Row(
            "memory",
            "copy",
            "numpy",
            "memory",
            source.nbytes,
            source.nbytes,
            crew.threads,
            elements=source.size,
        )
        yield Job(row, timed(_copying(source, target, crew)), warm_up=True)


def _copying(source: Bits, target: Bits, crew: Crew) -> Callable[[], int]:
    cuts = np.linspace(0, source.size, crew.threads + 1).astype(int)

    def copy_part(number: int) -> int:
        part = slice(cuts[number], cuts[number + 1])
        np.copyto(target[part], source[part])
        return 0

    return lambda: crew.run(copy_part)
