from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from lora_store import AdapterRef, NamedPolicy
from lora_store.events import (
    SCHEMA,
    ActivateEncoder,
    Approve,
    Embed,
    Event,
    Fold,
    Keep,
    Publish,
    Rank,
    SetName,
    SetTrial,
    SetVisibility,
    VisibleChange,
    Withdraw,
    knows_all_events,
    make_fold_table,
    make_table,
    read_dated_events,
)
from lora_store.records import OutputProfile
from lora_store.trials import Trial
from tests.lora_store.builders import NOON, MakeRecord, embedding, ranking

REF = AdapterRef("local", "poet", "d" * 64)
NAMED = NamedPolicy(AdapterRef("local", "support", "e" * 64), '{"temperature":0}', "me", NOON)


@pytest.mark.parametrize(
    "event",
    [
        Withdraw(REF, "me", NOON),
        SetVisibility(REF, "private", "me", NOON),
        Approve(REF, "boss", NOON),
        Embed(REF, embedding(1.0, 2.0)),
        ActivateEncoder("model", "identity", "me", NOON),
        SetTrial(REF, Trial("a" * 64, 0.125, is_shadow=True), "me", NOON),
        Rank("acme", ranking(REF), True, "me", NOON),
        Rank("acme", ranking(REF), False, "me", NOON),
        SetName(NAMED),
        SetName(replace(NAMED, approved=True)),
        SetName(replace(NAMED, policy="")),
    ],
    ids=lambda event: type(event).__name__,
)
def test_an_event_is_read_as_it_was_written(event: Event) -> None:
    [(generation, read)] = read_dated_events(make_table([event], 7), after=0)
    assert (generation, read) == (7, event)
    if isinstance(event, Rank) and isinstance(read, Rank):
        assert read.ranking.vector.tolist() == event.ranking.vector.tolist()
        assert read.ranking.own_scores.tolist() == event.ranking.own_scores.tolist()
    if isinstance(event, Embed) and isinstance(read, Embed):
        assert read.embedding.vector.tolist() == event.embedding.vector.tolist()


def test_a_contract_is_read_as_it_was_written(make_record: MakeRecord) -> None:
    records = [replace(make_record(), contract=contract) for contract in (None, '{"stop":["\u00e9"]}', None)]
    events: list[Event] = [*map(Publish, records), *(Keep(record, is_live=True) for record in records)]
    read = [event for _, event in read_dated_events(make_table(events, 7), after=0)]
    contracts = [event.record.contract for event in read if isinstance(event, Publish | Keep)]
    assert contracts == [record.contract for record in records] * 2


@pytest.mark.parametrize("shift", [float("nan"), float("inf")])
def test_a_shift_that_is_no_number_is_read_as_none(shift: float, make_record: MakeRecord) -> None:
    record = make_record(probe_shift=shift)
    events: list[Event] = [Publish(record), Keep(record, is_live=True)]
    read = [event for _, event in read_dated_events(make_table(events, 7), after=0)]
    assert [event.record.probe_shift for event in read if isinstance(event, Publish | Keep)] == [None, None]


@pytest.mark.parametrize(
    "outputs",
    [None, OutputProfile(("no", "yes")), OutputProfile((), np.array([-127, 0, 42], np.int8))],
    ids=["none", "labels", "vector"],
)
def test_a_profile_of_outputs_is_read_as_it_was_written(make_record: MakeRecord, outputs: OutputProfile | None) -> None:
    own = replace(embedding(), outputs=outputs)
    events = [Publish(make_record(embedding=own)), Embed(REF, own), Keep(make_record(embedding=own), is_live=True)]
    for _, read in read_dated_events(make_table(events, 7), after=0):
        assert isinstance(read, Publish | Embed | Keep)
        found = read.embedding if isinstance(read, Embed) else read.record.embedding
        assert found is not None and found.outputs == outputs
        if outputs is not None and outputs.vector is not None:
            assert found.outputs is not None and found.outputs.vector is not None
            assert found.outputs.vector.tolist() == [-127, 0, 42]


def test_a_publish_gets_the_generation_of_its_commit(make_record: MakeRecord) -> None:
    [(_, read)] = read_dated_events(make_table([Publish(make_record())], 7), after=0)
    assert isinstance(read, Publish) and read.record.generation == 7


def test_a_fold_is_read_as_it_was_written_and_keeps_generations(make_record: MakeRecord) -> None:
    events = [Fold("model", "identity"), VisibleChange("acme", 3), Keep(make_record(), is_live=True)]
    events += [Keep(make_record(digest="e" * 64), is_live=False), Embed(REF, embedding())]
    events += [Rank("acme", ranking(REF), is_first, "me", NOON) for is_first in (True, False)]
    events += [SetName(NAMED), SetName(replace(NAMED, approved=True))]
    assert [event for _, event in read_dated_events(make_fold_table(events, 9, {"one": 1}), after=0)] == events


def test_names_on_disk_do_not_change_and_are_known(make_record: MakeRecord) -> None:
    """Existing stores have these strings."""
    ranks = [Rank("acme", ranking(REF), is_first, "me", NOON) for is_first in (True, False)]
    folded = [Fold(None, None), VisibleChange("", 1), Keep(make_record(), is_live=True)]
    folded += [Keep(make_record(), is_live=False), Embed(REF, embedding()), *ranks, SetName(NAMED)]
    changes = [Withdraw(REF, "me", NOON), SetVisibility(REF, "public", "me", NOON), Approve(REF, "me", NOON)]
    changes += [ActivateEncoder("m", "i", "me", NOON), Publish(make_record()), Publish(make_record(is_offered=True))]
    changes += [Embed(REF, embedding()), SetTrial(REF, None, "me", NOON), *ranks, SetName(NAMED)]
    kept = ["fold", "keep_shown", "keep_live", "keep_older", "keep_pending", "keep_rank_first", "keep_rank"]
    names = ["withdraw", "set_visibility", "approve", "activate_encoder", "publish", "offer", "embed", "set_trial"]
    for rows, expected in (
        (make_fold_table(folded, 1, {"one": 1}), [*kept, "keep_name", "keep_commit"]),
        (make_table(changes, 1), [*names, "rank_first", "rank", "set_name"]),
    ):
        assert rows["event"].to_pylist() == expected
        assert knows_all_events(rows)


def test_a_kind_of_event_that_only_a_newer_release_knows_is_skipped_and_noticed() -> None:
    rows = make_table([Approve(REF, "boss", NOON), Withdraw(REF, "me", NOON)], 7)
    newer = rows.set_column(2, SCHEMA.field("event"), pa.array(["pin", "withdraw"]))
    assert [event for _, event in read_dated_events(newer, after=0)] == [Withdraw(REF, "me", NOON)]
    assert (knows_all_events(rows), knows_all_events(newer)) == (True, False)
