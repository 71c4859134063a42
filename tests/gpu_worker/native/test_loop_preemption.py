"""A KV budget smaller than the rows' needs: which rows are preempted, and that no answer differs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_worker.errors import DeadlineExceeded, EngineStopped
from gpu_worker.front.request.request import Delta, Job, SamplingParams
from gpu_worker.native.loop import Engine
from lora_store.plan import BASE_PLAN, Plan
from tests.clocks import Clock
from tests.gpu_worker.engine_driver import (
    Alone,
    MakeEngine,
    Shapes,
    ask,
    assert_nothing_held,
    assert_same,
    by_digest,
    greedy,
    run_together,
)
from tests.tiny import plan_of, random_adapter

PAGE, MAX_LEN = 16, 160


def job_of(num_prompt_tokens: int, num_new: int, name: object = 0, plan: Plan = BASE_PLAN, **changes: object) -> Job:
    """Return a job. Each byte is one token, and a begin token is added."""
    text = ("abcdefgh" * MAX_LEN)[int(str(name)) % 8 :][: num_prompt_tokens - 1]
    return replace(greedy(text, plan, name, num_new), **changes)  # type: ignore[arg-type]


def until_preempted(engine: Engine, *, at_most: int = 400) -> None:
    for _ in range(at_most):
        if engine.counters.num_preemptions:
            return
        engine.step()
    raise AssertionError("no row was preempted")


def test_preempted_rows_give_the_same_answers_as_alone(make_engine: MakeEngine, shapes: Shapes, alone: Alone) -> None:
    pool = [random_adapter(shapes, seed) for seed in range(3)]
    adapters = by_digest(*pool)
    plans = [BASE_PLAN, plan_of("selection", (pool[0], 1.0)), plan_of("mixture", (pool[1], 0.5), (pool[2], 0.5))]
    jobs = [job_of(8 + 6 * i, 50 - 3 * i, i, plans[i % 3]) for i in range(6)]
    engine = make_engine(adapters, kv_tokens=96, max_model_len=96)
    answers = run_together(engine, jobs)
    assert engine.counters.num_preemptions > 2
    for job, answer in zip(jobs, answers, strict=True):
        assert_same(answer, alone(job, adapters))
    assert_nothing_held(engine)


def test_seeds_penalties_and_log_probabilities_of_both_parts_continue_after_preemption(make_engine: MakeEngine) -> None:
    params = {"max_tokens": 40, "temperature": 1.0, "frequency_penalty": 0.5, "ignore_eos": True}
    scored = [SamplingParams(seed=i, logprobs=2, prompt_logprobs=2, **params) for i in range(3)]  # type: ignore[arg-type]
    jobs = [job_of(20, 1, i, sampling=sampling) for i, sampling in enumerate(scored)]
    tight, ample = make_engine({}, kv_tokens=MAX_LEN), make_engine({})
    for answer, other in zip(run_together(tight, jobs), run_together(ample, jobs), strict=True):
        assert_same(answer, other)
        found, expected = ([event for event in each.events if isinstance(event, Delta)] for each in (answer, other))
        tokens = [[entry.token for event in events for entry in event.logprobs] for events in (found, expected)]
        assert tokens[0] == tokens[1] and len(tokens[0]) == 40
        prompt, known = ([entry for event in events for entry in event.prompt] for events in (found, expected))
        assert [entry.token_id for entry in prompt] == answer.row.tokens[: answer.row.num_prompt_tokens]
        assert [entry.logprob for entry in prompt[1:]] == pytest.approx([e.logprob for e in known[1:]], abs=1e-4)
    assert tight.counters.num_preemptions > 0 == ample.counters.num_preemptions


def test_the_row_that_joined_last_is_preempted_and_resumes_first(make_engine: MakeEngine) -> None:
    engine = make_engine({}, kv_tokens=MAX_LEN)
    old, young = (ask(engine, job_of(50, 60, i)) for i in range(2))
    engine.step()
    waiting = [ask(engine, job_of(70, 5, i, tenant=tenant)) for i, tenant in [(2, "local"), (3, "other")]]
    until_preempted(engine)
    assert engine.running == [old.row]
    assert list(engine.waiting) == [young.row, *[answer.row for answer in waiting]]
    num_reported = young.row.num_new_tokens
    assert num_reported > 0 and young.row.num_computed == 0, "text already sent stays"
    while len(engine.waiting) > 2:
        engine.step()
    assert old.is_finished and young.row in engine.running, "before those that came after it"
    engine.run_until_idle()
    assert all(answer.is_finished for answer in (young, *waiting))


@pytest.mark.parametrize("num_prompt_tokens", [1, PAGE, 3 * PAGE - 1])
def test_one_row_always_reaches_its_maximum_length(num_prompt_tokens: int, make_engine: MakeEngine) -> None:
    max_len = 3 * PAGE
    engine = make_engine({}, kv_tokens=max_len, max_model_len=max_len)
    longest = [ask(engine, job_of(num_prompt_tokens, max_len - num_prompt_tokens, i)) for i in range(4)]
    short = [ask(engine, job_of(3, 2, i)) for i in range(4)]
    engine.run_until_idle()
    assert all(len(answer.row.tokens) == max_len for answer in longest)
    assert all(answer.is_finished for answer in short)
    assert_nothing_held(engine)


def test_a_prompt_that_does_not_fit_yet_is_not_overtaken(make_engine: MakeEngine) -> None:
    engine = make_engine({}, kv_tokens=MAX_LEN)
    first = ask(engine, job_of(100, 20, 0))
    engine.step()
    long, short = ask(engine, job_of(90, 2, 1)), ask(engine, job_of(3, 2, 2, tenant="other"))
    while not long.row.num_new_tokens:
        engine.step()
        assert not short.row.num_new_tokens or long.row in engine.running
    assert first.is_finished
    engine.run_until_idle()
    assert short.is_finished


def test_rows_join_while_every_running_row_can_grow_by_one_page(make_engine: MakeEngine) -> None:
    """Ten pages: with three growing rows of one page, a fourth row of 80 tokens must wait and one of 64 must not."""
    engine = make_engine({}, kv_tokens=MAX_LEN)
    growing = [ask(engine, job_of(8, 60, i)) for i in range(3)]
    engine.step()
    fits = ask(engine, job_of(64, 4, 4))
    engine.step()
    assert fits.row in engine.running
    engine.cancel(fits.row)
    too_long = ask(engine, job_of(80, 4, 5))
    engine.step()
    assert too_long.row in engine.waiting
    engine.run_until_idle()
    assert all(answer.is_finished for answer in (*growing, too_long))


def test_a_preempted_row_is_not_refused_for_waiting_too_long(make_engine: MakeEngine) -> None:
    clock = Clock(1000.0)
    engine = make_engine({}, kv_tokens=MAX_LEN, clock=clock, max_wait_s=5.0)
    answers = [ask(engine, job_of(50, 60, i)) for i in range(2)]
    until_preempted(engine)
    clock.at += 100
    engine.run_until_idle()
    assert all(answer.is_finished for answer in answers)


def test_a_preempted_row_ends_at_its_deadline(make_engine: MakeEngine, shapes: Shapes) -> None:
    clock, weights = Clock(1000.0), random_adapter(shapes, 1)
    engine = make_engine(by_digest(weights), kv_tokens=MAX_LEN, clock=clock)
    ask(engine, job_of(50, 60, 0))
    late = ask(engine, job_of(50, 60, 1, plan_of("selection", (weights, 1.0)), time_left_s=10.0))
    until_preempted(engine)
    clock.at = 1010.0
    engine.step()
    assert isinstance(late.error, DeadlineExceeded) and late.error.num_new_tokens == late.row.num_new_tokens > 0
    engine.run_until_idle()
    assert_nothing_held(engine)


@pytest.mark.parametrize("end", ["cancel", "fail_all"])
def test_a_preempted_row_keeps_its_adapters_until_it_ends(end: str, make_engine: MakeEngine, shapes: Shapes) -> None:
    weights, other = random_adapter(shapes, 1), random_adapter(shapes, 2)
    engine = make_engine(by_digest(weights, other), kv_tokens=MAX_LEN, bank_rank_rows=8)
    ask(engine, job_of(50, 60, 0, plan_of("selection", (other, 1.0))))
    waits = ask(engine, job_of(50, 60, 1, plan_of("selection", (weights, 1.0))))
    until_preempted(engine)
    assert waits.row in engine.waiting and waits.row.is_pinned
    assert not engine.queue.forget([weights.weights_digest])
    assert engine.residency.num_pins == 2 and weights.weights_digest in engine.residency
    if end == "cancel":
        engine.cancel(waits.row)
        assert engine.residency.num_pins == 1 and engine.residency.active_rows == 4
        engine.run_until_idle()
    else:
        engine.fail_all(EngineStopped("over"))
        assert isinstance(waits.error, EngineStopped)
    assert engine.queue.forget([weights.weights_digest])
    assert_nothing_held(engine)


def test_rows_waiting_for_the_bank_and_for_kv_do_not_block_each_other(make_engine: MakeEngine, shapes: Shapes) -> None:
    """The wide plan has reserved the bank; the preempted row keeps part of the bank and resumes."""
    wide, narrow = random_adapter(shapes, 1, rank=8), random_adapter(shapes, 2, rank=4)
    engine = make_engine(by_digest(wide, narrow), kv_tokens=MAX_LEN, bank_rank_rows=8)
    rows = [ask(engine, job_of(50, 60, i, plan_of("selection", (narrow, 1.0)))) for i in range(2)]
    engine.step()
    reserving = ask(engine, job_of(30, 5, 3, plan_of("selection", (wide, 1.0))))
    reserving.row.num_passes = 50
    until_preempted(engine)
    assert rows[1].row in engine.waiting
    for _ in range(300):
        engine.step()
    assert all(answer.is_finished for answer in (*rows, reserving))
    assert_nothing_held(engine)


def test_a_row_with_its_adapters_in_the_bank_waits_for_kv_and_is_refused_in_time(
    make_engine: MakeEngine, shapes: Shapes
) -> None:
    clock, weights = Clock(1000.0), random_adapter(shapes, 1)
    engine = make_engine(by_digest(weights), kv_tokens=MAX_LEN, clock=clock, max_wait_s=5.0)
    ask(engine, job_of(100, 60, 0))
    engine.step()
    waits = ask(engine, job_of(90, 2, 1, plan_of("selection", (weights, 1.0))))
    engine.step()
    clock.at += 5
    engine.step()
    assert waits.error is not None and not waits.row.is_pinned
    engine.run_until_idle()
    assert_nothing_held(engine)
