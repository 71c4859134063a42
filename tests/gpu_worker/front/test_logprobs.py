"""Log probabilities of prompt tokens, compared with a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gpu_worker.native.sampling.sampling import Sampler
from tests.gpu_worker.slow_sampling import scored_slowly


def logits_of(seed: int, size: int = 12) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_tokens_have_their_score_and_their_place_among_all_ids(sampler: Sampler, dtype: torch.dtype) -> None:
    logits = torch.stack([logits_of(seed, 2000).round() for seed in range(9)]).to(dtype)  # with many equal ones
    logits[7, 5], logits[8, 6] = math.nan, math.inf
    tokens, counts = [3, 0, 1999, 7, 500, 11, 12, 13, 14], [0, 5, 2, 0, 20, 1, 1, 1, 1]
    found = sampler.score(logits, tokens, counts)
    assert found[7:] == [None, None]
    for row, (token, count) in enumerate(zip(tokens[:7], counts[:7], strict=True)):
        scored, values = found[row], logits[row].tolist()
        assert scored is not None
        logprob, top = scored_slowly(logits[row], token, count)
        assert scored.rank == 1 + sum((-value, i) < (-values[token], token) for i, value in enumerate(values))
        assert scored.logprob == pytest.approx(logprob, abs=1e-5)
        assert [i for i, _ in scored.top] == [i for i, _ in top]
        assert [value for _, value in scored.top] == pytest.approx([value for _, value in top], abs=1e-5)
