"""A web server on the loopback address that answers ranges, and answers wrongly when told to."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: What goes wrong with an answer, for a path, its range and how often that path was asked for:
#: ``reset`` and ``short`` (in the middle of the bytes), ``long``, ``other`` (another range),
#: ``whole`` (no range), ``changed`` (another ETag), or a status as a number.
Fault = Callable[[str, tuple[int, int] | None, int], str | int | None]


class RangeServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes
    ----------
    asked : list of (str, str, tuple of int)
        Method, path and range of every request.
    absent : int
        The status of files that are not there.
    retry_after : str
        What it says with status 429 of when to ask again.
    seconds_a_mib : float
        How long it waits between pieces of an answer, as a line that is slower than this machine.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, fault: Fault | None = None) -> None:
        self.folder = folder
        self.fault = fault or (lambda *_: None)
        self.lock = threading.Lock()
        self.absent = 404
        self.retry_after = "0"
        self.seconds_a_mib = 0.0
        self.asked: list[tuple[str, str, tuple[int, int] | None]] = []
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def address(self) -> str:
        """Where it can be reached."""
        return f"http://127.0.0.1:{self.server_port}"

    def bytes_sent(self, suffix: str = ".safetensors") -> int:
        """Return the bytes of the ranges that were asked for."""
        return sum(
            span[1] - span[0]
            for method, path, span in self.asked
            if method == "GET" and path.endswith(suffix) and span is not None
        )


class Answer(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: RangeServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Tell of a file."""
        self.answer(with_bytes=False)

    def do_GET(self) -> None:
        """Send a file, or a range of it."""
        self.answer(with_bytes=True)

    def answer(self, *, with_bytes: bool) -> None:
        path = unquote(urlsplit(self.path).path)  # a proxy is sent the whole address
        file = self.server.folder / path.lstrip("/")
        if not file.is_file():
            self.refuse(self.server.absent)
            return
        size = file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        span = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else None
        with self.server.lock:
            times = sum(path == each for _, each, _ in self.server.asked)
            self.server.asked.append((self.command, path, span))
        fault = self.server.fault(path, span, times) if with_bytes else None
        if isinstance(fault, int):
            self.refuse(fault)
            return
        state = file.stat()
        tag = hashlib.md5(f"{path} {state.st_mtime_ns} {fault == 'changed'}".encode()).hexdigest()
        if self.headers.get("If-Match", f'"{tag}"') != f'"{tag}"':
            self.refuse(412)
            return
        start, stop = span or (0, size)
        if fault == "other":
            start, stop = start + 1, stop + 1
        partial = span is not None and fault != "whole"
        if not partial:
            start, stop = 0, size
        self.send_response(206 if partial else 200)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", self.date_time_string(int(state.st_mtime)))
        extra = 1 if fault == "long" else 0
        self.send_header("Content-Length", str(stop - start + extra))
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if with_bytes:
            self.send(file, start, stop - start + extra, fault)

    def send(self, file: Path, start: int, count: int, fault: str | None) -> None:
        if fault in {"reset", "short"}:
            count //= 2
        with file.open("rb") as opened:
            opened.seek(start)
            while count > 0:
                length = min(count, 1 << 20)
                sent = self.connection.sendfile(opened, opened.tell(), length)
                if sent == 0:  # more than there is
                    self.wfile.write(bytes(length))
                time.sleep(self.server.seconds_a_mib)
                count -= sent or length
        if fault in {"reset", "short"}:
            self.close_connection = True
            self.wfile.flush()
            if fault == "reset":
                self.connection.shutdown(SHUT_RDWR)

    def refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if status == 429:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()


@contextmanager
def serve(folder: Path, fault: Fault | None = None) -> Iterator[RangeServer]:
    """Serve a folder while the context is open."""
    server = RangeServer(folder, fault)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
