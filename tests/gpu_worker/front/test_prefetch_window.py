from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch

from gpu_worker.bank.device_layout import DeviceAdapter, DeviceModule
from gpu_worker.front.prefetch_window import MIN_ROWS, PrefetchWindow
from gpu_worker.front.row import Row
from tests.gpu_worker.rows import queued_row

TEN_BYTES = DeviceAdapter("any", {"q_proj": DeviceModule(torch.zeros(1, 6).byte(), torch.zeros(1, 4).byte())})


def loading(letter: str, tenant: str = "local", *, is_done: bool = True) -> Row:
    each = queued_row(letter, tenant)
    each.loads[letter] = Future()
    if is_done:
        each.loads[letter].set_result(TEN_BYTES)
    return each


def window_of(count: int, *, budget: int, max_rows: int = 100, num_pending: int = 0) -> PrefetchWindow:
    window = PrefetchWindow(budget, max_rows)
    for number in range(count):
        window.add(loading(chr(ord("a") + number), is_done=number >= num_pending))
    return window


@pytest.mark.parametrize(
    ("count", "budget", "max_rows", "has_room"),
    [
        (MIN_ROWS - 1, 0, 1, True),  # a few rows load with any budget
        (MIN_ROWS, 0, 100, False),
        (MIN_ROWS + 1, 10 * (MIN_ROWS + 1) + 1, 100, True),  # above these the budget decides
        (MIN_ROWS + 1, 10 * (MIN_ROWS + 1), 100, False),
        (19, 1 << 30, 20, True),
        (20, 1 << 30, 20, False),
    ],
)
def test_rows_load_within_the_budget_and_the_number_of_rows(
    count: int, budget: int, max_rows: int, has_room: bool
) -> None:
    assert window_of(count, budget=budget, max_rows=max_rows).has_room == has_room


def test_a_load_in_progress_counts_like_the_others() -> None:
    assert window_of(MIN_ROWS, budget=1000, num_pending=MIN_ROWS - 1).num_bytes == 10 * MIN_ROWS
    assert window_of(MIN_ROWS, budget=1000, num_pending=MIN_ROWS).num_bytes == 0


def test_weights_that_rows_share_count_once() -> None:
    window, first, second = PrefetchWindow(100, 100), loading("a"), queued_row("ab")
    second.loads.update(first.loads)
    for each in (first, second):
        window.add(each)
    assert window.num_bytes == 10


def test_the_loads_that_a_load_waits_for_count_like_the_others() -> None:
    parts = {letter: loading(letter).loads[letter] for letter in "abc"}
    window = PrefetchWindow(100, 100, lambda digest: parts if digest == "z" else {})
    window.add(loading("a"))
    assert window.num_bytes == 10
    window.add(loading("z", is_done=False))
    assert window.num_bytes == 40, "a, b and c, and z as their average"


def test_the_last_of_several_loads_of_one_digest_counts() -> None:
    window = PrefetchWindow(100, 100)
    for number in range(16):
        window.add(loading("a", is_done=number < 15))
    assert window.num_bytes == 0
    window.add(loading("a"))
    assert window.num_bytes == 10


def test_a_finished_load_counts_from_the_next_refresh_and_a_failed_one_does_not() -> None:
    window, late = window_of(MIN_ROWS - 1, budget=10 * MIN_ROWS), loading("z", is_done=False)
    window.add(late)
    assert not window.has_room
    late.loads["z"].set_exception(ConnectionError())
    assert not window.has_room
    window.refresh()
    assert window.has_room and window.num_bytes == 10 * (MIN_ROWS - 1)


def test_a_row_that_leaves_makes_room_and_keeps_nothing() -> None:
    window, leaving = window_of(MIN_ROWS - 1, budget=0), loading("z")
    window.add(leaving)
    assert not window.has_room
    window.discard(leaving)
    assert window.has_room and not leaving.loads and leaving not in window
    window.discard(leaving)


def test_tenants_share_a_full_window_and_the_newest_rows_of_one_that_has_more_make_room() -> None:
    window, rows = window_of(0, budget=0), [loading(letter, "a") for letter in "abcdefgh"]
    assert len(rows) == MIN_ROWS
    for row in rows:
        assert window.has_room_for("a")
        window.add(row)
    assert not window.has_room_for("a")
    others = [loading(letter, "b") for letter in "stuv"]
    for row in others:
        assert window.has_room_for("b")
        window.add(row)
    assert not window.has_room_for("a") and not window.has_room_for("b"), "each has half"
    assert [row in window for row in rows] == [True] * 4 + [False] * 4 and not rows[-1].loads
    assert all(row in window and row.loads for row in others) and window.has_room_for("c")
    window.discard(rows[0])
    assert window.has_room_for("a") and window.has_room_for("b")


def test_a_row_that_is_added_again_keeps_its_one_place() -> None:
    window = window_of(MIN_ROWS - 1, budget=0)
    last = loading("z")
    for _ in range(2):
        window.add(last)
    assert len(window) == MIN_ROWS and last.loads
    window.discard(last)
    assert window.has_room_for("local")
