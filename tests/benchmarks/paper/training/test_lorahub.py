"""LoRAHub's layers compute the server's fusion, and its search finds weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.paper.training.lorahub import FusedModel, search_weights
from benchmarks.training.lora_training import (
    Example,
    FrozenLinear,
    Padded,
    freeze_linears,
)
from gpu_worker.front.request.prompts import alpaca_prompt
from gpu_worker.front.request.request import Delta, Job, SamplingParams
from gpu_worker.model.base_model import BaseModel
from gpu_worker.native.loop import Engine
from lora_store import AdapterWeights, Plan
from tests.tiny import assert_equal_logits, linear_shapes, plan_of, random_adapter, tiny_config

WEIGHTS = (0.7, 0.2, -0.4)


@pytest.fixture
def adapters(tiny_base: Callable[..., BaseModel]) -> list[AdapterWeights]:
    shapes = linear_shapes(tiny_base())
    return [random_adapter(shapes, seed, rank=3, modules=lambda name: "layers.0" not in name) for seed in range(3)]


@pytest.fixture
def frozen(tiny_folders: Mapping[str, Path]) -> torch.nn.Module:
    """Return the model with its frozen products in float32, so that they can be compared."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["gemma3"], dtype=torch.float32).requires_grad_(False)
    freeze_linears(model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folders["gemma3"], dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            module.weight = plain.get_submodule(name).weight.requires_grad_(False)
            module.forward = lambda x, w=module.weight: torch.nn.functional.linear(x, w)
    return model


def test_the_sums_equal_the_servers_fusion(
    frozen: torch.nn.Module, adapters: list[AdapterWeights], tiny_folders: Mapping[str, Path]
) -> None:
    text = alpaca_prompt("count to three")
    ids = AutoTokenizer.from_pretrained(tiny_folders["gemma3"])([text], return_tensors="pt")["input_ids"]
    seen: list[torch.Tensor] = []

    def take_states(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(states)
        return states.sum()

    FusedModel(frozen, adapters).loss(Padded().batch([Example(ids[0], ids[0])]), torch.tensor(WEIGHTS), take_states)
    found = frozen.lm_head(seen[0])[0, -1]
    plan = plan_of("fusion", *zip(adapters, WEIGHTS, strict=True))
    assert_equal_logits(found.detach(), served_logits(tiny_folders["gemma3"], adapters, plan, text))


def served_logits(folder: Path, adapters: list[AdapterWeights], plan: Plan, text: str) -> torch.Tensor:
    """Return the logits (V,) after the prompt, from the server's engine."""
    by_digest = {weights.weights_digest: weights for weights in adapters}
    with ThreadPoolExecutor(1) as executor:
        engine = Engine(tiny_config(folder, max_model_len=256), lambda digest: executor.submit(by_digest.get, digest))
        found: list[Delta | Exception] = []
        job = Job("0", text, plan, SamplingParams(max_tokens=1, temperature=0))
        engine.submit(engine.prepare(job, found.append, capture_first_logits=True))
        engine.run_until_idle()
    assert isinstance(found[-1], Delta) and found[-1].first_logits is not None
    return found[-1].first_logits


def test_weights_are_found_without_gradients_and_stay_bounded() -> None:
    target = torch.tensor([1.4, -0.5, 0.0, 0.8])
    best, lowest = search_weights(lambda w: float((w - target).square().sum()), 4, num_steps=300)
    assert (best - target).abs().max() < 0.2 and lowest < 0.15
    far, _ = search_weights(lambda w: float((w - 9).square().sum()), 2, num_steps=200)
    assert far.abs().max() <= 1.5


def test_the_search_starts_from_the_base_model_and_makes_as_many_attempts_as_allowed() -> None:
    tried: list[torch.Tensor] = []

    def loss_of(weights: torch.Tensor) -> float:
        tried.append(weights)
        return float((weights - 1).square().sum())

    best, lowest = search_weights(loss_of, 20, num_steps=40)
    assert torch.equal(tried[0], torch.zeros(20)) and len(tried) == 40
    assert any(best is weights for weights in tried) and lowest < 20
    still, _ = search_weights(lambda w: float(w.abs().sum()), 20, num_steps=40)
    assert torch.equal(still, torch.zeros(20))
