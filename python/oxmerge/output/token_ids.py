"""What configs say of tokens: how many there are, and which of them mean something to programs."""

from __future__ import annotations

from typing import Any

from oxmerge.models.config_meaning import holds_token_ids, is_language_config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import TypeGuard

__all__ = ["COUNTS", "GENERATION_CONFIG", "edit_tokens", "ids_in"]

GENERATION_CONFIG = "generation_config.json"

#: Keys that count tokens.
COUNTS = ("vocab_size", "padded_vocab_size")
#: Keys, of models of speech, with ids by position, or by the name of a language or a task.
_WITH_ENTRIES = ("forced_decoder_ids", "lang_to_id", "task_to_id")


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
        What the model says whose tokenizer the output has: taken where no token is left.

    Notes
    -----
    A list loses the ids of tokens that are not there, a mapping its entries. A list in a list is a
    sequence of tokens, such as a word that is not to be generated: without one of them it would be
    another, so it goes whole.
    A negative number is no id: it says that there is no such token.
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
        elif ids is not None and (entries := _entries(key, value)) is not None:
            moved = ((name, token, _moved(token, ids)) for name, token in entries)
            kept = [(name, new) for name, token, new in moved if new is not None or token is None]
            new = dict(kept) if isinstance(value, dict) else [list(entry) for entry in kept]
        elif ids is not None and holds_token_ids(key):
            new = _moved(value, ids)
            if new is None or (new == [] and value):
                new = instead.get(key)
        if new != value and not is_language_config(key):
            notes.append(f"`{key}` is {new}, and was {value}: the output has other tokens")
        edited[key] = new
    return edited, notes


def _entries(key: str, value: object) -> list[tuple[Any, Any]] | None:
    """Return the entries of ids by name, or by position; None if these are none.

    A null at a position says that no token is forced there.
    """
    if key not in _WITH_ENTRIES:
        return None
    if isinstance(value, dict):
        return list(value.items())
    try:
        return [(name, token) for name, token in value]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return None


def _moved(value: object, ids: Mapping[int, int | None]) -> object:
    """Return an id, or a list of them, for the output; None for a token that is not there."""
    if isinstance(value, list):
        return [new for each in value if (new := _moved_whole(each, ids)) is not None]
    return ids.get(value) if _is_id(value) else value


def _moved_whole(value: object, ids: Mapping[int, int | None]) -> object:
    """Return an id, or a sequence of them, for the output; None if a token is not there."""
    if isinstance(value, list):
        sequence = [_moved_whole(each, ids) for each in value]
        return None if None in sequence else sequence
    return _moved(value, ids)


def ids_in(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the ids of tokens in a config."""
    for key, value in config.items():
        if isinstance(value, dict) and is_language_config(key):
            yield from ids_in(value)
        elif (entries := _entries(key, value)) is not None:
            yield from _numbers([token for _, token in entries])
        elif holds_token_ids(key):
            yield from _numbers(value)


def _numbers(value: object) -> Iterator[int]:
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif _is_id(value):
        yield value


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0
