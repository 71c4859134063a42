"""A pool that follows its catalogue while it answers.

The encoder changes together with the index, at one generation.

Failures below a LivePool cost time, but no adapter.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lora_store.errors import StoreUnavailable
from lora_store.snapshot import ActiveEncoder, Snapshot
from retriever_svc import EncoderUnusable, IndexSettings, LivePool, SavedIndexes, StaleIndex
from retriever_svc.inverted_lists import InvertedLists
from retriever_svc.live_pool import in_thread
from retriever_svc.pool import Pool
from retriever_svc.saved_index import SavedLists
from tests.retriever_svc.live_pools import DIM, ENCODER, TINY, assert_finds_exactly, names_found, records_of, saved_in
from tests.retriever_svc.pool_fakes import FakeEncoder, Later, Source, live_pool, record_of, snapshot_of

DIAGONAL = np.full(DIM, DIM**-0.5, np.float32)


def test_a_pool_follows_its_catalogue_and_calls_no_encoder() -> None:
    encoder, records = FakeEncoder({}, dim=DIM), records_of(5)
    source = Source(*records[:4])
    pools = live_pool(encoder, source)
    source.commit(*records)
    assert pools.catch_up() == 2
    assert_finds_exactly(pools, records)
    source.commit(*records[:2])
    with pytest.raises(StaleIndex) as caught:
        pools.catch_up(4)
    assert (caught.value.wanted, caught.value.found) == (4, 3)
    assert pools.current.snapshot is source.now
    source.now = snapshot_of(generation=1)
    assert pools.catch_up() == 3, "an older snapshot never replaces a newer one"
    assert len(pools.current.snapshot.records) == 2
    assert encoder.batches == []


def test_an_unreadable_catalogue_does_not_change_the_pool() -> None:
    answers = [snapshot_of(*records_of(2)), StoreUnavailable("endpoint down"), snapshot_of(generation=2)]

    def snapshots() -> Snapshot:
        if isinstance(answer := answers.pop(0), StoreUnavailable):
            raise answer
        return answer

    pools = live_pool(ENCODER, snapshots)
    before = pools.current
    with pytest.raises(StoreUnavailable):
        pools.catch_up()
    assert pools.current is before
    assert pools.catch_up() == 2


def test_searches_continue_while_a_refresh_waits_for_the_catalogue() -> None:
    source, records = Source(), records_of(3)
    source.commit(*records[:2])
    asked, answers = threading.Event(), threading.Event()

    def snapshots() -> Snapshot:
        if source.now.generation == 3:
            asked.set()
            assert answers.wait(120)
        return source.now

    pools = live_pool(ENCODER, snapshots)
    source.commit(*records)
    with ThreadPoolExecutor(1) as executor:
        refresh = executor.submit(pools.catch_up)
        assert asked.wait(120)
        assert names_found(pools, records[0], 9) == names_found(pools, records[0], 2)
        answers.set()
        assert refresh.result(120) == 3
    assert_finds_exactly(pools, records)


def test_every_search_among_refreshes_sees_exactly_one_generation() -> None:
    """Each generation has one adapter with its number, so an answer with two or none would be a mixture."""
    source = Source(record_of("g1", DIAGONAL), *records_of(200))
    pools = live_pool(ENCODER, source, settings=IndexSettings(exact_rows=50, side_rows=5))
    over = threading.Event()

    def search() -> int:
        num_searches = 0
        while not over.is_set() or num_searches == 0:
            pool = pools.current
            [matches] = pool.nearest(DIAGONAL[np.newaxis], 300, "local")
            marks = [match.record.ref.name for match in matches if match.record.ref.name.startswith("g")]
            assert marks == [f"g{pool.snapshot.generation}"]
            assert len(matches) == len(pool.snapshot.records)
            num_searches += 1
        return num_searches

    with ThreadPoolExecutor(2) as executor:
        searches = [executor.submit(search) for _ in range(2)]
        for generation in range(2, 60):
            source.commit(record_of(f"g{generation}", DIAGONAL), *records_of(200 + generation % 7))
            pools.catch_up(generation)
        over.set()
        assert all(search.result(60) for search in searches)


def test_small_pools_give_dead_positions_back_at_once() -> None:
    later, records = Later(), records_of(12)
    source = Source(*records)
    pools = live_pool(ENCODER, source, background=later)
    before = pools.stats().num_bytes
    for number in range(100):
        source.commit(*records, record_of(f"passing{number}", DIAGONAL))
        pools.catch_up()
        source.commit(*records)
        pools.catch_up()
    assert not later.waiting
    assert pools.stats().num_positions <= 12 + 12 // 4
    assert pools.stats().num_bytes == pytest.approx(before, abs=50)
    assert_finds_exactly(pools, records)


def test_lists_are_trained_during_requests_one_training_at_a_time() -> None:
    later, records = Later(), records_of(60)
    source = Source(*records[:30])
    pools = live_pool(ENCODER, source, settings=TINY, background=later)
    assert not later.waiting
    source.commit(*records[:50])
    assert pools.catch_up() == 2  # before the first training
    source.commit(*records[:55])
    pools.catch_up()
    assert len(later.waiting) == 1
    assert_finds_exactly(pools, records[:55])
    source.commit(*records[5:45])
    pools.catch_up()
    later.run()
    stats = pools.stats()
    assert (stats.has_lists, stats.num_live, stats.num_unlisted, stats.generation) == (False, 40, 40, 4)
    for first, last, num_unlisted in [(5, 50, 45), (0, 50, 5), (0, 55, 10), (0, 60, 15)]:
        source.commit(*records[first:last])
        pools.catch_up()
        assert pools.stats().num_unlisted == num_unlisted
        assert len(later.waiting) == (num_unlisted > 10)
        later.run()
        assert pools.stats().has_lists
        assert_finds_exactly(pools, records[first:last])
    assert pools.stats().num_unlisted == 0


def test_changes_committed_during_training_are_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rival commits from inside the training, because only the training knows its own timing."""
    later, records = Later(), records_of(60)
    source = Source(*records[:50])
    pools = live_pool(ENCODER, source, settings=TINY, background=later)
    train = InvertedLists.train

    def overtaken(vectors: np.ndarray) -> InvertedLists:
        source.commit(*records[10:60])
        assert pools.catch_up() == source.now.generation
        return train(vectors)

    monkeypatch.setattr(InvertedLists, "train", overtaken)
    later.waiting.pop(0)()
    assert pools.stats().has_lists
    assert pools.stats().generation == 2
    assert_finds_exactly(pools, records[10:])


def test_failed_training_is_retried_and_dead_positions_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    later, records = Later(), records_of(100)
    source = Source(*records)
    pools = live_pool(ENCODER, source, settings=TINY, background=later)

    def fails(vectors: np.ndarray) -> InvertedLists:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(InvertedLists, "train", fails)
        with pytest.raises(MemoryError):
            later.run()
    assert_finds_exactly(pools, records)
    pools.catch_up()
    later.run()
    assert pools.stats().has_lists
    source.commit(*records[30:])
    pools.catch_up()
    assert pools.stats().num_positions == 100
    later.run()
    assert pools.stats().num_positions == 70
    assert_finds_exactly(pools, records[30:])


def test_a_thread_trains_by_default() -> None:
    done = threading.Event()
    in_thread(done.set)
    assert done.wait(120)


def test_a_new_replica_loads_trained_lists_and_the_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later, records = Later(), records_of(70)
    source = Source(*records[:60])
    live_pool(ENCODER, source, settings=TINY, background=later, saved=saved_in(tmp_path))
    later.run()
    updated = record_of("a5", DIAGONAL, version="2")
    now = [updated, *records[6:65]]
    source.commit(*reversed(now))
    monkeypatch.setattr(InvertedLists, "train", None)  # no training may happen here
    pools = live_pool(ENCODER, source, settings=TINY, background=later, saved=saved_in(tmp_path))
    stats = pools.stats()
    assert (stats.has_lists, stats.num_live, stats.num_unlisted, stats.generation) == (True, 60, 6, 2)
    assert not later.waiting
    assert_finds_exactly(pools, now)
    assert names_found(pools, updated, 1) == ["a5"]


def test_with_a_large_difference_new_lists_are_trained(tmp_path: Path) -> None:
    later, records = Later(), records_of(120)
    source = Source(*records[:60])
    live_pool(ENCODER, source, settings=TINY, background=later, saved=saved_in(tmp_path))
    later.run()
    source.commit(*records[50:])
    pools = live_pool(ENCODER, source, settings=TINY, background=later, saved=saved_in(tmp_path))
    assert_finds_exactly(pools, records[50:])
    later.run()
    assert pools.stats().num_unlisted == 0
    assert_finds_exactly(pools, records[50:])
    saved = saved_in(tmp_path).newest(ENCODER.identity)
    assert saved is not None
    assert (saved.generation, len(saved.refs)) == (2, 70)


@pytest.mark.parametrize("harm", ["missing", "damaged", "other encoder"])
def test_without_a_usable_file_lists_are_trained(tmp_path: Path, harm: str) -> None:
    later, records = Later(), records_of(60)
    encoder = FakeEncoder({}, dim=DIM, identity="other") if harm == "other encoder" else ENCODER
    foreign = records_of(60, encoder="other")
    live_pool(ENCODER, Source(*records), settings=TINY, background=later, saved=saved_in(tmp_path))
    later.run()
    [path] = (tmp_path / "index").iterdir()
    if harm == "missing":
        path.unlink()
    if harm == "damaged":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    pool = foreign if harm == "other encoder" else records
    pools = live_pool(encoder, Source(*pool), settings=TINY, background=later, saved=saved_in(tmp_path))
    assert not pools.stats().has_lists
    assert_finds_exactly(pools, pool)
    later.run()
    assert pools.stats().has_lists
    assert saved_in(tmp_path).newest(encoder.identity) is not None


def test_an_unreachable_location_costs_only_a_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "index").write_text("a file where the folder should be")
    later, records = Later(), records_of(60)
    pools = live_pool(ENCODER, Source(*records), settings=TINY, background=later, saved=saved_in(tmp_path))
    later.run()
    assert pools.stats().has_lists
    assert "cannot save the trained index" in caplog.text
    assert_finds_exactly(pools, records)


NEW = ActiveEncoder("new-model", "new")


class Models:
    """Loads the old encoder under any name except `new-model`, which exists once the test adds it."""

    def __init__(self) -> None:
        self.new: FakeEncoder | None = None

    def __call__(self, model: str) -> FakeEncoder:
        if model != NEW.model:
            return ENCODER
        if self.new is None:
            raise EncoderUnusable(model, "there is none")
        return self.new


def test_the_log_counts_adapters_that_another_encoder_embedded(caplog: pytest.LogCaptureFixture) -> None:
    live_pool(ENCODER, Source(*records_of(1), *records_of(2, "b", encoder="another")), model="mine")
    assert "auto does not find 2 of 3 adapters" in caplog.text
    assert "`loraretriever pool reindex --encoder mine`" in caplog.text


def test_encoder_and_index_change_at_one_generation() -> None:
    models, source = Models(), Source(*records_of(5))
    models.new = FakeEncoder({}, dim=3, identity="new")
    pools = LivePool(models, source)
    old = pools.current
    renewed = [record_of(f"a{n}", vector, encoder="new") for n, vector in enumerate(np.eye(3, dtype=np.float32))]
    source.commit(*renewed, encoder=NEW)
    assert pools.catch_up() == 2
    new = pools.current
    assert (new.snapshot.generation, new.encoder, new.index.num_live) == (2, models.new, 3)
    assert [m.record.ref.name for m in new.nearest(np.eye(3, dtype=np.float32)[1:2], 1, "local")[0]] == ["a1"]
    assert (old.snapshot.generation, old.encoder, old.index.num_live) == (1, ENCODER, 5), "searches end as they began"


def test_the_old_generation_stays_in_service_until_the_new_encoder_loads() -> None:
    models, records = Models(), records_of(5)
    source = Source(*records)
    pools = LivePool(models, source)
    source.commit(*records_of(4, encoder="new"), encoder=NEW)
    for _ in range(2):
        with pytest.raises(EncoderUnusable, match="new-model"):
            pools.catch_up()
    assert pools.stats().generation == 1
    assert_finds_exactly(pools, records)
    models.new = FakeEncoder({}, dim=DIM, identity="new")
    assert pools.catch_up() == 2
    assert (pools.stats().encoder, pools.stats().num_live) == ("new", 4)
    loaded: list[str] = []
    again = LivePool(lambda model: loaded.append(model) or models.new, source, model="the config's")
    assert (loaded, again.stats().num_live) == (["new-model"], 4), "the start uses the active encoder"


def test_a_training_that_ends_after_its_encoder_was_replaced_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    models, later = Models(), Later()
    models.new = FakeEncoder({}, dim=DIM, identity="new")
    source = Source(*records_of(60))
    pools = LivePool(models, source, settings=TINY, background=later)
    renewed = records_of(60, seed=1, encoder="new")
    train = InvertedLists.train

    def overtaken(vectors: np.ndarray) -> InvertedLists:
        source.commit(*renewed, encoder=NEW)
        pools.catch_up()
        return train(vectors)

    with monkeypatch.context() as patch:
        patch.setattr(InvertedLists, "train", overtaken)
        later.waiting.pop(0)()
    assert not pools.stats().has_lists
    assert_finds_exactly(pools, renewed)
    later.run()  # that of the new encoder
    assert pools.stats().has_lists
    assert_finds_exactly(pools, renewed)


def test_a_generation_that_cannot_be_derived_is_built_from_scratch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: object) -> Pool:
        raise MemoryError

    records = records_of(6)
    source = Source(*records[:3])
    pools = live_pool(ENCODER, source)
    monkeypatch.setattr(Pool, "after", no_memory)
    source.commit(*records[1:])
    assert pools.catch_up() == 2
    assert_finds_exactly(pools, records[1:])
    assert "building a new one" in caplog.text


def test_a_saved_index_of_another_release_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Unreadable(SavedIndexes):
        def newest(self, encoder: str) -> SavedLists | None:
            raise RuntimeError("index type not recognized")

    records, later = records_of(70), Later()
    unreadable = Unreadable(saved_in(tmp_path)._files)
    pools = live_pool(ENCODER, Source(*records), settings=TINY, background=later, saved=unreadable)
    assert_finds_exactly(pools, records)
    assert "cannot use the saved index" in caplog.text
