from __future__ import annotations

from itertools import pairwise

import pytest

from lora_store.trials import Trial


@pytest.mark.parametrize("digest", ["a" * 64, "b" * 64])
def test_a_tenth_of_5000_requests_is_drawn_within_one_percent_and_always_the_same(digest: str) -> None:
    trial, keys = Trial(digest, 0.1), [f"request-{number}/0" for number in range(5000)]
    drawn = [key for key in keys if trial.includes(key)]
    assert 0.09 <= len(drawn) / len(keys) <= 0.11
    assert drawn == [key for key in keys if Trial(digest, 0.1).includes(key)]


def test_a_larger_share_keeps_the_requests_of_a_smaller_one() -> None:
    keys = [str(number) for number in range(500)]
    shares = [{key for key in keys if Trial("a", share).includes(key)} for share in (0.01, 0.1, 0.5, 1.0)]
    assert all(small < large for small, large in pairwise(shares))
    assert len(shares[-1]) == len(keys)


def test_another_version_draws_other_requests() -> None:
    keys = [str(number) for number in range(500)]
    first, second = ([key for key in keys if Trial(digest, 0.5).includes(key)] for digest in "ab")
    assert first != second
