"""The paper's trained baselines: a router over one adapter per cluster (MoE, SMEAR), and LoRAHub's weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper.training.experts import ExpertModel
from benchmarks.training.lora_training import AnswerLoss, Example, Padded

_BATCH = 8


@dataclass(frozen=True, slots=True)
class RouterKind:
    """Kind of router. `num_chosen` None weighs all experts (soft, SMEAR); otherwise the best few, with Gumbel noise."""

    num_chosen: int | None = None
    temperature: float = 1.0
    learning_rate: float = 0.02
    num_steps: int = 120
    seed: int = 0


class Router(nn.Module):
    """R(x) = softmax(W_g e(x)), e(x) the encoder's unit vector of the prompt.

    The paper's router reads each layer's input; this one reads the prompt once, so that its weights form a plan that
    the server can run. Source: LoraRetriever (ACL Findings 2024), appendix F.
    """

    def __init__(self, dim: int, num_experts: int, kind: RouterKind) -> None:
        super().__init__()
        self._kind = kind
        self.gate = nn.Linear(dim, num_experts, bias=False)
        nn.init.zeros_(self.gate.weight)

    def forward(self, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return weights (B, P) of prompts (B, D); each row sums to 1. With a generator, add noise as in training."""
        return sparse_weights(self.gate(vectors), self._kind, generator)


def sparse_weights(logits: Tensor, kind: RouterKind, noise: torch.Generator | None = None) -> Tensor:
    """Return weights of logits (..., P): softmax, or its best few, with Gumbel noise if there is a generator."""
    if kind.num_chosen is None:
        return F.softmax(logits, dim=-1)
    if noise is not None:
        uniform = torch.rand(logits.shape, generator=noise).clamp(1e-9, 1 - 1e-9)
        logits = (F.log_softmax(logits, dim=-1) - (-uniform.log()).log()) / kind.temperature
    soft = F.softmax(logits, dim=-1)
    chosen = soft.topk(min(kind.num_chosen, soft.shape[-1]), dim=-1).indices
    kept = soft * torch.zeros_like(soft).scatter(-1, chosen, 1.0)
    sparse = kept / kept.sum(dim=-1, keepdim=True)
    return sparse.detach() + soft - soft.detach()  # use the soft weights' gradient: a single chosen expert has none


def train_router(
    model: ExpertModel,
    examples: Sequence[Example],
    vectors: Tensor,
    loss_of: AnswerLoss,
    num_experts: int,
    kind: RouterKind,
    on_step: Callable[[float], None],
) -> Router:
    """Train a router for `num_steps` batches of `examples`, whose prompts have `vectors` (N, D). Freeze all else."""
    router = Router(vectors.shape[1], num_experts, kind)
    optimizer = torch.optim.Adam(router.parameters(), lr=kind.learning_rate)
    noise = torch.Generator().manual_seed(kind.seed)
    for _, rows in zip(range(kind.num_steps), shuffled(len(examples), kind.seed), strict=False):
        weights = router(vectors[rows], noise)
        loss = model.loss(Padded().batch([examples[row] for row in rows]), weights, loss_of)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step(loss.item())
    return router


def shuffled(count: int, seed: int) -> Iterator[list[int]]:
    """Yield shuffled batches of row numbers without end."""
    draw = random.Random(seed)
    while True:
        order = draw.sample(range(count), count)
        yield from (order[start : start + _BATCH] for start in range(0, count - _BATCH + 1, _BATCH))


def search_weights(
    loss_of: Callable[[Tensor], float], num_adapters: int, num_steps: int, bound: float = 1.5
) -> tuple[Tensor, float]:
    """Return (weights, their loss), the best of at most `num_steps` attempts without gradients.

    The first attempt has all weights 0, which is the base model. |w| <= `bound`, and 0.05 times the mean |w| is added
    to the loss. Source: LoRAHub, which calls nevergrad's NGOpt with 40 steps. For 20 weights and 40 steps one after the
    other NGOpt is COBYLA, so this calls SciPy's, with a first step of a sixth of the weights' range as there.
    """
    attempts: list[tuple[float, Tensor]] = []

    def objective(found: np.ndarray) -> float:
        weights = torch.from_numpy(found).float().clamp(-bound, bound)
        if len(attempts) < num_steps:
            attempts.append((loss_of(weights) + 0.05 * float(weights.abs().mean()), weights))
        return attempts[-1][0]

    options = {"maxiter": num_steps, "rhobeg": bound / 3}
    bounds = [(-bound, bound)] * num_adapters
    minimize(objective, np.zeros(num_adapters), method="COBYLA", bounds=bounds, options=options)
    lowest, best = min(attempts, key=lambda attempt: attempt[0])
    return best, lowest
