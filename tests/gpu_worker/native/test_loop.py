"""The engine's submissions, refusals, loads, cancellations and deliveries.

Requests past their deadline end at the next step, in any state.
"""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gpu_worker.errors import AdapterLoadFailed, DeadlineExceeded, LogitsNotFinite, WaitedTooLong
from gpu_worker.front.request.request import Job, SamplingParams
from gpu_worker.model import inject
from gpu_worker.model.base_model import load_base_model
from gpu_worker.model.packed_linear import KernelLinear, LinearKernel
from gpu_worker.model.quantization import QuantizedLinear
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN
from tests.clocks import Clock
from tests.gpu_worker.engine_driver import (
    BASE_JOB,
    Alone,
    HeldExecutor,
    MakeEngine,
    Shapes,
    Start,
    ask,
    assert_nothing_held,
    assert_same,
    by_digest,
    compiled,
    complete,
    greedy,
    run_together,
)
from tests.tiny import TinyFolders, assert_equal_logits, plan_of, random_adapter, tiny_config


def test_the_memory_of_a_layer_is_free_once_it_is_packed(
    make_engine: MakeEngine, tiny_folders: TinyFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start needs the memory of one layer besides that of all of them."""
    compiled(LinearKernel.load)
    options = {"dtype": "bfloat16", "quantization": "int8"}
    base = load_base_model(tiny_config(tiny_folders["gemma3"], **options))
    layers = [weakref.ref(each) for each in base.model.modules() if isinstance(each, QuantizedLinear)]
    num_alive, packed = list[int](), inject.packed

    def counted(linear: nn.Linear, kernel: LinearKernel | None) -> nn.Module:
        num_alive.append(sum(layer() is not None for layer in layers))
        return packed(linear, kernel)

    monkeypatch.setattr(inject, "packed", counted)
    engine = make_engine({}, base=base, **options)
    assert any(isinstance(each, KernelLinear) for each in engine.base.model.modules())
    assert len(num_alive) == len(layers) == 7 * 3 + 1
    num_kept = [alive - waiting for alive, waiting in zip(num_alive, range(len(layers), 0, -1), strict=True)]
    assert max(num_kept) <= 1


def test_run_until_idle_waits_for_a_load_on_another_thread(make_engine: MakeEngine, shapes: Shapes) -> None:
    good, base_is_done = random_adapter(shapes, 1), threading.Event()

    def fetch(digest: str) -> AdapterWeights:
        assert base_is_done.wait(120)
        return good

    with ThreadPoolExecutor(1) as executor:
        engine = make_engine(fetch, executor=executor)
        slow = ask(engine, greedy("waits", plan_of("selection", (good, 1.0)), "slow"))
        row = engine.prepare(BASE_JOB, lambda event: base_is_done.set() if event.finish_reason else None)  # type: ignore[union-attr]
        engine.submit(row)
        engine.run_until_idle()
    assert slow.is_finished


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


def test_the_first_logits_are_the_models_own_even_with_min_tokens(make_engine: MakeEngine) -> None:
    params = SamplingParams(max_tokens=3, min_tokens=2, temperature=0)
    plain, least = run_together(make_engine({}), [BASE_JOB, Job("least", str(BASE_JOB.prompt), sampling=params)])
    assert_equal_logits(least.first_logits, plain.first_logits)


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


async def test_an_idle_loop_wakes_for_a_deadline(make_engine: MakeEngine, shapes: Shapes, start: Start) -> None:
    """Nothing runs and no request arrives: this one waits for a load that never ends."""
    weights, executor = random_adapter(shapes, 1), HeldExecutor()
    native = start(make_engine(by_digest(weights), executor=executor, max_wait_s=0.05))
    with pytest.raises(WaitedTooLong):
        await complete(native, greedy("x", plan_of("selection", (weights, 1.0))))
