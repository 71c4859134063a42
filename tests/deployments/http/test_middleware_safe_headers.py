from __future__ import annotations

from typing import Any

import pytest

from tests.deployments.all_routes import example_path, mounted
from tests.deployments.app_fakes import http_of, serve_plainly
from tests.deployments.asking import request
from tests.deployments.console_fakes import CountingWorker, MappedRetriever

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_answers_forbid_type_guessing_and_pool_data_forbids_caching() -> None:
    num_seen = 0
    async with http_of(serve_plainly(worker=CountingWorker(), retriever=MappedRetriever())) as client:
        for method, path in mounted():
            for body in ({"content": b"{}", "headers": {"content-type": "application/json"}}, {}):
                response = await client.request(method, example_path(path), **body)  # type: ignore[arg-type]
                assert response.headers["x-content-type-options"] == "nosniff", path
                if path.startswith("/v1/") or response.status_code >= 400:
                    assert response.headers["cache-control"] == "no-store", (method, path)
                num_seen += 1
    assert num_seen == 2 * len(mounted()) >= 60


@pytest.mark.parametrize(
    ("method", "path", "sent"),
    [
        ("GET", "/ready", {}),
        ("GET", "/nowhere", {}),
        ("GET", "/v1/models", {"headers": {"host": "evil.example"}}),
        ("POST", "/v1/chat/completions", {"json": CHAT}),
        ("POST", "/v1/chat/completions", {"json": CHAT | {"stream": True}}),
    ],
)
def test_answers_errors_and_streams_are_not_cached(method: str, path: str, sent: dict[str, Any]) -> None:
    headers = request(method, path, sent=sent).headers
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")


def test_a_file_of_the_console_may_be_cached() -> None:
    assert request("GET", "/").headers["cache-control"] == "no-cache"
