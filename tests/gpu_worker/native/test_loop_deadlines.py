"""Requests past their deadline end at the next step, in any state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from gpu_worker.errors import DeadlineExceeded, WaitedTooLong
from gpu_worker.front.request.request import Delta
from gpu_worker.native.engine import NativeEngine
from lora_store.plan import BASE_PLAN
from tests.clocks import Clock
from tests.gpu_worker.engine_driver import (
    Alone,
    Gated,
    HeldExecutor,
    MakeEngine,
    Shapes,
    ask,
    assert_nothing_held,
    assert_same,
    by_digest,
    complete,
    greedy,
    run,
    stream_text,
)
from tests.tiny import plan_of, random_adapter


def test_a_running_request_ends_at_its_deadline_and_the_others_go_on(make_engine: MakeEngine, alone: Alone) -> None:
    clock = Clock(1000.0)
    engine = make_engine({}, clock=clock)
    late = ask(engine, replace(greedy("late", BASE_PLAN, "late", 100), time_left_s=10.0))
    staying_job = greedy("stays", BASE_PLAN, "stays", 12)
    staying = ask(engine, staying_job)
    for _ in range(4):
        engine.step()
    clock.at = 1009.9
    engine.step()
    assert late.error is None and len(engine.running) == 2
    clock.at = 1010.0
    engine.step()
    assert isinstance(late.error, DeadlineExceeded) and late.error.num_new_tokens == 5
    assert engine.running == [staying.row] and engine.kv_cache.num_free == engine.config.max_batch_size - 1
    engine.run_until_idle()
    assert_same(staying, alone(staying_job, {}))
    assert_nothing_held(engine)


@pytest.mark.parametrize("waits_for", ["a row", "its load"])
def test_a_waiting_request_ends_at_its_deadline(waits_for: str, make_engine: MakeEngine, shapes: Shapes) -> None:
    clock, weights, executor = Clock(1000.0), random_adapter(shapes, 1), HeldExecutor()
    engine = make_engine(by_digest(weights), clock=clock, executor=executor, max_batch_size=1)
    if waits_for == "a row":
        ask(engine, greedy("busy", BASE_PLAN, "busy", 100))
    plan = BASE_PLAN if waits_for == "a row" else plan_of("selection", (weights, 1.0))
    late = ask(engine, replace(greedy("late", plan, "late"), time_left_s=10.0))
    engine.step()
    assert engine.seconds_to_due == 10.0
    clock.at = 1011.0
    engine.step()
    assert isinstance(late.error, DeadlineExceeded) and late.error.num_new_tokens == 0
    assert late.row not in engine.waiting and not late.row.loads


def test_the_time_left_counts_from_the_arrival_of_the_job(make_engine: MakeEngine) -> None:
    engine = make_engine({}, clock=Clock(1000.0))
    job, sink = replace(greedy("x"), time_left_s=10.0), lambda event: None
    assert engine.prepare(job, sink).deadline == 1010.0
    assert engine.prepare(job, sink, arrived=995.0).deadline == 1005.0


def test_a_request_that_cannot_start_is_refused_in_time_and_one_that_runs_may_go_on(make_engine: MakeEngine) -> None:
    clock = Clock(1000.0)
    engine = make_engine({}, clock=clock, max_batch_size=1, max_wait_s=5.0)
    runs, waits = (ask(engine, greedy("x", BASE_PLAN, name, 20)) for name in ("runs", "waits"))
    engine.step()
    clock.at += 4.9
    engine.step()
    assert waits.events == []
    clock.at += 0.1
    engine.step()
    assert isinstance(waits.error, WaitedTooLong) and "5 s" in str(waits.error)
    assert engine.seconds_to_due is None
    clock.at += 100
    engine.run_until_idle()
    assert runs.is_finished
    assert_nothing_held(engine)


def test_every_delta_has_the_waiting_time_of_its_request(make_engine: MakeEngine) -> None:
    clock = Clock(1000.0)
    engine = make_engine({}, clock=clock, max_batch_size=1)
    first, second = (ask(engine, greedy("x", BASE_PLAN, name, 2)) for name in ("first", "second"))
    while not second.is_finished:
        clock.at += 1.5
        engine.step()
    assert {event.queued_s for event in first.events} == {1.5}
    assert {event.queued_s for event in second.events} == {4.5}


def test_a_distant_deadline_does_not_cause_a_long_sleep(make_engine: MakeEngine) -> None:
    engine = make_engine({}, clock=Clock(1000.0), max_batch_size=1, max_wait_s=1e300)
    ask(engine, replace(greedy("x"), time_left_s=1e300))
    assert engine.seconds_to_due == 3600.0
    engine.run_until_idle()


def test_an_idle_loop_wakes_for_a_deadline(
    make_engine: MakeEngine, shapes: Shapes, start: Callable[..., NativeEngine]
) -> None:
    """Nothing runs and no request arrives: this one waits for a load that never ends."""
    weights, executor = random_adapter(shapes, 1), HeldExecutor()
    native = start(make_engine(by_digest(weights), executor=executor, max_wait_s=0.05))

    async def main() -> None:
        await complete(native, greedy("x", plan_of("selection", (weights, 1.0))))

    with pytest.raises(WaitedTooLong):
        run(main())


def test_a_stream_ends_with_the_deadline_as_its_error(gated: Gated) -> None:
    clock = Clock(1000.0)
    _, gate, native = gated({}, clock=clock)

    async def main() -> None:
        found: list[Delta] = []
        gate.permits.release()
        try:
            async for delta in stream_text(native, replace(greedy("x", num_new=100), time_left_s=10.0)):
                found.append(delta)
                clock.at = 1010.0
                gate.open()
        finally:
            assert 1 <= len(found) <= 2

    with pytest.raises(DeadlineExceeded):
        run(main())
