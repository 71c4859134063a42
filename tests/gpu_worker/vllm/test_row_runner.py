"""The queue in front of vLLM, over scripted workers: order, residency, ends and errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from gpu_worker.errors import (
    AdapterLoadFailed,
    AdapterUnfit,
    DeadlineExceeded,
    EngineStopped,
    PlanTooLarge,
    RequestFailed,
    WaitedTooLong,
)
from gpu_worker.front.prefetch_window import MIN_ROWS
from gpu_worker.front.request.request import Delta
from gpu_worker.vllm.fusions import list_adapters, split_name
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.engine_driver import HeldExecutor, by_digest, greedy
from tests.gpu_worker.vllm.scripted import Bench
from tests.tiny import TinyBase, TinyFolders, linear_shapes, plan_of, random_adapter

Serve = Callable[..., tuple[Bench, list[Plan]]]


def fusion_of(*plans: Plan, weight: float = 0.5) -> Plan:
    return Plan("fusion", tuple(replace(plan.adapters[0], weight=weight) for plan in plans))


@pytest.fixture
async def serve(tiny_folders: TinyFolders, tiny_base: TinyBase) -> AsyncIterator[Serve]:
    """Return a maker of benches, with the plans of five adapters of rank 4; two of them fit the bank."""
    base = tiny_base()
    pool = [random_adapter(linear_shapes(base), seed) for seed in range(5)]
    benches: list[Bench] = []

    def make(**changes: Any) -> tuple[Bench, list[Plan]]:
        benches.append(Bench(base, tiny_folders["gemma3"], dict(by_digest(*pool)), **changes))
        return benches[-1], [plan_of("selection", (weights, 1.0)) for weights in pool]

    yield make
    for bench in benches:
        bench.runner.stop(EngineStopped("the test has ended"))


async def test_rows_run_with_their_adapters_and_never_more_than_the_batch_has_places(serve: Serve) -> None:
    bench, plans = serve()
    bench.workers.may_go_on.set()
    asked = bench.ask(*[greedy("x", plans[number % 5], number, num_new=3) for number in range(10)])
    await bench.idle()
    for one in asked:
        assert isinstance(one.last, Delta)
        assert (one.last.finish_reason, one.last.num_new_tokens) == ("length", 3)
    assert bench.workers.most_running == 2
    status = bench.runner.status()
    assert bench.workers.held == status.resident
    assert (status.active_rows, status.occupied_rows, status.free_kv_rows) == (0, 8, 2)
    assert (status.counters.num_requests, status.counters.num_new_tokens) == (10, 30)
    assert status.counters.num_cached_tokens == 10, "once for each row"


async def test_forgetting_drops_idle_adapters_now_and_used_ones_at_their_last_row(serve: Serve) -> None:
    bench, plans = serve()
    digests = [plan.adapters[0].weights_digest for plan in plans[:2]]
    bench.workers.may_go_on.set()
    bench.ask(greedy("x", plans[0], num_new=1))
    await bench.idle()
    bench.workers.may_go_on.clear()
    bench.ask(greedy("x", plans[1], num_new=2))
    await bench.until(lambda: len(bench.workers.running) == 1)
    assert not bench.runner.forget(digests)
    await bench.bank.drained()
    assert bench.workers.held == {digests[1]}
    bench.workers.may_go_on.set()
    await bench.idle()
    assert bench.workers.held == set()
    assert bench.runner.status().host_cache_bytes == 0


async def test_cancelling_closes_a_running_row_before_its_adapter_may_leave(serve: Serve) -> None:
    bench, plans = serve()
    [running], [waiting] = bench.ask(greedy("x", plans[0])), bench.ask(greedy("y", plans[1]))
    await bench.until(lambda: len(bench.workers.running) == 2)
    late = bench.ask(*[greedy("z", plan, num_new=1) for plan in plans[2:4]])
    bench.runner.cancel([running.row, waiting.row])
    bench.runner.forget([plan.adapters[0].weights_digest for plan in plans[:2]])
    bench.workers.may_go_on.set()
    await bench.idle()
    assert running.events == waiting.events == []
    assert [isinstance(one.last, Delta) for one in late] == [True, True]


async def test_more_fusions_than_fit_their_rows_all_run_with_adapters(serve: Serve) -> None:
    bench, plans = serve()
    fusions = [fusion_of(plans[number % 3], plans[(number + 1) % 3], weight=0.1 + number) for number in range(4)]
    bench.workers.may_go_on.set()
    asked = bench.ask(*[greedy("x", plan, num_new=3) for plan in (*fusions, *plans[3:], fusions[0])])
    await bench.idle()
    assert all(isinstance(one.last, Delta) for one in asked)
    status = bench.runner.status()
    assert sum(split_name(digest) is not None for digest in bench.workers.held) == 2
    assert (status.occupied_rows, status.active_rows) == (16, 0)
    assert status.resident == bench.runner.expected() == set(list_adapters(bench.workers.held))


@pytest.mark.parametrize("fusions_wait", [True, False])
async def test_a_row_that_waits_for_long_reserves_only_the_rows_that_it_needs(fusions_wait: bool, serve: Serve) -> None:
    """Two of the first three plans fill their rows. Every new request for one of them passes over the third."""
    bench, plans = serve(max_batch_size=4)
    fusions = [fusion_of(*plans[:2], weight=weight) for weight in (0.1, 0.2, 0.3)]
    full, other = (fusions, plans[3]) if fusions_wait else (plans[:3], fusions[0])
    *running, waiting = bench.ask(*[greedy("x", plan, num_new=1) for plan in full])
    for number in range(60):
        [passing] = bench.ask(greedy("x", full[0]))
        assert bench.runner.status().num_running == (3 if number < 50 else 2)
        bench.runner.cancel([passing.row])
        await bench.until(lambda: bench.runner.status().num_running == 2)
    assert waiting.row.num_passes == 50
    [behind] = bench.ask(greedy("x", full[0]))
    assert bench.runner.status().num_running == 2, "it would end after those that run, and the rows are reserved"
    [separate] = bench.ask(greedy("x", other, num_new=1))
    assert bench.runner.status().num_running == 3, "the other plan has rows of its own"
    bench.workers.may_go_on.set()
    await bench.idle()
    assert all(isinstance(one.last, Delta) for one in (*running, waiting, behind, separate))


async def test_the_parts_of_waiting_fusions_count_in_the_budget_of_prefetches(serve: Serve) -> None:
    executor = HeldExecutor()
    bench, plans = serve(executor=executor, max_batch_size=MIN_ROWS, host_cache_bytes=1)
    first, *others = [fusion_of(*plans[:2], weight=0.1 + number / 4) for number in range(MIN_ROWS + 2)]
    bench.ask(greedy("x", first))
    executor.held.pop(0)()  # one part is converted, and the fusions wait for the other
    bench.ask(*[greedy("x", plan) for plan in others])
    assert sum(split_name(digest) is not None for digest in bench.loader.loading) == MIN_ROWS


async def test_forgetting_a_part_drops_its_fusion_at_the_last_row(serve: Serve) -> None:
    bench, plans = serve()
    first, second = (plan.adapters[0].weights_digest for plan in plans[:2])
    bench.ask(greedy("x", fusion_of(*plans[:2]), num_new=2))
    assert bench.runner.expected() == {first, second}
    await bench.until(lambda: len(bench.workers.running) == 1)
    assert not bench.runner.forget([first])
    assert bench.runner.status().resident == {first, second}
    bench.workers.may_go_on.set()
    await bench.idle()
    assert bench.workers.held == bench.runner.status().resident == set()
    assert bench.runner.status().host_cache_bytes > 0, "the other part stays"
    assert bench.runner.forget([second])
    assert bench.runner.status().host_cache_bytes == 0


async def test_a_fusion_in_the_bank_counts_as_all_of_its_adapters(serve: Serve) -> None:
    bench, plans = serve()
    bench.workers.may_go_on.set()
    for plan in (fusion_of(*plans[:2]), fusion_of(*plans[:2]), fusion_of(*plans[1:3])):
        bench.ask(greedy("x", plan, num_new=1))
        await bench.idle()
    counters = bench.runner.status().counters
    assert [counters.num_fetches, counters.num_bank_hits, counters.num_host_hits] == [3, 2, 1]


async def test_a_row_that_ends_for_two_reasons_is_closed_once(serve: Serve) -> None:
    """A second cancellation would interrupt the abort, and the workers would go on with the row."""
    later_s = 0.0
    bench, plans = serve(clock=lambda: asyncio.get_running_loop().time() + later_s)
    bench.workers.may_end = asyncio.Event()
    [asked] = bench.ask(replace(greedy("x", plans[0]), time_left_s=1000.0))
    await bench.until(lambda: bench.workers.running == [asked.row])
    later_s = 1000.0
    bench.runner.submit([])  # the runner looks at its clock
    await bench.until(lambda: bench.workers.ending == [asked.row])
    bench.runner.cancel([asked.row])  # the client leaves
    await asyncio.sleep(0)
    assert bench.workers.running == [asked.row]
    bench.workers.may_end.set()
    await bench.idle()
    assert bench.workers.running == [] and isinstance(asked.last, DeadlineExceeded)


async def test_a_row_that_does_not_start_in_time_is_ended_and_a_running_one_is_not(serve: Serve) -> None:
    later_s = 0.0
    bench, plans = serve(max_wait_s=1000.0, clock=lambda: asyncio.get_running_loop().time() + later_s)
    first, second, third = bench.ask(*[greedy("x", plan, num_new=1) for plan in plans[:3]])
    await bench.until(lambda: len(bench.workers.running) == 2)
    later_s = 1000.0
    bench.runner.submit([])  # the runner looks at its clock
    await bench.until(lambda: third.last is not None)
    assert isinstance(third.last, WaitedTooLong)
    assert first.events == second.events == []
    bench.workers.may_go_on.set()
    await bench.idle()
    assert isinstance(first.last, Delta) and isinstance(second.last, Delta)


async def test_an_error_of_one_row_is_its_own(serve: Serve) -> None:
    bench, plans = serve()
    bench.workers.may_go_on.set()
    bench.workers.error = ValueError("what vLLM refuses")
    [failed] = bench.ask(greedy("x"))
    await bench.idle()
    assert isinstance(failed.last, RequestFailed) and isinstance(failed.last.__cause__, ValueError)
    bench.workers.error = None
    del bench.pool[plans[0].adapters[0].weights_digest]
    lost, large, good = bench.ask(
        greedy("x", plans[0]),
        greedy("x", Plan("mixture", tuple(plan.adapters[0] for plan in plans[1:4]))),
        greedy("x", plans[1]),
    )
    await bench.idle()
    assert isinstance(lost.last, AdapterLoadFailed) and isinstance(large.last, PlanTooLarge)
    assert isinstance(good.last, Delta)


async def test_an_adapter_that_the_workers_refuse_fails_only_its_own_rows(serve: Serve) -> None:
    bench, plans = serve()
    bench.workers.may_go_on.set()
    digest = plans[0].adapters[0].weights_digest
    bench.workers.unfit = {digest: "the base model has no module 'up' in vLLM"}
    asked = bench.ask(*[greedy("x", plan, num_new=2) for plan in (plans[0], plans[1], BASE_PLAN, plans[0])])
    await bench.idle()
    for one in (asked[0], asked[3]):
        assert isinstance(one.last, AdapterUnfit) and str(one.last) == bench.workers.unfit[digest]
    assert [isinstance(one.last, Delta) for one in asked[1:3]] == [True, True]
    assert bench.runner.failure is None
    assert bench.runner.forget([digest])
    [again] = bench.ask(greedy("x", plans[0], num_new=2))
    await bench.idle()
    assert isinstance(again.last, AdapterUnfit) and bench.runner.failure is None


async def test_a_bank_that_cannot_be_changed_ends_the_engine(serve: Serve) -> None:
    bench, plans = serve()

    async def broken(changes: object) -> None:
        raise RuntimeError("the workers are gone")

    bench.bank._send = broken
    running, waiting = bench.ask(greedy("x", plans[0]), greedy("base"))
    await bench.until(lambda: bench.runner.failure is not None)
    assert isinstance(running.last, EngineStopped) and isinstance(waiting.last, EngineStopped)
    with pytest.raises(EngineStopped, match="the workers are gone"):
        bench.ask(greedy("late"))


async def test_stopping_ends_all_rows_and_refuses_every_call(serve: Serve) -> None:
    bench, plans = serve()
    asked = bench.ask(*[greedy("x", plan) for plan in plans])
    await bench.until(lambda: len(bench.workers.running) == 2)
    bench.runner.stop(EngineStopped("it was stopped"))
    assert all(isinstance(one.last, EngineStopped) for one in asked)
    await bench.until(lambda: not bench.workers.running)
    assert [len(one.events) for one in asked] == [1] * 5
    for call in (bench.runner.status, bench.runner.expected, lambda: bench.runner.forget([])):
        with pytest.raises(EngineStopped):
            call()


async def test_a_client_that_is_gone_ends_its_row(serve: Serve) -> None:
    bench, _ = serve()

    def gone(event: object) -> None:
        raise ConnectionError

    bench.workers.may_go_on.set()
    row = bench.prepare(greedy("x", num_new=50), gone)
    bench.runner.submit([row])
    await bench.idle()
    assert row.num_new_tokens < 5


async def test_an_answer_of_the_workers_is_progress_while_a_long_prompt_has_no_token(serve: Serve) -> None:
    now = 0.0
    bench, _ = serve(clock=lambda: now)
    asked, answers = asyncio.Event(), asyncio.Event()

    async def ask() -> None:
        asked.set()
        await answers.wait()

    watching = asyncio.create_task(bench.runner.watch(ask, 0.001))
    bench.ask(greedy("x"))
    await asked.wait()
    now = 7.0
    assert bench.runner.seconds_without_progress() == 7.0, "they have not answered"
    answers.set()
    await bench.until(lambda: bench.runner.seconds_without_progress() == 0.0)
    bench.runner.stop(EngineStopped("the test has ended"))
    await watching


async def test_workers_that_fail_to_answer_end_the_engine(serve: Serve) -> None:
    bench, _ = serve()

    async def fail() -> None:
        raise OSError("gone")

    [asked] = bench.ask(greedy("x"))
    await bench.runner.watch(fail, 0.001)
    assert isinstance(asked.last, EngineStopped) and "gone" in str(bench.runner.failure)


async def test_time_without_progress_counts_only_while_rows_run(serve: Serve) -> None:
    bench, _ = serve()
    await asyncio.sleep(0.02)
    assert bench.runner.seconds_without_progress() == 0
    bench.ask(greedy("x"))
    await asyncio.sleep(0.02)
    assert bench.runner.seconds_without_progress() >= 0.02
