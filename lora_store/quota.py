"""How much of the pool one tenant may hold, judged on the newest state just before each commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_store.errors import QuotaExceeded
from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from lora_store.tallies import Held


@dataclass(frozen=True, slots=True)
class TenantQuota:
    """What a tenant may hold at most; None = any number. Bytes are of weights, equal ones counted once."""

    max_adapters: int | None = None
    max_bytes: int | None = None


def check_share(snapshot: Snapshot, published: Sequence[AdapterRecord], share: TenantQuota) -> None:
    """Raises: QuotaExceeded where `published` makes a tenant hold more than `share`, and more than it did before.

    So a tenant whose share was cut may still replace what it has.
    """
    held = {record.ref.tenant: held_by(snapshot, record.ref.tenant) for record in published}  # before `after` needs it
    after = snapshot.after_publishing(published)
    for tenant, before in held.items():
        now = held_by(after, tenant)
        _check("adapters", before.num_adapters, now.num_adapters, share.max_adapters)
        _check("bytes of weights", before.num_bytes, now.num_bytes, share.max_bytes)


def held_by(snapshot: Snapshot, tenant: str) -> Held:
    """Return what `tenant` holds at this generation."""
    return snapshot.tallies.held.get(tenant) or Held()


def _check(what: str, before: int, after: int, limit: int | None) -> None:
    if limit is not None and after > max(limit, before):
        raise QuotaExceeded(what, after, limit)
