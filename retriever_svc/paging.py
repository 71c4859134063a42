"""A large pool a page at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Found:
    """Some of the adapters that were asked for, in the order of owner and name, and how many there are in all."""

    generation: int
    num_found: int
    records: tuple[AdapterRecord, ...]  # without embeddings


def page_of(snapshot: Snapshot, tenant: str, words: str, start: int, num_wanted: int) -> Found:
    """Those `tenant` may use in whose name or tags every one of `words` stands, in any case; all for no words."""
    wanted = words.casefold().split()
    found = [record for record in snapshot.visible_to(tenant) if _matches(record, wanted)]
    page = tuple(replace(record, embedding=None) for record in found[start : start + num_wanted])
    return Found(snapshot.generation, len(found), page)


def _matches(record: AdapterRecord, wanted: list[str]) -> bool:
    if not wanted:
        return True
    text = "\n".join([record.ref.name, *record.tags]).casefold()
    return all(word in text for word in wanted)
