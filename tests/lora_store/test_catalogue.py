from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from lora_store import AdapterRecord, AdapterRefused, Location, VersionConflict
from lora_store.catalogue import Catalogue, History
from lora_store.event_table import EventTable
from lora_store.events import Event, Fold, Publish, make_fold_table, make_table
from lora_store.files import Files
from lora_store.snapshot import Snapshot
from tests.lora_store.builders import IN_A_FOLDER, MakeRecord, embedding


def _publish(*records: AdapterRecord) -> Callable[[Snapshot], list[Event]]:
    return lambda snapshot: [Publish(record) for record in records]


def test_a_record_comes_back_as_it_was_committed(location: Location, make_record: MakeRecord) -> None:
    catalogue = Catalogue(location)
    before = catalogue.snapshot()
    assert catalogue.snapshot() is before, "without changes it is the same object"
    full = make_record()
    bare = make_record("bare", template=None, embedding=None, probe_shift=None, tags=(), ranks=())
    assert Catalogue(location).commit(_publish(full, bare)) == 1
    after = catalogue.snapshot()
    assert after is catalogue.snapshot() is not before
    assert (before.generation, dict(before.records)) == (0, {})
    assert after.records["local", "poet"] == replace(full, generation=1)
    assert after.records["local", "bare"] == replace(bare, generation=1)
    travelled = pickle.loads(pickle.dumps(after))
    assert travelled == after and pickle.loads(pickle.dumps(before)) == before
    with pytest.raises(TypeError):
        travelled.records["local", "x"] = full


@IN_A_FOLDER
def test_no_events_and_an_error_of_the_rule_commit_nothing(location: Location, make_record: MakeRecord) -> None:
    def refuse(snapshot: Snapshot) -> list[Event]:
        raise AdapterRefused("poet", ["no"])

    catalogue = Catalogue(location)
    with pytest.raises(AdapterRefused):
        catalogue.commit(refuse)
    assert catalogue.commit(_publish(make_record())) == 1
    assert catalogue.commit(_publish()) == catalogue.snapshot().generation == 1


def test_every_generation_can_be_seen_again_after_a_compaction(location: Location, make_record: MakeRecord) -> None:
    catalogue, seen = Catalogue(location), []
    for number in range(4):
        catalogue.commit(_publish(make_record("poet", digest=f"{number}" * 64), make_record(f"a{number}")))
        seen.append(catalogue.snapshot())
    assert Catalogue(location).snapshot() == seen[-1]
    assert (seen[-1].generation, len(seen[-1].records)) == (4, 5)
    EventTable(location).compact()
    catalogue.commit(_publish(make_record("late")))
    reopened = Catalogue(location)
    assert [reopened.snapshot_at(snapshot.generation) for snapshot in seen] == seen
    assert reopened.snapshot_at(0) == Snapshot(0, {})
    newest = reopened.snapshot()
    assert reopened.snapshot_at(newest.generation) is newest


@IN_A_FOLDER
def test_rows_of_a_commit_share_its_generation_and_the_last_one_wins(
    location: Location, make_record: MakeRecord
) -> None:
    catalogue = Catalogue(location)
    versions = [make_record(digest=f"{number:064}") for number in range(50)]
    assert catalogue.commit(_publish(*versions)) == 1
    [record] = catalogue.snapshot().records.values()
    assert (record.ref.digest, record.generation) == (versions[-1].ref.digest, 1)


@pytest.mark.parametrize("same_object", [False, True], ids=["another process", "another thread"])
def test_a_stale_writer_checks_again_and_nothing_is_lost(
    location: Location, make_record: MakeRecord, same_object: bool
) -> None:
    catalogue = Catalogue(location)
    rival = catalogue if same_object else Catalogue(location)
    seen = []

    def events(snapshot: Snapshot) -> list[Event]:
        seen.append(sorted(name for _, name in snapshot.records))
        if len(seen) <= 2:
            rival.commit(_publish(make_record(f"rival{len(seen)}")))
        return [Publish(make_record("ours"))]

    assert catalogue.commit(events) == 3
    assert seen == [[], ["rival1"], ["rival1", "rival2"]]
    generations = {name: record.generation for (_, name), record in Catalogue(location).snapshot().records.items()}
    assert generations == {"rival1": 1, "rival2": 2, "ours": 3}


@IN_A_FOLDER
def test_a_writer_that_always_loses_the_race_gives_up(location: Location, make_record: MakeRecord) -> None:
    pauses = []
    catalogue, rival = Catalogue(location, pauses.append, max_attempts=10), Catalogue(location)

    def events(snapshot: Snapshot) -> list[Event]:
        rival.commit(_publish(make_record(f"r{snapshot.generation}")))
        return [Publish(make_record("ours"))]

    with pytest.raises(VersionConflict) as caught:
        catalogue.commit(events)
    snapshot = Catalogue(location).snapshot()
    assert ("local", "ours") not in snapshot.records
    assert len(snapshot.records) == caught.value.attempts == len(pauses) == 10
    assert max(pauses) <= 1 and len(set(pauses)) == len(pauses)  # random pauses, so that rivals separate


@IN_A_FOLDER
def test_a_refresh_does_not_open_files_again(location: Location, make_record: MakeRecord) -> None:
    catalogue, rival = Catalogue(location), Catalogue(location)
    catalogue.commit(_publish(make_record("old")))
    assert rival.snapshot() == catalogue.snapshot()
    table = Files(location)
    table.delete([file.name for file in table.entries() if re.fullmatch(r"part-.*\.parquet", file.name)])
    rival.commit(_publish(make_record("new")))
    assert sorted(name for _, name in catalogue.snapshot().records) == ["new", "old"]


def test_compaction_keeps_records_and_order_also_for_late_readers(
    folder_uri: str, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_store.catalogue.COMPACT_EVERY", 20)
    location = Location(folder_uri)
    writer, late = Catalogue(location), Catalogue(location)
    for number in range(23):
        writer.commit(_publish(make_record("poet", digest=f"{number:064}"), make_record(f"a{number}")))
        if number == 8:
            late.snapshot()
    assert writer.snapshot() == late.snapshot() == Catalogue(location).snapshot()
    assert writer.snapshot().records["local", "poet"].ref.digest == f"{22:064}"
    assert len(writer.snapshot().records) == 24
    names = [file.name for file in Files(location).entries()]
    assert [name for name in names if name.endswith(".checkpoint.parquet")]
    generations = [record.generation for record in writer.snapshot().records.values()]
    assert max(generations) == 24  # one version of the table is the compaction


@IN_A_FOLDER
def test_a_late_compaction_does_not_bring_old_versions_back(location: Location, make_record: MakeRecord) -> None:
    catalogue = Catalogue(location)
    catalogue.commit(_publish(make_record("poet", digest="1" * 64)))
    catalogue.commit(_publish(make_record("other")))
    compactor = DeltaTable(location.delta_uri, storage_options=location.storage_options)
    catalogue.commit(_publish(make_record("poet", digest="2" * 64)))
    before = catalogue.snapshot()
    assert compactor.optimize.compact()["numFilesRemoved"] == 2
    after = catalogue.snapshot()
    assert (after.generation, after.records) == (4, before.records)


def test_the_log_grows_by_less_than_2_kb_an_event(location: Location, make_record: MakeRecord) -> None:
    catalogue, log = Catalogue(location), Files(location.child("_delta_log"))
    before = sum(file.num_bytes for file in log.entries())
    for number in range(10):
        catalogue.commit(_publish(make_record(f"a{number}", embedding=embedding(*range(384)))))
    grown = sum(file.num_bytes for file in log.entries()) - before
    assert 0 < grown / 10 < 2048


def test_events_count_until_a_fold_replaces_them(make_record: MakeRecord) -> None:
    history = History()
    history.add(make_table([Publish(make_record("a")), Publish(make_record("b"))], 1, "one"), after=0)
    history.add(make_table([Publish(make_record("c"))], 2, "two"), after=1)
    assert (history.num_events, history.commits) == (3, {"one": 1, "two": 2})
    history.add(make_fold_table([Fold(None, None)], 1, {"one": 1}), after=2)
    assert history.num_events == 1
    history.forget_until(2)
    assert (history.num_events, history.commits) == (0, {"one": 1, "two": 2})


def test_only_recent_commits_are_remembered_also_after_a_compaction_is_read(make_record: MakeRecord) -> None:
    """The compacted file has every commit, so also those that were forgotten."""
    history = History()
    commits = [make_table([Publish(make_record())], number, f"c{number}") for number in range(1, 301)]
    for number, rows in enumerate(commits, start=1):
        history.add(rows, after=number - 1)
    assert list(history.commits.values()) == list(range(45, 301))
    history.add(pa.concat_tables(commits), after=300)
    assert list(history.commits.values()) == list(range(45, 301))
