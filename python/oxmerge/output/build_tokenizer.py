"""Build a tokenizer that has the tokens of several, with the library `tokenizers`.

A program of its own: its memory ends with it. It reads a job from standard input and writes the
tokenizer to the file that the job names. Exit code 3 says that the tokenizers do not fit, 4 that
there is no library; a line on standard error says more.

The result is the first tokenizer with more added tokens: its own tokens keep their ids, and text
that has none of the new ones becomes the same tokens. Merges and scores of the others are not
taken: they mean nothing beside those of the first.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

#: Bytes of addresses; far more than the largest tokenizers take.
_MOST_ADDRESSES = 8 << 30
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_ALL_FLAGS = (*_FLAGS, "special")
_UNFIT, _NO_LIBRARY = 3, 4


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
    _strip(base, job["rows"])
    tokenizer = Tokenizer.from_str(json.dumps(base))
    known = set(tokenizer.get_vocab(with_added_tokens=True))
    ordinary: dict[str, int] = {}
    # The first definition of an added token counts.
    marked = {each["content"]: each for each in base["added_tokens"]}
    own = set(marked)
    for path, rows in job["others"]:
        other = _read(path)
        if _kind(other) != _kind(base):
            message = f"`{path}` is {_kind(other)}, and `{job['base']}` is {_kind(base)}"
            raise _UnfitError(message)
        for each in _added(other, rows):
            marked.setdefault(each["content"], each)
        new = [token for token in _tokens(other, rows) if token and token not in known]
        ordinary[path] = sum(token not in marked for token in new)
        tokenizer.add_tokens(new)
        known.update(new)
    marked.pop("", None)
    # All at once, for each call goes over all added tokens: their ids in order, then their flags.
    new = [*marked, *job["tokens"]]
    tokenizer.add_tokens([content for content in new if content not in known])
    for is_special, add in ((False, tokenizer.add_tokens), (True, tokenizer.add_special_tokens)):
        add(
            [
                AddedToken(content, **{key: bool(flags.get(key)) for key in _FLAGS})
                for content, flags in marked.items()
                if content not in own and bool(flags.get("special")) is is_special
            ]
        )
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if len(set(ids.values())) < len(ids):
        message = f"the ids of `{job['base']}` have gaps, in which added tokens would collide"
        raise _UnfitError(message)
    tokenizer.save(job["out"])
    decoder = tokenizer.get_added_tokens_decoder() if job["tells_added"] else {}
    added = {
        str(number): {"content": token.content, **{key: getattr(token, key) for key in _ALL_FLAGS}}
        for number, token in sorted(decoder.items())
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"added": added, "ordinary": ordinary, "peak": peak}


def main() -> int:
    """Do the job that standard input describes."""
    try:
        _limit_addresses()
        result = _build(json.load(sys.stdin))
    except _UnfitError as error:
        return _failed(_UNFIT, str(error))
    except ImportError as error:
        return _failed(_NO_LIBRARY, str(error))
    except Exception as error:  # noqa: BLE001 - the library raises plain ones, of any input
        return _failed(_UNFIT, f"{type(error).__name__}: {error}")
    json.dump(result, sys.stdout)
    return 0


def _limit_addresses() -> None:
    """Lower the limit that counts, unless a lower one is set; nobody may raise the other one."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    given = [each for each in limits if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([_MOST_ADDRESSES, *given]), limits[1]))


def _failed(code: int, message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
