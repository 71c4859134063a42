"""Lists of the pool's adapters, which callers read page by page."""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from typing import Any, Literal

from lora_store.lru_cache import LruCache
from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from retriever_svc.served_bases import BaseCounts, ServedBases

Sort = Literal["name", "newest", "oldest"]
"""By name, or by the time of the version's first publish."""


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Asks for the first `limit` adapters that follow the one named `after` and pass every filter.

    `owner`: only this tenant's. `base`: only of this base model. `tags`: must have all of these. `contains`: part of
    the name, ignoring case. `words`: each must be in the name or a tag, ignoring case. Names are those that the caller
    uses (`name` or `owner/name`).
    """

    limit: int
    after: str = ""
    owner: str | None = None
    base: str | None = None
    tags: tuple[str, ...] = ()
    contains: str = ""
    words: str = ""
    sort: Sort = "name"


@dataclass(frozen=True, slots=True)
class Page:
    """Adapters with the names that the caller uses, sorted as requested. `has_more`: more adapters follow the last one.

    `num_found`: how many adapters pass the filters in total, on this and all other pages. `unserved`: how many others
    the caller could use if their base model was served.
    """

    generation: int
    rows: tuple[tuple[str, AdapterRecord], ...]
    has_more: bool
    num_found: int
    unserved: BaseCounts = ()


Row = tuple[str, AdapterRecord]
Rows = list[Row]  # never changed once created
_Query = tuple[str, PageRequest]
_NO_FILTERS = PageRequest(limit=0)
_SORTED_TOGETHER = 8192
_SORT_KEYS: dict[Sort, Callable[[Row], Any]] = {  # equal times stay in the order of names
    "newest": lambda row: -row[1].created_at.timestamp(),
    "oldest": lambda row: row[1].created_at,
}
ROWS_OF_A_LIST = 64  # the overhead of a list in rows: callers choose the filters, so empty lists must count too


class Listings:
    """The sorted lists of one generation, cached by caller and filters. Safe to call from any thread.

    The first page of a query sorts the caller's adapters; further pages, and the same query again, cost only the rows
    returned. The least recently used lists are evicted, so that all lists together have at most `max_rows` rows, or
    only one list is left.
    """

    def __init__(self, snapshot: Snapshot, bases: ServedBases | None = None, *, max_rows: int = 2_000_000) -> None:
        self._snapshot, self._bases = snapshot, bases or ServedBases()
        self._lists: LruCache[_Query, Rows] = LruCache(max_rows, _count_usable, keeps_newest=True)
        self._lock = threading.Lock()

    def page(self, tenant: str, request: PageRequest) -> Page:
        """Return one page of what `tenant` may use.

        By name it starts after a name, so a changing pool skips no adapter. In another order it starts after the
        adapter of that name, or at the first one if that is gone.
        """
        rows = self._rows(tenant, replace(request, limit=0, after=""))
        if request.sort == "name":
            start = bisect_right(rows, request.after, key=itemgetter(0))
        else:
            start = next((place for place, (name, _) in enumerate(rows, start=1) if name == request.after), 0)
        shown = rows[start : start + request.limit]
        return Page(self._snapshot.generation_for(tenant), tuple(shown), start + request.limit < len(rows), len(rows))

    def _rows(self, tenant: str, filters: PageRequest) -> Rows:
        """Return what `tenant` may use and passes `filters`, by name. Two threads may compute the same list."""
        query = (tenant, filters)
        with self._lock:
            cached = self._lists.get(query)
        if cached is not None:
            return cached
        if filters == _NO_FILTERS:
            rows = _sorted_rows(filter(self._bases.serves, self._snapshot.records.values()), tenant)
        elif filters.sort != "name":
            rows = _sorted_in_blocks(self._rows(tenant, replace(filters, sort="name")), _SORT_KEYS[filters.sort])
        else:
            rows = list(_matching(self._rows(tenant, _NO_FILTERS), filters))
        with self._lock:
            self._lists.put(query, rows)
        return rows


def _count_usable(rows: Rows) -> int:
    return len(rows) + ROWS_OF_A_LIST


def listed(records: Iterable[AdapterRecord], tenant: str) -> Iterator[AdapterRecord]:
    """Return the adapters that `tenant` may use, without those that only their name finds."""
    return (record for record in records if record.is_visible_to(tenant) and not record.is_unlisted)


def _sorted_rows(records: Iterable[AdapterRecord], tenant: str) -> Rows:
    """Return what `tenant` may use, by name."""
    named = ((record.ref.name_for(tenant), record) for record in listed(records, tenant))
    return _sorted_in_blocks(named, itemgetter(0))


def _sorted_in_blocks(rows: Iterable[Row], key: Callable[[Row], Any]) -> Rows:
    """Return the rows in order. Sort in blocks, since one sort of a large pool would hold the GIL."""
    left = iter(rows)
    blocks: list[Rows] = []
    while block := list(islice(left, _SORTED_TOGETHER)):
        blocks.append(sorted(block, key=key))
    return list(heapq.merge(*blocks, key=key))


def _matching(rows: Rows, filters: PageRequest) -> Iterator[tuple[str, AdapterRecord]]:
    tags, part, words = set(filters.tags), filters.contains.lower(), filters.words.casefold().split()
    for name, record in rows:
        if filters.owner not in (None, record.ref.tenant) or filters.base not in (None, record.base_model):
            continue
        if tags <= set(record.tags) and part in name.lower() and _has_all(words, (name, *record.tags)):
            yield name, record


def _has_all(words: list[str], texts: tuple[str, ...]) -> bool:
    text = "\n".join(texts).casefold() if words else ""
    return all(word in text for word in words)
