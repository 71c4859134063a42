"""Steps that raise: only the responsible requests end, and a device that computes nothing ends the engine.

Concurrent requests in one engine: none changes, damages or ends another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from gpu_worker.errors import AdapterUnfit, DeadlineExceeded, EngineStopped, LogitsNotFinite, RequestFailed
from gpu_worker.front.request.request import Delta, Job, SamplingParams
from gpu_worker.native.attention.kv_cache import KvShape
from gpu_worker.native.attention.kv_pages import HostKvCache
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import (
    BASE_JOB,
    PATIENCE_S,
    Alone,
    BrokenSink,
    MakeEngine,
    Shapes,
    Start,
    ask,
    assert_nothing_held,
    assert_same,
    by_digest,
    complete,
    greedy,
    run,
    run_together,
)
from tests.gpu_worker.faults import BAD, OutOfMemory, bad_id, faults_of, hostile_adapter
from tests.tiny import plan_of, random_adapter


def neighbours(pool: Sequence[AdapterWeights]) -> list[Job]:
    """Return requests of all kinds: greedy, sampled with a seed, penalised, in several chunks."""
    first, second = pool
    drawn = SamplingParams(max_tokens=9, temperature=0.9, seed=11, top_p=0.9, ignore_eos=True)
    penalised = SamplingParams(max_tokens=9, temperature=0, frequency_penalty=1.0, logprobs=2, ignore_eos=True)
    return [
        BASE_JOB,
        Job("drawn", "one that is drawn", plan_of("selection", (first, 1.0)), drawn),
        Job("penalised", "one that is penalised", plan_of("mixture", (first, 0.5), (second, 0.5)), penalised),
        greedy("a prompt of several chunks " * 4, plan_of("fusion", (first, 0.5), (second, 0.5)), "long"),
    ]


@pytest.mark.parametrize(
    ("step", "num_rows", "after"),
    [(0, 1, False), (0, 4, True), (1, 4, False), (1, 1, True), (4, 4, False), (4, 4, True)],
)
def test_a_step_that_fails_once_ends_no_request_and_changes_nothing(
    step: int, num_rows: int, after: bool, make_engine: MakeEngine, pool: list[AdapterWeights], alone: Alone
) -> None:
    jobs = neighbours(pool)[-num_rows:]
    engine = make_engine(by_digest(*pool), max_step_tokens=40)
    faults = faults_of(engine, after=after)
    answers = [ask(engine, job) for job in jobs]
    for _ in range(step):
        engine.step()
    faults.num_passes = 1
    engine.run_until_idle()
    for job, answer in zip(jobs, answers, strict=True):
        assert_same(answer, alone(job, by_digest(*pool)))
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    ("places", "after"), [([0], False), ([2], True), ([4], False), ([0, 1], True), ([1, 5], False), ([1, 5], True)]
)
def test_only_rows_that_make_a_step_fail_end(
    places: list[int], after: bool, make_engine: MakeEngine, pool: list[AdapterWeights], alone: Alone
) -> None:
    good = neighbours(pool)
    jobs = list(good)
    for place in places:
        jobs.insert(place, greedy(f"what{BAD}", plan_of("selection", (pool[0], 1.0)), f"bad-{place}"))
    engine = make_engine(by_digest(*pool), max_step_tokens=40)
    faults_of(engine, after=after).bad_token = bad_id(engine)
    for job, answer in zip(jobs, run_together(engine, jobs), strict=True):
        if job in good:
            assert_same(answer, alone(job, by_digest(*pool)))
        else:
            assert isinstance(answer.error, RequestFailed)
            assert job.request_id in str(answer.error) and "memory" not in str(answer.error)
    assert_nothing_held(engine)


@pytest.mark.parametrize("marked", ["one of its tokens", "its prompt as a whole"])
def test_requests_that_fail_alone_never_end_the_engine(marked: str, make_engine: MakeEngine, alone: Alone) -> None:
    engine = make_engine({})
    faults = faults_of(engine)
    [bos] = engine.base.tokenizer("", add_special_tokens=True).input_ids
    faults.bad_token = bos if marked == "its prompt as a whole" else bad_id(engine)
    before = engine.status()
    for number in range(10):
        [bad] = run_together(engine, [greedy(BAD, request_id=number)])
        assert isinstance(bad.error, RequestFailed)
    assert replace(engine.status(), counters=before.counters) == before
    faults.bad_token = None
    [base] = run_together(engine, [BASE_JOB])
    assert_same(base, alone(BASE_JOB, {}))
    assert_nothing_held(engine)


def test_a_failed_step_leaves_nothing_of_a_hostile_adapter_in_the_cache(
    make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    hostile = hostile_adapter(shapes, "second product")
    engine = make_engine(by_digest(hostile), max_batch_size=1)
    faults_of(engine, after=True).bad_token = bad_id(engine)
    plan = plan_of("selection", (hostile, 1.0))
    [bad] = run_together(engine, [greedy("not a number " * 4 + BAD, plan, "bad")])
    assert isinstance(bad.error, RequestFailed)
    [base] = run_together(engine, [BASE_JOB])
    assert_same(base, alone(BASE_JOB, {}))


class LostDevice(HostKvCache):
    """A cache on a device that may be lost; then it cannot be wiped any more."""

    is_lost = False

    def _wipe(self, group: int, pages: Sequence[int]) -> None:
        if self.is_lost:
            raise OutOfMemory("the device is lost")
        super()._wipe(group, pages)


def losing(make_engine: MakeEngine, **changes: object) -> tuple[Engine, Callable[[], None]]:
    """Return an engine, and a function that loses its device."""
    made: list[LostDevice] = []

    def build(shape: KvShape) -> LostDevice:
        made.append(LostDevice(shape))
        return made[0]

    engine = make_engine({}, build_kv_cache=build, **changes)
    faults = faults_of(engine)

    def lose() -> None:
        made[0].is_lost = True
        faults.num_passes = 10**6

    return engine, lose


def test_every_row_gets_the_error_of_a_lost_device(make_engine: MakeEngine) -> None:
    engine, lose = losing(make_engine, max_batch_size=4)
    answers = [ask(engine, greedy("x", request_id=number)) for number in range(7)]
    engine.step()
    lose()
    with pytest.raises(OutOfMemory):
        engine.step()
    engine.fail_all(EngineStopped("over"))
    assert [type(answer.error) for answer in answers] == [EngineStopped] * 7
    assert [sum(isinstance(event, Exception) for event in answer.events) for answer in answers] == [1] * 7


def test_a_deadline_is_reported_although_the_device_is_lost(make_engine: MakeEngine) -> None:
    now = [1000.0]
    engine, lose = losing(make_engine, clock=lambda: now[0])
    answer = ask(engine, replace(greedy("x", num_new=100), time_left_s=1.0))
    engine.step()
    lose()
    now[0] = 1002.0
    with pytest.raises(OutOfMemory):
        engine.step()
    assert isinstance(answer.error, DeadlineExceeded)


def test_the_thread_of_a_lost_device_ends_and_all_its_streams_fail(make_engine: MakeEngine, start: Start) -> None:
    executor = ThreadPoolExecutor(1)
    engine, lose = losing(make_engine, max_batch_size=2, executor=executor)
    native = start(engine)

    async def main() -> list[object]:
        lose()
        jobs = [greedy("x", BASE_PLAN, number, num_new=50) for number in range(6)]
        return await asyncio.gather(*[complete(native, job) for job in jobs], return_exceptions=True)

    assert [type(error) for error in run(main())] == [EngineStopped] * 6
    health = native.health()
    assert not health.is_alive and health.failure == "the engine's thread has ended: the device is lost"
    with pytest.raises(EngineStopped):
        run(complete(native, greedy("late")))
    deadline = time.monotonic() + 30
    with pytest.raises(RuntimeError, match="shutdown"):  # the thread ends its executor after the streams
        while time.monotonic() < deadline:
            executor.submit(time.sleep, 0.01).result()


@pytest.mark.parametrize(
    ("kind", "strategy", "lora_products"),
    [
        *(("first product", strategy, "auto") for strategy in ("selection", "mixture", "fusion")),
        *(("second product", strategy, "torch") for strategy in ("selection", "mixture", "fusion")),
        ("first product", "mixture", "torch"),
        ("second product", "fusion", "auto"),
        ("folded scaling", "selection", "auto"),
        ("folded scaling", "mixture", "torch"),
    ],
)
def test_a_hostile_adapter_fails_only_its_own_request(
    kind: str, strategy: str, lora_products: str, make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    hostile, good, other = hostile_adapter(shapes, kind), *(random_adapter(shapes, i, rank=3) for i in (1, 2))
    adapters = by_digest(hostile, good, other)
    parts = [(hostile, 1.0)] if strategy == "selection" else [(good, 0.5), (hostile, 0.5)]
    neighbours = [
        greedy("one neighbour", plan_of("selection", (good, 1.0)), 1),
        greedy("another " * 8, plan_of("fusion", (good, 0.5), (other, 0.5)), 2),
        greedy("a third", plan_of("mixture", (other, 0.5), (good, 0.5)), 3),
        BASE_JOB,
    ]
    engine = make_engine(adapters, lora_products=lora_products)
    bad_job = greedy("x", plan_of(strategy, *parts), "bad")  # type: ignore[arg-type]
    bad, *others = run_together(engine, [bad_job, *neighbours])
    assert isinstance(bad.error, LogitsNotFinite | AdapterUnfit)
    for job, answer in zip(neighbours, others, strict=True):
        assert_same(answer, alone(job, adapters))
    assert_nothing_held(engine)


def test_the_rows_of_a_hostile_adapter_are_clean_for_their_next_owner(
    make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    hostile, good = hostile_adapter(shapes, "second product"), random_adapter(shapes, 1, rank=3)
    adapters = by_digest(hostile, good)
    engine = make_engine(adapters, bank_rank_rows=4, max_batch_size=1)
    bad_job = greedy("a long prompt that fills its row " * 3, plan_of("selection", (hostile, 1.0)), 0)
    next_job = greedy("next", plan_of("selection", (good, 1.0)), 1)
    bad, after = run_together(engine, [bad_job, next_job])
    assert isinstance(bad.error, LogitsNotFinite)
    assert bad.row.kv_row == after.row.kv_row
    assert engine.residency.resident == {good.weights_digest}
    assert_same(after, alone(next_job, adapters))


class Panic(BaseException):
    """What a panic of a library in Rust is in Python: no Exception."""


def panic(*_: object, **__: object) -> str:
    raise Panic("index out of bounds")


def test_a_panic_about_a_token_ends_only_its_own_request(
    make_engine: MakeEngine, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine({})
    bad, base = ask(engine, greedy("x", request_id="bad")), ask(engine, BASE_JOB)
    monkeypatch.setattr(bad.row.detokenizer, "push", panic)
    engine.run_until_idle()
    assert isinstance(bad.error, RequestFailed)
    assert_same(base, alone(BASE_JOB, {}))
    assert_nothing_held(engine)


async def test_a_panic_in_a_step_ends_the_thread_and_all_its_streams(make_engine: MakeEngine, start: Start) -> None:
    engine = make_engine({}, max_batch_size=1)
    engine.base.model.register_forward_pre_hook(panic)
    native = start(engine)
    async with asyncio.timeout(PATIENCE_S):
        jobs = [complete(native, greedy("x", request_id=number)) for number in range(2)]
        errors = await asyncio.gather(*jobs, return_exceptions=True)
    assert [type(error) for error in errors] == [EngineStopped] * 2
    assert native.health().failure == "the engine's thread has ended: index out of bounds"


def test_a_sink_that_raises_ends_only_its_own_request(make_engine: MakeEngine, alone: Alone) -> None:
    def broken(event: Delta | Exception) -> None:
        raise BrokenSink("the client's event loop is closed")

    engine = make_engine({})
    engine.submit(engine.prepare(greedy("gone", BASE_PLAN, "gone"), broken))
    base = ask(engine, BASE_JOB)
    engine.run_until_idle()
    assert_same(base, alone(BASE_JOB, {}))
    assert_nothing_held(engine)
