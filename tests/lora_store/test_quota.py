"""The quota of one tenant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_store import AdapterRecord, QuotaExceeded, Snapshot, TenantQuota
from lora_store.rules import publish_events
from tests.lora_store.builders import IN_A_FOLDER, MakeFolder, MakeRecord, OpenStore, Stored, embedding

MakeRecords = Callable[..., list[AdapterRecord]]


@pytest.fixture
def records(make_record: MakeRecord) -> MakeRecords:
    """Return a tenant's live adapters of 100 bytes each, by name."""

    def make(*names: str, tenant: str = "acme", **changes: Any) -> list[AdapterRecord]:
        return [
            make_record(
                name, tenant, f"{number}{name}" * 9, weights_digest=f"w {name}", visibility="private", **changes
            )
            for number, name in enumerate(names)
        ]

    return make


def live(*records: AdapterRecord) -> Snapshot:
    return Snapshot(1, {(record.ref.tenant, record.ref.name): record for record in records})


@pytest.mark.parametrize(
    ("quota", "fits"),
    [
        (TenantQuota(), True),
        (TenantQuota(max_adapters=3), True),
        (TenantQuota(max_adapters=2), False),
        (TenantQuota(max_bytes=300), True),
        (TenantQuota(max_bytes=299), False),
    ],
)
def test_a_publish_above_the_quota_is_refused_as_a_whole(records: MakeRecords, quota: TenantQuota, fits: bool) -> None:
    snapshot, new = live(*records("a"), *records("x", "y", "z", tenant="other")), records("b", "c")
    if fits:
        assert len(publish_events(snapshot, new, quota=quota)) == 2
        return
    with pytest.raises(QuotaExceeded) as caught:
        publish_events(snapshot, new, quota=quota)
    assert caught.value.wanted > caught.value.limit


def test_a_tenant_above_a_reduced_quota_may_replace_adapters(records: MakeRecords, make_record: MakeRecord) -> None:
    snapshot = live(*records("a", "b"))
    newer = make_record("a", "acme", "e" * 64, weights_digest="w a", visibility="private")
    quota = TenantQuota(max_adapters=1, max_bytes=50)
    assert len(publish_events(snapshot, [newer], quota=quota)) == 1
    assert publish_events(snapshot, records("a"), quota=TenantQuota(0, 0)) == [], "live versions do not count again"
    with pytest.raises(QuotaExceeded):
        publish_events(snapshot, records("c"), quota=quota)


@IN_A_FOLDER
def test_weights_above_the_quota_are_not_stored(open_store: OpenStore, make_folder: MakeFolder, stored: Stored) -> None:
    store, quota = open_store(), TenantQuota(max_adapters=1)
    store.commit([store.stage(make_folder("a0", 0), tenant="acme")], [embedding()], [1.0], "me", "any", quota)
    before, second = stored("blobs"), make_folder("a1", 1)
    with pytest.raises(QuotaExceeded):
        store.stage(second, tenant="acme", quota=quota)
    assert stored("blobs") == before
    store.stage(second, tenant="other", quota=quota)
    store.stage(make_folder("a0", 2), tenant="acme", quota=quota)  # in place of the first


@IN_A_FOLDER
def test_concurrent_publishes_cannot_exceed_the_quota_together(open_store: OpenStore, make_folder: MakeFolder) -> None:
    """The quota is checked against the state after the rival's commit, not against that at the start of the publish."""
    ours, rival, quota = open_store(), open_store(), TenantQuota(max_adapters=1)
    staged = [store.stage(make_folder(f"a{n}", n), tenant="acme") for n, store in enumerate((ours, rival))]
    rival.commit([staged[1]], [embedding()], [1.0], "me", "any", quota)
    with pytest.raises(QuotaExceeded):
        ours.commit([staged[0]], [embedding()], [1.0], "me", "any", quota)
    assert [name for _, name in ours.snapshot().records] == ["a1"]


@IN_A_FOLDER
def test_a_commit_above_the_quota_is_refused_before_it_is_made_too(
    open_store: OpenStore, make_folder: MakeFolder
) -> None:
    """Each of the adapters alone would fit."""
    store, quota = open_store(), TenantQuota(max_adapters=1)
    staged = [store.stage(make_folder(f"a{n}", n), tenant="acme", quota=quota) for n in range(2)]
    store.check_commit(staged[:1], quota)
    with pytest.raises(QuotaExceeded):
        store.check_commit(staged, quota)
    assert not store.snapshot().records
