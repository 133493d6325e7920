"""A mount whose answers can be held back: a FUSE file system over a folder, for root.

Run as a program it serves ``FOLDER`` at ``MOUNT``. While there is a file ``GATE``, every answer
waits for its removal; ``GATE.waiting`` says that one does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
import time
from pathlib import Path

_HEADER = struct.Struct("<IIQQIIII")
_LOOKUP, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 3, 14, 15, 17, 18
_FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = 25, 26, 27, 28, 29
#: Requests that want no answer: forgotten nodes, one and many, and interrupts.
_SILENT = (2, 36, 42)


class Served:
    """The folder, by numbers of nodes."""

    def __init__(self, folder: Path) -> None:
        self.paths = {1: folder}

    def attributes(self, node: int) -> bytes:
        status = self.paths[node].stat()
        times = [status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns]
        seconds, rest = zip(*(divmod(each, 10**9) for each in times), strict=True)
        size = (node, status.st_size, status.st_blocks)
        last = (status.st_mode, status.st_nlink, status.st_uid, status.st_gid, 0, 4096, 0)
        return struct.pack("<6Q10I", *size, *seconds, *rest, *last)

    def answer(self, opcode: int, node: int, data: bytes) -> bytes:
        if opcode == _INIT:
            return struct.pack("<IIIIHHIIHH8I", 7, 31, 1 << 17, 0, 8, 8, 1 << 17, 1, 0, 0, *[0] * 8)
        if opcode == _LOOKUP:
            path = self.paths[node] / os.fsdecode(data.rstrip(b"\0"))
            path.stat()
            known = {path: node for node, path in self.paths.items()}
            found = known.get(path, len(self.paths) + 1)
            self.paths[found] = path
            return struct.pack("<4QII", found, 0, 0, 0, 0, 0) + self.attributes(found)
        if opcode == _GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self.attributes(node)
        if opcode in {_OPEN, _OPENDIR}:
            return struct.pack("<QII", node, 0, 0)
        if opcode in {_READ, _READDIR}:
            _, offset, size = struct.unpack_from("<QQI", data)
            if opcode == _READ:
                return self.paths[node].read_bytes()[offset : offset + size]
            return b"".join(self.entries(node)[offset:])
        if opcode == _STATFS:
            return struct.pack("<5Q10I", *[0] * 5, 4096, 255, 4096, *[0] * 7)
        if opcode in {_RELEASE, _RELEASEDIR, _FLUSH}:
            return b""
        raise OSError(errno.ENOSYS, "not served")

    def entries(self, node: int) -> list[bytes]:
        found = []
        for at, path in enumerate(sorted(self.paths[node].iterdir()), start=1):
            name = os.fsencode(path.name)
            entry = struct.pack("<QQII", 1, at, len(name), 0) + name
            found.append(entry + b"\0" * (-len(entry) % 8))
        return found


def serve(folder: Path, mount: Path, gate: Path) -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"stalling", os.fsencode(mount), b"fuse", 0, options) != 0:
        sys.exit(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    print("mounted", flush=True)
    served = Served(folder)
    while True:
        try:
            request = os.read(device, 1 << 18)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            continue
        _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
        if opcode in _SILENT:
            continue
        while gate.exists():
            gate.with_suffix(".waiting").touch()
            time.sleep(0.002)
        try:
            body, code = served.answer(opcode, node, request[_HEADER.size :]), 0
        except OSError as error:
            body, code = b"", -(error.errno or errno.EIO)
        os.write(device, struct.pack("<IiQ", 16 + len(body), code, unique) + body)


if __name__ == "__main__":
    serve(*map(Path, sys.argv[1:]))
