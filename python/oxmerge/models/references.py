"""Model references: how a recipe names a model, and where that model lies."""

from __future__ import annotations

import os
import re
from contextlib import suppress

from oxmerge.problems import UNSUPPORTED, Problem, near, printable

__all__ = [
    "DOWNLOAD_REVISION",
    "parse_reference",
    "resolve_reference",
    "split_adapters",
]

#: What to do about references that are not supported yet.
DOWNLOAD_REVISION = "download that revision, and name its directory"

#: What may be a model's name on the Hub: `gpt2`, `organisation/model`.
_MOST_PARTS = 32
_NUMBER = re.compile(r"-?(?:\d{1,9}\.?\d{0,17}|\.\d{1,17})")
_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def parse_reference(text: str) -> str | Problem:
    """Return the path that a reference is, or why it cannot be used.

    Parameters
    ----------
    text : str
        A path, also with adapters: ``model+adapter``. A revision (``model@revision``) is refused by
        name.
    """
    if not text.strip():
        return Problem("wrong-value", "an empty model reference", advice="name the model's folder")
    if os.path.exists(os.path.expanduser(text)):
        return text  # whatever letters it has
    if "+" in text and not all(part.strip() for part in text.split("+")):
        message, advice = f"a part of the reference `{text}` is empty", "write `model+adapter`"
        return Problem("wrong-value", message, advice=advice)
    if "@" in text:
        return Problem(
            UNSUPPORTED,
            f"not supported yet: a revision of a model (`{text}`)",
            advice=DOWNLOAD_REVISION,
        )
    return text


def split_adapters(
    reference: str, folders: tuple[str, ...]
) -> tuple[str, tuple[tuple[str, float], ...]]:
    """Return the model of a reference, and its adapters with what each is multiplied by.

    Parameters
    ----------
    reference : str
        ``model+adapter+other=0.5``. What is there under the whole name is a model, and a last part
        that is there with its ``=`` is an adapter.
    folders : tuple of str
        Where a relative path may start.
    """

    def is_there(name: str) -> bool:
        path = os.path.expanduser(name)
        return any(os.path.exists(os.path.join(folder, path)) for folder in folders)

    parts = reference.split("+")
    if len(parts) == 1 or len(parts) > _MOST_PARTS:
        return reference, ()
    found = []
    while parts:
        # The longest name that is there: a `+` may be part of it.
        ends = (at for at in range(len(parts), 1, -1) if is_there("+".join(parts[:at])))
        count = next(ends, 1)
        name, parts = "+".join(parts[:count]), parts[count:]
        path, sign, weight = name.rpartition("=")
        is_weighted = found and sign and _NUMBER.fullmatch(weight) and not is_there(name)
        found.append((path, float(weight)) if is_weighted else (name, 1.0))
    return found[0][0], tuple(found[1:])


def resolve_reference(reference: str, folders: tuple[str, ...]) -> str | Problem:
    """Find the file or directory that a reference names.

    Parameters
    ----------
    reference : str
        As the recipe writes it; ``~`` is the home directory.
    folders : tuple of str
        Where a relative path may start, in order: the working directory, the recipe's folder.

    Returns
    -------
    str or Problem
        An absolute path, or a problem that names every place tried.
    """
    path = os.path.expanduser(reference)
    places = list(dict.fromkeys(os.path.abspath(os.path.join(folder, path)) for folder in folders))
    for place in places:
        if os.path.exists(place):
            return place
    return _not_found(reference, places)


def _not_found(reference: str, places: list[str]) -> Problem:
    tried = " or ".join(f"`{place}`" for place in places)
    message = f"no model `{reference}`: there is no {tried}"
    advice = "name the folder of a model, or a safetensors file"
    if _HUB_NAME.fullmatch(reference):
        message += ", and models are not fetched from the Hub yet"
        advice = f"download it, and name its folder: `hf download {reference} --local-dir FOLDER`"
    if meant := _meant(reference, places):
        advice = f"did you mean `{meant}`? If not, {advice}"
    return Problem("missing-model", message, advice=advice)


def _meant(reference: str, places: list[str]) -> str | None:
    """Return the reference to a file or folder that is there, of almost the same name."""
    for place in places:
        folder, name = os.path.split(place)
        with suppress(OSError):
            for found in near(name, os.listdir(folder), 1):
                return printable(os.path.join(os.path.dirname(reference), found))
    return None
