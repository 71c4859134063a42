"""The compiled sampler alone: the tensors that it accepts, and rows in any order compared with the slow loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.front.draw import Draw, make_table
from gpu_worker.front.request.request import SamplingParams
from gpu_worker.native.sampling.sampling_kernel import WANTED, SamplingKernel
from tests.gpu_worker.engine_driver import compiled

LOGITS = torch.randn(4, 50, generator=torch.Generator().manual_seed(3)) * 3


@pytest.fixture(scope="module")
def kernel() -> SamplingKernel:
    return compiled(SamplingKernel.load)


def test_it_serves_contiguous_logits_in_host_memory(kernel: SamplingKernel) -> None:
    assert kernel.serves(LOGITS) and kernel.serves(LOGITS.bfloat16())
    assert not kernel.serves(LOGITS.double())
    assert not kernel.serves(LOGITS.T)
    assert not kernel.serves(LOGITS.to("meta"))


def test_tables_of_another_layout_are_refused(kernel: SamplingKernel) -> None:
    with pytest.raises(AssertionError, match="must match the struct"):
        kernel.choose(LOGITS, np.zeros(1, WANTED))
    with pytest.raises(AssertionError, match="must match the struct"):
        kernel.score(LOGITS, make_table([Draw(SamplingParams(), 0, 0)], 50))
