"""A real S3 endpoint on loopback: moto's server, one request at a time, which can be stopped and restarted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from moto.server import create_backend_app
from pyarrow.fs import S3FileSystem
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

_HOST, _BUCKET, _REGION = "127.0.0.1", "pool", "us-east-1"
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",  # otherwise the SDK would look for a cloud instance
}


class S3Endpoint:
    """The endpoint. Its objects are in this process and survive a stop; any local process may use it.

    `on_request` is called before each request. A request for which `loses_answer` is true is executed and answered with
    an error; one for which `refuses` is true is not executed.
    """

    def __init__(self) -> None:
        self.on_request: Callable[[], object] = lambda: None
        self.loses_answer: Callable[[WSGIEnvironment], bool] = lambda _: False
        self.refuses: Callable[[WSGIEnvironment], bool] = lambda _: False
        self._app, self._lock = create_backend_app("s3"), threading.Lock()
        self._port = 0  # any free port at first, then the same after a stop
        self._server: BaseWSGIServer | None = None
        self.start()
        files = S3FileSystem(
            endpoint_override=f"{_HOST}:{self._port}", scheme="http", region=_REGION, allow_bucket_creation=True
        )
        files.create_dir(_BUCKET)

    def uri(self, name: str) -> str:
        """Return the URI of a store of that name on this endpoint."""
        return f"s3://{_BUCKET}/{name}?endpoint_override={_HOST}:{self._port}&scheme=http&region={_REGION}"

    def start(self) -> None:
        self._server = make_server(_HOST, self._port, self._serve, threaded=True, request_handler=_Quiet)
        self._port = self._server.port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Stop accepting connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _serve(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request at a time, since moto checks `If-None-Match` and writes in two separate steps."""
        with self._lock:
            self.on_request()
            if not self.refuses(environ) and not self.loses_answer(environ):
                return list(self._app(environ, start_response))
            if not self.refuses(environ):
                list(self._app(environ, lambda *_: None))  # type: ignore[arg-type, return-value]
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return []


class _Quiet(WSGIRequestHandler):
    """HTTP/1.0, so that no connection survives a stop; no line per request."""

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="session", autouse=True)
def aws_credentials() -> Iterator[None]:
    """Set the credentials of the tests' endpoint before any process that needs it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _CREDENTIALS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def s3_endpoint(aws_credentials: None) -> Iterator[S3Endpoint]:
    endpoint = S3Endpoint()
    yield endpoint
    endpoint.stop()
