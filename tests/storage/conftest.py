"""The stores that every test of storage runs on."""

import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4

import pytest

from pipeline.storage import stores


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_uri"))
    return f"file://{tmp_path}" if request.param == "file" else f"memory://{uuid4().hex}"


class OwnStore(ThreadingHTTPServer):
    """An S3 store of one's own, as far as obstore's writes and reads go: its `objects`, and what was `asked` of it.

    `answer` may lie about what was done, or take long: it is given the number of the request and its status.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.uri, self.url = f"s3://{uuid4().hex}", f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, bytes] = {}
        self.parts: dict[int, bytes] = {}
        self.asked: list[str] = []
        self.signed: list[str] = []
        self.answer: Callable[[int, int], int] = lambda number, status: status

    def handle_error(self, *_: Any) -> None:
        """Whoever asked waits no longer."""


class _Asked(BaseHTTPRequestHandler):
    server: OwnStore
    protocol_version = "HTTP/1.1"

    def _do(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        name = path.split("/", 2)[-1]
        number = len(self.server.asked)
        self.server.asked.append(f"{self.command} {query.partition('=')[0]}".strip())
        self.server.signed.append(self.headers.get("Authorization") or "")
        status, body = self._done(name, parse_qs(query, keep_blank_values=True), data)
        self.send_response(self.server.answer(number, status))
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", formatdate(usegmt=True))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _do  # noqa: N815

    def _done(self, name: str, query: dict[str, list[str]], data: bytes) -> tuple[int, bytes]:
        objects, parts = self.server.objects, self.server.parts
        if self.command in ("GET", "HEAD"):
            return (200, objects[name]) if name in objects else (404, b"")
        if self.command == "DELETE":
            parts.clear()
        elif "uploads" in query:
            return 200, b"<R><Bucket>b</Bucket><Key>k</Key><UploadId>1</UploadId></R>"
        elif "partNumber" in query:
            parts[int(query["partNumber"][0])] = data
        elif self.command == "POST":
            objects[name] = b"".join(parts[number] for number in sorted(parts))
            return 200, b"<R><ETag>e</ETag></R>"
        elif self.headers.get("If-None-Match") and name in objects:
            return 412, b""
        else:
            objects[name] = data
        return 200, b""

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def own_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnStore]:
    """A fresh `OwnStore`, which the environment names."""
    with OwnStore() as store:
        threading.Thread(target=store.serve_forever, args=(0.01,), daemon=True).start()
        for name, value in {"ENDPOINT_URL": store.url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        stores._s3_place.cache_clear()
        yield store
        store.shutdown()
    stores._s3_place.cache_clear()
