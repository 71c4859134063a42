"""The pool as a list that a caller reads page by page."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

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


def page(snapshot: Snapshot, tenant: str, request: PageRequest) -> Page:
    """What `tenant` may use, as one page. A page begins after a name, so that none is missed as the pool changes."""
    num_found = 0

    def later() -> Iterator[tuple[str, AdapterRecord]]:
        nonlocal num_found
        for name, record in _matching(snapshot, tenant, request):
            num_found += 1
            if name > request.after:
                yield name, record

    first = heapq.nsmallest(request.limit + 1, later(), key=lambda row: row[0])
    return Page(snapshot.generation, tuple(first[: request.limit]), len(first) > request.limit, num_found)


def _matching(snapshot: Snapshot, tenant: str, request: PageRequest) -> Iterator[tuple[str, AdapterRecord]]:
    tags, part, words = set(request.tags), request.contains.lower(), request.words.casefold().split()
    for record in snapshot.records.values():
        if not record.is_visible_to(tenant) or request.owner not in (None, record.ref.tenant):
            continue
        name = record.ref.name_for(tenant)
        if tags <= set(record.tags) and part in name.lower() and _holds_all(words, (name, *record.tags)):
            yield name, record


def _holds_all(words: list[str], texts: tuple[str, ...]) -> bool:
    text = "\n".join(texts).casefold() if words else ""
    return all(word in text for word in words)
