from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.cli.client import behind_note, counted, describe_problem, free_port, server_url
from tests.deployments.scripted import Outcome, refusal, run, run_with, scripted, words

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


@pytest.mark.parametrize(
    "command",
    [
        *(("ask", "Hi"), ("route", "Hi"), ("list",), ("show", "poet"), ("publish", "."), ("withdraw", "poet")),
        *(("rollback", "poet"), ("status",), ("pool", "verify"), ("pool", "gc"), ("pool", "doctor")),
        ("pool", "reindex", "--encoder", "other"),
    ],
)
def test_no_server_at_the_url_is_reported(command: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    result = run(*command, "--url", url)
    said = words(result.stderr)
    assert result.exit_code == 1 and f"no server answers at {url}" in said and "--url or LORARETRIEVER_URL" in said


@pytest.mark.parametrize(
    ("body", "says"), [(refusal("no such model"), "no such model"), ("<html>", "the server answered with status 404")]
)
def test_a_refusal_is_printed_with_the_servers_message(body: Any, says: str) -> None:
    said = run_with((404, body), "ask", "Hi")
    assert said.code == 1 and says in said.err


@pytest.mark.parametrize("command", [("list",), ("withdraw", "poet"), ("publish", "."), ("pool", "verify")])
def test_a_missing_key_is_asked_for_by_its_option(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORARETRIEVER_KEY", raising=False)
    said = run_with((401, refusal("send `Authorization: Bearer KEY`")), *command)
    assert said.code == 1
    assert "this server requires an API key: give --key, or set LORARETRIEVER_KEY" in said.err


def test_the_servers_message_about_a_wrong_key_is_printed() -> None:
    wrong = "the API key is not valid on this server"
    assert run_with((401, refusal(wrong)), "--key", "k", "list").err == wrong


def test_a_url_of_another_scheme_is_refused() -> None:
    result = run("ask", "Hi", "--url", "ftp://x")
    message = words(result.stderr.replace("│", ""))
    assert result.exit_code == 2
    assert "Invalid value for '--url'" in message and "must begin with http:// or https://" in message


@pytest.mark.parametrize(("command", "input"), [(("route", ""), None), (("ask", " "), None), (("route", "-"), "\n")])
def test_an_empty_prompt_is_not_sent(command: tuple[str, ...], input: str | None) -> None:
    said = run_with((500, {}), *command, input=input)
    assert (said.code, said.asked) == (2, []) and "the prompt is empty" in said.err


def test_one_of_a_noun_is_singular() -> None:
    assert [counted(number, "sample") for number in (0, 1, 2)] == ["0 samples", "1 sample", "2 samples"]
    assert behind_note(1) == "1 replica is not up to date yet"
    assert behind_note(2) == "2 replicas are not up to date yet"


def test_a_problem_of_a_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError) as missing:
        (tmp_path / "nofile").read_text()
    assert describe_problem(missing.value) == f"{tmp_path / 'nofile'}: no such file"
    with pytest.raises(OSError) as folder:
        tmp_path.read_text()
    assert describe_problem(folder.value) == f"{tmp_path}: Is a directory"
    assert describe_problem(ValueError("line 3: bad")) == "line 3: bad"


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


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def list_adapters() -> Outcome:
        return run_with(NO, "list")

    monkeypatch.setenv("LORARETRIEVER_KEY", "k2")
    assert list_adapters().server.authorizations == ["Bearer k2"]
    monkeypatch.delenv("LORARETRIEVER_KEY")
    assert list_adapters().server.authorizations == [None]


def test_the_space_around_a_key_is_left_out_and_what_no_header_carries_is_refused_without_printing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORARETRIEVER_KEY", " k2\n")
    assert run_with(NO, "list").server.authorizations == ["Bearer k2"]
    for key in ("lr-secret\nx", "lr-sécret"):
        said = run_with(NO, "list", "--key", key)
        assert (said.code, said.server.authorizations) == (1, [])
        assert "that no header can carry" in said.err and "cret" not in said.out + said.err


def test_after_two_dashes_the_key_is_part_of_the_prompt() -> None:
    with scripted(NO) as server:
        run("ask", "-u", server.url, "--", "--key", "k")
    assert server.authorizations == [None]
    assert server.sent[0]["messages"][0]["content"] == "--key k"


def test_a_key_without_a_value_is_a_wrong_call() -> None:
    result = run("list", "--key")
    assert (result.exit_code, "--key" in result.stderr) == (2, True)


def test_a_key_that_the_server_ignores_is_noted_once() -> None:
    page = {"generation": 1, "data": [], "last_id": "", "has_more": True}
    with scripted((200, page), (200, page | {"has_more": False})) as server:
        server.headers = {"x-ignored-headers": "authorization"}
        result = run("--key", "k", "list", "--url", server.url)
    assert (result.exit_code, server.authorizations) == (0, ["Bearer k", None])
    assert words(result.stderr) == "note: this server takes no keys; yours was ignored"
