from __future__ import annotations

from dataclasses import dataclass

import pytest

from deployments.auth.token_bucket import TokenBucket


@dataclass
class Clock:
    at: float = 100.0

    def __call__(self) -> float:
        return self.at


def bucket_of(per_minute: float) -> tuple[TokenBucket, Clock]:
    clock = Clock()
    return TokenBucket(per_minute, clock=clock), clock


def test_a_full_bucket_gives_a_minutes_worth_at_once_and_then_says_when_there_is_more() -> None:
    bucket, clock = bucket_of(60)
    assert [bucket.take(1) for _ in range(60)] == [0.0] * 60
    assert bucket.take(2) == pytest.approx(2)
    clock.at += 1.5
    assert bucket.take(2) == pytest.approx(0.5)
    clock.at += 0.5
    assert bucket.take(2) == 0


def test_what_is_refused_is_not_taken() -> None:
    bucket, _clock = bucket_of(60)
    bucket.take(59)
    for _ in range(5):
        assert bucket.take(2) == pytest.approx(1)
    assert bucket.take(1) == 0


def test_no_more_than_a_minutes_worth_is_saved_up() -> None:
    bucket, clock = bucket_of(60)
    clock.at += 3600
    assert bucket.take(60) == 0
    assert bucket.take(1) > 0


@pytest.mark.parametrize(("used", "wait_s"), [(10, 0), (40, 30), (70, 60)])
def test_what_was_used_is_what_counts_and_too_much_is_owed(used: int, wait_s: float) -> None:
    bucket, _ = bucket_of(60)
    assert bucket.take(40) == 0
    bucket.settle(40, used)
    assert bucket.take(50) == pytest.approx(max(0, wait_s))


def test_nothing_comes_back_beyond_the_bucket() -> None:
    bucket, clock = bucket_of(60)
    bucket.take(40)
    clock.at += 60
    bucket.settle(40, 0)
    assert (bucket.take(60), bucket.take(1) > 0) == (0, True)


def test_a_bucket_is_full_once_nothing_is_left_to_refill() -> None:
    bucket, clock = bucket_of(60)
    assert bucket.is_full
    bucket.take(2)
    clock.at += 1.5
    assert not bucket.is_full
    clock.at += 0.5
    assert bucket.is_full
