"""Simulate a large fleet: conversations over many workers behind many routers. `python -m benchmarks.fleet`, minutes.

The routers are the product's: one for each Ingress, with the reports that it has heard and the queues that Serve 2.60
tells it: at each of its own requests, counted on until the next. Serve's proxy gives each turn to any Ingress. Time is
simulated: a worker answers one turn after the other, for as long as the measured costs say. `tests/cluster` compares a
run of four real workers with this simulation.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import pickle
import random
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Annotated, Any

import numpy as np
import typer
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
    RunningReplicaInfo,
)
from ray.serve.request_router import PendingRequest

from benchmarks.engine_cases import Quick, console, shown, table_of
from benchmarks.results_file import write_part
from deployments.scaling.adapter_affinity_router import AdapterAffinityRouter
from deployments.scaling.residency import HeardReports, ResidencyReport, short_digest
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Job
from lora_store import AdapterRef, Plan, PlannedAdapter

AGES_S = (0.0, 0.1, 1.0, 5.0)  # how old queues and reports are when routers learn them
ENCODER_MS = (6.0, 102.3)  # one text, and 32 together: results/encoder
SEARCH_MS = 2.6  # among a million adapters: results/pool_scale
_DEPLOYMENT = DeploymentID("Worker", "simulated")


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers, routers and the load. Every client asks a turn, reads, and asks the next; then it begins a new talk.

    `bank`: adapters that fit a worker; `talks`: conversations whose blocks its prefix cache keeps. Seconds are those of
    one worker: `turn_s` for a turn, `token_s` for a prompt token that is not cached, `load_s` for an adapter.
    """

    workers: int = 100
    routers: int = 20
    adapters: int = 10_000
    k: int = 3
    bank: int = 32
    talks: int = 400
    clients: int = 10_000
    turns: int = 8
    first_tokens: int = 300
    turn_tokens: int = 62
    read_s: float = 10.0
    turn_s: float = 0.045
    token_s: float = 0.00002
    load_s: float = 0.005
    is_affine: bool = True  # otherwise the shorter of two random queues, as Serve does by itself


@dataclass(slots=True)
class Counts:
    """Counts after the warm-up. Tokens are those of earlier turns: `found` of them were in the prefix cache."""

    turns: int = 0
    adapters: int = 0
    loads: int = 0
    earlier: int = 0
    found: int = 0
    seconds: float = 0.0
    waits_s: list[float] = field(default_factory=list)
    by_worker: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return shares, turns a second, the waiting time, and the busiest worker over the mean."""
        return {
            "prefix_hits": self.found / max(self.earlier, 1),
            "bank_misses": self.loads / max(self.adapters, 1),
            "turns_s": self.turns / self.seconds,
            "wait_p99_s": float(np.quantile(self.waits_s, 0.99)),
            "busiest": max(self.by_worker) * len(self.by_worker) / sum(self.by_worker),
        }


@dataclass(slots=True)
class Talk:
    """One conversation of a client."""

    number: int
    adapters: tuple[int, ...]
    num_tokens: int = 0  # earlier turns have this many
    messages: tuple[Message, ...] = ()


@dataclass(slots=True)
class Asked:
    """A turn on its way."""

    talk: Talk
    router: Router
    request: PendingRequest
    at: float


class Worker:
    """A worker, and the replica that routers see."""

    max_ongoing_requests = 1 << 30

    def __init__(self, number: int, fleet: Fleet) -> None:
        self.number, self._fleet = number, fleet
        self.replica_id = ReplicaID(f"{number:08d}", _DEPLOYMENT)
        self.queue: deque[Asked] = deque()
        self._bank: OrderedDict[int, None] = OrderedDict()
        self._talks: OrderedDict[int, None] = OrderedDict()
        self._numbers = itertools.count()

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return len(self.queue)

    def report(self) -> ResidencyReport:
        held = {*self._bank, *(adapter for asked in self.queue for adapter in asked.talk.adapters)}
        return ResidencyReport(self.replica_id.unique_id, next(self._numbers), b"".join(map(_short, held)))

    def answer_s(self, talk: Talk, counts: Counts) -> float:
        """Return how long the first turn of the queue takes, and keep what it leaves behind."""
        fleet, loads = self._fleet, sum(adapter not in self._bank for adapter in talk.adapters)
        _keep(self._bank, talk.adapters, fleet.bank)
        new = fleet.turn_tokens if talk.num_tokens else fleet.first_tokens
        found = talk.num_tokens if talk.number in self._talks else 0
        _keep(self._talks, (talk.number,), fleet.talks)
        counts.turns += 1
        counts.adapters += len(talk.adapters)
        counts.loads += loads
        counts.earlier += talk.num_tokens
        counts.found += found
        counts.by_worker[self.number] += 1
        return fleet.turn_s + fleet.token_s * (talk.num_tokens + new - found) + fleet.load_s * loads


def _keep(cache: OrderedDict[int, None], keys: Sequence[int], size: int) -> None:
    for key in keys:
        cache[key] = None
        cache.move_to_end(key)
    while len(cache) > size:
        cache.popitem(last=False)


class Router:
    """The router of one Ingress, with what this Ingress has heard."""

    def __init__(self, workers: Sequence[Worker], clock: Callable[[], float], chance: random.Random) -> None:
        self.heard, self._workers, self._chance = HeardReports(), workers, chance
        source = DeploymentHandleSource.REPLICA
        self.router = AdapterAffinityRouter(
            _DEPLOYMENT, source, use_replica_queue_len_cache=True, get_curr_time_s=clock
        )
        self.router.initialize_state(self.heard)
        self.router.update_replicas(workers)

    async def choose(self, request: PendingRequest, *, is_affine: bool) -> Worker:
        """Return the replica that Serve takes: of the first rank, that with the shortest known queue."""
        if is_affine:
            ranks = await self.router.choose_replicas(self._workers, request)
            rank = next(rank for rank in ranks if rank)
        else:
            rank = self._chance.choices(self._workers, k=2)
        queues = [(self.router.replica_queue_len_cache.get(worker.replica_id), worker) for worker in rank]
        known = [(queue, worker) for queue, worker in queues if queue is not None]
        asked = known or [(len(worker.queue), worker) for worker in rank]
        return min(asked, key=lambda pair: pair[0])[1]


class Simulation:
    """One fleet. `age_s`: how old queues and reports are when a router learns them; None: it knows all queues."""

    def __init__(self, fleet: Fleet, age_s: float | None = 0.0, seed: int = 0) -> None:
        self._fleet, self._age_s, self._now_s = fleet, age_s, 0.0
        self._chance = random.Random(seed)
        self._popular = np.cumsum(1.0 / np.arange(1, fleet.adapters + 1)).tolist()
        self._ring = self._chance.sample(range(fleet.adapters), fleet.adapters)
        self._workers = [Worker(number, fleet) for number in range(fleet.workers)]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers, self._talk_numbers = itertools.count(), itertools.count()
        self._due: deque[Talk] = deque()
        self._counts = Counts(by_worker=[0] * fleet.workers)

    def run(self, seconds: float, warm_s: float) -> dict[str, float]:
        """Return what happened in `seconds` after `warm_s`."""
        return asyncio.run(self._run(seconds, warm_s))

    async def _run(self, seconds: float, warm_s: float) -> dict[str, float]:
        fleet = self._fleet
        self._routers = [Router(self._workers, lambda: self._now_s, self._chance) for _ in range(fleet.routers)]
        for _ in range(fleet.clients):  # in the middle of their talks
            talk = self._new_talk()
            for _ in range(self._chance.randrange(fleet.turns)):
                self._lengthen(talk)
            self._at(self._chance.uniform(0, max(fleet.read_s, 0.1)), lambda talk=talk: self._due.append(talk))
        is_warm = False
        while self._events and self._now_s < warm_s + seconds:
            self._now_s, _, event = heapq.heappop(self._events)
            if not is_warm and self._now_s >= warm_s:
                is_warm, self._counts = True, Counts(by_worker=[0] * fleet.workers)
            event()
            while self._due:
                await self._ask(self._due.popleft())
        self._counts.seconds = self._now_s - warm_s
        return self._counts.summary()

    def _at(self, time_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), event))

    def _new_talk(self) -> Talk:
        [first] = self._chance.choices(self._ring, cum_weights=self._popular)
        adapters = tuple((first + step) % self._fleet.adapters for step in range(self._fleet.k))
        return Talk(next(self._talk_numbers), adapters)

    def _lengthen(self, talk: Talk) -> None:
        fleet, turn = self._fleet, len(talk.messages)
        talk.num_tokens += fleet.turn_tokens if talk.num_tokens else fleet.first_tokens
        talk.messages += (Message("user", f"{talk.number} {turn}"), Message("assistant", "yes"))

    async def _ask(self, talk: Talk) -> None:
        prompt = (*talk.messages, Message("user", f"{talk.number} {len(talk.messages)}"))
        rows = tuple(PlannedAdapter(AdapterRef("t", d, d), d, 1.0) for d in map(_digest, talk.adapters))
        job = Job("simulated", prompt, Plan("mixture", rows))
        request = PendingRequest([job], {}, RequestMetadata("", ""))
        router = self._chance.choice(self._routers)  # Serve's proxy
        if self._age_s is None:
            for worker in self._workers:
                router.router.on_new_queue_len_info(worker.replica_id, len(worker.queue))
        worker = await router.choose(request, is_affine=self._fleet.is_affine)
        router.router.on_send_request(worker.replica_id)
        worker.queue.append(Asked(talk, router, request, self._now_s))
        self._tell(router, worker, request)
        if len(worker.queue) == 1:
            self._start(worker)

    def _tell(self, router: Router, worker: Worker, request: PendingRequest) -> None:
        """Tell the router the queue and the report that begin the answer; without an age every router hears it."""
        num, report = len(worker.queue), worker.report()

        def learn() -> None:
            router.router.on_new_queue_len_info(worker.replica_id, num)
            for other in self._routers if self._age_s is None else [router]:
                other.heard.hear(report)

        router.router.on_request_routed(request, worker.replica_id, None)
        self._at(self._now_s + (self._age_s or 0.0), learn) if self._age_s else learn()

    def _start(self, worker: Worker) -> None:
        asked = worker.queue[0]
        self._counts.waits_s.append(self._now_s - asked.at)
        self._at(self._now_s + worker.answer_s(asked.talk, self._counts), lambda: self._end(worker))

    def _end(self, worker: Worker) -> None:
        asked = worker.queue.popleft()
        asked.router.router.decrement_queue_len_cache(worker.replica_id)
        self._lengthen(asked.talk)
        is_over = len(asked.talk.messages) >= 2 * self._fleet.turns
        talk = self._new_talk() if is_over else asked.talk
        read_s = self._chance.expovariate(1 / self._fleet.read_s) if self._fleet.read_s else 0.0
        self._at(self._now_s + read_s, lambda: self._due.append(talk))
        if worker.queue:
            self._start(worker)


def _digest(adapter: int) -> str:
    return f"{adapter:064x}"[::-1]


@cache
def _short(adapter: int) -> bytes:
    return short_digest(_digest(adapter))


def controller_bytes(workers: int = 200, held: int = 64) -> tuple[int, int]:
    """Return the bytes of one change at each router: in Serve's list of all workers, and in the report of one."""
    infos = [
        RunningReplicaInfo(
            ReplicaID(f"{number:08d}", _DEPLOYMENT),
            "n" * 56,
            "10.0.0.1",
            None,
            f"SERVE_REPLICA::{number:08d}",
            100,
            routing_stats={"resident": sorted(_digest(number * held + place)[:12] for place in range(held))},
        )
        for number in range(workers)
    ]
    report = ResidencyReport("00000000", 1, b"".join(map(_short, range(held))))
    return len(pickle.dumps(infos)), len(pickle.dumps(report))


def texts(replicas: int, rate: float, routers: int = 20, seconds: float = 60.0) -> dict[str, float]:
    """Return how retrievers carry `rate` new texts a second: busy share and delay. Batches have up to 32 texts."""
    chance, now_s = random.Random(0), 0.0
    text_ms = (ENCODER_MS[1] - ENCODER_MS[0]) / 31
    base_ms = ENCODER_MS[0] - text_ms
    waiting: list[deque[float]] = [deque() for _ in range(replicas)]
    free_at, busy_s = [0.0] * replicas, 0.0
    known = [[0] * replicas for _ in range(routers)]
    delays: list[float] = []
    while now_s < seconds:
        now_s += chance.expovariate(rate)
        for number in range(replicas):
            while waiting[number] and free_at[number] <= now_s:
                start = max(free_at[number], waiting[number][0])
                if start > now_s:
                    break
                batch = [at for at in itertools.islice(waiting[number], 32) if at <= start]
                took = (base_ms + (text_ms + SEARCH_MS) * len(batch)) / 1000
                free_at[number], busy_s = start + took, busy_s + took
                delays += [start + took - waiting[number].popleft() for _ in batch]
        router = chance.randrange(routers)
        place = min(chance.choices(range(replicas), k=2), key=known[router].__getitem__)
        waiting[place].append(now_s)
        known[router][place] = len(waiting[place])
    return {
        "busy": busy_s / replicas / seconds,
        "p50_ms": 1000 * statistics.median(delays),
        "p99_ms": 1000 * float(np.quantile(delays, 0.99)),
        "answered": len(delays) / (rate * seconds),
    }


def main(
    seconds: Annotated[float, typer.Option(help="simulated seconds of each case, after as many of warm-up")] = 30.0,
    quick: Quick = False,
) -> None:
    """Print what 10,000 adapters, 100 workers and 1,000 requests a second meet, and write results/fleet."""
    fleet = Fleet(workers=8, routers=3, adapters=400, clients=200, talks=50, read_s=1.0) if quick else Fleet()
    seconds = 3.0 if quick else seconds
    cases: dict[str, tuple[Fleet, float | None]] = {"all queues known": (fleet, None)}
    cases |= {f"{age:g} s old" if age else "as Serve tells them": (fleet, age) for age in AGES_S}
    cases |= {
        "one router": (replace(fleet, routers=1), 0.0),
        "without affinity": (replace(fleet, is_affine=False), 0.0),
    }
    table = table_of("queues and reports", "prefix hits", "bank misses", "turns/s", "wait, p99 s", "busiest / mean")
    rows: list[dict[str, Any]] = [asdict(fleet)]
    figures: dict[str, float] = {}
    for name, (own, age_s) in cases.items():
        found = Simulation(own, age_s).run(seconds, seconds)
        table.add_row(
            name,
            f"{found['prefix_hits']:.3f}",
            f"{found['bank_misses']:.3f}",
            f"{found['turns_s']:.0f}",
            f"{found['wait_p99_s']:.2f}",
            f"{found['busiest']:.2f}",
        )
        rows.append({"case": name} | found)
        figures |= {f"{name.replace(' ', '_')}_{figure}": value for figure, value in found.items()}
    whole, report = controller_bytes()
    figures |= {"list_bytes": whole, "report_bytes": report}
    retrievers = table_of("retrievers", "new texts/s", "busy", "delay, p50 ms", "delay, p99 ms")
    for replicas, rate in ((4, 200), (4, 1000), (10, 1000), (20, 1000), (20, 2000)):
        found = texts(replicas, rate, seconds=5 if quick else 60)
        retrievers.add_row(
            str(replicas), str(rate), f"{found['busy']:.2f}", f"{found['p50_ms']:.0f}", f"{found['p99_ms']:.0f}"
        )
        rows.append({"retrievers": replicas, "rate": rate} | found)
        figures |= {f"texts_{replicas}_{rate}_{figure}": value for figure, value in found.items()}
    told = f"bytes for one change at each router, 200 workers x 64: {whole:,} in Serve's list, {report} in a report"
    text = f"{shown(table)}\n{shown(retrievers)}\n{told}"
    console.print(told)
    if not quick:
        write_part("fleet", "simulated", figures=figures, table=text, runs=rows)


if __name__ == "__main__":
    typer.run(main)
