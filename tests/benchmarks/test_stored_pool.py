"""The benchmarks' path from a store on disk into an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.engine_cases import RANK
from benchmarks.stored_pool import StoredPool
from gpu_worker.front.request.request import Job, SamplingParams
from tests.gpu_worker.engine_driver import run_together


def test_published_adapters_are_fetched_into_the_engine(tiny_folders: Mapping[str, Path]) -> None:
    with StoredPool(base_model=str(tiny_folders["gemma3"]), num_threads=1) as pool:
        pool.publish(2)
        plan = pool.plan("mixture", 0, 1)
        job = Job("1", "The sea", plan, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        for load in pool.engine.queue.load([adapter.weights_digest for adapter in plan.adapters]):
            load.result(120)
        [answer] = run_together(pool.engine, [job])
        assert answer.is_finished and answer.error is None
        assert pool.engine.residency.resident == {adapter.weights_digest for adapter in plan.adapters}
        assert pool.engine.residency.occupied_rows == 2 * RANK
