from __future__ import annotations

import random

import pytest

from gpu_worker.front.fair_queue import FairQueue
from gpu_worker.front.row import Row
from tests.gpu_worker.rows import queued_row as row


def queue_of(*rows: Row) -> FairQueue:
    queue = FairQueue[Row]()
    for each in rows:
        queue.append(each)
    return queue


def drain(queue: FairQueue, blocked: str = "") -> list[str]:
    """Return the ids in order of dequeueing, one per pass, skipping rows whose adapters are `blocked`."""
    order = []
    while True:
        free = [each for each in queue.turns() if not set(each.adapter_set) & set(blocked)]
        if not free:
            return order
        queue.dequeue(free[0])
        order.append(free[0].request_id)


def rows(adapters: str, tenant: str, count: int) -> list[Row]:
    return [row(adapters, tenant, number) for number in range(count)]


def test_rows_of_one_adapter_set_keep_their_order() -> None:
    assert drain(queue_of(*rows("a", "t", 3))) == ["t/a0", "t/a1", "t/a2"]


def test_adapter_sets_of_a_tenant_take_turns() -> None:
    queue = queue_of(*rows("a", "t", 3), *rows("", "t", 1), *rows("ab", "t", 2))
    assert drain(queue) == ["t/a0", "t/0", "t/ab0", "t/a1", "t/ab1", "t/a2"]


def test_tenants_take_turns_for_any_number_of_adapters() -> None:
    flood = [row(letter, "many") for letter in "abcd"]
    queue = queue_of(*flood, row("a", "few", 0), row("a", "few", 1))
    assert drain(queue) == ["many/a0", "few/a0", "many/b0", "few/a1", "many/c0", "many/d0"]


def test_dequeuing_all_rows_in_one_pass_keeps_the_order() -> None:
    def filled() -> FairQueue:
        return queue_of(*rows("a", "t", 3), *rows("b", "t", 2), *rows("a", "u", 2), *rows("", "v", 1))

    queue, order = filled(), []
    for each in queue.turns():
        queue.dequeue(each)
        order.append(each.request_id)
    assert order == drain(filled()) and not queue


def test_behind_a_skipped_row_the_next_of_its_set_follows_before_other_sets() -> None:
    queue, skipped, order = queue_of(*rows("a", "t", 3), *rows("b", "t", 1)), set[Row](), list[str]()
    for each in queue.turns(skipped):
        order.append(each.request_id)
        if each.request_id in ("t/a0", "t/a1"):
            skipped.add(each)
    assert order == ["t/a0", "t/a1", "t/a2", "t/b0"]


def test_a_set_that_cannot_start_costs_its_tenant_no_turn() -> None:
    queue = queue_of(row("x", "t"), *rows("a", "t", 3), *rows("a", "u", 3))
    assert drain(queue, blocked="x") == ["t/a0", "u/a0", "t/a1", "u/a1", "t/a2", "u/a2"]
    assert [each.request_id for each in queue] == ["t/x0"]


def test_a_set_that_was_passed_over_is_first_once_it_can_start() -> None:
    queue = queue_of(row("x", "t"), *rows("a", "t", 3))
    for each in queue.turns():
        if each.adapter_set == ("a",):
            queue.dequeue(each)
            break
    assert next(queue.turns()).request_id == "t/x0"


def test_a_row_that_leaves_in_the_middle_of_a_pass_is_not_shown() -> None:
    first, second = row("a"), row("b")
    queue = queue_of(first, second)
    turns = queue.turns()
    assert next(turns) is first
    queue.remove(second)
    assert list(turns) == []


@pytest.mark.parametrize("seed", range(3))
def test_it_contains_the_rows_added_and_not_removed(seed: int) -> None:
    rng, queue, held = random.Random(seed), FairQueue[Row](), list[Row]()
    for number in range(300):
        if held and rng.random() < 0.45:
            gone = held.pop(rng.randrange(len(held)))
            (queue.dequeue if rng.random() < 0.5 else queue.remove)(gone)
            assert gone not in queue
        else:
            held.append(row(rng.choice(["", "a", "ab", "b"]), rng.choice("tuv"), number))
            queue.append(held[-1])
        assert len(queue) == len(held) and set(queue) == set(held)
        firsts = {(each.tenant, each.adapter_set): each for each in reversed(held)}
        assert set(queue.turns()) == set(firsts.values())
        assert all(queue.is_first(each) for each in firsts.values())
        assert sum(queue.is_first(each) for each in held) == len(firsts)


def test_a_row_waits_for_at_most_tenants_times_sets_of_its_own() -> None:
    """New rows keep arriving for the sets just served."""
    rng, queue = random.Random(1), FairQueue[Row]()
    tenants, letters = "tuvw", "abcde"
    for tenant in tenants:
        for letter in letters:
            queue.append(row(letter, tenant))
    late = row("z", "t", 99)
    queue.append(late)
    for taken in range(len(tenants) * (len(letters) + 1)):
        chosen = next(queue.turns())
        queue.dequeue(chosen)
        if chosen is late:
            assert taken > 0
            return
        queue.append(row(chosen.adapter_set[0], chosen.tenant, rng.randrange(1000)))
    raise AssertionError("the late row was not served in time")


def test_requeued_rows_come_first_the_last_one_before_the_others() -> None:
    queue = queue_of(*rows("a", "t", 2), *rows("b", "t", 2), *rows("a", "u", 2), row("c", "v"))
    taken = []
    for _ in range(2):
        taken.append(next(queue.turns()))
        queue.dequeue(taken[-1])
    assert [each.request_id for each in taken] == ["t/a0", "u/a0"]
    for each in reversed(taken):
        queue.requeue(each)
        assert each in queue and queue.requeued[0] is each and next(queue.turns()) is each
        assert queue.same_adapters(each) == [each]
    assert len(queue) == 7 and len(set(queue)) == 7
    assert drain(queue) == ["t/a0", "u/a0", "v/c0", "t/b0", "u/a1", "t/a1", "t/b1"]


def test_no_new_row_comes_between_requeued_rows() -> None:
    """They may be of one tenant, whose turn ends with the first of them."""
    first, second = row("a", "t", 1), row("b", "t", 2)
    queue = queue_of(first, second)
    for each in (first, second):
        queue.dequeue(each)
    for each in (second, first):
        queue.requeue(each)
    queue.append(row("a", "u", 3))
    queue.append(row("a", "t", 4))
    assert drain(queue) == ["t/a1", "t/b2", "u/a3", "t/a4"]


def test_a_row_is_requeued_although_its_tenant_has_no_other_rows() -> None:
    alone = row("a")
    queue = queue_of(alone)
    queue.dequeue(alone)
    queue.requeue(alone)
    assert list(queue) == [alone] and drain(queue) == ["local/a0"]


def flooded(**counts: int) -> FairQueue:
    """Return a queue in which the tenants have this many rows, in turn."""
    queue = FairQueue[Row]()
    for number in range(max(counts.values())):
        for tenant, count in counts.items():
            if number < count:
                queue.append(row("ab"[number % 2], tenant, number))
    return queue


@pytest.mark.parametrize(
    ("counts", "tenant", "expected"),
    [
        ({"a": 8}, "a", None),  # it may use the whole queue but no more
        ({"a": 5, "b": 3}, "b", "a/a4"),
        ({"a": 6, "b": 2}, "c", "a/b5"),
        ({"a": 3, "b": 3, "c": 2}, "c", None),  # two of three would not be a fairer share
    ],
    ids=str,
)
def test_a_tenant_below_its_share_takes_the_newest_place_of_the_largest(
    counts: dict[str, int], tenant: str, expected: str | None
) -> None:
    found = flooded(**counts).row_to_displace(tenant, 8)
    assert (found and found.request_id) == expected


def test_a_requeued_row_is_never_displaced() -> None:
    queue = queue_of(first := row("a", "t", 1))
    queue.dequeue(first)
    queue.requeue(first)
    assert queue.row_to_displace("u", 1) is None
