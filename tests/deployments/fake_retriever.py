"""A retriever over records, without an encoder."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from deployments.errors import ModelNotFound
from lora_store import (
    AdapterNotFound,
    AdapterRecord,
    AdapterRef,
    Embedding,
    Feedback,
    NamedPolicy,
    Plan,
    PlannedAdapter,
    Ranking,
    Sample,
    Snapshot,
    Strategy,
)
from lora_store.rankings import OUTCOME
from retriever_svc import (
    AskedPrompt,
    BaseCounts,
    Candidate,
    DoctorStep,
    Drawn,
    Draws,
    IndexStats,
    Learnt,
    Page,
    PageRequest,
    PinnedAdapter,
    Place,
    PoolSize,
    Region,
    ReindexStep,
    Resampled,
    Route,
    RouteRequest,
)
from retriever_svc.encoder_files import DEFAULT_MODEL
from retriever_svc.learning import Effect
from retriever_svc.listing import Listings
from retriever_svc.planning import named_plan, named_policies, replayed_plan, resolve_version, visible_names
from retriever_svc.route import Embedded, NearSample
from tests.deployments.adapter_records import ENCODER, POOL, adapter, given
from tests.deployments.fake_names import FakeNames

NO_EFFECT = Effect(100, 90, 90, 400, 4, 4)


@dataclass
class FakeRetriever:
    """Routes every prompt to all of `held`, with scores halved one by one; `failure` is raised instead."""

    held: Sequence[AdapterRecord] = POOL
    failure: Exception | None = None
    caught_up: Exception | None = None
    abstains: bool = False
    unfit: Exception | None = None  # error of embedding
    encoder: str = ENCODER
    steps: list[list[ReindexStep | DoctorStep | Exception]] = field(default_factory=list)  # of each job in turn
    to_evaluate: Iterable[Region] = ()
    prepared: Exception | str = "other-encoder"
    near: tuple[NearSample, ...] = ()  # of every candidate, where a request asks for samples
    unserved: BaseCounts = ()
    drawn: Draws = field(default_factory=lambda: Draws(Drawn(535, 0, 0)))  # by any version
    asked: list[Sequence[AskedPrompt]] = field(default_factory=list)  # of the doctor
    effect: Effect = NO_EFFECT  # of accepted prompts
    model_names: FakeNames = field(default_factory=FakeNames)
    evaluated: Ranking | None = None
    num_own: int = 4  # samples of an adapter that gets accepted prompts

    async def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        if self.failure is not None:
            raise self.failure
        return [self._route_of(request) for request in requests]

    def _route_of(self, request: RouteRequest) -> Route:
        scored = [(record, 0.5**place) for place, record in enumerate(self.held)]
        near = self.near if request.shows_samples else ()
        candidates = tuple(Candidate(record.ref, score, samples=near) for record, score in scored)
        if self.abstains:
            return Route(
                Plan("base", generation=7), candidates, 7, abstained=True, reason="below_threshold", text=request.text
            )
        rows = tuple(PlannedAdapter(record.ref, record.weights_digest, 0.5, score) for record, score in scored)
        return Route(Plan("mixture", rows, 7), candidates, 7, abstained=False, text=request.text)

    async def plan_named(
        self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy, min_generation: int = 0
    ) -> Plan:
        return named_plan(self._snapshot, tenant, choices, strategy)

    async def replay(
        self,
        tenant: str,
        strategy: Strategy,
        pinned: Sequence[PinnedAdapter],
        generation: int,
        min_generation: int = 0,
    ) -> Plan:
        return replayed_plan(self._snapshot, tenant, strategy, pinned, generation)

    async def policies(self, tenant: str, model: str, min_generation: int = 0, limit: int = 1) -> list[NamedPolicy]:
        return named_policies(self.model_names.snapshot, tenant, model)[:limit]

    async def find_model(
        self, tenant: str, model: str, strategy: Strategy, min_generation: int = 0
    ) -> NamedPolicy | Plan | None:
        if found := await self.policies(tenant, model, min_generation):
            return found[0]
        with suppress(AdapterNotFound):
            return await self.plan_named(tenant, [(model, 1.0)], strategy, min_generation)
        return None

    async def names(
        self, tenant: str, min_generation: int = 0, after: str = "", limit: int | None = None, is_short: bool = False
    ) -> list[NamedPolicy]:
        return visible_names(self.model_names.snapshot, tenant, after, limit, is_short=is_short)

    async def page(self, tenant: str, request: PageRequest, min_generation: int = 0) -> Page:
        return replace(Listings(self._snapshot).page(tenant, request), unserved=self.unserved)

    async def load(self, tenant: str) -> PoolSize:
        return PoolSize(7, len(self._snapshot.visible_to(tenant)), self.unserved)

    async def index_stats(self) -> IndexStats:
        num = len(self.held)
        return IndexStats(7, self.encoder, num, num, num, has_lists=False, num_bytes=0)

    async def record(self, tenant: str, name: str, min_generation: int = 0) -> tuple[int, list[AdapterRecord]]:
        record = resolve_version(self._snapshot, tenant, name)
        return 7, [record, adapter(record.ref.name, version="older", generation=0)]

    async def evaluation(self, tenant: str, name: str) -> Ranking | None:
        record = resolve_version(self._snapshot, tenant, name)
        return self.evaluated if self.evaluated is not None and self.evaluated.anchor == record.ref else None

    async def samples(self, tenant: str, name: str, min_generation: int = 0) -> list[Sample]:
        record = resolve_version(self._snapshot, tenant, name)
        is_own = record.ref.tenant == tenant and record.num_samples > 0
        return [Sample(f"A sample of {name}."), Sample("Another one.", "Its output.")] if is_own else []

    async def map(self, tenant: str, min_generation: int = 0) -> bytes:
        raise NotImplementedError

    async def place(self, tenant: str, text: str, names: Sequence[str], min_generation: int = 0) -> Place:
        raise NotImplementedError

    async def vectors(self, tenant: str, texts: Sequence[str], model: str) -> list[NDArray[np.float32]]:
        if model != DEFAULT_MODEL:
            raise ModelNotFound(model, DEFAULT_MODEL)
        return [np.array([len(text), 0.5], np.float32) for text in texts]

    async def embed(self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]) -> list[Embedded | None]:
        assert len(groups) == len(tenants)
        if self.unfit is not None:
            raise self.unfit
        near = (Candidate(POOL[0].ref, 0.25),)
        vector = np.array([1.0, 0.0], np.float32)
        return [Embedded(Embedding(self.encoder, vector, vector), near) if group else None for group in groups]

    async def draws(self, tenant: str, name: str, min_generation: int = 0) -> Draws:
        if self.failure is not None:
            raise self.failure
        return self.drawn

    async def catch_up(self, generation: int) -> int:
        if self.caught_up is not None:
            raise self.caught_up
        return generation

    async def accept(self, live: AdapterRecord, texts: Sequence[str]) -> Resampled:
        own = [Sample(f"sample {number}") for number in range(self.num_own)]
        return Resampled((*own, *[Sample(text, is_accepted=True) for text in texts]), (), self.effect)

    async def learn(self, tenant: str, outcomes: Sequence[Feedback]) -> Learnt:
        vector = np.array([1.0, 0.0], np.float32)
        anchors = [AdapterRef(tenant, f"{OUTCOME}{outcome.id}", "") for outcome in outcomes]
        return Learnt(tuple(Ranking(anchor, (), self.encoder, vector, vector[:0]) for anchor in anchors))

    async def refit(self, model: str) -> str:
        return f"{model}+fitted"

    async def reindex(self, model: str, projection: str = "auto") -> AsyncGenerator[ReindexStep]:
        for item in self.steps.pop(0):
            step = given(item)
            assert isinstance(step, ReindexStep)
            yield step

    async def doctor(self, tenant: str, prompts: Sequence[AskedPrompt] = ()) -> AsyncGenerator[DoctorStep]:
        self.asked.append(prompts)
        for item in self.steps.pop(0):
            step = given(item)
            assert isinstance(step, DoctorStep)
            yield step

    async def regions(self, tenant: str) -> AsyncGenerator[Region]:
        for region in self.to_evaluate:
            yield region

    async def prepare_encoder(self, model: str, projection: str = "auto") -> str:
        return given(self.prepared)

    @property
    def _snapshot(self) -> Snapshot:
        return Snapshot(7, {(record.ref.tenant, record.ref.name): record for record in self.held})


def reindex_step(done: int, total: int, *refs: AdapterRef, unreadable: tuple[AdapterRef, ...] = ()) -> ReindexStep:
    """Return one step of a reindex to `other-encoder`."""
    vector = np.array([1.0, 0.0], np.float32)
    return ReindexStep(done, total, {ref: Embedding("other-encoder", vector, vector) for ref in refs}, unreadable)
