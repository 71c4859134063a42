from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest

from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from retriever_svc.listing import ROWS_OF_A_LIST, Listings, Page, PageRequest, listed
from tests.retriever_svc.pool_fakes import record_of

TAGS = [(), ("code",), ("code", "fast"), ("prose",)]
RECORDS = [
    replace(
        record_of(
            f"{name}{number:02}",
            None,
            tenant=tenant,
            visibility="private" if number % 3 else "public",
            tags=TAGS[number % 4],
            base_model="large" if number % 5 else "small",
        ),
        created_at=datetime(2026, 1, 1 + 7 * number % 10, tzinfo=UTC),
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
    rows = sorted(
        (name, record.created_at)
        for name, record in named
        if (record.ref.tenant == tenant or record.visibility == "public")
        and request.owner in (None, record.ref.tenant)
        and request.base in (None, record.base_model)
        and all(tag in record.tags for tag in request.tags)
        and request.contains.lower() in name.lower()
        and all(word in f"{name} {' '.join(record.tags)}".lower() for word in request.words.lower().split())
    )
    if request.sort != "name":
        rows.sort(key=lambda row: row[1], reverse=request.sort == "newest")  # equal times stay in the order of names
    return [name for name, _ in rows]


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
        {"base": "small", "owner": "b"},
        {"sort": "newest"},
        {"sort": "oldest", "tags": ("code",)},
    ],
    ids=str,
)
def test_pages_hold_every_match_once_and_in_order(tenant: str, limit: int, filters: dict[str, object]) -> None:
    listings, seen, after, has_more = Listings(snapshot_of(*RECORDS)), [], "", True
    while has_more:
        found = listings.page(tenant, PageRequest(limit, after, **filters))  # type: ignore[arg-type]
        assert len(found.rows) == limit or not found.has_more
        assert found.num_found == len(matching_slowly(tenant, PageRequest(limit, **filters)))  # type: ignore[arg-type]
        seen += names(found)
        has_more, after = found.has_more, seen[-1] if seen else ""
    assert seen == matching_slowly(tenant, PageRequest(limit, **filters))  # type: ignore[arg-type]


def test_a_page_continues_after_a_removed_name_and_one_by_age_begins_again() -> None:
    kept = [record for record in RECORDS if record.ref.name != "Alpha05"]
    listings = Listings(snapshot_of(*kept))
    assert names(listings.page("a", PageRequest(1, "Alpha05"))) == ["Alpha06"]
    newest = names(listings.page("a", PageRequest(2, sort="newest")))
    assert names(listings.page("a", PageRequest(2, "gone", sort="newest"))) == newest


def test_another_tenants_adapter_is_listed_with_its_owner() -> None:
    own = record_of("same", None, tenant="a", visibility="private")
    public = record_of("same", None, tenant="b")
    snapshot = snapshot_of(own, public)
    listings = Listings(snapshot)
    assert names(listings.page("a", PageRequest(9))) == ["b/same", "same"]
    assert names(listings.page("c", PageRequest(9))) == ["b/same"]
    for tenant in ("a", "c"):
        for name, record in listings.page(tenant, PageRequest(9)).rows:
            assert snapshot.resolve(tenant, name) == record


class Touched(AdapterRecord):
    """A record that counts its reads."""

    __slots__ = ()
    count: ClassVar[list[int]] = [0]

    def __getattribute__(self, name: str) -> Any:
        Touched.count[0] += 1
        return super().__getattribute__(name)


def touched_by(work: Callable[[], object]) -> int:
    before = Touched.count[0]
    work()
    return Touched.count[0] - before


def test_only_the_first_page_of_a_list_reads_the_pools_records() -> None:
    count = 20_000  # more than one sorted block
    records = [record_of(f"a{n:05}", None, tenant=f"t{n % 3}", tags=("x",) if n % 2 else ()) for n in range(count)]
    counted = [Touched(**{f.name: getattr(record, f.name) for f in fields(record)}) for record in records]
    listings = Listings(snapshot_of(*counted))
    for filters in ({}, {"tags": ("x",)}, {"words": "a0001"}):
        first, after = PageRequest(100, **filters), PageRequest(100, "t1/a00010", **filters)  # type: ignore[arg-type]
        assert touched_by(lambda first=first: listings.page("t0", first)) > count / 4
        for request in (after, first):
            assert touched_by(lambda request=request: listings.page("t0", request)) == 0
    rows = listings.page("t0", PageRequest(count)).rows
    assert [name for name, _ in rows] == sorted(name for name, _ in rows)
    assert len(rows) == count


def test_all_lists_together_have_a_bound() -> None:
    max_rows = 3 * ROWS_OF_A_LIST + 30
    listings = Listings(snapshot_of(*RECORDS), max_rows=max_rows)
    for word in ("alpha", "beta", "code", "fast", "prose", "a", "b", "0", "1", "no such", "nor such"):
        for tenant in ("a", "b", "nobody"):
            listings.page(tenant, PageRequest(9, words=word))
            lists = [listings._lists.get(query) for query in list(listings._lists.keys())]
            taken = sum(len(rows) + ROWS_OF_A_LIST for rows in lists if rows is not None)
            assert listings._lists.total == taken <= max_rows


def test_no_list_shows_an_unlisted_adapter() -> None:
    brief = replace(record_of("brief", None, tenant="a"), expires_at=datetime.now(UTC) + timedelta(hours=1))
    other = record_of("other", None, tenant="a")
    found = Listings(snapshot_of(brief, other)).page("a", PageRequest(limit=9))
    assert (names(found), found.num_found) == (["other"], 1)
    assert list(listed([brief, other], "a")) == [other]
