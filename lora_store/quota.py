"""The quota of a tenant, checked against the newest state just before each commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_store.errors import QuotaExceeded
from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from lora_store.tallies import TenantUsage


@dataclass(frozen=True, slots=True)
class TenantQuota:
    """The most that a tenant may have in the pool; None = unlimited. Equal weights count once towards `max_bytes`."""

    max_adapters: int | None = None
    max_bytes: int | None = None


def check_quota(snapshot: Snapshot, published: Sequence[AdapterRecord], quota: TenantQuota) -> None:
    """Check that no tenant exceeds its quota by publishing these records.

    A tenant above a reduced quota may still replace its adapters, as long as its usage does not grow.
    Raises: QuotaExceeded.
    """
    before = {
        record.ref.tenant: count_usage(snapshot, record.ref.tenant) for record in published
    }  # counts once, for both
    after = snapshot.after_publishing(published)
    for tenant, old in before.items():
        new = count_usage(after, tenant)
        _check("adapters", old.num_adapters, new.num_adapters, quota.max_adapters)
        _check("bytes of weights", old.num_bytes, new.num_bytes, quota.max_bytes)


def count_usage(snapshot: Snapshot, tenant: str) -> TenantUsage:
    """Return the usage of `tenant` at this generation."""
    return snapshot.tallies.usage.get(tenant) or TenantUsage()


def _check(what: str, before: int, after: int, limit: int | None) -> None:
    if limit is not None and after > max(limit, before):
        raise QuotaExceeded(what, after, limit)
