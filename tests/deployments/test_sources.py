from __future__ import annotations

from pathlib import Path

import pytest

from deployments.errors import SourceMissing, SourceRefused, SourceUnavailable
from deployments.server import free_port
from deployments.sources import SourcePrefix, SourceUri, folder_of_source

MAX_BYTES = 1000


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://bucket/pool/poet", ("bucket", "pool", "poet")),
        ("s3://bucket/pool/poet/", ("bucket", "pool", "poet")),
        ("s3://bucket", ("bucket",)),
        ("gs://bucket/a b/100%", ("bucket", "a b", "100%")),
        ("file:///data/pool", ("data", "pool")),
        ("file:///", ()),
        ("s3://bucket/..x/x..", ("bucket", "..x", "x..")),
    ],
)
def test_a_uri_is_read_part_by_part(uri: str, parts: tuple[str, ...]) -> None:
    assert SourceUri.parse(uri).parts == parts


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "/data/pool",
        "http://host/pool",
        "S3://bucket/pool",
        "s3:/bucket",
        "s3://",
        "s3:///pool",
        "s3://bucket/../other",
        "s3://bucket/pool/..",
        "s3://bucket/./pool",
        "s3://bucket//pool",
        "s3://bucket/pool?endpoint_override=evil",
        "s3://bucket/pool#x",
        "s3://key:secret@bucket/pool",
        "s3://bucket:9000/pool",
        "s3://bucket/a\\b",
        "s3://bucket/a\nb",
        "s3://bucket/a\0b",
        "file://host/data",
        "file://data",
        "file:///data/../etc",
    ],
)
def test_a_uri_that_could_mean_another_place_is_none(uri: str) -> None:
    with pytest.raises(ValueError, match="must"):
        SourceUri.parse(uri)
    with pytest.raises(SourceRefused) as caught:
        folder_of_source(uri, ["s3://bucket", "file:///"], Path(), MAX_BYTES)
    assert repr(uri) in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "prefix", "expected"),
    [
        ("s3://bucket/adapters/poet", "s3://bucket/adapters", True),
        ("s3://bucket/adapters/poet", "s3://bucket/adapters/", True),
        ("s3://bucket/adapters/poet", "s3://bucket/adapters?endpoint_override=localhost:9000&scheme=http", True),
        ("s3://bucket/adapters", "s3://bucket/adapters", True),
        ("s3://bucket/adapters/poet", "s3://bucket", True),
        ("s3://bucket/adapters-evil/poet", "s3://bucket/adapters", False),
        ("s3://bucket-evil/adapters", "s3://bucket", False),
        ("gs://bucket/adapters/poet", "s3://bucket/adapters", False),
        ("file:///data/adapters-evil", "file:///data/adapters", False),
        ("s3://bucket/Adapters/poet", "s3://bucket/adapters", False),
        ("s3://bucket/%61dapters/poet", "s3://bucket/adapters", False),
    ],
)
def test_prefixes_are_compared_part_by_part(uri: str, prefix: str, expected: bool) -> None:
    assert SourceUri.parse(uri).is_below(SourcePrefix.parse(prefix).uri) is expected


def test_a_folder_below_a_file_prefix_is_used_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "pool" / "poet").mkdir(parents=True)
    uri = f"file://{tmp_path}/pool/poet"
    assert (
        folder_of_source(uri, [f"file://{tmp_path}/pool"], tmp_path / "work", MAX_BYTES) == tmp_path / "pool" / "poet"
    )
    with pytest.raises(SourceMissing):
        folder_of_source(f"{uri}s", [f"file://{tmp_path}/pool"], tmp_path / "work", MAX_BYTES)
    with pytest.raises(SourceRefused, match="allow"):
        folder_of_source(uri, [f"file://{tmp_path}/other", "s3://bucket"], tmp_path / "work", MAX_BYTES)


def test_a_link_may_not_lead_out_of_its_prefix(tmp_path: Path) -> None:
    for folder in ("pool/poet", "secret"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pool" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "pool" / "bard").symlink_to(tmp_path / "pool" / "poet")
    prefix = f"file://{tmp_path}/pool"
    with pytest.raises(SourceRefused, match="symbolic link"):
        folder_of_source(f"{prefix}/out", [prefix], tmp_path, MAX_BYTES)
    assert folder_of_source(f"{prefix}/bard", [prefix], tmp_path, MAX_BYTES) == tmp_path / "pool" / "poet"


class Bucket:
    """`s3://source` on a real endpoint, and the prefix that allows its folder `pool`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.files, self.root = Location(prefix).filesystem()

    def write(self, name: str, data: bytes) -> None:
        with self.files.open_output_stream(f"{self.root}/{name}") as stream:
            stream.write(data)


def test_an_unreachable_endpoint_is_named(tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    prefix = f"s3://key:secret@bucket/pool?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    prefix = prefix.replace("key:secret@", "")
    with pytest.raises(SourceUnavailable, match="s3://bucket/pool/poet"):
        folder_of_source("s3://bucket/pool/poet", [prefix], tmp_path, MAX_BYTES)
