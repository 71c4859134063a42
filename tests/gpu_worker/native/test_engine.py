"""The engine on its own thread, with asyncio callers.

Commands that run on the engine's thread between two steps: forgetting weights and reading the state.

Clients that leave, and the end of the engine's thread.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from gpu_worker.errors import EngineStopped
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Completion, Delta, Job, SamplingParams
from gpu_worker.native.engine import NativeEngine
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.engine_driver import (
    PATIENCE_S,
    Gate,
    Gated,
    MakeEngine,
    Shapes,
    by_digest,
    complete,
    greedy,
    run,
    run_together,
    stream_text,
)
from tests.tiny import plan_of, random_adapter


async def collect(stream: AsyncIterator[Delta]) -> list[Delta]:
    return [delta async for delta in stream]


def jobs_over(pool: list[AdapterWeights], count: int) -> list[Job]:
    plans: list[Plan] = [BASE_PLAN, *(plan_of("selection", (weights, 1.0)) for weights in pool)]
    plans.append(plan_of("mixture", *[(weights, 0.5) for weights in pool]))
    params = SamplingParams(max_tokens=10, seed=5, temperature=0.8)
    return [Job(str(i), f"prompt {i}", plans[i % len(plans)], params) for i in range(count)]


@pytest.mark.parametrize("stream_interval_ms", [0.0, 1000.0])
async def test_streams_join_to_the_text_of_a_run_without_a_thread(
    stream_interval_ms: float, make_engine: MakeEngine, shapes: Shapes, start: Callable[..., NativeEngine]
) -> None:
    pool = [random_adapter(shapes, i) for i in range(2)]
    jobs = jobs_over(pool, 4)
    expected = [answer.text for answer in run_together(make_engine(by_digest(*pool)), jobs)]
    native = start(make_engine(by_digest(*pool)), stream_interval_ms=stream_interval_ms)
    streams = await asyncio.gather(*(collect(stream_text(native, job)) for job in jobs))
    assert ["".join(delta.text for delta in deltas) for deltas in streams] == expected
    for deltas in streams:
        assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]


async def test_the_first_piece_comes_before_the_answer_is_complete(gated: Gated) -> None:
    _, gate, native = gated({})
    async with aclosing(stream_text(native, greedy("first", num_new=5))) as stream:
        gate.permits.release()
        first = await anext(stream)
        assert first.num_new_tokens == 1 and first.finish_reason is None
        gate.open()
        assert (await collect(stream))[-1].num_new_tokens == 5


def test_a_client_whose_event_loop_is_gone_does_not_end_the_engine(gated: Gated) -> None:
    _, gate, native = gated({})

    async def begin() -> None:
        gate.permits.release()
        stream = stream_text(
            native, greedy("gone", BASE_PLAN, "gone", num_new=50)
        )  # keep a reference: a collected iterator cancels
        await anext(stream)
        await asyncio.to_thread(gate.wait_for_step)
        await asyncio.to_thread(gate.wait_for_step)  # the second step is in progress

    run(begin())  # the event loop is closed
    gate.open()
    completion, _ = run(complete(native, greedy("stays", BASE_PLAN, "stays")))
    assert completion.num_new_tokens == 8


async def test_two_requests_of_one_id_do_not_cancel_each_other(
    make_engine: MakeEngine, start: Callable[..., NativeEngine]
) -> None:
    native = start(make_engine({}))
    short, long = await asyncio.gather(
        complete(native, greedy("x", BASE_PLAN, "same", num_new=1)),
        complete(native, greedy("x", BASE_PLAN, "same", num_new=20)),
    )
    assert (short[0].num_new_tokens, long[0].num_new_tokens) == (1, 20)


async def test_an_idle_loop_is_not_hanging_and_one_in_a_long_step_is(gated: Gated) -> None:
    _, gate, native = gated({})
    assert native.health().busy_s == 0.0
    task = asyncio.create_task(complete(native, greedy("x")))
    await asyncio.to_thread(gate.wait_for_step)
    earlier = native.health().busy_s
    assert native.health().busy_s > earlier > 0.0
    gate.open()
    await task


async def test_a_loop_in_a_long_command_is_hanging(make_engine: MakeEngine, start: Callable[..., NativeEngine]) -> None:
    """A command may hang like a step: cancelling a request wipes its rows on the device."""
    native, may_end, has_begun = start(make_engine({})), threading.Event(), threading.Event()

    def hang() -> None:
        has_begun.set()
        assert may_end.wait(PATIENCE_S)

    for _ in range(2):  # the first wakes the thread, the second is queued after it
        asked = asyncio.create_task(native._run_on_engine(hang))
        await asyncio.to_thread(has_begun.wait, PATIENCE_S)
        earlier = native.health().busy_s
        assert native.health().busy_s > earlier > 0.0
        may_end.set()
        await asked
        may_end.clear()
        has_begun.clear()


def test_a_loop_that_waits_for_a_slow_load_is_not_hanging(
    make_engine: MakeEngine, shapes: Shapes, start: Callable[..., NativeEngine]
) -> None:
    good, may_load = random_adapter(shapes, 1), threading.Event()

    def fetch(digest: str) -> AdapterWeights:
        assert may_load.wait(PATIENCE_S)
        return good

    async def main(native: NativeEngine) -> None:
        task = asyncio.create_task(complete(native, greedy("x", plan_of("selection", (good, 1.0)))))
        while not native.loop.waiting:
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(PATIENCE_S):
                while native.health().busy_s > 0.0:  # until the thread sleeps
                    await asyncio.sleep(0)
        finally:
            may_load.set()
            await task

    with ThreadPoolExecutor(1) as executor:
        run(main(start(make_engine(fetch, executor=executor))))


def test_the_engines_thread_alone_is_nice(make_engine: MakeEngine) -> None:
    engine, seen = make_engine({}), list[int]()
    engine.base.model.register_forward_pre_hook(lambda module, inputs: seen.append(os.nice(0)))
    own = os.nice(0)
    native = NativeEngine(engine, niceness=3)
    run(complete(native, greedy("x", num_new=1)))
    native.stop()
    assert seen == [own + 3] and os.nice(0) == own


async def test_a_caller_that_leaves_does_not_end_the_engine(gated: Gated) -> None:
    _, gate, native = gated({})
    task = asyncio.create_task(complete(native, greedy("x")))
    await asyncio.to_thread(gate.wait_for_step)
    leaving = [asyncio.create_task(native.forget(["a"])), asyncio.create_task(native.status())]
    await asyncio.sleep(0)
    for asker in leaving:
        asker.cancel()
    gate.open()
    assert (await task)[0].num_new_tokens == 8
    assert (await native.status()).num_running == 0


async def test_rows_that_wait_for_one_prompt_hold_no_threads(
    make_engine: MakeEngine, start: Callable[..., NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, may_end = threading.Event(), threading.Event()

    def render_slowly(*args: Any) -> str:
        entered.set()
        assert may_end.wait(PATIENCE_S)
        return "long"

    monkeypatch.setattr("gpu_worker.front.preprocess.render_conversation", render_slowly)
    native = start(make_engine({}))
    together = [replace(greedy("", request_id=f"{n}", num_new=2), prompt=(Message("user", "long"),)) for n in range(8)]
    slow = asyncio.create_task(native.generate(together))
    assert await asyncio.to_thread(entered.wait, PATIENCE_S)
    try:
        async with asyncio.timeout(PATIENCE_S / 2):
            [quick] = await native.generate([greedy("x", num_new=2)])
        assert isinstance(quick, Completion) and not slow.done()
    finally:
        may_end.set()
    assert all(isinstance(answer, Completion) for answer in await slow)


async def stop_while_blocked(native: NativeEngine, gate: Gate) -> None:
    """Stop the thread during a step; it ends after that step."""
    stopper = threading.Thread(target=native.stop)
    stopper.start()
    while native.health().is_alive:
        gate.permits.release()
        await asyncio.sleep(0)
    stopper.join()


async def test_a_request_during_the_stop_gets_an_error(gated: Gated) -> None:
    """Its submission is queued after the last step."""
    _, gate, native = gated({})
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))  # prepared in order of arrival
    running = asyncio.create_task(collect(stream_text(native, greedy("x", BASE_PLAN, "running", num_new=150))))
    await asyncio.sleep(0)
    await asyncio.to_thread(gate.wait_for_step)  # the first step is in progress
    late = asyncio.create_task(collect(stream_text(native, greedy("x", BASE_PLAN, "late", num_new=150))))
    await asyncio.sleep(0)
    await asyncio.to_thread(int)  # prepared and queued
    await stop_while_blocked(native, gate)
    errors = await asyncio.gather(running, late, return_exceptions=True)
    assert [type(error) for error in errors] == [EngineStopped] * 2
