"""What options may be called. Apart, so that the command line need not load what uses them."""

from __future__ import annotations

import re

__all__ = ["READ_PATHS", "check_device"]

#: How inputs can be read.
READ_PATHS = ("auto", "mapped", "positioned", "direct")


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
    if re.fullmatch(r"(?a:cpu|torch|auto|cuda(:\d{1,3})?)", device) is None:
        raise ValueError(f"device must be cpu, torch, cuda, cuda:N or auto, not {device!r}")
