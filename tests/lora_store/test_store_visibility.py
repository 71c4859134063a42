"""Which tenants may name and find an adapter: chosen at a publish, changed later, approved by an admin."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from lora_store import AdapterNotFound, AdapterRef, Edit, LoraStore, Snapshot, policy_digest
from lora_store.errors import PublicNameTaken
from tests.lora_store.builders import IN_A_FOLDER, MakeFolder, OpenStore, PublishOne, embedding, ranking

pytestmark = IN_A_FOLDER


def seen(store: LoraStore, tenant: str) -> list[str]:
    return [str(record.ref.name) for record in store.snapshot().visible_to(tenant)]


def test_a_private_adapter_is_only_its_tenants_until_it_is_made_public(
    store: LoraStore, publish: PublishOne, open_store: OpenStore
) -> None:
    publish(tenant="acme", visibility="private")
    assert (seen(store, "acme"), seen(store, "other")) == (["poet"], [])
    assert store.set_visibility("acme", "poet", "public", "key-1") == 2
    assert seen(store, "other") == ["poet"]
    assert store.set_visibility("acme", "poet", "public", "key-1") == 2  # it is public already
    assert store.set_visibility("acme", "poet", "private", "key-1") == 3
    assert seen(store, "other") == []
    assert open_store().snapshot() == store.snapshot()  # the events are read as they were written


Repeated = Callable[[LoraStore, AdapterRef], int]
POLICY = AdapterRef("acme", "support", policy_digest("{}"))
TENANTS_OWN: dict[str, Repeated] = {
    "visibility": lambda store, ref: store.set_visibility(*ref.key, "public", "me"),
    "no trial": lambda store, ref: store.set_trial(*ref.key, None, "me"),
    "name": lambda store, _: store.set_name(POLICY.key, "{}", "me"),
    "evaluation": lambda store, ref: store.rank(ref.tenant, [ranking(ref)], "me"),
    "outcomes": lambda store, ref: store.rank(ref.tenant, [], "me", are_outcomes=True),
    "publish": lambda store, ref: store.commit(
        [store.restage(store.snapshot().records[ref.key])], [embedding()], [1.0], "me"
    ),
}
EVERYBODYS: dict[str, Repeated] = {
    "approval": lambda store, ref: store.approve([ref], "me"),
    "approval of a name": lambda store, _: store.approve_name(POLICY),
    "encoder": lambda store, _: store.activate_encoder("model", "enc", "me"),
}


@pytest.mark.parametrize("what", [*TENANTS_OWN, *EVERYBODYS])
def test_a_change_that_was_made_already_returns_a_generation_that_its_tenant_sees(
    store: LoraStore, publish: PublishOne, what: str
) -> None:
    ref = publish(tenant="acme", visibility="public").ref
    store.set_name(POLICY.key, "{}", "me")
    for make in (*EVERYBODYS.values(), TENANTS_OWN["evaluation"]):
        make(store, ref)
    publish("secret", tenant="globex", visibility="private")
    before = store.snapshot()
    everybodys, newest = before.generation_for("globex's customer"), before.generation_for("acme")
    assert everybodys < newest < before.generation
    assert (TENANTS_OWN | EVERYBODYS)[what](store, ref) == (newest if what in TENANTS_OWN else everybodys)
    assert store.snapshot() is before


def test_only_a_public_adapter_claims_the_bare_name(store: LoraStore, publish: PublishOne) -> None:
    publish(tenant="acme", visibility="private")
    publish(tenant="other", visibility="private")  # no tenant learns another's private name
    store.set_visibility("acme", "poet", "public", "me")
    with pytest.raises(PublicNameTaken) as caught:
        store.set_visibility("other", "poet", "public", "me")
    assert caught.value.name == "poet"
    with pytest.raises(PublicNameTaken):
        publish(seed=1, tenant="other", visibility="public")
    assert store.snapshot().generation == 3


def test_a_commit_is_checked_without_changing_anything(
    store: LoraStore, publish: PublishOne, make_folder: MakeFolder
) -> None:
    publish(tenant="acme", visibility="public")
    for visibility, is_refused in (("public", True), ("private", False)):
        staged = store.stage(make_folder(seed=1), tenant="other", visibility=visibility)
        with pytest.raises(PublicNameTaken) if is_refused else nullcontext():
            store.check_commit([staged])
        assert (store.snapshot().generation, seen(store, "other")) == (1, ["poet"])
        store.discard([staged])


def test_an_update_without_visibility_keeps_that_of_the_name_at_the_commit(
    store: LoraStore, publish: PublishOne, make_folder: MakeFolder
) -> None:
    publish(visibility="private", keeps_visibility=True)
    assert seen(store, "other") == [], "a new name takes the visibility that it was staged with"
    store.set_visibility("local", "poet", "public", "me")
    staged = store.stage(make_folder(seed=1), visibility="public", keeps_visibility=True)
    store.set_visibility("local", "poet", "private", "me")  # between stage and commit
    store.commit([staged], [embedding()], [1.0], "me")
    assert store.snapshot().records["local", "poet"].ref == staged.ref
    assert seen(store, "other") == []
    publish(seed=1, visibility="public", precondition="live")  # embeds it again
    assert seen(store, "other") == []
    publish(seed=2, visibility="public")
    assert seen(store, "other") == ["poet"]


def test_a_rollback_never_makes_a_private_adapter_public(store: LoraStore, publish: PublishOne) -> None:
    old = publish(visibility="public")
    publish(seed=1, visibility="private")
    store.commit([store.restage(old.record)], [embedding()], [1.0], "me")
    assert (store.snapshot().records["local", "poet"].ref, seen(store, "other")) == (old.ref, [])


def test_a_name_is_made_private_with_older_versions_and_public_without(store: LoraStore, publish: PublishOne) -> None:
    publish(visibility="public")
    publish(seed=1, visibility="public")
    for change, expected in (("private", ["private"] * 2), ("public", ["public", "private"])):
        store.set_visibility("local", "poet", change, "me")
        assert [record.visibility for record in store.snapshot().versions(("local", "poet"))] == expected
    for visibility in ("public", "private"):
        with pytest.raises(AdapterNotFound):
            store.set_visibility("other", "poet", visibility, "me")


def test_a_private_version_makes_the_older_ones_private_too(
    store: LoraStore, publish: PublishOne, open_store: OpenStore
) -> None:
    """Otherwise plans of other tenants that pin an older version would still be answered."""
    publish(visibility="public")
    live = store.snapshot().records["local", "poet"]
    store.commit([store.edit(live, Edit(tags=("new",), visibility="private"))], [embedding()], [1.0], "me")
    kept = store.snapshot().versions(("local", "poet"))
    assert [record.visibility for record in kept] == ["private", "private"]
    publish(seed=1, visibility="public")
    publish(seed=2, visibility="private")
    kept = store.snapshot().versions(("local", "poet"))
    assert {record.visibility for record in kept} == {"private"} and len(kept) == 3, "KEPT_VERSIONS is three"
    assert open_store().snapshot() == store.snapshot()


def test_an_approval_is_for_one_version(store: LoraStore, publish: PublishOne, open_store: OpenStore) -> None:
    first = publish().ref
    assert store.approve([first, first], "boss") == 2
    assert store.approve([first], "boss") == 2  # it is approved already
    assert store.snapshot().records["local", "poet"].approved
    second = publish(seed=1).ref
    assert not store.snapshot().records["local", "poet"].approved
    with pytest.raises(AdapterNotFound):  # the version that the admin reviewed is not live any more
        store.approve([first], "boss")
    store.approve([second], "boss")
    assert publish().ref == first  # the same bytes are live again and need no second review
    assert store.snapshot().records["local", "poet"].approved
    assert open_store().snapshot() == store.snapshot()
    store.withdraw("local", ["poet"], "me")
    publish()
    assert not store.snapshot().records["local", "poet"].approved, "it ended with the name"
    with pytest.raises(AdapterNotFound):  # it is not public
        store.approve([publish("secret", visibility="private").ref], "boss")


def test_names_of_others_cost_the_same_look_ups_if_they_exist_or_not(store: LoraStore, publish: PublishOne) -> None:
    """Look-ups are counted, because times vary; `test_isolation.py` counts the work of whole requests."""
    publish(tenant="acme", visibility="private")
    snapshot = store.snapshot()
    for private, unknown in (("acme/poet", "acme/nobody"), ("poet", "nobody")):
        assert look_ups(snapshot, private) == look_ups(snapshot, unknown)


class Counted(dict):
    num_gets = 0

    def get(self, *args: Any) -> Any:
        self.num_gets += 1
        return super().get(*args)


def look_ups(snapshot: Snapshot, name: str) -> tuple[int, int]:
    records, public = Counted(snapshot.records), Counted(snapshot.public)
    object.__setattr__(snapshot, "records", records)
    snapshot.__dict__["public"] = public
    with pytest.raises(AdapterNotFound) as caught:
        snapshot.resolve("other", name)
    assert str(caught.value) == f"no adapter {name!r}"
    return records.num_gets, public.num_gets


def test_verify_reads_only_blobs_that_the_tenant_sees(open_store: OpenStore, make_folder: MakeFolder) -> None:
    store = open_store()
    cases = [("acme", "mine", "private"), ("globex", "hidden", "private"), ("globex", "shown", "public")]
    staged = {
        name: store.stage(make_folder(name, seed), tenant=tenant, visibility=visibility)
        for seed, (tenant, name, visibility) in enumerate(cases)
    }
    store.commit(list(staged.values()), [embedding()] * 3, [1.0] * 3, "me")
    blobs = {name: set(item.record.blobs) for name, item in staged.items()}
    for tenant, names in {"acme": ("mine", "shown"), "globex": ("hidden", "shown"), "other": ("shown",)}.items():
        wanted = store.to_verify(tenant)
        assert set(wanted) == set().union(*(blobs[name] for name in names))
        assert {ref.name for ref in wanted.values()} <= set(names)
        assert {check.digest for check in store.verify(wanted)} == set(wanted)
    assert len(store.to_verify()) == len(set().union(*blobs.values())) == len(list(store.verify()))
