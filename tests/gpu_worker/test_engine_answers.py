"""Many jobs submitted at once, with whole answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from gpu_worker.errors import EngineStopped, PromptTooLong
from gpu_worker.front.request.request import Completion
from gpu_worker.native.engine import NativeEngine
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import Gated, MakeEngine, assert_nothing_held, by_digest, greedy, run, run_together
from tests.tiny import plan_of, random_adapter


def test_all_answers_equal_a_run_without_a_thread(
    make_engine: MakeEngine, shapes: Mapping[str, tuple[int, int]], start: Callable[..., NativeEngine]
) -> None:
    weights = random_adapter(shapes, 1)
    plans = [BASE_PLAN, plan_of("selection", (weights, 1.0))]
    jobs = [greedy(f"prompt {n}", plans[n % 2], n, num_new=3 + n) for n in range(12)]
    expected = run_together(make_engine(by_digest(weights)), jobs)
    engine = make_engine(by_digest(weights), max_batch_size=4)
    native = start(engine)
    found = run(native.generate(jobs))
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    assert [answer.num_new_tokens for answer in found] == [3 + n for n in range(12)]
    native.stop()
    assert_nothing_held(engine)


def test_an_invalid_job_is_an_error_at_its_position(
    make_engine: MakeEngine, start: Callable[..., NativeEngine]
) -> None:
    native = start(make_engine({}))
    before, error, after = run(native.generate([greedy("a"), greedy("x" * 500), greedy("b")]))
    assert isinstance(error, PromptTooLong)
    assert isinstance(before, Completion) and isinstance(after, Completion)


def test_a_stopped_engine_is_reported_at_once(make_engine: MakeEngine, start: Callable[..., NativeEngine]) -> None:
    native = start(make_engine({}))
    native.stop()
    with pytest.raises(EngineStopped):
        run(native.generate([greedy("a")]))


def test_leaving_cancels_unfinished_jobs(gated: Gated) -> None:
    engine, gate, native = gated({}, max_batch_size=2)

    async def main() -> Any:
        task = asyncio.create_task(native.generate([greedy("leaves", BASE_PLAN, n, num_new=100) for n in range(4)]))
        await asyncio.to_thread(gate.wait_for_step)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        return await native.generate([greedy("stays", num_new=4)])

    [answer] = run(main())
    assert answer.num_new_tokens == 4
    native.stop()
    assert engine.num_steps <= 2 + 4, "two steps may have begun before the cancel arrived"
    assert_nothing_held(engine)
