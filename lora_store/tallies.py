"""How often each blob is needed and how much each tenant holds, kept up to date event by event."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from lora_store.persistent_map import MapEditor, PersistentMap
from lora_store.records import AdapterRecord

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Held:
    """What a tenant holds: live names, and bytes of weights of all kept versions, equal weights counted once."""

    num_adapters: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Tallies:
    """Counts over all kept versions of one generation.

    `blobs`: kept versions that need each digest. `weights`: the same for (tenant, weights digest). `held`: by tenant.
    """

    blobs: PersistentMap[str, int]
    weights: PersistentMap[tuple[str, str], int]
    held: PersistentMap[str, Held]

    @classmethod
    def of(cls, kept: Iterable[tuple[AdapterRecord, ...]]) -> Tallies:
        """Count from scratch; `kept` has the versions of each live name."""
        editor = cls(PersistentMap(), PersistentMap(), PersistentMap()).edit()
        for versions in kept:
            editor.replace((), versions)
        return editor.freeze()

    def edit(self) -> TalliesEditor:
        """Return an editor that starts from these counts and leaves them as they are."""
        return TalliesEditor(self.blobs.edit(), self.weights.edit(), self.held.edit())


@dataclass(frozen=True, slots=True)
class TalliesEditor:
    """Changed counts in the making. Not to be used after `freeze`."""

    blobs: MapEditor[str, int]
    weights: MapEditor[tuple[str, str], int]
    held: MapEditor[str, Held]

    def replace(self, old: tuple[AdapterRecord, ...], new: tuple[AdapterRecord, ...]) -> None:
        """Count the kept versions `new` of one name in the place of `old`; () where the name is not live."""
        for record in new:
            self._count(record, 1)
        for record in old:
            self._count(record, -1)
        if bool(new) != bool(old):
            self._hold((new or old)[0].ref.tenant, num_adapters=1 if new else -1)

    def freeze(self) -> Tallies:
        """Return the counts with all changes so far."""
        return Tallies(self.blobs.freeze(), self.weights.freeze(), self.held.freeze())

    def _count(self, record: AdapterRecord, change: int) -> None:
        for digest in record.blobs:
            _add(self.blobs, digest, change)
        tenant = record.ref.tenant
        before, after = _add(self.weights, (tenant, record.weights_digest), change)
        if not before or not after:
            self._hold(tenant, num_bytes=change * record.num_bytes)

    def _hold(self, tenant: str, *, num_adapters: int = 0, num_bytes: int = 0) -> None:
        held: Held = self.held.get(tenant, Held())
        now = Held(held.num_adapters + num_adapters, held.num_bytes + num_bytes)
        if now == Held():
            self.held.pop(tenant)
        else:
            self.held[tenant] = now


def _add(counts: MapEditor[T, int], key: T, change: int) -> tuple[int, int]:
    """Change one count, without keeping zeros. Return the count before and after."""
    before: int = counts.get(key, 0)
    after = before + change
    if after:
        counts[key] = after
    else:
        counts.pop(key)
    return before, after
