from __future__ import annotations

import random

import pytest

from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from retriever_svc.listing import Page, PageRequest, page
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
    named = [
        (record.ref.name if record.ref.tenant == tenant else str(record.ref).partition("@")[0], record)
        for record in RECORDS
    ]
    return sorted(
        name
        for name, record in named
        if (record.ref.tenant == tenant or record.visibility == "public")
        and request.owner in (None, record.ref.tenant)
        and all(tag in record.tags for tag in request.tags)
        and request.contains.lower() in name.lower()
        and all(word in f"{name} {' '.join(record.tags)}".lower() for word in request.words.lower().split())
    )


@pytest.mark.parametrize("tenant", ["a", "b", "nobody"])
@pytest.mark.parametrize("limit", [1, 3, 100])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"owner": "b"},
        {"tags": ("code",)},
        {"contains": "PHA0"},
        {"contains": "A/al"},
        {"owner": "a", "tags": ("code", "fast")},
        {"words": "CODE a0"},
        {"words": "  fast b/beta"},
        {"words": "code prose"},
    ],
    ids=str,
)
def test_pages_hold_every_match_once_and_in_order(tenant: str, limit: int, filters: dict[str, object]) -> None:
    snapshot, seen, after, has_more = snapshot_of(*RECORDS), [], "", True
    while has_more:
        found = page(snapshot, tenant, PageRequest(limit, after, **filters))  # type: ignore[arg-type]
        assert len(found.rows) == limit or not found.has_more
        assert found.num_found == len(matching_slowly(tenant, PageRequest(limit, **filters)))  # type: ignore[arg-type]
        seen += names(found)
        has_more, after = found.has_more, seen[-1] if seen else ""
    assert seen == matching_slowly(tenant, PageRequest(limit, **filters))  # type: ignore[arg-type]


def test_a_page_goes_on_after_a_name_that_is_gone() -> None:
    kept = [record for record in RECORDS if record.ref.name != "Alpha05"]
    assert names(page(snapshot_of(*kept), "a", PageRequest(1, "Alpha05"))) == ["Alpha06"]


def test_anothers_adapter_is_listed_by_its_owner_so_that_no_own_name_ever_hides_it() -> None:
    own = record_of("same", None, tenant="a", visibility="private")
    public = record_of("same", None, tenant="b")
    snapshot = snapshot_of(own, public)
    assert names(page(snapshot, "a", PageRequest(9))) == ["b/same", "same"]
    assert names(page(snapshot, "c", PageRequest(9))) == ["b/same"]
    for tenant in ("a", "c"):
        for name, record in page(snapshot, tenant, PageRequest(9)).rows:
            assert snapshot.resolve(tenant, name) == record
