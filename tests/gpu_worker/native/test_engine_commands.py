"""Commands that run on the engine's thread between two steps: forgetting weights and reading the state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gpu_worker.errors import EngineStopped
from gpu_worker.native.engine import NativeEngine
from tests.gpu_worker.engine_driver import Gated, MakeEngine, Shapes, by_digest, complete, greedy, run
from tests.tiny import plan_of, random_adapter


def test_weights_are_forgotten_from_another_thread(shapes: Shapes, gated: Gated) -> None:
    weights = random_adapter(shapes, 1)
    _, gate, native = gated(by_digest(weights))

    async def main() -> None:
        empty = await native.status()
        task = asyncio.create_task(complete(native, greedy("x", plan_of("selection", (weights, 1.0)), num_new=20)))
        await asyncio.to_thread(gate.wait_for_step)
        forgetting = asyncio.create_task(native.forget([weights.weights_digest]))
        await asyncio.sleep(0)  # it is queued after the current step
        gate.open()
        assert await forgetting is False
        assert (await task)[0].num_new_tokens == 20
        assert await native.forget([weights.weights_digest]) is True
        assert await native.status() == empty

    run(main())


def test_a_caller_that_leaves_does_not_end_the_engine(gated: Gated) -> None:
    _, gate, native = gated({})

    async def main() -> None:
        task = asyncio.create_task(complete(native, greedy("x")))
        await asyncio.to_thread(gate.wait_for_step)
        leaving = [asyncio.create_task(native.forget(["a"])), asyncio.create_task(native.status())]
        await asyncio.sleep(0)
        for asker in leaving:
            asker.cancel()
        gate.open()
        assert (await task)[0].num_new_tokens == 8
        assert (await native.status()).num_running == 0

    run(main())


def test_a_stopped_loop_forgets_nothing_more(make_engine: MakeEngine, start: Callable[..., NativeEngine]) -> None:
    native = start(make_engine({}))
    native.stop()
    with pytest.raises(EngineStopped):
        run(native.forget(["a"]))
