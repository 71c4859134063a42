from __future__ import annotations

from pathlib import Path

import pytest

from deployments.cli.client import free_port
from deployments.errors import SourceMissing, SourceRefused, SourceUnavailable
from deployments.publishing.adapter_folders import ADAPTER_FILES
from deployments.publishing.source_folders import folder_of_source
from lora_store import AdapterRefused, Location
from tests.s3 import S3Endpoint

MAX_BYTES = 1000


@pytest.mark.parametrize("uri", ["", "http://host/pool", "s3://bucket/../other", "s3://key:secret@bucket/pool"])
def test_a_uri_that_could_mean_another_place_is_refused(uri: str) -> None:
    with pytest.raises(SourceRefused) as caught:
        folder_of_source(uri, ["s3://bucket", "file:///"], Path(), MAX_BYTES)
    assert repr(uri) in str(caught.value)


def test_a_folder_below_a_file_prefix_is_used_in_place(tmp_path: Path) -> None:
    (tmp_path / "pool" / "poet").mkdir(parents=True)
    uri = f"file://{tmp_path}/pool/poet"
    assert (
        folder_of_source(uri, [f"file://{tmp_path}/pool"], tmp_path / "work", MAX_BYTES) == tmp_path / "pool" / "poet"
    )
    with pytest.raises(SourceMissing):
        folder_of_source(f"{uri}s", [f"file://{tmp_path}/pool"], tmp_path / "work", MAX_BYTES)
    with pytest.raises(SourceRefused, match="source_prefixes, or download it and publish the folder"):
        folder_of_source(uri, [f"file://{tmp_path}/other", "s3://bucket", "hf://"], tmp_path / "work", MAX_BYTES)


def test_a_link_out_of_its_prefix_is_refused(tmp_path: Path) -> None:
    for folder in ("pool/poet", "secret"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pool" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "pool" / "bard").symlink_to(tmp_path / "pool" / "poet")
    prefix = f"file://{tmp_path}/pool"
    with pytest.raises(SourceRefused, match="symbolic link"):
        folder_of_source(f"{prefix}/out", [prefix], tmp_path, MAX_BYTES)
    assert folder_of_source(f"{prefix}/bard", [prefix], tmp_path, MAX_BYTES) == tmp_path / "pool" / "poet"


class Bucket:
    """Adapters below an allowed prefix of a real S3 endpoint."""

    def __init__(self, endpoint: S3Endpoint, name: str) -> None:
        self.prefix = endpoint.uri(name)
        self.uri = self.prefix.partition("?")[0]

    def write(self, path: str, data: bytes) -> None:
        files, root = Location(self.prefix).filesystem()
        with files.open_output_stream(f"{root}/{path}") as stream:
            stream.write(data)

    def fetch(self, path: str, work: Path, max_bytes: int = MAX_BYTES) -> Path:
        work.mkdir()
        return folder_of_source(f"{self.uri}/{path}", [self.prefix], work, max_bytes)


def test_an_adapters_files_are_copied_from_a_bucket_and_nothing_else(s3_endpoint: S3Endpoint, tmp_path: Path) -> None:
    bucket = Bucket(s3_endpoint, "sources")
    contents = {name: f"{name} of poet".encode() for name in ADAPTER_FILES}
    for name, data in contents.items():
        bucket.write(f"deep/poet/{name}", data)
    for other in ("optimizer.pt", "checkpoint-1/adapter_config.json"):
        bucket.write(f"deep/poet/{other}", b"x" * 10 * MAX_BYTES)
    copied = bucket.fetch("deep/poet", tmp_path / "work")
    assert copied == tmp_path / "work"
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == contents


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
        folder_of_source("s3://bucket/pool/poet", [prefix], tmp_path, MAX_BYTES)
    assert "s3://bucket/pool/poet" in str(caught.value)
    assert len(caught.value.cause) > 0


def test_a_name_that_leads_back_to_this_machine_is_not_followed(tmp_path: Path) -> None:
    """The name is another spelling of a loopback address, which only the resolver understands."""
    prefix = "s3://bucket/pool?endpoint_override=127.1:9&scheme=http&region=us-east-1"
    with pytest.raises(SourceRefused, match="leads to an address that this server does not read from"):
        folder_of_source("s3://bucket/pool/poet", [prefix], tmp_path, MAX_BYTES)
