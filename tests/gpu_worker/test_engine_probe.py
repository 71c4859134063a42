"""The effect of an adapter on the base model's logits, for many adapters at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import Tensor

from gpu_worker.front import calls
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.engine_driver import (
    PATIENCE_S,
    MakeEngine,
    Shapes,
    Start,
    by_digest,
    complete,
    greedy,
    run,
    run_together,
)
from tests.tiny import plan_of, random_adapter


@pytest.fixture
def shifts_of(start: Start) -> Callable[[Engine, list[str]], list[float | Exception]]:
    return lambda engine, digests: run(start(engine).probe(digests))


def test_the_shift_is_the_largest_change_of_a_logit_in_units_of_the_largest_logit(
    make_engine: MakeEngine, shapes: Shapes, shifts_of: Callable[..., list[float | Exception]]
) -> None:
    pool = [random_adapter(shapes, i, rank=2) for i in range(5)]

    def logits_of(plan: Plan) -> Tensor:
        [answer] = run_together(make_engine(by_digest(*pool)), [greedy(calls.PROMPT, plan)])
        return answer.first_logits

    base = logits_of(BASE_PLAN)
    expected = [
        float((logits_of(plan_of("selection", (weights, 1.0))) - base).abs().max() / base.abs().max())
        for weights in pool
    ]
    found = shifts_of(make_engine(by_digest(*pool), max_batch_size=4), [weights.weights_digest for weights in pool])
    assert found == pytest.approx(expected, rel=1e-4)


async def test_a_batch_takes_one_step_and_the_base_model_one_more_the_first_time(
    make_engine: MakeEngine, shapes: Shapes, start: Start
) -> None:
    """Loads end one by one on another thread, and no row runs before all have ended."""
    pool = [random_adapter(shapes, i) for i in range(8)]
    digests = [weights.weights_digest for weights in pool]
    with ThreadPoolExecutor(1) as executor:
        native = start(make_engine(by_digest(*pool), executor=executor))
        for batch, num_steps in ((digests[:6], 2), (digests[2:], 3), (["missing", *digests], 4)):
            shifts = await native.probe(batch)
            assert all(isinstance(shift, float) and shift > 0.0 for shift in shifts[-5:])
            assert (await native.status()).num_running == 0
            assert native.loop.num_steps == num_steps


async def test_a_cancelled_probe_does_not_cancel_loads_of_others(
    make_engine: MakeEngine, shapes: Shapes, start: Start
) -> None:
    weights, may_load = random_adapter(shapes, 1), threading.Event()

    def get(digest: str) -> AdapterWeights:
        assert may_load.wait(PATIENCE_S)
        return weights

    with ThreadPoolExecutor(1) as executor:
        native = start(make_engine(get, executor=executor))
        leaving = asyncio.create_task(native.probe([weights.weights_digest]))
        while not native.loop.loader.loading:
            await asyncio.sleep(0)
        await native.status()  # asked after the load started: the probe waits for it
        job = greedy("x", plan_of("selection", (weights, 1.0)))
        staying = asyncio.create_task(complete(native, job))
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        may_load.set()
        assert (await staying)[0].num_new_tokens == 8
