from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from deployments.api.error_table import describe
from deployments.byte_budget import ByteBudget
from deployments.errors import UploadMemoryFull

WAIT_S = 120.0


def test_a_tenant_holds_at_most_as_much_as_remains_free() -> None:
    budget = ByteBudget(120, has_tenants=True)
    assert not budget.take("a", 61)
    assert budget.take("a", 60)
    assert not budget.take("a", 1)
    assert budget.take("b", 30) and not budget.take("b", 1)
    assert budget.take("c", 15) and budget.num_bytes == 105
    budget.give("a", 60)
    assert budget.take("b", 7) and not budget.take("b", 20)


def test_a_tenant_below_its_fixed_part_is_refused_only_if_the_budget_is_full() -> None:
    budget = ByteBudget(120, always_bytes=50, has_tenants=True)
    assert budget.take("a", 60) and budget.take("b", 50)
    assert not budget.take("b", 1)
    assert budget.take("c", 10) and not budget.take("d", 1)
    assert budget.take("a", 0)


def test_without_tenants_every_request_may_use_the_whole_budget() -> None:
    budget = ByteBudget(120)
    assert budget.take("a", 100) and budget.take("a", 20) and not budget.take("a", 1)
    budget.give("a", 120)
    assert budget.num_bytes == 0


def test_eight_stagers_never_exceed_the_budget() -> None:
    budget, most, lock = ByteBudget(100), 0, threading.Lock()
    taken = 0

    def stage(num_bytes: int) -> None:
        nonlocal taken, most
        with budget.taken("a", num_bytes, WAIT_S):
            with lock:
                taken += num_bytes
                most = max(most, taken)
            time.sleep(0.002)
            with lock:
                taken -= num_bytes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(stage, [60, 30, 45, 100, 10, 5, 70, 40] * 4))
    assert 60 <= most <= 100
    assert budget.num_bytes == 0


def test_a_stage_without_room_in_time_is_a_503_with_the_budgets_size() -> None:
    budget = ByteBudget(100)
    with budget.taken("a", 80, 0.01):
        with pytest.raises(UploadMemoryFull) as caught, budget.taken("a", 21, 0.01):
            pass
        with budget.taken("a", 20, 0.01):
            pass
    status, body = describe(caught.value)
    assert (status, "100 bytes" in body["error"]["message"]) == (503, True)
    with budget.taken("a", 100, 0.01):
        pass


def wait_until_waiting(budget: ByteBudget, count: int) -> None:
    until = time.monotonic() + WAIT_S
    while budget.num_waiting < count:
        assert time.monotonic() < until, f"{budget.num_waiting} threads wait"
        time.sleep(0.001)


def test_a_large_stage_is_not_overtaken_by_small_ones() -> None:
    budget, order = ByteBudget(100), []

    def stage(num_bytes: int) -> None:
        with budget.taken("a", num_bytes, WAIT_S):
            order.append(num_bytes)

    with ThreadPoolExecutor(2) as pool, budget.taken("a", 50, WAIT_S):
        for count, num_bytes in enumerate((100, 10), start=1):
            pool.submit(stage, num_bytes)
            wait_until_waiting(budget, count)
    assert order == [100, 10]


def test_a_tenant_that_holds_its_share_does_not_hold_up_another() -> None:
    budget, got = ByteBudget(100, always_bytes=50, has_tenants=True), []

    def second() -> None:
        with budget.taken("a", 50, WAIT_S):
            got.append(budget.num_bytes)

    with budget.taken("a", 50, WAIT_S):
        waiting = threading.Thread(target=second)
        waiting.start()
        wait_until_waiting(budget, 1)
        with budget.taken("b", 10, 0.0):
            assert budget.num_bytes == 60
        with budget.taken("b", 500, 0.0):  # counted as the most that one tenant may hold
            assert budget.num_bytes == 100
        assert budget.num_waiting == 1
    waiting.join(WAIT_S)
    assert got == [50]


def test_a_stage_above_the_budget_runs_alone() -> None:
    budget = ByteBudget(100)
    with budget.taken("a", 1000, WAIT_S):
        assert budget.num_bytes == 100
