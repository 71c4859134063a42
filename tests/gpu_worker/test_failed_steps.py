"""Steps that raise: only the requests they raise for end, and a device that computes nothing ends the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from gpu_worker.attention.kv_cache import KvShape
from gpu_worker.attention.kv_regions import KvRegions
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.engine_thread import EngineThread
from gpu_worker.errors import DeadlineExceeded, EngineStopped, RequestFailed
from gpu_worker.lora.lora_linear import LoraLinear
from gpu_worker.request.request import Job, SamplingParams
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine.test_engine_isolation import hostile_adapter
from tests.gpu_worker.engine_driver import (
    BASE_JOB,
    Answer,
    ask,
    assert_nothing_held,
    assert_same,
    by_digest,
    greedy,
    run,
    run_together,
)
from tests.tiny import plan_of, random_adapter

MakeEngine = Callable[..., Engine]
Shapes = dict[str, tuple[int, int]]
BAD = "~"  # the model raises wherever this letter is among a step's tokens


class OutOfMemory(RuntimeError):
    """What a step raises in these tests."""


@dataclass
class Faults:
    """What raises in a model's forward passes, before or after they have written keys and values."""

    num_passes: int = 0  # that raise from now on
    bad_token: int | None = None
    num_seen: int = 0  # passes that began

    def check(self, input_ids: torch.Tensor) -> None:
        if self.bad_token is not None and self.bad_token in input_ids:
            raise OutOfMemory("out of memory for a bad token")
        if self.num_passes:
            self.num_passes -= 1
            raise OutOfMemory("out of memory")


def faults_of(engine: Engine, *, after: bool = False) -> Faults:
    """Put faults into the engine's model; none raises yet."""
    faults, model = Faults(), engine.base.model

    def before_pass(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        faults.num_seen += 1
        if not after:
            faults.check(kwargs["input_ids"])

    def after_pass(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor], output: object) -> None:
        if after:
            faults.check(kwargs["input_ids"])

    model.register_forward_pre_hook(before_pass, with_kwargs=True)
    model.register_forward_hook(after_pass, with_kwargs=True)
    return faults


def bad_id(engine: Engine) -> int:
    [token_id] = engine.base.tokenizer(BAD, add_special_tokens=False).input_ids
    assert isinstance(token_id, int)
    return token_id


def neighbours(pool: Sequence[AdapterWeights]) -> list[Job]:
    """Requests of all kinds: greedy, sampled with a seed, penalised, of several chunks."""
    first, second = pool
    drawn = SamplingParams(max_tokens=9, temperature=0.9, seed=11, top_p=0.9, ignore_eos=True)
    penalised = SamplingParams(max_tokens=9, temperature=0, frequency_penalty=1.0, logprobs=2, ignore_eos=True)
    return [
        BASE_JOB,
        Job("drawn", "one that is drawn", plan_of("selection", (first, 1.0)), drawn),
        Job("penalised", "one that is penalised", plan_of("mixture", (first, 0.5), (second, 0.5)), penalised),
        greedy("a prompt of several chunks " * 4, plan_of("fusion", (first, 0.5), (second, 0.5)), "long"),
    ]


@pytest.fixture
def pool(shapes: Shapes) -> list[AdapterWeights]:
    return [random_adapter(shapes, seed, rank=3) for seed in (1, 2)]


@pytest.mark.parametrize("after", [False, True], ids=["before the pass", "after the pass"])
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_step_that_fails_once_ends_nobody_and_changes_nothing(
    step: int,
    num_rows: int,
    after: bool,
    make_engine: MakeEngine,
    pool: list[AdapterWeights],
    alone: Callable[..., Answer],
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


@pytest.mark.parametrize("after", [False, True], ids=["before the pass", "after the pass"])
@pytest.mark.parametrize("places", [[0], [2], [4], [0, 1], [1, 5]], ids=str)
def test_only_the_rows_a_step_fails_on_end(
    places: list[int],
    after: bool,
    make_engine: MakeEngine,
    pool: list[AdapterWeights],
    alone: Callable[..., Answer],
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
def test_requests_that_fail_alone_never_end_the_engine(
    marked: str, make_engine: MakeEngine, alone: Callable[..., Answer]
) -> None:
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


def break_adapters(engine: Engine) -> None:
    """Let every pass that composes adapters raise."""
    linear = next(module for module in engine.base.model.modules() if isinstance(module, LoraLinear))

    def check(module: nn.Module, args: object) -> None:
        if isinstance(module, LoraLinear) and module._step.composition is not None:
            raise OutOfMemory("no kernel for adapters")

    linear.register_forward_pre_hook(check)


def break_chunks(engine: Engine) -> None:
    """Let every pass over more than three tokens raise."""

    def check(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].shape[1] > 3:
            raise OutOfMemory("no memory for a chunk")

    engine.base.model.register_forward_pre_hook(check, with_kwargs=True)


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


def test_failed_steps_count_anew_once_a_request_is_computed(
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


def test_a_device_that_recovers_is_given_three_steps_again(
    make_engine: MakeEngine, alone: Callable[..., Answer]
) -> None:
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


def test_a_failed_step_leaves_nothing_of_a_hostile_adapter_in_the_cache(
    make_engine: MakeEngine, shapes: Shapes, alone: Callable[..., Answer]
) -> None:
    hostile = hostile_adapter(shapes, "second product")
    engine = make_engine(by_digest(hostile), max_batch_size=1)
    faults_of(engine, after=True).bad_token = bad_id(engine)
    plan = plan_of("selection", (hostile, 1.0))
    [bad] = run_together(engine, [greedy("not a number " * 4 + BAD, plan, "bad")])
    assert isinstance(bad.error, RequestFailed)
    [base] = run_together(engine, [BASE_JOB])
    assert_same(base, alone(BASE_JOB, {}))


class LostDevice(KvRegions):
    """A cache on a device that may be lost: then nothing can be wiped any more."""

    is_lost = False

    def _wipe(self, row: int, pages: Sequence[int]) -> None:
        if self.is_lost:
            raise OutOfMemory("the device is lost")
        super()._wipe(row, pages)


def losing(make_engine: MakeEngine, **changes: object) -> tuple[Engine, Callable[[], None]]:
    """An engine, and what loses its device."""
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


def test_every_row_hears_of_a_device_that_is_lost(make_engine: MakeEngine) -> None:
    engine, lose = losing(make_engine, max_batch_size=4)
    answers = [ask(engine, greedy("x", request_id=number)) for number in range(7)]
    engine.step()
    lose()
    with pytest.raises(OutOfMemory):
        engine.step()
    engine.fail_all(EngineStopped("over"))
    assert [type(answer.error) for answer in answers] == [EngineStopped] * 7
    assert [sum(isinstance(event, Exception) for event in answer.events) for answer in answers] == [1] * 7


def test_a_deadline_is_told_though_the_device_is_lost(make_engine: MakeEngine) -> None:
    now = [1000.0]
    engine, lose = losing(make_engine, clock=lambda: now[0])
    answer = ask(engine, replace(greedy("x", num_new=100), time_left_s=1.0))
    engine.step()
    lose()
    now[0] = 1002.0
    with pytest.raises(OutOfMemory):
        engine.step()
    assert isinstance(answer.error, DeadlineExceeded)


def test_the_thread_of_a_lost_device_ends_and_all_its_streams_hear_of_it(
    make_engine: MakeEngine, start: Callable[..., EngineThread]
) -> None:
    executor = ThreadPoolExecutor(1)
    engine, lose = losing(make_engine, max_batch_size=2, executor=executor)
    loop = start(engine)

    async def main() -> list[object]:
        lose()
        jobs = [greedy("x", BASE_PLAN, number, num_new=50) for number in range(6)]
        return await asyncio.gather(*[loop.complete(job) for job in jobs], return_exceptions=True)

    assert [type(error) for error in run(main())] == [EngineStopped] * 6
    assert not loop.is_alive and isinstance(loop.failure, OutOfMemory)
    with pytest.raises(EngineStopped):
        run(loop.complete(greedy("late")))
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(int)
