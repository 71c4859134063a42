"""A fold replaces the events so far by their result: the same pool, opened at the cost of the live adapters."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from lora_store import GenerationGone, Location, Snapshot
from lora_store.catalogue import Catalogue
from lora_store.event_table import EventTable
from lora_store.events import (
    Event,
    Fold,
    Keep,
    Publish,
    Withdraw,
    is_whole_fold,
    make_fold_table,
    make_table,
    read_dated_events,
)
from lora_store.files import Files
from tests.lora_store.builders import IN_A_FOLDER, LATER, NOON, MakeRecord, draw_events, embedding


def _check_equal(found: Snapshot, wanted: Snapshot) -> None:
    """Check that the pools are equal, in the same order, down to the last array."""
    assert found == wanted
    assert list(found.records) == list(wanted.records)
    for key, record in wanted.records.items():
        assert [r.approved for r in found.versions(key)] == [r.approved for r in wanted.versions(key)]
        if record.embedding is not None:
            ours = found.records[key].embedding
            assert ours.vector.tolist() == record.embedding.vector.tolist()
            assert ours.own_scores.tolist() == record.embedding.own_scores.tolist()
    for ref, wants in wanted.pending.items():
        assert found.pending[ref].vector.tolist() == wants.vector.tolist()


Commit = Callable[..., list[Snapshot]]


@pytest.fixture
def history(location: Location, make_record: MakeRecord) -> Commit:
    """Commit random events; return the slow fold of all of them at every generation."""

    def commit(catalogue: Catalogue, number: int, seed: int = 0, start: int = 0) -> list[Snapshot]:
        draw, seen = random.Random(seed), []
        for step in range(start, start + number):
            catalogue.commit(lambda snap, step=step: draw_events(draw, snap, make_record, step))
            seen.append(catalogue.snapshot())
        return seen

    return commit


@pytest.mark.parametrize(("store_uri", "seed"), [("folder", 0), ("folder", 1), ("s3", 2)], indirect=["store_uri"])
def test_a_folded_pool_equals_the_pool_of_all_events(
    location: Location, tmp_path: Path, make_record: MakeRecord, seed: int
) -> None:
    folding, slow = Catalogue(location, min_tail=6), Snapshot(0, {})
    draw = random.Random(seed)
    for number in range(12):
        wanted = []

        def events(snapshot: Snapshot, wanted: list[Event] = wanted, number: int = number) -> list[Event]:
            wanted[:] = draw_events(draw, snapshot, make_record, number)
            return wanted

        generation = folding.commit(events)
        read = [event for _, event in read_dated_events(make_table(wanted, generation), after=0)]
        slow = slow.after(read, generation)
    folds = [file.name for file in Files(location).entries() if file.name.startswith("fold-")]
    assert len(folds) >= 2
    for found in (folding.snapshot(), Catalogue(location).snapshot()):
        _check_equal(found, Snapshot(found.generation, slow.records, slow.previous, slow.encoder, slow.pending))


@IN_A_FOLDER
def test_a_fold_in_several_files_says_whether_it_is_whole(
    location: Location, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_store.catalogue.FOLD_PART_ROWS", 4)
    catalogue = Catalogue(location, min_tail=6)
    catalogue.commit(lambda _: [Publish(make_record(f"a{number}")) for number in range(7)])
    _check_equal(Catalogue(location).snapshot(), catalogue.snapshot())
    table = EventTable(location)
    parts = [table._read_rows(table._contents([name])) for name in table._data_files()]
    assert len(parts) == 3 and is_whole_fold(pa.concat_tables(parts))
    numbers = [number for part in parts for number in part["row"].to_pylist()]
    assert len(set(numbers)) == len(numbers), "also those of commits"
    for missing in range(3):
        assert not is_whole_fold(pa.concat_tables(parts[:missing] + parts[missing + 1 :]))


@IN_A_FOLDER
def test_opening_reads_live_adapters_and_no_withdrawn_embedding(location: Location, make_record: MakeRecord) -> None:
    catalogue = Catalogue(location, min_tail=20)
    for number in range(15):
        name = f"n{number % 3}"
        catalogue.commit(
            lambda snapshot, number=number, name=name: [
                *[Publish(make_record(f"passing{number}-{i}", embedding=embedding(777.0 + i))) for i in range(3)],
                Publish(make_record(name, digest=f"{number:064x}", embedding=embedding(1.0))),
            ]
        )
        gone = [record.ref for key, record in catalogue.snapshot().records.items() if key[1].startswith("passing")]
        catalogue.commit(lambda snapshot, gone=gone: [Withdraw(ref, "me", NOON) for ref in gone])
    assert len(catalogue.snapshot().records) == 3
    rows = EventTable(location).refresh()[0]  # which an opening reads
    assert rows.filter(pc.is_valid(rows["name"])).num_rows < 50  # of 105
    catalogue.vacuum(LATER)
    rows = EventTable(location).refresh()[0]
    assert [value[0] for value in rows["embedding"].to_pylist() if value is not None] == [1.0] * 9
    data = [file.name for file in Files(location).entries() if file.name.endswith("zstd.parquet")]
    assert len(data) == 1
    _check_equal(Catalogue(location).snapshot(), catalogue.snapshot())


def test_an_idle_replica_catches_up_over_folds(location: Location, history: Commit, make_record: MakeRecord) -> None:
    writer, idle, fresh = (Catalogue(location, min_tail=3) for _ in range(3))
    writer.commit(lambda snapshot: [Publish(make_record(f"untouched{number}")) for number in range(4)])
    history(writer, 2)
    idle.snapshot()
    history(writer, 5, seed=1, start=2)
    fresh.snapshot()
    before = [replica.snapshot().records for replica in (idle, fresh)]
    writer.vacuum(LATER)
    history(writer, 2, seed=2, start=7)
    for replica, old in zip((idle, fresh), before, strict=True):
        _check_equal(replica.snapshot(), writer.snapshot())
        for number in range(4):  # an index changes only where the pool changed
            key = ("local", f"untouched{number}")
            assert replica.snapshot().records[key] is old[key]
    _check_equal(Catalogue(location).snapshot(), writer.snapshot())
    history(idle, 2, seed=3, start=9)
    _check_equal(Catalogue(location).snapshot(), writer.snapshot())


@IN_A_FOLDER
def test_an_up_to_date_replica_does_not_read_the_fold(location: Location, make_record: MakeRecord) -> None:
    writer, replica = Catalogue(location, min_tail=5), Catalogue(location)
    for number in range(6):
        writer.commit(lambda snapshot, number=number: [Publish(make_record(f"a{number}"))])
        replica.snapshot()
    files = Files(location)
    folds = [file.name for file in files.entries() if file.name.startswith("fold-")]
    assert folds
    files.delete(folds)
    assert replica.snapshot().records == writer.snapshot().records


@IN_A_FOLDER
def test_every_generation_is_readable_after_folds_until_a_vacuum(location: Location, history: Commit) -> None:
    catalogue = Catalogue(location, min_tail=4)
    seen = history(catalogue, 9)
    reopened = Catalogue(location)
    for snapshot in seen:
        _check_equal(reopened.snapshot_at(snapshot.generation), snapshot)
    catalogue.vacuum(LATER)
    newest = catalogue.snapshot().generation
    with pytest.raises(GenerationGone, match=f"generation {seen[0].generation} .* the newest is {newest}"):
        reopened.snapshot_at(seen[0].generation)


def test_rows_survive_a_compaction_that_merges_a_fold_with_later_events(location: Location, history: Commit) -> None:
    catalogue = Catalogue(location, min_tail=4)
    history(catalogue, 6)
    idle = Catalogue(location)
    history(catalogue, 3, seed=1, start=6)
    EventTable(location).compact()
    for found in (Catalogue(location).snapshot(), idle.snapshot(), catalogue.snapshot()):
        _check_equal(found, catalogue.snapshot())


def test_writers_that_fold_at_the_same_time_lose_nothing(location: Location, make_record: MakeRecord) -> None:
    def work(who: int) -> None:
        catalogue = Catalogue(location, min_tail=4)
        for number in range(6):
            record = make_record(f"w{who}-{number}")
            catalogue.commit(lambda snapshot, record=record: [Publish(record)])
            if number % 3 == 0:
                catalogue.commit(lambda snapshot, record=record: [Withdraw(record.ref, "me", NOON)])

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))
    wanted = {("local", f"w{who}-{number}") for who in range(3) for number in range(6) if number % 3}
    reopened = Catalogue(location)
    assert set(reopened.snapshot().records) == wanted
    reopened.vacuum(LATER)
    assert set(Catalogue(location).snapshot().records) == wanted


def test_two_folds_of_one_generation_keep_each_version_once(location: Location, make_record: MakeRecord) -> None:
    catalogue = Catalogue(location)
    for digest in "abc":
        catalogue.commit(lambda _, digest=digest: [Publish(make_record(digest=digest * 64))])
    wanted = catalogue.snapshot()
    covered = [file.name for file in Files(location).entries() if file.name.startswith("part-")]
    parts = [make_fold_table(list(wanted.folded()), wanted.generation, {})]
    for _ in range(2):
        EventTable(location).fold(parts, wanted.generation, covered)
    assert Catalogue(location).snapshot().versions(("local", "poet")) == wanted.versions(("local", "poet"))
    assert len(wanted.versions(("local", "poet"))) == 3


def test_a_version_that_two_folds_of_a_pool_kept_is_read_once(make_record: MakeRecord) -> None:
    older = Keep(make_record(digest="e" * 64), is_live=False)
    found = Snapshot(0, {}).after([Fold(None, None), Keep(make_record(), is_live=True), older, older], 1)
    assert [record.ref for record in found.versions(("local", "poet"))] == [make_record().ref, older.record.ref]


def test_readers_do_not_wait_for_a_write(location: Location, make_record: MakeRecord) -> None:
    class Slow(EventTable):
        """An append that waits for permission to end."""

        def append(self, rows: pa.Table, version: int) -> bool:
            writing.set()
            assert may_end.wait(120)
            return super().append(rows, version)

    writing, may_end = threading.Event(), threading.Event()
    catalogue = Catalogue(location, open_table=Slow)
    with ThreadPoolExecutor(2) as threads:
        written = threads.submit(catalogue.commit, lambda snapshot: [Publish(make_record())])
        assert writing.wait(120)
        try:
            assert threads.submit(catalogue.snapshot).result(120).generation == 0  # during the append
        finally:
            may_end.set()
        assert written.result() == catalogue.snapshot().generation == 1
