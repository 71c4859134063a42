from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from lora_store.adapter import AdapterRef
from lora_store.errors import StoreUnavailable
from lora_store.files import Files
from lora_store.location import Location
from retriever_svc import SavedIndexes
from retriever_svc.encoder import unit_rows
from retriever_svc.inverted_lists import InvertedLists
from retriever_svc.saved_index import SavedLists
from tests.retriever_svc.pool_fakes import digest_of

VECTORS = unit_rows(np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32))
LISTS = InvertedLists.train(VECTORS)
REFS = tuple(AdapterRef(f"tenant-{n % 3}", f"name.{n}", digest_of(str(n))) for n in range(200))


def indexes_in(folder: Path) -> SavedIndexes:
    return SavedIndexes(Files(Location(str(folder)).child("index")))


def lists_of(generation: int, encoder: str = "enc") -> SavedLists:
    return SavedLists(generation, encoder, REFS, LISTS.to_bytes())


def files_in(folder: Path) -> list[Path]:
    return sorted((folder / "index").iterdir())


def test_a_saved_index_is_read_back(tmp_path: Path) -> None:
    assert indexes_in(tmp_path).newest("enc") is None
    indexes_in(tmp_path).save(lists_of(7))
    saved = indexes_in(tmp_path).newest("enc")
    assert saved is not None
    assert (saved.generation, saved.encoder, saved.refs) == (7, "enc", REFS)
    lists = saved.restored(range(200))
    part = lists.part_of(np.ones(200, np.bool_))
    for query in VECTORS[:5]:
        for found, expected in zip(lists.best(query, 9, part, 4), LISTS.best(query, 9, part, 4), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_the_newest_of_this_encoder_is_read_and_two_files_are_kept(tmp_path: Path) -> None:
    indexes = indexes_in(tmp_path)
    for generation, encoder in [(3, "enc"), (20, "other"), (100, "enc")]:
        indexes.save(lists_of(generation, encoder))
        assert len(files_in(tmp_path)) <= 2
    assert [(s.generation if (s := indexes.newest(e)) else None) for e in ("enc", "other", "none")] == [100, 20, None]
    for generation in (108, 109, 2):
        indexes.save(lists_of(generation))
    assert [int(path.name[:20]) for path in files_in(tmp_path)] == [108, 109], "a late save replaces no newer one"


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_damaged_file_is_logged_and_the_previous_one_is_read(
    tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    indexes = indexes_in(tmp_path)
    indexes.save(lists_of(1))
    indexes.save(lists_of(2))
    newest = files_in(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    data[place] ^= 1
    newest.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        saved = indexes.newest("enc")
    assert saved is not None
    assert saved.generation == 1
    assert newest.name in caplog.text


@pytest.mark.parametrize("length", [0, 10, 5000])
def test_a_truncated_file_is_never_passed_to_faiss(tmp_path: Path, length: int) -> None:
    indexes_in(tmp_path).save(lists_of(1))
    [path] = files_in(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    assert indexes_in(tmp_path).newest("enc") is None


@pytest.mark.parametrize(("hours", "is_left"), [(0.5, True), (2, False)])
def test_other_files_stay_and_a_killed_save_is_cleared_away(tmp_path: Path, hours: float, is_left: bool) -> None:
    now = datetime.now(UTC) + timedelta(hours=hours)
    indexes = SavedIndexes(Files(Location(str(tmp_path)).child("index")), now=lambda: now)
    indexes.save(lists_of(5))
    half, other = (tmp_path / "index" / name for name in (f".{4:020d}-{'a' * 64}.lists-v1.{'b' * 32}", "notes.txt"))
    half.write_text("half")
    other.write_text("text")
    indexes.save(lists_of(6))
    assert half.exists() is is_left
    assert other.exists()
    assert (saved := indexes.newest("enc")) is not None
    assert saved.generation == 6


def test_replicas_that_save_at_once_do_no_harm(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: indexes_in(tmp_path).save(lists_of(n % 3)), range(12)))
    assert [int(path.name[:20]) for path in files_in(tmp_path)] == [1, 2]
    assert (saved := indexes_in(tmp_path).newest("enc")) is not None
    assert saved.generation == 2


def test_a_file_deleted_during_the_search_is_none(tmp_path: Path) -> None:
    indexes = indexes_in(tmp_path)
    indexes.save(lists_of(1))
    [path] = files_in(tmp_path)
    path.unlink()
    assert indexes._read(path.name) is None


def test_a_location_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("a file where the folder should be")
    with pytest.raises(StoreUnavailable):
        indexes_in(tmp_path).save(lists_of(1))
