"""The generation that a tenant sees changes only with adapters that it can see."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lora_store import Snapshot
from lora_store.catalogue import Catalogue
from lora_store.events import ActivateEncoder, Approve, Embed, Publish, SetVisibility, Withdraw
from lora_store.location import Location
from tests.lora_store.builders import NOON, MakeRecord, embedding

TENANTS = ("acme", "globex", "stranger")


def generations_of(snapshot: Snapshot) -> list[int]:
    return [snapshot.generation_for(tenant) for tenant in TENANTS]


def test_private_changes_move_only_their_tenants_generation(folder_uri: str, make_record: MakeRecord) -> None:
    catalogue = Catalogue(location := Location(folder_uri))
    private = make_record("plan", tenant="acme", visibility="private")
    public = make_record("poet", tenant="globex", visibility="public")
    steps: list[tuple[Any, list[int]]] = [
        (Publish(public), [1, 1, 1]),
        (Publish(private), [2, 1, 1]),
        (Embed(private.ref, embedding(1.0, encoder="next")), [2, 1, 1]),
        (Withdraw(private.ref, "me", NOON), [4, 1, 1]),
        (Approve(public.ref, "boss", NOON), [5, 5, 5]),
        (SetVisibility(public.ref, "private", "me", NOON), [6, 6, 6]),  # all tenants see that it is gone
        (Publish(make_record("poet", tenant="globex", visibility="private", digest="7" * 64)), [6, 7, 6]),
        (SetVisibility(public.ref, "public", "me", NOON), [8, 8, 8]),
        (ActivateEncoder("model", "next", "me", NOON), [9, 9, 9]),
        (Withdraw(public.ref, "me", NOON), [10, 10, 10]),
    ]
    for number, (event, expected) in enumerate(steps, start=1):
        assert catalogue.commit(lambda snapshot, event=event: [event]) == number
        assert generations_of(catalogue.snapshot()) == expected, event
        assert generations_of(Catalogue(location).snapshot()) == expected, event  # a replica that starts now


def changes(before: Snapshot, after: Snapshot, event: Any, tenant: str) -> bool:
    """Return whether the event changed what the tenant sees, or is about something that it sees."""
    seen = [{r.ref.key: (r, r.approved) for r in state.visible_to(tenant)} for state in (before, after)]
    return seen[0] != seen[1] or _is_about_seen(event, after, tenant)


def _is_about_seen(event: Any, after: Snapshot, tenant: str) -> bool:
    """Return whether the tenant sees the event's subject, even if the event did not change it."""
    ref = event.record.ref if isinstance(event, Publish) else event.ref
    record = after.records.get((ref.tenant, ref.name))
    return record is not None and record.is_visible_to(tenant)


@pytest.mark.parametrize("seed", range(2))
def test_events_and_folds_give_the_same_generation(folder_uri: str, make_record: MakeRecord, seed: int) -> None:
    location = Location(folder_uri)
    draw, readers = random.Random(seed), [Catalogue(location, min_tail=10), Catalogue(location)]
    replayed, expected = Snapshot(0, {}), dict.fromkeys(TENANTS, 0)
    for number in range(1, 41):
        tenant, name = draw.choice(TENANTS[:2]), f"n{draw.randrange(3)}"
        snapshot = readers[0].snapshot()
        record = snapshot.records.get((tenant, name))
        visibility = draw.choice(["private", "private", "public"])
        made = make_record(f"{name}", tenant=tenant, visibility=visibility, digest=f"{number:064x}")
        event: Any = Publish(made)
        if record is not None:
            event = draw.choice(
                [Publish(made), Withdraw(record.ref, "me", NOON), SetVisibility(record.ref, visibility, "me", NOON)]
            )
        generation = readers[0].commit(lambda snapshot, event=event: [event])
        after = replayed.after([event], generation)
        expected |= {tenant: generation for tenant in TENANTS if changes(replayed, after, event, tenant)}
        replayed = after
        if draw.random() < 0.2:
            readers[1].snapshot()  # it follows several generations at once
        assert generations_of(readers[0].snapshot()) == list(expected.values())
        if number % 20 == 0:
            assert generations_of(Catalogue(location).snapshot()) == list(expected.values())
    assert generations_of(readers[1].snapshot()) == list(expected.values())


def test_a_snapshot_without_a_catalogue_has_its_own_generation() -> None:
    assert generations_of(Snapshot(7, {})) == [7, 7, 7]
