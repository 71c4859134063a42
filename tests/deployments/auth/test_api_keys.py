from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any, ClassVar

import pytest
import yaml

from deployments.auth.api_keys import KeySet, hash_key, new_key, parse_entries, require_unique
from deployments.auth.authenticator import Caller
from deployments.errors import KeyRefused
from tests.deployments.key_files import entry


def test_only_the_key_of_an_entry_finds_its_caller() -> None:
    ring = KeySet(parse_entries(json.dumps([entry("one", roles=["infer"]), entry("two", "other")])))
    assert ring.find("one") == Caller("acme", frozenset({"infer"}), "id-one")
    assert ring.find("two") == Caller("other", frozenset({"infer", "publish", "admin"}), "id-two")
    for wrong in ("", "ones", "On", hash_key("one"), "one\udcff", "x" * 100_000):
        assert ring.find(wrong) is None


@pytest.mark.parametrize("at", ["2027-01-31T00:00:00Z", "2027-01-31", "2027-01-31T02:00:00+02:00"])
@pytest.mark.parametrize("dump", [json.dumps, yaml.safe_dump, lambda data: yaml.safe_dump(data).replace("'", "")])
def test_a_key_is_refused_from_its_end_on_and_its_owner_learns_why(at: str, dump: Any) -> None:
    now = [datetime(2027, 1, 31, tzinfo=UTC).timestamp() - 1]
    keys = KeySet(parse_entries(dump([entry("one", expires_at=at), entry("two")])), now=lambda: now[0])
    assert keys.find("one") is not None
    now[0] += 1
    with pytest.raises(KeyRefused, match=r"expired at 2027-01-31T00:00:00Z; ask the server's operator"):
        keys.find("one")
    assert keys.find("two") is not None and keys.find("three") is None


def test_keys_are_random_and_stored_as_hashes_only() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {46}  # 32 random bytes after a prefix
    key = keys.pop()
    assert hash_key(key) == hashlib.sha256(key.encode()).hexdigest()
    assert key not in str(KeySet(parse_entries(json.dumps([entry("x") | {"sha256": hash_key(key)}]))).__dict__)


GOOD = entry("secret")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "list"),
        ("keys: []", "list"),
        ("- id: [", "line 1"),
        (json.dumps([GOOD | {"roles": ["root"]}]), "entry 0.roles.0: must be 'infer', 'publish' or 'admin'"),
        (json.dumps([GOOD | {"roles": []}]), "entry 0.roles: must have at least 1 items"),
        (json.dumps([GOOD | {"tenant": "a/b"}]), "entry 0.tenant"),
        (json.dumps([GOOD | {"tenant": "auto"}]), "entry 0.tenant"),
        (json.dumps([GOOD | {"sha256": "secret"}]), "entry 0.sha256"),
        (json.dumps([GOOD | {"key": "secret"}]), "entry 0.key: unknown"),
        (json.dumps([GOOD | {"limits": {"rpm": 1}}]), "entry 0.limits.rpm: unknown"),
        (json.dumps([GOOD | {"tenent": "acme"}]), "entry 0.tenent: unknown; did you mean 'tenant'?"),
        (
            json.dumps([GOOD | {"limits": {"requests_per_minute": 0}}]),
            "entry 0.limits.requests_per_minute: must be at least 1",
        ),
        (json.dumps([GOOD, GOOD | {"sha256": "0" * 64}]), "same id"),
        (json.dumps([GOOD, GOOD | {"id": "other"}]), "same sha256"),
        (json.dumps([GOOD | {"expires_at": "9999-12-31T23:59:59-05:00"}]), "entry 0.expires_at: must be between"),
        (json.dumps([GOOD | {"expires_at": "0001-01-01T00:00:00+05:00"}]), "entry 0.expires_at: must be between"),
        ("- id: one\n  expires_at: 2026-02-30", "see line 2"),
        ("- id: !!int secret", "see line 1"),
        ("[\n" * 100_000, "not valid YAML"),
        ('[{"id": "ci", "roles": ["infer"], "roles": ["admin"]}]', "has a name twice: see line 1"),
        ("- id: ci\n  expires_at: 2020-01-01\n  expires_at: null\n", "has a name twice: see line 3"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_without_secrets(text: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_entries(text)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)
    assert GOOD["sha256"] not in str(caught.value)


class Counted(str):
    """A string that counts its comparisons."""

    __slots__ = ()
    comparisons: ClassVar[list[int]] = [0]

    def __eq__(self, other: object) -> bool:
        Counted.comparisons[0] += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_long_file_is_searched_for_repeats_in_linear_time() -> None:
    count = 20_000
    values = [Counted(f"id-{number}") for number in range(count)]
    require_unique("id", values)
    assert Counted.comparisons[0] < 3 * count  # equal hashes only; every pair would be 200,000,000
    with pytest.raises(ValueError, match="entries 7 and 20000 have the same id"):
        require_unique("id", [*values, Counted("id-7")])
