"""A real S3 server on loopback, and the environment of its users."""

from __future__ import annotations

import itertools
import json
import urllib.request
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from typing import Any

    Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def refusing_lists(application: Application) -> Application:
    """Answer as S3 does to who may read objects and not list them: what is not there is refused."""

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        def start_refusing(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            return start("403 Forbidden" if status.startswith("404") else status, headers, *rest)

        if "list-type" in environ["QUERY_STRING"]:
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return application(environ, start_refusing)

    return answer


def of_google(application: Application) -> Application:
    """Answer as the store of Google does, whose XML interface is that of S3 with other tokens."""

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        scope = "key/20260101/us-east-1/s3/aws4_request"
        environ["HTTP_AUTHORIZATION"] = f"AWS4-HMAC-SHA256 Credential={scope}, Signature=0"
        return application(environ, start)

    return answer


_numbers = itertools.count()


def of_its_own(application: Application) -> Application:
    """Have a bucket that no other server has: all servers of a process share what they keep."""
    name = f"/bucket-{next(_numbers)}"

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        for place in ("PATH_INFO", "RAW_URI", "REQUEST_URI"):
            if environ.get(place, "").startswith("/bucket"):
                environ[place] = name + environ[place].removeprefix("/bucket")
        return application(environ, start)

    return answer


@contextmanager
def serve(*, lists: bool = True, google: bool = False) -> Iterator[str]:
    """Serve a bucket that is called so; yield the address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    assert server._server is not None
    server._server.app = of_its_own(server._server.app)
    if not lists:
        server._server.app = refusing_lists(server._server.app)
    if google:
        server._server.app = of_google(server._server.app)
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


def google_environment(address: str, account: Path) -> dict[str, str]:
    """Return the environment of a user of a server that is one of Google, with an account there."""
    key = {"client_email": "", "private_key": "", "private_key_id": ""}
    account.write_text(json.dumps({"gcs_base_url": address, "disable_oauth": True, **key}))
    return {"GOOGLE_SERVICE_ACCOUNT": str(account), "GOOGLE_ALLOW_HTTP": "true"}
