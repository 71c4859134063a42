from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from deployments.auth.key_file import KeyFile
from deployments.errors import KeysUnavailable
from tests.clocks import Clock
from tests.deployments.app_fakes import config_of
from tests.deployments.asking import get, request
from tests.deployments.key_files import entry, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def known(keys: KeyFile, *names: str) -> list[str]:
    return [name for name in names if keys.find(name) is not None]


def test_a_replaced_file_applies_from_the_next_request(path: Path) -> None:
    keys = KeyFile(write(path, entry("a")))
    assert known(keys, "a", "b") == ["a"]
    write(path, entry("a"), entry("b"))
    assert known(keys, "a", "b") == ["a", "b"]
    write(path, entry("b"))
    assert known(keys, "a", "b") == ["b"]
    write(path)  # no keys: no caller
    assert known(keys, "a", "b") == []


def test_an_edit_in_place_of_equal_size_and_time_is_seen(path: Path) -> None:
    keys = KeyFile(write(path, entry("a")))
    seen = path.stat()
    path.write_text(path.read_text().replace(entry("a")["sha256"], entry("b")["sha256"]))
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert known(keys, "a", "b") == ["b"]


def test_an_unchanged_file_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = KeyFile(write(path, entry("a")), now=lambda: path.stat().st_mtime + 60)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    assert known(keys, "a") == ["a"]


def test_a_kubernetes_secret_is_followed_through_its_swaps(tmp_path: Path) -> None:
    """keys.json -> ..data/keys.json, ..data -> the newest folder. A swap replaces the link and the folder."""

    def swap(name: str, *entries: dict[str, object]) -> None:
        (tmp_path / name).mkdir()
        write(tmp_path / name / "keys.json", *entries)
        os.symlink(name, tmp_path / "..data_tmp")
        os.replace(tmp_path / "..data_tmp", tmp_path / "..data")

    swap("..1", entry("a"))
    os.symlink("..data/keys.json", tmp_path / "keys.json")
    keys = KeyFile(tmp_path / "keys.json")
    swap("..2", entry("a"), entry("b"))
    (tmp_path / "..1" / "keys.json").unlink()
    assert known(keys, "a", "b") == ["a", "b"]


LATE = json.dumps([entry("b", expires_at="9999-12-31T23:59:59-05:00")])  # UTC has no such time


@pytest.mark.parametrize("broken", ["", "- id: [", '[{"id": "x"}]', "missing", LATE, "[\n" * 3000])
def test_a_broken_file_leaves_the_keys_and_is_logged_once(
    path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = KeyFile(write(path, entry("a")))
    for _ in range(2):  # each new failure is logged
        caplog.clear()
        path.unlink() if broken == "missing" else path.write_text(broken)
        with caplog.at_level(logging.INFO):
            assert [known(keys, "a") for _ in range(3)] == [["a"]] * 3
        assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
        assert str(path) in caplog.text
        write(path, entry("a"))
        assert known(keys, "a") == ["a"]
    write(path, entry("b"))
    assert known(keys, "a", "b") == ["b"]


@pytest.mark.parametrize(("content", "error"), [(None, OSError), ("[", ValueError), ("{}", ValueError)])
def test_a_server_does_not_start_on_a_file_it_cannot_use(
    path: Path, content: str | None, error: type[Exception]
) -> None:
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=r"keys\.json"):
        KeyFile(path)


def test_a_file_missing_for_longer_than_the_grace_period_admits_no_key(path: Path) -> None:
    clock = Clock()
    keys = KeyFile(write(path, entry("a")), missing_grace_s=300, monotonic=clock)
    clock.at += 10_000
    assert known(keys, "a") == ["a"]  # the period starts when the file is found missing
    path.unlink()
    assert known(keys, "a") == ["a"]
    clock.at += 299
    assert known(keys, "a", "b") == ["a"]
    clock.at += 1
    for key in ("a", "b"):  # valid and invalid keys look the same
        with pytest.raises(KeysUnavailable):
            keys.find(key)
    write(path, entry("b"))
    assert known(keys, "a", "b") == ["b"]
    path.unlink()
    clock.at += 299
    assert known(keys, "a", "b") == ["b"]  # a new period


def test_a_broken_file_is_not_missing(path: Path) -> None:
    clock = Clock()
    keys = KeyFile(write(path, entry("a")), missing_grace_s=0, monotonic=clock)
    path.write_text("[")
    assert known(keys, "a") == ["a"]
    clock.at += 10_000
    assert known(keys, "a") == ["a"]
    path.unlink()
    with pytest.raises(KeysUnavailable):
        keys.find("a")


def test_the_single_key_of_the_settings_opens_every_route() -> None:
    secret = "a-single-key"
    headers = {"authorization": f"Bearer {secret}"}
    assert get("/v1/models", api_key=secret).status_code == 401
    assert get("/v1/models", api_key=secret, headers={"authorization": "Bearer other-key"}).status_code == 401
    assert get("/v1/models", api_key=secret, headers=headers).status_code == 200
    assert request("DELETE", "/v1/loras/poet", api_key=secret, headers=headers, host="192.0.2.9").status_code == 200


def test_the_single_key_is_never_printed_and_excludes_a_keys_file(tmp_path: Path) -> None:
    config = config_of(api_key="a-single-key")
    assert "a-single-key" not in f"{config!r} {config.model_dump()} {config.model_dump_json()}"
    with pytest.raises(ValueError, match="api_key: cannot be combined with keys_file"):
        config_of(api_key="a-single-key", keys_file=tmp_path / "keys.yaml")
