"""The engine's submissions, refusals, loads, cancellations and deliveries, and a pool that changes while it serves.

Requests past their deadline end at the next step, in any state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gpu_worker.errors import AdapterLoadFailed, DeadlineExceeded, LogitsNotFinite, WaitedTooLong
from gpu_worker.front.request.request import Delta, Job, SamplingParams
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN
from tests.clocks import Clock
from tests.gpu_worker.engine_driver import (
    BASE_JOB,
    Alone,
    Answer,
    HeldExecutor,
    MakeEngine,
    Shapes,
    Start,
    ask,
    assert_nothing_held,
    assert_same,
    by_digest,
    complete,
    greedy,
    only,
    run,
    run_together,
    steps,
)
from tests.tiny import plan_of, random_adapter


def test_weights_under_another_digest_fail_their_request(make_engine: MakeEngine, shapes: Shapes) -> None:
    wanted, other = random_adapter(shapes, 1), random_adapter(shapes, 2)
    engine = make_engine({wanted.weights_digest: other})
    bad, base = run_together(engine, [greedy("x", plan_of("selection", (wanted, 1.0)), "bad"), BASE_JOB])
    assert isinstance(bad.error, AdapterLoadFailed)
    assert base.is_finished
    assert_nothing_held(engine)


def test_a_prompt_whose_logits_are_not_finite_fails_its_own_row_only(make_engine: MakeEngine) -> None:
    engine = make_engine({})

    def spoil(module: torch.nn.Module, inputs: object, logits: Tensor) -> Tensor:
        return torch.cat([logits[:, :2], torch.full_like(logits[:, 2:], torch.nan)], dim=1)  # of the prompt's tokens

    engine.base.model.get_output_embeddings().register_forward_hook(spoil)
    scored = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, prompt_logprobs=1)
    bad, good = run_together(engine, [Job("bad", "scored", sampling=scored), greedy("good")])
    assert isinstance(bad.error, LogitsNotFinite)
    assert len(good.tokens) == 8
    assert_nothing_held(engine)


def test_a_preempted_row_keeps_the_scores_of_its_prompt(make_engine: MakeEngine) -> None:
    scored = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, prompt_logprobs=2)
    jobs = [Job(str(number), f"{number} " * 20, sampling=scored) for number in range(4)]
    tight, ample = make_engine({}, kv_tokens=160), make_engine({})
    found, expected = run_together(tight, jobs), run_together(ample, jobs)
    assert tight.counters.num_preemptions > 0 == ample.counters.num_preemptions
    for answer, other in zip(found, expected, strict=True):
        [prompt, known] = [
            [entry for event in each.events if isinstance(event, Delta) for entry in event.prompt]
            for each in (answer, other)
        ]
        assert [entry.token_id for entry in prompt] == answer.row.tokens[: answer.row.num_prompt_tokens]
        assert [entry.logprob for entry in prompt[1:]] == pytest.approx([e.logprob for e in known[1:]], abs=1e-4)


def test_a_cancelled_request_frees_its_row_and_pins_and_the_others_go_on_unchanged(
    make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    pool = [random_adapter(shapes, i) for i in range(2)]
    adapters = by_digest(*pool)
    engine = make_engine(adapters, max_batch_size=2)
    leaving = ask(engine, greedy("leaves", plan_of("selection", (pool[0], 1.0)), "leaves", num_new=50))
    staying_job = greedy("stays", plan_of("selection", (pool[1], 1.0)), "stays", num_new=20)
    staying = ask(engine, staying_job)
    queued_job = greedy("queued", BASE_PLAN, "queued")
    queued = ask(engine, queued_job)
    for _ in range(5):
        engine.step()
    assert (engine.kv_cache.num_free, engine.residency.num_pins, len(engine.waiting)) == (0, 2, 1)
    num_events = len(leaving.events)
    engine.cancel(leaving.row)
    assert (engine.kv_cache.num_free, engine.residency.num_pins) == (1, 1)
    engine.run_until_idle()
    assert len(leaving.events) == num_events, "a cancelled request gets no more events"
    assert queued.row.kv_row == leaving.row.kv_row
    assert_same(staying, alone(staying_job, adapters))
    assert_same(queued, alone(queued_job, adapters))
    assert_nothing_held(engine)


def test_cancelling_a_waiting_request_frees_its_place_even_while_it_loads(
    make_engine: MakeEngine, shapes: Shapes
) -> None:
    good, executor = random_adapter(shapes, 1), HeldExecutor()
    engine = make_engine(by_digest(good), executor=executor, max_waiting=1)
    loading = ask(engine, greedy("x", plan_of("selection", (good, 1.0)), "loading"))
    engine.step()
    engine.cancel(loading.row)
    assert not engine.has_work
    base = ask(engine, BASE_JOB)
    executor.release()
    engine.run_until_idle()
    assert base.is_finished and loading.events == []
    assert_nothing_held(engine)


def test_cancelling_an_unknown_or_ended_request_does_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine({})
    [answer] = run_together(engine, [BASE_JOB])
    engine.cancel(answer.row)
    engine.cancel(engine.prepare(BASE_JOB, lambda event: None))
    assert answer.is_finished
    assert_nothing_held(engine)


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


def test_a_distant_deadline_does_not_cause_a_long_sleep(make_engine: MakeEngine) -> None:
    engine = make_engine({}, clock=Clock(1000.0), max_batch_size=1, max_wait_s=1e300)
    ask(engine, replace(greedy("x"), time_left_s=1e300))
    assert engine.seconds_to_due == 3600.0
    engine.run_until_idle()


def test_an_idle_loop_wakes_for_a_deadline(make_engine: MakeEngine, shapes: Shapes, start: Start) -> None:
    """Nothing runs and no request arrives: this one waits for a load that never ends."""
    weights, executor = random_adapter(shapes, 1), HeldExecutor()
    native = start(make_engine(by_digest(weights), executor=executor, max_wait_s=0.05))

    async def main() -> None:
        await complete(native, greedy("x", plan_of("selection", (weights, 1.0))))

    with pytest.raises(WaitedTooLong):
        run(main())


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
