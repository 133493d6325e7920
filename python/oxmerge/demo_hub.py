"""A small server on this machine that speaks the Hub's protocol, to try models by name without one.

It serves folders as models, in one commit each: information, list of files, and files by ranges.
Large files are redirected to an address of another origin that is signed and expires, as the Hub's
are.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["HUB_CACHE", "HUB_RECIPE", "Handler", "HubServer", "Model", "hub_of", "serving"]

#: What is beside the demo's models: a recipe that names them as the Hub does, and a cache.
HUB_RECIPE, HUB_CACHE = "hub.yml", "hub-cache"
_RECIPE = """\
merge_method: slerp
base_model: demo/base
models:
  - model: demo/base
  - model: demo/tuned@v1
parameters:
  t: [0.2, 0.8]
dtype: bfloat16
"""

#: Files of so many bytes are large ones, which the Hub keeps elsewhere.
_LARGE = 100_000
_CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=(\d{1,19})-(\d{0,19})")


@dataclass(frozen=True)
class Model:
    """A model that the server has.

    Attributes
    ----------
    files : mapping of str to str
        The paths of its files, by their names with ``/``.
    commit : str
        The commit of all of its branches and tags.
    revisions : tuple of str
        Their names.
    token : str, optional
        Without it nobody sees the model, as if it was private.
    gated : bool
        Whether files are given only to those who have the token; the list is not.
    """

    files: Mapping[str, str]
    commit: str
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None
    gated: bool = False

    @classmethod
    def of_folder(cls, folder: str, **options: Any) -> Model:  # noqa: ANN401 - those above
        """Return the model that a folder is, whose commit is a digest of its files."""
        files = {
            os.path.relpath(os.path.join(place, name), folder): os.path.join(place, name)
            for place, _, names in os.walk(folder)
            for name in names
        }
        listed = "\n".join(f"{name} {_etag(path)}" for name, path in sorted(files.items()))
        commit = hashlib.sha1(listed.encode(), usedforsecurity=False).hexdigest()
        return cls(files, commit, **options)


def _is_large(path: str) -> bool:
    return os.path.getsize(path) >= _LARGE or path.endswith(".safetensors")


@lru_cache(maxsize=4096)
def _etag(path: str) -> str:
    """Return what the Hub calls a file: its SHA-256 if it is large, else Git's SHA-1."""
    with open(path, "rb") as file:
        if _is_large(path):
            return hashlib.file_digest(file, "sha256").hexdigest()
        data = file.read()
    return hashlib.sha1(b"blob %d\0%s" % (len(data), data), usedforsecurity=False).hexdigest()


@dataclass
class HubServer:
    """What a server has, and where it is.

    Attributes
    ----------
    models : dict of str to Model
        By their names.
    seconds : float
        How long a signed address is taken.
    address, store : str
        The addresses of the Hub and of the store of its large files.
    asked : list of (str, str, str)
        Method, path and range of each request.
    sent : int
        Bytes of files that were sent.
    """

    models: dict[str, Model]
    seconds: float = 3600
    address: str = ""
    store: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0
    _key: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def sign(self, path: str, until: float) -> str:
        """Return the signature of an address that is taken until then."""
        return hmac.new(self._key, f"{path} {until}".encode(), "sha256").hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers requests to the Hub, and to the store of its large files."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer a request."""
        self.hub.asked.append((self.command, self.path, self.headers.get("Range", "")))
        path = urlsplit(self.path).path
        if found := re.fullmatch(r"/store/([^/]+/[^/]+)/(.+)", path):
            self.give_large(unquote(found[1]), unquote(found[2]))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/revision/([^/]+))?", path):
            self.tell(found[1], unquote(found[3] or "main"))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            self.list_files(found[1], unquote(found[2]))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], unquote(found[2]), unquote(found[3]))
        else:
            self.refuse(404, "EntryNotFound", "no such page")

    # What is asked for.

    def find(self, name: str, revision: str) -> Model | None:
        """Return a model, or refuse it."""
        model = self.hub.models.get(name)
        if model is None or (model.token and not model.gated and not self.is_signed_in(model)):
            status = 404 if self.headers.get("Authorization") else 401
            self.refuse(status, "RepoNotFound", "Repository not found")
            return None
        if revision not in (*model.revisions, model.commit):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return model

    def is_signed_in(self, model: Model) -> bool:
        """Tell whether a request has the token of a model."""
        return self.headers.get("Authorization") == f"Bearer {model.token}"

    def tell(self, name: str, revision: str) -> None:
        """Tell what a model is, and which files it has."""
        if model := self.find(name, revision):
            siblings = [self.described(model, file) for file in sorted(model.files)]
            for each in siblings:
                each["rfilename"] = each.pop("path")
                each["blobId"] = each.pop("oid")
                if "lfs" in each:
                    each["lfs"]["sha256"] = each["lfs"].pop("oid")
            self.give_json({
                "id": name, "modelId": name, "sha": model.commit, "private": False, "tags": [],
                "downloads": 0, "likes": 0, "siblings": siblings,
            })  # fmt: skip

    def list_files(self, name: str, revision: str) -> None:
        """Tell which files a model has, as a tree."""
        if model := self.find(name, revision):
            self.give_json([self.described(model, file) for file in sorted(model.files)])

    def described(self, model: Model, file: str) -> dict[str, Any]:
        """Return a file as the Hub lists it."""
        path = model.files[file]
        size, etag = os.path.getsize(path), _etag(path)
        entry = {"type": "file", "path": file, "size": size, "oid": etag}
        if not _is_large(path):
            return entry
        pointer = hashlib.sha1(etag.encode(), usedforsecurity=False).hexdigest()
        return {**entry, "oid": pointer, "lfs": {"oid": etag, "size": size, "pointerSize": 134}}

    def resolve(self, name: str, revision: str, file: str) -> None:
        """Give a small file; say where a large one is."""
        model = self.find(name, revision)
        if model is None:
            return
        if model.gated and not self.is_signed_in(model):
            self.refuse(403, "GatedRepo", f"Access to model {name} is restricted")
            return
        if file not in model.files:
            self.refuse(404, "EntryNotFound", "Entry not found", model.commit)
            return
        path = model.files[file]
        headers = {"X-Repo-Commit": model.commit, "ETag": f'"{_etag(path)}"'}
        if not _is_large(path):
            self.give_file(path, headers)
            return
        place, until = f"/store/{quote(name)}/{quote(file)}", time.time() + self.hub.seconds
        self.send_response(HTTPStatus.FOUND)
        signed = f"until={until}&signature={self.hub.sign(place, until)}"
        for key, value in {
            **headers,
            "X-Linked-Etag": headers["ETag"],
            "X-Linked-Size": str(os.path.getsize(path)),
            "Location": f"{self.hub.store}{place}?{signed}",
            "Content-Length": "0",
        }.items():
            self.send_header(key, value)
        self.end_headers()

    def give_large(self, name: str, file: str) -> None:
        """Give a large file to who has its signed address; a token is for the Hub alone."""
        asked = urlsplit(self.path)
        query = parse_qs(asked.query)
        until, signature = (query.get(key, ["0"])[0] for key in ("until", "signature"))
        is_signed = hmac.compare_digest(self.hub.sign(asked.path, float(until)), signature)
        if not is_signed or float(until) < time.time() or self.headers.get("Authorization"):
            self.refuse(403, "AccessDenied", "Request has expired")
            return
        self.give_file(self.hub.models[name].files[file], {"ETag": f'"{name}/{file}"'})

    # Answers.

    def give_file(self, path: str, headers: Mapping[str, str]) -> None:
        """Give a file, or a range of it."""
        size = os.path.getsize(path)
        start, stop, status = 0, size, HTTPStatus.OK
        if found := _RANGE.fullmatch(self.headers.get("Range", "")):
            start, stop = int(found[1]), min(int(found[2] or size - 1) + 1, size)
            status = HTTPStatus.PARTIAL_CONTENT
        if start > stop:
            self.refuse(416, "BadRange", "Range Not Satisfiable")
            return
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if status == HTTPStatus.PARTIAL_CONTENT:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command != "HEAD":
            with open(path, "rb") as file:
                self.send_bytes(file, start, stop)

    def send_bytes(self, file: Any, start: int, stop: int) -> None:  # noqa: ANN401 - a file
        """Send a range of an open file."""
        file.seek(start)
        while start < stop:
            data = file.read(min(_CHUNK, stop - start))
            self.wfile.write(data)
            self.hub.sent += len(data)
            start += len(data)

    def give_json(self, value: object) -> None:
        """Give data."""
        data = json.dumps(value).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        """Refuse a request as the Hub does."""
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(hub: HubServer, handler: type[Handler] = Handler) -> Iterator[HubServer]:
    """Have a server run on the loopback address, and one for its large files."""
    own = type("OwnHandler", (handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), own) for _ in range(2)]
    hub.address, hub.store = (f"http://127.0.0.1:{each.server_port}" for each in servers)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@contextmanager
def hub_of(folder: str, base: str, tuned: str) -> Iterator[tuple[HubServer, str]]:
    """Have a server in place of the Hub, with two models, and an empty cache.

    Parameters
    ----------
    folder : str
        Where the recipe and the cache go.
    base, tuned : str
        The folders of the models.

    Yields
    ------
    HubServer
        The server.
    str
        The path of the recipe.
    """
    cache, recipe = os.path.join(folder, HUB_CACHE), os.path.join(folder, HUB_RECIPE)
    shutil.rmtree(cache, ignore_errors=True)
    with open(recipe, "w", encoding="utf-8") as file:
        file.write(_RECIPE)
    models = {
        "demo/base": Model.of_folder(base),
        "demo/tuned": Model.of_folder(tuned, revisions=("main", "v1")),
    }
    ours = ("HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.pop(name, None) for name in ours}
    try:
        with serving(HubServer(models)) as hub:
            os.environ.update(HF_ENDPOINT=hub.address, HF_HUB_CACHE=cache)
            yield hub, recipe
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
