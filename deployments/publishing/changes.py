"""The bounds and the results of one change of the pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deployments.api.change_results import Published
from deployments.errors import VersionNotKept
from deployments.publishing.validator import Outcome, ValidatedAdapter
from lora_store import AdapterRecord, AdapterRef, Key, Precondition, Staged, TenantQuota

_MIN_DIGEST_CHARS = 8

Charge = Callable[[int], None]
"""Charge the publishing key for tokens that the encoder is about to read. Raises: RateLimited, RequestInvalid."""


def free_of_charge(num_tokens: int) -> None:
    """Charge nothing."""


@dataclass(frozen=True, slots=True)
class Change:
    """Who changes the pool, and within what bounds.

    `quota`: the tenant's; `precondition`: what must hold of the versions just before the commit; `charge`: receives
    the number of tokens that the encoder is about to read.
    """

    actor: str
    quota: TenantQuota | None = None
    precondition: Precondition = "any"
    charge: Charge = free_of_charge


def live_already(
    staged: Sequence[Staged], older: Mapping[Key, tuple[AdapterRecord, ...]], active: str | None
) -> dict[AdapterRef, AdapterRecord]:
    """Return the live versions that need no publish: embedded by the active encoder, visibility as requested."""
    live = {kept[0].ref: kept[0] for kept in older.values() if is_embedded(kept[0], active)}
    for item in staged:
        record = live.get(item.ref)
        if record is not None and not item.keeps_visibility and record.visibility != item.record.visibility:
            del live[item.ref]
    return live


def is_embedded(record: AdapterRecord, active: str | None) -> bool:
    """Return whether the active encoder embedded it, or there is nothing to embed."""
    return record.samples_digest is None or active in (None, record.encoder)


def kept_version(kept: Sequence[AdapterRecord], digest: str | None) -> AdapterRecord:
    """Return the version to roll back to; `kept` is sorted newest first. Raises: VersionNotKept."""
    if digest is None:
        matching = kept[1:2]
    else:
        long_enough = len(digest) >= _MIN_DIGEST_CHARS
        matching = [record for record in kept if long_enough and record.ref.digest.startswith(digest)]
    if len(matching) != 1:
        raise VersionNotKept(kept[0].ref.name, digest, [record.ref.digest for record in kept])
    return matching[0]


def published_of(outcome: Outcome, generation: int, ready: int, behind: int) -> Published | Exception:
    """Return the result of one upload at this generation."""
    if isinstance(outcome, ValidatedAdapter):
        found = outcome.embedded is not None
        neighbours = outcome.embedded.neighbours if outcome.embedded is not None else ()
        return Published(outcome.staged.ref, generation, ready, behind, found, outcome.shift, neighbours)
    if isinstance(outcome, AdapterRecord):
        found = outcome.encoder is not None
        return Published(outcome.ref, outcome.generation, ready, behind, found, outcome.probe_shift, ())
    assert isinstance(outcome, Exception)
    return outcome
