from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from deployments.cli import client
from deployments.cli.client import ServerFailed, check_free, free_port
from tests.deployments.scripted import refusal, run, run_with, scripted, words

NO = (404, refusal("no such model"))


def late(body: Any) -> Callable[[Any], Any]:
    """Return an answer that comes after more than half a second."""
    return lambda _: Event().wait(0.7) or body


def is_free(port: int) -> bool:
    try:
        check_free("127.0.0.1", port)
    except ServerFailed:
        return False
    return True


def test_a_free_port_is_one_that_no_connection_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(port for port in range(21_000, 32_000) if is_free(port) and is_free(port + 1))
    given = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(client, "_GIVEN_PORTS", given)
    monkeypatch.setattr(client, "_FIRST_PORT", first)
    given.write_text(f"{first + 2}\t60999\n")
    assert {free_port("127.0.0.1") for _ in range(20)} <= {first, first + 1}
    with socket.create_server(("127.0.0.1", first)):
        assert {free_port("127.0.0.1") for _ in range(5)} == {first + 1}
        with socket.create_server(("127.0.0.1", first + 1)):
            assert free_port("127.0.0.1") not in (first, first + 1), "any other, where all of these are taken"
    given.write_text("1024\t65535\n")
    assert is_free(free_port("127.0.0.1"))
    given.unlink()
    assert is_free(free_port("127.0.0.1"))
    with pytest.raises(OSError, match="Cannot assign"):
        free_port("192.0.2.1")


@pytest.mark.parametrize("command", [("ask", "Hi"), ("list",), ("publish", "."), ("withdraw", "x"), ("pool", "verify")])
def test_no_server_at_the_url_is_reported(command: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    result = run(*command, "--url", url)
    said = words(result.stderr)
    assert result.exit_code == 1 and f"no server answers at {url}" in said and "--url or LORARETRIEVER_URL" in said


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (404, refusal("no such model"), "no such model"),
        (404, "<html>", "the server answered with status 404"),
        (401, refusal("the API key is not valid on this server"), "the API key is not valid on this server"),
    ],
)
@pytest.mark.parametrize("command", [("ask", "Hi"), ("list",)])
def test_a_refusal_is_printed_with_the_servers_message(
    command: tuple[str, ...], status: int, body: Any, says: str
) -> None:
    said = run_with((status, body), "--key", "k", *command)
    assert (said.code, said.err) == (1, says)


@pytest.mark.parametrize("command", [("list",), ("withdraw", "poet"), ("publish", "."), ("pool", "verify")])
def test_a_missing_key_is_asked_for_by_its_option(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORARETRIEVER_KEY", raising=False)
    said = run_with((401, refusal("send `Authorization: Bearer KEY`")), *command)
    assert said.code == 1
    assert "this server requires an API key: give --key, or set LORARETRIEVER_KEY" in said.err


@pytest.mark.parametrize(("command", "input"), [(("route", ""), None), (("ask", " "), None), (("route", "-"), "\n")])
def test_an_empty_prompt_is_not_sent(command: tuple[str, ...], input: str | None) -> None:
    said = run_with((500, {}), *command, input=input)
    assert (said.code, said.asked) == (2, []) and "the prompt is empty" in said.err


def test_the_space_around_a_key_is_left_out_and_what_no_header_carries_is_refused_without_printing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORARETRIEVER_KEY", " k2\n")
    assert run_with(NO, "list").server.authorizations == ["Bearer k2"]
    for key in ("lr-secret\nx", "lr-sécret"):
        said = run_with(NO, "list", "--key", key)
        assert (said.code, said.server.authorizations) == (1, [])
        assert "that no header can carry" in said.err and "cret" not in said.out + said.err


@pytest.mark.parametrize("command", [("ask", "Hi", "--json"), ("publish", "hf://acme/poet", "--json")])
def test_a_request_that_works_may_take_as_long_as_the_server_needs(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_ANSWER_TIMEOUT_S", 0.5)
    assert run_with((200, late({"data": [{"status": 201, "name": "poet"}]})), *command).code == 0


def test_only_servers_elsewhere_are_asked_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with scripted(NO) as proxy, scripted(NO) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert client.answers(server.url)
        for url in (server.url, "http://loras.example"):
            assert run("--key", "k", "list", "--url", url).exit_code == 1
    assert [path.partition("?")[0] for _, path in server.asked] == ["/health", "/v1/loras"]
    assert [path.partition("?")[0] for _, path in proxy.asked] == ["http://loras.example/v1/loras"]


def test_a_key_that_the_server_ignores_is_noted_once() -> None:
    page = {"generation": 1, "data": [], "last_id": "", "has_more": True}
    with scripted((200, page), (200, page | {"has_more": False})) as server:
        server.headers = {"x-ignored-headers": "authorization"}
        result = run("--key", "k", "list", "--url", server.url)
    assert (result.exit_code, server.authorizations) == (0, ["Bearer k", None])
    assert words(result.stderr) == "note: this server takes no keys; yours was ignored"
