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
    """

    limit: int
    after: str = ""
    owner: str | None = None
    tags: tuple[str, ...] = ()
    contains: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """Adapters under the names the caller asks for them by, sorted by name; `has_more` come after the last."""

    generation: int
    rows: tuple[tuple[str, AdapterRecord], ...]
    has_more: bool


def page(snapshot: Snapshot, tenant: str, request: PageRequest) -> Page:
    """What `tenant` may use, as one page. A page begins after a name, so that none is missed as the pool changes."""
    first = heapq.nsmallest(request.limit + 1, _matching(snapshot, tenant, request), key=lambda row: row[0])
    return Page(snapshot.generation, tuple(first[: request.limit]), len(first) > request.limit)


def name_for(snapshot: Snapshot, tenant: str, record: AdapterRecord) -> str:
    """What `tenant` calls this adapter: the bare name, or `owner/name` where the bare one means an own adapter."""
    owner, name = record.ref.tenant, record.ref.name
    return name if owner == tenant or (tenant, name) not in snapshot.records else f"{owner}/{name}"


def _matching(snapshot: Snapshot, tenant: str, request: PageRequest) -> Iterator[tuple[str, AdapterRecord]]:
    tags, part = set(request.tags), request.contains.lower()
    for record in snapshot.records.values():
        if not record.is_visible_to(tenant) or request.owner not in (None, record.ref.tenant):
            continue
        if tags <= set(record.tags) and part in record.ref.name.lower():
            name = name_for(snapshot, tenant, record)
            if name > request.after:
                yield name, record
