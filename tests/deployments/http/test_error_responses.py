"""Error messages about a failing store or source contain nothing about its location."""

from __future__ import annotations

import logging
from pathlib import Path
from uuid import uuid4

import pytest

from deployments.errors import SourceUnavailable
from deployments.http.error_responses import error_response
from deployments.publishing.source_folders import folder_of_source
from lora_store import LoraStore, LoraStoreError
from tests.deployments.asking import error_of, post
from tests.s3 import S3Endpoint


@pytest.fixture(scope="module")
def dead_uri() -> str:
    """Return the URI of a store that was at an endpoint, which is stopped."""
    endpoint = S3Endpoint()
    uri = endpoint.uri(f"secret-folder/{uuid4().hex}")
    LoraStore(uri, accepts_base=["tiny"])
    endpoint.stop()
    return uri


def _secrets(uri: str) -> list[str]:
    host = uri.partition("endpoint_override=")[2].partition("&")[0]
    return ["s3://", "127.0.0.1", host.rpartition(":")[2], "secret-folder", "pool", "catalogue", "_delta_log"]


def test_an_error_of_an_s3_store_does_not_reveal_its_location(dead_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LoraStoreError) as caught:
        LoraStore(dead_uri, accepts_base=["tiny"])
    response = error_response(caught.value)
    body = bytes(response.body).decode()
    assert response.status_code == 503
    assert "try again later" in body
    assert not [secret for secret in _secrets(dead_uri) if secret in body], body
    assert any("127.0.0.1" in record.getMessage() for record in caplog.records)  # the operator can read it


def test_an_error_of_a_folder_names_no_path(tmp_path: Path) -> None:
    blocked = tmp_path / "secret-folder"
    blocked.write_text("no folder")
    with pytest.raises(LoraStoreError) as caught:
        LoraStore(str(blocked / "pool"), accepts_base=["tiny"])
    body = bytes(error_response(caught.value).body).decode()
    assert "secret-folder" not in body and str(tmp_path) not in body


def test_an_error_of_a_source_quotes_the_client_and_no_endpoint(
    dead_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    prefix = f"s3://pool/shared?{dead_uri.partition('?')[2]}"
    with pytest.raises(SourceUnavailable) as caught:
        folder_of_source("s3://pool/shared/poet", [prefix], tmp_path, 1000)
    body = bytes(error_response(caught.value).body).decode()
    assert "s3://pool/shared/poet" in body
    assert "127.0.0.1" not in body and "endpoint" not in body.lower()
    assert any("127.0.0.1" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/responses", "this server has no /responses; use /v1/responses"),
        ("/v1/responses/a", "this server has no /v1/responses/a; responses are not stored: keep those that you need"),
        ("/v1/v1/models", "this server has no /v1/v1/models; give the base URL with a single /v1"),
        ("/api/embed", "this server has no /api/embed; use /v1/embeddings"),
        ("/v1/images/generations", "this server has no /v1/images/generations; /openapi.json lists the routes"),
        ("/" + "x" * 300, f"this server has no /{'x' * 99}; /openapi.json lists the routes"),
    ],
)
def test_a_path_without_a_route_is_answered_with_what_to_use_instead(path: str, message: str) -> None:
    response = post(path, {})
    assert (response.status_code, error_of(response)["code"]) == (404, "http_error")
    assert error_of(response)["message"] == message
