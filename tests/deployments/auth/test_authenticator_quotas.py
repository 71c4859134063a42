from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from deployments.auth.authenticator import LOCAL_CALLER, Caller, KeyLimits, Limiter, TokenBucket, Work
from deployments.errors import RateLimited, RequestInvalid
from tests.clocks import Clock


def caller(key_id: str = "key", **limits: int) -> Caller:
    return Caller("acme", frozenset(), key_id, KeyLimits(**limits))


def refused(limiter: Limiter, asks: Caller, work: Work) -> RateLimited:
    return limited(lambda: ExitStack().enter_context(limiter.running(asks, work)))


def limited(work: Callable[[], Any]) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        work()
    return caught.value


@pytest.mark.parametrize(("num_replicas", "per_minute"), [(1, 2), (3, 6)])
def test_requests_above_a_replicas_share_of_the_rate_are_refused_until_it_recovers(
    num_replicas: int, per_minute: int
) -> None:
    clock = Clock()
    limiter, asks = Limiter(num_replicas, clock=clock, sweep_above=10), caller(requests_per_minute=per_minute)
    limiter.count_request(asks)
    limiter.count_request(asks)
    error = limited(lambda: limiter.count_request(asks))
    assert error.retry_after_s == pytest.approx(30)
    assert str(error) == f"the key's limit of {per_minute} requests per minute is exceeded; retry in 30.0 s"
    limiter.count_request(caller("another", requests_per_minute=per_minute))
    clock.at += 30
    limiter.count_request(asks)


@pytest.mark.parametrize(("limit", "replicas", "here"), [(2, 1, 2), (4, 2, 2), (3, 2, 2), (1, 4, 1), (8, 3, 3)])
def test_a_replica_runs_its_share_rounded_up_and_an_error_frees_rows(limit: int, replicas: int, here: int) -> None:
    limiter, asks = Limiter(replicas), caller(concurrent_requests=limit)
    with pytest.raises(KeyError), limiter.running(asks, Work()):
        raise KeyError
    with ExitStack() as running:
        for _ in range(here):
            running.enter_context(limiter.running(asks, Work()))
        refused(limiter, asks, Work())


def test_a_request_counts_as_many_times_as_it_has_rows() -> None:
    limiter, asks = Limiter(1), caller(concurrent_requests=8)
    with limiter.running(asks, Work(5)), limiter.running(asks, Work(3)):
        error = refused(limiter, asks, Work(1))
        assert str(error) == "the key's limit of 8 concurrent rows (prompts × n) is exceeded; retry in 1.0 s"
    with limiter.running(asks, Work(5)):
        refused(limiter, asks, Work(4))
        with limiter.running(asks, Work(3)):
            pass


def test_more_rows_than_the_keys_limit_are_refused_by_field() -> None:
    limiter, asks = Limiter(2), caller(concurrent_requests=8)
    for work in (Work(9), Work(9, rows_field="n")):
        with pytest.raises(RequestInvalid) as caught, limiter.running(asks, work):
            pass
        assert caught.value.param == work.rows_field
        assert str(caught.value).startswith(f"{work.rows_field}: the request has 9 rows (prompts × n)")
        assert "the key allows 8 at once" in str(caught.value)


def test_a_request_within_the_keys_limit_passes_on_one_of_many_replicas() -> None:
    """It waits for this replica's part of the rate afterwards, and for its own rows."""
    clock = Clock()
    limiter, asks = Limiter(20, clock=clock), caller(tokens_per_minute=60_000, concurrent_requests=16)
    with limiter.running(asks, Work(16, num_tokens=4096)) as meter:
        refused(limiter, asks, Work())
        meter.saw("one", 0, 4000, 96)
    error = refused(limiter, asks, Work(num_tokens=1))
    assert error.retry_after_s == pytest.approx((4096 - 3000 + 1) / 50)
    clock.at += 60
    refused(limiter, asks, Work(num_tokens=60_000))
    clock.at += 22
    with limiter.running(asks, Work(num_tokens=60_000)):
        pass
    with pytest.raises(RequestInvalid, match="the key allows 60000 per minute"):
        limiter.charge(asks, 60_001, "files")


def test_limits_are_divided_by_the_replicas_that_run_now() -> None:
    clock = Clock()
    limiter = Limiter(2, clock=clock)
    asks = caller(requests_per_minute=8, tokens_per_minute=1000, concurrent_requests=4)
    with limiter.running(asks, Work(2, num_tokens=250)) as meter:
        limiter.count_request(asks)
        refused(limiter, asks, Work())
        limiter.divide_by(1)
        with limiter.running(asks, Work(2)):
            refused(limiter, asks, Work())
        assert limiter.rate_headers(asks)["x-ratelimit-remaining-tokens"] == "500"  # as the other one's part was used
        assert limiter.rate_headers(asks)["x-ratelimit-remaining-requests"] == "6"
        meter.saw("one", 0, 240, 10)
    limiter.divide_by(4)
    assert limiter.rate_headers(asks)["x-ratelimit-remaining-requests"] == "6"
    clock.at += 60
    for _ in range(2):
        limiter.count_request(asks)
    assert limited(lambda: limiter.count_request(asks)).retry_after_s == pytest.approx(30)


def test_encoder_tokens_are_charged_whatever_the_outcome_if_any_may_have_been_read() -> None:
    limiter, asks = Limiter(1, clock=Clock()), caller(tokens_per_minute=100)
    with pytest.raises(KeyError), limiter.running(asks, Work(num_tokens=60, num_read=40)) as meter:
        meter.num_readings += 1
        meter.saw("one", 0, 5, 5)
        raise KeyError
    refused(limiter, asks, Work(num_tokens=51))
    with pytest.raises(KeyError), limiter.running(asks, Work(num_read=50)):
        raise KeyError
    limiter.charge(asks, 50, "files")
    assert limited(lambda: limiter.charge(asks, 1, "files")).retry_after_s == pytest.approx(0.6)
    with pytest.raises(RequestInvalid) as caught:
        limiter.charge(asks, 101, "files")
    assert caught.value.param == "files"


def test_tokens_are_reserved_and_then_settled_by_what_was_used() -> None:
    limiter, asks = Limiter(1, clock=Clock()), caller(tokens_per_minute=100)
    with limiter.running(asks, Work(num_tokens=80)) as meter:
        error = refused(limiter, asks, Work(num_tokens=30))
        assert error.retry_after_s == pytest.approx(6)
        meter.saw("one", 0, 5, 1)
        meter.saw("one", 0, 5, 10)  # a total, not an increment
        meter.saw("two", 1, 5, 10)
    refused(limiter, asks, Work(num_tokens=71))
    with limiter.running(asks, Work(num_tokens=70)):
        pass


def test_a_prompt_is_charged_once_for_all_its_answers() -> None:
    limiter, asks = Limiter(1, clock=Clock()), caller(tokens_per_minute=100)
    with limiter.running(asks, Work(16, num_tokens=20 + 16 * 2)) as meter:
        for answer in range(16):
            meter.saw(str(answer), 0, 20, 2)
        assert meter.num_tokens == 52
    refused(limiter, asks, Work(num_tokens=49))
    with limiter.running(asks, Work(num_tokens=48)):
        pass


def test_a_sent_prompt_is_charged_unless_the_server_had_no_room() -> None:
    limiter, asks = Limiter(1, clock=Clock()), caller(tokens_per_minute=100)
    with pytest.raises(TimeoutError), limiter.running(asks, Work(2, num_tokens=90)) as meter:
        meter.sent("one", 0, 30)
        meter.sent("two", 0, 30)
        meter.not_started("two")
        raise TimeoutError
    refused(limiter, asks, Work(num_tokens=71))
    with pytest.raises(KeyError), limiter.running(asks, Work(num_tokens=70)) as meter:
        meter.sent("one", 0, 70)
        meter.not_started("one")
        raise KeyError
    with limiter.running(asks, Work(num_tokens=70)) as meter:
        meter.sent("one", 0, 30)
        meter.saw("one", 0, 20, 5)
        assert meter.num_tokens == 25


def test_a_request_above_the_limit_is_refused_at_once() -> None:
    limiter = Limiter(1)
    with pytest.raises(RequestInvalid) as caught, limiter.running(caller(tokens_per_minute=100), Work(num_tokens=101)):
        pass
    assert caught.value.param == "prompt"
    assert "101" in str(caught.value) and "100" in str(caught.value)


def test_changed_limits_apply_at_once_and_count_running_rows() -> None:
    limiter, one, two = Limiter(1), caller(concurrent_requests=1), caller(concurrent_requests=2)
    with limiter.running(one, Work()):
        refused(limiter, one, Work())
        with limiter.running(two, Work()):
            refused(limiter, two, Work())
    with limiter.running(one, Work()):
        refused(limiter, one, Work())
    limiter = Limiter(1, clock=Clock())
    for rate in (1, 5):
        for _ in range(rate):
            limiter.count_request(caller(requests_per_minute=rate))
        limited(lambda rate=rate: limiter.count_request(caller(requests_per_minute=rate)))


def test_a_caller_without_limits_is_never_refused() -> None:
    limiter = Limiter(4)
    with ExitStack() as running:
        for _ in range(100):
            limiter.count_request(LOCAL_CALLER)
            running.enter_context(limiter.running(LOCAL_CALLER, Work(num_tokens=10**9)))


def test_accounts_of_removed_keys_are_forgotten() -> None:
    clock = Clock()
    limiter = Limiter(1, clock=clock, sweep_above=10)
    with limiter.running(caller("busy", concurrent_requests=1), Work()):
        for number in range(1000):
            clock.at += 61
            limiter.count_request(caller(f"k{number}", requests_per_minute=1))
        assert len(limiter._accounts) < 20
        refused(limiter, caller("busy", concurrent_requests=1), Work())


def test_many_keys_do_not_reset_an_exhausted_one() -> None:
    limiter = Limiter(1, clock=Clock(), sweep_above=10)
    used_up = caller("used up", requests_per_minute=1, tokens_per_minute=100)
    limiter.count_request(used_up)
    with limiter.running(used_up, Work(num_tokens=100)) as meter:
        meter.saw("one", 0, 50, 50)
    for number in range(1000):
        limiter.count_request(caller(f"k{number}", requests_per_minute=5))
    limited(lambda: limiter.count_request(used_up))
    refused(limiter, used_up, Work(num_tokens=1))


def bucket_of(per_minute: float) -> tuple[TokenBucket, Clock]:
    clock = Clock()
    return TokenBucket(per_minute, clock=clock), clock


def test_a_full_bucket_grants_a_minutes_amount_and_then_gives_the_wait() -> None:
    """A refused amount is not taken, and at most a minute's amount is saved."""
    bucket, clock = bucket_of(60)
    clock.at += 3600
    assert [bucket.take(1) for _ in range(60)] == [0.0] * 60
    for _ in range(5):
        assert bucket.take(2) == pytest.approx(2)
    clock.at += 1.5
    assert bucket.take(2) == pytest.approx(0.5)
    assert bucket.take(1) == 0
    clock.at += 1.5
    assert bucket.take(2) == 0


def test_a_bucket_is_full_once_it_has_refilled_and_does_not_exceed_its_size() -> None:
    bucket, clock = bucket_of(60)
    assert bucket.is_full
    bucket.take(2)
    clock.at += 1.5
    assert not bucket.is_full
    clock.at += 0.5
    assert bucket.is_full
    bucket.take(40)
    clock.at += 60
    bucket.settle(40, 0)
    assert (bucket.take(60), bucket.take(1) > 0) == (0, True)


def test_headers_say_what_is_left_of_a_rate_and_when_all_of_it_is_back() -> None:
    clock = Clock()
    limiter, asks = Limiter(2, clock=clock), caller(requests_per_minute=60, tokens_per_minute=1000)
    assert limiter.rate_headers(asks)["x-ratelimit-reset-requests"] == "0ms"
    limiter.count_request(asks)
    running = ExitStack()
    running.enter_context(limiter.running(asks, Work(num_tokens=400)))
    assert limiter.rate_headers(asks) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "58",  # of two replicas, each of which would count one
        "x-ratelimit-reset-requests": "2s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "200",
        "x-ratelimit-reset-tokens": "48s",
    }
    clock.at += 1.5
    assert limiter.rate_headers(asks)["x-ratelimit-reset-requests"] == "500ms"
    used = ExitStack()
    used.enter_context(limiter.running(asks, Work(num_tokens=1))).saw("a", 0, 400, 350)  # more than it reserved
    used.close()
    headers = limiter.rate_headers(asks)
    assert (headers["x-ratelimit-remaining-tokens"], headers["x-ratelimit-reset-tokens"]) == ("0", "2m16s")
    assert limiter.rate_headers(caller("b", concurrent_requests=1)) == limiter.rate_headers(LOCAL_CALLER) == {}


@pytest.mark.parametrize(
    ("num_tokens", "text"), [(99, "990ms"), (5994, "59.9s"), (5996, "1m0s"), (11_970, "2m0s"), (12_060, "2m1s")]
)
def test_a_reset_time_never_has_60_seconds_beside_its_minutes(num_tokens: int, text: str) -> None:
    limiter, asks = Limiter(1, clock=Clock()), caller(tokens_per_minute=6000)  # 100 a second
    with limiter.running(asks, Work(num_tokens=1)) as usage:
        usage.saw("a", 0, num_tokens, 0)
    assert limiter.rate_headers(asks)["x-ratelimit-reset-tokens"] == text
