"""The tables that the compiled products read, and the tensors that they accept."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from gpu_worker.model.grouped_mapping import GroupedMapping, grouped_mapping
from gpu_worker.model.lora_kernel import LoraKernel, Pairs
from tests.gpu_worker.slow_lora import pool_of, settled
from tests.tiny import plan_of


def pairs_of(slots: list[list[int]], rank_rows: list[list[int]], num_tokens: int) -> Pairs:
    return Pairs.of(
        slot_tokens=np.arange(num_tokens, dtype=np.int32),
        fusion=np.zeros(num_tokens, dtype=np.uint8),
        slots=[np.array(of_adapter, dtype=np.int32) for of_adapter in slots],
        weights=np.ones(sum(map(len, slots)), dtype=np.float32),
        rank_rows=rank_rows,
        runs=[],
    )


def test_an_adapter_without_rank_rows_is_an_error() -> None:
    with pytest.raises(AssertionError, match="needs a rank row"):
        pairs_of([[0], [0]], [[7], []], num_tokens=1)


def test_every_pair_of_a_token_and_an_adapter_has_room_for_the_adapters_rank() -> None:
    """h of a pair begins after those of all earlier pairs; a loop counts them."""
    slots, rank_rows = [[0, 2], [1], [0, 1, 2]], [[7, 8, 9], [4], [1, 2]]
    pairs = pairs_of(slots, rank_rows, num_tokens=3)
    begins, num_values = [], 0
    for of_adapter, rows in zip(slots, rank_rows, strict=True):
        begins.append(num_values)
        for _ in of_adapter:
            num_values += len(rows)
    values = pairs.values_of
    assert values["h_starts"].tolist() == [*begins, num_values] and pairs.h_len == num_values
    assert values["pair_starts"].tolist() == [0, 2, 3, 6]
    assert values["pair_slots"].tolist() == [0, 2, 1, 0, 1, 2]
    assert values["slot_starts"].tolist() == [0, 2, 4, 6]
    assert values["rank_starts"].tolist() == [0, 3, 4, 6]
    assert values["rank_rows"].tolist() == [7, 8, 9, 4, 1, 2]
    assert (pairs.num_adapters, pairs.num_slots, pairs.max_rank) == (3, 3, 3)


def test_an_input_may_be_any_view_and_an_output_only_columns_of_a_wider_tensor(lora_kernel: LoraKernel) -> None:
    pool = pool_of([4], 16, {"m": 16})
    bank, residency = settled(pool, 16, {"m": 16}, torch.float32)
    plans = [plan_of("selection", (pool[0], 1.0))]
    view = torch.randn(1, 16, 3).transpose(1, 2)
    assert not view.is_contiguous()
    found, expected = torch.zeros(2, 1, 3, 16)
    grouped_mapping(plans, [3], residency, lora_kernel).add(view, [(found, bank.modules["m"])])
    grouped_mapping(plans, [3], residency, lora_kernel).add(view.contiguous(), [(expected, bank.modules["m"])])
    assert torch.equal(found, expected) and found.any()
    for refused, reason in (
        (torch.zeros(1, 16, 3).mT, "the values of a row of y must be adjacent"),
        (torch.zeros(1, 3, 20)[..., :16], "y must be two-dimensional or contiguous"),
    ):
        with pytest.raises(AssertionError, match=reason):
            grouped_mapping(plans, [3], residency, lora_kernel).add(view, [(refused, bank.modules["m"])])


def test_pairs_are_computed_on_the_threads_of_the_moment(
    lora_kernel: LoraKernel, request: pytest.FixtureRequest
) -> None:
    """The tables of a step are kept for later ones; the number of threads may change in between."""
    pool = pool_of([4], 16, {"m": 16})
    bank, residency = settled(pool, 16, {"m": 16}, torch.float32)
    mapping = grouped_mapping([plan_of("selection", (pool[0], 1.0))], [3], residency, lora_kernel)
    assert isinstance(mapping, GroupedMapping)
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    x, found = torch.randn(3, 16), []
    for count in (3, 1, 2):
        torch.set_num_threads(count)
        mapping.add(x.clone(), [(y := torch.zeros(3, 16), bank.modules["m"])])
        found.append(y)
        assert mapping._pairs.num_threads == count
    assert found[0].any() and all(torch.equal(y, found[0]) for y in found)
