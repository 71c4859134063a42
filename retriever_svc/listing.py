"""The pool as a list that a caller reads page by page."""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter

from lora_store.lru_cache import LruCache
from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class PageRequest:
    """The first `limit` adapters whose names come after `after` and that pass every filter.

    `owner`: of this tenant alone. `tags`: that carry all of these. `contains`: with this in their name, in any case.
    `words`: each of which stands in the name or a tag, in any case. Names are those the caller asks by.
    """

    limit: int
    after: str = ""
    owner: str | None = None
    tags: tuple[str, ...] = ()
    contains: str = ""
    words: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """Adapters under the names the caller asks for them by, sorted by name; `has_more` come after the last.

    `num_found` pass the filters, those before and after this page included.
    """

    generation: int
    rows: tuple[tuple[str, AdapterRecord], ...]
    has_more: bool
    num_found: int


Rows = list[tuple[str, AdapterRecord]]  # never changed once made
_Query = tuple[str, PageRequest]
_NO_FILTERS = PageRequest(limit=0)
_SORTED_TOGETHER = 8192
ROWS_OF_A_LIST = 64  # what a list takes beside its rows, in rows: callers choose the words of a search


class Listings:
    """The lists of one generation, kept sorted by caller and filters while it is served. Safe to call from threads.

    A caller's first page sorts what it may use; the pages after it, and the same question again, cost what they show.
    The least recently used lists are dropped, so that all of them together take at most `max_rows` rows, or are one.
    """

    def __init__(self, snapshot: Snapshot, *, max_rows: int = 2_000_000) -> None:
        self._snapshot = snapshot
        self._lists: LruCache[_Query, Rows] = LruCache(max_rows, _size_of, keeps_newest=True)
        self._lock = threading.Lock()

    def page(self, tenant: str, request: PageRequest) -> Page:
        """Return one page of what `tenant` may use. It begins after a name, so none is missed as the pool changes."""
        rows = self._rows(tenant, replace(request, limit=0, after=""))
        start = bisect_right(rows, request.after, key=itemgetter(0))
        shown = rows[start : start + request.limit]
        return Page(self._snapshot.generation_for(tenant), tuple(shown), start + request.limit < len(rows), len(rows))

    def _rows(self, tenant: str, filters: PageRequest) -> Rows:
        """Return what `tenant` may use and passes `filters`, sorted by name. Two threads may both make the same one."""
        query = (tenant, filters)
        with self._lock:
            cached = self._lists.get(query)
        if cached is not None:
            return cached
        if filters == _NO_FILTERS:
            rows = _sorted_rows(self._snapshot.records.values(), tenant)
        else:
            rows = list(_matching(self._rows(tenant, _NO_FILTERS), filters))
        with self._lock:
            self._lists.put(query, rows)
        return rows


def _size_of(rows: Rows) -> int:
    return len(rows) + ROWS_OF_A_LIST


def _sorted_rows(records: Iterable[AdapterRecord], tenant: str) -> Rows:
    """Return what `tenant` may use under its names, sorted in blocks: one sort of a large pool would hold the GIL."""
    named = ((record.ref.name_for(tenant), record) for record in records if record.is_visible_to(tenant))
    blocks: list[Rows] = []
    while block := list(islice(named, _SORTED_TOGETHER)):
        blocks.append(sorted(block, key=itemgetter(0)))
    return list(heapq.merge(*blocks, key=itemgetter(0)))


def _matching(rows: Rows, filters: PageRequest) -> Iterator[tuple[str, AdapterRecord]]:
    tags, part, words = set(filters.tags), filters.contains.lower(), filters.words.casefold().split()
    for name, record in rows:
        if filters.owner not in (None, record.ref.tenant):
            continue
        if tags <= set(record.tags) and part in name.lower() and _holds_all(words, (name, *record.tags)):
            yield name, record


def _holds_all(words: list[str], texts: tuple[str, ...]) -> bool:
    text = "\n".join(texts).casefold() if words else ""
    return all(word in text for word in words)
