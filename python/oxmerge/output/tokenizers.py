"""The output's tokenizer: whose files it has, or what is built of them.

The output has the tokenizer of one model, file by file, as it is. Only where it needs tokens that
this one lacks, a tokenizer is built: by the `tokenizers` library, in a process of its own, whose
memory ends with it. Nothing else imports that library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from oxmerge.errors import PlanError
from oxmerge.file_state import states_of
from oxmerge.json_files import read_object
from oxmerge.models.vocabularies import is_of_tokenizer
from oxmerge.output.config import json_text
from oxmerge.output.side_files import LeftOut, SideFiles, find_side_files, folder_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from oxmerge.file_state import FileState

__all__ = ["Built", "OutputTokenizer", "build_tokenizer", "side_files_with"]

_CONFIG = "tokenizer_config.json"
_DECODER = "added_tokens_decoder"
_PROGRAM = Path(__file__).with_name("build_tokenizer.py")
#: Seconds; the largest tokenizers take half a minute.
_LONGEST = 600
#: The exit code of the program where the library is not there.
_NO_LIBRARY = 4


@dataclass(frozen=True, slots=True)
class Built:
    """A tokenizer that was built.

    Attributes
    ----------
    data : bytes
        Its `tokenizer.json`.
    added : dict
        Its added tokens by id, each with its flags, if a file beside `base` tells them.
    ordinary : dict of str to int
        How many tokens that are none of the added ones each file gave it.
    memory : int
        Bytes that the process took which built it.
    """

    data: bytes
    added: dict[str, Any]
    ordinary: dict[str, int]
    memory: int


@dataclass(frozen=True, slots=True)
class OutputTokenizer:
    """The tokenizer that the output has.

    Attributes
    ----------
    reference : str
        The model that its files come from, as the recipe writes it.
    folder : str
        Where they lie.
    built : Built, optional
        What is built of them; None if they are taken as they are.
    """

    reference: str
    folder: str
    built: Built | None = field(default=None)


def build_tokenizer(
    base: str, rows: int, others: Sequence[tuple[str, int]], tokens: Sequence[str]
) -> Built:
    """Return the tokenizer of `base` with the tokens of others, and further ones.

    Parameters
    ----------
    base : str
        Its `tokenizer.json`; tokens whose ids are not below `rows` are left out.
    rows : int
        How many rows its model has.
    others : sequence of (str, int)
        The same of each other.
    tokens : sequence of str
        Further tokens.

    Raises
    ------
    PlanError
        If the library is not there, or cannot make one tokenizer of these.
    """
    files = states_of((base, *(path for path, _ in others)))
    return _build(files, rows, tuple(number for _, number in others), tuple(tokens))


@lru_cache(maxsize=1)  # a sweep plans the same merge often
def _build(
    files: tuple[tuple[str, FileState], ...],
    rows: int,
    rows_of_others: tuple[int, ...],
    tokens: tuple[str, ...],
) -> Built:
    base, *paths = (path for path, _ in files)
    others = list(zip(paths, rows_of_others, strict=True))
    with tempfile.TemporaryDirectory(prefix="oxmerge-") as folder:
        out = os.path.join(folder, "tokenizer.json")
        job = {
            "base": base,
            "rows": rows,
            "others": others,
            "tokens": tokens,
            "out": out,
            "tells_added": _tells_added(os.path.dirname(base)),
        }
        found = _run(json.dumps(job))
        data = Path(out).read_bytes()
    return Built(data, found["added"], found["ordinary"], found["peak"])


def _tells_added(folder: str) -> bool:
    """Tell whether a file beside a tokenizer tells its added tokens again."""
    listed = os.path.exists(os.path.join(folder, "added_tokens.json"))
    return listed or _DECODER in read_object(os.path.join(folder, _CONFIG))


def _run(job: str) -> dict[str, Any]:
    """Run the program that builds tokenizers; what it found."""
    # `-P`: modules beside the program are not to be taken for the library.
    command = [sys.executable, "-P", os.fspath(_PROGRAM)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            command, input=job, capture_output=True, text=True, timeout=_LONGEST, check=False,
            env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise PlanError(
            "the output's tokenizer cannot be built",
            found=f"no end after {_LONGEST} seconds",
            advice="take the tokenizer of one model: `tokenizer_source: base`",
        ) from None
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout)
        return result
    if done.returncode == _NO_LIBRARY:
        raise PlanError(
            "building a tokenizer needs the `tokenizers` library",
            advice="install it: `pip install tokenizers`; `tokenizer_source: base` does without",
        )
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise PlanError(
        "the output's tokenizer cannot be built of those of the models",
        found=lines[-1][:500],
        advice="take the tokenizer of one model: `tokenizer_source: base`",
    )


def side_files_with(
    found: SideFiles, donor: str, tokenizer: OutputTokenizer | None, template: str | None
) -> SideFiles:
    """Return the files beside the weights with those of the output's tokenizer.

    Parameters
    ----------
    found : SideFiles
        The donor's.
    donor : str
        The donor's folder.
    tokenizer : OutputTokenizer, optional
        Unless it is the donor's as it is.
    template : str, optional
        A chat template that the tokenizer has not.
    """
    folder = donor if tokenizer is None else tokenizer.folder
    copied, left_out, problems = list(found.copied), list(found.left_out), list(found.problems)
    if tokenizer is not None and os.path.realpath(folder) != os.path.realpath(donor):
        theirs = find_side_files(folder_of(folder))
        reason = f"the tokenizer is that of `{tokenizer.reference}`"
        left_out += [LeftOut(file.name, reason) for file in copied if is_of_tokenizer(file.name)]
        copied = [file for file in copied if not is_of_tokenizer(file.name)]
        copied += [file for file in theirs.copied if is_of_tokenizer(file.name)]
        problems += theirs.problems
    texts = dict(found.texts)
    names = {file.name for file in copied}
    outdated: dict[str, str] = {}
    config, more = read_object(os.path.join(folder, _CONFIG)), dict[str, Any]()
    if tokenizer is not None and tokenizer.built is not None:
        built = tokenizer.built
        texts["tokenizer.json"] = built.data
        if _DECODER in config:
            more[_DECODER] = built.added
        if "added_tokens.json" in names:
            ids = {token["content"]: int(number) for number, token in built.added.items()}
            texts["added_tokens.json"] = json_text(ids).encode()
        outdated["tekken.json"] = "it lacks the tokens that were added"
    if template is not None:
        # Which of the two a loader reads is a question of its age.
        texts["chat_template.jinja"] = template.encode(errors="backslashreplace")
        if config:
            more["chat_template"] = template
        outdated["chat_template.json"] = "the chat template is another"
    if more:
        texts[_CONFIG] = json_text({**config, **more}).encode()
    left_out += [LeftOut(name, outdated[name]) for name in outdated if name in names]
    kept = [file for file in copied if file.name not in texts and file.name not in outdated]
    return SideFiles(
        tuple(sorted(kept, key=lambda file: file.name)),
        tuple(sorted(left_out, key=lambda entry: entry.name)),
        tuple(problems),
        dict(sorted(texts.items())),
    )
