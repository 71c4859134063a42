"""The Retriever deployment: batches prompts into one encoder call and answers every read of the catalogue."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray import serve

from deployments.config import AppConfig
from lora_store import AdapterRecord, LoraStore, Plan, Sample, Snapshot, Strategy
from retriever_svc import Candidate, Encoder, NoAdapterMatched, Retriever, Route, RouteRequest

_NEIGHBOURS = 3
_CATCH_UP_S = 4.0  # below the publisher's own limit, so that each replica answers for itself


@dataclass(frozen=True, slots=True)
class Embedded:
    """An adapter's embedding, and the adapters it lies nearest to."""

    vector: tuple[float, ...]
    neighbours: tuple[Candidate, ...]


class RetrieverDeployment:
    """One encoder and one index. Encoder work runs beside the event loop."""

    def __init__(self, config: AppConfig) -> None:
        settings = config.retrieval
        store = LoraStore(config.store_uri, accepts_base=config.accepted_bases)
        encoder = Encoder(settings.encoder, num_threads=settings.encoder_threads)
        self._encoder_identity = encoder.identity
        self._retriever = Retriever(
            encoder,
            store.snapshot,
            min_score=settings.min_score,
            temperature=settings.softmax_temperature,
            sample_source=lambda record: store.samples(record.samples_digest) if record.samples_digest else (),
        )
        self._route_batch.set_max_batch_size(settings.batch_size)
        self._route_batch.set_batch_wait_timeout_s(settings.batch_wait_s)

    async def route(self, request: RouteRequest) -> Route:
        """The plan for one prompt, and its candidates. Raises: NoAdapterMatched."""
        answer: Route | NoAdapterMatched = await self._route_batch(request)
        if isinstance(answer, NoAdapterMatched):
            raise answer
        return answer

    @serve.batch
    async def _route_batch(self, requests: list[RouteRequest]) -> list[Route | NoAdapterMatched]:
        return await asyncio.to_thread(self._retriever.route, requests)

    async def plan_named(self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy) -> Plan:
        """The plan of adapters a client named. Raises: AdapterNotFound, PlanInvalid."""
        return self._retriever.plan_named(tenant, choices, strategy)

    async def records(self, tenant: str) -> tuple[int, list[AdapterRecord]]:
        """(generation, every adapter the tenant may use, sorted); embeddings stay here."""
        snapshot: Snapshot = self._retriever.snapshot
        return snapshot.generation, [replace(record, embedding=None) for record in snapshot.visible_to(tenant)]

    async def embed(self, groups: Sequence[Sequence[Sample]]) -> tuple[str, list[Embedded | None]]:
        """(encoder identity, one embedding per group of samples); None for a group without samples."""
        return self._encoder_identity, await asyncio.to_thread(self._embed, groups)

    def _embed(self, groups: Sequence[Sequence[Sample]]) -> list[Embedded | None]:
        embedded: list[Embedded | None] = []
        for samples in groups:
            if not samples:
                embedded.append(None)
                continue
            vector = self._retriever.embed(samples)
            neighbours = self._retriever.neighbours(vector, _NEIGHBOURS)
            embedded.append(Embedded(tuple(vector.tolist()), neighbours))
        return embedded

    async def catch_up(self, generation: int) -> int:
        """The generation this replica serves from now on. Raises: StaleIndex; TimeoutError after `_CATCH_UP_S`."""
        return await asyncio.wait_for(asyncio.to_thread(self._retriever.catch_up, generation), _CATCH_UP_S)
