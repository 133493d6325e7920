"""Weights that are not here, downloaded into the Hub's cache before a merge reads them.

Models are merged again and again, and other programs want them too: so they are kept where all of
these look. Programs of their own download them (`download.py`).
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from oxmerge.errors import InputChangedError, RemoteError, UnsupportedError
from oxmerge.models import hub
from oxmerge.models.hub_cache import Commit, cache_folder
from oxmerge.models.stores import fetch_adapter, is_address
from oxmerge.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

__all__ = ["check_space", "fetch", "is_of_adapter"]

_PROGRAM = Path(__file__).with_name("download.py")
#: Programs that download at a time. For each file the Hub's own protocol takes several connections.
_AT_ONCE = 4
#: Bytes that are worth another program, whose start takes half a second.
_WORTH_ANOTHER = 100_000_000
#: Seconds between looks at how far the files are, and until a program has to be gone.
_GLANCE, _PATIENCE = 0.1, 10.0
#: Room that `--stream` takes besides the output, unless `--spool` says otherwise.
_SPOOL = 20_000_000_000


def is_of_adapter(label: str) -> bool:
    """Tell whether a file holds the weights of an adapter: small, and read in any order."""
    return label.rpartition("/")[2].startswith("adapter_model")


def check_space(files: Sequence[Mapping[str, Any]], output: str, needed: int) -> None:
    """Raise OSError (ENOSPC) if files and output do not fit the disk of the Hub's cache.

    Parameters
    ----------
    files : sequence of mapping
        Files of a plan that are not here.
    output : str
        The directory of the output; what it needs is checked elsewhere, unless it is on that disk.
    needed : int
        Bytes that it needs.
    """
    folder = cache_folder()
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    status, size = os.statvfs(folder), sum(int(file["size"]) for file in files)
    is_shared = os.stat(folder).st_dev == os.stat(output).st_dev
    total = size + needed if is_shared else size
    free = status.f_bavail * status.f_frsize
    if total <= free:
        return
    what = f"{format_size(size)} of weights" + (
        f" and {format_size(needed)} of output" if is_shared else ""
    )
    stream = f"`--stream`, which keeps no weights, needs {format_size(needed + _SPOOL)} at the most"
    message = f"not enough space to download: {what} needed, {format_size(free)} free; {stream}"
    raise OSError(errno.ENOSPC, message, cache_folder())


def fetch(
    files: Iterable[Mapping[str, Any]], progress: Callable[[int, int, str], None] | None = None
) -> dict[str, str]:
    """Download files of the Hub into its cache, and adapters in stores into that of oxmerge.

    Parameters
    ----------
    files : iterable of mapping
        Files of a plan that are not here.
    progress : callable, optional
        Is called ten times a second with the bytes that are here of them, all of their bytes, and
        what comes at the moment; what it raises ends the downloads.

    Returns
    -------
    dict of str to str
        Where each lies now, by its label.

    Raises
    ------
    RemoteError
        If one cannot be had. Those that were complete are kept.
    InputChangedError
        If the bytes are not those that the Hub told of.
    """
    files = list(files)
    places = {
        label: fetch_adapter(label, file["size"], file["remote"]["etag"])
        for file in files
        if is_address(label := file["remote"]["label"]) and is_of_adapter(label)
    }
    named = [_Download(file) for file in files if file["remote"]["label"] not in places]
    places |= {each.label: each.path for each in named if os.path.isfile(each.path)}
    wanted = [each for each in named if each.label not in places]
    if not wanted:
        return places
    reason = hub.why_not()
    if reason is not None:
        why, advice = reason
        raise RemoteError(
            f"weights are to be fetched, and {why}", file=wanted[0].label, advice=advice
        )
    programs: list[_Program] = []
    try:
        _download(named, wanted, places, programs, progress)
    finally:
        for program in programs:
            program.end()
    if any(each.label not in places for each in wanted):
        lacking = next(each.label for each in wanted if each.label not in places)
        said = next((text for text in (each.said() for each in programs) if text), None)
        raise RemoteError(
            "the program that downloads ended before it was done", file=lacking, found=said,
            advice="start again: what is complete is kept",
        )  # fmt: skip
    return places


def _download(
    named: Sequence[_Download],
    wanted: Sequence[_Download],
    places: dict[str, str],
    programs: list[_Program],
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """Start programs that download what is wanted, and put down where it lies, until they end."""
    told: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    total = sum(each.size for each in wanted)
    running = min(_AT_ONCE, len(wanted), 1 + total // _WORTH_ANOTHER)
    programs.extend(_Program(wanted[first::running], told) for first in range(running))
    while running:
        if progress is not None:
            here = sum(each.here(places) for each in named)
            current = next((each.label for each in wanted if each.label not in places), "")
            progress(here, sum(each.size for each in named), current)
        try:
            done = told.get(timeout=_GLANCE)
        except Empty:
            continue
        if done is None:
            running -= 1
        elif "path" in done:
            places[done["label"]] = done["path"]
        else:
            raise next(each for each in wanted if each.label == done["label"]).error(done)


class _Download:
    """A file that is wanted."""

    def __init__(self, file: Mapping[str, Any]) -> None:
        self.label: str = file["remote"]["label"]
        self.etag: str = file["remote"]["etag"]
        self.size: int = file["size"]
        if is_address(self.label):
            raise UnsupportedError(
                "not supported yet: to do this with models in stores",
                file=self.label,
                advice="copy the model here, and name its folder",
            )
        found = Commit.of_label(self.label)
        if found is None or not self.etag.isalnum():
            raise RemoteError("the plan names a file that cannot be fetched", file=self.label)
        self.commit, self.name = found
        self._most = 0
        self.path = self.commit.path_of(self.name)
        snapshots = os.path.dirname(self.commit.folder)
        self.blob = os.path.join(os.path.dirname(snapshots), "blobs", self.etag)

    def job(self) -> dict[str, str]:
        """Return what the program has to know."""
        return {
            "label": self.label, "repo": self.commit.name, "commit": self.commit.hash,
            "name": self.name, "etag": self.etag, "blob": self.blob,
        }  # fmt: skip

    def here(self, places: Mapping[str, str]) -> int:
        """Return how many of its bytes are here; the library gives unfinished files such names."""
        if self.label in places or os.path.exists(self.blob):
            return self.size
        with suppress(OSError), os.scandir(os.path.dirname(self.blob)) as entries:
            for entry in entries:
                if entry.name.startswith(self.etag) and entry.name.endswith(".incomplete"):
                    status = entry.stat()
                    written = min(status.st_size, status.st_blocks * 512, self.size)
                    self._most = max(self._most, written)
        return self._most

    def error(self, done: Mapping[str, Any]) -> Exception:
        """Return the error for what the program says."""
        if "found" in done:
            return InputChangedError(
                "other bytes came than the Hub told of",
                file=self.label,
                expected=f"digest {self.etag}",
                found=f"digest {done['found']}",
                advice="start again; if it stays so, tell those who run the Hub or its mirror",
            )
        if done["error"]["errno"] == errno.ENOSPC:
            return OSError(errno.ENOSPC, f"no space for `{self.label}`", cache_folder())
        return hub.told(done["error"], self.commit.name, self.commit.hash, self.name)


class _Program:
    """A process that downloads files one after the other."""

    def __init__(
        self, files: Sequence[_Download], told: SimpleQueue[dict[str, Any] | None]
    ) -> None:
        job = {
            "cache": cache_folder(),
            "endpoint": hub.endpoint(),
            "files": [file.job() for file in files],
        }
        # `-P`: modules beside the program are not to be taken for the library.
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-P", os.fspath(_PROGRAM)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )  # fmt: skip
        self._told = told
        self._said = ""
        # Daemons: should a signal come before it is known that there is a program, nobody waits for
        # them, and the program ends when its input does.
        readers = (self._listen, self._hear)
        self._readers = [threading.Thread(target=each, daemon=True) for each in readers]
        for reader in self._readers:
            reader.start()
        with suppress(BrokenPipeError):
            print(json.dumps(job), file=self._input, flush=True)

    @property
    def _input(self) -> Any:  # noqa: ANN401 - a file
        return self._process.stdin

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # what else a library prints
                self._told.put(json.loads(line))
        self._told.put(None)

    def _hear(self) -> None:
        """Keep the end of what it says on standard error, so that it can go on saying more."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said = line.strip() or self._said

    def said(self) -> str:
        """Return the last line that it said on standard error."""
        return self._said[:300]

    def end(self) -> None:
        """End it, if it still runs: as Ctrl-C does, so that what is unfinished is removed."""
        with suppress(OSError):
            self._input.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
