from __future__ import annotations

import pickle
import resource
from pathlib import Path

import pytest

from lora_store import AdapterNotFound, BlobCorrupted, Location, StoreUnavailable
from lora_store.blobs import BlobStore
from lora_store.weights_blob import hash_blob


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_blob_is_read_by_its_sha256_and_written_once(tmp_path: Path, scheme: str) -> None:
    location = Location(f"{scheme}{tmp_path}/blobs")
    blobs = BlobStore(location)
    digest = blobs.put(b"abc")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert blobs.get(digest) == BlobStore(location).get(digest) == b"abc"
    assert digest in blobs
    [file] = _files(tmp_path)
    before = file.stat()
    blobs.put(b"abc")
    assert _files(tmp_path) == [file]
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damaged", [b"abd", b"", b"abcd"])
def test_a_corrupted_blob_raises_and_putting_it_again_repairs_it(tmp_path: Path, damaged: bytes) -> None:
    blobs = BlobStore(Location(str(tmp_path)))
    digest = blobs.put(b"abc")
    _files(tmp_path)[0].write_bytes(damaged)
    with pytest.raises(BlobCorrupted) as caught:
        blobs.get(digest)
    assert (caught.value.digest, caught.value.found) == (digest, hash_blob(damaged))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(BlobCorrupted):
        blobs.check(digest)
    assert b"".join(part.tobytes() for part in blobs.read_parts(digest)) == damaged, "its reader hashes it"
    blobs.put(b"abc")
    assert blobs.get(digest) == b"abc"
    blobs.check(digest)


@pytest.mark.parametrize("digest", ["0" * 64, "", "short", "../../secret", "a/" * 32, "A" * 64])
def test_an_unknown_or_malformed_digest_is_not_found(tmp_path: Path, digest: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    root = tmp_path / "one" / "two" / "blobs"
    root.mkdir(parents=True)
    blobs = BlobStore(Location(str(root)))
    for read in (blobs.get, lambda digest: list(blobs.read_parts(digest)), blobs.check):
        with pytest.raises(AdapterNotFound):
            read(digest)


def test_a_write_that_fails_leaves_no_file_behind(tmp_path: Path) -> None:
    blobs = BlobStore(Location(str(tmp_path)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as on a full disk
    try:
        with pytest.raises(StoreUnavailable):
            blobs.put(b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert _files(tmp_path) == []
    assert blobs.get(blobs.put(b"x" * 10_000))


def test_every_stored_file_is_listed_with_its_digest(tmp_path: Path) -> None:
    blobs = BlobStore(Location(str(tmp_path)))
    digests = [blobs.put(data) for data in (b"abc", b"defg")]
    (tmp_path / "note.txt").write_text("not a blob")
    found = sorted((file.digest, file.num_bytes, file.is_whole) for file in blobs.files())
    assert found == sorted([(digests[0], 3, True), (digests[1], 4, True)])
