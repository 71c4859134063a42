from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from deployments.auth import key_issuing
from deployments.auth.api_keys import KeySet, hash_key, parse_entries
from deployments.auth.key_issuing import (
    add_entry,
    expire_entry,
    make_key,
    read_expiry,
    remove_entry,
    rotate_entry,
    with_entry,
    with_replaced,
)
from deployments.json_types import JsonMapping
from tests.deployments.key_files import entry, write
from tests.lora_store.power_failure import Disk

Dump = Callable[[Any], str]
DUMPS: list[Dump] = [
    json.dumps,
    lambda data: json.dumps(data, indent="\t"),
    yaml.safe_dump,
    lambda data: yaml.safe_dump(data, default_flow_style=True),
]


def made(**changes: Any) -> tuple[str, dict[str, Any]]:
    given: dict[str, Any] = {"tenant": "acme", "roles": ["infer"], "limits": {}, "id": None}
    return make_key(**{**given, **changes})


def test_an_entry_has_the_hash_of_its_key_and_not_the_key() -> None:
    key, made_entry = made(roles=["infer", "publish"], limits={"requests_per_minute": 60, "max_bytes": None}, id="ci")
    expected = {"id": "ci", "sha256": hash_key(key), "tenant": "acme", "roles": ["infer", "publish"]}
    assert made_entry == expected | {"limits": {"requests_per_minute": 60}}
    assert key not in json.dumps(made_entry)


def test_keys_without_an_id_get_unique_ids() -> None:
    (first, one), (second, other) = made(), made()
    assert first != second and one["id"] != other["id"]
    assert one["id"].startswith("acme-") and "limits" not in one
    assert made(tenant="t" * 64)[1]["id"].startswith("t" * 55 + "-")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"roles": ["root"]}, "roles.0: must be .*, got 'root'$"),
        ({"id": "a/b"}, "id"),
        ({"tenant": "a b", "id": "ci"}, "tenant"),
        ({"limits": {"requests_per_minute": 0}}, "limits.requests_per_minute: must be at least 1, got 0$"),
    ],
)
def test_a_bad_value_is_refused_by_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        made(**changes)


@pytest.mark.parametrize("dump", DUMPS)
def test_existing_entries_are_kept(tmp_path: Path, dump: Dump) -> None:
    file = tmp_path / "keys"
    file.write_text(dump([entry("old", limits={"max_bytes": 9})]))
    file.chmod(0o640)
    key, new = made()
    add_entry(file, new)
    keys = KeySet(parse_entries(file.read_text()))
    old = keys.find("old")
    assert old is not None and old.limits.max_bytes == 9
    assert keys.find(key) is not None
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_comments_of_a_yaml_list_stay_and_a_link_stays_a_link(tmp_path: Path) -> None:
    target, file = tmp_path / "real.yaml", tmp_path / "keys.yaml"
    target.write_text("# ours\n" + yaml.safe_dump([entry("old")]))
    file.symlink_to(target)
    add_entry(file, made()[1])
    assert file.is_symlink()
    assert target.read_text().startswith("# ours\n")
    assert len(parse_entries(target.read_text())) == 2


@pytest.mark.parametrize("text", ["", "\n", "[]", "[]\n", "# ours\n", "---\n# ours"])
def test_an_empty_file_gets_the_one_entry(text: str) -> None:
    key, new = made()
    [found] = parse_entries(with_entry(text, new))
    assert found.sha256 == hash_key(key)


@pytest.mark.parametrize(
    ("content", "says"), [("keys: 1", "a list"), (json.dumps([entry("x", id="twice")]), "same id")]
)
def test_a_file_that_cannot_take_the_key_is_not_changed(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=says):
        add_entry(file, made(id="twice")[1])
    assert file.read_text() == content
    assert list(tmp_path.iterdir()) == [file]


def test_two_commands_at_once_lose_no_entry(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    entries = [made()[1] for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda each: add_entry(file, each), entries))
    assert {each.id for each in parse_entries(file.read_text())} == {each["id"] for each in entries}
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600, "only its owner reads a new file"


def test_the_file_is_read_and_replaced_under_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = tmp_path / "keys.yaml", []

    def with_entry_elsewhere(text: str, new: JsonMapping) -> str:
        descriptor = os.open(tmp_path, os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
        seen.append(text)
        return with_entry(text, new)

    monkeypatch.setattr(key_issuing, "with_entry", with_entry_elsewhere)
    for _ in range(2):
        add_entry(file, made()[1])
    assert [len(parse_entries(text)) if text else 0 for text in seen] == [0, 1]


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_entry_is_removed_from_every_form_of_a_list(dump: Dump, place: int) -> None:
    entries = [entry(f"key-{number}", id=f"id-{number}") for number in range(3)]
    left = parse_entries(with_replaced(dump(entries), f"id-{place}", lambda _: []))
    assert [found.id for found in left] == [f"id-{number}" for number in range(3) if number != place]


@pytest.mark.parametrize("keeps_names", [True, False])
def test_a_revoked_key_does_not_come_back_with_a_power_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_names: bool
) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    file = write(folder / "keys.json", entry("stays"), entry("revoked"))
    disk = Disk(monkeypatch, folder)
    remove_entry(file, "id-revoked")
    left = disk.after_power_failure(tmp_path / "after", keeps_names=keeps_names)
    assert [item.id for item in parse_entries((left / "keys.json").read_text())] == ["id-stays"]


@pytest.mark.parametrize(
    ("who", "can_give", "mode", "is_changed"),
    [
        ("root", (True, True), 0o640, True),
        ("its owner, from another group of theirs", (False, True), 0o640, True),
        ("a member of its group", (False, True), 0o640, False),
        ("a member of its group", (False, True), 0o644, True),
        ("its owner, who left its group", (False, False), 0o640, False),
        ("its owner, who left its group", (False, False), 0o644, True),
    ],
)
def test_whoever_changes_the_file_leaves_it_readable_by_the_server(
    who: str,
    can_give: tuple[bool, bool],
    mode: int,
    is_changed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write(tmp_path / "keys.json", entry("a"), entry("b"))
    file.chmod(mode)
    text, server = file.read_text(), (file.stat().st_uid, file.stat().st_gid)
    # The new file belongs to the person who runs the command, until its owners are changed.
    owner = [server[0] if who.startswith("its owner") else server[0] + 1, server[1] + 1]

    def give(_: int, *ids: int) -> None:
        if any(wanted not in (-1, has) and not can for wanted, has, can in zip(ids, owner, can_give, strict=True)):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        owner[:] = [has if wanted == -1 else wanted for wanted, has in zip(ids, owner, strict=True)]

    refusal = pytest.raises(ValueError, match="run the command as its owner or as root")
    with monkeypatch.context() as patched, nullcontext() if is_changed else refusal:
        patched.setattr(os, "fchown", give)
        patched.setattr(os, "fstat", lambda _: SimpleNamespace(st_uid=owner[0], st_gid=owner[1]))
        remove_entry(file, "id-a")
    if is_changed:
        assert [found.id for found in parse_entries(file.read_text())] == ["id-b"]
        assert tuple(owner) == server or mode == 0o644
    else:
        assert file.read_text() == text
    assert stat.S_IMODE(file.stat().st_mode) == mode and list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_the_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "keys.json", entry("a"), entry("b"))
    before = file.read_text()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        remove_entry(file, "id-a")
    assert file.read_text() == before and os.listdir(tmp_path) == ["keys.json"]


def test_comments_of_the_entries_that_stay_are_kept() -> None:
    blocks = [yaml.safe_dump([entry(f"key-{number}", id=f"id-{number}")], sort_keys=False) for number in range(2)]
    text = f"# all keys\n# the first\n{blocks[0]}# the second\n{blocks[1]}"
    assert with_replaced(text, "id-1", lambda _: []) == f"# all keys\n# the first\n{blocks[0]}# the second\n"
    assert with_replaced(text, "id-0", lambda _: []) == f"# all keys\n# the first\n# the second\n{blocks[1]}"


def test_the_last_key_leaves_an_empty_list_and_a_missing_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    add_entry(file, entry("key", id="deploy"))
    with pytest.raises(ValueError, match="no key has the id 'deplyo'; did you mean 'deploy'"):
        remove_entry(file, "deplyo")
    remove_entry(file, "deploy")
    assert parse_entries(file.read_text()) == []
    with pytest.raises(ValueError, match="no such file"):
        remove_entry(tmp_path / "none.yaml", "ci")


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_rotated_key_gets_a_successor_and_an_end_in_every_form_of_a_list(
    dump: Dump, place: int, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    limits = {"requests_per_minute": 7}
    file.write_text(dump([entry(f"key-{number}", id=f"id-{number}", limits=limits) for number in range(3)]))
    key, new, end = rotate_entry(file, f"id-{place}", "2027-01-31T00:00:00Z")
    assert end == "2027-01-31T00:00:00Z"
    found = parse_entries(file.read_text())
    assert [one.id for one in found if one.id != new["id"]] == ["id-0", "id-1", "id-2"]
    assert [one.id for one in found if one.expires_at is not None] == [f"id-{place}"]
    old, successor = found[place], found[place + 1]
    assert (successor.tenant, successor.roles, successor.limits) == (old.tenant, old.roles, old.limits)
    assert successor.sha256 == hash_key(key) and successor.id == new["id"]


@pytest.mark.parametrize("before", ["2026-11-29", "2027-01-31T01:00:00+02:00"])
def test_rotating_a_key_never_lets_it_work_longer(before: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump([entry("a", id="a")], sort_keys=False) + f"  expires_at: {before}\n")
    [old] = parse_entries(file.read_text())
    assert old.expires_at is not None
    _, _, end = rotate_entry(file, "a", "2027-01-31T00:00:00Z")
    kept, _ = parse_entries(file.read_text())
    assert kept.expires_at == old.expires_at == datetime.fromisoformat(end)


def test_an_end_can_be_set_changed_and_removed_also_in_a_file_with_a_plain_yaml_time(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    other = yaml.safe_dump([entry("b", id="b")], sort_keys=False) + "  expires_at: 2027-05-01T00:00:00Z\n"
    file.write_text("# a comment\n" + yaml.safe_dump([entry("a", id="a")], sort_keys=False) + other)
    for at in ("2027-01-31T00:00:00Z", "2027-02-01T00:00:00Z", None):
        expire_entry(file, "a", at)
        one, two = parse_entries(file.read_text())
        assert (None if one.expires_at is None else one.expires_at.isoformat()) == (at and at.replace("Z", "+00:00"))
        assert two.expires_at is not None and two.expires_at.month == 5
    assert file.read_text().startswith("# a comment\n")
    with pytest.raises(ValueError, match="no key has the id 'c'"):
        expire_entry(file, "c", None)
    file.write_text(json.dumps([entry("a", id="a")]).replace("}]", "}, {}]"))  # not a list of keys
    with pytest.raises(ValueError, match="entry 1"):
        rotate_entry(file, "a", "2027-01-31T00:00:00Z")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30d", "2026-12-29T12:00:00Z"),
        ("12h", "2026-11-30T00:00:00Z"),
        ("2027-01-31", "2027-01-31T00:00:00Z"),
        ("2027-01-31T18:30+02:00", "2027-01-31T16:30:00Z"),
        ("never", None),
    ],
)
def test_a_time_is_read_in_every_form(text: str, expected: str | None) -> None:
    assert read_expiry(text, datetime(2026, 11, 29, 12, tzinfo=UTC)) == expected


@pytest.mark.parametrize("text", ["", "30", "-1d", "tomorrow", "2027-13-01", "9999-12-31T23:59:59-05:00"])
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time: give 30d, 12h"):
        read_expiry(text, datetime.now(UTC))


def test_a_time_in_an_early_year_has_four_digits() -> None:
    assert read_expiry("0202-01-31", datetime.now(UTC)) == "0202-01-31T00:00:00Z"
