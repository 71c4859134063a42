from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.deployments.scripted import run, run_with, words

DIGEST = "e" * 64
ROLLBACK, APPROVE = ("POST", "/v1/names/support/rollback"), ("POST", "/v1/names/acme/support/approve")
VERSION = {"digest": DIGEST, "approved": False, "actor": "me", "created_at": "2026-01-02T03:04:05.6"}
SHOWN = {"id": "support", **VERSION, "policy": {"temperature": 0.5, "lora": {"k": 2}, "stop": ["[/INST]"]}}


@pytest.mark.parametrize("text", ['{"temperature": 0.5}', "temperature: 0.5\n"], ids=["json", "yaml"])
def test_set_sends_the_file_as_the_policy(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy").write_text(text)
    answer = {"name": "support", "digest": DIGEST, "generation": 9}
    said = run_with(answer, "name", "set", "support", tmp_path / "policy")
    assert (said.asked, said.sent) == ([("PUT", "/v1/names/support")], [{"temperature": 0.5}])
    assert f"support {'e' * 12} is in use at generation 9" in said.out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "must hold the fields"),
        ("a: [", "policy: "),
        (None, "policy: "),
        ("stop: [2026-01-01]", "policy: has a value that JSON does not have"),
        ("temperature: .nan", "policy: has a value that JSON does not have"),
        ('stop: "\\ud800"', "policy: has text that is not Unicode"),
        ("seed: 2026-02-30", "policy: a value cannot be read (day is out of range for month)"),
    ],
)
def test_a_file_that_is_no_policy_is_refused_before_the_server_is_asked(
    tmp_path: Path, text: str | None, says: str
) -> None:
    if text is not None:
        (tmp_path / "policy").write_text(text)
    result = run("name", "set", "support", tmp_path / "policy", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1 and says in words(result.stderr)


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ((), {"data": [SHOWN], "has_more": False}),
        (("support",), SHOWN | {"versions": [VERSION | {"policy": {"k": 1, "stop": ["[/INST]"]}}]}),
    ],
)
def test_list_shows_names_or_the_versions_of_one(given: tuple[str, ...], answer: dict[str, Any]) -> None:
    said = run_with(answer, "name", "list", *given)
    assert said.asked == [("GET", "/v1/names/support" if given else "/v1/names?after=")]
    for word in ("support", "e" * 12, "2026-01-02 03:04:05", '"k":', '"[/INST]"', "me"):
        assert word in said.out


@pytest.mark.parametrize(
    ("command", "asked", "sent", "says"),
    [
        (("rollback", "support"), ROLLBACK, [{}], "is in use at generation 9"),
        (("rollback", "support", "--to", "abcdefgh"), ROLLBACK, [{"digest": "abcdefgh"}], "is in use at generation 9"),
        (("approve", "acme/support", DIGEST, "--json"), APPROVE, [{"digest": DIGEST}], '"approved": true'),
        (("remove", "support"), ("DELETE", "/v1/names/support"), [], "is removed at generation 9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_change_is_sent_and_its_generation_printed(
    command: tuple[str, ...], asked: tuple[str, str], sent: list[Any], says: str
) -> None:
    about = {} if command[0] == "remove" else {"digest": DIGEST, "approved": command[0] == "approve"}
    said = run_with({"name": command[1], "generation": 9, **about}, "name", *command)
    assert (said.asked, [body for body in said.sent if body is not None]) == ([asked], sent)
    assert says in said.out


def test_an_approval_shows_the_policy_and_asks() -> None:
    command = ("name", "approve", "acme/support", DIGEST)
    shown = {"name": "acme/support", "policy": SHOWN["policy"], "digest": DIGEST}
    refused = run_with(shown, *command, input="n\n")
    assert refused.code == 1 and '"temperature": 0.5' in refused.err
    check = ("POST", "/v1/names/acme/support/approve?dry_run=true")
    assert refused.asked == [check]
    approved = run_with([(200, shown), (200, shown | {"approved": True, "generation": 9})], *command, input="y\n")
    assert (approved.code, approved.asked) == (0, [check, APPROVE])
