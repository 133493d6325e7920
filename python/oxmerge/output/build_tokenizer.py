"""Build a tokenizer that has the tokens of several: a program of its own, which imports `tokenizers`.

It reads a job from standard input and writes the tokenizer to the file that the job names. Its
memory is its own, and ends with it. What goes wrong with the input is a line on standard error and
the exit code 3.

The result is the first tokenizer with more added tokens: its own tokens keep their ids, and what it
does with text that has none of the new ones stays the same. Merges of other tokenizers are not taken:
their ranks and scores mean nothing beside those of the first.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

#: Bytes of addresses; far more than the largest tokenizers take.
_MOST_ADDRESSES = 8 << 30
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


class _UnfitError(Exception):
    """A tokenizer that cannot be built on."""


def _read(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        raw = json.load(file)
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise _UnfitError(f"`{path}` is no tokenizer of the `tokenizers` library")
    return raw


def _kind(raw: dict[str, Any]) -> str:
    model = raw["model"]
    kind = model.get("type")
    if kind is None:  # left out by early versions, which had no other model with merges
        kind = "BPE" if "merges" in model else "Unigram" if "unk_id" in model else "WordPiece"
    return str(kind)


def _tokens(raw: dict[str, Any], rows: int) -> list[str]:
    """Return the model's own tokens that have a row, in the order of their ids."""
    vocabulary = raw["model"].get("vocab")
    if isinstance(vocabulary, list):
        return [piece for piece, _ in vocabulary[:rows]]
    by_id = sorted(vocabulary.items(), key=lambda each: each[1])
    return [token for token, number in by_id if number < rows]


def _added(raw: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    listed = raw.get("added_tokens") or []
    return sorted((each for each in listed if each["id"] < rows), key=lambda each: each["id"])


def _strip(raw: dict[str, Any], rows: int) -> None:
    """Take the tokens out that have no row."""
    model = raw["model"]
    vocabulary = model.get("vocab")
    raw["added_tokens"] = _added(raw, rows)
    if isinstance(vocabulary, list):
        model["vocab"] = vocabulary[:rows]
        return
    gone = {token for token, number in vocabulary.items() if number >= rows}
    if not gone:
        return
    model["vocab"] = {token: number for token, number in vocabulary.items() if number < rows}
    if "merges" in model:
        pairs = [(m.split(" ") if isinstance(m, str) else m, m) for m in model["merges"]]
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            merge
            for pair, merge in pairs
            if gone.isdisjoint((*pair, pair[0] + pair[-1].removeprefix(prefix)))
        ]


def _build(job: dict[str, Any]) -> dict[str, Any]:
    from tokenizers import AddedToken, Tokenizer  # noqa: PLC0415 - what can fail first, does

    base = _read(job["base"])
    kind = _kind(base)
    _strip(base, job["rows"])
    tokenizer = Tokenizer.from_str(json.dumps(base))
    defined = {each["content"] for each in base["added_tokens"]}
    known = set(tokenizer.get_vocab(with_added_tokens=True))
    del base

    def add(content: str, flags: dict[str, Any] | None = None) -> None:
        if flags is None:
            tokenizer.add_tokens([content])
        else:
            token = AddedToken(content, **{key: bool(flags.get(key)) for key in _FLAGS})
            is_special = flags.get("special")
            (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
            defined.add(content)
        known.add(content)

    ordinary: dict[str, int] = {}
    added = []
    for each in job["others"]:
        other = _read(each["path"])
        if _kind(other) != kind:
            raise _UnfitError(
                f"`{each['path']}` is of the kind {_kind(other)}, and `{job['base']}` is {kind}"
            )
        new = [token for token in _tokens(other, each["rows"]) if token and token not in known]
        marked = {each["content"] for each in _added(other, each["rows"])}
        ordinary[each["path"]] = len(set(new) - marked)
        if new:
            tokenizer.add_tokens(new)
            known.update(new)
        added += _added(other, each["rows"])
    for token in added:
        if token["content"] and token["content"] not in defined:
            add(token["content"], token)
    for content in job["tokens"]:
        if content not in known:
            add(content)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if len(set(ids.values())) < len(ids):
        raise _UnfitError(f"ids of `{job['base']}` have gaps, in which added tokens would collide")
    tokenizer.save(job["out"])
    decoder = tokenizer.get_added_tokens_decoder()
    described = {
        str(number): {
            "content": token.content,
            **{key: getattr(token, key) for key in (*_FLAGS, "special")},
        }
        for number, token in sorted(decoder.items())
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"added": described, "ordinary": ordinary, "peak": peak}


def main() -> int:
    """Do the job that standard input describes."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_ADDRESSES, _MOST_ADDRESSES))
    job = json.load(sys.stdin)
    try:
        result = _build(job)
    except _UnfitError as error:
        print(error, file=sys.stderr)
        return 3
    except ImportError:
        print("there is no `tokenizers` library", file=sys.stderr)
        return 4
    except Exception as error:  # noqa: BLE001 - the library raises plain ones; the input is at fault
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 3
    json.dump(result, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
