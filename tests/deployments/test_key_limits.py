from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from deployments.callers import LOCAL_CALLER, Caller, KeyLimits
from deployments.errors import RateLimited, RequestInvalid
from deployments.key_limits import Limiter
from tests.deployments.test_token_bucket import Clock


def caller(key_id: str = "key", **limits: int) -> Caller:
    return Caller("acme", frozenset(), key_id, KeyLimits(**limits))


def limited(work: Callable[[], Any]) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        work()
    return caught.value


def test_requests_beyond_the_minutes_are_refused_until_there_is_room() -> None:
    clock = Clock()
    limiter, asks = Limiter(1, clock=clock, sweep_above=10), caller(requests_per_minute=2)
    limiter.count_request(asks)
    limiter.count_request(asks)
    error = limited(lambda: limiter.count_request(asks))
    assert (error.retry_after_s, str(error)) == (30, "the key may use 2 requests per minute; try again in 30.0 s")
    clock.at += 30
    limiter.count_request(asks)


def test_keys_do_not_share_what_they_may_use() -> None:
    limiter = Limiter(1)
    for key_id in ("a", "b"):
        limiter.count_request(caller(key_id, requests_per_minute=1))
    limited(lambda: limiter.count_request(caller("a", requests_per_minute=1)))


def test_no_more_run_at_once_than_may_and_an_error_makes_room_too() -> None:
    limiter, asks = Limiter(1), caller(concurrent_requests=2)
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(limiter.running(asks, 1))
        limited(lambda: running.enter_context(limiter.running(asks, 1)))
    with pytest.raises(KeyError), limiter.running(asks, 1):
        raise KeyError
    with limiter.running(asks, 1), limiter.running(asks, 1):
        pass


@pytest.mark.parametrize(("limit", "replicas", "here"), [(4, 2, 2), (3, 2, 2), (1, 4, 1), (8, 3, 3)])
def test_a_replica_runs_its_part_rounded_up(limit: int, replicas: int, here: int) -> None:
    limiter, asks = Limiter(replicas), caller(concurrent_requests=limit)
    with ExitStack() as running:
        for _ in range(here):
            running.enter_context(limiter.running(asks, 1))
        limited(lambda: running.enter_context(limiter.running(asks, 1)))


def test_a_replica_gives_out_its_part_of_a_rate() -> None:
    limiter, asks = Limiter(3, clock=Clock()), caller(requests_per_minute=6)
    limiter.count_request(asks)
    limiter.count_request(asks)
    assert limited(lambda: limiter.count_request(asks)).retry_after_s == pytest.approx(30)


def test_tokens_are_reserved_and_then_settled_by_what_was_used() -> None:
    limiter, asks = Limiter(1, clock=Clock()), caller(tokens_per_minute=100)
    with limiter.running(asks, 80) as meter:
        error = limited(lambda: ExitStack().enter_context(limiter.running(asks, 30)))
        assert error.retry_after_s == pytest.approx(6)
        meter.saw("one", 5, 1)
        meter.saw("one", 5, 10)  # so far, and not on top
        meter.saw("two", 5, 10)
    limited(lambda: ExitStack().enter_context(limiter.running(asks, 71)))
    with limiter.running(asks, 70):
        pass


def test_a_request_larger_than_the_limit_is_told_so_instead_of_waiting_for_ever() -> None:
    limiter = Limiter(1)
    with pytest.raises(RequestInvalid) as caught, limiter.running(caller(tokens_per_minute=100), 101):
        pass
    assert caught.value.param == "max_tokens"
    assert "101" in str(caught.value) and "100" in str(caught.value)


def test_limits_that_change_hold_at_once_and_count_what_still_runs() -> None:
    limiter = Limiter(1)
    with limiter.running(caller(concurrent_requests=1), 1):
        limited(lambda: ExitStack().enter_context(limiter.running(caller(concurrent_requests=1), 1)))
        with limiter.running(caller(concurrent_requests=2), 1):
            limited(lambda: ExitStack().enter_context(limiter.running(caller(concurrent_requests=2), 1)))
    with limiter.running(caller(concurrent_requests=1), 1):
        limited(lambda: ExitStack().enter_context(limiter.running(caller(concurrent_requests=1), 1)))


def test_a_rate_that_changes_holds_at_once() -> None:
    limiter = Limiter(1, clock=Clock())
    limiter.count_request(caller(requests_per_minute=1))
    limited(lambda: limiter.count_request(caller(requests_per_minute=1)))
    for _ in range(5):
        limiter.count_request(caller(requests_per_minute=5))
    limited(lambda: limiter.count_request(caller(requests_per_minute=5)))


def test_who_has_no_limits_is_never_refused() -> None:
    limiter = Limiter(4)
    with ExitStack() as running:
        for _ in range(100):
            limiter.count_request(LOCAL_CALLER)
            running.enter_context(limiter.running(LOCAL_CALLER, 10**9))


def test_keys_that_are_gone_do_not_stay_for_ever() -> None:
    clock = Clock()
    limiter = Limiter(1, clock=clock, sweep_above=10)
    with limiter.running(caller("busy", concurrent_requests=1), 1):
        for number in range(1000):
            clock.at += 61
            limiter.count_request(caller(f"k{number}", requests_per_minute=1))
        assert len(limiter._accounts) < 20
        limited(lambda: ExitStack().enter_context(limiter.running(caller("busy", concurrent_requests=1), 1)))


def test_many_keys_do_not_give_a_used_up_one_its_rate_back() -> None:
    limiter = Limiter(1, clock=Clock(), sweep_above=10)
    used_up = caller("used up", requests_per_minute=1, tokens_per_minute=100)
    limiter.count_request(used_up)
    with limiter.running(used_up, 100) as meter:
        meter.saw("one", 50, 50)
    for number in range(1000):
        limiter.count_request(caller(f"k{number}", requests_per_minute=5))
    limited(lambda: limiter.count_request(used_up))
    limited(lambda: ExitStack().enter_context(limiter.running(used_up, 1)))
