"""Rankings in the catalogue: replaced by tenant, kept through folds, and visible to their tenant alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from lora_store import AdapterRef, LoraStore, Ranking, Snapshot, VersionConflict
from lora_store.events import Publish, Rank, Withdraw, make_fold_table, read_dated_events
from lora_store.rankings import OUTCOME
from lora_store.rules import rank_events
from lora_store.snapshot import ActiveEncoder
from tests.lora_store.builders import IN_A_FOLDER, NOON, MakeRecord, OpenStore, ranking

POET, BARD = AdapterRef("local", "poet", "d" * 64), AdapterRef("local", "bard", "e" * 64)


def after(snapshot: Snapshot, *events: Rank | Publish | Withdraw) -> Snapshot:
    return snapshot.after(events, snapshot.generation + 1)


def used(snapshot: Snapshot, tenant: str = "local") -> list[Ranking]:
    return [rank.ranking for rank in snapshot.rankings.get(tenant, ())]


def test_an_evaluation_replaces_the_rankings_of_its_tenant_alone() -> None:
    first = [Rank("local", ranking(POET), True, "me", NOON), Rank("local", ranking(BARD), False, "me", NOON)]
    snapshot = after(Snapshot(0, {}), *first, Rank("acme", ranking(POET), True, "me", NOON))
    assert used(snapshot) == [ranking(POET), ranking(BARD)]
    again = after(snapshot, *rank_events(snapshot, "local", [ranking(BARD, POET)], "me", NOON))
    assert used(again) == [ranking(BARD, POET)]
    assert used(again, "acme") == [ranking(POET)]


def test_a_ranking_outlives_its_anchor_while_one_of_its_adapters_is_live(make_record: MakeRecord) -> None:
    records = [Publish(make_record("poet")), Publish(make_record("bard", digest="e" * 64))]
    snapshot = after(Snapshot(0, {}), *records, Rank("local", ranking(POET, BARD), True, "me", NOON))
    withdrawn = after(snapshot, Withdraw(POET, "me", NOON))
    events = rank_events(withdrawn, "local", [ranking(BARD)], "me", NOON)
    assert used(after(withdrawn, *events)) == [ranking(BARD), ranking(POET, BARD)]
    both = after(withdrawn, Withdraw(BARD, "me", NOON))
    events = rank_events(both, "local", [ranking(BARD)], "me", NOON)
    assert used(after(both, *events)) == [ranking(BARD)]


def test_an_evaluation_keeps_the_rankings_of_anchors_that_it_left_out(make_record: MakeRecord) -> None:
    records = [Publish(make_record("poet")), Publish(make_record("bard", digest="e" * 64))]
    ranks = [Rank("local", ranking(anchor), place == 0, "me", NOON) for place, anchor in enumerate((POET, BARD))]
    snapshot = after(Snapshot(0, {}), *records, *ranks)
    events = rank_events(snapshot, "local", [ranking(BARD, POET)], "me", NOON, keeps=[POET])
    assert used(after(snapshot, *events)) == [ranking(BARD, POET), ranking(POET)]


def test_outcomes_and_an_evaluation_replace_their_own_rankings_only() -> None:
    said = ranking(AdapterRef("local", f"{OUTCOME}1", ""), POET)
    later = replace(said, anchor=AdapterRef("local", f"{OUTCOME}2", ""))
    snapshot = Snapshot(0, {})
    for rankings, are_outcomes in (([ranking(POET)], False), ([said], True), ([ranking(BARD)], False), ([later], True)):
        events = rank_events(snapshot, "local", rankings, "me", NOON, are_outcomes=are_outcomes)
        snapshot = snapshot.after(events, snapshot.generation + 1)
    assert set(used(snapshot)) == {ranking(BARD), later}


def test_what_changes_nothing_is_no_event() -> None:
    """An event replaces all rankings of the tenant, in every pool of every replica."""
    said = ranking(AdapterRef("local", f"{OUTCOME}1", ""), POET)
    snapshot = Snapshot(0, {})
    for rankings, are_outcomes in (([ranking(POET), ranking(BARD)], False), ([said], True)):
        snapshot = after(snapshot, *rank_events(snapshot, "local", rankings, "me", NOON, are_outcomes=are_outcomes))
    assert rank_events(snapshot, "local", [said], "you", NOON, are_outcomes=True) == []
    assert len(rank_events(snapshot, "local", [replace(said, vector=-said.vector)], "me", NOON, are_outcomes=True)) == 3
    assert len(rank_events(snapshot, "local", [ranking(POET)], "me", NOON)) == 2


def test_outcomes_by_another_encoder_than_the_active_one_are_refused() -> None:
    said, active = ranking(AdapterRef("local", f"{OUTCOME}1", ""), POET), ActiveEncoder("model", "newer")
    for outcomes in ([said], [replace(said, encoder="newer"), said]):
        with pytest.raises(VersionConflict):
            rank_events(Snapshot(1, {}, encoder=active), "local", outcomes, "me", NOON, are_outcomes=True)


def test_the_last_outcome_can_be_withdrawn() -> None:
    said = ranking(AdapterRef("local", f"{OUTCOME}1", ""), POET)
    snapshot = after(Snapshot(0, {}), Rank("local", said, True, "me", NOON))
    [event] = rank_events(snapshot, "local", [], "me", NOON, are_outcomes=True)
    assert isinstance(event, Rank)
    [left] = used(after(snapshot, event))
    assert left.is_outcome and [item.ref.name for item in left.adapters] == [OUTCOME], "it names no adapter"


def test_an_evaluation_that_measures_nothing_ends_the_earlier_one() -> None:
    snapshot = after(Snapshot(0, {}), Rank("local", ranking(POET), True, "me", NOON))
    [event] = rank_events(snapshot, "local", [], "me", NOON)
    ended = after(snapshot, event)
    assert [item.ref.name for left in used(ended) for item in left.adapters] == [OUTCOME], "it names no adapter"
    assert rank_events(ended, "local", [], "me", NOON) == rank_events(Snapshot(0, {}), "local", [], "me", NOON) == []


def test_a_fold_keeps_rankings_and_what_each_tenant_can_see(make_record: MakeRecord) -> None:
    events = [Publish(make_record()), Rank("acme", ranking(POET), True, "me", NOON)]
    dated = [(place, event) for place, event in enumerate(events, start=1)]
    snapshot = Snapshot(0, {}).after_dated(dated, 5)
    assert snapshot.generation_for("acme") == 2
    assert snapshot.generation_for("other") == 1
    table = make_fold_table(list(snapshot.folded()), 5, {})
    folded = Snapshot(0, {}).after_dated(read_dated_events(table, after=0), 5)
    assert folded == snapshot
    assert folded.visible_changes == snapshot.visible_changes
    assert used(folded, "acme")[0].vector.tolist() == ranking(POET).vector.tolist()


@IN_A_FOLDER
def test_the_store_commits_rankings(store: LoraStore, open_store: OpenStore) -> None:
    generation = store.rank("local", [ranking(POET), ranking(BARD)], "me")
    assert generation == store.snapshot().generation == 1
    assert used(open_store().snapshot()) == used(copy.copy(store.snapshot())) == [ranking(POET), ranking(BARD)]
    assert store.rank("local", [], "me") == 2
