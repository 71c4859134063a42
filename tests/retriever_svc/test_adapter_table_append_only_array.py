from __future__ import annotations

import numpy as np

from retriever_svc.adapter_table import AppendOnlyArray


def test_views_keep_their_rows_while_the_array_outgrows_its_memory() -> None:
    array = AppendOnlyArray(np.float32, (3,))
    rows = np.random.default_rng(0).random((5000, 3), np.float32)
    views = [(0, array.view())]
    for start in range(0, 5000, 250):
        array.append(rows[start : start + 250])
        views.append((len(array), array.view()))
    assert array.num_bytes > 5000 * 12 > views[1][1].nbytes
    for count, view in views:
        np.testing.assert_array_equal(view, rows[:count])


def test_appending_within_its_room_copies_nothing() -> None:
    array = AppendOnlyArray(np.int64, num_rows=100)
    array.append(np.arange(100))
    before = array.view()
    array.append(np.arange(5))
    assert np.shares_memory(before, array.view())


def test_a_row_is_copied_a_bounded_number_of_times() -> None:
    array, addresses = AppendOnlyArray(np.int64), set()
    for _ in range(100):
        array.append(np.zeros(1000, np.int64))
        addresses.add((array.num_bytes, array.view().ctypes.data))
    assert len(addresses) < 25
    assert array.num_bytes < 2 * 100_000 * 8
