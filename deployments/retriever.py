"""The Retriever deployment: encodes prompts in batches, tenant by tenant, and answers every read of the catalogue."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from deployments.api.pool_responses import map_body
from deployments.auth.ray_token import require_token_mode
from deployments.calls.shared import Shared
from deployments.config.app import AppConfig
from deployments.encoder_queue import EncoderQueue
from deployments.errors import ModelNotFound
from deployments.observability.logs import join_serve_logs
from deployments.observability.metrics import SERVE, MetricFactory, report_periodically
from deployments.observability.retriever_metrics import RetrieverMetrics
from deployments.observability.tracing import open_span
from deployments.retriever_factory import live_pool, retriever_over
from gpu_worker.front.fair_threads import FairThreads
from lora_store import (
    AdapterRecord,
    Embedding,
    Feedback,
    LoraStore,
    LoraStoreError,
    NamedPolicy,
    Plan,
    Ranking,
    Sample,
    Strategy,
)
from lora_store.lru_cache import LruCache
from retriever_svc import (
    AskedPrompt,
    BulkEncoding,
    DoctorStep,
    Draws,
    IndexSettings,
    IndexStats,
    Learnt,
    Page,
    PageRequest,
    PinnedAdapter,
    Place,
    PlanGone,
    PoolMap,
    PoolSize,
    Region,
    ReindexStep,
    Resampled,
    RetrieverError,
    Route,
    RouteRequest,
    StaleIndex,
    make_embeddings,
)
from retriever_svc.nearest_samples import NearestSamples
from retriever_svc.pool import Pool
from retriever_svc.retriever import Encoded
from retriever_svc.route import Embedded
from retriever_svc.views import choose_views, with_views

logger = logging.getLogger(__name__)

Step = TypeVar("Step")
T = TypeVar("T")
P = ParamSpec("P")
_NEIGHBOURS = 3
_NO_VECTOR = np.empty(0, np.float32)
_LOOKUP_THREADS = 4
_SEARCH_THREADS = 4
_READ_EVERY_S = 0.5
_SAMPLES_S = 5.0  # then an answer does without the samples that would explain it
_MAPS_BYTES = 2**24  # the kept bodies; the maps from which they were written take about three times as much
_BATCH_TEXTS = 32  # texts that the encoder reads together; at most about 2,048 tokens
_POLL_INTERVAL_S = 3.0  # how late a replica sees a commit that it was not notified of
_CATCH_UP_S = 4.0  # below the publisher's timeout, so that each replica can report an error itself


class RetrieverDeployment:
    """One encoder and one index. The replica is ready once it serves the catalogue's newest generation.

    Work runs outside the event loop, each kind on its own threads, so that none blocks another: look-ups by name;
    lists, in which tenants take turns; searches; maps; the encoder for prompts, with a queue in which tenants take
    turns; the encoder for publishes; the catalogue. Calls with a `min_generation` wait briefly for it, then raise
    StaleIndex.
    """

    def __init__(
        self,
        config: AppConfig,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        poll_interval_s: float = _POLL_INTERVAL_S,
        index: IndexSettings | None = None,
        kinds: MetricFactory = SERVE,
    ) -> None:
        join_serve_logs()
        require_token_mode(allow_unauthenticated=config.allow_unauthenticated_ray)
        self._metrics, self._limits = RetrieverMetrics(kinds), config.admission.limits
        self._store = LoraStore(config.store_uri, accepts_base=config.served_models.accepted_names)
        self._pools = live_pool(config, self._store.snapshot, index)
        self._retriever = retriever_over(self._pools, config, self._metrics)
        self._lookups = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="lookup")
        # A list with new filters reads the whole pool, and any key may ask.
        self._lists = FairThreads(
            "list", num_threads=1, max_calls=64, full="too many lists are being made; retry later"
        )
        self._searches = ThreadPoolExecutor(_SEARCH_THREADS, thread_name_prefix="search")
        self._maps = ThreadPoolExecutor(1, thread_name_prefix="map")  # of 10,000 adapters: 0.3 s
        self._map_bodies: LruCache[str, tuple[PoolMap, bytes]] = LruCache(_MAPS_BYTES, lambda kept: len(kept[1]))
        self._encoding = ThreadPoolExecutor(
            1, thread_name_prefix="encode"
        )  # two threads would only share the same cores
        self._bulk = ThreadPoolExecutor(1, thread_name_prefix="bulk")
        # At most one chunk of each tenant waits for the thread, so tenants take turns.
        self._bulk_turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="catalogue")
        self._prompts = EncoderQueue(
            lambda texts: _on(self._encoding, self._retriever.encode, texts),
            batch_size=_BATCH_TEXTS,
            max_waiting=config.retrieval.max_waiting,
        )
        self._pools.catch_up()  # includes commits made while the encoder and the index were built
        self._refreshes = Shared(self._read, kept_s=0.0)
        self._read_at = self._began_reading_at = time.monotonic()
        loop = asyncio.get_event_loop()
        self._polling = loop.create_task(self._poll(poll_interval_s, sleep))
        self._reporting = loop.create_task(report_periodically(self._report))

    async def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        """Return the plan and candidates for each prompt of one client's request, all of the same tenant.

        Raises: NoAdapterMatched for the first prompt that has none, EncoderBusy, StaleIndex.
        """
        if not requests:
            return []
        await self._reach_for(requests[0].tenant, max(request.min_generation for request in requests))
        views, places = with_views(requests)
        with open_span("retriever.encode"):
            read = await self._prompts.encoded(requests[0].tenant, [view.text for view in views])
        with open_span("retriever.search"):
            found = await _on(self._searches, self._retriever.route_encoded, views, read, places)
        chosen = choose_views(found, places)
        answers, encoded = [found[place] for place in chosen], [read[place] for place in chosen]
        for request, answer in zip(requests, answers, strict=True):
            self._metrics.record_route(answer, request.counted)
        if failed := [answer for answer in answers if isinstance(answer, RetrieverError)]:
            raise failed[0]
        routes = [answer for answer in answers if isinstance(answer, Route)]
        wants_samples = any(request.shows_samples for request in requests)
        return await self._explained(requests, encoded, routes) if wants_samples else routes

    async def _explained(
        self, requests: Sequence[RouteRequest], encoded: Sequence[Encoded], routes: list[Route]
    ) -> list[Route]:
        """Return the routes, with the nearest samples where a request asks for them and they are there in time."""
        tenant, pool = requests[0].tenant, encoded[0].pool
        rows = [row for row, request in enumerate(requests) if request.shows_samples and encoded[row].pool is pool]
        if rows:
            wanted, prompts = [routes[row] for row in rows], [encoded[row].vector for row in rows]
            with suppress(TimeoutError):
                async with asyncio.timeout(_SAMPLES_S):
                    nearest = await asyncio.to_thread(NearestSamples.of, pool, tenant, wanted, self._samples)
                    await self._encode_in_turns(nearest.encoding, tenant)
                    shown = dict(zip(rows, nearest.shown_in(wanted, prompts), strict=True))
                    routes = [shown.get(row, route) for row, route in enumerate(routes)]
        return routes

    async def plan_named(
        self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy, min_generation: int = 0
    ) -> Plan:
        """Return the plan of adapters that a client named.

        Raises: AdapterNotFound, AdapterIncompatible, PlanInvalid, StaleIndex.
        """
        await self._reach_for(tenant, min_generation)
        return await _on(self._lookups, self._retriever.plan_named, tenant, choices, strategy)

    async def replay(
        self,
        tenant: str,
        strategy: Strategy,
        pinned: Sequence[PinnedAdapter],
        generation: int,
        min_generation: int = 0,
    ) -> Plan:
        """Return the plan that was made at `generation`, which this pool need not have: a copy counts from 1.

        Raises: PlanGone, AdapterIncompatible, PlanInvalid, StaleIndex.
        """
        await self._reach_for(tenant, min_generation)

        async def replay() -> Plan:
            return await _on(self._lookups, self._retriever.replay, tenant, strategy, pinned, generation)

        with suppress(PlanGone):
            return await replay()
        if not await self._catch_up_until(lambda: self._retriever.generation_for(tenant) >= generation, _READ_EVERY_S):
            raise StaleIndex(generation, self._retriever.generation_for(tenant))
        return await replay()

    async def policies(self, tenant: str, model: str, min_generation: int = 0, limit: int = 1) -> list[NamedPolicy]:
        """Return the newest kept policies of a model name, [] if the tenant uses none called so. Raises: StaleIndex."""
        await self._reach_for(tenant, min_generation)
        return await _on(self._lookups, self._retriever.policies, tenant, model, 0, limit)

    async def find_model(
        self, tenant: str, model: str, strategy: Strategy, min_generation: int = 0
    ) -> NamedPolicy | Plan | None:
        """Return what a model name means: its newest policy, or the plan of one adapter, or neither.

        Raises: StaleIndex.
        """
        await self._reach_for(tenant, min_generation)
        return await _on(self._lookups, self._retriever.find_model, tenant, model, strategy)

    async def names(
        self,
        tenant: str,
        min_generation: int = 0,
        after: str = "",
        limit: int | None = None,
        is_short: bool = False,
    ) -> list[NamedPolicy]:
        """Return the newest policy of each name that the tenant may use, see `visible_names`. Raises: StaleIndex."""
        await self._reach_for(tenant, min_generation)
        return await _on(self._lookups, self._retriever.names, tenant, after, limit, is_short=is_short)

    async def page(self, tenant: str, request: PageRequest, min_generation: int = 0) -> Page:
        """Return a page of the adapters that the tenant may use, without vectors. Raises: EngineFull, StaleIndex."""
        await self._reach_for(tenant, min_generation)
        page = await asyncio.wrap_future(self._lists.submit(tenant, partial(self._retriever.page, tenant, request)))
        return replace(page, rows=tuple((name, self._as_seen_by(tenant, record)) for name, record in page.rows))

    async def map(self, tenant: str, min_generation: int = 0) -> bytes:
        """Return the adapters that `auto` may choose for the tenant, on a plane, as the body of the HTTP answer.

        The body is written once for each state of the pool, so that clients may poll it. Raises: StaleIndex.
        """
        await self._reach_for(tenant, min_generation)
        return await _on(self._maps, self._map_body, tenant)

    def _map_body(self, tenant: str) -> bytes:
        """Return the body that was written for this map, or write it. Only the thread of maps calls it."""
        drawn, kept = self._retriever.map(tenant), self._map_bodies.get(tenant)
        if kept is not None and kept[0] is drawn:
            return kept[1]
        body = map_body(drawn)
        self._map_bodies.put(tenant, (drawn, body))
        return body

    async def place(self, tenant: str, text: str, names: Sequence[str], min_generation: int = 0) -> Place:
        """Return where a prompt and these adapters are on that plane. Raises: EncoderBusy, StaleIndex."""
        await self._reach_for(tenant, min_generation)
        [encoded] = await self._prompts.encoded(tenant, [text])
        return await _on(self._maps, self._retriever.place_encoded, tenant, encoded, names)

    async def vectors(self, tenant: str, texts: Sequence[str], model: str) -> list[NDArray[np.float32]]:
        """Return the vector (D,) float32, of length 1, of each text of one request, by the active encoder `model`.

        Raises: ModelNotFound, EncoderBusy.
        """
        _require_encoder(self._pools.current, model)
        read = await self._prompts.encoded(tenant, texts)
        while len({encoded.pool.encoder.identity for encoded in read}) > 1:  # another one was activated meanwhile
            read = await self._prompts.encoded(tenant, texts)
        _require_encoder(read[0].pool, model)
        return [encoded.vector for encoded in read]

    async def load(self, tenant: str) -> PoolSize:
        """Return the size of the pool that this replica serves."""
        return await _on(self._lookups, self._retriever.count, tenant)

    async def record(self, tenant: str, name: str, min_generation: int = 0) -> tuple[int, list[AdapterRecord]]:
        """Return (generation, the kept versions of that adapter that the tenant may see, the live one first).

        Raises: AdapterNotFound, StaleIndex.
        """
        return await self._record(tenant, name, min_generation)

    async def _record(self, tenant: str, name: str, min_generation: int) -> tuple[int, list[AdapterRecord]]:
        await self._reach_for(tenant, min_generation)
        generation, versions = await _on(self._lookups, self._retriever.versions, tenant, name)
        return generation, [self._as_seen_by(tenant, record) for record in versions]

    def _as_seen_by(self, tenant: str, record: AdapterRecord) -> AdapterRecord:
        """Return the record without vectors; another tenant's also without its source, author and trial.

        It has an embedding only if the encoder in service made it, so that `auto` finds the adapter.
        """
        embedding = record.embedding
        if embedding is not None:
            is_found = embedding.encoder == self._pools.current.encoder.identity
            embedding = Embedding(embedding.encoder, _NO_VECTOR, _NO_VECTOR) if is_found else None
        if record.ref.tenant == tenant:
            return replace(record, embedding=embedding)
        return replace(record, embedding=embedding, source=record.ref.name, actor="", trial=None)

    async def evaluation(self, tenant: str, name: str) -> Ranking | None:
        """Return what the tenant's last evaluation measured on this adapter's examples. Raises: AdapterNotFound."""
        return await _on(self._lookups, self._retriever.evaluation, tenant, name)

    async def samples(self, tenant: str, name: str, min_generation: int = 0) -> list[Sample]:
        """Return the samples of the adapter's live version; none of another tenant's adapter.

        Raises: AdapterNotFound, StaleIndex, StoreUnavailable.
        """
        _, [record, *_] = await self._record(tenant, name, min_generation)
        return list(await asyncio.to_thread(self._samples, record)) if record.ref.tenant == tenant else []

    async def embed(self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]) -> list[Embedded | None]:
        """Return one embedding per group of samples, with the neighbours its tenant sees now.

        None: it has no samples, or the encoder gives numbers that are not finite.
        `tenants` has one entry per group. Samples are encoded in small chunks. Between two chunks prompts take their
        turn, then each other publishing tenant. A call for several tenants uses the turns of the first one.
        """
        encoding = await _on(self._bulk, self._retriever.make_encoding, groups, tenants)
        await self._encode_in_turns(encoding, next(iter(tenants), ""))
        return await _on(self._bulk, self._embedded, encoding, groups, tenants)

    async def _encode_in_turns(self, encoding: BulkEncoding, tenant: str) -> None:
        turn = self._bulk_turns.setdefault(tenant, asyncio.Lock())
        for chunk in encoding.chunks:
            async with turn:
                await _on(self._bulk, encoding.encode, chunk)

    def _embedded(
        self, encoding: BulkEncoding, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]
    ) -> list[Embedded | None]:
        return [
            None if e is None else Embedded(e, self._retriever.neighbours(e, _NEIGHBOURS, tenant))
            for e, tenant in zip(make_embeddings(encoding, groups), tenants, strict=True)
        ]

    async def catch_up(self, generation: int) -> int:
        """Serve `generation` or a later one, and return the generation served.

        Raises: StaleIndex, also after `_CATCH_UP_S`; StoreUnavailable; EncoderUnusable.
        """
        await self._catch_up_until(lambda: self._retriever.generation >= generation, 0.0)
        if self._retriever.generation < generation:
            raise StaleIndex(generation, self._retriever.generation)
        return self._retriever.generation

    async def prepare_encoder(self, model: str, projection: str = "auto") -> str:
        """Load the model's encoder for the generation that activates it. Return its identity.

        Raises: EncoderUnusable, ProjectionUnusable.
        """
        return (await asyncio.to_thread(self._pools.prepare_encoder, model, projection)).identity

    async def refit(self, model: str) -> str:
        """Fit a projection for the encoder of `model` to the pool's samples. Return the identity of both.

        Raises: EncoderUnusable, ProjectionUnusable, StoreUnavailable.
        """
        await self._refresh()
        return (await asyncio.to_thread(self._pools.refit, model, self._samples)).identity

    async def reindex(self, model: str, projection: str = "auto") -> AsyncGenerator[ReindexStep]:
        """Yield embeddings by the encoder of `model` for every adapter that has none yet, to be committed in steps.

        Raises: EncoderUnusable, ProjectionUnusable, StoreUnavailable.
        """
        await self._refresh()
        steps = await asyncio.to_thread(self._retriever.reindex, model, self._samples, projection)
        async for step in _beside_the_loop(steps):
            yield step

    async def doctor(self, tenant: str, prompts: Sequence[AskedPrompt] = ()) -> AsyncGenerator[DoctorStep]:
        """Examine how well the tenant's adapters are retrieved; the last step has the report.

        Raises: AdapterNotFound for an unknown name in the prompts, StoreUnavailable.
        """
        async for step in _beside_the_loop(self._retriever.doctor(tenant, self._samples, prompts=prompts)):
            yield step

    async def draws(self, tenant: str, name: str, min_generation: int = 0) -> Draws:
        """Return which prompts this version would answer for other tenants if it were approved.

        Raises: AdapterNotFound, StaleIndex, StoreUnavailable; AdapterRefused if a reindex has to embed it first.
        """
        await self._reach_for(tenant, min_generation)
        measurement = await asyncio.to_thread(self._retriever.draw_measurement, tenant, name, self._samples)
        await self._encode_in_turns(measurement.encoding, tenant)
        return await _on(self._searches, self._retriever.draws, measurement)

    async def regions(self, tenant: str) -> AsyncGenerator[Region]:
        """Yield the regions in which the tenant's adapters can be measured. Raises: StoreUnavailable."""
        await self._refresh()
        async for region in _beside_the_loop(self._retriever.regions(tenant, self._samples)):
            yield region

    async def accept(self, live: AdapterRecord, texts: Sequence[str]) -> Resampled:
        """Return the samples of a live version with these prompts of clients, and what they do to the pool.

        Raises: AdapterNotFound, BlobCorrupted, StoreUnavailable.
        """
        return await asyncio.to_thread(self._retriever.accept, live, texts, self._samples, self._limits)

    async def learn(self, tenant: str, outcomes: Sequence[Feedback]) -> Learnt:
        """Return the choices that these outcomes lead to for the tenant, and what they do.

        Raises: StoreUnavailable, EncoderUnusable.
        """
        await self._refresh()  # an outcome applies to the version that is live
        return await asyncio.to_thread(self._retriever.learn, tenant, outcomes, self._samples)

    async def index_stats(self) -> IndexStats:
        return await _on(self._lookups, self._pools.stats)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the inputs of `RetrieverScaling`."""
        return self._prompts.read_load()

    def check_health(self) -> None:
        if self._polling.done():
            self._polling.result()

    def _samples(self, record: AdapterRecord) -> Sequence[Sample]:
        return () if record.samples_digest is None else self._store.samples(record.samples_digest)

    async def _reach_for(self, tenant: str, generation: int) -> None:
        """Catch up with `generation`, as answers reported it to this tenant.

        Clients choose that number, so the catalogue is read at most once per `_READ_EVERY_S` for them.
        """
        await self._catch_up_until(lambda: self._retriever.generation_for(tenant) >= generation, _READ_EVERY_S)
        if self._retriever.generation_for(tenant) < generation:
            raise StaleIndex(generation, self._retriever.generation_for(tenant))

    async def _catch_up_until(self, is_reached: Callable[[], bool], pause_s: float) -> bool:
        """Read the catalogue at most twice: a read in progress may have begun before the commit.

        Return False if that took too long.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_CATCH_UP_S):
                for _ in range(2):
                    if is_reached():
                        break
                    await asyncio.sleep(self._began_reading_at + pause_s - time.monotonic())
                    if not is_reached():
                        await self._refresh()
                return True
        return False

    async def _refresh(self) -> None:
        """Run one refresh at a time for all waiting callers, so that a hanging catalogue blocks one thread only."""
        await self._refreshes.get()

    async def _read(self) -> None:
        self._began_reading_at = time.monotonic()
        await _on(self._reading, self._pools.catch_up)
        self._read_at = time.monotonic()

    async def _report(self) -> None:
        pool = self._pools.current
        self._metrics.report(pool.snapshot, pool.index.num_live, time.monotonic() - self._read_at)

    async def _poll(self, interval_s: float, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Read the catalogue at intervals, in case a broadcast was missed. Log the first error of a series."""
        is_failing = False
        while True:
            try:
                await self._refresh()
            except (LoraStoreError, RetrieverError) as exc:
                if not is_failing:
                    logger.warning(
                        "cannot read the catalogue; still serving generation %d: %s", self._retriever.generation, exc
                    )
                is_failing = True
            else:
                if is_failing:
                    logger.info("the catalogue can be read again; serving generation %d", self._retriever.generation)
                is_failing = False
            await sleep(interval_s)


async def _on(threads: Executor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` on one of these threads."""
    return await asyncio.get_running_loop().run_in_executor(threads, partial(work, *args, **kwargs))


def _require_encoder(pool: Pool, model: str) -> None:
    """Raises: ModelNotFound unless `model` is the pool's encoder, by its whole name or the last part of it."""
    active = pool.snapshot.encoder
    encoder = pool.encoder.name if active is None else active.model
    name = encoder.rstrip("/").rpartition("/")[2]
    if model not in (encoder, name):
        raise ModelNotFound(model, name)


async def _beside_the_loop(steps: Iterator[Step]) -> AsyncGenerator[Step]:
    while (step := await asyncio.to_thread(next, steps, None)) is not None:
        yield step
