"""Model names in the catalogue: versions, approval, and names that an adapter has already."""

from __future__ import annotations

import pytest

from lora_store import (
    KEPT_POLICIES,
    AdapterNotFound,
    AdapterRef,
    LoraStore,
    NameTaken,
    QuotaExceeded,
    Snapshot,
    policy_digest,
)
from lora_store import rules as store_rules
from lora_store.errors import PublicNameTaken
from lora_store.pool_files import state_events
from tests.lora_store.builders import IN_A_FOLDER, NOON, OpenStore, PublishOne

pytestmark = IN_A_FOLDER

OWN, THEIRS = ("local", "support"), ("them", "support")


def ref_of(key: tuple[str, str], policy: str) -> AdapterRef:
    return AdapterRef(*key, policy_digest(policy))


def policies(store: LoraStore, tenant: str, name: str) -> list[tuple[str, bool]]:
    return [(named.policy, named.approved) for named in store.snapshot().policies(tenant, name)]


def test_the_newest_policy_comes_first_and_a_bounded_number_is_kept(store: LoraStore, open_store: OpenStore) -> None:
    assert store.set_name(OWN, "0", "me") == store.set_name(OWN, "0", "me") == 1
    for number in range(1, KEPT_POLICIES + 2):
        store.set_name(OWN, str(number), "me")
    store.set_name(OWN, "5", "me")  # back to a kept one
    store.approve_name(ref_of(OWN, "4"))
    expected = [("5", False), *[(str(n), n == 4) for n in range(KEPT_POLICIES + 1, 1, -1) if n != 5]]
    for opened in (store, open_store()):
        assert policies(opened, "local", "support") == expected
    before = store.snapshot().names
    store.gc(0.0)  # folds
    assert dict(open_store().snapshot().names) == dict(before) != {}


def test_only_approved_versions_are_seen_by_other_tenants(store: LoraStore) -> None:
    store.set_name(OWN, "a", "me")
    assert policies(store, "them", "support") == policies(store, "them", "local/support") == []
    assert store.snapshot().generation_for("them") == 0
    store.approve_name(ref_of(OWN, "a"))
    store.set_name(OWN, "b", "me")
    for name in ("support", "local/support"):
        assert policies(store, "them", name) == [("a", True)]
    assert policies(store, "local", "support") == [("b", False), ("a", True)]
    assert store.snapshot().generation_for("them") == 3
    store.set_name(OWN, "a", "me")
    assert policies(store, "local", "support") == [("a", True), ("b", False)]
    store.set_name(OWN, "", "me")
    assert policies(store, "them", "support") == policies(store, "local", "support") == []


def test_the_newest_approved_version_stays_kept(store: LoraStore, open_store: OpenStore) -> None:
    """Other tenants use it. A rollback still finds the version before."""
    for policy in ("old", "approved"):
        store.set_name(OWN, policy, "me")
        store.approve_name(ref_of(OWN, policy))
    before = policies(store, "them", "support")[0]
    for number in range(2 * KEPT_POLICIES):
        store.set_name(OWN, str(number), "me")
        kept = [policy for policy, _ in policies(store, "local", "support")]
        assert kept[:2] == [str(number), "approved" if not number else str(number - 1)]
        assert len(kept) == min(number + 3, KEPT_POLICIES)
        assert policies(store, "them", "support")[0] == before == ("approved", True)
    copied = Snapshot(0, {}).after(state_events(store.snapshot(), NOON), 1)
    assert dict(copied.names) == dict(store.snapshot().names)
    for _ in range(2):
        assert dict(open_store().snapshot().names) == dict(store.snapshot().names)
        store.gc(0.0)  # folds
    assert policies(store, "them", "support") == [before]


def test_a_tenants_own_name_comes_before_an_approved_one(store: LoraStore) -> None:
    for key in (OWN, THEIRS):
        store.set_name(key, key[0], "me")
    store.approve_name(ref_of(OWN, "local"))
    assert policies(store, "them", "support") == [("them", False)]
    assert policies(store, "them", "local/support") == [("local", True)]
    with pytest.raises(NameTaken, match="a model name of another tenant"):
        store.approve_name(ref_of(THEIRS, "them"))


@pytest.mark.parametrize(("tenant", "visibility"), [("local", "private"), ("local", "public"), ("them", "public")])
def test_a_name_cannot_be_that_of_an_adapter_which_its_tenant_uses(
    store: LoraStore, publish: PublishOne, tenant: str, visibility: str
) -> None:
    publish("support", tenant=tenant, visibility=visibility)
    with pytest.raises(NameTaken, match="an adapter is called 'support' already"):
        store.set_name(OWN, "a", "me")
    store.set_name(("third", "other"), "a", "me")


def test_an_adapter_cannot_have_a_model_name_of_its_tenant(store: LoraStore, publish: PublishOne) -> None:
    store.set_name(OWN, "a", "me")
    with pytest.raises(PublicNameTaken, match="'support' is a model name: choose another name"):
        publish("support", tenant="local", visibility="private")
    assert not store.snapshot().records
    store.set_name(OWN, "", "me")
    publish("support", tenant="local")


def test_a_private_adapter_may_be_called_like_an_approved_name_of_another_tenant(
    store: LoraStore, publish: PublishOne
) -> None:
    store.set_name(OWN, "a", "me")
    store.approve_name(ref_of(OWN, "a"))
    publish("support", tenant="them", visibility="private")
    assert [record.ref.tenant for record in store.snapshot().records.values()] == ["them"]
    with pytest.raises(PublicNameTaken, match="belongs to another tenant"):
        publish("support", tenant="others", visibility="public")


def test_what_others_publish_later_stops_an_approval_and_no_change(store: LoraStore, publish: PublishOne) -> None:
    store.set_name(OWN, "a", "me")
    publish("support", tenant="third")
    with pytest.raises(NameTaken, match="an adapter"):
        store.approve_name(ref_of(OWN, "a"))
    store.set_name(OWN, "b", "me")
    store.set_name(("them", "other"), "a", "me")
    store.set_name(("local", "other"), "a", "me")
    store.approve_name(ref_of(("them", "other"), "a"))
    store.set_name(("local", "other"), "b", "me")
    for name in ("support", "other"):
        assert policies(store, "local", name) == [("b", False), ("a", False)]


def test_an_own_adapter_comes_before_an_approved_name_and_stays_private(store: LoraStore, publish: PublishOne) -> None:
    publish("support", tenant="them", visibility="private")
    store.set_name(OWN, "a", "me")
    store.approve_name(ref_of(OWN, "a"))
    assert policies(store, "them", "support") == []
    assert policies(store, "third", "support") == policies(store, "them", "local/support") == [("a", True)]
    with pytest.raises(PublicNameTaken, match="belongs to another tenant"):
        store.set_visibility("them", "support", "public", "me")


def test_a_name_that_does_not_exist_is_reported(store: LoraStore) -> None:
    store.set_name(OWN, "b", "me")
    store.set_name(("local", "other"), "a", "me")
    store.set_name(OWN, "", "me")
    with pytest.raises(AdapterNotFound):
        store.set_name(OWN, "", "me")
    with pytest.raises(AdapterNotFound):
        store.approve_name(ref_of(OWN, "a"))
    assert store.snapshot().generation == 3


def test_the_number_of_names_is_bounded(store: LoraStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_rules, "MAX_NAMES", 1)
    store.set_name(OWN, "a", "me")
    store.set_name(OWN, "b", "me")
    store.set_name(THEIRS, "a", "me")
    with pytest.raises(QuotaExceeded, match=r"1 model names, and this would make it 2; remove a model name first$"):
        store.set_name(("local", "other"), "a", "me")
