"""The Retriever deployment: encodes prompts in batches, tenant by tenant, and answers every read of the catalogue."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from deployments.auth.ray_token import require_token_mode
from deployments.config.app import AppConfig
from deployments.encoder_queue import EncoderQueue
from deployments.observability.logs import join_serve_logs
from deployments.observability.metrics import SERVE, MetricFactory, report_periodically
from deployments.observability.retriever_metrics import RetrieverMetrics
from deployments.retriever_factory import live_pool, retriever_over
from lora_store import AdapterRecord, LoraStore, LoraStoreError, Plan, Sample, Strategy
from retriever_svc import (
    BulkEncoding,
    DoctorStep,
    IndexSettings,
    IndexStats,
    Page,
    PageRequest,
    PinnedAdapter,
    Place,
    PoolMap,
    ReindexStep,
    RetrieverError,
    Route,
    RouteRequest,
    StaleIndex,
    embeddings_of,
)
from retriever_svc.embedded import Embedded
from retriever_svc.retriever import Encoded

logger = logging.getLogger(__name__)

Step = TypeVar("Step")
T = TypeVar("T")
_NEIGHBOURS = 3
_LOOKUP_THREADS = 4
_SEARCH_THREADS = 4
_READ_EVERY_S = 0.5
_CATCH_UP_S = 4.0  # below the publisher's own limit, so that each replica answers for itself


class RetrieverDeployment:
    """One encoder and one index, at the catalogue's newest generation before it is ready.

    All work runs beside the event loop, each kind on threads of its own, so that none holds up another: look-ups by
    name and lists; searches and maps; the encoder for prompts, which takes its texts from a queue where tenants take
    turns; the encoder for publishes; the catalogue. What names a `min_generation` waits a little for it, then raises
    StaleIndex.
    """

    def __init__(
        self,
        config: AppConfig,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        index: IndexSettings | None = None,
        kinds: MetricFactory = SERVE,
    ) -> None:
        join_serve_logs()
        require_token_mode(allow_unauthenticated=config.allow_unauthenticated_ray)
        settings = config.retrieval
        self._metrics = RetrieverMetrics(kinds)
        self._store = LoraStore(config.store_uri, accepts_base=config.accepted_bases)
        self._pools = live_pool(config, self._store.snapshot, index)
        self._retriever = retriever_over(self._pools, config, timings=self._metrics)
        self._lookups = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="lookup")
        self._searches = ThreadPoolExecutor(_SEARCH_THREADS, thread_name_prefix="search")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")  # two would only share the same cores
        self._bulk = ThreadPoolExecutor(1, thread_name_prefix="bulk")
        # One chunk of each tenant at most waits for the thread, so they take turns.
        self._bulk_turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="catalogue")
        self._prompts = EncoderQueue(
            self._encode,
            batch_size=settings.batch_size,
            max_waiting=settings.max_waiting,
            wait_s=settings.batch_wait_s,
        )
        self._pools.catch_up()  # with what was committed while the encoder and the index were made
        self._refreshing: asyncio.Task[int] | None = None
        self._read_at = self._began_reading_at = time.monotonic()
        loop = asyncio.get_event_loop()
        self._polling = loop.create_task(self._poll(settings.poll_interval_s, sleep))
        self._telling = loop.create_task(report_periodically(self._tell))

    async def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        """Return the plan and candidates for each prompt of one client's request, all of the same tenant.

        Raises: NoAdapterMatched for the first prompt that has none, EncoderBusy, StaleIndex.
        """
        if not requests:
            return []
        await self._reach_for(requests[0].tenant, max(request.min_generation for request in requests))
        encoded = await self._prompts.encoded(requests[0].tenant, [request.text for request in requests])
        answers = await _on(self._searches, self._retriever.route_encoded, requests, encoded)
        for answer in answers:
            self._metrics.record_route(answer)
        return [_given(answer) for answer in answers]

    async def _encode(self, texts: Sequence[tuple[str, str]]) -> list[Encoded]:
        return await _on(self._encoding, self._retriever.encode, texts)

    async def plan_named(
        self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy, min_generation: int = 0
    ) -> Plan:
        """The plan of adapters a client named. Raises: AdapterNotFound, PlanInvalid, StaleIndex."""
        await self._reach_for(tenant, min_generation)
        return await _on(self._lookups, self._retriever.plan_named, tenant, choices, strategy)

    async def replay(self, tenant: str, strategy: Strategy, pinned: Sequence[PinnedAdapter], generation: int) -> Plan:
        """The plan that was made at `generation`. Raises: PlanGone, PlanInvalid, StaleIndex."""
        await self._reach_for(tenant, generation)
        return await _on(self._lookups, self._retriever.replay, tenant, strategy, pinned, generation)

    async def page(self, tenant: str, request: PageRequest, min_generation: int = 0) -> Page:
        """A page of what the tenant may use; embeddings stay here. Raises: StaleIndex."""
        await self._reach_for(tenant, min_generation)
        page = await _on(self._lookups, self._retriever.page, tenant, request)
        return replace(page, rows=tuple((name, _as_seen_by(tenant, record)) for name, record in page.rows))

    async def map(self, tenant: str, min_generation: int = 0) -> PoolMap:
        """The adapters the tenant may be routed to, on a plane. Raises: StaleIndex."""
        await self._reach_for(tenant, min_generation)
        return await _on(self._searches, self._retriever.map, tenant)

    async def place(self, tenant: str, text: str, names: Sequence[str], min_generation: int = 0) -> Place:
        """Return where a prompt and these adapters are on that plane. Raises: EncoderBusy, StaleIndex."""
        await self._reach_for(tenant, min_generation)
        [encoded] = await self._prompts.encoded(tenant, [text])
        return await _on(self._searches, self._retriever.place_encoded, tenant, encoded, names)

    async def load(self, tenant: str) -> tuple[int, int]:
        """(generation this replica serves, number of adapters the tenant may use)."""
        return await _on(self._lookups, self._retriever.count, tenant)

    async def record(self, tenant: str, name: str, min_generation: int = 0) -> tuple[int, list[AdapterRecord]]:
        """(generation, the kept versions of that adapter, the live one first, as the tenant may see them).

        Raises: AdapterNotFound, StaleIndex.
        """
        await self._reach_for(tenant, min_generation)
        generation, versions = await _on(self._lookups, self._retriever.versions, tenant, name)
        return generation, [_as_seen_by(tenant, record) for record in versions]

    async def embed(self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]) -> list[Embedded | None]:
        """One embedding per group of samples, with the neighbours its tenant sees now; None where there is no sample.

        `tenants` runs along with `groups`. Samples are encoded in small chunks, and between two of them prompts have
        their turn, and then each other tenant that publishes. A call of several tenants takes the first one's turns.
        """
        encoding = await _on(self._bulk, self._retriever.encoding_of, groups, tenants)
        turn = self._bulk_turns.setdefault(next(iter(tenants), ""), asyncio.Lock())
        for chunk in encoding.chunks:
            async with turn:
                await _on(self._bulk, encoding.encode, chunk)
        return await _on(self._bulk, self._embedded, encoding, groups, tenants)

    def _embedded(
        self, encoding: BulkEncoding, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]
    ) -> list[Embedded | None]:
        return [
            None if e is None else Embedded(e, self._retriever.neighbours(e, _NEIGHBOURS, tenant))
            for e, tenant in zip(embeddings_of(encoding, groups), tenants, strict=True)
        ]

    async def catch_up(self, generation: int) -> int:
        """The generation this replica serves from now on.

        Raises: StaleIndex, also after `_CATCH_UP_S`; StoreUnavailable; EncoderUnusable.
        """
        return await self._reach(generation)

    async def prepare_encoder(self, model: str) -> str:
        """The identity of the model's encoder, loaded for the generation that activates it. Raises: EncoderUnusable."""
        return (await asyncio.to_thread(self._pools.prepare_encoder, model)).identity

    async def reindex(self, model: str) -> AsyncIterator[ReindexStep]:
        """Embeddings by the encoder of `model` of every adapter that has none yet, to be committed step by step.

        Raises: EncoderUnusable, StoreUnavailable.
        """
        await self._refresh()
        steps = await asyncio.to_thread(self._retriever.reindex, model, self._samples)
        async for step in _beside_the_loop(steps):
            yield step

    async def doctor(self, tenant: str) -> AsyncIterator[DoctorStep]:
        """How well the adapters `tenant` sees are found; the last step has the report. Raises: StoreUnavailable."""
        async for step in _beside_the_loop(self._retriever.doctor(tenant, self._samples)):
            yield step

    async def index_stats(self) -> IndexStats:
        return await _on(self._lookups, self._pools.stats)

    def check_health(self) -> None:
        if self._polling.done():
            self._polling.result()

    def _samples(self, record: AdapterRecord) -> Sequence[Sample]:
        return () if record.samples_digest is None else self._store.samples(record.samples_digest)

    async def _reach(self, generation: int) -> int:
        """Serve `generation` or a later one, and return it; the catalogue is read only where it is not served yet."""
        await self._catch_up_until(lambda: self._retriever.generation >= generation, 0.0)
        if self._retriever.generation < generation:
            raise StaleIndex(generation, self._retriever.generation)
        return self._retriever.generation

    async def _reach_for(self, tenant: str, generation: int) -> None:
        """Catch up with `generation`, as answers reported it to this tenant.

        Clients choose that number, so for them the catalogue is read every `_READ_EVERY_S` at most, however many ask.
        """
        await self._catch_up_until(lambda: self._retriever.generation_for(tenant) >= generation, _READ_EVERY_S)
        if self._retriever.generation_for(tenant) < generation:
            raise StaleIndex(generation, self._retriever.generation_for(tenant))

    async def _catch_up_until(self, is_reached: Callable[[], bool], pause_s: float) -> None:
        """Read the catalogue, twice at most: a read that is under way may have begun before the commit."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_CATCH_UP_S):
                for _ in range(2):
                    if is_reached():
                        return
                    await asyncio.sleep(self._began_reading_at + pause_s - time.monotonic())
                    if not is_reached():
                        await self._refresh()

    async def _refresh(self) -> None:
        """One refresh at a time, whoever waits for it: a catalogue that hangs holds one thread, not all."""
        if self._refreshing is None or self._refreshing.done():
            self._began_reading_at = time.monotonic()
            self._refreshing = asyncio.create_task(_on(self._reading, self._pools.catch_up))
            self._refreshing.add_done_callback(self._refreshed)
        await asyncio.shield(self._refreshing)

    def _refreshed(self, task: asyncio.Task[int]) -> None:
        """Its waiters may all have left: an error is not news to the event loop."""
        if not task.cancelled() and task.exception() is None:
            self._read_at = time.monotonic()

    async def _tell(self) -> None:
        pool = self._pools.current
        self._metrics.report(pool.snapshot, pool.index.num_live, time.monotonic() - self._read_at)

    async def _poll(self, interval_s: float, sleep: Callable[[float], Awaitable[None]]) -> None:
        """The safety net under the publisher's broadcast. What fails is logged once, until it works again."""
        is_failing = False
        while True:
            try:
                await self._refresh()
            except (LoraStoreError, RetrieverError) as exc:
                if not is_failing:
                    logger.warning("generation %d is served on: %s", self._retriever.generation, exc)
                is_failing = True
            else:
                if is_failing:
                    logger.info("generation %d is served: the catalogue is read again", self._retriever.generation)
                is_failing = False
            await sleep(interval_s)


async def _on(threads: Executor, work: Callable[..., T], *args: Any) -> T:
    """Run `work` on one of these threads."""
    return await asyncio.get_running_loop().run_in_executor(threads, partial(work, *args))


def _given(answer: Route | RetrieverError) -> Route:
    """Raises: the answer, where it is an error."""
    if isinstance(answer, RetrieverError):
        raise answer
    return answer


def _as_seen_by(tenant: str, record: AdapterRecord) -> AdapterRecord:
    """Without its embedding; of another tenant's also without where it came from and which key published it."""
    if record.ref.tenant == tenant:
        return replace(record, embedding=None)
    return replace(record, embedding=None, source=record.ref.name, actor="")


async def _beside_the_loop(steps: Iterator[Step]) -> AsyncIterator[Step]:
    while (step := await asyncio.to_thread(next, steps, None)) is not None:
        yield step
