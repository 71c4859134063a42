"""The console's data that other fakes lack: places on the map, metrics, and a worker that can be held."""

from __future__ import annotations

import asyncio
import math
import string
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from deployments.api.pool_responses import map_body
from gpu_worker.front.engine_status import Counters, EngineStatus
from gpu_worker.front.request.request import Delta, Job
from lora_store import Snapshot
from retriever_svc import Page, PageRequest, Place, Point, PoolMap, Retriever
from retriever_svc.listing import Listings
from retriever_svc.projection import Cluster
from retriever_svc.route import NearSample
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_worker import FakeWorker
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, live_pool, record_of

HOLDINGS = EngineStatus(
    resident=frozenset({"a", "b"}),
    occupied_rows=16,
    active_rows=8,
    num_running=3,
    num_waiting=2,
    kv_tokens=0,
    free_kv_rows=29,
    free_kv_tokens=59_000,
    host_cache_bytes=5_000_000,
    num_forgetting=0,
    prefix_cache_tokens=320,
    counters=Counters(
        num_requests=10,
        num_prompt_tokens=50,
        num_new_tokens=400,
        num_bank_hits=6,
        num_host_hits=3,
        num_fetches=1,
        num_cached_tokens=32,
        num_preemptions=2,
    ),
)


@dataclass
class MappedRetriever(FakeRetriever):
    """Its adapters are on a circle, a prompt is in the middle."""

    async def map(self, tenant: str, min_generation: int = 0) -> bytes:
        return map_body(self.pool_map(tenant))

    def pool_map(self, tenant: str) -> PoolMap:
        points = [self._point(number) for number in range(len(self.held))]
        names = tuple(record.ref.name_for(tenant) for record in self.held)
        places = tuple((point.x, point.y) for point in points)
        return PoolMap(7, len(points), names, places, (0,) * len(points), (Cluster("", 0.0, 0.0, 1.0, len(points)),))

    async def place(self, tenant: str, text: str, names: Sequence[str], min_generation: int = 0) -> Place:
        asked = [number for number, record in enumerate(self.held) if record.ref.name in names]
        return Place(7, Point(None, 0.0, 0.0), tuple(map(self._point, asked)))

    def _point(self, number: int) -> Point:
        angle = 2 * math.pi * number / len(self.held)
        return Point(self.held[number].ref, math.cos(angle), math.sin(angle))


class LaidOutRetriever(MappedRetriever):
    """Draws `count` adapters of `num_kinds` kinds by the real layout. A kind is a tag and the first word of names.

    Every prompt finds the first two.
    """

    def __init__(self, count: int, num_kinds: int) -> None:
        rng = np.random.default_rng(0)
        middles = np.eye(num_kinds)[np.arange(count) % num_kinds]
        vectors = middles + rng.normal(scale=0.05, size=middles.shape)
        self.kinds = [f"kind{letter * 2}" for letter in string.ascii_lowercase[:num_kinds]]
        kinds = [self.kinds[number % num_kinds] for number in range(count)]
        self.names = [f"{kind}-{number:05}" for number, kind in enumerate(kinds)]
        rows = zip(self.names, vectors, kinds, strict=True)
        records = [record_of(name, vector, tags=(kind,)) for name, vector, kind in rows]
        super().__init__(records[:2], near=(NearSample("Rhyme on rain.", 0.8),))
        self._listings = Listings(Snapshot(7, {("local", record.ref.name): record for record in records}))
        self._drawn = Retriever(live_pool(FakeEncoder({}, dim=num_kinds), Source(*records))).map("local")

    def pool_map(self, tenant: str) -> PoolMap:
        return replace(self._drawn, generation=7)

    async def page(self, tenant: str, request: PageRequest, min_generation: int = 0) -> Page:
        return self._listings.page(tenant, request)


@dataclass
class CountingWorker(FakeWorker):
    """Reports the state in `holdings`; every answer stops after its first delta until `goes_on` is set."""

    holdings: EngineStatus | Exception = HOLDINGS
    goes_on: asyncio.Event | None = None
    num_asked: int = field(default=0, init=False)

    async def load(self) -> EngineStatus:
        self.num_asked += 1
        if isinstance(self.holdings, Exception):
            raise self.holdings
        return self.holdings

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        async for delta in super().stream(job):
            yield delta
            if self.goes_on is not None:
                await self.goes_on.wait()
