from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deployments.api.adapters import MAX_UPLOAD_FILES, PublishItem
from deployments.errors import SourceMissing, SourceRefused
from deployments.publishing.adapter_folders import ADAPTER_FILES, adapter_files, adapter_folders
from deployments.publishing.source_folders import folder_of
from lora_store import AdapterRefused
from lora_store.peft_config import CONFIG_FILE
from lora_store.peft_files import PICKLE_FILE, WEIGHTS_FILE
from lora_store.sample_files import DESCRIPTION_FILE, SAMPLES_FILE
from tests.deployments.app_fakes import http_of, serve_plainly

MAX_BYTES = 20


def reasons(files: dict[str, bytes]) -> tuple[str, ...]:
    with pytest.raises(AdapterRefused) as caught, folder_of(PublishItem(name="x", files=files), (), MAX_BYTES):
        pass
    return caught.value.reasons


@pytest.mark.parametrize(
    "given",
    [{}, {"path": Path("a"), "source": "s3://b/a"}, {"path": Path("a"), "files": {}}, {"files": {}, "source": ""}],
)
def test_an_upload_is_exactly_one_thing(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="one of path, files and source"):
        PublishItem(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("upload", "name", "origin"),
    [
        (PublishItem(Path("/a/poet")), "poet", "poet"),
        (PublishItem(Path("/a/poet"), "bard"), "bard", "bard"),
        (PublishItem(source="s3://bucket/pool/poet/"), "poet", "s3://bucket/pool/poet/"),
        (PublishItem(source="s3://bucket/poet", name="bard"), "bard", "s3://bucket/poet"),
        (PublishItem(files={}, name="bard"), "bard", "bard"),
        (PublishItem(files={}), "", ""),
    ],
)
def test_it_is_named_after_where_it_came_from(upload: PublishItem, name: str, origin: str) -> None:
    assert (upload.adapter_name, upload.origin) == (name, origin)


def test_files_become_a_folder_that_is_gone_afterwards() -> None:
    files = {"adapter_config.json": b"{}", "lora_samples.jsonl": b"lines"}
    with folder_of(PublishItem(name="x", files=files), (), MAX_BYTES) as folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        assert folder.stat().st_mode & 0o077 == 0, "others may read it"
    assert not folder.exists()
    with pytest.raises(RuntimeError), folder_of(PublishItem(name="x", files=files), (), MAX_BYTES) as folder:
        raise RuntimeError
    assert not folder.exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\\b", "a\nb", "a\0b", "\x7f", "\ud800", "x" * 256]
)
def test_a_file_name_that_is_more_than_a_name_is_refused_by_name(name: str) -> None:
    [reason] = reasons({"adapter_config.json": b"", name: b""})
    assert repr(name[:100]) in reason
    assert "plain name" in reason


def test_files_are_bounded_in_number_and_bytes() -> None:
    assert reasons({}) == ("it has no files",)
    assert reasons({"a": b"x" * 10, "b": b"x" * 11}) == ("its files have 21 bytes, at most 20",)
    many = {f"f{number}": b"" for number in range(MAX_UPLOAD_FILES + 1)}
    assert reasons(many) == (f"it has {MAX_UPLOAD_FILES + 1} files, at most {MAX_UPLOAD_FILES}",)
    many.popitem()
    with folder_of(PublishItem(name="x", files=many), (), MAX_BYTES) as folder:
        assert len(list(folder.iterdir())) == MAX_UPLOAD_FILES


def test_a_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    with folder_of(PublishItem(tmp_path), (), MAX_BYTES) as folder:
        assert folder == tmp_path
    assert tmp_path.exists()


def test_no_folder_at_the_path_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for missing in (tmp_path / "nowhere", tmp_path / "file", tmp_path / "a\0b"):
        with pytest.raises(SourceMissing) as caught, folder_of(PublishItem(missing), (), MAX_BYTES):
            pass
        assert caught.value.place == str(missing)


def test_a_source_is_refused_where_none_is_allowed() -> None:
    with (
        pytest.raises(SourceRefused, match="source prefix"),
        folder_of(PublishItem(source="file:///data/poet"), (), MAX_BYTES),
    ):
        pass


def test_the_adapters_files_are_those_that_admission_reads(tmp_path: Path) -> None:
    assert ADAPTER_FILES == (CONFIG_FILE, WEIGHTS_FILE, SAMPLES_FILE, DESCRIPTION_FILE, PICKLE_FILE)
    for name in (WEIGHTS_FILE, CONFIG_FILE, "optimizer.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in adapter_files(tmp_path)] == [CONFIG_FILE, WEIGHTS_FILE]


def test_an_adapter_is_its_own_folder_and_a_folder_of_them_is_sorted(tmp_path: Path) -> None:
    for name in ("c", "a", "d", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    assert adapter_folders(tmp_path) == [tmp_path / name for name in "abcd"]
    assert adapter_folders(tmp_path / "a") == [tmp_path / "a"]
    assert adapter_folders(tmp_path / "empty") == []


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
