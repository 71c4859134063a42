"""The base models whose adapters are served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from lora_store.records import AdapterRecord
from retriever_svc.errors import AdapterIncompatible

BaseCounts = tuple[tuple[str, int], ...]
"""How many adapters were made for each base model, by its name."""


@dataclass(frozen=True, slots=True)
class ServedBases:
    """Finds the served base model of an adapter, by the names that publishing accepts.

    `accepted`: what clients call each served base model, with every name of it that an adapter may have. None: there is
    one without a name, and it accepts all names.
    """

    accepted: Mapping[str, Collection[str]] | None = None
    _served: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pairs = [(other, name) for name, others in (self.accepted or {}).items() for other in others]
        object.__setattr__(self, "_served", dict(pairs))

    @property
    def default(self) -> str:
        """The base model that answers without an adapter, and with adapters that name none."""
        return next(iter(self.accepted or ("",)))

    @property
    def are_several(self) -> bool:
        """Whether there is more than one."""
        return len(self.accepted or ()) > 1

    def find(self, base_model: str) -> str | None:
        """Return what clients call the base model that an adapter names, None if it is not served."""
        if self.accepted is None or not base_model:
            return self.default
        return self._served.get(base_model)

    def name_in_plans(self, base_model: str) -> str:
        """Return what plans call the base model that an adapter names: "" if there is only one."""
        return self.find(base_model) or "" if self.are_several else ""

    def list_names(self, name: str) -> Collection[str]:
        """Return every name that adapters of this served base model have; "" stands for those that name none."""
        assert self.accepted is not None, "bases without names cannot be chosen"
        return {*self.accepted[name], ""} if name == self.default else self.accepted[name]

    def serves(self, record: AdapterRecord) -> bool:
        """Return whether the adapter was made for a served base model."""
        return self.find(record.base_model) is not None

    def check(self, record: AdapterRecord, name: str) -> str:
        """Return the served base model of an adapter that a client calls `name`.

        Raises: AdapterIncompatible if it was made for another one.
        """
        found = self.find(record.base_model)
        if found is None:
            raise AdapterIncompatible(name, record.base_model, ", ".join(self.accepted or ()))
        return found

    def unserved(self, records: Iterable[AdapterRecord]) -> BaseCounts:
        """Return how many of the records are not served, by the name of their base model."""
        return tuple(sorted(Counter(r.base_model for r in records if not self.serves(r)).items()))


EVERY_BASE = ServedBases()
