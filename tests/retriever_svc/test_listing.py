from __future__ import annotations

import random

import pytest

from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from retriever_svc.listing import Page, PageRequest, name_for, page
from tests.retriever_svc.pool_fakes import record_of

TAGS = [(), ("code",), ("code", "fast"), ("prose",)]
RECORDS = [
    record_of(
        f"{name}{number:02}",
        None,
        tenant=tenant,
        visibility="private" if number % 3 else "public",
        tags=TAGS[number % 4],
    )
    for tenant, name in (("a", "Alpha"), ("b", "beta"))
    for number in range(12)
]


def snapshot_of(*records: AdapterRecord) -> Snapshot:
    shuffled = random.Random(1).sample(records, len(records))
    return Snapshot(4, {(record.ref.tenant, record.ref.name): record for record in shuffled})


def names(found: Page) -> list[str]:
    return [name for name, _ in found.rows]


def matching_slowly(tenant: str, request: PageRequest) -> list[str]:
    return sorted(
        record.ref.name
        for record in RECORDS
        if (record.ref.tenant == tenant or record.visibility == "public")
        and request.owner in (None, record.ref.tenant)
        and all(tag in record.tags for tag in request.tags)
        and request.contains.lower() in record.ref.name.lower()
        and record.ref.name > request.after
    )


@pytest.mark.parametrize("tenant", ["a", "b", "nobody"])
@pytest.mark.parametrize("limit", [1, 3, 100])
@pytest.mark.parametrize(
    "filters",
    [{}, {"owner": "b"}, {"tags": ("code",)}, {"contains": "PHA0"}, {"owner": "a", "tags": ("code", "fast")}],
    ids=str,
)
def test_pages_hold_every_match_once_and_in_order(tenant: str, limit: int, filters: dict[str, object]) -> None:
    snapshot, seen, after, has_more = snapshot_of(*RECORDS), [], "", True
    while has_more:
        found = page(snapshot, tenant, PageRequest(limit, after, **filters))  # type: ignore[arg-type]
        assert len(found.rows) == limit or not found.has_more
        seen += names(found)
        has_more, after = found.has_more, seen[-1] if seen else ""
    assert seen == matching_slowly(tenant, PageRequest(limit, **filters))  # type: ignore[arg-type]


def test_a_page_goes_on_after_a_name_that_is_gone() -> None:
    kept = [record for record in RECORDS if record.ref.name != "Alpha05"]
    assert names(page(snapshot_of(*kept), "a", PageRequest(1, "Alpha05"))) == ["Alpha06"]


def test_a_public_adapter_behind_an_own_one_of_its_name_is_listed_by_its_owner() -> None:
    own = record_of("same", None, tenant="a", visibility="private")
    public = record_of("same", None, tenant="b")
    snapshot = snapshot_of(own, public)
    assert names(page(snapshot, "a", PageRequest(9))) == ["b/same", "same"]
    assert names(page(snapshot, "c", PageRequest(9))) == ["same"]
    for tenant in ("a", "c"):
        for name, record in page(snapshot, tenant, PageRequest(9)).rows:
            assert snapshot.resolve(tenant, name) == record
            assert name_for(snapshot, tenant, record) == name
