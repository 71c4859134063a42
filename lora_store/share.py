"""How much of the pool one tenant may hold, judged on the newest state just before each commit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_store.errors import PoolShareExceeded
from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class PoolShare:
    """What a tenant may hold at most; None = any number. Bytes are of weights, equal ones counted once."""

    max_adapters: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """What a tenant holds: live names, and the weights of all kept versions."""

    num_adapters: int
    num_bytes: int


def check_share(snapshot: Snapshot, published: Sequence[AdapterRecord], share: PoolShare) -> None:
    """Raises: PoolShareExceeded where `published` makes a tenant hold more than `share`, and more than it did before.

    So a tenant whose share was cut may still replace what it has.
    """
    after = snapshot.after_publishing(published)
    for tenant in {record.ref.tenant for record in published}:
        before, now = held_by(snapshot, tenant), held_by(after, tenant)
        _check("adapters", before.num_adapters, now.num_adapters, share.max_adapters)
        _check("bytes of weights", before.num_bytes, now.num_bytes, share.max_bytes)


def held_by(snapshot: Snapshot, tenant: str) -> Held:
    """What `tenant` holds at this generation."""
    keys = [key for key in snapshot.records if key[0] == tenant]
    versions: Iterable[AdapterRecord] = (record for key in keys for record in snapshot.versions(key))
    sizes = {record.weights_digest: record.num_bytes for record in versions}
    return Held(len(keys), sum(sizes.values()))


def _check(what: str, before: int, after: int, limit: int | None) -> None:
    if limit is not None and after > max(limit, before):
        raise PoolShareExceeded(what, after, limit)
