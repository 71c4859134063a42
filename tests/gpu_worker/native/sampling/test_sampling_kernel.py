"""The compiled sampler alone: the tensors that it accepts, and rows in any order compared with the slow loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.front.draw import Draw, make_table
from gpu_worker.front.request.request import SamplingParams
from gpu_worker.native.sampling.sampling_kernel import WANTED, SamplingKernel
from tests.gpu_worker.engine_driver import compiled
from tests.gpu_worker.slow_sampling import tokens_slowly

LOGITS = torch.randn(4, 50, generator=torch.Generator().manual_seed(3)) * 3


@pytest.fixture(scope="module")
def kernel() -> SamplingKernel:
    return compiled(SamplingKernel.load)


def test_it_serves_contiguous_logits_in_host_memory(kernel: SamplingKernel) -> None:
    assert kernel.serves(LOGITS) and kernel.serves(LOGITS.bfloat16())
    assert not kernel.serves(LOGITS.double())
    assert not kernel.serves(LOGITS.T)
    assert not kernel.serves(LOGITS.to("meta"))


def test_entries_choose_from_the_rows_they_name(kernel: SamplingKernel) -> None:
    draws = [Draw(SamplingParams(top_k=20), 5, position) for position in range(4)]
    table = make_table(draws, 50)[[3, 1, 3]]
    chosen = kernel.choose(LOGITS, table).tolist()
    assert all(token in tokens_slowly(LOGITS[row], draws[row]) for token, row in zip(chosen, [3, 1, 3], strict=True))
    assert kernel.choose(LOGITS, table[:0]).tolist() == []


def test_tables_of_another_layout_are_refused(kernel: SamplingKernel) -> None:
    with pytest.raises(AssertionError, match="must match the struct"):
        kernel.choose(LOGITS, np.zeros(1, WANTED))
    with pytest.raises(AssertionError, match="must match the struct"):
        kernel.score(LOGITS, make_table([Draw(SamplingParams(), 0, 0)], 50))
