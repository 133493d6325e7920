"""What configs say of tokens: how many there are, and which of them begin and end a text."""

from __future__ import annotations

from typing import Any

from oxmerge.models.config_meaning import is_language_config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["COUNTS", "GENERATION_CONFIG", "edit_tokens", "ids_in"]

GENERATION_CONFIG = "generation_config.json"

#: Keys that count tokens.
COUNTS = ("vocab_size", "padded_vocab_size")
_ENDS = ("_token_id", "_token_ids")


def edit_tokens(
    config: Mapping[str, Any],
    rows: int | None,
    ids: Mapping[int, int | None] | None,
    instead: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Return a config for other tokens, and a note on each change.

    Parameters
    ----------
    config : mapping
        The config of a model, or of its generation.
    rows : int, optional
        How many rows the output has, if that is another number.
    ids : mapping of int to (int or None), optional
        From an id to that of the same token in the output, if ids change; None for a token that is
        not there.
    instead : mapping
        What the model says whose tokenizer the output has: taken where a token is not there.
    """
    edited: dict[str, Any] = {}
    notes: list[str] = []
    for key, value in config.items():
        new = value
        if isinstance(value, dict) and is_language_config(key):
            inner = instead.get(key)
            new, more = edit_tokens(value, rows, ids, inner if isinstance(inner, dict) else instead)
            notes += more
        elif rows is not None and key in COUNTS and type(value) is int:
            new = rows
        elif ids is not None and key.endswith(_ENDS):
            new = _moved(value, ids)
            new = instead.get(key) if new in (None, []) else new
        if new != value and not isinstance(value, dict):
            notes.append(f"`{key}` is {new}, and was {value}: the output has other tokens")
        edited[key] = new
    return edited, notes


def _moved(value: object, ids: Mapping[int, int | None]) -> object:
    if type(value) is int:
        return ids.get(value)
    if isinstance(value, list) and all(type(each) is int for each in value):
        return [number for number in map(ids.get, value) if number is not None]
    return value


def ids_in(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the ids of tokens in a config."""
    for key, value in config.items():
        if isinstance(value, dict) and is_language_config(key):
            yield from ids_in(value)
        elif key.endswith(_ENDS):
            for each in value if isinstance(value, list) else [value]:
                if type(each) is int and each >= 0:
                    yield each
