"""Concurrent requests in one engine: none changes, damages or ends another."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from gpu_worker.errors import (
    AdapterUnfit,
    GpuWorkerError,
    LogitsNotFinite,
)
from gpu_worker.front.request.request import Delta, Job, SamplingParams
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN, Plan
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


def random_plan(pool: list[AdapterWeights], bank_rows: int, random_of: random.Random) -> Plan:
    chosen = random_of.sample(pool, random_of.choice([0, 1, 1, 2, 3]))
    while sum(weights.max_rank for weights in chosen) > bank_rows:
        chosen.pop()
    if not chosen:
        return BASE_PLAN
    strategy = "selection" if len(chosen) == 1 else random_of.choice(["mixture", "fusion"])
    return plan_of(strategy, *[(weights, random_of.uniform(-1, 1.5)) for weights in chosen])  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_that_join_and_leave_at_random_equal_their_runs_alone(
    seed: int, make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    """Ten adapters, a bank for three or four, three KV rows, prompts in chunks, some cancelled requests."""
    random_of, bank_rows = random.Random(seed), 12
    pool = [
        random_adapter(shapes, i, rank=1 + i % 6, modules=lambda name, i=i: i % 3 > 0 or "self_attn" in name)
        for i in range(10)
    ]
    adapters = by_digest(*pool)
    engine = make_engine(adapters, bank_rank_rows=bank_rows, max_batch_size=3, max_step_tokens=24)
    jobs = [
        greedy(
            "".join(random_of.choices("abc def\n", k=random_of.randint(1, 60))),
            random_plan(pool, bank_rows, random_of),
            i,
            num_new=random_of.randint(1, 12),
        )
        for i in range(16)
    ]
    to_come, answers, cancelled = list(jobs), [], set()
    while to_come or engine.has_work:
        for _ in range(random_of.choice([0, 0, 1, 2])):
            if to_come:
                answers.append((to_come[0], ask(engine, to_come.pop(0))))
        if answers and random_of.random() < 0.05:
            job, answer = random_of.choice(answers)
            if not answer.is_finished:
                engine.cancel(answer.row)
                cancelled.add(job.request_id)
        engine.step()
    assert_nothing_held(engine)
    assert len(cancelled) < len(jobs) / 2
    for job, answer in answers:
        if job.request_id not in cancelled:
            assert_same(answer, alone(job, adapters))


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


@pytest.mark.parametrize("token_id", [-301, 10**6, 300, 299])
def test_a_nonexistent_stop_token_does_not_affect_other_requests(
    token_id: int, make_engine: MakeEngine, alone: Alone
) -> None:
    engine = make_engine({})
    with suppress(GpuWorkerError):  # it may be refused or ignored
        params = SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=(token_id,))
        ask(engine, Job("odd", "x", sampling=params))
    base = ask(engine, BASE_JOB)
    engine.run_until_idle()
    assert_same(base, alone(BASE_JOB, {}))
