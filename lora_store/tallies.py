"""Use counts of blobs and the usage of each tenant, updated event by event."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from lora_store.persistent_map import MapEditor, PersistentMap
from lora_store.records import AdapterRecord

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """A tenant's live names, and the bytes of weights of all its kept versions. Equal weights count once."""

    num_adapters: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Tallies:
    """Counts over all kept versions of one generation.

    `blobs`: number of kept versions that use each digest. `weights`: the same by (tenant, weights digest). `usage`: by
    tenant.
    """

    blobs: PersistentMap[str, int]
    weights: PersistentMap[tuple[str, str], int]
    usage: PersistentMap[str, TenantUsage]

    @classmethod
    def of(cls, kept: Iterable[tuple[AdapterRecord, ...]]) -> Tallies:
        """Count from scratch; `kept` has the versions of each live name."""
        editor = cls(PersistentMap(), PersistentMap(), PersistentMap()).edit()
        for versions in kept:
            editor.replace((), versions)
        return editor.freeze()

    def edit(self) -> TalliesEditor:
        """Return an editor for a changed copy of these counts."""
        return TalliesEditor(self.blobs.edit(), self.weights.edit(), self.usage.edit())


@dataclass(frozen=True, slots=True)
class TalliesEditor:
    """Builds a changed copy of Tallies. Do not use it after `freeze`."""

    blobs: MapEditor[str, int]
    weights: MapEditor[tuple[str, str], int]
    usage: MapEditor[str, TenantUsage]

    def replace(self, old: tuple[AdapterRecord, ...], new: tuple[AdapterRecord, ...]) -> None:
        """Replace the kept versions of one name, `old` by `new`; () means that the name is not live."""
        for record in new:
            self._count(record, 1)
        for record in old:
            self._count(record, -1)
        if bool(new) != bool(old):
            self._add_usage((new or old)[0].ref.tenant, num_adapters=1 if new else -1)

    def freeze(self) -> Tallies:
        """Return the counts with all changes so far."""
        return Tallies(self.blobs.freeze(), self.weights.freeze(), self.usage.freeze())

    def _count(self, record: AdapterRecord, change: int) -> None:
        for digest in record.blobs:
            _add(self.blobs, digest, change)
        tenant = record.ref.tenant
        before, after = _add(self.weights, (tenant, record.weights_digest), change)
        if not before or not after:
            self._add_usage(tenant, num_bytes=change * record.num_bytes)

    def _add_usage(self, tenant: str, *, num_adapters: int = 0, num_bytes: int = 0) -> None:
        before: TenantUsage = self.usage.get(tenant, TenantUsage())
        after = TenantUsage(before.num_adapters + num_adapters, before.num_bytes + num_bytes)
        if after == TenantUsage():
            self.usage.pop(tenant)
        else:
            self.usage[tenant] = after


def _add(counts: MapEditor[T, int], key: T, change: int) -> tuple[int, int]:
    """Change one count and drop it if it becomes zero. Return the count before and after."""
    before: int = counts.get(key, 0)
    after = before + change
    if after:
        counts[key] = after
    else:
        counts.pop(key)
    return before, after
