"""A merge method that counts its calls, and fails at one of them."""

from __future__ import annotations

from typing import Any

from oxmerge import method

calls = 0
#: At which call it is interrupted; never, unless this is positive.
last = 0


class Stop(KeyboardInterrupt):
    """What interrupts it, as Ctrl-C does."""


@method(sees="tensor")
def halved(models: Any) -> Any:
    """Half of the sum."""
    global calls  # noqa: PLW0603 - the engine calls functions, not objects
    calls += 1
    if calls == last:
        raise Stop
    return (models[0] + models[1]) / 2
