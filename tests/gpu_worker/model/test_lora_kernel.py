"""The tensors that the compiled products accept, and their threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.model.grouped_mapping import GroupedMapping, grouped_mapping
from gpu_worker.model.lora_kernel import LoraKernel, Pairs
from tests.gpu_worker.slow_lora import pool_of, settled
from tests.tiny import plan_of


def test_an_adapter_without_rank_rows_is_an_error() -> None:
    zeros = np.zeros(1, np.int32)
    with pytest.raises(AssertionError, match="needs a rank row"):
        Pairs.of(slot_tokens=zeros, fusion=zeros, slots=[zeros], weights=zeros, rank_rows=[[]])


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


def test_pairs_are_computed_on_the_threads_of_the_moment(lora_kernel: LoraKernel) -> None:
    """The tables of a step are kept for later ones; the number of threads may change in between."""
    pool = pool_of([4], 16, {"m": 16})
    bank, residency = settled(pool, 16, {"m": 16}, torch.float32)
    mapping = grouped_mapping([plan_of("selection", (pool[0], 1.0))], [3], residency, lora_kernel)
    assert isinstance(mapping, GroupedMapping)
    x, found = torch.randn(3, 16), []
    for count in (3, 1, 2):
        torch.set_num_threads(count)
        mapping.add(x.clone(), [(y := torch.zeros(3, 16), bank.modules["m"])])
        found.append(y)
        assert mapping._pairs.num_threads == count
    assert found[0].any() and all(torch.equal(y, found[0]) for y in found)
