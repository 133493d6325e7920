"""The kernels in torch operations: conversions, elements, sums, ranks, random words.

`rust/kernels/NUMERICS.md` says which bits. What that demands of torch:

- Multiply and add are separate operations. Nothing fuses them, and nothing compiles.
- A number is a tensor on the device. Divided by a Python number, torch multiplies by the
  reciprocal on a GPU, which rounds twice.
- Sums run in sixteen lanes, in order: a running sum along a dimension that is not the last, which
  torch computes from first to last. Whether it does is tried out when a device is opened.
- Narrowing to bf16 is integer arithmetic: torch's own conversion flushes subnormals on some CPUs.
- What ranks does so by integers, and random words are integer arithmetic.

The exponential and the logarithm of elements are those of `rust/kernels/transcendental.rs`, step by
step: torch's own differ in the last place. (In f32 it takes 2ᵏ in one step; no bit differs.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

#: The last of the running sums of [segments, steps, lanes] over the steps.
RunningSum = Callable[[torch.Tensor], torch.Tensor]

#: Partial sums of a block, part of the fixed shape of a sum.
LANES = 16

_LOW_HALF = 0xFFFF_FFFF
_PHILOX_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
_PHILOX_WEYL = (0x9E37_79B9, 0xBB67_AE85)
_PHILOX_ROUNDS = 10
_COUNTERS = 64  # counters that share out a group of elements among them
_GROUP = 512  # elements of a group: a counter has eight halves
_LOW_HALVES = -1 << 63  # sets the counters of the low halves of the draws apart


# Elements.


def _greater_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the greater: +0 above −0, NaN if either is."""
    # Equal values are the same bits, or zeros of either sign.
    integer = _integer(a)
    equal = (a.view(integer) & b.view(integer)).view(a.dtype)
    greater = torch.where(a > b, a, torch.where(a < b, b, equal))
    return greater.masked_fill_(a.isnan() | b.isnan(), torch.nan)


def _lesser_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the lesser: −0 below +0, NaN if either is."""
    integer = _integer(a)
    equal = (a.view(integer) | b.view(integer)).view(a.dtype)
    lesser = torch.where(a < b, a, torch.where(a > b, b, equal))
    return lesser.masked_fill_(a.isnan() | b.isnan(), torch.nan)


def _sign(a: torch.Tensor) -> torch.Tensor:
    signs = (a > 0).to(a.dtype) - (a < 0).to(a.dtype)
    return signs.masked_fill_(a.isnan(), torch.nan)


_LN_2_HIGH, _LN_2_LOW, _LOG2_E = 6.931471803691238e-1, 1.9082149292705877e-10, 1.4426950408889634
_FRACTION, _BIAS, _LEAST = 52, 1023, 0x3FE6_A09E_667F_3BCD  # the last: the bits of √½
_TERMS = {torch.float32: (8, 6), torch.float64: (12, 11)}


def _power_of_two(k: torch.Tensor) -> torch.Tensor:
    return ((k.long() + _BIAS) << _FRACTION).view(torch.float64)


def _series(x: torch.Tensor, terms: list[float]) -> torch.Tensor:
    total = torch.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        total = term + x * total
    return total


def _exp(a: torch.Tensor) -> torch.Tensor:
    x = a.double().clamp(-800.0, 800.0)
    k = torch.round(x * _LOG2_E)
    r = (x - k * _LN_2_HIGH) - k * _LN_2_LOW
    terms = [1.0 / math.factorial(n + 2) for n in range(_TERMS[a.dtype][0])]
    total = 1.0 + (r + (r * r) * _series(r, terms))
    k = k.nan_to_num()
    half = torch.round(k * 0.5)
    power = total * _power_of_two(half) * _power_of_two(k - half)
    return power.masked_fill(a.isnan(), torch.nan).to(a.dtype)


def _ln(a: torch.Tensor) -> torch.Tensor:
    k, rest = _power_and_rest(a.double())
    s = rest / (2.0 + rest)
    square = s * s
    terms = [2.0 / (2 * n + 3) for n in range(_TERMS[a.dtype][1])]
    total = square * _series(square, terms)
    half = 0.5 * rest * rest
    found = k * _LN_2_HIGH - ((half - (s * (half + total) + k * _LN_2_LOW)) - rest)
    found = found.masked_fill(a == torch.inf, torch.inf).masked_fill(a == 0, -torch.inf)
    return found.masked_fill(a.isnan() | (a < 0), torch.nan).to(a.dtype)


def _power_and_rest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return k and rest of x = 2ᵏ · (1 + rest), with 1 + rest between √½ and √2."""
    is_small = x < torch.finfo(torch.float64).tiny
    bits = torch.where(is_small, x * 2.0**54, x).view(torch.int64)
    moved = bits + ((_BIAS << _FRACTION) - _LEAST)
    exponent = (moved >> _FRACTION) - _BIAS
    m = ((moved & ((1 << _FRACTION) - 1)) + _LEAST).view(torch.float64)
    return exponent.double() - is_small.double() * 54.0, m - 1.0


UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Sign": _sign,
    "Sqrt": torch.sqrt,
    "Exp": _exp,
    "Ln": _ln,
}
BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
    "Max": _greater_of,
    "Min": _lesser_of,
    "Greater": lambda a, b: (a > b).to(a.dtype),
    "GreaterEqual": lambda a, b: (a >= b).to(a.dtype),
    "Equal": lambda a, b: (a == b).to(a.dtype),
}


def _integer(values: torch.Tensor) -> torch.dtype:
    """Return the integers that have the width of `values`."""
    return torch.int64 if values.dtype == torch.float64 else torch.int32


def ordinals(values: torch.Tensor) -> torch.Tensor:
    """Return integers that order as the values do: zeros are 0, any NaN is the greatest."""
    bits = values.view(_integer(values))
    greatest = torch.iinfo(bits.dtype).max
    magnitudes = bits & greatest
    return torch.where(bits < 0, -magnitudes, magnitudes).masked_fill_(values.isnan(), greatest)


def narrow(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to `dtype`, once, to nearest even; every NaN becomes the positive quiet one.

    Returns
    -------
    Tensor
        The patterns of the stored elements, as integers of their width.
    """
    nan = values.isnan()
    if dtype in (torch.float32, torch.float64):
        nearest = values.to(dtype)
        return nearest.masked_fill(nan, torch.nan).view(_integer(nearest))
    single = _round_to_odd(values) if values.dtype == torch.float64 else values
    if dtype == torch.float16:
        return single.to(torch.float16).view(torch.int16).masked_fill(nan, 0x7E00)
    bits = single.contiguous().view(torch.int32)
    # Just under half of the last place, and the tie goes up if that place is odd.
    odd = (bits >> 16) & 1
    rounded = (bits + (odd + 0x7FFF)) >> 16
    return rounded.masked_fill_(nan, 0x7FC0).to(torch.int16)


def _round_to_odd(values: torch.Tensor) -> torch.Tensor:
    """Round f64 to f32 such that rounding the result once more, to fewer bits, is correct.

    Where f32 does not hold a value, the one of its neighbours whose last bit is set is taken.
    """
    nearest = values.float()
    back = nearest.double()
    bits = nearest.view(torch.int32)
    stepped = torch.where(back.abs() > values.abs(), bits - 1, bits + 1)
    inexact = (back != values) & ~values.isnan()
    return torch.where(inexact & (bits & 1 == 0), stepped, bits).view(torch.float32)


def philox(
    key: tuple[int, int], counters: torch.Tensor, stream: tuple[int, int]
) -> list[torch.Tensor]:
    """Return the four words of Philox4x32-10 for each counter, as i64.

    Products wrap around in 64 bits, and a shift to the right is followed by a mask.
    """
    words = [
        counters & _LOW_HALF,
        (counters >> 32) & _LOW_HALF,
        torch.full_like(counters, stream[0]),
        torch.full_like(counters, stream[1]),
    ]
    keys = list(key)
    for _ in range(_PHILOX_ROUNDS):
        first = words[0] * _PHILOX_MULTIPLIERS[0]
        second = words[2] * _PHILOX_MULTIPLIERS[1]
        words = [
            ((second >> 32) & _LOW_HALF) ^ words[1] ^ keys[0],
            second & _LOW_HALF,
            ((first >> 32) & _LOW_HALF) ^ words[3] ^ keys[1],
            first & _LOW_HALF,
        ]
        keys = [(word + weyl) & _LOW_HALF for word, weyl in zip(keys, _PHILOX_WEYL, strict=True)]
    return words


def random_mask(
    key: tuple[int, int],
    stream: tuple[int, int],
    elements: range,
    keep_below: int,
    device: torch.device,
) -> torch.Tensor:
    """Return which of some elements in a row a random mask keeps; see `kernels/random.rs`."""
    first, last = elements.start // _GROUP, -(-elements.stop // _GROUP)
    counters = torch.arange(first * _COUNTERS, last * _COUNTERS, device=device)
    bound, low_bound = divmod(keep_below, 1 << 16)
    high = _halves(philox(key, counters, stream))
    kept = high < bound
    if low_bound:
        low = _halves(philox(key, counters | _LOW_HALVES, stream))
        kept |= (high == bound) & (low < low_bound)
    skipped = elements.start - first * _GROUP
    return kept[skipped : skipped + len(elements)]


def draws(
    key: tuple[int, int], stream: tuple[int, int], elements: range, device: torch.device
) -> torch.Tensor:
    """Return the draws of some elements in a row, of 32 bits each, as i64."""
    first, last = elements.start // _GROUP, -(-elements.stop // _GROUP)
    counters = torch.arange(first * _COUNTERS, last * _COUNTERS, device=device)
    drawn = _halves(philox(key, counters, stream)) << 16
    drawn |= _halves(philox(key, counters | _LOW_HALVES, stream))
    skipped = elements.start - first * _GROUP
    return drawn[skipped : skipped + len(elements)]


def _halves(words: list[torch.Tensor]) -> torch.Tensor:
    """Return the halves of the words of counters, in the order of the elements that take them."""
    halves = [word & 0xFFFF for word in words] + [word >> 16 for word in words]
    return torch.stack([half.view(-1, _COUNTERS) for half in halves], 1).view(-1)


# Ranks.


def places(
    values: torch.Tensor, start: int, spans: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the place of each element in its vector, 0 being the largest, and the last place.

    Of equal elements the first is the largest.

    Parameters
    ----------
    values : Tensor
        Whole vectors, the first of which begins with element `start` of the tensor.
    start : int
        Where a span begins.
    spans : tuple of int
        Elements of a span, after how many spans begin anew, and how many vectors lie interleaved in
        a span.
    """
    size, within, stride = spans
    elements = torch.arange(start, start + len(values), device=values.device)
    begun = elements % within
    span = (elements - begun) // within * -(-within // size) + begun // size
    vector = span * stride + begun % size % stride
    # By vector, then from the largest down, then by index: sorts that keep the order of equals.
    order = torch.argsort(~ordinals(values), stable=True)
    order = order[torch.argsort(vector[order], stable=True)]
    _, own, counts = torch.unique_consecutive(
        vector[order], return_inverse=True, return_counts=True
    )
    first = counts.cumsum(0) - counts
    place, last = torch.empty_like(elements), torch.empty_like(elements)
    place[order] = elements - start - first[own]
    last[order] = counts[own] - 1
    return place, last


def bounds_of_ranks(
    place: torch.Tensor, last: torch.Tensor, lowest: float, highest: float
) -> torch.Tensor:
    """Return what each element's draw must be below for it to be kept; see `kernels/rank.rs`."""
    share = (last - place).double() / last.double()
    share.masked_fill_(last == 0, 0.5)
    return torch.floor((share * (highest - lowest) + lowest) * 2.0**32 + 0.5)


# Sums and counts.


def terms(kind: str, left: torch.Tensor, right: torch.Tensor | None) -> torch.Tensor:
    """Return what a reduction adds up, in f64."""
    double = left.double()
    match kind:
        case "Sum" | "Max":
            return double
        case "AbsoluteSum":
            return double.abs()
        case "Dot":
            return double * (double if right is None or right is left else right.double())
        case _:
            raise ValueError(f"the torch backend does not know the reduction {kind}")


def reduce_segments(
    kind: str, terms: torch.Tensor, segment: int, running_sum: RunningSum
) -> torch.Tensor:
    """Reduce each `segment` terms in the fixed shape; the last may be fewer."""
    whole = len(terms) // segment
    parts = [terms[: whole * segment].view(whole, segment)] if whole else []
    if whole * segment < len(terms):
        parts.append(terms[whole * segment :].view(1, -1))
    return torch.cat([_reduce_lines(kind, part, running_sum) for part in parts])


def _reduce_lines(kind: str, part: torch.Tensor, running_sum: RunningSum) -> torch.Tensor:
    """Reduce each line of `part` in lanes, and fold the lanes in halves."""
    segments, length = part.shape
    if kind == "Max":
        return part.amax(1).masked_fill_(part.isnan().any(1), torch.nan) + 0.0
    # Lanes beyond the length would only add +0.
    lanes = min(LANES, 1 << (length - 1).bit_length())
    if length % lanes:
        part = torch.nn.functional.pad(part, (0, -length % lanes))
    sums = running_sum(part.view(segments, -1, lanes))
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums.view(-1)


def add_rows(
    kind: str, terms: torch.Tensor, first: int, sums: torch.Tensor, running_sum: RunningSum
) -> None:
    """Add terms to the `sums` of columns row by row, the first of them to column `first`."""
    line = len(sums)
    head = min(-first % line, len(terms))
    rows = (len(terms) - head) // line
    tail = terms[head + rows * line :]
    if head:
        sums[first : first + head] = _add(kind, sums[first : first + head], terms[:head])
    body = terms[head : head + rows * line].view(rows, line)
    if rows and kind != "Max":
        sums.copy_(running_sum(torch.cat([sums[None], body])[None])[0])
    else:
        for row in body:
            sums.copy_(_add(kind, sums, row))
    sums[: len(tail)] = _add(kind, sums[: len(tail)], tail)


def _add(kind: str, sums: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """Take one term more, for each column."""
    if kind == "Max":
        larger = torch.where(sums.isnan() | (sums > terms), sums, terms)
        # The canonical NaN, and never −0.
        return torch.where(larger.isnan(), torch.nan, larger + 0.0)
    return sums + terms


def scan(terms: torch.Tensor) -> torch.Tensor:
    """Sum [segments, steps, lanes] over the steps with torch's running sum.

    Along a dimension that is not the last it goes from first to last; so there are two lanes at
    least.
    """
    lanes = terms.shape[2]
    if lanes == 1:
        terms = terms.expand(-1, -1, 2).contiguous()
    # Sums begin with +0, and so are never −0.
    return terms.cumsum(1)[:, -1, :lanes] + 0.0


def step_by_step(terms: torch.Tensor) -> torch.Tensor:
    """Sum [segments, steps, lanes] over the steps, an operation each."""
    sums = torch.zeros_like(terms[:, 0])
    for step in range(terms.shape[1]):
        sums += terms[:, step]
    return sums


def running_sum_on(device: torch.device) -> RunningSum:
    """Return the fastest way to sum from first to last that has the right bits on `device`."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4096, LANES)
    drawn = {"generator": generator, "device": "cpu"}  # whatever the default is
    numbers = torch.randn(shape, dtype=torch.float64, **drawn)
    numbers *= 10.0 ** torch.randint(-8, 8, shape, **drawn)
    is_right = torch.equal(scan(numbers.to(device)).cpu(), step_by_step(numbers))
    return scan if is_right else step_by_step


def count(
    values: torch.Tensor, low: int, high: int, shift: int, bins: int, segment: int
) -> torch.Tensor:
    """Return how many ordinals lie above an interval, inside for each segment, and in each bin."""
    ranks = ordinals(values)
    inside = (ranks >= low) & (ranks <= high)
    segments = len(values) // segment
    whole = segments * segment
    rest = [inside[whole:].sum()[None]] if whole < len(values) else []
    above = (ranks > high).sum()[None]
    # A distance is unsigned, and the shift is of an unsigned number. What lies outside goes to a
    # bin of its own.
    places = (ranks - low) >> shift
    if shift:
        places &= (1 << (8 * ranks.dtype.itemsize - shift)) - 1
    places.masked_fill_(~inside, bins)
    counts = torch.bincount(places, minlength=bins + 1)[:bins]
    return torch.cat([above, inside[:whole].view(segments, segment).sum(1), *rest, counts])
