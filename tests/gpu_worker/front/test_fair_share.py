from __future__ import annotations

import random
from collections import Counter

import pytest

from gpu_worker.front.fair_share import FairShare


def share_of(**held: int) -> FairShare:
    share = FairShare(without_share="anonymous")
    for tenant, count in held.items():
        share.take(tenant, count)
    return share


def test_one_tenant_may_hold_every_place_and_displaces_no_other() -> None:
    assert share_of(a=9).displaced_by("a", 9) is None
    assert share_of().displaced_by("a", 9) is None


@pytest.mark.parametrize(
    ("held", "wanted", "displaced"),
    [
        ({"a": 9}, 1, "a"),
        ({"a": 7, "b": 2}, 1, "a"),
        ({"a": 5, "b": 4}, 1, None),  # a would keep fewer than b would have
        ({"a": 6, "b": 3}, 3, None),
        ({"a": 6, "b": 3}, 2, "a"),
        ({"a": 5, "b": 3, "c": 1}, 1, None),  # b has its third
        ({"c": 5, "b": 2, "a": 2}, 1, "c"),
    ],
)
def test_a_tenant_below_its_share_displaces_the_one_that_holds_most(
    held: dict[str, int], wanted: int, displaced: str | None
) -> None:
    assert share_of(**held).displaced_by("b", 9, wanted) == displaced


def test_tenants_that_wait_for_their_first_place_make_the_share_smaller() -> None:
    assert not share_of(a=3, b=3).has_share("a", 9)
    assert share_of(a=3, b=3).has_share("a", 9, ["c"])
    assert not share_of(a=3, b=3).has_share("a", 9, ["b"]), "it is counted once"


def test_the_tenant_without_a_share_never_waits_and_reduces_none() -> None:
    assert share_of().has_share("anonymous", 9)
    assert not share_of(a=8, anonymous=1).has_share("a", 9)


def test_returned_places_are_free_and_a_tenant_without_any_is_forgotten() -> None:
    share = share_of(a=2, b=1)
    share.give("b")
    assert share.num_held == 2
    assert share.has_share("a", 2) and not share.has_share("a", 3)


def test_a_copy_counts_for_itself() -> None:
    share = share_of(a=2, b=1)
    copied = share.copy()
    copied.give("a", 2)
    copied.take("anonymous")
    assert (share.num_held, copied.num_held, share.displaced_by("b", 3, 0)) == (3, 2, "a")
    assert copied.has_share("anonymous", 9) and copied.has_share("b", 1)


def test_a_full_queue_ends_with_equal_shares_in_any_order_of_arrival() -> None:
    for seed in range(50):
        draw, share, held = random.Random(seed), FairShare(), Counter[str]()
        num_places, tenants = draw.randint(4, 40), "abcd"[: draw.randint(1, 4)]
        for _ in range(40 * num_places):
            tenant = draw.choice(tenants)
            if share.num_held == num_places:
                displaced = share.displaced_by(tenant, num_places)
                if displaced is None:
                    continue
                share.give(displaced)
                held[displaced] -= 1
            share.take(tenant)
            held[tenant] += 1
        assert share.num_held == num_places == held.total()
        assert max(held.values()) - min(held[tenant] for tenant in tenants) <= 1, (seed, held)
