"""Sizes and durations as people write them: ``256MiB``, ``5GB``, ``5B``; ``2 min 5 s``."""

from __future__ import annotations

import math
import re

__all__ = ["format_duration", "format_size", "parse_size", "three_digits"]

#: More than that is a slip of the keyboard.
MOST_BYTES = (1 << 63) - 1

_BINARY = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_DECIMAL = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
#: One letter counts in powers of 1000; `b` is a billion bytes, as in mergekit's ``5B``.
_LETTERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_UNITS = _BINARY | _DECIMAL | _LETTERS
_MINUTE, _HOUR = 60, 3600
_SIZE = re.compile(r"(?a:\s*(\d+)(?:\.(\d+))?\s*([a-z]*)\s*)", re.IGNORECASE)


def parse_size(value: str | int) -> int:
    """Return the number of bytes that `value` says.

    Parameters
    ----------
    value : str or int
        Bytes, or a number with a unit in any case: ``KiB MiB GiB TiB`` (powers of 1024), ``kB MB
        GB TB`` or ``k m g t`` (powers of 1000), and mergekit's ``b``, a billion bytes.

    Returns
    -------
    int
        Bytes, rounded down.

    Raises
    ------
    ValueError
        If it is no size, negative, or more than any machine has.

    Examples
    --------
    >>> parse_size("256MiB"), parse_size("5B"), parse_size("1.5GB")
    (268435456, 5000000000, 1500000000)
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return _in_range(value)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _no_size(value)
    whole, fraction, unit = match[1], match[2] or "", match[3].lower()
    if unit not in _UNITS:
        raise _no_size(value)
    scale: int = 10 ** len(fraction)
    return _in_range(int(whole + fraction) * _UNITS[unit] // scale)


def _in_range(value: int) -> int:
    if not 0 <= value <= MOST_BYTES:
        raise _no_size(value)
    return value


def _no_size(value: object) -> ValueError:
    return ValueError(
        f"not a size: {value!r}; write a number of bytes or a unit, such as 256MiB, 2GiB or 5GB"
    )


def format_size(size: int, *, binary: bool = False) -> str:
    """Return `size` bytes with three significant digits and a unit.

    Parameters
    ----------
    size : int
        Bytes.
    binary : bool
        Count in powers of 1024 (``MiB``), as for memory; else of 1000 (``MB``), as for files.

    Examples
    --------
    >>> format_size(4_983_000_000), format_size(1 << 28, binary=True), format_size(17)
    ('4.98 GB', '256 MiB', '17 B')
    """
    step, names = (1024, _names("iB")) if binary else (1000, _names("B"))
    power = 0
    scaled = float(size)
    while scaled >= step - 0.5 and power < len(names) - 1:
        scaled /= step
        power += 1
    if power == 0:
        return f"{size} B"
    text = three_digits(scaled)
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {names[power]}"


def format_duration(seconds: float) -> str:
    """Return a duration as people say it."""
    if seconds < _MINUTE:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"


def three_digits(value: float) -> str:
    """Return a number with three significant digits, and never an exponent.

    Parameters
    ----------
    value : float
        Not below zero. From 1000 on, all digits before the point are kept.

    Examples
    --------
    >>> three_digits(0.01234), three_digits(9.996), three_digits(1077)
    ('0.0123', '10.0', '1077')
    """
    rounded = float(f"{value:.3g}")
    decimals = max(2 - math.floor(math.log10(rounded)), 0) if rounded else 0
    return f"{value:.{decimals}f}"


def _names(ending: str) -> tuple[str, ...]:
    kilo = "K" if ending == "iB" else "k"
    return ("B", *(letter + ending for letter in (kilo, "M", "G", "T")))
