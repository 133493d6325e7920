"""A program that downloads files into the Hub's cache, one after the other, and checks their bytes.

It is a process of its own, since what the Hub's libraries take for a download is no part of the
memory of a merge. Standard input has a job as a line of JSON, and ends when the process that
started it does: then it ends too. Standard output gets a line for each file: where it lies, or why
it could not be had. How far a file is can be seen by its size in the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

_CHUNK = 4 << 20
#: How often a server is asked for a file that does not answer: for half a minute.
_ATTEMPTS, _FIRST_WAIT, _LONGEST_WAIT = 9, 0.2, 8.0
_SHA256_LETTERS = 64


def main() -> None:
    """Download what the job says, up to the first file that cannot be had."""
    # An interrupt ends a download so that the library removes what is unfinished. In the background
    # of a script it would be ignored.
    signal.signal(signal.SIGINT, _interrupt)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    for file in job["files"]:
        done = _download(job, file)
        print(json.dumps({"label": file["label"], **done}), flush=True)  # noqa: T201 - see above
        if "path" not in done:
            break


def _interrupt(*_: object) -> None:
    # One may come from the terminal, from who started this, and from the end of the input: but for
    # the first they would end the removing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_input() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)


def _download(job: dict[str, Any], file: dict[str, Any]) -> dict[str, Any]:
    was_there = os.path.exists(file["blob"])
    try:
        path = _fetch(job, file)
        found = file["etag"] if was_there else _digest(path, file["etag"])
    except Exception as error:  # noqa: BLE001 - all is told
        return {"error": describe(error)}
    if found == file["etag"]:
        return {"path": path}
    # What came just now is not the file, and must not be taken for it.
    for each in {os.path.realpath(path), path}:
        os.unlink(each)
    return {"found": found}


def _fetch(job: dict[str, Any], file: dict[str, Any]) -> str:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - if it fails, that is told

    stay_within()
    attempt = 0
    while True:
        try:
            path: str = hf_hub_download(
                file["repo"],
                file["name"],
                revision=file["commit"],
                cache_dir=job["cache"],
                endpoint=job["endpoint"],
            )
        except Exception as error:
            # The library itself asks again for most of what passes, but not after a reset.
            attempt += 1
            if attempt == _ATTEMPTS or "TransportError" not in describe(error)["kinds"]:
                raise
            time.sleep(min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT))
        else:
            return path


def stay_within() -> None:
    """Have the library refuse an ETag that leads out of its cache: it is a part of a path there."""
    from huggingface_hub import get_session  # noqa: PLC0415 - as above

    session = get_session()
    if _refuse_path not in session.event_hooks["response"]:
        hooks = {**session.event_hooks}
        hooks["response"] = [*hooks["response"], _refuse_path]
        session.event_hooks = hooks


def _refuse_path(answer: Any) -> None:  # noqa: ANN401 - of the library
    for name in ("X-Linked-Etag", "ETag"):
        told = str(answer.headers.get(name, "")).removeprefix("W/").strip('"')
        is_path = told.startswith("/") or ".." in told
        if is_path and answer.request.method == "HEAD":  # which files are called by
            raise ValueError(f"the ETag `{told[:80]}` leads out of the cache")


def cause_of(error: Exception) -> Exception:
    """Return why a file is neither here nor to be had, where the library says only that."""
    is_general = type(error).__name__ == "LocalEntryNotFoundError"
    return error.__cause__ if is_general and isinstance(error.__cause__, Exception) else error


def describe(error: Exception) -> dict[str, Any]:
    """Return what can be told of an error of the library, as data: it may be another process's."""
    error = cause_of(error)
    answer = getattr(error, "response", None)
    return {
        "kinds": [each.__name__ for each in type(error).__mro__],
        "status": getattr(answer, "status_code", None),
        "errno": getattr(error, "errno", None),
        "text": (getattr(error, "server_message", None) or str(error)).strip().split("\n")[0][:300],
    }


def _digest(path: str, etag: str) -> str:
    """Return what the Hub calls a file of these bytes: its SHA-256, or Git's SHA-1."""
    with open(path, "rb", buffering=0) as file:
        if len(etag) == _SHA256_LETTERS:
            whole = hashlib.sha256()
        else:
            whole = hashlib.sha1(usedforsecurity=False)
            whole.update(b"blob %d\0" % os.fstat(file.fileno()).st_size)
        buffer = memoryview(bytearray(_CHUNK))
        while count := file.readinto(buffer):
            whole.update(buffer[:count])
    return whole.hexdigest()


if __name__ == "__main__":
    main()
