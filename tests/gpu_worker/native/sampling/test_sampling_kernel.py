"""The compiled sampler alone: the tensors that it accepts, and rows in any order compared with the slow loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.front.draw import Draw, make_table
from gpu_worker.front.request.request import SamplingParams
from gpu_worker.native.sampling.sampling_kernel import WANTED, SamplingKernel
from tests.gpu_worker.engine_driver import compiled
from tests.gpu_worker.slow_sampling import scored_slowly, tokens_slowly

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


def test_a_row_that_is_not_finite_has_no_token(kernel: SamplingKernel) -> None:
    logits = LOGITS.clone()
    logits[2, 7] = torch.nan
    chosen = kernel.choose(logits, make_table([Draw(SamplingParams(), 1, 1)] * 4, 50))
    assert (chosen == -1).tolist() == [False, False, True, False]


def test_every_wanted_token_is_scored_with_the_requested_number_of_others(kernel: SamplingKernel) -> None:
    wanted = np.array([(1, 7, 3), (0, 49, 0), (1, 2, 5)], WANTED)
    logprobs, ids, top = kernel.score(LOGITS, wanted)
    assert ids.shape == top.shape == (3, 5)
    for n, (row, token, count) in enumerate(wanted.tolist()):
        expected, others = scored_slowly(LOGITS[row], token, count)
        assert logprobs[n] == pytest.approx(expected, rel=1e-5)
        assert ids[n, :count].tolist() == [i for i, _ in others]
        assert top[n, :count].tolist() == pytest.approx([value for _, value in others], rel=1e-5)


def test_tables_of_another_layout_are_refused(kernel: SamplingKernel) -> None:
    with pytest.raises(AssertionError, match="must match the struct"):
        kernel.choose(LOGITS, np.zeros(1, WANTED))
    with pytest.raises(AssertionError, match="must match the struct"):
        kernel.score(LOGITS, make_table([Draw(SamplingParams(), 0, 0)], 50))
