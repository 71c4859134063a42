"""Concurrent requests in one engine: none changes, damages or ends another."""

from __future__ import annotations

import pytest

from gpu_worker.errors import (
    AdapterUnfit,
    LogitsNotFinite,
)
from gpu_worker.front.request.request import Delta
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import (
    BASE_JOB,
    Alone,
    BrokenSink,
    MakeEngine,
    Shapes,
    ask,
    assert_nothing_held,
    assert_same,
    by_digest,
    greedy,
    run_together,
)
from tests.gpu_worker.faults import hostile_adapter
from tests.tiny import plan_of, random_adapter


@pytest.mark.parametrize("kind", ["first product", "second product", "folded scaling"])
@pytest.mark.parametrize("strategy", ["selection", "mixture", "fusion"])
@pytest.mark.parametrize("lora_products", ["auto", "torch"])
def test_a_hostile_adapter_fails_only_its_own_request(
    kind: str, strategy: str, lora_products: str, make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    hostile, good, other = hostile_adapter(shapes, kind), *(random_adapter(shapes, i, rank=3) for i in (1, 2))
    adapters = by_digest(hostile, good, other)
    parts = [(hostile, 1.0)] if strategy == "selection" else [(good, 0.5), (hostile, 0.5)]
    neighbours = [
        greedy("one neighbour", plan_of("selection", (good, 1.0)), 1),
        greedy("another " * 8, plan_of("fusion", (good, 0.5), (other, 0.5)), 2),
        greedy("a third", plan_of("mixture", (other, 0.5), (good, 0.5)), 3),
        BASE_JOB,
    ]
    engine = make_engine(adapters, lora_products=lora_products)
    bad_job = greedy("x", plan_of(strategy, *parts), "bad")  # type: ignore[arg-type]
    bad, *others = run_together(engine, [bad_job, *neighbours])
    assert isinstance(bad.error, LogitsNotFinite | AdapterUnfit)
    for job, answer in zip(neighbours, others, strict=True):
        assert_same(answer, alone(job, adapters))
    assert_nothing_held(engine)


def test_the_rows_of_a_hostile_adapter_are_clean_for_their_next_owner(
    make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    hostile, good = hostile_adapter(shapes, "second product"), random_adapter(shapes, 1, rank=3)
    adapters = by_digest(hostile, good)
    engine = make_engine(adapters, bank_rank_rows=4, max_batch_size=1)
    bad_job = greedy("a long prompt that fills its row " * 3, plan_of("selection", (hostile, 1.0)), 0)
    next_job = greedy("next", plan_of("selection", (good, 1.0)), 1)
    bad, after = run_together(engine, [bad_job, next_job])
    assert isinstance(bad.error, LogitsNotFinite)
    assert bad.row.kv_row == after.row.kv_row
    assert engine.residency.resident == {good.weights_digest}
    assert_same(after, alone(next_job, adapters))


def test_a_sink_that_raises_ends_only_its_own_request(make_engine: MakeEngine, alone: Alone) -> None:
    def broken(event: Delta | Exception) -> None:
        raise BrokenSink("the client's event loop is closed")

    engine = make_engine({})
    engine.submit(engine.prepare(greedy("gone", BASE_PLAN, "gone"), broken))
    base = ask(engine, BASE_JOB)
    engine.run_until_idle()
    assert_same(base, alone(BASE_JOB, {}))
    assert_nothing_held(engine)
