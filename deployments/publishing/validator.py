"""Validate staged adapters before the commit: embed their samples, and probe how much they change the base model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from deployments.calls.catalogue_clients import RetrieverClient
from deployments.calls.worker_client import Workers
from lora_store import AdapterRecord, AdapterRef, AdapterRefused, Staged
from retriever_svc.encoder import tokens_read
from retriever_svc.route import Embedded

VALIDATED_TOGETHER = 32  # adapters per call of the encoder and per probe
_BATCHES_AT_ONCE = 2  # so two replicas of a deployment have work, and embedding and probing overlap
Charge = Callable[[int], None]
"""Charge the publishing key for tokens that the encoder is about to read. Raises: RateLimited, RequestInvalid."""


@dataclass(frozen=True, slots=True, eq=False)
class ValidatedAdapter:
    """A staged adapter that may be committed."""

    staged: Staged
    embedded: Embedded | None
    shift: float


Outcome = ValidatedAdapter | AdapterRecord | BaseException  # new and good, live already, or refused


class AdapterValidator:
    """Embeds with the Retriever and probes on a Worker, both at the same time."""

    def __init__(self, retriever: RetrieverClient, workers: Workers) -> None:
        self._retriever, self._workers = retriever, workers

    async def validate(
        self,
        staged: Sequence[Staged | BaseException],
        live: Mapping[AdapterRef, AdapterRecord],
        charge: Callable[[int], None],
    ) -> list[Outcome]:
        """Return one outcome per item, in order. Equal versions share one; live versions are not validated again.

        `charge` receives the number of tokens that the encoder is about to read. Raises: the error of `charge`, and an
        error of the Retriever for a whole batch.
        """
        new = list({item.ref: item for item in staged if isinstance(item, Staged) and item.ref not in live}.values())
        charge(sum(tokens_read(sample.input) for item in new for sample in item.samples))
        slots = asyncio.Semaphore(_BATCHES_AT_ONCE)
        batches = [new[start : start + VALIDATED_TOGETHER] for start in range(0, len(new), VALIDATED_TOGETHER)]
        answers = await asyncio.gather(*[self._validate_batch(slots, part) for part in batches], return_exceptions=True)
        outcomes: list[Outcome] = []
        for answer in answers:  # every batch has ended before one fails the whole
            if isinstance(answer, BaseException):
                raise answer
            outcomes += answer
        known = dict(live) | {item.ref: outcome for item, outcome in zip(new, outcomes, strict=True)}
        return [known[item.ref] if isinstance(item, Staged) else item for item in staged]

    async def embed_again(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Return the outcomes, their embeddings made again by the active encoder."""
        old = [item for item in outcomes if isinstance(item, ValidatedAdapter) and item.embedded is not None]
        embedded = await self._embed([item.staged for item in old])
        anew = {id(item): replace(item, embedded=e) for item, e in zip(old, embedded, strict=True)}
        return [anew.get(id(outcome), outcome) for outcome in outcomes]

    async def restaged(self, items: Sequence[ValidatedAdapter], staged: Sequence[Staged]) -> dict[int, Outcome]:
        """Return, by the id of the earlier one, the outcomes of those whose `staged` has changed, for the same weights.

        Embed those again whose samples are others.
        """
        changed = [(old, new) for old, new in zip(items, staged, strict=True) if new != old.staged]
        anew = [new for old, new in changed if new.record.samples_digest != old.staged.record.samples_digest]
        embedded = dict(zip([item.ref for item in anew], await self._embed(anew) if anew else [], strict=True))
        return {id(old): _judge(new, embedded.get(new.ref, old.embedded), old.shift) for old, new in changed}

    async def _validate_batch(self, slots: asyncio.Semaphore, batch: Sequence[Staged]) -> list[Outcome]:
        async with slots:
            probing = asyncio.gather(self._workers.probe([item.record for item in batch]))
            embedded = await self._embed(batch)
            [shifts] = await probing
        return [
            shift if isinstance(shift, Exception) else _judge(item, embedding, shift)
            for item, embedding, shift in zip(batch, embedded, shifts, strict=True)
        ]

    async def _embed(self, batch: Sequence[Staged]) -> list[Embedded | None]:
        samples, tenants = [item.samples for item in batch], [item.ref.tenant for item in batch]
        return await self._retriever.embed(samples, tenants)


def _judge(staged: Staged, embedded: Embedded | None, shift: float) -> Outcome:
    """Return the adapter, or its refusal if it has samples but no embedding: `auto` would never find it."""
    if staged.samples and embedded is None:
        reason = "samples: the pool's encoder gives no finite vector for one of them"
        return AdapterRefused(staged.ref.name, [f"{reason}; change them, or ask the operator for another encoder"])
    return ValidatedAdapter(staged, embedded, shift)


def free_of_charge(num_tokens: int) -> None:
    """Charge nothing."""
