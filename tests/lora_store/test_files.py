from __future__ import annotations

import errno
import itertools
import os
import pickle
import stat
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from deltalake.exceptions import DeltaError
from moto.s3.models import s3_backends

from lora_store import AdapterNotFound, Location, LoraStore, StoreUnavailable
from lora_store.blobs import BlobStore
from lora_store.disk_cache import DiskCache
from lora_store.errors import StoreFull
from lora_store.files import Files, create_file, open_for_arrow, store_errors
from tests.lora_store.builders import BASE, MakeFolder, embedding
from tests.s3 import S3Endpoint


@pytest.fixture
def files(location: Location) -> Files:
    return Files(location)


def test_an_object_is_read_as_it_was_written(files: Files) -> None:
    before = datetime.now(UTC)
    assert files.entries() == []
    files.write("a/b", b"one")
    files.write("a/b", b"two")
    files.write("empty", b"", durable=False)
    assert (files.read("a/b"), files.read("empty"), files.read("a/c")) == (b"two", b"", None)
    assert files.contains("a/b") and not files.contains("a/c")
    assert {entry.name: entry.num_bytes for entry in files.entries()} == {"a/b": 3, "empty": 0}
    assert all(abs((entry.written_at - before).total_seconds()) < 600 for entry in files.entries())


def test_arrow_reads_a_copy_and_holds_no_bytes_of_python() -> None:
    """Its threads would otherwise abort one in ten commands that end soon after they read a table."""
    content = os.urandom(100)
    before = sys.getrefcount(content)
    opened = open_for_arrow(content)
    assert sys.getrefcount(content) == before and opened.read() == content


@pytest.mark.parametrize("sizes", [[0], [1], [4], [4, 1], [4, 4]], ids=str)
def test_an_object_is_read_in_parts_of_a_size(files: Files, sizes: list[int]) -> None:
    data = bytes(range(sum(sizes)))
    files.write("a", data, durable=False)
    parts = list(files.read_parts("a", 4))
    assert (b"".join(part.tobytes() for part in parts), [len(part) for part in parts]) == (data, sizes)
    assert list(files.read_parts("b", 4)) == []


def test_an_object_on_s3_is_read_by_one_request_and_its_parts_by_one_each(s3_endpoint: S3Endpoint) -> None:
    files = Files(Location(s3_endpoint.uri(uuid4().hex)))
    data = bytes(3 << 20)
    files.write("a", data)
    requests = itertools.count()

    def num_requests(read: Callable[[], object]) -> int:
        before = next(requests)
        read()
        return next(requests) - before - 1

    s3_endpoint.on_request = lambda: next(requests)
    try:
        assert num_requests(lambda: files.read("a")) == 2, "one more asks for the size"
        assert num_requests(lambda: files.digest("a")) == 2
        assert num_requests(lambda: list(files.read_parts("a", 1 << 20))) == 4
    finally:
        s3_endpoint.on_request = lambda: None


@pytest.mark.parametrize("failing", ["part", "pieces"])
def test_an_upload_that_fails_leaves_the_object_as_it_was(failing: str, s3_endpoint: S3Endpoint) -> None:
    files = Files(Location(s3_endpoint.uri(uuid4().hex)))
    whole, piece = bytes(36 << 20), bytes(6 << 20)
    files.write("a+b/c d", whole)
    assert [(entry.name, entry.num_bytes) for entry in files.entries()] == [("a+b/c d", len(whole))]

    def read_pieces() -> Iterator[bytes]:
        yield from [piece] * 5
        if failing == "pieces":
            raise OSError("the source is gone")
        yield piece

    s3_endpoint.loses_answer = lambda request: failing == "part" and "partNumber=2&" in request["QUERY_STRING"]
    try:
        with pytest.raises(StoreUnavailable):
            files.write_pieces("a+b/c d", read_pieces())
    finally:
        s3_endpoint.loses_answer = lambda _: False
    assert [(entry.name, entry.num_bytes) for entry in files.entries()] == [("a+b/c d", len(whole))]
    assert files.read("a+b/c d") == whole


def test_a_large_object_whose_copy_and_deletion_fail_is_left_to_gc(s3_endpoint: S3Endpoint) -> None:
    blobs = BlobStore(Location(s3_endpoint.uri(uuid4().hex)))
    data = os.urandom(9 << 20)

    def fails(request: Any) -> bool:
        return request["REQUEST_METHOD"] == "DELETE" or "HTTP_X_AMZ_COPY_SOURCE" in request

    s3_endpoint.refuses = fails
    try:
        with pytest.raises(StoreUnavailable):
            blobs.put(data)
    finally:
        s3_endpoint.refuses = lambda _: False
    assert [(file.num_bytes, file.is_whole) for file in blobs.files()] == [(len(data), False)]
    assert blobs.get(blobs.put(data)) == data


class MadeWhileLooking:
    """A location whose first listing fails, as in pyarrow if the folder is created during the listing."""

    def __init__(self, location: Location) -> None:
        self.is_local = location.is_local
        self._files, self._root = location.filesystem()
        self.num_listings = 0

    def filesystem(self) -> tuple[Any, str]:
        return self, self._root

    def get_file_info(self, below: Any) -> Any:
        self.num_listings += 1
        if self.num_listings == 1:
            raise FileNotFoundError(2, "Cannot list directory")
        return self._files.get_file_info(below)


def test_a_folder_created_during_its_listing_is_listed_again(location: Location) -> None:
    Files(location).write("a", b"one")
    made = MadeWhileLooking(location)
    assert [entry.name for entry in Files(made).entries()] == ["a"]
    assert made.num_listings == 2


@pytest.mark.parametrize("number", [0, 1, 2, 40])
def test_delete_returns_the_names_that_existed(files: Files, number: int) -> None:
    names = [f"f/{index}" for index in range(number)]
    for name in names[::2]:
        files.write(name, b"x", durable=False)
    assert files.delete(names) == names[::2]
    assert files.delete(names) == []
    assert files.entries() == []


def test_a_stopped_endpoint_is_reported_in_seconds_and_restarts_with_its_data() -> None:
    endpoint = S3Endpoint()
    files = Files(Location(endpoint.uri("stopped")))
    files.write("a", b"one")
    endpoint.stop()
    for attempt in (lambda: files.read("a"), lambda: files.write("a", b"two"), lambda: files.delete(["a", "b"])):
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="onnect to") as caught:
            attempt()
        assert time.monotonic() - started < 60
        assert len(str(caught.value)) < 300 and "\x1b" not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    endpoint.start()
    assert files.read("a") == b"one"
    endpoint.stop()


def test_a_folder_that_cannot_be_written_is_unavailable(folder_uri: str) -> None:
    Files(Location(folder_uri)).write("file", b"")
    below_a_file = Files(Location(f"{folder_uri}/file"))
    with pytest.raises(StoreUnavailable, match=r"Not a directory|File exists"):
        below_a_file.write("a/b", b"x")
    with pytest.raises(StoreUnavailable):
        below_a_file.read("a/b")


def read_while_deleted(endpoint: S3Endpoint, at: int, read: Callable[[Files, str], object]) -> object:
    """Return what `read` of two bytes returns if they are deleted before its request `at`, counted from 0."""
    name = uuid4().hex
    files = Files(Location(endpoint.uri("vanishing")))
    files.write(name, b"xy")
    requests = itertools.count()

    def delete() -> None:
        if next(requests) == at:
            s3_backends["123456789012"]["aws"].delete_object("pool", f"vanishing/{name}")

    endpoint.on_request = delete
    try:
        return read(files, name)
    finally:
        endpoint.on_request = lambda: None
        assert next(requests) > at + 1


def test_an_object_deleted_during_a_read_does_not_exist(s3_endpoint: S3Endpoint) -> None:
    """The first request checks that it exists, the others read it."""
    assert read_while_deleted(s3_endpoint, 1, Files.read) is None
    for at in (1, 2):
        with pytest.raises(AdapterNotFound):
            read_while_deleted(s3_endpoint, at, lambda files, name: list(files.read_parts(name, 1)))


def test_on_a_local_disk_only_the_owner_reads_the_store(tmp_path: Path, make_folder: MakeFolder) -> None:
    """The store has private samples. deltalake creates the catalogue's files, below private folders."""
    old = os.umask(0o022)
    try:
        store = LoraStore(str(tmp_path / "new" / "pool"), accepts_base=[BASE])
        store.commit([store.stage(make_folder())], [embedding()], [1.0], "me")
        store.stage(make_folder("held", seed=1))
        cache = DiskCache(tmp_path / "cache" / "weights", 1000)
        cache.put("a" * 64, b"weights")
    finally:
        os.umask(old)
    tops = (tmp_path / "new", tmp_path / "cache")
    below = [path for top in tops for path in (top, *top.rglob("*"))]
    folders, files = [path for path in below if path.is_dir()], [path for path in below if path.is_file()]
    assert len(folders) >= 9 and len(files) >= 7
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
    own = [path for path in files if "catalogue" not in path.parts and path.name != ".lock"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in own} == {0o600}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_what_root_creates_belongs_to_the_owner_of_its_folder(tmp_path: Path) -> None:
    os.chown(tmp_path, 1000, 1001)
    Files(Location(str(tmp_path))).write("new/folder/file", b"")
    create_file(tmp_path / "new" / "commit", b"")
    found = [path.stat() for path in tmp_path.rglob("*")]
    assert [(status.st_uid, status.st_gid) for status in found] == [(1000, 1001)] * 4


def test_a_new_file_is_written_once_and_never_replaced(tmp_path: Path) -> None:
    file = tmp_path / "commit"
    assert create_file(file, b"ours") and not create_file(file, b"theirs")
    assert file.read_bytes() == b"ours"
    assert [path.name for path in tmp_path.iterdir()] == ["commit"]
    with pytest.raises(FileNotFoundError):
        create_file(tmp_path / "gone" / "commit", b"ours")


def test_a_new_file_whose_link_was_repeated_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS client that lost the server's answer repeats the call, and the server finds the name taken."""
    link = os.link

    def link_twice(*paths: Path) -> None:
        link(*paths)
        link(*paths)

    monkeypatch.setattr(os, "link", link_twice)
    file = tmp_path / "commit"
    assert create_file(file, b"ours") and not create_file(file, b"theirs")
    assert file.read_bytes() == b"ours"
    assert [path.name for path in tmp_path.iterdir()] == ["commit"]


def test_a_full_disk_is_not_an_unavailable_one() -> None:
    for error in (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        DeltaError("No space left on device (os error 28)"),
    ):
        with pytest.raises(StoreFull), store_errors():
            raise error
    with pytest.raises(StoreUnavailable) as found, store_errors():
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    assert not isinstance(found.value, StoreFull)
