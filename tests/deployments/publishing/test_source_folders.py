from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.api.adapters import MAX_UPLOAD_FILES, PublishItem
from deployments.byte_budget import ByteBudget
from deployments.cli.client import free_port
from deployments.errors import SourceMissing, SourceRefused, SourceUnavailable, UploadDiskFull, UploadMemoryFull
from deployments.publishing.adapter_folders import ADAPTER_FILES
from deployments.publishing.source_folders import folder_of_source, open_folder
from lora_store import AdapterRefused, Location
from tests.deployments.asking import request
from tests.s3 import S3Endpoint

MAX_BYTES = 20
MAX_COPY_BYTES = 1000


def reasons(files: dict[str, bytes]) -> tuple[str, ...]:
    with pytest.raises(AdapterRefused) as caught, open_folder(PublishItem(name="x", files=files), (), MAX_BYTES):
        pass
    return caught.value.reasons


def test_files_become_a_folder_that_is_gone_afterwards() -> None:
    files = {"adapter_config.json": b"{}", "lora_samples.jsonl": b"lines"}
    with open_folder(PublishItem(name="x", files=files), (), MAX_BYTES) as (folder, _):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        assert folder.stat().st_mode & 0o077 == 0, "others may read it"
    assert not folder.exists()
    with pytest.raises(RuntimeError), open_folder(PublishItem(name="x", files=files), (), MAX_BYTES) as (folder, _):
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
    with open_folder(PublishItem(name="x", files=many), (), MAX_BYTES) as (folder, _):
        assert len(list(folder.iterdir())) == MAX_UPLOAD_FILES


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for missing in (tmp_path / "nowhere", tmp_path / "file", tmp_path / "a\0b"):
        with pytest.raises(SourceMissing) as caught, open_folder(PublishItem(missing), (), MAX_BYTES):
            pass
        assert caught.value.place == str(missing)


def test_an_item_is_copied_unless_its_files_are_the_publishers_which_stay(tmp_path: Path) -> None:
    prefixes = (f"file://{tmp_path}",)
    for item, expected in (
        (PublishItem(tmp_path), False),
        (PublishItem(source=f"file://{tmp_path}"), False),
        (PublishItem(name="x", files={"a": b""}), True),
    ):
        with open_folder(item, prefixes, MAX_BYTES) as (folder, is_copy):
            assert is_copy == (folder != tmp_path) == expected
        assert folder.exists() is not expected


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


def test_an_upload_is_not_read_for_a_client_that_may_not_publish() -> None:
    read = []

    async def endless() -> Any:
        while len(read) < 100:
            read.append(1)
            yield b"x" * 1000

    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = request("POST", "/v1/loras", sent={"content": endless(), "headers": headers}, host="10.0.0.1")
    assert (response.status_code, len(read)) == (403, 0)


def test_uploads_folders_and_sources_count_until_they_are_staged(tmp_path: Path) -> None:
    folder = tmp_path / "pool" / "poet"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(b"x" * 30)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 20)
    (folder / "optimizer.pt").write_bytes(b"x" * 999)
    prefixes = [f"file://{tmp_path}/pool"]
    budget = ByteBudget(60)
    for upload in (
        PublishItem(name="x", files={"a": b"x" * 50}),
        PublishItem(folder),
        PublishItem(source=f"file://{folder}"),
    ):
        with open_folder(upload, prefixes, 1000, budget, wait_s=0.01):
            assert budget.num_bytes == 50
            with pytest.raises(UploadMemoryFull), open_folder(upload, prefixes, 1000, budget, wait_s=0.01):
                pass
        assert budget.num_bytes == 0


@pytest.mark.parametrize("uri", ["", "http://host/pool", "s3://bucket/../other", "s3://key:secret@bucket/pool"])
def test_a_uri_that_could_mean_another_place_is_refused(uri: str) -> None:
    with pytest.raises(SourceRefused) as caught:
        folder_of_source(uri, ["s3://bucket", "file:///"], Path(), MAX_COPY_BYTES)
    assert repr(uri) in str(caught.value)


def test_a_folder_below_a_file_prefix_is_used_in_place(tmp_path: Path) -> None:
    (tmp_path / "pool" / "poet").mkdir(parents=True)
    uri = f"file://{tmp_path}/pool/poet"
    assert (
        folder_of_source(uri, [f"file://{tmp_path}/pool"], tmp_path / "work", MAX_COPY_BYTES)
        == tmp_path / "pool" / "poet"
    )
    with pytest.raises(SourceMissing):
        folder_of_source(f"{uri}s", [f"file://{tmp_path}/pool"], tmp_path / "work", MAX_COPY_BYTES)
    with pytest.raises(SourceRefused, match="source_prefixes, or download it and publish the folder"):
        folder_of_source(uri, [f"file://{tmp_path}/other", "s3://bucket", "hf://"], tmp_path / "work", MAX_COPY_BYTES)


def test_a_link_out_of_its_prefix_is_refused(tmp_path: Path) -> None:
    for folder in ("pool/poet", "secret"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pool" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "pool" / "bard").symlink_to(tmp_path / "pool" / "poet")
    prefix = f"file://{tmp_path}/pool"
    with pytest.raises(SourceRefused, match="symbolic link"):
        folder_of_source(f"{prefix}/out", [prefix], tmp_path, MAX_COPY_BYTES)
    assert folder_of_source(f"{prefix}/bard", [prefix], tmp_path, MAX_COPY_BYTES) == tmp_path / "pool" / "poet"


class Bucket:
    """Adapters below an allowed prefix of a real S3 endpoint."""

    def __init__(self, endpoint: S3Endpoint, name: str) -> None:
        self.prefix = endpoint.uri(name)
        self.uri = self.prefix.partition("?")[0]

    def write(self, path: str, data: bytes) -> None:
        files, root = Location(self.prefix).filesystem()
        with files.open_output_stream(f"{root}/{path}") as stream:
            stream.write(data)

    def fetch(self, path: str, work: Path, max_bytes: int = MAX_COPY_BYTES) -> Path:
        work.mkdir()
        return folder_of_source(f"{self.uri}/{path}", [self.prefix], work, max_bytes)


def test_an_adapters_files_are_copied_from_a_bucket_and_nothing_else(s3_endpoint: S3Endpoint) -> None:
    bucket = Bucket(s3_endpoint, "sources")
    contents = {name: f"{name} of poet".encode() for name in ADAPTER_FILES}
    for name, data in contents.items():
        bucket.write(f"deep/poet/{name}", data)
    for other in ("optimizer.pt", "checkpoint-1/adapter_config.json"):
        bucket.write(f"deep/poet/{other}", b"x" * 10 * MAX_COPY_BYTES)
    item = PublishItem(source=f"{bucket.uri}/deep/poet")
    with open_folder(item, [bucket.prefix], MAX_COPY_BYTES) as (folder, is_copy):
        assert is_copy
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


def test_the_size_of_a_copy_is_limited(s3_endpoint: S3Endpoint, tmp_path: Path) -> None:
    bucket = Bucket(s3_endpoint, "bounded")
    bucket.write("poet/adapter_config.json", b"x" * 6)
    bucket.write("poet/adapter_model.safetensors", b"y" * 5)
    with pytest.raises(AdapterRefused, match="more than 10 bytes"):
        bucket.fetch("poet", tmp_path / "less", max_bytes=10)
    assert bucket.fetch("poet", tmp_path / "enough", max_bytes=11) == tmp_path / "enough"


@pytest.mark.parametrize("path", ["nowhere", "poet/adapter_config.json", "empty"])
def test_a_missing_adapter_in_the_bucket_is_reported(path: str, s3_endpoint: S3Endpoint, tmp_path: Path) -> None:
    bucket = Bucket(s3_endpoint, "missing")
    bucket.write("poet/adapter_config.json", b"{}")
    bucket.write("empty/notes.txt", b"")
    with pytest.raises(SourceMissing) as caught:
        bucket.fetch(path, tmp_path / "work")
    assert caught.value.place == f"{bucket.uri}/{path}"


def test_an_unreachable_endpoint_is_named(tmp_path: Path) -> None:
    prefix = f"s3://bucket/pool?endpoint_override=127.0.0.1:{free_port('127.0.0.1')}&scheme=http&region=us-east-1"
    with pytest.raises(SourceUnavailable) as caught:
        folder_of_source("s3://bucket/pool/poet", [prefix], tmp_path, MAX_COPY_BYTES)
    assert "s3://bucket/pool/poet" in str(caught.value)
    assert len(caught.value.cause) > 0


def test_a_name_that_leads_back_to_this_machine_is_not_followed(tmp_path: Path) -> None:
    """The name is another spelling of a loopback address, which only the resolver understands."""
    prefix = "s3://bucket/pool?endpoint_override=127.1:9&scheme=http&region=us-east-1"
    with pytest.raises(SourceRefused, match="leads to an address that this server does not read from"):
        folder_of_source("s3://bucket/pool/poet", [prefix], tmp_path, MAX_COPY_BYTES)
