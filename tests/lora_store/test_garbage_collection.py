"""Sweeping, collecting and verifying the blobs of a store. Races with a publish are in test_leases."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from lora_store import AdapterNotFound, AdapterRef, Collected, Location, LoraStore, StoreUnavailable
from lora_store.blobs import BlobStore
from lora_store.files import Files
from lora_store.leases import LEASE_S
from tests.lora_store.builders import (
    BASE,
    IN_A_FOLDER,
    FakeClock,
    MakeFolder,
    OpenStore,
    PublishOne,
    Stored,
    embedding,
    ranking,
)

BlobNames = Callable[[], set[str]]


@pytest.fixture
def blob_names(stored: Stored) -> BlobNames:
    """Return the digests of all complete blobs."""
    return lambda: {name.partition("/")[2] for name in stored("blobs")}


def test_after_a_withdrawal_a_sweep_removes_its_blobs(
    store: LoraStore, publish: PublishOne, blob_names: BlobNames
) -> None:
    stays, goes = publish("stays", seed=1), publish()
    before = blob_names()
    gone = store.withdraw("local", ["poet"], "me")
    assert blob_names() == before
    digests = [digest for record in gone.records for digest in record.blobs]
    assert store.sweep(digests) == list(goes.record.blobs)
    assert blob_names() == set(stays.record.blobs)
    assert store.sweep(digests) == []
    with pytest.raises(AdapterNotFound):
        store.load(goes.weights_digest)


@IN_A_FOLDER
def test_only_blobs_of_a_version_pushed_out_of_the_kept_three_are_swept(
    store: LoraStore, publish: PublishOne, make_folder: MakeFolder
) -> None:
    versions = [publish(seed=seed) for seed in range(4)]
    versions.append(store.stage(make_folder("copy", seed=9), tenant="them"))
    everything = [digest for item in versions for digest in item.record.blobs]
    assert store.sweep(everything) == list(versions[0].record.blobs)
    assert store.load(versions[1].weights_digest)


def test_malformed_digests_are_not_swept(store: LoraStore, publish: PublishOne, stored: Stored) -> None:
    publish()
    before = stored("catalogue")
    assert store.sweep(["", "..", "../catalogue/_delta_log", "0" * 63, "A" * 64]) == []
    assert stored("catalogue") == before


@IN_A_FOLDER
def test_weights_shared_with_another_tenant_stay(store: LoraStore, make_folder: MakeFolder) -> None:
    ours, theirs = (store.stage(make_folder(), tenant=tenant, visibility="private") for tenant in ("us", "them"))
    store.commit([ours, theirs], [embedding()] * 2, [1.0] * 2, "me")
    store.withdraw("us", ["poet"], "me")
    assert store.sweep(ours.record.blobs) == []
    store.withdraw("them", ["poet"], "me")
    assert sorted(store.sweep(ours.record.blobs)) == sorted(ours.record.blobs)


@IN_A_FOLDER
def test_discard_releases_the_lease_and_keeps_blobs_that_others_use(
    store: LoraStore, publish: PublishOne, make_folder: MakeFolder, stored: Stored, blob_names: BlobNames
) -> None:
    live = publish()
    again = store.stage(make_folder("poet", 0, inputs=("poet 0",)), tags=["new"])
    alone = store.stage(make_folder("alone", seed=9))
    store.discard([again, alone])
    assert (stored("holds"), stored("sweeps")) == ({}, {})
    assert blob_names() == set(live.record.blobs)


@IN_A_FOLDER
def test_a_failed_stage_releases_its_lease(
    store: LoraStore, store_uri: str, make_folder: MakeFolder, stored: Stored
) -> None:
    class FullDisk(BlobStore):
        def put(self, data: bytes) -> str:
            raise StoreUnavailable("No space left on device")

    store._blobs = FullDisk(Location(store_uri))
    with pytest.raises(StoreUnavailable):
        store.stage(make_folder())
    assert stored("holds") == {}


def test_gc_removes_only_remains_of_crashes(
    store: LoraStore, publish: PublishOne, make_folder: MakeFolder, clock: FakeClock, stored: Stored, location: Location
) -> None:
    live = publish()
    lost = store.stage(make_folder("lost", seed=1))  # the process dies here
    half, leased = (f"{item[:2]}/.{item}.0123456789" for item in (live.weights_digest, lost.weights_digest))
    for name in (half, leased):
        Files(location.child("blobs")).write(name, b"half")
    Files(location.child("sweeps")).write(f"{int(clock.at.timestamp() * 1000)}.dead", b"")
    early = store.gc(0)
    assert early.num_blobs == 0 and leased in stored("blobs")  # its lease has not expired
    clock.sleep(LEASE_S)
    lost_bytes = sum(size for name, size in stored("blobs").items() if name.partition("/")[2] in lost.record.blobs)
    late = store.gc(0)
    assert (late.num_blobs, early.num_bytes + late.num_bytes) == (2, lost_bytes + 2 * len(b"half"))
    assert {name.partition("/")[2] for name in stored("blobs")} == set(live.record.blobs)
    assert (stored("holds"), stored("sweeps")) == ({}, {})
    assert store.gc(0) == Collected(0, 0)
    assert [check.problem for check in store.verify()] == [None, None]


def test_gc_keeps_files_younger_than_its_retention(
    store: LoraStore, publish: PublishOne, clock: FakeClock, blob_names: BlobNames
) -> None:
    publish()
    store.withdraw("local", ["poet"], "me")
    assert store.gc(3600) == Collected(0, 0)
    assert len(blob_names()) == 2
    clock.sleep(3700)
    assert store.gc(3600).num_blobs == 2
    assert blob_names() == set()


@IN_A_FOLDER
def test_gc_keeps_parts_of_uploads_for_an_hour_or_its_longer_retention(store: LoraStore, clock: FakeClock) -> None:
    upload, hour = "0" * 32, 3600
    store.uploads.put(upload, 0, b"data")
    for wait_s, retention_s in ((hour - 60, 0), (120, 2 * hour)):
        clock.sleep(wait_s)
        store.gc(retention_s)
        assert list(store.uploads.parts(upload, 4)) == [b"data"]
    store.gc(0)
    with pytest.raises(StoreUnavailable, match="missing"):
        list(store.uploads.parts(upload, 4))


@IN_A_FOLDER
def test_gc_shrinks_the_catalogue_to_one_data_file_and_leaves_a_rivals_young_one(
    store: LoraStore, publish: PublishOne, clock: FakeClock, stored: Stored, open_store: OpenStore, location: Location
) -> None:
    for seed in range(5):
        publish(seed=seed)
    before = store.snapshot()
    Files(location.child("catalogue")).write("part-uncommitted.parquet", b"rows")
    clock.sleep(1800)
    store.gc(0)
    assert "part-uncommitted.parquet" in stored("catalogue")
    clock.sleep(2 * 3600)
    store.gc(0)
    assert len([name for name in stored("catalogue") if not name.startswith("_delta_log/")]) == 1
    for snapshot in (store.snapshot(), open_store().snapshot()):
        assert (dict(snapshot.records), dict(snapshot.previous)) == (dict(before.records), dict(before.previous))


@IN_A_FOLDER
def test_gc_removes_old_projections_of_no_embedding(
    store: LoraStore, make_folder: MakeFolder, clock: FakeClock, stored: Stored, location: Location
) -> None:
    used = ("live+1", "older+1", "pending+1", "ranked+1")
    names = [*used, "gone+1", "live+2", "live-1.ordinary", "gone-1.ordinary"]  # live+2: fitted again, then given up
    files = Files(location.child("projections"))
    for name in names:
        files.write(f"{name}.safetensors", b"12345")
    files.write(".live+1.safetensors.dead", b"12")  # a crash during a write
    for encoder, seed in (("older+1", 0), ("live+1", 1)):
        staged = store.stage(make_folder("poet", seed))
        store.commit([staged], [embedding(encoder=encoder)], [1.0], "me")
    store.add_embeddings({staged.ref: embedding(encoder="pending+1")})
    store.rank("local", [replace(ranking(staged.ref), encoder="ranked+1")], "me")
    clock.sleep(3500)
    assert store.gc(0).num_projections == 0  # a reindex that has committed no embedding yet may need them
    clock.sleep(200)
    assert store.gc(4000).num_projections == 0
    assert len(stored("projections")) == 9
    collected = store.gc(0)
    assert (collected.num_projections, collected.num_bytes) == (4, 17)
    kept = [*used, "live-1.ordinary"]
    assert set(stored("projections")) == {f"{name}.safetensors" for name in kept}
    assert store.gc(0) == Collected(0, 0)


@IN_A_FOLDER
def test_the_projection_of_the_active_encoder_outlives_the_adapters(
    store: LoraStore, clock: FakeClock, stored: Stored, location: Location
) -> None:
    Files(location.child("projections")).write("fitted+1.safetensors", b"12345")
    store.activate_encoder("mine", "fitted+1", "me")
    clock.sleep(7200)
    assert store.gc(0).num_projections == 0
    store.activate_encoder("mine", "fitted+2", "me")
    assert store.gc(0).num_projections == 1
    assert stored("projections") == {}


def test_verify_reads_every_needed_blob_once_and_names_damaged_and_missing_ones(
    store: LoraStore, publish: PublishOne, location: Location
) -> None:
    first, second = publish(seed=0), publish(seed=1)
    publish("gone", seed=2)
    store.withdraw("local", ["gone"], "me")
    checks = list(store.verify())
    assert sorted(check.digest for check in checks) == sorted([*first.record.blobs, *second.record.blobs])
    assert {check.ref for check in checks} == {first.ref, second.ref}
    assert {check.problem for check in checks} == {None}
    weights, samples = first.record.blobs
    blobs = Files(location.child("blobs"))
    blobs.write(f"{weights[:2]}/{weights}", b"other")
    blobs.delete([f"{samples[:2]}/{samples}"])
    problems = {check.digest: check.problem for check in store.verify()}
    assert problems[samples] == "is missing"
    assert problems[weights].startswith(f"blob {weights} is corrupted")


@IN_A_FOLDER
def test_a_verification_that_is_left_reads_no_further_blob(store: LoraStore, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {f"{number:064}": AdapterRef("local", "poet", "0" * 64) for number in range(64)}
    read: list[str] = []
    may_end = threading.Event()

    def check(blobs: BlobStore, digest: str) -> None:
        read.append(digest)
        assert digest == next(iter(wanted)) or may_end.wait(120)

    monkeypatch.setattr(BlobStore, "check", check)
    checks = store.verify(wanted)
    assert isinstance(checks, Generator) and next(checks).digest == next(iter(wanted))
    leaving = threading.Thread(target=checks.close)
    leaving.start()
    leaving.join(60)
    waited, num_read = leaving.is_alive(), len(read)
    may_end.set()
    assert not waited and num_read <= 9


@IN_A_FOLDER
def test_verify_does_not_report_blobs_withdrawn_meanwhile(
    store: LoraStore, open_store: OpenStore, publish: PublishOne, location: Location
) -> None:
    rival = open_store()
    one_at_a_time = threading.Lock()  # verify reads on several threads

    class RivalFirst(BlobStore):
        def check(self, digest: str) -> None:
            with one_at_a_time:
                if ("local", "a") in rival.snapshot().records:
                    gone = rival.withdraw("local", ["a"], "rival").records[0]
                    assert len(rival.sweep(gone.blobs)) == 2
            super().check(digest)

    staged = publish("a", seed=0)
    store._collector._blobs = RivalFirst(location.child("blobs"))
    assert staged.ref not in {check.ref for check in store.verify()}
    assert dict(rival.snapshot().records) == {}


def test_real_time_is_the_default(store_uri: str, make_folder: MakeFolder) -> None:
    store = LoraStore(store_uri, accepts_base=[BASE])
    staged = store.stage(make_folder())
    store.commit([staged], [embedding()], [1.0], "me")
    age = datetime.now(UTC) - store.snapshot().records["local", "poet"].created_at
    assert 0 <= age.total_seconds() < 60
    store.withdraw("local", ["poet"], "me")
    assert store.gc(0).num_blobs == 2
