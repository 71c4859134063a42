from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from deployments.calls.catalogue_clients import serve_retriever
from deployments.calls.worker_client import serve_worker
from deployments.observability.cluster_stats import KEPT_S, StatsReader
from gpu_worker.config import VllmSettings
from gpu_worker.errors import EngineStopped
from retriever_svc import PoolSize
from tests.clocks import Clock
from tests.deployments.app_fakes import config_of
from tests.deployments.console_fakes import HOLDINGS, CountingWorker
from tests.deployments.fake_publishing import workers_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.fakes import FakeHandle


class Behind(FakeRetriever):
    """Is behind, and its pool is that of one tenant."""

    async def load(self, tenant: str) -> PoolSize:
        assert tenant == "them"
        return PoolSize(5, 1)


def test_the_pool_is_the_callers_with_the_newest_generation_and_names_the_oldest() -> None:
    pool = asyncio.run(reader_of(CountingWorker(), retrievers=(Behind(), FakeRetriever())).read("them"))["pool"]
    assert (pool["generation"], pool["oldest_generation"], pool["num_adapters"]) == (7, 5, 2)


def reader_of(
    *workers: CountingWorker,
    retrievers: tuple[FakeRetriever, ...] = (FakeRetriever(),),
    num_silent: int = 0,
    clock: Clock | None = None,
    **settings: Any,
) -> StatsReader:
    worker = serve_worker(FakeHandle(*workers, num_silent=num_silent))
    retriever = serve_retriever(FakeHandle(*retrievers))
    return StatsReader(config_of(**settings), retriever, workers_of(worker), clock or Clock())


BROKEN = CountingWorker(holdings=EngineStopped("it stopped"))


@pytest.mark.parametrize(
    ("workers", "num_silent", "min_replicas", "expected"),
    [
        ([], 0, 0, (0, 0, 0)),
        ([], 0, 1, (0, 0, 1)),
        ([CountingWorker(), BROKEN], 0, 1, (3, 1, 1)),
        ([CountingWorker()], 1, 1, (0, 0, 1)),
    ],
    ids=["scaled to zero", "missing", "one fails", "one is silent"],
)
def test_missing_workers_are_counted_and_do_not_affect_the_pools_stats(
    workers: list[CountingWorker], num_silent: int, min_replicas: int, expected: tuple[int, int, int]
) -> None:
    scaling = {"autoscaling_config": {"min_replicas": min_replicas}}
    stats = asyncio.run(reader_of(*workers, num_silent=num_silent, worker_scaling=scaling).read("local"))
    found = stats["workers"]["replicas"]
    assert (stats["workers"]["num_running"], found["answered"], found["silent"]) == expected
    assert stats["pool"]["num_adapters"] == 2


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
    fusing = reader_of(CountingWorker(), worker=VllmSettings(fusion_rank_rows=44))
    assert asyncio.run(fusing.read("local"))["workers"]["bank_rows"] == 256 + 44


async def test_a_worker_is_read_at_intervals_for_any_number_of_readers() -> None:
    worker, clock = CountingWorker(), Clock()
    reader = reader_of(worker, clock=clock)
    for passed_s, num_asked in ((0.0, 1), (KEPT_S * 0.9, 1), (KEPT_S * 0.2, 2)):
        clock.at += passed_s
        found = await asyncio.gather(*[reader.read("local") for _ in range(20)])
        assert {stats["workers"]["num_running"] for stats in found} == {3}
        assert worker.num_asked == num_asked
