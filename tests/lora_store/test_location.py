from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow.fs import GcsFileSystem, LocalFileSystem, S3FileSystem

from lora_store import Location, LoraStore
from lora_store.location import Endpoint
from lora_store.pool_copy import StoreTarget
from lora_store.pool_files import StoredPool
from tests.lora_store.builders import BASE, MakeFolder
from tests.s3 import S3Endpoint

S3 = "s3://pool/some/store?endpoint_override=127.0.0.1:9000&scheme=http&region=eu-west-1"


@pytest.mark.parametrize("uri", ["/var/pool", "file:///var/pool", "/var/pool/"])
def test_a_folder_is_the_same_for_both_libraries(uri: str) -> None:
    location = Location(uri)
    files, path = location.child("blobs").filesystem()
    assert (type(files), path) == (LocalFileSystem, "/var/pool/blobs")
    assert (location.child("blobs").delta_uri, location.storage_options) == ("/var/pool/blobs", {})
    assert location.is_local


def test_a_folder_may_be_relative_or_have_odd_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, folder in (("my pool", tmp_path / "my pool"), (str(tmp_path / "a b#c?d%20"), tmp_path / "a b#c?d%20")):
        assert Location(given).filesystem()[1] == str(folder)
        assert Location(given).child("a").delta_uri == str(folder / "a")


def test_s3_is_the_same_place_for_both_libraries() -> None:
    location = Location(S3).child("catalogue")
    files, path = location.filesystem()
    assert path == "pool/some/store/catalogue"
    assert isinstance(files, S3FileSystem) and files.region == "eu-west-1"
    assert location.delta_uri == "s3://pool/some/store/catalogue"
    options = location.storage_options
    assert options["aws_endpoint"] == "http://127.0.0.1:9000"
    assert (options["aws_allow_http"], options["aws_region"]) == ("true", "eu-west-1")
    assert not location.is_local


def test_s3_without_parameters_leaves_endpoint_and_region_to_the_environment() -> None:
    options = Location("s3://pool").storage_options
    assert not {"aws_endpoint", "aws_allow_http", "aws_region"} & options.keys()
    assert Location("s3://pool").child("blobs").filesystem()[1] == "pool/blobs"
    assert Location("s3://pool/x/").child("blobs").filesystem()[1] == "pool/x/blobs"


def test_https_is_the_default_and_http_is_explicit() -> None:
    options = Location("s3://pool/x?endpoint_override=store.example").storage_options
    assert (options["aws_endpoint"], options["aws_allow_http"]) == ("https://store.example", "false")


def test_gcs_is_the_same_place_for_both_libraries() -> None:
    location = Location("gs://pool/store").child("blobs")
    files, path = location.filesystem()
    assert (type(files), path) == (GcsFileSystem, "pool/store/blobs")
    assert location.delta_uri == "gs://pool/store/blobs"
    assert "timeout" in location.storage_options


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://key:secret@pool/x", "a store must be a folder, s3://… or gs://…, got http://…"),
        (
            "s3://pool/x?endpont_override=y",
            "unknown parameter 'endpont_override' of a s3:// store; allowed: endpoint_override, reg",
        ),
        ("gs://pool/x?scheme=http", "unknown parameter 'scheme' of a gs:// store; allowed: none"),
        ("file:///pool?region=x", "unknown parameter 'region' of a file:// store; allowed: none"),
        ("s3://key:secret@pool/x", "must name its bucket and no credentials"),
        ("s3:///x", "must name its bucket and no credentials"),
        ("s3://bucket?scheme=file", "http or https"),
        ("s3://bucket?endpoint_override=http://host:1", "host:port"),
        ("s3://bucket?endpoint_override=user:secret@host", "host:port"),
    ],
)
def test_an_invalid_uri_is_refused_by_name(uri: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        Location(uri)
    assert reason in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("/pools/feature%2Flogin", "'%2F'"),
        ("file:///pools/a%2520b", "'%20'"),
        ("/pools/a\\b", r"'\\\\'"),
        ("/pools/a\nb", r"'\\n'"),
        ("/pools/a\x7fb", r"'\\x7f'"),
        ("s3://pool/a\\b", r"'\\\\'"),
        ("s3://pool/a\x01b", r"'\\x01'"),
        ("s3://pool/a%0Ab", r"'\\n'"),
        ("s3://pool/a%2525b", "'%25'"),
        ("s3://pool//a", "'//'"),
        ("s3://pool/a//b?region=x", "'//'"),
        ("s3://pool/a[b]", r"'\['"),
        ("s3://pool/a#b", "'#'"),
        ("gs://pool/a|b", r"'\|'"),
    ],
)
def test_a_path_that_delta_reads_in_another_way_is_no_store(uri: str, found: str) -> None:
    for use in (Location.of_store, StoredPool, StoreTarget, lambda uri: LoraStore(uri, accepts_base=[])):
        with pytest.raises(ValueError, match=rf"path of a store cannot have {found}; name another folder"):
            use(uri)
    Location(uri)  # a place of other files


@pytest.mark.parametrize(
    "name",
    ["100%", "a b", "a%zz", "a:b;c'd", "a+b@c~{d}", "é日本", "a=b&c", "dots..", "a/../b", "s3 only: a%20b%5B%23"],
)
def test_a_store_in_an_odd_path_keeps_what_is_published(
    name: str, tmp_path: Path, s3_endpoint: S3Endpoint, make_folder: MakeFolder
) -> None:
    folders = [] if "only" in name else [str(tmp_path / "pools" / name)]
    for uri in [*folders, s3_endpoint.uri(f"odd/{name}")]:
        store = LoraStore(uri, accepts_base=[BASE])
        store.commit([store.stage(make_folder("poet", 1))], [None], [0.5], "maker")
        assert list(LoraStore(uri, accepts_base=[BASE]).snapshot().records) == [("local", "poet")]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/var/pool", None),
        (S3, Endpoint("127.0.0.1", 9000, "http", is_named=True)),
        ("s3://b?endpoint_override=minio&scheme=http", Endpoint("minio", 80, "http", is_named=True)),
        ("s3://b?endpoint_override=[::1]:9000", Endpoint("::1", 9000, "https", is_named=True)),
        ("s3://b?region=eu-west-1", Endpoint("s3.eu-west-1.amazonaws.com", 443, "https", is_named=False)),
        ("gs://b", Endpoint("storage.googleapis.com", 443, "https", is_named=False)),
    ],
)
def test_the_endpoint_is_the_host_that_receives_requests(uri: str, expected: Endpoint | None) -> None:
    assert Location(uri).endpoint == expected


@pytest.mark.parametrize(("address", "host"), [("10.0.0.1", "10.0.0.1:9000"), ("fd00::1", "[fd00::1]:9000")])
def test_a_place_is_the_same_at_an_address_of_its_endpoint(address: str, host: str) -> None:
    location = Location("s3://b/a b/c%20d?endpoint_override=minio:9000&scheme=http&region=x")
    pinned = location.at_address(address)
    assert pinned.endpoint == Endpoint(address, 9000, "http", is_named=True)
    assert pinned.storage_options["aws_endpoint"] == f"http://{host}"
    assert (pinned.delta_uri, pinned.filesystem()[1]) == (location.delta_uri, location.filesystem()[1])
