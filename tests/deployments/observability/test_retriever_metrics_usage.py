from __future__ import annotations

from deployments.observability.retriever_metrics import RecentPlans, RoutingTotals
from lora_store import AdapterRef

A, B, C = (AdapterRef("local", name, name * 64) for name in "abc")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_largest_counts_are_named_and_the_rest_is_summed() -> None:
    recent = RecentPlans(clock=Clock())
    for refs in ([A], [A, B], [A, B, C]):
        recent.add(refs)
    assert recent.largest(2) == ([(A, 3), (B, 2)], 1)
    assert recent.largest(9) == ([(A, 3), (B, 2), (C, 1)], 0)


def test_choices_of_two_windows_ago_are_forgotten() -> None:
    clock = Clock()
    recent = RecentPlans(window_s=10, clock=clock)
    recent.add([A])
    clock.now = 10
    recent.add([B])
    assert recent.largest(9) == ([(B, 1), (A, 1)], 0) or recent.largest(9) == ([(A, 1), (B, 1)], 0)
    clock.now = 20
    assert recent.largest(9) == ([(B, 1)], 0)
    clock.now = 45
    assert recent.largest(9) == ([], 0)


def test_chosen_and_always_shadowed_adapters_are_counted() -> None:
    totals = RoutingTotals()
    for _ in range(19):
        totals.add([A, B], [A])
    assert (totals.num_chosen, totals.num_shadowed) == (1, 0), "B was seen too rarely to judge"
    totals.add([A, B], [A, B])
    assert (totals.num_chosen, totals.num_shadowed) == (2, 1)
    totals.add([B, A], [])
    assert totals.num_shadowed == 0, "it was first once"


def test_withdrawn_adapters_are_forgotten() -> None:
    totals = RoutingTotals()
    for _ in range(20):
        totals.add([A, B], [A, B])
    totals.retain(lambda ref: ref == A)
    assert (totals.num_chosen, totals.num_shadowed) == (1, 0)
