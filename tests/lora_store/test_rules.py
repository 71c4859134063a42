"""Withdrawals, kept versions and a change of encoder, on a store."""

from __future__ import annotations

from typing import Any

import pytest

from lora_store import (
    AdapterNotFound,
    AdapterRefused,
    BlobCorrupted,
    EncoderIncomplete,
    Location,
    LoraStore,
    Trial,
    Withdrawn,
)
from lora_store.events import Withdraw
from lora_store.files import Files
from lora_store.leases import LEASE_S
from lora_store.rules import withdraw_events
from tests.lora_store.builders import IN_A_FOLDER, FakeClock, MakeFolder, OpenStore, PublishOne, Stored, embedding

pytestmark = IN_A_FOLDER


def test_a_withdrawal_is_one_commit_and_returns_all_versions(
    store: LoraStore, publish: PublishOne, clock: FakeClock
) -> None:
    first, second, other = publish(seed=0), publish(seed=1), publish("other", seed=2)
    publish("stays", seed=3)
    assert store.withdraw("local", [], "me") == Withdrawn(4, ())
    [event] = withdraw_events(store.snapshot(), [("local", "poet"), ("local", "poet")], "me", clock.at)
    assert event == Withdraw(second.ref, "me", clock.at), "the version that was live"
    gone = store.withdraw("local", ["poet", "other", "poet"], "me")
    assert gone.generation == 5 == store.snapshot().generation
    assert [record.ref for record in gone.records] == [second.ref, first.ref, other.ref]
    assert [name for _, name in store.snapshot().records] == ["stays"]
    assert {record.created_at for record in gone.records} == {clock.at}


@pytest.mark.parametrize(
    ("tenant", "names", "missing"),
    [("local", ["poet", "nobody"], "nobody"), ("them", ["poet"], "poet"), ("local", ["local/poet"], "local/poet")],
)
def test_a_name_that_is_not_live_is_reported_and_nothing_is_withdrawn(
    store: LoraStore, publish: PublishOne, tenant: str, names: list[str], missing: str
) -> None:
    publish()
    with pytest.raises(AdapterNotFound) as caught:
        store.withdraw(tenant, names, "me")
    assert caught.value.wanted == missing
    assert store.snapshot().generation == 1


def test_a_kept_version_can_be_published_again(store: LoraStore, publish: PublishOne, stored: Stored) -> None:
    first, second = publish(seed=0), publish(seed=1)
    record = store.snapshot().previous["local", "poet"][0]
    again = store.restage(record)
    assert (again.ref, again.samples) == (first.ref, first.samples)
    assert (again.record.embedding, again.record.probe_shift, again.record.generation) == (None, None, 0)
    assert len(stored("holds")) == 1
    assert store.commit([again], [embedding()], [1.0], "me") == 3
    assert [item.ref for item in store.snapshot().versions(("local", "poet"))] == [first.ref, second.ref]
    assert stored("holds") == {}


@pytest.mark.parametrize("blob", ["weights", "samples"])
def test_a_version_whose_blobs_are_gone_cannot_be_staged_again(
    store: LoraStore, publish: PublishOne, location: Location, stored: Stored, blob: str
) -> None:
    publish()
    record = store.snapshot().records["local", "poet"]
    digest = record.weights_digest if blob == "weights" else record.samples_digest
    Files(location.child("blobs")).delete([f"{digest[:2]}/{digest}"])
    with pytest.raises(AdapterNotFound) as caught:
        store.restage(record)
    assert caught.value.wanted == str(record.ref)
    assert stored("holds") == {}


def test_damaged_samples_are_reported_when_a_version_is_staged_again(
    store: LoraStore, publish: PublishOne, location: Location
) -> None:
    publish()
    record = store.snapshot().records["local", "poet"]
    Files(location.child("blobs")).write(f"{record.samples_digest[:2]}/{record.samples_digest}", b"x")
    with pytest.raises(BlobCorrupted):
        store.restage(record)


def test_a_commit_with_an_old_lease_checks_its_blobs_again(
    store: LoraStore, make_folder: MakeFolder, clock: FakeClock
) -> None:
    kept, lost = store.stage(make_folder()), store.stage(make_folder("lost", 1, inputs=("x",)))
    clock.sleep(LEASE_S)
    assert store.sweep(lost.record.blobs) == list(lost.record.blobs)
    with pytest.raises(AdapterNotFound):
        store.commit([kept, lost], [embedding()] * 2, [1.0] * 2, "me")
    assert store.snapshot().generation == 0
    assert store.commit([kept], [embedding()], [1.0], "me") == 1
    assert [check.problem for check in store.verify()] == [None, None]


def test_an_encoder_is_activated_once_all_are_embedded(
    store: LoraStore, publish: PublishOne, make_folder: MakeFolder
) -> None:
    first, second = publish("a", seed=0), publish("b", seed=1)
    bare = store.stage(make_folder("bare", 2, inputs=()))
    store.commit([bare], [None], [1.0], "me")
    with pytest.raises(EncoderIncomplete) as caught:
        store.activate_encoder("model", "new", "me")
    assert set(caught.value.missing) == {first.ref, second.ref}
    new = embedding(1.0, encoder="new")
    assert store.add_embeddings({first.ref: new}) == 4
    with pytest.raises(EncoderIncomplete) as caught:
        store.activate_encoder("model", "new", "me")
    assert caught.value.missing == (second.ref,)
    assert store.add_embeddings({first.ref: new, second.ref: new}) == 5
    assert store.activate_encoder("model", "new", "me") == 6
    snapshot = store.snapshot()
    assert (snapshot.encoder.identity, dict(snapshot.pending)) == ("new", {})
    assert {record.encoder for record in snapshot.records.values()} == {"new", None}
    assert store.activate_encoder("model", "new", "me") == 6


def test_adapters_published_with_the_new_encoder_need_no_other_embedding(store: LoraStore, publish: PublishOne) -> None:
    publish("a", seed=0, encoder="new")
    assert store.activate_encoder("model", "new", "me") == 2


def test_embeddings_of_versions_that_are_not_live_are_dropped(store: LoraStore, publish: PublishOne) -> None:
    old, live = publish(seed=0), publish(seed=1)
    new = embedding(1.0, encoder="new")
    assert store.add_embeddings({old.ref: new}) == 2
    assert store.add_embeddings({live.ref: new, old.ref: new}) == 3
    assert store.add_embeddings({live.ref: new}) == 3
    assert list(store.snapshot().pending) == [live.ref]


def test_an_encoder_is_not_activated_if_a_publish_came_first(
    store: LoraStore, open_store: OpenStore, publish: PublishOne, make_folder: MakeFolder
) -> None:
    first = publish("a", seed=0)
    store.add_embeddings({first.ref: embedding(1.0, encoder="new")})
    rival = open_store()
    staged = rival.stage(make_folder("b", seed=1))
    assert rival.commit([staged], [embedding()], [1.0], "rival") == 3
    with pytest.raises(EncoderIncomplete) as caught:
        store.activate_encoder("model", "new", "me")
    assert caught.value.missing == (staged.ref,)


def test_a_publish_with_precondition_live_skips_updated_and_withdrawn_names(
    store: LoraStore, publish: PublishOne
) -> None:
    old = publish(seed=0)
    new = publish(seed=1)
    generation = store.snapshot().generation
    assert store.commit([old], [embedding(encoder="new")], [1.0], "me", "live") == generation
    assert store.commit([new], [embedding(encoder="new")], [1.0], "me", "live") == generation + 1
    assert store.snapshot().resolve("local", "poet").encoder == "new"
    store.withdraw("local", ["poet"], "me")
    store.commit([new], [embedding(encoder="other")], [1.0], "me", "live")
    assert dict(store.snapshot().records) == {}


def test_a_publish_with_precondition_kept_is_refused_after_a_withdrawal(store: LoraStore, publish: PublishOne) -> None:
    old, _ = publish(seed=0), publish(seed=1)
    again = store.restage(old.record)
    store.commit([again], [embedding()], [1.0], "me", "kept")
    assert store.snapshot().resolve("local", "poet").ref == old.ref
    again = store.restage(old.record)
    store.withdraw("local", ["poet"], "me")
    with pytest.raises(AdapterNotFound, match="poet@"):
        store.commit([again], [embedding()], [1.0], "me", "kept")
    assert dict(store.snapshot().records) == {}
    store.discard([again])


def states(store: LoraStore) -> list[tuple[str, bool]]:
    """Return the kept versions of the poet, the live one first, and whether each was never live."""
    return [(record.ref.digest, record.is_offered) for record in store.snapshot().versions(("local", "poet"))]


def test_an_offered_version_is_kept_with_its_share_beside_the_live_one(store: LoraStore, publish: PublishOne) -> None:
    older, live = publish(seed=0), publish(seed=1)
    offered = publish(seed=2, share=0.1)
    assert store.snapshot().records["local", "poet"].trial == Trial(offered.ref.digest, 0.1)
    assert states(store) == [(live.ref.digest, False), (older.ref.digest, False), (offered.ref.digest, True)]
    again = publish(seed=3, share=0.2, is_shadow=True)  # in place of the first, so that no live version is forgotten
    assert states(store)[1:] == [(older.ref.digest, False), (again.ref.digest, True)]
    publish(seed=1, encoder="other", visibility="private")  # the live version again
    assert store.snapshot().records["local", "poet"].trial == Trial(again.ref.digest, 0.2, is_shadow=True)


def test_an_offered_version_is_kept_beside_three_that_were_live_until_three_are_newer(
    store: LoraStore, publish: PublishOne
) -> None:
    first, second, third = [publish(seed=seed).ref.digest for seed in range(3)]
    offered = publish(seed=3, share=0.1).ref.digest
    assert states(store) == [(third, False), (second, False), (first, False), (offered, True)]
    newer = [publish(seed=seed).ref.digest for seed in (4, 5)]
    assert states(store) == [(newer[1], False), (newer[0], False), (third, False), (offered, True)]
    assert [check.problem for check in store.verify()] == [None] * 8
    publish(seed=6)
    assert [is_offered for _, is_offered in states(store)] == [False] * 3


@pytest.mark.parametrize("change", ["share", "publish", "promote", "withdraw"])
def test_a_trial_ends(change: str, store: LoraStore, publish: PublishOne) -> None:
    live = publish(seed=0)
    offered = publish(seed=1, share=0.1)
    if change == "share":
        store.set_trial("local", "poet", None, "me")
        assert states(store) == [(live.ref.digest, False), (offered.ref.digest, True)]
    elif change == "publish":
        publish(seed=2)
    elif change == "promote":
        tried = store.snapshot().versions(("local", "poet"))[1]
        store.commit([store.restage(tried)], [embedding()], [1.0], "me", "kept")
        assert states(store) == [(offered.ref.digest, False), (live.ref.digest, False)]
    else:
        store.withdraw("local", ["poet"], "me")
    kept = store.snapshot().versions(("local", "poet"))
    assert [record.trial for record in kept] == [None] * {"publish": 3, "withdraw": 0}.get(change, 2)


def test_a_kept_version_can_take_a_share_and_repeating_it_commits_nothing(
    store: LoraStore, publish: PublishOne
) -> None:
    first, live = publish(seed=0), publish(seed=1)
    trial = Trial(first.ref.digest, 0.25)
    generation = store.set_trial("local", "poet", trial, "me")
    assert store.snapshot().records["local", "poet"].trial == trial
    assert store.set_trial("local", "poet", trial, "me") == generation
    assert states(store) == [(live.ref.digest, False), (first.ref.digest, False)]
    last = publish(seed=2)
    publish(seed=1, share=0.5)  # it was live once, and a rollback returns to it
    assert states(store) == [(version.ref.digest, False) for version in (last, live, first)]
    assert store.snapshot().records["local", "poet"].trial == Trial(live.ref.digest, 0.5)


def test_a_rollback_to_a_version_that_was_unlisted_is_listed(store: LoraStore, publish: PublishOne) -> None:
    first, live = publish(seed=0, ttl_s=60.0), publish(seed=1)
    assert (first.record.is_unlisted, live.record.is_unlisted) == (True, False)
    store.commit([store.restage(first.record)], [None], [1.0], "me", "kept")
    now = store.snapshot().records["local", "poet"]
    assert (now.ref, now.expires_at) == (first.ref, None)


def test_an_approved_version_that_is_tried_again_stays_approved(store: LoraStore, publish: PublishOne) -> None:
    first = publish(seed=0)
    store.approve([first.ref], "admin")
    publish(seed=1)
    publish(seed=0, share=0.5)
    live, tried = store.snapshot().versions(("local", "poet"))
    assert (tried.ref, tried.approved, live.approved) == (first.ref, True, False)
    store.commit([store.restage(tried)], [embedding()], [1.0], "me", "kept")
    assert store.snapshot().records["local", "poet"].approved


@pytest.mark.parametrize(
    ("seed", "label", "says"),
    [
        (0, {"name": "novel"}, "no live version exists to share requests with; publish this version without `share`"),
        (0, {}, "is live already"),
        (1, {"ttl_s": 60.0}, "unlisted adapter"),
        (1, {"template": "chat"}, "the live version uses the server's template, this one 'chat'"),
    ],
)
def test_a_version_that_cannot_take_a_share_is_refused(
    seed: int, label: dict[str, Any], says: str, store: LoraStore, publish: PublishOne
) -> None:
    publish(seed=0)
    with pytest.raises(AdapterRefused, match=says):
        publish(seed=seed, share=0.1, **label)
    assert len(states(store)) == 1


@pytest.mark.parametrize(("name", "digest"), [("nobody", "a" * 64), ("poet", "a" * 64)])
def test_a_trial_needs_a_live_name_and_a_kept_version(
    name: str, digest: str, store: LoraStore, publish: PublishOne
) -> None:
    publish()
    with pytest.raises(AdapterNotFound):
        store.set_trial("local", name, Trial(digest, 0.1), "me")
