from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from deployments.auth.api_keys import KeySet, hash_of, parse_entries
from deployments.auth.authenticator import Caller, KeyLimits
from deployments.errors import KeyRefused
from tests.deployments.scripted import refusal, run, scripted, words


def new(*options: object) -> Any:
    return run("keys", "new", "--tenant", "acme", "--role", "infer", *options)


def test_a_key_is_shown_once_with_its_entry() -> None:
    result = new("--role", "publish", "--id", "ci", "--requests-per-minute", "60", "--max-adapters", "0")
    *block, key = result.stdout.splitlines()
    assert key not in "\n".join(block)
    limits = KeyLimits(requests_per_minute=60, max_adapters=0)
    expected = Caller("acme", frozenset({"infer", "publish"}), "ci", limits)
    assert KeySet(parse_entries("\n".join(block))).find(key) == expected


def test_a_key_and_its_entry_are_printed_as_json_on_request(tmp_path: Path) -> None:
    printed = json.loads(new("--json", "--id", "ci", "--file", tmp_path / "keys.yaml").stdout)
    [entry] = parse_entries((tmp_path / "keys.yaml").read_text())
    assert printed["entry"]["id"] == entry.id == "ci"
    assert printed["entry"]["sha256"] == entry.sha256 == hash_of(printed["key"])


def test_roles_are_split_at_commas() -> None:
    [entry] = parse_entries("\n".join(new("--role", "publish,admin").stdout.splitlines()[:-1]))
    assert entry.roles == ("infer", "publish", "admin")


def test_a_key_is_added_to_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    keys = [new("--file", file).stdout.strip() for _ in range(2)]
    entries = parse_entries(file.read_text())
    assert [found.sha256 for found in entries] == [hash_of(key) for key in keys]
    assert len({found.id for found in entries}) == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--role", "root"), "--role: must be"),
        (("--id", "a/b"), "--id: must be"),
        (("--tenant", "acme corp"), "--tenant: must be"),
        (("--requests-per-minute", "0"), "--requests-per-minute: must be"),
    ],
)
def test_a_bad_key_is_refused_before_anything_is_written(tmp_path: Path, options: Any, says: str) -> None:
    result = new("--file", tmp_path / "keys.yaml", *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "sent"), [(("--key", "k1"), "Bearer k1"), ((), None)])
def test_a_key_before_the_command_is_sent_with_every_request(
    given: tuple[str, ...], sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORARETRIEVER_KEY", raising=False)
    with scripted((200, {"generation": 4, "data": [], "has_more": False})) as server:
        run(*given, "list", "--url", server.url)
        assert server.authorizations == [sent]


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARETRIEVER_KEY", "k2")
    with scripted((200, {"generation": 4, "data": [], "has_more": False})) as server:
        run("list", "--url", server.url)
        assert server.authorizations == ["Bearer k2"]


SHOWN = {
    "id": "acme/poet",
    "digest": "d" * 64,
    "visibility": "public",
    "num_samples": 20,
    "tags": ["fun"],
    "created_at": "2026-01-02",
}
DRAWS = {"needs_confirmation": False, "text": "poet would answer 0.0% of ordinary prompts."}
MANY = {"needs_confirmation": True, "text": "poet would answer 75.0% of the samples of globex/rhymes."}
APPROVED = {"name": "poet", "digest": "d" * 64, "draws": DRAWS, "generation": 5}
APPROVAL = ("POST", "/v1/loras/acme%2Fpoet/approve")
CHECK = ("POST", "/v1/loras/acme%2Fpoet/approve?dry_run=true")


def test_the_version_with_the_given_digest_is_approved() -> None:
    with scripted((200, APPROVED)) as server:
        result = run("access", "approve", "acme/poet", "--digest", "d" * 64, "--url", server.url)
    assert (server.asked, server.sent) == ([APPROVAL], [{"digest": "d" * 64}])
    assert f"poet {'d' * 12} is approved at generation 5" in words(result.stdout)


def test_a_version_that_draws_many_prompts_can_be_confirmed_with_its_digest() -> None:
    refused = refusal("confirmed: must be true to approve this version. poet would answer 75.0% of …")
    given = ("access", "approve", "acme/poet", "--digest", "d" * 64)
    with scripted((400, refused), (200, APPROVED | {"draws": MANY})) as server:
        result = run(*given, "--url", server.url)
        assert result.exit_code == 1
        assert "--confirmed: must be true" in words(result.stderr)
        assert run(*given, "--confirmed", "--url", server.url).exit_code == 0
    assert server.sent == [{"digest": "d" * 64}, {"digest": "d" * 64, "confirmed": True}]


@pytest.mark.parametrize("given", [(), ("--digest", "d" * 64)])
def test_a_dry_run_shows_what_a_version_would_draw_and_approves_nothing(given: tuple[str, ...]) -> None:
    with scripted((200, SHOWN), (200, APPROVED)) as server:
        result = run("access", "approve", "acme/poet", *given, "--dry-run", "--url", server.url)
    assert (result.exit_code, server.asked) == (0, [("GET", "/v1/loras/acme%2Fpoet"), CHECK])
    assert DRAWS["text"] in words(result.stdout)


@pytest.mark.parametrize("draws", [DRAWS, MANY])
@pytest.mark.parametrize(("said", "is_approved"), [("y\n", True), ("n\n", False), ("", False)])
def test_without_a_digest_the_shown_version_is_approved_after_confirmation(
    said: str, is_approved: bool, draws: dict[str, Any]
) -> None:
    with scripted((200, SHOWN), (200, APPROVED | {"draws": draws}), (200, APPROVED)) as server:
        result = run("access", "approve", "acme/poet", "--url", server.url, input=said)
    assert "d" * 64 in words(result.stdout)
    assert draws["text"] in words(result.output)
    assert server.asked == [("GET", "/v1/loras/acme%2Fpoet"), CHECK, *([APPROVAL] if is_approved else [])]
    confirmed = {"confirmed": True} if draws is MANY else {}
    assert server.sent[1:] == [{"digest": "d" * 64}, *([{"digest": "d" * 64} | confirmed] if is_approved else [])]
    assert (result.exit_code == 0) == is_approved


def test_a_confirmed_approval_prints_only_the_answer_as_json() -> None:
    with scripted((200, SHOWN), (200, APPROVED | {"draws": DRAWS}), (200, APPROVED)) as server:
        result = run("access", "approve", "acme/poet", "--json", "--url", server.url, input="y\n")
    echo, _, answer = result.stdout.partition("\n")  # a terminal echoes what is typed
    assert (echo, json.loads(answer)) == (" y", APPROVED)
    assert DRAWS["text"] in words(result.stderr)


def test_an_approval_that_the_server_would_refuse_is_not_asked_for() -> None:
    with scripted((200, SHOWN), (403, refusal("this operation needs the role 'admin'"))) as server:
        result = run("access", "approve", "acme/poet", "--url", server.url, input="y\n")
    assert (result.exit_code, len(server.asked), result.stdout) == (1, 2, "")
    assert "needs the role 'admin'" in result.stderr
    with scripted((200, SHOWN | {"visibility": "private"})) as server:
        result = run("access", "approve", "acme/poet", "--url", server.url, input="y\n")
    assert (result.exit_code, len(server.asked), result.stdout) == (1, 1, "")
    assert "'acme/poet' is private: make it public first with `loraretriever access public" in words(result.stderr)


def test_keys_are_listed_without_their_hashes(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    new("--id", "ci", "--requests-per-minute", 60, "--file", file)
    new("--id", "web", "--file", file)
    shown, printed = run("keys", "list", "--file", file), run("keys", "list", "-f", file, "--json")
    assert "ci" in shown.stdout and "web" in shown.stdout and "requests_per_minute 60" in words(shown.stdout)
    rows = json.loads(printed.stdout)["data"]
    assert [row["id"] for row in rows] == ["ci", "web"]
    assert "sha256" not in printed.stdout


def test_a_revoked_key_is_gone_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    for id in ("ci", "web"):
        new("--id", id, "--file", file)
    result = run("keys", "revoke", "ci", "--file", file)
    assert result.exit_code == 0 and "ci is revoked" in words(result.stdout)
    assert [entry.id for entry in parse_entries(file.read_text())] == ["web"]
    missing = run("keys", "revoke", "wep", "--file", file)
    assert missing.exit_code == 1 and "no key has the id 'wep'; did you mean 'web'?" in words(missing.stderr)
    nowhere = run("keys", "list", "--file", tmp_path / "none.yaml")
    assert nowhere.exit_code == 1 and words(nowhere.stderr).endswith("none.yaml: no such file")


def test_a_key_is_rotated_expired_and_listed_with_its_end_and_its_last_use(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    old = new("--id", "ci", "--file", file, "--expires", "2127-01-31").stdout.strip()
    made = json.loads(run("keys", "rotate", "ci", "--file", file, "--overlap", "0h", "--json").stdout)
    keys = KeySet(parse_entries(file.read_text()))
    with pytest.raises(KeyRefused, match="expired"):
        keys.find(old)
    assert keys.find(made["key"]) == Caller("acme", frozenset({"infer"}), made["entry"]["id"])
    result = run("keys", "expire", made["entry"]["id"], "2028-01-01", "--file", file)
    assert words(result.stdout) == f"{made['entry']['id']} expires: 2028-01-01T00:00:00Z"
    report = {"data": [{"key": "ci", "last_at": "2026-11-29T12:00:00+00:00"}]}
    with scripted((200, report)) as server:
        listed = run("keys", "list", "--file", file, "--used", "--json", "--url", server.url)
    assert server.asked == [("GET", "/v1/usage?by=key&start=2000-01-01")]
    first, second = json.loads(listed.stdout)["data"]
    assert (first["id"], first["last_used_at"]) == ("ci", "2026-11-29T12:00:00+00:00")
    assert (second["expires_at"], second["last_used_at"]) == ("2028-01-01T00:00:00Z", None)
    shown = words(run("keys", "list", "--file", file).stdout)
    assert "2028-01-01T00:00:00Z" in shown and "last used" not in shown


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("rotate", "ci", "--overlap", "soon"), "'soon' is not a time: give 30d"),
        (("rotate", "ci", "--overlap", "never"), "--overlap: the old key has to end"),
        (("expire", "ci", "soon"), "'soon' is not a time"),
        (("expire", "cj", "30d"), "no key has the id 'cj'"),
    ],
)
def test_a_wrong_change_of_a_key_leaves_the_file_as_it_is(given: tuple[str, ...], says: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    new("--id", "ci", "--file", file)
    before = file.read_text()
    result = run("keys", *given, "--file", file)
    assert (result.exit_code, file.read_text()) == (1, before)
    assert says in words(result.stderr)
