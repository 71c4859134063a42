"""Versions of the same weights: with prompts of clients among their samples, and with other tags or samples."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NoReturn

import pytest

from lora_store import (
    AdapterNotFound,
    AdapterRecord,
    AdapterRefused,
    Edit,
    Feedback,
    FileRefused,
    Limits,
    LoraStore,
    Sample,
    Staged,
    StoreUnavailable,
    VersionConflict,
    Withdrawn,
)
from tests.lora_store.builders import BASE, IN_A_FOLDER, FakeClock, MakeFolder, embedding

pytestmark = IN_A_FOLDER

ACCEPTED = Sample("Make me a rhyme about rain", is_accepted=True)


def commit(store: LoraStore, staged: Staged, author: str = "owner") -> AdapterRecord:
    store.commit([staged], [embedding()], [1.0], author)
    return live(store)


def live(store: LoraStore) -> AdapterRecord:
    return store.snapshot().records["local", "poet"]


def test_accepted_prompts_make_a_new_version_of_the_same_weights(store: LoraStore, make_folder: MakeFolder) -> None:
    first = commit(store, store.stage(make_folder(), tags=["fun"], template="alpaca"))
    own = store.samples(first.samples_digest or "")
    second = commit(store, store.resample(first, [*own, ACCEPTED]))
    assert second.ref != first.ref
    assert (second.weights_digest, second.tags, second.template) == (first.weights_digest, ("fun",), "alpaca")
    assert store.samples(second.samples_digest or "") == (*own, ACCEPTED)
    assert (second.num_samples, second.actor) == (len(own) + 1, "owner")
    assert [kept.ref for kept in store.snapshot().versions(("local", "poet"))] == [second.ref, first.ref]
    commit(store, store.resample(live(store), [*own, ACCEPTED, Sample("another", is_accepted=True)]))
    undone = commit(store, store.resample(live(store), None))
    assert (undone.ref, undone.created_at) == (first.ref, first.created_at), "the very version of the publisher"


def test_publishing_keeps_accepted_prompts_with_the_same_samples_only(
    store: LoraStore, make_folder: MakeFolder
) -> None:
    first = commit(store, store.stage(make_folder()))
    own = store.samples(first.samples_digest or "")
    second = commit(store, store.resample(first, [*own, ACCEPTED]))
    assert store.stage(make_folder()).ref == second.ref
    assert commit(store, store.stage(make_folder(seed=5))).samples_digest == second.samples_digest
    other = commit(store, store.stage(make_folder(inputs=("Rhyme this.",))))
    assert store.samples(other.samples_digest or "") == (Sample("Rhyme this."),)


@pytest.mark.parametrize("was_accepted", [False, True])
@pytest.mark.parametrize("rival", [None, (), ("Sing.",), ("Sing.", "Hum.", "Dance.")])
def test_samples_given_again_replace_those_of_a_rival_that_are_not_the_same_and_accepted_ones(
    store: LoraStore, make_folder: MakeFolder, rival: tuple[str, ...] | None, was_accepted: bool
) -> None:
    record = commit(store, store.stage(make_folder()))
    own = store.samples(record.samples_digest or "")
    if was_accepted:
        record = commit(store, store.resample(record, [*own, ACCEPTED]))
    ours = store.stage(make_folder(seed=5), share=0.5)
    kept = store.stage(make_folder(seed=6), tags=[])
    theirs = (*own, ACCEPTED, Sample("More", is_accepted=True)) if rival is None else tuple(map(Sample, rival))
    commit(store, store.edit(record, Edit(samples=theirs)) if rival is not None else store.resample(record, theirs))
    for staged in (kept, ours):
        with pytest.raises(VersionConflict):
            commit(store, staged)
    taken = store.take_over([kept, ours])
    for item in taken:
        assert item.samples == store.samples(item.record.samples_digest or "") == (own if rival is not None else theirs)
    assert store.take_over(taken) == taken
    assert taken[1].record.trial is not None and taken[1].record.trial.digest == taken[1].ref.digest
    assert commit(store, taken[0]).ref == taken[0].ref


def test_an_edit_of_a_version_that_is_not_live_any_more_is_refused(store: LoraStore, make_folder: MakeFolder) -> None:
    first = commit(store, store.stage(make_folder()))
    own = store.samples(first.samples_digest or "")
    resampled, edited = store.resample(first, [*own, ACCEPTED]), store.edit(first, Edit(tags=("old",)))
    newer = commit(store, store.stage(make_folder(seed=5)))
    for staged in (resampled, edited):
        with pytest.raises(VersionConflict):
            commit(store, staged)
    assert live(store).ref == newer.ref, "the newer weights stay"
    store.withdraw("local", ["poet"], "owner")
    store.discard([resampled, edited])
    store.sweep(first.blobs)
    with pytest.raises(AdapterNotFound):  # its weights are gone
        store.resample(first, [ACCEPTED])


def test_the_same_samples_twice_are_one_version_that_is_not_approved(store: LoraStore, make_folder: MakeFolder) -> None:
    first = commit(store, store.stage(make_folder(), visibility="public"))
    store.approve([first.ref], "admin")
    twice = [store.resample(live(store), [Sample("a"), ACCEPTED]) for _ in range(2)]
    store.set_visibility("local", "poet", "private", "owner")
    made = [commit(store, staged) for staged in twice]
    assert made[0].ref == made[1].ref and not made[0].approved
    assert made[0].visibility == "private", "that of the commit"


def test_a_withdrawal_deletes_the_proposals_for_the_adapter(store: LoraStore, make_folder: MakeFolder) -> None:
    commit(store, store.stage(make_folder()))
    store.feedback.put("local", "proposed", Feedback.proposed("Rhyme", "poet", "key"), datetime.now(UTC))
    store.withdraw("local", ["poet"], "owner")
    assert store.feedback.all("local", "proposed", "poet") == []


@pytest.mark.parametrize("ttl_s", [None, 60.0], ids=["withdraw", "expire"])
def test_a_withdrawal_is_done_even_if_the_proposals_cannot_be_deleted(
    store: LoraStore, make_folder: MakeFolder, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, ttl_s: float | None
) -> None:
    def fail(tenant: str, adapter: str) -> NoReturn:
        raise StoreUnavailable("a timeout")

    store.commit([store.stage(make_folder(), ttl_s=ttl_s)], [embedding()], [1.0], "owner")
    record = live(store)
    monkeypatch.setattr(store.feedback, "delete", fail)
    clock.sleep(60)
    gone = store.withdraw("local", ["poet"], "owner") if ttl_s is None else store.expire()
    assert gone == Withdrawn(2, (record,))


def test_an_edit_makes_a_version_of_the_same_weights_and_keeps_the_rest(
    store: LoraStore, make_folder: MakeFolder
) -> None:
    first = commit(store, store.stage(make_folder(), tags=["fun"], template="alpaca"))
    second = commit(store, store.edit(first, Edit(tags=("b", "a", "b"))))
    assert (second.tags, second.template, second.samples_digest) == (("a", "b"), "alpaca", first.samples_digest)
    third = commit(store, store.edit(second, Edit(template="server", visibility="private")))
    assert (third.tags, third.template, third.visibility) == (("a", "b"), None, "private")
    assert {record.weights_digest for record in (second, third)} == {first.weights_digest}
    asked = commit(store, store.edit(third, Edit(contract='{"stop":["."]}')))
    assert (asked.contract, asked.tags) == ('{"stop":["."]}', ("a", "b"))
    fourth = commit(store, store.edit(asked, Edit(tags=("fun",))))
    assert fourth.contract == asked.contract
    assert commit(store, store.edit(fourth, Edit(template="alpaca", contract=""))).ref == first.ref


def test_an_edit_names_the_base_models_chat_template_only_if_it_has_one(
    store: LoraStore, make_folder: MakeFolder
) -> None:
    first = commit(store, store.stage(make_folder()))
    with pytest.raises(AdapterRefused, match="has no chat template"):
        store.edit(first, Edit(template="chat"), templates={})
    second = commit(store, store.edit(first, Edit(template="chat"), templates={"a digest": "chat"}))
    third = commit(store, store.edit(second, Edit(tags=("fun",)), templates={}))
    assert (third.template, third.tags) == ("chat", ("fun",)), "what is not changed is not judged"


def test_an_edit_of_samples_keeps_the_marks_of_accepted_ones(store: LoraStore, make_folder: MakeFolder) -> None:
    first = commit(store, store.stage(make_folder()))
    accepted = commit(store, store.resample(first, [Sample("a"), ACCEPTED]))
    edited = commit(store, store.edit(accepted, Edit(samples=(Sample("new", "out"), Sample(ACCEPTED.input)))))
    assert store.samples(edited.samples_digest or "") == (Sample("new", "out"), ACCEPTED)
    bare = commit(store, store.edit(edited, Edit(samples=())))
    assert (bare.samples_digest, bare.num_samples) == (None, 0)
    assert commit(store, store.edit(bare, Edit(samples=(Sample("a"),)))).num_samples == 1


def test_an_undo_that_leaves_no_sample_makes_a_version_without_samples(
    store: LoraStore, make_folder: MakeFolder
) -> None:
    first = commit(store, store.stage(make_folder()))
    commit(store, store.resample(first, [Sample("a"), ACCEPTED]))
    edited = commit(store, store.edit(live(store), Edit(samples=(Sample(ACCEPTED.input),))))
    bare = commit(store, store.resample(edited, None))
    assert (bare.samples_digest, bare.num_samples) == (None, 0)
    assert not [check for check in store.verify() if check.problem], "every blob of a kept version is stored"


def test_an_edit_is_refused_with_every_reason(store_uri: str, make_folder: MakeFolder) -> None:
    store = LoraStore(store_uri, accepts_base=[BASE], limits=Limits(max_samples=2, max_sample_bytes=64))
    first = commit(store, store.stage(make_folder()))
    bad = Edit(tags=("a b",), samples=(Sample(" "), Sample("a", "x" * 65), Sample("ok")), contract="{}")

    def refuse(name: str, data: bytes) -> NoReturn:
        raise FileRefused(name, [f"{data.decode()} is too long"])

    with pytest.raises(AdapterRefused) as refused:
        store.edit(first, bad, refuse)
    for reason in (
        "contract: {} is too long",
        "tag 'a b' must be 1 to 64",
        "samples: at most 2, got 3; send fewer",
        'samples: number 1 needs an "input" that is not blank',
        'samples: number 2 has an "output" of more than 64 bytes',
    ):
        assert reason in str(refused.value)
    assert live(store).ref == first.ref


def test_an_unlisted_adapter_gets_no_samples(store: LoraStore, make_folder: MakeFolder) -> None:
    first = commit(store, store.stage(make_folder(), ttl_s=60))
    with pytest.raises(AdapterRefused, match="an adapter with ttl_s has none"):
        store.edit(first, Edit(samples=(Sample("a"),)))
    assert commit(store, store.edit(first, Edit(tags=("step",)))).expires_at == first.expires_at
