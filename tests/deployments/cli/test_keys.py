from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from deployments.auth.api_keys import KeySet, hash_key, parse_entries
from deployments.auth.authenticator import Caller, KeyLimits
from deployments.errors import KeyRefused
from tests.deployments.scripted import run, run_with, words


def new(*options: object) -> Any:
    return run("keys", "new", "--tenant", "acme", "--role", "infer", *options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_key_is_shown_once_with_its_entry() -> None:
    """Roles may be apart by commas."""
    roles = ("--role", "publish,admin")
    result = new(*roles, "--id", "ci", "--requests-per-minute", "60", "--max-adapters", "0")
    *block, key = result.stdout.splitlines()
    assert key not in "\n".join(block)
    limits = KeyLimits(requests_per_minute=60, max_adapters=0)
    [entry] = entries = parse_entries("\n".join(block))
    assert entry.roles == ("infer", "publish", "admin")
    assert KeySet(entries).find(key) == Caller("acme", frozenset(entry.roles), "ci", limits)


def test_a_key_is_added_to_a_file_that_only_its_owner_reads(file: Path) -> None:
    keys = [new("--file", file).stdout.strip() for _ in range(2)]
    printed = json.loads(new("--json", "--id", "ci", "--file", file).stdout)
    entries = parse_entries(file.read_text())
    assert [found.sha256 for found in entries] == [hash_key(key) for key in (*keys, printed["key"])]
    assert len({found.id for found in entries}) == 3
    assert (printed["entry"]["id"], printed["entry"]["sha256"]) == ("ci", entries[-1].sha256)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("limit", ["--requests-per-minute", "--tokens-per-minute", "--concurrent-requests"])
def test_a_limit_of_zero_requests_is_a_mistake_of_its_option(limit: str) -> None:
    result = new(limit, "0")
    assert result.exit_code == 2 and f"Invalid value for '{limit}'" in result.stderr


@pytest.mark.parametrize("options", [("--role", "root"), ("--id", "a/b"), ("--tenant", "acme corp")])
def test_a_bad_key_is_refused_before_anything_is_written(file: Path, options: tuple[str, str]) -> None:
    result = new("--file", file, *options)
    assert (result.exit_code, result.stdout, list(file.parent.iterdir())) == (1, "", [])
    assert f"{options[0]}: must be" in result.stderr


def test_an_error_of_the_system_names_the_file_as_it_was_typed(file: Path) -> None:
    missing = file.parent / "secrets" / "keys.yaml"
    assert f"{missing}: No such file or directory" in words(new("--file", missing).stderr)


def test_keys_are_listed_without_their_hashes_until_they_are_revoked(file: Path) -> None:
    new("--id", "ci", "--requests-per-minute", 60, "--file", file)
    new("--id", "web", "--file", file)
    shown, printed = run("keys", "list", "--file", file), run("keys", "list", "-f", file, "--json")
    assert "ci" in shown.stdout and "web" in shown.stdout and "requests_per_minute 60" in words(shown.stdout)
    assert [row["id"] for row in json.loads(printed.stdout)["data"]] == ["ci", "web"]
    assert "sha256" not in printed.stdout
    result = run("keys", "revoke", "ci", "--file", file)
    assert result.exit_code == 0 and "ci is revoked" in words(result.stdout)
    assert [entry.id for entry in parse_entries(file.read_text())] == ["web"]
    missing = run("keys", "revoke", "wep", "--file", file)
    assert missing.exit_code == 1 and "no key has the id 'wep'; did you mean 'web'?" in words(missing.stderr)
    nowhere = run("keys", "list", "--file", file.parent / "none.yaml")
    assert nowhere.exit_code == 1 and words(nowhere.stderr).endswith("none.yaml: no such file")


def usage_of(*used: str, tenant: str | None = None, usage_days: int = 400) -> dict[str, object]:
    """Return the server's report on these keys."""
    rows = [{"key": key, "last_at": "2026-11-29T12:00:00+00:00"} for key in used]
    return {"tenant": tenant, "usage_days": usage_days, "data": rows}


@pytest.mark.parametrize(
    ("report", "says"),
    [
        (usage_of("ci", usage_days=0), "records no usage"),
        (usage_of("ci", tenant="globex"), "this key sees the usage of tenant globex only"),
    ],
)
def test_no_key_is_called_unused_by_who_cannot_know(report: dict[str, object], says: str, file: Path) -> None:
    new("--id", "ci", "--file", file)
    new("--id", "web", "--file", file)
    listed = run_with(report, "keys", "list", "--file", file, "--used", "--json")
    assert listed.code == 1 and says in listed.err, listed


def test_a_key_sees_when_those_of_its_own_tenant_were_used(file: Path) -> None:
    new("--id", "ci", "--file", file)
    listed = run_with(usage_of("ci", tenant="acme"), "keys", "list", "--file", file, "--used", "--json")
    assert [row["last_used_at"] for row in listed.json["data"]] == ["2026-11-29T12:00:00+00:00"]


def test_a_key_is_rotated_expired_and_listed_with_its_end_and_its_last_use(file: Path) -> None:
    old = new("--id", "ci", "--file", file, "--expires", "2127-01-31").stdout.strip()
    made = json.loads(run("keys", "rotate", "ci", "--file", file, "--overlap", "0h", "--json").stdout)
    keys = KeySet(parse_entries(file.read_text()))
    with pytest.raises(KeyRefused, match="expired"):
        keys.find(old)
    assert keys.find(made["key"]) == Caller("acme", frozenset({"infer"}), made["entry"]["id"])
    result = run("keys", "expire", made["entry"]["id"], "2028-01-01", "--file", file)
    assert words(result.stdout) == f"{made['entry']['id']} expires: 2028-01-01T00:00:00Z"
    report = usage_of("ci")
    listed = run_with(report, "keys", "list", "--file", file, "--used", "--json")
    assert listed.asked == [("GET", "/v1/usage?by=key&start=2000-01-01")]
    first, second = listed.json["data"]
    assert (first["id"], first["last_used_at"]) == ("ci", "2026-11-29T12:00:00+00:00")
    assert (second["expires_at"], second["last_used_at"]) == ("2028-01-01T00:00:00Z", None)
    assert listed.json["usage_days"] == 400
    assert "not in 400 days" in words(run_with(report, "keys", "list", "--file", file, "--used").out)
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
def test_a_wrong_change_of_a_key_leaves_the_file_as_it_is(given: tuple[str, ...], says: str, file: Path) -> None:
    new("--id", "ci", "--file", file)
    before = file.read_text()
    result = run("keys", *given, "--file", file)
    assert (result.exit_code, file.read_text()) == (1, before)
    assert says in words(result.stderr)
