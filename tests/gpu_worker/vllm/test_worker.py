"""What vLLM's worker computes in another way: the choice of experts on the CPU, the scores of prompts. Needs vLLM."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from gpu_worker.vllm.sampler import PlanSampler
from gpu_worker.vllm.worker import complete_routers, score_prompts


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


@pytest.mark.parametrize("chunks", [[200], [64, 136], [199, 1], [32, 32, 136]], ids=str)
def test_the_logits_of_a_few_tokens_of_a_prompt_are_in_memory_together(chunks: list[int]) -> None:
    head, hidden, tokens = torch.randn(8, 40), torch.randn(200, 8), torch.randint(40, (200,))
    num_logits = []

    def compute_logits(part: torch.Tensor) -> torch.Tensor:
        num_logits.append(len(part))
        return part @ head

    request = SimpleNamespace(prompt_token_ids=tokens.tolist(), num_computed_tokens=0)
    request.in_progress_prompt_logprobs_cpu = None
    runner: Any = SimpleNamespace(num_prompt_logprobs={"a": 3}, requests={"a": request}, device=torch.device("cpu"))
    runner.input_batch = SimpleNamespace(req_id_to_index={"other": 0, "a": 1})
    runner.query_start_loc = SimpleNamespace(np=np.array([0, 5]))
    runner.model, runner.sampler = SimpleNamespace(compute_logits=compute_logits), PlanSampler()
    runner.model_config, runner._sync_device = SimpleNamespace(logprobs_mode="raw_logprobs"), lambda: None
    found: dict[str, Any] = {}
    for num in chunks:
        assert not found
        step = torch.cat([torch.randn(5, 8), hidden[request.num_computed_tokens :][:num]])
        score = partial(GPUModelRunner._get_prompt_logprobs_dict, runner)
        found = score_prompts(runner, score, step, {"other": 5, "a": num})
        request.num_computed_tokens += num
    assert max(num_logits) <= 32 and sum(num_logits) == 199 and not runner.num_prompt_logprobs
    expected = (hidden @ head).log_softmax(-1)[:-1]
    torch.testing.assert_close(found["a"].logprobs[:, :1], expected.gather(1, tokens[1:, None]))
    torch.testing.assert_close(found["a"].logprobs[:, 1:], expected.topk(3).values)
