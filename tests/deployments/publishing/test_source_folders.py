from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deployments.api.adapters import MAX_UPLOAD_FILES, PublishItem
from deployments.errors import SourceMissing, SourceRefused, SourceUnavailable, UploadDiskFull
from deployments.publishing.source_folders import is_copied, open_folder
from lora_store import AdapterRefused
from tests.deployments.app_fakes import http_of, serve_plainly

MAX_BYTES = 20


def reasons(files: dict[str, bytes]) -> tuple[str, ...]:
    with pytest.raises(AdapterRefused) as caught, open_folder(PublishItem(name="x", files=files), (), MAX_BYTES):
        pass
    return caught.value.reasons


def test_files_become_a_folder_that_is_gone_afterwards() -> None:
    files = {"adapter_config.json": b"{}", "lora_samples.jsonl": b"lines"}
    with open_folder(PublishItem(name="x", files=files), (), MAX_BYTES) as folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        assert folder.stat().st_mode & 0o077 == 0, "others may read it"
    assert not folder.exists()
    with pytest.raises(RuntimeError), open_folder(PublishItem(name="x", files=files), (), MAX_BYTES) as folder:
        raise RuntimeError
    assert not folder.exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\\b", "a\nb", "a\0b", "\x7f", "\ud800", "x" * 256]
)
def test_a_file_name_with_a_path_is_refused(name: str) -> None:
    [reason] = reasons({"adapter_config.json": b"", name: b""})
    assert repr(name[:100]) in reason
    assert "plain name" in reason


def test_files_are_bounded_in_number_and_bytes() -> None:
    assert reasons({}) == ("it has no files",)
    assert reasons({"a": b"x" * 10, "b": b"x" * 11}) == ("its files have 21 bytes, at most 20",)
    many = {f"f{number}": b"" for number in range(MAX_UPLOAD_FILES + 1)}
    assert reasons(many) == (f"it has {MAX_UPLOAD_FILES + 1} files, at most {MAX_UPLOAD_FILES}",)
    many.popitem()
    with open_folder(PublishItem(name="x", files=many), (), MAX_BYTES) as folder:
        assert len(list(folder.iterdir())) == MAX_UPLOAD_FILES


def test_a_folder_is_used_in_place(tmp_path: Path) -> None:
    with open_folder(PublishItem(tmp_path), (), MAX_BYTES) as folder:
        assert folder == tmp_path
    assert tmp_path.exists()


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for missing in (tmp_path / "nowhere", tmp_path / "file", tmp_path / "a\0b"):
        with pytest.raises(SourceMissing) as caught, open_folder(PublishItem(missing), (), MAX_BYTES):
            pass
        assert caught.value.place == str(missing)


def test_an_item_is_copied_unless_its_files_are_the_publishers(tmp_path: Path) -> None:
    prefixes = (f"file://{tmp_path}",)
    for item in (
        PublishItem(tmp_path),
        PublishItem(source=f"file://{tmp_path}"),
        PublishItem(name="x", files={"a": b""}),
    ):
        with open_folder(item, prefixes, MAX_BYTES) as folder:
            assert is_copied(item) == (folder != tmp_path)
    assert is_copied(PublishItem(source="hf://acme/sql")) and is_copied(PublishItem(source="s3://pool/sql"))


def test_a_full_disk_is_reported_and_other_errors_are_not_changed(tmp_path: Path) -> None:
    def write() -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    def copy() -> None:
        try:
            write()
        except OSError as exc:
            raise SourceUnavailable("s3://pool/sql", str(exc)) from exc

    for fill in (write, copy):
        with (
            pytest.raises(UploadDiskFull, match="no disk space for uploads below TMPDIR"),
            open_folder(PublishItem(tmp_path), (), MAX_BYTES),
        ):
            fill()
    for error in (PermissionError(13, "no"), SourceUnavailable("s3://pool/sql", "refused")):
        with pytest.raises(type(error)), open_folder(PublishItem(tmp_path), (), MAX_BYTES):
            raise error


def test_a_source_is_refused_if_none_is_allowed() -> None:
    with (
        pytest.raises(SourceRefused, match="source prefix"),
        open_folder(PublishItem(source="file:///data/poet"), (), MAX_BYTES),
    ):
        pass


def test_an_upload_is_not_read_for_a_client_that_may_not_publish() -> None:
    async def run() -> None:
        read = []

        async def endless() -> Any:
            while len(read) < 100:
                read.append(1)
                yield b"x" * 1000

        async with http_of(serve_plainly(), host="10.0.0.1") as client:
            headers = {"content-type": "multipart/form-data; boundary=b"}
            response = await client.post("/v1/loras", content=endless(), headers=headers)
        assert response.status_code == 403

    asyncio.run(run())
