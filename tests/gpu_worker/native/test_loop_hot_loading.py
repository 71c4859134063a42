"""A pool that changes while the engine serves: loads, forgetting, updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import pytest

from gpu_worker.errors import AdapterLoadFailed
from gpu_worker.front.prefetch_window import MIN_ROWS
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import (
    BASE_JOB,
    Alone,
    Answer,
    HeldExecutor,
    MakeEngine,
    Shapes,
    ask,
    assert_same,
    by_digest,
    greedy,
    only,
    run_together,
    steps,
)
from tests.tiny import plan_of, random_adapter


class Pool:
    """Returns weights by digest, counts calls, and can be switched off."""

    def __init__(self, *weights: AdapterWeights) -> None:
        self.weights = by_digest(*weights)
        self.fetched: Counter[str] = Counter()
        self.is_down = False

    def __call__(self, digest: str) -> AdapterWeights:
        self.fetched[digest] += 1
        if self.is_down:
            raise ConnectionError("the store is away")
        return self.weights[digest]


def test_resident_adapters_are_not_fetched_again(make_engine: MakeEngine, shapes: Shapes, alone: Alone) -> None:
    """The host cache keeps only the last adapter, and the store is switched off."""
    first, second, other = (random_adapter(shapes, i) for i in range(3))
    pool = Pool(first, second, other)
    engine = make_engine(pool, host_cache_bytes=0)
    run_together(engine, [greedy("x", only(weights)) for weights in (first, second)])
    pool.is_down = True
    both = greedy("both", plan_of("mixture", (first, 0.5), (second, 0.5)), "both")
    answer, failed = run_together(engine, [both, greedy("x", only(other), "other")])
    assert_same(answer, alone(both, pool.weights))
    assert isinstance(failed.error, AdapterLoadFailed)
    assert pool.fetched[first.weights_digest] == pool.fetched[second.weights_digest] == 1


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with another row that waits for its load"])
def test_an_adapter_evicted_while_a_request_waits_is_fetched_again(
    beside: bool, make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    evicted, wide, late = (random_adapter(shapes, i, rank=rank) for i, rank in enumerate((2, 8, 2)))
    pool, executor = Pool(evicted, wide, late), HeldExecutor()
    engine = make_engine(pool, executor=executor, bank_rank_rows=8, max_batch_size=1, host_cache_bytes=0)
    first = ask(engine, greedy("x", only(evicted)))
    executor.release()
    engine.run_until_idle()
    assert first.is_finished
    wide_job = greedy("wide", only(wide), "wide", num_new=2)
    plan = plan_of("mixture", (evicted, 0.5), (late, 0.5)) if beside else only(evicted)
    job = greedy("evicted", plan, "evicted")
    wide_answer, answer = ask(engine, wide_job), ask(engine, job)
    assert pool.fetched[evicted.weights_digest] == 1, "it is in the bank as the request comes"
    executor.release()
    while not wide_answer.is_finished:
        engine.step()
    assert not engine.step(), "the request waits for its fetch"
    executor.release()
    engine.run_until_idle()
    assert pool.fetched[evicted.weights_digest] == 2
    assert_same(wide_answer, alone(wide_job, pool.weights))
    assert_same(answer, alone(job, pool.weights))


def test_a_row_that_was_passed_over_reserves_nothing_while_its_weights_load(
    make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    resident, loading = (random_adapter(shapes, i) for i in range(2))
    pool, executor = Pool(resident, loading), HeldExecutor()
    engine = make_engine(pool, executor=executor)
    warm = ask(engine, greedy("x", only(resident)))
    executor.release()
    engine.run_until_idle()
    assert warm.is_finished
    stalled = ask(engine, greedy("y", only(loading), "stalled"))
    stalled.row.num_passes = 1000
    job = greedy("z", only(resident), "behind")
    behind = ask(engine, job)
    steps(engine, 20)
    assert_same(behind, alone(job, pool.weights))
    assert not stalled.is_finished
    executor.release()
    engine.run_until_idle()
    assert stalled.is_finished


def test_a_request_that_waits_for_its_load_keeps_weights_forgotten_meanwhile(
    make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    weights, executor = random_adapter(shapes, 1), HeldExecutor()
    engine = make_engine(by_digest(weights), executor=executor)
    empty = engine.status()
    job = greedy("loads", only(weights), "loads")
    answer = ask(engine, job)
    assert not engine.queue.forget([weights.weights_digest])
    executor.release()
    engine.run_until_idle()
    assert_same(answer, alone(job, by_digest(weights)))
    assert engine.status() == empty


def test_an_abandoned_load_is_forgotten_when_it_ends(make_engine: MakeEngine, shapes: Shapes) -> None:
    weights, executor = random_adapter(shapes, 1), HeldExecutor()
    engine = make_engine(by_digest(weights), executor=executor)
    answer = ask(engine, greedy("leaves", only(weights)))
    engine.cancel(answer.row)
    assert not engine.queue.forget([weights.weights_digest])
    executor.release()
    engine.step()  # a finished load wakes the engine
    assert engine.status().host_cache_bytes == 0
    assert engine.queue.forget([weights.weights_digest])


def end_by_cancel(engine: Engine, answer: Answer) -> None:
    engine.cancel(answer.row)


def end_by_failing_all(engine: Engine, answer: Answer) -> None:
    engine.fail_all(ConnectionError("it ends"))


@pytest.mark.parametrize("end", [end_by_cancel, end_by_failing_all])
@pytest.mark.parametrize("num_steps", [0, 3], ids=["waiting", "running"])
def test_forgotten_weights_are_dropped_however_the_last_request_ends(
    num_steps: int, end: Callable[[Engine, Answer], None], make_engine: MakeEngine, shapes: Shapes
) -> None:
    weights = random_adapter(shapes, 1)
    engine = make_engine(by_digest(weights))
    empty = engine.status()
    answer = ask(engine, greedy("x", only(weights), num_new=50))
    steps(engine, num_steps)
    assert not engine.queue.forget([weights.weights_digest])
    end(engine, answer)
    assert engine.status() == empty


def test_a_row_that_has_its_adapters_before_it_has_kv_disturbs_no_running_row(
    make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    """Products over all active rows read their number, which the row that waits for KV has changed."""
    old, running, waiting = (random_adapter(shapes, i) for i in range(3))
    pool = by_digest(old, running, waiting)
    engine = make_engine(pool, max_model_len=64, kv_tokens=96)
    run_together(engine, [greedy("x", only(old))])  # its rows are before those of the others
    jobs = [greedy("r" * 40, only(running), "running"), greedy("w" * 40, only(waiting), "waiting")]
    first = ask(engine, jobs[0])
    engine.step()
    second = ask(engine, jobs[1])
    engine.step()
    assert second.row.is_pinned and second.row not in engine.running
    assert engine.residency.active_rows == len(engine.residency.rows(running.weights_digest)) * 2
    engine.residency.pack()
    active = {digest for digest in pool if max(engine.residency.rows(digest)) < engine.residency.active_rows}
    assert active == {running.weights_digest, waiting.weights_digest}
    engine.run_until_idle()
    for job, answer in zip(jobs, (first, second), strict=True):
        assert_same(answer, alone(job, pool))


def test_rows_that_fail_give_their_part_of_the_window_to_a_row_before_them(
    make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    lost = [random_adapter(shapes, 10 + i, rank=1) for i in range(MIN_ROWS)]
    good, loads = random_adapter(shapes, 1), dict[str, Future[AdapterWeights]]()

    def fetch(digest: str) -> Future[AdapterWeights]:
        return loads.setdefault(digest, Future())

    engine = make_engine({}, fetch=fetch, host_cache_bytes=0, max_batch_size=MIN_ROWS)
    base = [ask(engine, replace(BASE_JOB, tenant=one.weights_digest)) for one in lost]
    failed = [
        ask(engine, replace(greedy("x", only(one), one.weights_digest), tenant=one.weights_digest)) for one in lost
    ]
    job = replace(greedy("good", only(good), "good"), tenant="one")
    answer = ask(engine, job)
    while not all(each.is_finished for each in base):
        engine.step()
    assert loads.keys() == {one.weights_digest for one in lost}, "they fill the window, and one more tenant is next"
    for load in loads.values():
        load.set_exception(ConnectionError("the store is away"))
    assert not engine.step()
    assert all(isinstance(each.error, AdapterLoadFailed) for each in failed)
    assert good.weights_digest in loads, "nothing else wakes the engine"
    loads[good.weights_digest].set_result(good)
    engine.run_until_idle()
    assert_same(answer, alone(job, by_digest(good)))
