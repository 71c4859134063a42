"""The disk cache: its quota, its order, damaged files, killed writers, full disks, concurrent processes."""

from __future__ import annotations

import hashlib
import itertools
import logging
import multiprocessing
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lora_store.disk_cache import DiskCache


def blob(number: int, size: int = 100) -> tuple[str, bytes]:
    data = bytes([number % 256]) * size
    return hashlib.sha256(data).hexdigest(), data


@pytest.fixture
def ticks() -> Iterator[int]:
    return itertools.count(10**18, 10**9)


@pytest.fixture
def cache(tmp_path: Path, ticks: Iterator[int]) -> DiskCache:
    """Return a cache with room for three blobs of 100 bytes. Every use is a second after the previous one."""
    return DiskCache(tmp_path / "cache", 300, now_ns=lambda: next(ticks))


def files_of(folder: Path) -> set[str]:
    """Return all files except the lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def measure(cache: DiskCache) -> int:
    """Return the total size of the cached blobs."""
    num_bytes = 0
    for path in cache.folder.glob("?" * len(blob(0)[0])):
        with suppress(FileNotFoundError):  # another process has evicted it
            num_bytes += path.stat().st_size
    return num_bytes


def held(cache: DiskCache, numbers: range) -> list[int]:
    """Return the cached ones of these blobs, without using them."""
    return [number for number in numbers if (cache.folder / blob(number)[0]).exists()]


def test_another_process_reads_a_cached_blob_until_it_is_discarded(cache: DiskCache) -> None:
    cache.discard([blob(0)[0]])  # before the folder exists
    digest, data = blob(1)
    assert cache.get(digest) is None and measure(cache) == 0
    cache.put(digest, data)
    assert cache.get(digest) == DiskCache(cache.folder, 300).get(digest) == data
    cache.put(digest, memoryview(data))
    assert measure(cache) == 100
    cache.put(*blob(0))
    cache.discard([digest, blob(5)[0]])  # of which the second is not there
    assert held(cache, range(6)) == [0]
    cache.put(digest, memoryview(data)[:30], data[30:])
    assert cache.get(digest) == data


def test_the_least_recently_used_makes_room(cache: DiskCache) -> None:
    for number in (0, 1, 2):
        cache.put(*blob(number))
    assert cache.get(blob(0)[0]) is not None
    cache.put(*blob(3))
    assert held(cache, range(4)) == [0, 2, 3]
    cache.put(*blob(4, size=150))
    assert held(cache, range(4)) == [3]
    assert measure(cache) == 250


@pytest.mark.parametrize("size", [0, 1, 100, 101, 300, 301])
def test_the_quota_holds_for_any_size_and_a_larger_blob_evicts_nothing(size: int, cache: DiskCache) -> None:
    for number in (0, 1, 2):
        cache.put(*blob(number))
    digest, data = blob(7, size)
    cache.put(digest, data)
    assert measure(cache) <= 300
    assert cache.get(digest) == (data if size <= 300 else None)
    assert held(cache, range(3)) == ([0, 1, 2] if size in (0, 301) else list(range(1 + (size - 1) // 100, 3)))


def test_a_damaged_file_is_a_miss_and_is_deleted(cache: DiskCache, caplog: pytest.LogCaptureFixture) -> None:
    digest, data = blob(1)
    for damage in (b"", data[:-1], b"x" + data[1:], data + b"x"):
        cache.put(digest, data)
        (cache.folder / digest).write_bytes(damage)
        assert cache.get(digest) is None
        assert files_of(cache.folder) == set()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 4
    cache.put(digest, data)
    assert cache.get(digest) == data


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", ".", ".lock", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_a_malformed_digest_reaches_no_file(name: str, cache: DiskCache, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    cache.put(*blob(1))
    cache.put(name, b"secret")
    assert cache.get(name) is None
    cache.discard([name])
    assert (tmp_path / "outside").read_bytes() == b"secret"
    assert files_of(cache.folder) == {blob(1)[0]}


FORK = multiprocessing.get_context("fork")  # a new interpreter would import the package, which takes seconds


def exit_codes(work: Callable[..., None], *arguments: tuple[object, ...]) -> list[int | None]:
    """Run `work` in one process per tuple of arguments, all at once; 0 means success."""
    processes = [FORK.Process(target=work, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def put_and_be_killed(folder: Path) -> None:
    """Put a blob; the kernel ends the process at the 51st byte of the file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    DiskCache(folder, 300).put(*blob(1))


def test_a_killed_writer_leaves_no_visible_blob(cache: DiskCache) -> None:
    cache.put(*blob(0))
    assert exit_codes(put_and_be_killed, (cache.folder,)) == [-signal.SIGXFSZ]
    [stray] = files_of(cache.folder) - {blob(0)[0]}
    assert stray != blob(1)[0] and (cache.folder / stray).stat().st_size == 50
    assert cache.get(blob(1)[0]) is None and measure(cache) == 100
    cache.put(*blob(2))
    assert files_of(cache.folder) == {blob(0)[0], blob(2)[0]}


def put_on_a_full_disk(folder: Path) -> None:
    """Put a blob; writing the 51st byte of a file fails. Existing blobs can still be read."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lora_store.disk_cache").addHandler(handler)
    cache = DiskCache(folder, 300)
    cache.put(*blob(1))
    assert len(said) == 1 and "could not be written" in said[0] and "too large" in said[0]
    assert cache.get(blob(1)[0]) is None
    assert cache.get(blob(0)[0]) == blob(0)[1]


def test_a_full_disk_disables_only_the_cache(cache: DiskCache) -> None:
    cache.put(*blob(0))
    assert exit_codes(put_on_a_full_disk, (cache.folder,)) == [0]
    assert files_of(cache.folder) == {blob(0)[0]}


def test_an_unusable_folder_disables_only_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = DiskCache(tmp_path / "file" / "cache", 300)
    digest, data = blob(1)
    cache.put(digest, data)
    assert cache.get(digest) is None
    cache.discard([digest])
    assert measure(cache) == 0
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert any("could not be written" in record.getMessage() for record in caplog.records)


def use_at_random(folder: Path, seed: int) -> None:
    """Use the cache randomly; contents are never wrong, the quota holds, and no error occurs."""
    draw, cache, num_hits = random.Random(seed), DiskCache(folder, 1000), 0
    logging.getLogger("lora_store.disk_cache").addFilter(lambda record: sys.exit(record.getMessage()))
    for _ in range(200):
        digest, data = blob(draw.randrange(15), size=150)
        found = cache.get(digest)
        assert found in (None, data)
        num_hits += found is not None
        cache.put(digest, data)
        if draw.random() < 0.05:
            cache.discard([digest])
        assert measure(cache) <= 1000
    assert num_hits


def test_processes_can_put_get_and_evict_concurrently(tmp_path: Path) -> None:
    assert exit_codes(use_at_random, *[(tmp_path, seed) for seed in range(3)]) == [0, 0, 0]
    assert 0 < len(files_of(tmp_path)) <= 6
