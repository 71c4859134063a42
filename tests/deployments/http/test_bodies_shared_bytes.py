from __future__ import annotations

from deployments.http.bodies import SharedBytes


def test_a_tenant_holds_at_most_as_much_as_remains_free() -> None:
    shared = SharedBytes(120, has_tenants=True)
    assert not shared.take("a", 61)
    assert shared.take("a", 60)
    assert not shared.take("a", 1)
    assert shared.take("b", 30) and not shared.take("b", 1)
    assert shared.take("c", 15) and shared.num_bytes == 105
    shared.give("a", 60)
    assert shared.take("b", 7) and not shared.take("b", 20)


def test_a_tenant_below_its_fixed_part_is_refused_only_if_the_budget_is_full() -> None:
    shared = SharedBytes(120, always_bytes=50, has_tenants=True)
    assert shared.take("a", 60) and shared.take("b", 50)
    assert not shared.take("b", 1)
    assert shared.take("c", 10) and not shared.take("d", 1)
    assert shared.take("a", 0)


def test_without_tenants_every_request_may_use_the_whole_budget() -> None:
    shared = SharedBytes(120)
    assert shared.take("a", 100) and shared.take("a", 20) and not shared.take("a", 1)
    shared.give("a", 120)
    assert shared.num_bytes == 0
