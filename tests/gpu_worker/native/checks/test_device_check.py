"""A failing device: the number of steps before the engine ends, and when the count restarts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from gpu_worker.errors import EngineStopped, RequestFailed
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import (
    BASE_JOB,
    Alone,
    MakeEngine,
    ask,
    assert_nothing_held,
    assert_same,
    by_digest,
    greedy,
    run_together,
)
from tests.gpu_worker.faults import break_adapters, break_chunks, faults_of
from tests.tiny import plan_of


@pytest.mark.parametrize("breaks", [break_adapters, break_chunks])
def test_a_device_that_computes_single_tokens_only_ends_the_engine_after_three_requests(
    breaks: Callable[[Engine], None], make_engine: MakeEngine, pool: list[AdapterWeights]
) -> None:
    engine = make_engine(by_digest(*pool))
    breaks(engine)
    plan = plan_of("mixture", (pool[0], 0.5), (pool[1], 0.5))
    answers = []
    for number in range(3):
        answers.append(ask(engine, greedy("a prompt of many tokens", plan, number)))
        if number < 2:
            engine.run_until_idle()
    with pytest.raises(EngineStopped, match="the engine's own requests, after 3 consecutive failed steps"):
        engine.step()
    assert [type(answer.error) for answer in answers] == [RequestFailed, RequestFailed, EngineStopped]
    assert_nothing_held(engine)


def test_the_count_of_failed_steps_restarts_after_a_success(
    make_engine: MakeEngine, pool: list[AdapterWeights]
) -> None:
    engine = make_engine(by_digest(*pool))
    break_adapters(engine)
    for number in range(6):
        [bad] = run_together(engine, [greedy("adapted", plan_of("selection", (pool[0], 1.0)), number)])
        assert isinstance(bad.error, RequestFailed)
        if number % 2 == 1:
            [base] = run_together(engine, [replace(BASE_JOB, request_id=f"base-{number}")])
            assert base.is_finished


def test_a_device_that_computes_nothing_ends_the_engine_after_three_steps(make_engine: MakeEngine) -> None:
    engine = make_engine({}, max_batch_size=4)
    faults = faults_of(engine)
    faults.num_passes = 10**6
    answers = [ask(engine, greedy("x", request_id=number)) for number in range(16)]
    engine.step()
    engine.step()
    assert faults.num_seen <= 2 * (3 * 4 + 1)
    assert [type(answer.error) for answer in answers] == [EngineStopped] * 8 + [type(None)] * 8
    with pytest.raises(EngineStopped, match="3 consecutive steps"):
        engine.step()
    assert [type(answer.error) for answer in answers] == [EngineStopped] * 12 + [type(None)] * 4
    assert_nothing_held_but_waiting(engine)


def assert_nothing_held_but_waiting(engine: Engine) -> None:
    engine.fail_all(EngineStopped("over"))
    assert_nothing_held(engine)


def test_a_recovered_device_has_three_steps_again(make_engine: MakeEngine, alone: Alone) -> None:
    engine = make_engine({})
    faults = faults_of(engine)
    for number in range(6):
        if number % 2 == 0:
            faults.num_passes = 4  # two attempts, one with half the tokens, and the check of the device
        [answer] = run_together(engine, [replace(BASE_JOB, request_id=str(number))])
        if number % 2 == 0:
            assert isinstance(answer.error, EngineStopped)
        else:
            assert_same(answer, alone(BASE_JOB, {}))
