"""The demo's server of the Hub's protocol, with everything that can go wrong on the way."""

from __future__ import annotations

import os
import random
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from oxmerge.demo_hub import Handler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Fault = Callable[[Any], str | None]


class _Faulty(Handler):
    """Has the fault in its answers that `choose` names for a request, if any.

    Of any answer: ``429`` (with Retry-After), ``503`` and other statuses, ``reset`` before a byte.
    Of a file's bytes: ``cut`` (reset on the way), ``short`` (ended early, as if that was all),
    ``other`` bytes, another ``range``, the ``whole`` file, another ``etag``, an ``endless`` answer.
    """

    choose: ClassVar[Fault]
    fault: str | None = None

    def do_GET(self) -> None:  # noqa: N802 - as the base class has it
        self.fault = type(self).choose(self)
        if self.fault == "reset":
            self.drop()
        elif self.fault is not None and self.fault.isdigit():
            self.hub.asked.append((self.command, self.path, self.fault))
            self.send_response(int(self.fault))
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            super().do_GET()

    def drop(self) -> None:
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "ETag" and self.fault == "etag" and self.path.startswith("/store/"):
            value = f'"{random.random()}"'
        if keyword == "Content-Range" and self.fault == "range":
            value = value.replace("bytes ", "bytes 1")
        if keyword == "Content-Length" and self.fault == "endless":
            keyword, value = "Connection", "close"
        super().send_header(keyword, value)

    def give_file(self, path: str, headers: Mapping[str, str]) -> None:
        if self.fault == "whole":
            del self.headers["Range"]
        super().give_file(path, headers)

    def send_bytes(self, file: Any, start: int, stop: int) -> None:
        if self.fault == "other":
            data = bytearray(os.pread(file.fileno(), stop - start, start))
            data[len(data) // 2] ^= 1
            self.wfile.write(data)
        elif self.fault == "endless":
            self.close_connection = True
            while True:
                self.wfile.write(bytes(1 << 16))
        elif self.fault in ("cut", "short"):
            super().send_bytes(file, start, (start + stop) // 2)
            self.close_connection = True
            self.wfile.flush()
            if self.fault == "cut":
                self.drop()
        else:
            super().send_bytes(file, start, stop)

    def finish(self) -> None:
        with suppress(OSError):  # it was dropped
            super().finish()

    def handle(self) -> None:
        with suppress(OSError, ValueError):  # the other side has gone, or it was dropped
            super().handle()


def faulty(choose: Fault) -> type[Handler]:
    """Return a handler whose answers have the fault that `choose` names for a request."""
    return type("Faulty", (_Faulty,), {"choose": staticmethod(choose)})


def at_random(seed: int, faults: tuple[str, ...], share: float) -> Fault:
    """Return what gives a share of the requests for large files one of these faults."""
    generator = random.Random(seed)

    def choose(request: Any) -> str | None:
        if not request.path.startswith("/store/") or generator.random() >= share:
            return None
        return generator.choice(faults)

    return choose
