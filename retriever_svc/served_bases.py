"""The base models whose adapters are served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lora_store.records import AdapterRecord
from retriever_svc.errors import AdapterIncompatible

BaseCounts = tuple[tuple[str, int], ...]
"""How many adapters were made for each base model, by its name."""


@dataclass(frozen=True, slots=True)
class ServedBases:
    """Compares the base model of an adapter with the served one, as publishing does.

    `name`: what clients call the served base model. `accepted`: every name of it that an adapter may have; None accepts
    all names.
    """

    name: str = ""
    accepted: frozenset[str] | None = None

    def serves(self, record: AdapterRecord) -> bool:
        """Return whether the adapter was made for a served base model. One that names none counts as such."""
        return self.accepted is None or not record.base_model or record.base_model in self.accepted

    def check(self, record: AdapterRecord, name: str) -> None:
        """Raises: AdapterIncompatible if an adapter, which a client calls `name`, was made for another base model."""
        if not self.serves(record):
            raise AdapterIncompatible(name, record.base_model, self.name)

    def unserved(self, records: Iterable[AdapterRecord]) -> BaseCounts:
        """Return how many of the records are not served, by the name of their base model."""
        return tuple(sorted(Counter(r.base_model for r in records if not self.serves(r)).items()))
