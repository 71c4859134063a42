from __future__ import annotations

import pytest

from lora_store import AdapterRef, Plan, PlannedAdapter, Strategy
from lora_store.errors import PlanInvalid


def planned(*weights: float, digest: str = "") -> tuple[PlannedAdapter, ...]:
    return tuple(
        PlannedAdapter(AdapterRef("t", f"a{n}", str(n)), digest or f"w{n}", weight) for n, weight in enumerate(weights)
    )


@pytest.mark.parametrize(
    ("strategy", "adapters", "said"),
    [
        ("best", (), "strategy must be one of base, selection, mixture, fusion, top_p_mixture, got 'best'"),
        ("base", planned(1.0), "strategy 'base' takes no adapters, got 1"),
        ("mixture", (), "strategy 'mixture' needs at least one adapter, got none"),
        ("selection", planned(1.0, 1.0), "strategy 'selection' takes exactly one adapter, got 2"),
        ("mixture", planned(*[0.1] * 17), "a plan may have at most 16 adapters, got 17"),
        ("fusion", planned(1.0, 1.0, digest="w"), "a plan must not contain the same adapter weights twice"),
        ("mixture", planned(4.5), "the weight of 'a0' must be finite and within ±4.0, got 4.5"),
        ("mixture", planned(float("nan")), "the weight of 'a0' must be finite and within ±4.0, got nan"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(
    strategy: Strategy, adapters: tuple[PlannedAdapter, ...], said: str
) -> None:
    with pytest.raises(PlanInvalid) as caught:
        Plan(strategy, adapters)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("weights", "leader"),
    [((0.3,), 0), ((0.0,), None), ((-1.0,), None), ((0.5, 0.5), None), ((0.4, 0.6), 1), ((0.6, -0.6), None)],
)
def test_the_leader_has_more_than_half_of_the_weight(weights: tuple[float, ...], leader: int | None) -> None:
    found = Plan("fusion", planned(*weights)).leader
    assert (None if found is None else found.ref.name) == (None if leader is None else f"a{leader}")


def test_sixteen_adapters_and_the_largest_weights_are_allowed() -> None:
    assert len(Plan("mixture", planned(*[4.0, -4.0] * 8)).adapters) == 16
