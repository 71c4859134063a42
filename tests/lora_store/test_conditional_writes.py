"""The probe at the start of a Store: an endpoint that ignores conditions is refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import pytest

from lora_store import ConditionalWritesMissing, Location, StoreUnavailable
from lora_store.conditional_writes import check_conditional_writes
from lora_store.files import Files
from tests.s3 import S3Endpoint


class Careless(BaseHTTPRequestHandler):
    """An endpoint that stores whatever is put, in the class' `stored`, and answers `status`."""

    stored: ClassVar[dict[str, bytes]]
    status = 200

    def do_PUT(self) -> None:
        self.stored[self.path] = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(self.status)

    def do_HEAD(self) -> None:
        self._answer(200 if self.path in self.stored else 404)

    def do_DELETE(self) -> None:
        self.stored.pop(self.path, None)
        self._answer(204)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(params=[200, 501])
def careless(request: pytest.FixtureRequest) -> Iterator[tuple[Location, dict[str, bytes]]]:
    class Handler(Careless):
        stored: ClassVar[dict[str, bytes]] = {}
        status = request.param

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    uri = f"s3://pool/adapters?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
    yield Location(uri), Handler.stored
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_that_ignores_the_condition_is_refused_and_cleaned_up(
    careless: tuple[Location, dict[str, bytes]],
) -> None:
    location, stored = careless
    with pytest.raises(ConditionalWritesMissing, match=r"ignores If-None-Match.*Use an endpoint that honours"):
        check_conditional_writes(location, os.environ)
    assert stored == {}


def test_an_endpoint_that_honours_it_is_taken_and_cleaned_up(s3_endpoint: S3Endpoint) -> None:
    location = Location(s3_endpoint.uri(f"stores/{uuid4().hex}/with space"))
    seen: list[tuple[str, str | None]] = []

    def look(environ: dict[str, str]) -> bool:
        if environ["REQUEST_METHOD"] == "PUT":
            seen.append((environ["PATH_INFO"], environ.get("HTTP_IF_NONE_MATCH")))
        return False

    s3_endpoint.loses_answer = look
    try:
        check_conditional_writes(location, os.environ)
    finally:
        s3_endpoint.loses_answer = lambda _: False
    assert len(seen) == 2 and seen[0] == seen[1] and seen[0][1] == "*"
    assert Files(location).entries() == []


def test_a_folder_is_asked_nothing(tmp_path: Path) -> None:
    check_conditional_writes(Location(str(tmp_path / "pool")), os.environ)
    assert list(tmp_path.iterdir()) == []


def test_an_endpoint_that_is_away_is_unavailable() -> None:
    endpoint = S3Endpoint()
    location = Location(endpoint.uri("stores/x"))
    endpoint.stop()
    with pytest.raises(StoreUnavailable):
        check_conditional_writes(location, os.environ)
