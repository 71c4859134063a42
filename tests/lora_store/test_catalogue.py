from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from deltalake import DeltaTable

from lora_store import (
    AdapterNotFound,
    AdapterRecord,
    AdapterRefused,
    Catalogue,
    Event,
    Location,
    Publish,
    VersionConflict,
)
from lora_store.event_table import EventTable
from lora_store.files import Files
from lora_store.snapshot import Snapshot
from tests.lora_store.builders import MakeRecord, embedding


def _publish(*records: AdapterRecord) -> Callable[[Snapshot], list[Event]]:
    return lambda snapshot: [Publish(record) for record in records]


def test_a_new_catalogue_is_empty_at_generation_zero(location: Location) -> None:
    snapshot = Catalogue(location).snapshot()
    assert (snapshot.generation, dict(snapshot.records)) == (0, {})


def test_a_record_comes_back_as_it_was_committed(location: Location, make_record: MakeRecord) -> None:
    catalogue = Catalogue(location)
    full = make_record()
    bare = make_record("bare", template=None, embedding=None, probe_shift=None, tags=(), ranks=())
    assert catalogue.commit(_publish(full, bare)) == 1
    records = catalogue.snapshot().records
    assert records["local", "poet"] == replace(full, generation=1)
    assert records["local", "bare"] == replace(bare, generation=1)


def test_reopening_gives_the_same_snapshot(location: Location, make_record: MakeRecord) -> None:
    catalogue = Catalogue(location)
    for number in range(5):
        catalogue.commit(_publish(make_record(f"a{number}"), make_record("poet", digest=f"{number}" * 64)))
    assert Catalogue(location).snapshot() == catalogue.snapshot()
    assert catalogue.snapshot().generation == 5
    assert len(catalogue.snapshot().records) == 6


def test_every_generation_can_be_seen_again_after_a_compaction(location: Location, make_record: MakeRecord) -> None:
    catalogue, seen = Catalogue(location), []
    for number in range(4):
        catalogue.commit(_publish(make_record("poet", digest=f"{number}" * 64), make_record(f"a{number}")))
        seen.append(catalogue.snapshot())
    EventTable(location).compact()
    catalogue.commit(_publish(make_record("late")))
    reopened = Catalogue(location)
    assert [reopened.snapshot_at(snapshot.generation) for snapshot in seen] == seen
    assert reopened.snapshot_at(0) == Snapshot(0, {})
    newest = reopened.snapshot()
    assert reopened.snapshot_at(newest.generation) is newest


def test_without_changes_the_snapshot_is_the_same_object(location: Location, make_record: MakeRecord) -> None:
    catalogue = Catalogue(location)
    before = catalogue.snapshot()
    assert catalogue.snapshot() is before
    Catalogue(location).commit(_publish(make_record()))
    after = catalogue.snapshot()
    assert after is not before
    assert after is catalogue.snapshot()
    assert dict(before.records) == {}


def test_no_events_commit_nothing(location: Location, make_record: MakeRecord) -> None:
    catalogue = Catalogue(location)
    catalogue.commit(_publish(make_record()))
    assert catalogue.commit(_publish()) == 1
    assert catalogue.snapshot().generation == 1


def test_rows_of_one_commit_share_its_generation_and_the_last_of_a_name_wins(
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


def test_an_error_of_the_rule_commits_nothing(location: Location, make_record: MakeRecord) -> None:
    def refuse(snapshot: Snapshot) -> list[Event]:
        raise AdapterRefused("poet", ["no"])

    catalogue = Catalogue(location)
    with pytest.raises(AdapterRefused):
        catalogue.commit(refuse)
    assert catalogue.commit(_publish(make_record())) == 1


def test_a_refresh_does_not_open_files_again(location: Location, make_record: MakeRecord) -> None:
    catalogue, rival = Catalogue(location), Catalogue(location)
    catalogue.commit(_publish(make_record("old")))
    assert rival.snapshot() == catalogue.snapshot()
    table = Files(location)
    table.delete([file.name for file in table.entries() if re.fullmatch(r"part-.*\.parquet", file.name)])
    rival.commit(_publish(make_record("new")))
    assert sorted(name for _, name in catalogue.snapshot().records) == ["new", "old"]


def test_compaction_keeps_records_and_order_also_for_late_readers(folder_uri: str, make_record: MakeRecord) -> None:
    location = Location(folder_uri)
    writer, late = Catalogue(location), Catalogue(location)
    for number in range(103):
        writer.commit(_publish(make_record("poet", digest=f"{number:064}"), make_record(f"a{number}")))
        if number == 40:
            late.snapshot()
    assert writer.snapshot() == late.snapshot() == Catalogue(location).snapshot()
    assert writer.snapshot().records["local", "poet"].ref.digest == f"{102:064}"
    assert len(writer.snapshot().records) == 104
    names = [file.name for file in Files(location).entries()]
    assert [name for name in names if name.endswith(".checkpoint.parquet")]
    generations = [record.generation for record in writer.snapshot().records.values()]
    assert max(generations) == 104  # one version of the table is the compaction


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


@pytest.mark.parametrize("number", range(2))
def test_a_pickled_snapshot_is_equal_and_immutable(location: Location, make_record: MakeRecord, number: int) -> None:
    catalogue = Catalogue(location)
    catalogue.commit(_publish(*(make_record(f"a{n}") for n in range(number))))
    travelled = pickle.loads(pickle.dumps(catalogue.snapshot()))
    assert travelled == catalogue.snapshot()
    with pytest.raises(TypeError):
        travelled.records["local", "x"] = make_record("x")


@pytest.mark.parametrize(
    ("tenant", "name", "owner"),
    [
        ("us", "poet", "us"),
        ("them", "poet", "us"),
        ("them", "secret", "them"),
        ("them", "us/poet", "us"),
        ("us", "them/secret", None),
        ("us", "secret", None),
        ("us", "them/poet", None),
        ("us", "", None),
        ("us", "a/b/c", None),
    ],
)
def test_a_name_means_the_own_adapter_first_then_the_public_one(
    location: Location, make_record: MakeRecord, tenant: str, name: str, owner: str
) -> None:
    catalogue = Catalogue(location)
    catalogue.commit(_publish(make_record("poet", "us"), make_record("secret", "them", visibility="private")))
    if owner is None:
        with pytest.raises(AdapterNotFound):
            catalogue.snapshot().resolve(tenant, name)
    else:
        assert catalogue.snapshot().resolve(tenant, name).ref.tenant == owner


def test_ones_own_private_adapter_hides_a_public_one_of_that_name(location: Location, make_record: MakeRecord) -> None:
    catalogue = Catalogue(location)
    catalogue.commit(_publish(make_record("poet", "us"), make_record("poet", "them", visibility="private")))
    assert catalogue.snapshot().resolve("them", "poet").ref.tenant == "them"
    assert catalogue.snapshot().resolve("others", "poet").ref.tenant == "us"


def test_the_log_grows_by_less_than_2_kb_an_event(location: Location, make_record: MakeRecord) -> None:
    catalogue, log = Catalogue(location), Files(location.child("_delta_log"))
    before = sum(file.num_bytes for file in log.entries())
    for number in range(10):
        catalogue.commit(_publish(make_record(f"a{number}", embedding=embedding(*range(384)))))
    grown = sum(file.num_bytes for file in log.entries()) - before
    assert 0 < grown / 10 < 2048
