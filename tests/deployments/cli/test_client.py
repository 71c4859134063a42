from __future__ import annotations

from typing import Any

import pytest

from deployments.cli.client import server_url
from deployments.cli.local_server import free_port
from tests.deployments.scripted import run, scripted, words


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("https://host/v1/", "https://host"),
        ("https://host/prefix/", "https://host/prefix"),
    ],
)
def test_a_url_needs_no_scheme_and_may_end_in_v1(given: str, url: str) -> None:
    assert server_url(given) == url


def test_the_url_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted((404, {"error": {"message": "no such model"}})) as server:
        monkeypatch.setenv("LORARETRIEVER_URL", server.url.removeprefix("http://") + "/v1")
        run("ask", "Hi")
    assert server.asked == [("POST", "/v1/chat/completions")]


@pytest.mark.parametrize(
    "command",
    [
        ("ask", "Hi"),
        ("route", "Hi"),
        ("list",),
        ("show", "poet"),
        ("publish", "."),
        ("withdraw", "poet"),
        ("rollback", "poet"),
        ("verify",),
        ("gc",),
        ("reindex", "--encoder", "other"),
        ("doctor",),
    ],
)
def test_no_server_at_the_url_is_reported(command: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    result = run(*command, "--url", url)
    assert result.exit_code == 1
    said = words(result.stderr)
    assert f"no server answers at {url}" in said
    assert "--url or LORARETRIEVER_URL" in said


@pytest.mark.parametrize(
    ("body", "said"),
    [({"error": {"message": "no such model"}}, "no such model"), ("<html>", "the server answered with status 404")],
)
def test_a_refusal_is_printed_with_the_servers_message(body: Any, said: str) -> None:
    with scripted((404, body)) as server:
        result = run("ask", "Hi", "--url", server.url)
    assert result.exit_code == 1
    assert said in result.stderr
