"""Clients that leave, and the end of the engine's thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from gpu_worker.errors import EngineStopped
from gpu_worker.front.request.request import Delta
from gpu_worker.native.engine import NativeEngine
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import (
    Gate,
    Gated,
    assert_nothing_held,
    complete,
    greedy,
    run,
    stream_text,
)


async def collect(stream: AsyncIterator[Delta]) -> list[Delta]:
    return [delta async for delta in stream]


def test_leaving_the_iterator_cancels_at_the_next_step(gated: Gated) -> None:
    engine, gate, native = gated({}, max_batch_size=1)

    async def main() -> None:
        async with aclosing(stream_text(native, greedy("leaves", BASE_PLAN, "leaves", num_new=100))) as stream:
            gate.permits.release()
            await anext(stream)
        gate.open()
        completion, _ = await complete(native, greedy("stays", BASE_PLAN, "stays", num_new=4))
        assert completion.num_new_tokens == 4

    run(main())
    native.stop()
    assert engine.num_steps <= 1 + 1 + 4, "one step may have begun before the cancel arrived"
    assert_nothing_held(engine)


async def stop_while_blocked(native: NativeEngine, gate: Gate) -> None:
    """Stop the thread during a step; it ends after that step."""
    stopper = threading.Thread(target=native.stop)
    stopper.start()
    while native.health().is_alive:
        gate.permits.release()
        await asyncio.sleep(0)
    stopper.join()


def test_a_request_during_the_stop_gets_an_error(gated: Gated) -> None:
    """Its submission is queued after the last step."""
    _, gate, native = gated({})

    async def main() -> list[Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))  # prepared in order of arrival
        running = asyncio.create_task(collect(stream_text(native, greedy("x", BASE_PLAN, "running", num_new=150))))
        await asyncio.sleep(0)
        await asyncio.to_thread(gate.wait_for_step)  # the first step is in progress
        late = asyncio.create_task(collect(stream_text(native, greedy("x", BASE_PLAN, "late", num_new=150))))
        await asyncio.sleep(0)
        await asyncio.to_thread(int)  # prepared and queued
        await stop_while_blocked(native, gate)
        return await asyncio.gather(running, late, return_exceptions=True)

    assert [type(error) for error in run(main())] == [EngineStopped] * 2
