"""The engine's kernels and methods on arrays in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from oxmerge.bench.crew import Crew, pieces_of, take
from oxmerge.demo import draw_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bits = NDArray[np.uint16]

_MODELS = 3
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Arrays:
    """The bits of bfloat16: a base and two fine-tunes, and an array for results."""

    inputs: tuple[Bits, ...]
    output: Bits

    @classmethod
    def draw(cls, elements: int, threads: int) -> Arrays:
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

        with Crew(threads) as crew:
            crew.run(fill)
        return cls(inputs, np.ones(elements, np.uint16))
