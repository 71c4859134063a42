from __future__ import annotations

import pytest

from lora_store.records import Visibility
from tests.lora_store.builders import MakeRecord, embedding


@pytest.mark.parametrize(("visibility", "tenants"), [("public", ["acme", "globex"]), ("private", ["acme"])])
def test_a_private_version_is_visible_only_to_its_tenant(
    visibility: Visibility, tenants: list[str], make_record: MakeRecord
) -> None:
    record = make_record(tenant="acme", visibility=visibility)
    assert [tenant for tenant in ("acme", "globex") if record.is_visible_to(tenant)] == tenants


@pytest.mark.parametrize(
    ("visibility", "approved", "open_at_once", "open_by_approval"),
    [("public", True, True, True), ("public", False, True, False), ("private", True, False, False)],
)
def test_auto_chooses_public_versions_for_every_tenant_if_approved_or_not_required(
    visibility: Visibility, approved: bool, open_at_once: bool, open_by_approval: bool, make_record: MakeRecord
) -> None:
    record = make_record(visibility=visibility, approved=approved)
    assert record.is_open(requires_approval=False) == open_at_once
    assert record.is_open(requires_approval=True) == open_by_approval


def test_embeddings_are_equal_if_one_encoder_made_them() -> None:
    assert embedding(1.0, 2.0, encoder="mini") == embedding(3.0, encoder="mini")
    assert embedding(1.0, encoder="mini") != embedding(1.0, encoder="large")
