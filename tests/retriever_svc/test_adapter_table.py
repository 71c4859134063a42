from __future__ import annotations

import numpy as np
import pytest

from lora_store.records import AdapterRecord
from retriever_svc.adapter_table import AdapterTable, AppendOnlyArray
from tests.retriever_svc.pool_fakes import record_of


def records_of(count: int) -> list[AdapterRecord]:
    """Return records: every third is private, owners and tags repeat."""
    rng = np.random.default_rng(count)
    return [
        record_of(
            f"a{n}",
            rng.standard_normal(4) * 10,
            tenant=f"t{n % 4}",
            visibility="private" if n % 3 == 0 else "public",
            tags=tuple(f"tag{k}" for k in range(3) if n % (k + 2) == 0),
            own_scores=rng.uniform(-1, 1, n % 9),
            approved=n % 5 == 0,
        )
        for n in range(count)
    ]


def filled(records: list[AdapterRecord], *, step: int, requires_approval: bool = False) -> AdapterTable:
    table = AdapterTable(4, requires_approval=requires_approval)
    for start in range(0, len(records), step):
        table.append(records[start : start + step])
    return table


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("requires_approval", [False, True])
def test_masks_equal_a_slow_loop_in_any_order_of_rows(step: int, requires_approval: bool) -> None:
    records = records_of(100)
    table = filled(records, step=step, requires_approval=requires_approval)
    for count in (0, 1, 50, 100):
        head = records[:count]
        for tenant in ("t0", "t3", "stranger"):
            found = [r.ref.tenant == tenant or r.is_open(requires_approval=requires_approval) for r in head]
            assert table.visible(tenant, count).tolist() == found
            trusted = [r.ref.tenant == tenant or (r.visibility == "public" and r.approved) for r in head]
            assert table.trusted(tenant, count).tolist() == trusted
        for tags in ([], ["tag0"], ["tag1", "tag2"], ["unknown"], ["tag0", "unknown"]):
            assert table.tagged(tags, count).tolist() == [set(tags) <= set(record.tags) for record in head]


def test_vectors_are_unit_rows_in_order_and_names_know_their_newest_position() -> None:
    records = records_of(9000)  # more than one block
    table = AdapterTable(4, num_rows=9000)
    table.append(records)
    table.append([record_of("a5", [0, 0, 0, 2], tenant="t1")])
    expected = np.stack([r.embedding.vector / np.linalg.norm(r.embedding.vector) for r in records if r.embedding])
    np.testing.assert_allclose(table.vectors.view()[:9000], expected, atol=1e-6)
    assert table.records[8999] is records[8999]
    assert table.positions["t1", "a5"] == 9000
    assert table.positions["t2", "a6"] == 6
    assert len(table) == 9001
    with pytest.raises(AssertionError):
        table.append([record_of("bare", None)])


def test_a_tag_of_one_adapter_costs_few_bytes() -> None:
    tables = [AdapterTable(4, num_rows=100) for _ in range(2)]
    tables[0].append([record_of(f"a{n}", [1, 0, 0, 0]) for n in range(100)])
    tables[1].append([record_of(f"a{n}", [1, 0, 0, 0], tags=tuple(f"{n}-{k}" for k in range(32))) for n in range(100)])
    assert 8 <= (tables[1].num_bytes - tables[0].num_bytes) / 3200 < 128


def test_a_tag_of_many_adapters_is_copied_a_bounded_number_of_times() -> None:
    table, sizes = AdapterTable(4), set()
    for number in range(5000):
        table.append([record_of(f"a{number}", [1, 0, 0, 0], tags=("all",))])
        sizes.add(table.num_bytes)
    assert table.tagged(["all"], 4000).sum() == 4000
    assert len(sizes) < 200


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


def test_a_row_is_copied_a_bounded_number_of_times_and_never_within_its_room() -> None:
    array, addresses = AppendOnlyArray(np.int64), set()
    for _ in range(100):
        array.append(np.zeros(1000, np.int64))
        addresses.add((array.num_bytes, array.view().ctypes.data))
    assert len(addresses) < 25
    assert array.num_bytes < 2 * 100_000 * 8
    roomy = AppendOnlyArray(np.int64, num_rows=100)
    roomy.append(np.arange(100))
    before = roomy.view()
    roomy.append(np.arange(5))
    assert np.shares_memory(before, roomy.view())
