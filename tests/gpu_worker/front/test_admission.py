"""The order of admission, counted in engine steps, and the host memory of waiting requests."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import Future

import pytest

from gpu_worker.errors import AdapterLoadFailed
from gpu_worker.front.prefetch_window import MIN_ROWS
from gpu_worker.front.request.request import Job, SamplingParams
from gpu_worker.front.row import Row
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.engine_driver import (
    Alone,
    Answer,
    HeldExecutor,
    MakeEngine,
    Shapes,
    ask,
    assert_nothing_held,
    assert_same,
    by_digest,
    greedy,
    only,
)
from tests.soak import Scale
from tests.tiny import plan_of, random_adapter


def job_of(tenant: str, plan: Plan, name: object, num_new: int) -> Job:
    sampling = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
    return Job(str(name), "short", plan, sampling, tenant=tenant)


def steps_to_first_token(engine: Engine, answer: Answer, *, at_most: int) -> int:
    for count in range(1, at_most + 1):
        engine.step()
        if answer.row.num_new_tokens:
            return count
    raise AssertionError(f"no token within {at_most} steps")


@pytest.mark.parametrize("same_tenant", [True, False])
def test_one_request_for_b_overtakes_a_flood_for_a(
    same_tenant: bool, scale: Scale, make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    """Its first token comes once the first two running rows have ended: after the new tokens of a row + 2 steps."""
    num_new, pool = 6, [random_adapter(shapes, i) for i in range(2)]
    engine = make_engine(by_digest(*pool))
    flood = [
        ask(engine, job_of("flood", only(pool[0]), i, num_new))
        for i in range(scale.pick("requests for A", small=100, full=1000))
    ]
    for _ in range(3):
        engine.step()
    job = job_of("flood" if same_tenant else "other", only(pool[1]), "b", num_new)
    answer = ask(engine, job)
    assert steps_to_first_token(engine, answer, at_most=num_new + 2)
    assert sum(each.is_finished for each in flood) <= engine.config.max_batch_size
    engine.run_until_idle()
    assert all(each.is_finished for each in flood)
    assert_same(answer, alone(job, by_digest(*pool)))
    assert_nothing_held(engine)


def test_a_wide_plan_that_was_passed_over_reserves_the_bank(make_engine: MakeEngine, shapes: Shapes) -> None:
    """Small plans of two tenants would never leave room at once. Rows of the base model still start."""
    wide, *small = (random_adapter(shapes, i, rank=rank) for i, rank in enumerate((8, 4, 4)))
    engine = make_engine(by_digest(wide, *small), bank_rank_rows=8, max_batch_size=4)
    for number in range(2):
        ask(engine, job_of(f"t{number}", only(small[number]), number, 5))
    engine.step()
    answer = ask(engine, job_of("wide", only(wide), "wide", 2))
    for number in range(200):
        engine.step()
        for side in range(2):
            if number % 3 == side:
                ask(engine, job_of(f"t{side}", only(small[side]), (number, side), 5))
        if answer.row.num_passes > 50:
            base = ask(engine, job_of("base", BASE_PLAN, "base", 1))
            engine.step()
            assert base.is_finished
            engine.cancel(base.row)
        if answer.is_finished:
            assert answer.row.num_passes <= 60
            return
    raise AssertionError("the wide plan never ran")


def test_a_wide_plan_that_nothing_passed_over_reserves_nothing(make_engine: MakeEngine, shapes: Shapes) -> None:
    """Every new request is one more look at the waiting ones."""
    small, wide = (random_adapter(shapes, 0, rank=4), random_adapter(shapes, 1, rank=8))
    engine = make_engine(by_digest(small, wide), bank_rank_rows=8, max_batch_size=4)
    ask(engine, job_of("small", only(small), "small", 100))
    engine.step()
    waiting = ask(engine, job_of("wide", only(wide), "wide", 2))
    for number in range(60):
        ask(engine, job_of("base", BASE_PLAN, number, 1))
        engine.step()
    behind = ask(engine, job_of("small", only(small), "behind", 1))
    engine.step()
    assert behind.is_finished and not waiting.is_finished
    engine.run_until_idle()
    assert waiting.is_finished


class Slow:
    """Fetches end when the test says so, and are counted by digest."""

    def __init__(self, *weights: AdapterWeights) -> None:
        self.weights = by_digest(*weights)
        self.pending: list[tuple[str, Future[AdapterWeights]]] = []
        self.asked: list[str] = []

    def __call__(self, digest: str) -> Future[AdapterWeights]:
        self.asked.append(digest)
        self.pending.append((digest, Future()))
        return self.pending[-1][1]

    def arrive(self) -> None:
        pending, self.pending = self.pending, []
        for digest, future in pending:
            future.set_result(self.weights[digest])

    def fail(self) -> None:
        pending, self.pending = self.pending, []
        for _, future in pending:
            future.set_exception(ConnectionError("the store is away"))


def small_adapters(shapes: Shapes, count: int) -> list[AdapterWeights]:
    return [random_adapter(shapes, i, rank=1, modules=lambda name: "layers.0.mlp.up" in name) for i in range(count)]


def test_loads_start_at_once_for_at_most_the_rows_of_the_window(make_engine: MakeEngine, shapes: Shapes) -> None:
    pool = small_adapters(shapes, 40)
    slow = Slow(*pool)
    engine = make_engine({}, fetch=slow, max_batch_size=8)
    answers = [ask(engine, greedy("x", only(weights), i, 2)) for i, weights in enumerate(pool)]
    assert slow.asked == [weights.weights_digest for weights in pool[:16]], "two batches, in turn, without a step"
    engine.step()
    assert len(slow.asked) == 16
    while engine.has_work:
        slow.arrive()
        engine.step()
        assert sum(bool(answer.row.loads) for answer in answers) <= 16
    assert sorted(slow.asked) == sorted(weights.weights_digest for weights in pool), "each is fetched once"
    assert all(answer.is_finished for answer in answers)


def test_weights_of_waiting_rows_stay_within_the_budget(make_engine: MakeEngine, shapes: Shapes) -> None:
    """The batch is full, so no prefetched row can start."""
    pool = small_adapters(shapes, 40)
    slow = Slow(*pool)
    engine = make_engine({}, fetch=slow, max_batch_size=20, host_cache_bytes=0)
    busy = [ask(engine, greedy("x", BASE_PLAN, i, 30)) for i in range(20)]
    engine.step()
    answers = [ask(engine, greedy("x", only(weights), i, 2)) for i, weights in enumerate(pool)]
    for _ in range(10):
        slow.arrive()
        engine.step()
        assert sum(bool(answer.row.loads) for answer in answers) == MIN_ROWS
    assert len(slow.asked) == MIN_ROWS
    while engine.has_work:
        slow.arrive()
        engine.step()
    assert all(answer.is_finished for answer in (*busy, *answers))


def test_rows_after_a_full_window_start_with_resident_adapters(make_engine: MakeEngine, shapes: Shapes) -> None:
    held, *rest = small_adapters(shapes, 20)
    slow = Slow(held, *rest)
    engine = make_engine({}, fetch=slow, max_batch_size=4)
    warm = ask(engine, greedy("x", only(held)))
    slow.arrive()
    engine.run_until_idle()
    assert warm.is_finished
    stalled = [ask(engine, greedy("x", only(weights), i)) for i, weights in enumerate(rest)]
    assert len(slow.pending) == MIN_ROWS
    behind = [ask(engine, greedy("x", plan, "behind", 2)) for plan in (only(held), BASE_PLAN)]
    for _ in range(4):
        engine.step()
    assert all(answer.is_finished for answer in behind) and not any(answer.events for answer in stalled)


@pytest.mark.parametrize("tenant", ["flood", "other"])
def test_weights_in_host_memory_are_used_while_the_store_hangs(
    tenant: str, make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    """More requests than the window has places wait for loads that never end."""
    pool = [random_adapter(shapes, i, rank=4) for i in range(4)]
    slow = Slow(*pool)
    engine = make_engine({}, fetch=slow, bank_rank_rows=8, max_batch_size=4)
    for number, weights in enumerate(pool):
        ask(engine, job_of("flood", only(weights), number, 1))
        slow.arrive()
        engine.run_until_idle()
    assert len(engine.residency.resident) == 2
    stalled = [
        ask(engine, job_of("flood", only(weights), weights.weights_digest, 1))
        for weights in (random_adapter(shapes, 10 + i, rank=1) for i in range(2 * MIN_ROWS))
    ]
    assert len(slow.pending) == MIN_ROWS
    jobs = [job_of(tenant, only(weights), number, 2) for number, weights in enumerate(pool)]
    answers = [ask(engine, job) for job in jobs]
    for _ in range(8):
        engine.step()
    assert not any(answer.events for answer in stalled) and len(slow.asked) == len(pool) + MIN_ROWS
    for job, answer in zip(jobs, answers, strict=True):
        assert_same(answer, alone(job, by_digest(*pool)))


@pytest.mark.parametrize("is_batch_full", [False, True])
def test_loads_of_a_tenant_start_although_those_of_another_fill_the_window(
    is_batch_full: bool, make_engine: MakeEngine, shapes: Shapes
) -> None:
    pool = small_adapters(shapes, 2 * MIN_ROWS + 2)
    slow = Slow(*pool)
    engine = make_engine({}, fetch=slow, max_batch_size=2)
    if is_batch_full:
        for number in range(2):
            ask(engine, job_of("base", BASE_PLAN, number, 50))
        engine.step()
    for weights in pool[:-2]:
        ask(engine, job_of("flood", only(weights), weights.weights_digest, 1))
    assert len(slow.asked) == MIN_ROWS
    held, slow.pending = slow.pending, []
    answers = [ask(engine, job_of("other", only(weights), weights.weights_digest, 1)) for weights in pool[-2:]]
    engine.step()
    assert slow.asked[MIN_ROWS:] == [weights.weights_digest for weights in pool[-2:]]
    slow.arrive()
    while not all(answer.is_finished for answer in answers):
        engine.step()
    slow.pending += held
    while engine.has_work:
        slow.arrive()
        engine.step()
    assert len(slow.asked) == len(set(slow.asked)) == len(pool), "rows that made room use the same loads"
    assert_nothing_held(engine)


def test_all_rows_that_wait_for_a_failed_load_fail_and_the_next_retries(
    make_engine: MakeEngine, shapes: Shapes
) -> None:
    weights, other = small_adapters(shapes, 2)
    slow = Slow(weights, other)
    engine = make_engine({}, fetch=slow)
    together = plan_of("mixture", (weights, 0.5), (other, 0.5))
    failing = [ask(engine, greedy("x", plan, i)) for i, plan in enumerate([only(weights)] * 3 + [together] * 2)]
    assert slow.asked == [weights.weights_digest, other.weights_digest]
    slow.fail()
    engine.step()
    assert all(isinstance(answer.error, AdapterLoadFailed) for answer in failing)
    assert not engine.has_work
    again = ask(engine, greedy("x", only(weights)))
    slow.arrive()
    engine.run_until_idle()
    assert again.is_finished and slow.asked.count(weights.weights_digest) == 2


def test_the_load_of_a_cancelled_row_serves_the_next_row(make_engine: MakeEngine, shapes: Shapes) -> None:
    [weights] = small_adapters(shapes, 1)
    executor = HeldExecutor()
    engine = make_engine(by_digest(weights), executor=executor)
    leaving, staying = (ask(engine, greedy("x", only(weights), name)) for name in ("leaves", "stays"))
    engine.cancel(leaving.row)
    engine.step()
    executor.release()
    engine.run_until_idle()
    assert staying.is_finished and not leaving.events
    assert_nothing_held(engine)


def count_looks(engine: Engine) -> list[int]:
    """Count the waiting rows that admission checks from now on."""
    looks, turns = [0], engine.waiting.turns

    def counted(skipped: Collection[Row]) -> Iterator[Row]:
        for row in turns(skipped):
            looks[0] += 1
            yield row

    engine.waiting.turns = counted  # type: ignore[method-assign]
    return looks


def test_waiting_rows_are_not_checked_again_until_something_changes(
    make_engine: MakeEngine, shapes: Shapes, alone: Alone
) -> None:
    """Sixty adapter sets wait while one row occupies the bank: a step checks none of them."""
    pool = [random_adapter(shapes, i, rank=4, modules=lambda name: "layers.0" in name) for i in range(61)]
    engine = make_engine(by_digest(*pool), bank_rank_rows=4, max_batch_size=4)
    running = ask(engine, job_of("t", only(pool[0]), "first", 30))
    engine.step()
    waiting = [ask(engine, job_of("t", only(weights), i, 1)) for i, weights in enumerate(pool[1:])]
    engine.step()
    looks = count_looks(engine)
    for _ in range(20):
        engine.step()
    assert looks[0] <= 2 * len(waiting), "at most the walks that began loads"
    before = looks[0]
    base = ask(engine, job_of("base", BASE_PLAN, "base", 1))
    engine.step()
    assert base.is_finished and looks[0] > before, "new rows are checked"
    engine.run_until_idle()
    assert all(answer.is_finished for answer in (running, *waiting))
    assert_same(waiting[0], alone(job_of("t", only(pool[1]), 0, 1), by_digest(*pool)))
    assert_nothing_held(engine)
