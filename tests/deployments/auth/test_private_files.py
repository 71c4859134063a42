from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.auth.private_files import FolderNotPrivate, keep_files_private, make_private, sessions_folder


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def make(path: Path, mode: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("ab" * 32)
    path.chmod(mode)
    return path


def test_new_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    keep_files_private(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    assert rights(tmp_path / "folder") == 0o700
    assert rights(tmp_path / "folder" / "file") == 0o600


def test_a_readable_token_is_made_private_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = make(tmp_path / ".ray" / "auth_token", 0o644)
    with caplog.at_level(logging.WARNING):
        keep_files_private(tmp_path)
    assert (rights(token), rights(token.parent)) == (0o600, 0o700)
    assert token.read_text() == "ab" * 32
    [record] = caplog.records
    assert f"{token} was readable by other users" in record.message


def test_a_private_token_is_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = make(tmp_path / ".ray" / "auth_token", 0o400)
    with caplog.at_level(logging.WARNING):
        keep_files_private(tmp_path)
    assert rights(token) == 0o400
    assert not caplog.records


def test_a_home_without_a_token_stays_without(tmp_path: Path) -> None:
    keep_files_private(tmp_path)
    assert list(tmp_path.iterdir()) == []


ME = os.geteuid()


def test_the_sessions_folder_belongs_to_this_user(tmp_path: Path) -> None:
    folder = sessions_folder({"RAY_TMPDIR": str(tmp_path)}, ME)
    assert folder == tmp_path / f"loraretriever-{ME}" / "ray"
    assert sessions_folder({}, 1000) == Path("/tmp/loraretriever-1000/ray")
    for _ in range(2):
        make_private(folder.parent, ME)
        assert rights(folder.parent) == 0o700


def test_an_accessible_folder_is_made_private(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    make_private(tmp_path / "open", ME)
    assert rights(tmp_path / "open") == 0o700


def test_a_link_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Another user could have created it to redirect the sessions."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FolderNotPrivate, match=r"is a symbolic link.*RAY_TMPDIR"):
        make_private(tmp_path / "link", ME)


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderNotPrivate, match="belongs to another user"):
        make_private(tmp_path, ME + 1)
