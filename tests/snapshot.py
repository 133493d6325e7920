"""Snapshots: texts that are long, and messages, each in one place.

``pytest --update-snapshots`` writes them anew; what has changed is seen in the difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FOLDER = Path(__file__).parent / "snapshots"
#: Whether they are written anew; the command line says so.
is_updating = False


def check_snapshot(name: str, text: str) -> None:
    """Compare text with a snapshot, or write it when asked to."""
    path = FOLDER / f"{name}.txt"
    if is_updating:
        path.write_text(text + "\n")
    assert text + "\n" == path.read_text(), f"differs from {path.name}"


def check_told(name: str, told: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Compare what is told of some inputs with a snapshot: each input, and every message."""
    entries = (
        "\n".join([*(f"| {line}" for line in given.splitlines()), *messages])
        for given, messages in told
    )
    check_snapshot(name, "\n\n".join(entries))
