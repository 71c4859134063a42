"""Random requests, cancellations, failures and deadlines on an engine with scarce resources: nothing leaks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from gpu_worker.errors import AdapterLoadFailed, DeadlineExceeded, EngineFull, WaitedTooLong
from gpu_worker.front.request.request import Job, SamplingParams
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.engine_driver import (
    Answer,
    MakeEngine,
    Shapes,
    ask,
    assert_nothing_held,
    assert_same,
    by_digest,
    run_together,
)
from tests.soak import Scale
from tests.tiny import plan_of, random_adapter

MAX_LEN, KV_TOKENS, BATCH = 64, 112, 5
TIGHT = {
    "kv_tokens": KV_TOKENS,
    "max_model_len": MAX_LEN,
    "max_batch_size": BATCH,
    "max_step_tokens": 24,
    "bank_rank_rows": 14,
    "max_waiting": 12,
    "max_wait_s": 60.0,
    "host_cache_bytes": 30_000,
}
EXPECTED = (
    AdapterLoadFailed,
    DeadlineExceeded,
    WaitedTooLong,
    EngineFull,
)  # full: another tenant with fewer rows takes the place


class Store:
    """Fetches succeed or fail when the test says so."""

    def __init__(self, weights: Mapping[str, AdapterWeights]) -> None:
        self._weights = weights
        self._pending: list[tuple[str, Future[AdapterWeights]]] = []

    def __call__(self, digest: str) -> Future[AdapterWeights]:
        self._pending.append((digest, Future()))
        return self._pending[-1][1]

    def end(self, count: int, *, well: bool) -> None:
        ended, self._pending = self._pending[:count], self._pending[count:]
        for digest, future in ended:
            if well:
                future.set_result(self._weights[digest])
            else:
                future.set_exception(ConnectionError("the store is away"))

    @property
    def num_pending(self) -> int:
        return len(self._pending)


@dataclass
class World:
    """Shared state of all examples: engines, possible plans, and the history so far."""

    make_engine: MakeEngine
    pool: list[AdapterWeights]
    plans: list[Plan]
    lone: Engine
    lone_answers: dict[Job, Answer]
    num_joined: int = 0
    num_preemptions: int = 0
    num_cached: int = 0
    num_compared: int = 0
    num_faults: int = 0

    def alone(self, job: Job) -> Answer:
        job = replace(job, request_id="lone", tenant="lone", time_left_s=None)
        if job not in self.lone_answers:
            [self.lone_answers[job]] = run_together(self.lone, [job])
        return self.lone_answers[job]


class EngineStates(RuleBasedStateMachine):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.now = world, 1000.0
        self.store = Store(by_digest(*world.pool))
        self.engine = world.make_engine({}, fetch=self.store, clock=lambda: self.now, **TIGHT)
        self.num_faults = 0  # forward passes that raise
        self.engine.base.model.register_forward_hook(lambda *_: self.raise_fault())
        self.answers: list[tuple[Job, Answer]] = []
        self.cancelled: set[int] = set()

    @rule(
        plan=st.integers(0, 7),
        num_prompt_tokens=st.integers(1, MAX_LEN - 1),
        share=st.floats(0, 1),
        seed=st.none() | st.integers(0, 3),
        tenant=st.sampled_from(["a", "b"]),
        seconds=st.none() | st.integers(1, 90),
    )
    def join(
        self, plan: int, num_prompt_tokens: int, share: float, seed: int | None, tenant: str, seconds: int | None
    ) -> None:
        num_new = max(1, round(share * (MAX_LEN - num_prompt_tokens)))
        sampling = SamplingParams(max_tokens=num_new, temperature=0 if seed is None else 1, seed=seed, ignore_eos=True)
        text = ("the quick brown fox " * 4)[: num_prompt_tokens - 1]
        job = Job(
            str(self.world.num_joined), text, self.world.plans[plan], sampling, tenant=tenant, time_left_s=seconds
        )
        try:
            self.answers.append((job, ask(self.engine, job)))
            self.world.num_joined += 1
        except EngineFull:
            assert len(self.engine.waiting) >= TIGHT["max_waiting"]

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            self.check()

    @precondition(lambda self: self.store.num_pending)
    @rule(count=st.integers(1, 4), well=st.sampled_from([True, True, True, False]))
    def fetched(self, count: int, well: bool) -> None:
        self.store.end(count, well=well)

    @precondition(lambda self: self.engine.has_work)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        here = [answer.row for _, answer in self.answers if not is_over(answer)]
        row = data.draw(st.sampled_from([row for row in here if id(row) not in self.cancelled] or here))
        self.engine.cancel(row)
        self.cancelled.add(id(row))

    @rule(place=st.integers(0, 4))
    def forget(self, place: int) -> None:
        self.engine.queue.forget([self.world.pool[place].weights_digest])

    @precondition(lambda self: self.engine.running)
    @rule()
    def stumble(self) -> None:
        """Let the next pass raise after writing keys and values. No request ends, because rows are computed again."""
        self.num_faults = 1
        self.step(1)

    def raise_fault(self) -> None:
        if self.num_faults:
            self.num_faults -= 1
            self.world.num_faults += 1
            raise RuntimeError("out of memory")

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @invariant()
    def check(self) -> None:
        running, waiting = self.engine.running, list(self.engine.waiting)
        held = self.engine.status()
        assert len({id(row) for row in (*running, *waiting)}) == held.num_running + held.num_waiting
        assert held.free_kv_rows + len(running) == BATCH == len({row.kv_row for row in running}) + held.free_kv_rows
        pages_of, total = self.engine.memory.kv.pages_of, self.engine.memory.kv.num_tokens
        pages = {row.kv_row: self.engine.kv_cache.pages(row.kv_row) for row in running}
        assert all(pages_of(row.num_computed) <= len(pages[row.kv_row]) <= pages_of(len(row.tokens)) for row in running)
        assert held.free_kv_tokens == total - 16 * len({page for of_row in pages.values() for page in of_row})
        pinned = [row for row in (*running, *waiting) if row.is_pinned]
        assert self.engine.residency.num_pins == sum(len(row.weights_digests) for row in pinned)
        assert all(row.is_pinned and not row.loads for row in running)
        active = {place for row in running for d in row.weights_digests for place in self.engine.residency.rows(d)}
        readable = len(next(iter(self.engine.bank.modules.values())).bt)
        assert len(active) <= held.active_rows <= readable and active <= set(range(readable))
        for _, answer in self.answers:
            assert answer.error is None or isinstance(answer.error, EXPECTED), answer.error
            if is_over(answer) or id(answer.row) in self.cancelled:
                assert answer.row not in running and answer.row not in waiting and not answer.row.loads

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self.store.end(self.store.num_pending, well=True)
            self.engine.step()
        self.check()
        assert_nothing_held(self.engine)
        self.store.end(self.store.num_pending, well=True)
        assert self.engine.queue.forget([weights.weights_digest for weights in self.world.pool])
        held = self.engine.status()
        assert (held.resident, held.occupied_rows, held.host_cache_bytes, held.num_forgetting) == (frozenset(), 0, 0, 0)
        stayed = [(job, answer) for job, answer in self.answers if id(answer.row) not in self.cancelled]
        assert all(is_over(answer) for _, answer in stayed), "every remaining client got the end of its answer"
        greedy = [(job, answer) for job, answer in stayed if answer.is_finished and job.sampling.temperature == 0]
        for job, answer in greedy[-3:]:
            assert_same(answer, self.world.alone(job))
            self.world.num_compared += 1
        self.world.num_preemptions += held.counters.num_preemptions
        self.world.num_cached += held.counters.num_cached_tokens


def is_over(answer: Answer) -> bool:
    return answer.is_finished or answer.error is not None


@pytest.fixture
def world(make_engine: MakeEngine, shapes: Shapes) -> World:
    pool = [random_adapter(shapes, seed, rank=rank) for seed, rank in enumerate((2, 4, 4, 1, 14))]
    half = [(pool[0], 0.5), (pool[1], 0.5)]
    plans = [BASE_PLAN, *[plan_of("selection", (weights, 1.0)) for weights in pool]]
    plans += [plan_of("mixture", *half), plan_of("fusion", *half, (pool[3], 0.2))]
    return World(make_engine, pool, plans, lone=make_engine(by_digest(*pool)), lone_answers={})


def test_nothing_leaks_in_any_sequence(world: World, scale: Scale) -> None:
    wanted = scale.pick("joins", small=50, full=10_000)
    checks = settings(
        max_examples=20 if scale.is_full else 6,
        stateful_step_count=40,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    for number in itertools.count():
        happened = world.num_preemptions, world.num_compared, world.num_faults, world.num_cached
        if world.num_joined >= wanted and all(happened):
            return
        assert world.num_joined < 10 * wanted, "no row was preempted, compared or found a prefix, or no step failed"
        states = seed(number)(lambda: EngineStates(world))
        run_state_machine_as_test(states, settings=checks)  # type: ignore[arg-type]
