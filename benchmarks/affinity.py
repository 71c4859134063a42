"""Compare two ways to choose a worker: `python -m benchmarks.affinity`.

The adapter-affinity router prefers workers that hold the adapters; Ray's router picks the less busy of two random
workers. Load: four workers over a tiny random model, 200 adapters requested by Zipf's law, banks for 32 each, a fixed
request rate. A second part measures a cold load: the first token with weights from the Store and with weights in the
bank.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import typer
from ray import serve
from ray.serve.handle import DeploymentHandle
from rich.console import Console
from rich.table import Table

from benchmarks.engine_cases import RANK, random_modules
from benchmarks.results_file import machine, write_part
from deployments.config.app import AppConfig, ScalingSettings, WorkerSettings
from deployments.store import StoreDeployment
from deployments.worker import WorkerDeployment
from gpu_worker.config import PACKAGED_MODEL
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.request.request import Job, SamplingParams
from gpu_worker.model.packaged_model import packaged_folder
from lora_store import AdapterRef, LoraStore, Plan, PlannedAdapter, write_peft_folder
from tests.tiny import FAMILIES, byte_tokenizer

NUM_WORKERS, NUM_ADAPTERS, BANK_ADAPTERS, NUM_TOKENS = 4, 200, 32, 16
NUM_TURNS = 4  # per load, after a warm-up turn
console = Console(width=110)


class CountedWorker(WorkerDeployment):
    """A worker whose status carries its replica's id."""

    async def counted(self) -> tuple[str, EngineStatus]:
        return serve.get_replica_context().replica_id.unique_id, await self.load()


@asynccontextmanager
async def running(config: AppConfig, router: str, name: str) -> AsyncIterator[DeploymentHandle]:
    """Yield the handle of the configuration's workers, over a Store of their own.

    `name` must differ each time: a process keeps its router for an application of the same name (Ray 2.60).
    """
    options = config.worker_options()
    if router == "pow2":
        del options["request_router_config"]
    store = serve.deployment(StoreDeployment, name="Store", **config.store_scaling.options())
    worker = serve.deployment(CountedWorker, name="Worker", **options)
    engine = config.worker
    bound = worker.bind(config.worker_config(), engine.stream_interval_ms, store.bind(config), None, engine.niceness)
    yield serve.run(bound, name=name, route_prefix=None)
    serve.delete(name)


def staged(folder: Path, config: AppConfig, shapes: Mapping[str, tuple[int, int]], count: int) -> list[str]:
    """Stage `count` random adapters in the configuration's store and return their weights digests."""
    store = LoraStore(config.store_uri, accepts_base=config.accepted_bases)
    digests = []
    for number in range(count):
        path = folder / f"a{number}"
        write_peft_folder(path, random_modules(number, dict(shapes)), base_model=config.served_base_name)
        digests.append(store.stage(path).weights_digest)
    return digests


def job_of(number: int, digests: Sequence[str], num_tokens: int) -> Job:
    """Return a job for a mixture of these adapters with equal weights."""
    rows = tuple(PlannedAdapter(AdapterRef("local", d[:12], d), d, 1 / len(digests)) for d in digests)
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    return Job(str(number), f"Request {number}: the sea is wide and", Plan("mixture", rows), sampling)


def drawing(digests: Sequence[str], k: int) -> Callable[[random.Random], list[str]]:
    """Return a function that draws adapters by Zipf's law.

    With k = 3 the drawn adapter's two neighbours on a ring are added, however often they are drawn themselves.
    """
    ring = random.Random(1).sample(digests, len(digests))
    place = {digest: number for number, digest in enumerate(ring)}
    heights = list(itertools.accumulate(1 / (number + 1) for number in range(len(digests))))

    def draw(chance: random.Random) -> list[str]:
        [first] = chance.choices(digests, cum_weights=heights)
        steps = (0, 1, -1)[:k]
        return [ring[(place[first] + step) % len(ring)] for step in steps]

    return draw


async def first_token_s(worker: DeploymentHandle, job: Job) -> float:
    """Return the seconds until the first text. Read the answer to its end."""
    started = time.perf_counter()
    waited = 0.0
    async for delta in worker.options(stream=True).stream.remote(job):
        if delta is not None:
            waited = waited or time.perf_counter() - started
            assert delta.num_new_tokens
    return waited


async def counted(worker: DeploymentHandle) -> dict[str, EngineStatus]:
    return dict(await worker.broadcast("counted").results_async(timeout_s=30))


@dataclass(frozen=True)
class Case:
    """The measurements of one router under one load."""

    router: str
    k: int
    cold_rate: float  # loads from the Store for each adapter of each request
    imbalance: float  # requests of the busiest worker over the mean
    ttft_p50_s: float
    ttft_p99_s: float  # median of the turns, so one stall of the machine does not count
    num_requests: int


class Load:
    """Random requests for one router's workers, the same for all routers."""

    def __init__(self, router: str, worker: DeploymentHandle, digests: Sequence[str], k: int, rate: float) -> None:
        self._router, self._worker, self._k, self._rate = router, worker, k, rate
        self._chance, self._draw = random.Random(k), drawing(digests, k)
        self._waited: list[list[float]] = []  # per turn, sorted
        self._served: Counter[str] = Counter()
        self._num_fetches = 0

    async def run(self, seconds: float) -> None:
        """Send requests for this long, then wait for the last answer."""
        before = await counted(self._worker)
        asked: list[asyncio.Task[float]] = []
        due = time.perf_counter()
        until = due + seconds
        while (due := due + self._chance.expovariate(self._rate)) < until:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            job = job_of(len(asked), self._draw(self._chance), NUM_TOKENS)
            asked.append(asyncio.create_task(first_token_s(self._worker, job)))
        self._waited.append(sorted(await asyncio.gather(*asked)))
        for name, held in (await counted(self._worker)).items():
            self._served[name] += held.counters.num_requests - before[name].counters.num_requests
            self._num_fetches += held.counters.num_fetches - before[name].counters.num_fetches

    def forget(self) -> None:
        """Discard the measurements so far, which only filled the banks."""
        self._waited, self._served, self._num_fetches = [], Counter(), 0

    def case(self) -> Case:
        """Return the measurements of all turns."""
        waited, served = [seconds for turn in self._waited for seconds in turn], list(self._served.values())
        return Case(
            self._router,
            self._k,
            cold_rate=self._num_fetches / (self._k * sum(served)),
            imbalance=max(served) / statistics.mean(served),
            ttft_p50_s=statistics.median(waited),
            ttft_p99_s=statistics.median(turn[int(0.99 * len(turn))] for turn in self._waited),
            num_requests=len(waited),
        )


async def compare(folder: Path, rate: float, seconds: float) -> list[Case]:
    """Measure both routers with k = 1 and k = 3, each on its own workers. Routers take turns under equal load."""
    torch.manual_seed(0)
    FAMILIES["gemma3"]().save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    config = AppConfig(
        base_model=str(folder / "tiny"),
        store_uri=str(folder / "pool"),
        worker=WorkerSettings(
            num_threads=1, bank_rank_rows=RANK * BANK_ADAPTERS, max_model_len=256, host_cache_bytes=0, max_batch_size=16
        ),
        worker_scaling=ScalingSettings(
            min_replicas=NUM_WORKERS, max_replicas=NUM_WORKERS, num_cpus=1, max_ongoing_requests=2112
        ),
    )
    cases = []
    async with running(config, "pow2", "pow2") as pow2, running(config, "affinity", "affinity") as affinity:
        digests = staged(folder, config, await pow2.module_shapes.remote(), NUM_ADAPTERS)
        for k in (1, 3):
            loads = [
                Load(router, worker, digests, k, rate) for router, worker in (("pow2", pow2), ("affinity", affinity))
            ]
            for load in loads:
                await load.run(seconds / NUM_TURNS)
                load.forget()
            for _ in range(NUM_TURNS):
                for load in loads:
                    await load.run(seconds / NUM_TURNS)
            cases += [load.case() for load in loads]
            console.print(cases[-2:])
    return cases


async def cost_of_a_load(folder: Path, count: int) -> tuple[list[float], list[float]]:
    """Return the seconds to the first token of the packaged base model, one request at a time: (cold, warm)."""
    packaged_folder(AppConfig().cache_dir)
    config = AppConfig(base_model=PACKAGED_MODEL, store_uri=str(folder / "large"))
    async with running(config, "affinity", "cost") as worker:
        digests = staged(folder / "large-adapters", config, await worker.module_shapes.remote(), count)
        await first_token_s(worker, job_of(0, digests[:1], 1))  # warms up everything else
        cold, warm = [], []
        for digest in digests[1:]:
            cold.append(await first_token_s(worker, job_of(0, [digest], 1)))
            warm.append(await first_token_s(worker, job_of(0, [digest], 1)))
    return cold, warm


def table_of(cases: Sequence[Case], cold: Sequence[float], warm: Sequence[float], rate: float) -> Table:
    title = (
        f"{machine()}\n{NUM_WORKERS} workers, {NUM_ADAPTERS} adapters, {BANK_ADAPTERS} a bank, {rate:.0f} requests/s"
    )
    table = Table(title=title, title_justify="left")
    for column in ("k", "router", "cold loads", "busiest / mean", "TTFT p50 ms", "p99 ms"):
        table.add_column(column, justify="left" if column == "router" else "right")
    for case in sorted(cases, key=lambda case: case.k):
        times = f"{1000 * case.ttft_p50_s:.0f}", f"{1000 * case.ttft_p99_s:.0f}"
        table.add_row(str(case.k), case.router, f"{case.cold_rate:.1%}", f"{case.imbalance:.2f}", *times)
    for what, seconds in (("cold", cold), ("warm", warm)):
        p99 = f"{1000 * sorted(seconds)[int(0.99 * len(seconds))]:.0f}"
        table.add_row("1", f"{PACKAGED_MODEL}, {what}", "", "", f"{1000 * statistics.median(seconds):.0f}", p99)
    return table


def figures_of(cases: Sequence[Case], cold: Sequence[float], warm: Sequence[float]) -> dict[str, float]:
    by = {(case.router, case.k): case for case in cases}
    return {
        "affinity_cold_load_ratio": by["affinity", 1].cold_rate / by["pow2", 1].cold_rate,
        "affinity_cold_load_ratio_k3": by["affinity", 3].cold_rate / by["pow2", 3].cold_rate,
        "affinity_imbalance": max(by["affinity", k].imbalance for k in (1, 3)),
        "affinity_ttft_p99_ratio": by["affinity", 1].ttft_p99_s / by["pow2", 1].ttft_p99_s,
        "cold_load_ms": 1000 * (statistics.median(cold) - statistics.median(warm)),
    }


def main(
    rate: Annotated[float, typer.Option(help="requests a second")] = 40,
    seconds: Annotated[float, typer.Option(help="of each of the four loads, after a warm-up of a quarter")] = 32,
    adapters: Annotated[int, typer.Option(help="adapters whose first answer is timed")] = 32,
) -> None:
    """Measure, and write a part of results/cluster/results.json."""
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        serve.start(http_options={"location": "NoServer"})
        with tempfile.TemporaryDirectory() as name:
            cases = asyncio.run(compare(Path(name), rate, seconds))
            cold, warm = asyncio.run(cost_of_a_load(Path(name), adapters + 1))
    finally:
        serve.shutdown()
        ray.shutdown()
    with console.capture() as captured:
        console.print(table_of(cases, cold, warm, rate))
    console.print(captured.get())
    runs: list[dict[str, Any]] = [vars(case) for case in cases]
    runs += [{"cold_s": c, "warm_s": w} for c, w in zip(cold, warm, strict=True)]
    write_part("cluster", "affinity", figures=figures_of(cases, cold, warm), table=captured.get(), runs=runs)


if __name__ == "__main__":
    typer.run(main)
