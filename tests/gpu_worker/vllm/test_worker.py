"""vLLM's worker chooses experts on the CPU as its classes for GPUs do. Needs vLLM."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from gpu_worker.vllm.worker import complete_routers


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_a_bias_chooses_experts_and_is_in_no_weight(scoring_func: str) -> None:
    """vLLM's router for the CPU heeds it within groups only. Source: DeepSeek-V3 (arXiv 2412.19437), 2.1.2."""
    logits, bias = torch.randn(5, 6), torch.randn(6)
    layer = nn.Module()
    layer.router = CPURouter(2, 6, scoring_func=scoring_func, e_score_correction_bias=bias)
    complete_routers(layer)
    weights, experts = layer.router._compute_routing(torch.zeros(5, 4), logits, None)
    for row in range(5):
        scores = logits[row].sigmoid() if scoring_func == "sigmoid" else logits[row].softmax(-1)
        chosen = (scores + bias).topk(2).indices
        assert sorted(experts[row].tolist()) == sorted(chosen.tolist())
        torch.testing.assert_close(weights[row], scores[experts[row].long()] / scores[chosen].sum())


def test_a_choice_without_a_bias_stays_as_it_is() -> None:
    layer = nn.Module()
    layer.router = CPURouter(2, 6)
    complete_routers(layer)
    assert not layer.router.use_grouped_topk
