"""A real S3 server on loopback, and the environment of its users."""

from __future__ import annotations

import urllib.request
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def serve() -> Iterator[str]:
    """Serve a bucket that is called so; yield the address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    make = urllib.request.Request(f"{address}/bucket", method="PUT")
    with closing(urllib.request.urlopen(make)):
        yield address
    server.stop()


def environment(address: str) -> dict[str, str]:
    """Return the environment of a user of a server."""
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }
