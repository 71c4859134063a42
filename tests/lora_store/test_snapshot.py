"""The state that results from events, and names that are looked up in it."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterable

import pytest

from lora_store import AdapterNotFound, AdapterRecord, Snapshot, TenantQuota
from lora_store.events import ActivateEncoder, Embed, Event, Publish, Withdraw
from lora_store.rules import publish_events
from tests.lora_store.builders import NOON, MakeRecord, draw_events, embedding

POET = ("local", "poet")


@pytest.fixture
def version(make_record: MakeRecord) -> MakeRecord:
    """Return the n-th version of the poet."""
    return lambda number, **changes: make_record(
        digest=f"{number:064x}", weights_digest=f"{number + 99:064x}", **changes
    )


def _fold(*events: Event) -> Snapshot:
    return Snapshot(0, {}).after(events, len(events))


def _numbers(records: Iterable[AdapterRecord]) -> list[int]:
    return [int(record.ref.digest, 16) for record in records]


def test_the_last_three_versions_are_kept_newest_first(version: MakeRecord) -> None:
    snapshot = _fold(*(Publish(version(number)) for number in range(5)))
    assert _numbers(snapshot.versions(POET)) == [4, 3, 2]
    assert snapshot.referenced() == {f"{number + 99:064x}" for number in (4, 3, 2)}
    assert _fold(Publish(version(0, samples_digest="5" * 64))).referenced() == {f"{99:064x}", "5" * 64}


def test_a_version_that_is_live_again_is_not_kept_twice(version: MakeRecord) -> None:
    snapshot = _fold(*(Publish(version(number)) for number in (0, 1, 2, 1)))
    assert _numbers(snapshot.versions(POET)) == [1, 2, 0]
    again = snapshot.after([Publish(version(1, visibility="private"))], 5)
    assert _numbers(again.versions(POET)) == [1, 2, 0]
    assert again.records[POET].visibility == "private"


def test_a_withdrawal_removes_every_version(version: MakeRecord, make_record: MakeRecord) -> None:
    snapshot = _fold(Publish(version(0)), Publish(version(1)), Publish(make_record("other")))
    after = snapshot.after([Withdraw(version(1).ref, "me", NOON)], 4)
    assert (after.versions(POET), list(after.records)) == ((), [("local", "other")])
    assert _numbers(snapshot.versions(POET)) == [1, 0]  # the older snapshot has not changed
    assert _numbers(after.after([Publish(version(2))], 5).versions(POET)) == [2]


def test_an_embedding_waits_until_its_encoder_is_active(version: MakeRecord) -> None:
    new = embedding(1.0, encoder="new")
    before = _fold(Publish(version(0)), Embed(version(0).ref, new))
    assert (before.encoder, before.records[POET].encoder) == (None, "enc")
    assert before.pending == {version(0).ref: new}
    other = before.after([ActivateEncoder("model", "third", "me", NOON)], 3)
    assert other.records[POET].encoder == "enc", "not that of another encoder"
    after = before.after([ActivateEncoder("model", "new", "me", NOON)], 3)
    assert (after.encoder.model, after.encoder.identity) == ("model", "new")
    assert after.records[POET].embedding is new
    assert after.pending == {}


def test_a_pool_is_embedded_by_the_encoder_of_most_adapters(make_record: MakeRecord) -> None:
    embeddings = [embedding(1.0, encoder=encoder) for encoder in ("old", "enc", "enc")]
    records = [make_record(f"a{number}", embedding=made) for number, made in enumerate(embeddings)]
    assert _fold(*map(Publish, records)).embedded_by() == "enc"
    assert _fold(Publish(make_record("bare", embedding=None))).embedded_by() is None


def test_only_live_versions_get_an_embedding(version: MakeRecord) -> None:
    live = _fold(Publish(version(0)), Publish(version(1)), Embed(version(0).ref, embedding(1.0, encoder="new")))
    assert live.pending == {}
    waiting = live.after([Embed(version(1).ref, embedding(1.0, encoder="new"))], 4)
    for event in (Publish(version(2)), Withdraw(version(1).ref, "me", NOON)):
        assert waiting.after([event], 5).pending == {}


@pytest.mark.parametrize("seed", range(10))
def test_updated_counts_equal_counts_from_scratch(make_record: MakeRecord, seed: int) -> None:
    draw, snapshot = random.Random(seed), Snapshot(0, {})
    assert (snapshot.public, snapshot.tallies.usage) == ({}, {})  # from now on `after` updates them
    for number in range(1, 80):
        events = draw_events(draw, snapshot, make_record, number)
        snapshot = snapshot.after(events, number)
        scratch = Snapshot(number, dict(snapshot.records), dict(snapshot.previous))
        assert snapshot.public == scratch.public
        assert snapshot.tallies == scratch.tallies
        kept = [record for key in snapshot.records for record in snapshot.versions(key)]
        assert snapshot.referenced() == {digest for record in kept for digest in record.blobs}
        for tenant in ("a", "b", "c"):
            mine = [record for record in kept if record.ref.tenant == tenant]
            held = snapshot.tallies.usage.get(tenant)
            num_names = sum(key[0] == tenant for key in snapshot.records)
            num_bytes = sum({record.weights_digest: record.num_bytes for record in mine}.values())
            assert (held and (held.num_adapters, held.num_bytes)) == ((num_names, num_bytes) if mine else None)


def test_a_publish_into_a_large_pool_copies_no_part_of_it(make_record: MakeRecord) -> None:
    records = [make_record(f"n{number}", "acme", weights_digest=f"w{number}") for number in range(20_000)]
    snapshot = Snapshot(1, {(record.ref.tenant, record.ref.name): record for record in records})
    new = make_record("new", "acme", weights_digest="new")
    publish_events(snapshot, [new], quota=TenantQuota(10**6, 10**9))  # counts once
    tracemalloc.start()
    events = publish_events(snapshot, [new], quota=TenantQuota(10**6, 10**9))
    after = snapshot.after(events, 2)
    assert (after.public["new"], after.tallies.usage["acme"].num_adapters) == (new, 20_001)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000  # bytes; a copy of the names alone has a million


@pytest.mark.parametrize(
    ("tenant", "name", "owner"),
    [
        ("us", "poet", "us"),
        ("them", "poet", "us"),
        ("them", "secret", "them"),
        ("them", "us/poet", "us"),
        ("them", "both", "them"),  # ones own private adapter hides a public one
        ("others", "both", "us"),
        ("us", "them/secret", None),
        ("us", "secret", None),
        ("us", "them/poet", None),
        ("us", "", None),
        ("us", "a/b/c", None),
    ],
)
def test_a_name_means_the_own_adapter_first(make_record: MakeRecord, tenant: str, name: str, owner: str | None) -> None:
    public = [make_record("poet", "us"), make_record("both", "us")]
    private = [make_record(name, "them", visibility="private") for name in ("secret", "both")]
    snapshot = _fold(*map(Publish, [*public, *private]))
    if owner is None:
        with pytest.raises(AdapterNotFound):
            snapshot.resolve(tenant, name)
    else:
        assert snapshot.resolve(tenant, name).ref.tenant == owner
