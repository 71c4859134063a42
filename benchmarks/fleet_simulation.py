"""Simulate many workers behind the product's router, with the product's bookkeeping of each bank, in virtual time.

The router is `AdapterAffinityRouter`, the banks are `Residency` objects with one row for each adapter, and host memory
is an LRU cache as in a worker. Only time is simulated: random arrivals, a fixed time for each answer, and queues.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from deployments.scaling.adapter_affinity_router import RESIDENT, AdapterAffinityRouter, short_digest
from gpu_worker.bank.device_layout import DeviceAdapter, DeviceModule
from gpu_worker.bank.residency import Residency
from gpu_worker.front.request.request import Job
from lora_store import AdapterRef, Plan, PlannedAdapter
from lora_store.lru_cache import LruCache

REPORT_S = 1.5  # mean age of what a worker has reported to the router
_DEPLOYMENT = DeploymentID("Worker", "simulated")
_MODULES = {"m": DeviceModule(torch.zeros(1, 1), torch.zeros(1, 1))}

Draw = Callable[[random.Random], list[str]]
"""Returns the digests of one request's adapters, best first. The first twelve characters of each are its own."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers of one kind. `bank`, `host`: adapters that fit; `rows`: answers computed at once, each in `answer_s`."""

    num_workers: int
    bank: int
    host: int
    rows: int
    answer_s: float


@dataclass(slots=True)
class Counts:
    """Adapters of all requests by the place where they were found, and the requests of each worker."""

    bank: int = 0
    host: int = 0
    store: int = 0
    served: list[int] = field(default_factory=list)

    @property
    def cold_share(self) -> float:
        """Return the loads from the store for each adapter of each request."""
        return self.store / (self.bank + self.host + self.store)

    @property
    def imbalance(self) -> float:
        """Return the requests of the busiest worker over the mean."""
        return max(self.served) * len(self.served) / sum(self.served)


class _Rows:
    """A RowStore without contents."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def write(self, rows: Sequence[int], adapter: DeviceAdapter) -> None: ...
    def free(self, rows: Sequence[int]) -> None: ...
    def move(self, rows: Sequence[int], to: Sequence[int]) -> None: ...
    def swap(self, rows: Sequence[int], others: Sequence[int]) -> None: ...
    def set_active(self, num_rows: int) -> None: ...


class Worker:
    """A worker, and the replica that the router sees."""

    def __init__(self, number: int, fleet: Fleet, counts: Counts) -> None:
        self.replica_id = ReplicaID(f"worker-{number:05d}", _DEPLOYMENT)
        self.max_ongoing_requests = 1 << 30
        self.routing_stats: dict[str, list[str]] = {}
        self.waiting: deque[list[str]] = deque()
        self.num_running = 0
        self._number, self._fleet, self._counts = number, fleet, counts
        self._residency = Residency(_Rows(fleet.bank))
        self._host: LruCache[str, DeviceAdapter] = LruCache(fleet.host, lambda _: 1)

    @property
    def queue_len(self) -> int:
        return self.num_running + len(self.waiting)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queue_len

    def report(self) -> None:
        """Report the adapters in the bank and those of waiting requests, as `Engine.expected` does."""
        digests = self._residency.resident.union(*self.waiting)
        self.routing_stats = {RESIDENT: sorted(map(short_digest, digests))}

    def try_start(self) -> list[str] | None:
        """Start the first waiting request if a row and the bank have room for it. Return its adapters."""
        if not self.waiting or self.num_running == self._fleet.rows:
            return None
        digests = self.waiting[0]
        missing = [digest for digest in digests if digest not in self._residency]
        loaded = {digest: self._host.get(digest) or DeviceAdapter(digest, _MODULES) for digest in missing}
        in_host = [digest for digest in missing if self._host.get(digest) is not None]
        if not self._residency.try_pin(digests, loaded):
            return None
        self._residency.settle()
        for digest, adapter in loaded.items():
            self._host.put(digest, adapter)
        self._counts.bank += len(digests) - len(missing)
        self._counts.host += len(in_host)
        self._counts.store += len(missing) - len(in_host)
        self._counts.served[self._number] += 1
        self.num_running += 1
        return self.waiting.popleft()

    def finish(self, digests: Sequence[str]) -> None:
        self.num_running -= 1
        self._residency.unpin(digests)
        self._residency.settle()


class Simulation:
    """One fleet under one load. `is_affine`: use the product's router; otherwise the shorter of two random queues."""

    def __init__(self, fleet: Fleet, draw: Draw, *, is_affine: bool = True, seed: int = 0) -> None:
        self._fleet, self._draw, self._is_affine = fleet, draw, is_affine
        self._chance, self._now_s = random.Random(seed), 0.0
        self._counts = Counts(served=[0] * fleet.num_workers)
        self._workers = [Worker(number, fleet, self._counts) for number in range(fleet.num_workers)]
        self._by_id = {worker.replica_id: worker for worker in self._workers}
        self._events: list[tuple[float, int, Worker, list[str]]] = []  # ends of answers
        self._numbers = itertools.count()

    def run(self, rate: float, num_requests: int, num_warm: int = 0) -> Counts:
        """Send requests at random times, `rate` a second, and count those after the first `num_warm`."""
        return asyncio.run(self._run(rate, num_requests, num_warm))

    async def _run(self, rate: float, num_requests: int, num_warm: int) -> Counts:
        router = AdapterAffinityRouter(
            _DEPLOYMENT,
            DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            get_curr_time_s=lambda: self._now_s,
        )
        router.initialize_state()
        router.update_replicas(self._workers)
        due = report_due = 0.0
        for number in range(num_requests):
            due += self._chance.expovariate(rate)
            self._end_until(due)
            if due >= report_due:
                report_due = due + 2 * REPORT_S
                for worker in self._workers:
                    worker.report()
                router.update_replicas(self._workers)
            if number == num_warm:
                self._counts.bank = self._counts.host = self._counts.store = 0
                self._counts.served[:] = [0] * len(self._workers)
            await self._send(router, self._draw(self._chance))
        return self._counts

    async def _send(self, router: AdapterAffinityRouter, digests: list[str]) -> None:
        if self._is_affine:
            for worker in self._workers:
                router.on_new_queue_len_info(worker.replica_id, worker.queue_len)
            request = _request_of(digests)
            ranks = await router.choose_replicas(self._workers, request)
            chosen = min(next(rank for rank in ranks if rank), key=lambda worker: worker.queue_len)
            router.on_request_routed(request, chosen.replica_id, None)
        else:
            chosen = min(self._chance.choices(self._workers, k=2), key=lambda worker: worker.queue_len)
        chosen.waiting.append(digests)
        self._start(chosen)

    def _end_until(self, now_s: float) -> None:
        while self._events and self._events[0][0] <= now_s:
            self._now_s, _, worker, digests = heapq.heappop(self._events)
            worker.finish(digests)
            self._start(worker)
        self._now_s = now_s

    def _start(self, worker: Worker) -> None:
        while (digests := worker.try_start()) is not None:
            heapq.heappush(self._events, (self._now_s + self._fleet.answer_s, next(self._numbers), worker, digests))


def digest_of(number: int) -> str:
    """Return a digest whose first twelve characters are the adapter's own."""
    return f"{number:012d}"


def _request_of(digests: Sequence[str]) -> PendingRequest:
    rows = tuple(PlannedAdapter(AdapterRef("simulated", d, d), d, 1 / len(digests)) for d in digests)
    return PendingRequest(
        args=[Job("simulated", "", Plan("mixture", rows))], kwargs={}, metadata=RequestMetadata("", "")
    )
