from __future__ import annotations

import pytest

from deployments.cli.options import server_url
from tests.deployments.scripted import refusal, run, run_with, scripted, words

NO = (404, refusal("no such model"))


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
    with scripted(NO) as server:
        monkeypatch.setenv("LORARETRIEVER_URL", server.url.removeprefix("http://") + "/v1")
        run("ask", "Hi")
    assert server.asked == [("POST", "/v1/chat/completions")]


def test_a_url_of_another_scheme_is_refused() -> None:
    result = run("ask", "Hi", "--url", "ftp://x")
    message = words(result.stderr.replace("│", ""))
    assert result.exit_code == 2
    assert "Invalid value for '--url'" in message and "must begin with http:// or https://" in message


@pytest.mark.parametrize(
    ("command", "message", "said"),
    [
        (("rollback", "poet", "--to", "ffff"), "digest: must be longer", "--to: must be longer"),
        (("trial", "start", "poet", "20"), "digest: no version is under trial", "--version: no version is under trial"),
        (("trial", "start", "poet", "20"), "share: must be above 0", "PERCENT: must be above 0"),
        (("samples", "accept", "poet"), "ids: no prompt is proposed", "IDS: no prompt is proposed"),
        (("usage", "--from", "2026-12-01"), "start: is after end", "--from: is after end"),
        (("publish", ".", "--template", "chat"), "adapters.0.template: is another", "--template: is another"),
        (("publish", ".", "--base-name", "x"), "base_model: must be short", "--base-name: must be short"),
        (("ask", "Hi", "--strategy", "fusion"), "lora.strategy: not here", "--strategy: not here"),
        (("list", "--tag", "a b"), "tag.0: must be shorter", "--tag: must be shorter"),
        (("route", "Hi", "-o", "x=1"), "lora.strategy_options: no option 'x'", "--option: no option 'x'"),
        (("show", "poet"), "digest: has no option here", "digest: has no option here"),
        (
            ("show", "poet"),
            "no adapter 'poet'",
            "no adapter 'poet'; `loraretriever list --search WORDS` finds names by a part of them",
        ),
        (("publish", "."), "no adapter at '/a': give a folder", "no adapter at '/a': give a folder"),
    ],
)
def test_an_error_names_the_option_that_was_typed(command: tuple[str, ...], message: str, said: str) -> None:
    outcome = run_with((400, refusal(message)), *command)
    assert (outcome.code, outcome.err.removeprefix(".: ")) == (1, said)


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--key", "k", "list"), ("list", "--key", "k"), ("list", "--key=k")),
        *(("ask", "--key", "k", "Hi"), ("ask", "Hi", "--key", "k")),
    ],
)
def test_the_key_is_taken_before_and_after_the_command(arguments: tuple[str, ...]) -> None:
    said = run_with(NO, *arguments)
    assert (said.code, said.server.authorizations) == (1, ["Bearer k"])


def test_after_two_dashes_the_key_is_part_of_the_prompt() -> None:
    with scripted(NO) as server:
        run("ask", "-u", server.url, "--", "--key", "k")
    assert server.authorizations == [None]
    assert server.sent[0]["messages"][0]["content"] == "--key k"


def test_a_key_without_a_value_is_a_wrong_call() -> None:
    result = run("list", "--key")
    assert (result.exit_code, "--key" in result.stderr) == (2, True)
