from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from deployments.calls.catalogue_clients import serve_retriever
from deployments.calls.worker_client import WorkerClient, serve_worker
from deployments.config.app import AppConfig
from deployments.observability.cluster_stats import KEPT_S, StatsReader
from gpu_worker.config import VllmSettings
from gpu_worker.errors import EngineStopped
from retriever_svc import PoolSize
from tests.deployments.app_fakes import config_of
from tests.deployments.console_fakes import HOLDINGS, CountingWorker
from tests.deployments.fake_publishing import workers_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.fakes import FakeHandle


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Behind(FakeRetriever):
    async def load(self, tenant: str) -> PoolSize:
        return PoolSize(5, 1)


def reader_of(
    *workers: CountingWorker,
    retrievers: tuple[FakeRetriever, ...] = (FakeRetriever(),),
    num_silent: int = 0,
    clock: FakeClock | None = None,
    **settings: Any,
) -> StatsReader:
    handle = FakeHandle(*workers, num_silent=num_silent)
    clients = serve_retriever(FakeHandle(*retrievers)), serve_worker(handle)
    return reader_over(*clients, config_of(**settings), clock)


def reader_over(
    retriever: Any, worker: WorkerClient, config: AppConfig | None = None, clock: FakeClock | None = None
) -> StatsReader:
    config = config or config_of()
    return StatsReader(config, retriever, workers_of(worker), clock or FakeClock())


def test_stats_are_sums_over_the_workers() -> None:
    other = replace(HOLDINGS, num_running=1, occupied_rows=4, resident=frozenset({"c"}))
    workers = asyncio.run(reader_of(CountingWorker(), CountingWorker(holdings=other)).read("local"))["workers"]
    assert (workers["num_running"], workers["max_running"], workers["num_waiting"]) == (4, 64, 4)
    assert (workers["bank_rows_occupied"], workers["bank_rows"], workers["bank_adapters"]) == (20, 512, 3)
    assert (workers["host_cache_bytes"], workers["host_cache_max_bytes"]) == (10_000_000, 2 << 30)
    assert (workers["bank_hits"], workers["host_hits"], workers["fetches"]) == (12, 6, 2)
    assert (workers["requests"], workers["prompt_tokens"], workers["new_tokens"]) == (20, 100, 800)
    assert (workers["preemptions"], workers["kv_tokens_free"]) == (4, 118_000)
    assert (workers["cached_prompt_tokens"], workers["prefix_cache_tokens"]) == (64, 640)
    assert workers["replicas"] == {"answered": 2, "silent": 0}


def test_rows_for_fusions_are_rows_of_the_bank() -> None:
    reader = reader_of(CountingWorker(), worker=VllmSettings(fusion_rank_rows=44))
    assert asyncio.run(reader.read("local"))["workers"]["bank_rows"] == 256 + 44


@pytest.mark.parametrize(("min_replicas", "num_silent"), [(0, 0), (1, 1)])
def test_workers_scaled_to_zero_do_not_count_as_missing(min_replicas: int, num_silent: int) -> None:
    reader = reader_of(worker_scaling={"autoscaling_config": {"min_replicas": min_replicas}})
    workers = asyncio.run(reader.read("local"))["workers"]
    assert (workers["num_running"], workers["replicas"]) == (0, {"answered": 0, "silent": num_silent})


def test_a_worker_that_fails_is_counted_and_left_out() -> None:
    broken = CountingWorker(holdings=EngineStopped("it stopped"))
    workers = asyncio.run(reader_of(CountingWorker(), broken).read("local"))["workers"]
    assert (workers["num_running"], workers["replicas"]) == (3, {"answered": 1, "silent": 1})


def test_workers_that_do_not_answer_in_time_do_not_affect_the_pools_stats() -> None:
    stats = asyncio.run(reader_of(CountingWorker(), num_silent=1).read("local"))
    assert stats["workers"]["replicas"] == {"answered": 0, "silent": 1}
    assert stats["pool"]["num_adapters"] == 2


def test_the_pool_has_the_newest_generation_and_names_the_oldest() -> None:
    pool = asyncio.run(reader_of(CountingWorker(), retrievers=(Behind(), FakeRetriever())).read("local"))["pool"]
    assert (pool["generation"], pool["oldest_generation"], pool["num_adapters"]) == (7, 5, 2)


def test_the_pool_is_the_caller_s() -> None:
    handle = FakeHandle(FakeRetriever())
    worker = serve_worker(FakeHandle(CountingWorker()))
    asyncio.run(reader_over(serve_retriever(handle), worker).read("them"))
    assert handle.called("load") == [("them",)]


@pytest.mark.parametrize(("passed_s", "num_asked"), [(0.0, 1), (KEPT_S * 0.9, 1), (KEPT_S * 1.1, 2)])
def test_a_worker_is_read_at_intervals_for_any_number_of_readers(passed_s: float, num_asked: int) -> None:
    worker, clock = CountingWorker(), FakeClock()

    async def look() -> None:
        reader = reader_of(worker, clock=clock)
        await asyncio.gather(*[reader.read("local") for _ in range(20)])
        clock.now_s += passed_s
        await reader.read("local")

    asyncio.run(look())
    assert worker.num_asked == num_asked


def test_a_reader_that_leaves_does_not_end_the_others_reading() -> None:
    async def look() -> int:
        reader = reader_of(CountingWorker())
        leaves = asyncio.create_task(reader.read("local"))
        stays = asyncio.create_task(reader.read("local"))
        await asyncio.sleep(0)
        leaves.cancel()
        running: int = (await stays)["workers"]["num_running"]
        return running

    assert asyncio.run(look()) == 3
