"""A full disk is emptied by the store itself."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lora_store import Location, LoraStore
from lora_store.ballast import FOLDER, NUM_FILES, Ballast
from lora_store.catalogue import CATALOGUE
from lora_store.errors import StoreFull
from lora_store.files import Files
from tests.lora_store.builders import BASE, MakeFolder, embedding
from tests.lora_store.publishing import publish

_DISK_BYTES = 3 << 20
_BLOCK_BYTES = 4096


@pytest.fixture(params=["tmpfs", "simulated"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of a disk of 3 MiB: a real one where this process may mount one, and a simulated one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "simulated":
        _limit(monkeypatch, folder)
        yield folder
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _limit(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let a new file of the store fail where the disk has no room for 4 blocks."""
    opened = os.open

    def limited(path: str, flags: int, mode: int = 0o777, **options: int) -> int:
        if flags & os.O_CREAT and Path(path).is_relative_to(folder):
            sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
            used = sum(-(-size // _BLOCK_BYTES) * _BLOCK_BYTES for size in sizes)
            if used + 4 * _BLOCK_BYTES > _DISK_BYTES:
                raise OSError(errno.ENOSPC, "No space left on device", path)
        return opened(path, flags, mode, **options)

    patch.setattr(os, "open", limited)


def _fill_up(disk: Path) -> None:
    """Fill the disk with a file that is not the store's."""
    with open(disk / "other", "wb", buffering=0) as file:
        for num_bytes in (1 << 16, 1 << 12, 1):
            try:
                while sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()) < _DISK_BYTES:
                    file.write(b"x" * num_bytes)
            except OSError:
                continue


def _store(disk: Path) -> LoraStore:
    return LoraStore(str(disk / "store"), accepts_base=[BASE])


def test_withdrawing_and_collecting_empty_a_full_disk(disk: Path, make_folder: MakeFolder) -> None:
    store = _store(disk)
    for seed, name in enumerate(["poet", "coder", "stays"]):
        publish(store, make_folder(name, seed, inputs=tuple(os.urandom(4000).hex() for _ in range(50))), name)
    _fill_up(disk)
    with pytest.raises(StoreFull):
        publish(store, make_folder("late", 9), "late")
    assert sorted(name for _, name in store.snapshot().records) == ["coder", "poet", "stays"]
    for name in ("poet", "coder"):
        gone = store.withdraw("local", [name], "me")
        assert [record.ref.name for record in gone.records] == [name]
    swept = store.sweep(gone.records[0].blobs)
    assert len(swept) == 2
    collected = store.gc(0)
    assert collected.num_blobs == 2
    publish(store, make_folder("late", 9), "late")
    reopened = _store(disk)
    assert sorted(name for _, name in reopened.snapshot().records) == ["late", "stays"]
    assert {check.problem for check in reopened.verify()} == {None}


def test_a_collection_ends_where_the_reserve_has_no_room_for_a_fold(disk: Path, make_folder: MakeFolder) -> None:
    store, folder = _store(disk), make_folder()
    staged = [store.stage(folder, name=f"poet-{number}") for number in range(40)]
    store.commit(staged, [embedding(*np.random.standard_normal(8192)) for _ in staged], [1.0] * len(staged), "me")
    catalogue = Files(Location(str(disk / "store" / CATALOGUE)))
    size = max(file.num_bytes for file in catalogue.entries())
    assert size > len(list((disk / "store" / FOLDER).iterdir())) * (64 << 10), "a fold is larger than the reserve"
    _fill_up(disk)
    assert store.gc(0).num_blobs == 0
    assert len(store.withdraw("local", ["poet-0"], "me").records) == 1
    assert len(_store(disk).snapshot().records) == len(staged) - 1


def test_the_reserve_is_full_again_once_there_is_room(disk: Path, make_folder: MakeFolder) -> None:
    store = _store(disk)
    publish(store, make_folder(), "poet")
    reserve = disk / "store" / FOLDER
    assert len(list(reserve.iterdir())) == NUM_FILES
    _fill_up(disk)
    store.withdraw("local", ["poet"], "me")
    assert 0 < len(list(reserve.iterdir())) < NUM_FILES
    (disk / "other").unlink()
    store.gc(0)
    assert len(list(reserve.iterdir())) == NUM_FILES


def test_a_change_that_never_fits_is_full_after_the_reserve(folder_uri: str) -> None:
    ballast = Ballast(Location(folder_uri))
    ballast.fill()
    calls = []

    def change() -> None:
        calls.append(len(Files(Location(folder_uri).child(FOLDER)).entries()))
        raise StoreFull("No space left on device")

    with pytest.raises(StoreFull):
        ballast.spend(change)
    assert calls == list(range(NUM_FILES, -1, -1))


def test_a_bucket_needs_no_reserve(location: Location) -> None:
    ballast = Ballast(location)
    ballast.fill()
    assert len(Files(location).entries()) == (NUM_FILES if location.is_local else 0)
    assert ballast.spend(lambda: 7) == 7
