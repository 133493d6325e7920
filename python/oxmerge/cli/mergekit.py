"""The options of `mergekit-yaml`, for commands that were written for it.

Each is taken, and said in a line: what it is called here, or why it is not needed. One that would
give another output than it does there is refused.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from oxmerge.cli.arguments import UsageError, natural, positive, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from oxmerge.cli.arguments import Parser

__all__ = ["add_options", "notes"]


@dataclass(frozen=True, slots=True)
class _Flag:
    """An option of mergekit.

    Attributes
    ----------
    names : tuple of str
        How it is written.
    says : str
        What it is here.
    becomes : str, optional
        The option of ours that has its value.
    kind : callable, optional
        Reads its value, if it has one.
    is_refused : bool
        Whether the output would be another.
    """

    names: tuple[str, ...]
    says: str
    becomes: str | None = None
    kind: Callable[[str], object] | None = None
    is_refused: bool = False


#: More bytes than any file has.
_UNSPLIT = 1 << 60


def _shard_size(text: str) -> int:
    """Parse a size; mergekit takes no size, or less, for no limit."""
    return _UNSPLIT if re.fullmatch(r"0+|-\d+", text, re.ASCII) else size(text)


def _either(name: str) -> tuple[str, str]:
    return f"--{name}", f"--no-{name}"


_FLAGS = (
    _Flag(("--out-shard-size",), "is `--shard-size`", "shard_size", _shard_size),
    _Flag(("--random-seed",), "is `--seed`; the random masks are others", "seed", natural),
    _Flag(("--num-threads", "-j"), "is `--threads`", "threads", positive),
    _Flag(("--no-allow-crimes",), "is so unless `--allow-mismatch` is given"),
    _Flag(("--no-quiet",), "is so unless `--quiet` is given"),
    _Flag(("--no-unsafe-truncate-embeddings",), "is so: no row is left out unasked"),
    _Flag(("--cuda", "--no-cuda"), "is not needed; `--device cuda` computes on a GPU"),
    _Flag(("--gpu-rich",), "is not needed; `--device cuda` computes on every GPU"),
    _Flag(_either("multi-gpu"), "is not needed; `--device cuda` computes on every GPU"),
    _Flag(_either("read-to-gpu"), "is not needed: `--device cuda` reads straight to it"),
    _Flag(_either("low-cpu-memory"), "is not needed: `--memory` bounds the whole process"),
    _Flag(_either("lazy-unpickle"), "is not needed: tensors are read in pieces, as they are used"),
    _Flag(_either("clone-tensors"), "is not needed: no tensor shares memory with another"),
    _Flag(_either("trust-remote-code"), "is not needed: no code of a model is run"),
    _Flag(_either("async-write"), "is not needed: writing goes on beside computing"),
    _Flag(("--write-threads",), "is not needed: all threads write", kind=positive),
    _Flag(
        ("--transformers-cache",),
        "is passed over: HF_HUB_CACHE names the cache",
        kind=str,
    ),
    _Flag(("--lora-merge-cache",), "is not needed: nothing is merged beforehand", kind=str),
    _Flag(("--lora-merge-dtype",), "is not needed: nothing is merged beforehand", kind=str),
    _Flag(("--intermediate-dir", "-I"), "is not needed: they lie beside the output", kind=str),
    _Flag(("--lazy", "--no-lazy"), "is not needed: every merge of the file is made anew"),
    _Flag(("--copy-tokenizer",), "is not needed: the donor's tokenizer is copied"),
    _Flag(("--write-model-card",), "is not needed: a model card is written"),
    _Flag(("--safe-serialization",), "is not needed: weights are written as safetensors"),
    _Flag(("--verbose", "-v", "-vv", "-vvv"), "is not needed: `oxmerge plan` tells all there is"),
    _Flag(("--no-copy-tokenizer",), "is not there: remove the tokenizer's files", is_refused=True),
    _Flag(("--no-write-model-card",), "is not there: remove `README.md`", is_refused=True),
    _Flag(("--no-safe-serialization",), "is not there: weights are safetensors", is_refused=True),
    _Flag(
        ("--unsafe-truncate-embeddings",),
        "is not there: say which tokens are meant, as `tokenizer_source: union` does",
        is_refused=True,
    ),
)


def add_options(parser: Parser) -> None:
    """Add mergekit's options, which the help leaves out."""
    for flag in _FLAGS:
        parser.add_argument(
            *flag.names,
            action=_Take,
            flag=flag,
            dest=flag.becomes or "mergekit",
            type=flag.kind,
            nargs=None if flag.kind is not None else 0,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def notes(options: argparse.Namespace) -> list[str]:
    """Return a line for each option of mergekit's that was given."""
    found: list[str] = getattr(options, "mergekit_notes", [])
    return found


class _Take(argparse.Action):
    """Keeps the value where ours has it, and the line that says so."""

    def __init__(self, *names: Any, flag: _Flag, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(*names, **settings)
        self._flag = flag

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        text = f"`{option_string}`, of mergekit, {self._flag.says}"
        if self._flag.is_refused:
            raise UsageError(text, "leave it out")
        if self._flag.becomes is not None:
            setattr(namespace, self._flag.becomes, values)
        namespace.mergekit_notes = [*notes(namespace), text]
