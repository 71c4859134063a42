"""The check at the start of a Store, which refuses an endpoint that ignores conditions."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest

from lora_store import Location
from lora_store.conditional_writes import check_conditional_writes
from lora_store.errors import ConditionalWritesMissing
from lora_store.files import Files
from tests.s3 import S3Endpoint

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


class Endpoint(ThreadingHTTPServer):
    """An endpoint that answers `conditional` to conditional writes and `plain` to others, and stores objects."""

    conditional, plain = 200, 200
    deletes = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.stored: dict[str, bytes] = {}
        self.authorizations: list[str] = []

    def uri(self, query: str = "&region=us-east-1") -> str:
        return f"s3://pool/adapters?endpoint_override=127.0.0.1:{self.server_port}&scheme=http{query}"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_PUT(self) -> None:
        self.server.authorizations.append(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = self.server.conditional if "If-None-Match" in self.headers else self.server.plain
        if 200 <= status < 300:
            self.server.stored[self.path] = body
        self._answer(status)

    def do_DELETE(self) -> None:
        if self.server.deletes:
            self.server.stored.pop(self.path, None)
            self._answer(204)
        else:
            self.close_connection = True  # closes without an answer

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("conditional", [200, 501, 400])
def test_an_endpoint_without_conditional_writes_is_refused_and_cleaned_up(endpoint: Endpoint, conditional: int) -> None:
    endpoint.conditional = conditional
    with pytest.raises(ConditionalWritesMissing, match=r"ignores If-None-Match.*Use an endpoint that honours"):
        check_conditional_writes(Location(endpoint.uri()), os.environ)
    assert endpoint.stored == {}


@pytest.mark.parametrize("status", [400, 403, 501, 503])
def test_an_endpoint_that_refuses_all_writes_proves_nothing(
    status: int, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """S3 answers 400 for a wrong region and for an expired token, too."""
    endpoint.conditional = endpoint.plain = status
    check_conditional_writes(Location(endpoint.uri()), os.environ)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"could not be checked at http://127.0.0.1:{endpoint.server_port}/pool/" in record.getMessage()
    assert f"the status was {status}, then {status}" in record.getMessage()


def test_a_deletion_that_fails_does_not_hide_the_verdict(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    endpoint.deletes = False
    with pytest.raises(ConditionalWritesMissing):
        check_conditional_writes(Location(endpoint.uri()), os.environ)
    assert "could not be deleted" in caplog.text


@pytest.mark.parametrize(
    ("query", "variables", "region"),
    [
        ("", {"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-1"),
        ("", {"AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-2"),
        ("", {}, "us-east-1"),
        ("&region=eu-north-1", {"AWS_REGION": "eu-west-1"}, "eu-north-1"),
        (None, {"AWS_ENDPOINT_URL_S3": "{}", "AWS_REGION": "eu-west-1"}, "eu-west-1"),
        (None, {"AWS_ENDPOINT_URL": "{}"}, "us-east-1"),
        (None, {"AWS_ENDPOINT": "{}"}, "us-east-1"),
    ],
)
def test_the_endpoint_and_the_region_are_those_of_the_uri_or_else_of_the_environment(
    query: str | None, variables: dict[str, str], region: str, endpoint: Endpoint
) -> None:
    address = f"http://127.0.0.1:{endpoint.server_port}/"
    environment = KEYS | {name: value.format(address) for name, value in variables.items()}
    with pytest.raises(ConditionalWritesMissing):
        check_conditional_writes(Location("s3://pool/adapters" if query is None else endpoint.uri(query)), environment)
    assert len(endpoint.authorizations) == 2
    assert all(f"/{region}/s3/aws4_request" in header for header in endpoint.authorizations)


def test_an_endpoint_with_conditional_writes_is_accepted_and_cleaned_up(s3_endpoint: S3Endpoint) -> None:
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


def test_a_folder_is_not_checked(tmp_path: Path) -> None:
    check_conditional_writes(Location(str(tmp_path / "pool")), os.environ)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_endpoint_and_an_invalid_url_prove_nothing(caplog: pytest.LogCaptureFixture) -> None:
    endpoint = S3Endpoint()
    location = Location(endpoint.uri("stores/x"))
    endpoint.stop()
    check_conditional_writes(location, os.environ)
    assert "could not be checked" in caplog.text and "refused" in caplog.text
    check_conditional_writes(Location("s3://pool/adapters"), KEYS | {"AWS_ENDPOINT_URL": "127.0.0.1:9"})
    assert "could not be checked at 127.0.0.1:9/pool/" in caplog.text
