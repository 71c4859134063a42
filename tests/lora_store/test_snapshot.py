"""What events fold into. Looking names up is tested with the catalogue."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from lora_store import ActivateEncoder, Embed, Publish, Snapshot, Withdraw
from tests.lora_store.builders import embedding

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
POET = ("local", "poet")


@pytest.fixture
def version(make_record):
    """The n-th version of the poet."""
    return lambda number, **changes: make_record(
        digest=f"{number:064x}", weights_digest=f"{number + 99:064x}", **changes
    )


def _fold(*events):
    return Snapshot(0, {}).after(events, len(events))


def _numbers(records):
    return [int(record.ref.digest, 16) for record in records]


def test_the_last_three_versions_are_kept_newest_first(version):
    snapshot = _fold(*(Publish(version(number)) for number in range(5)))
    assert _numbers(snapshot.versions(POET)) == [4, 3, 2]
    assert snapshot.referenced() == {f"{number + 99:064x}" for number in (4, 3, 2)}


def test_a_version_that_comes_back_is_not_kept_twice(version):
    snapshot = _fold(*(Publish(version(number)) for number in (0, 1, 2, 1)))
    assert _numbers(snapshot.versions(POET)) == [1, 2, 0]
    again = snapshot.after([Publish(version(1, visibility="private"))], 5)
    assert _numbers(again.versions(POET)) == [1, 2, 0]
    assert again.records[POET].visibility == "private"


def test_a_withdrawal_takes_every_version(version, make_record):
    snapshot = _fold(Publish(version(0)), Publish(version(1)), Publish(make_record("other")))
    after = snapshot.after([Withdraw(version(1).ref, "me", NOON)], 4)
    assert (after.versions(POET), list(after.records)) == ((), [("local", "other")])
    assert _numbers(snapshot.versions(POET)) == [1, 0]  # the older snapshot is as it was
    assert _numbers(after.after([Publish(version(2))], 5).versions(POET)) == [2]


def test_samples_are_referenced_like_weights(version):
    assert _fold(Publish(version(0, samples_digest="5" * 64))).referenced() == {f"{99:064x}", "5" * 64}


def test_an_embedding_waits_until_its_encoder_is_active(version):
    new = embedding(1.0, encoder="new")
    before = _fold(Publish(version(0)), Embed(version(0).ref, new))
    assert (before.encoder, before.records[POET].encoder) == (None, "enc")
    assert before.pending == {version(0).ref: new}
    after = before.after([ActivateEncoder("model", "new", "me", NOON)], 3)
    assert (after.encoder.model, after.encoder.identity) == ("model", "new")
    assert after.records[POET].embedding is new
    assert after.pending == {}


def test_only_what_is_live_gets_an_embedding(version):
    live = _fold(Publish(version(0)), Publish(version(1)), Embed(version(0).ref, embedding(1.0, encoder="new")))
    assert live.pending == {}
    waiting = live.after([Embed(version(1).ref, embedding(1.0, encoder="new"))], 4)
    for event in (Publish(version(2)), Withdraw(version(1).ref, "me", NOON)):
        assert waiting.after([event], 5).pending == {}


def test_another_encoders_embedding_is_not_activated(version):
    snapshot = _fold(Publish(version(0)), Embed(version(0).ref, embedding(1.0, encoder="third")))
    after = snapshot.after([ActivateEncoder("model", "new", "me", NOON)], 3)
    assert after.records[POET].encoder == "enc"
