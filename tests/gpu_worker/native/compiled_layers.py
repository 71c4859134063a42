"""Requests to engines with compiled layers, and the logits of all their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpu_worker.front.request.request import Job
from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import by_digest, greedy, only, run_together
from tests.tiny import plan_of, tiny_config

NUM_LAYERS = 3
NUM_NEW = 12
MakeBf16 = Callable[..., Engine]


def randomise(model: nn.Module) -> None:
    """Give every norm and bias values of its own: new models have zeros or ones, so that one could replace another."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def jobs_of(pool: list[AdapterWeights]) -> list[Job]:
    """Return requests of every strategy, with prompts on both sides of the tiny models' window of 12 tokens."""
    one, other = pool
    parts = (one, 0.7), (other, 0.6)
    plans = [BASE_PLAN, only(one), only(other), plan_of("mixture", *parts), plan_of("fusion", *parts), BASE_PLAN]
    prompts = ["a", "the quick brown fox", "0123456789" * 3, "x y", "lorem ipsum", "what is it?"]
    return [
        greedy(prompt, plan, number, NUM_NEW) for number, (prompt, plan) in enumerate(zip(prompts, plans, strict=True))
    ]


def logits_of(engine: Engine, jobs: list[Job]) -> list[Tensor]:
    """Run the jobs together and return the logits of every step."""
    steps, compute = list[Tensor](), engine._forward.logits

    def recorded(*arguments: Any) -> Tensor:
        logits = compute(*arguments)
        steps.append(logits.clone())
        return logits

    engine._forward.logits = recorded  # type: ignore[method-assign]
    answers = run_together(engine, jobs)
    assert [len(answer.tokens) for answer in answers] == [job.sampling.max_tokens for job in jobs]
    return steps


def assert_as_parts(make_bf16: MakeBf16, pool: list[AdapterWeights], jobs: list[Job], **changes: Any) -> None:
    """Check that compiled layers and their parts give the same logits in every step. `base`: a folder to load."""
    folder, found = changes.pop("base", None), list[list[Tensor]]()
    for compiles in (True, False):
        base = {} if folder is None else {"base": load_base_model(tiny_config(folder, dtype="bfloat16"))}
        found.append(logits_of(make_bf16(by_digest(*pool), compiles=compiles, **base, **changes), jobs))
    for step, (one, other) in enumerate(zip(*found, strict=True)):
        assert torch.equal(one, other), f"step {step}"
