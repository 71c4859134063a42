"""Routers as in the papers of MoE and SMEAR: each linear layer weighs the experts by its own input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper.training.experts import Sum
from benchmarks.paper.training.routers import RouterKind, shuffled, sparse_weights
from benchmarks.training.lora_training import NO_LABEL, AnswerLoss, Example, FrozenLinear, Padded
from lora_store import AdapterWeights


class Reading:
    """The input that all layers process. `prompt` (B, T): its prompt tokens; None for tokens after the prompt."""

    def __init__(self) -> None:
        self.prompt: Tensor | None = None
        self.noise: torch.Generator | None = None


class RoutedLinear(nn.Module):
    """A frozen linear layer, P adapters with scalings folded into B, and a gate W_g.

    mixture: y = W x + Σ_p g_p B_p A_p x with g = R(W_g x), for each token.
    fusion: y = W x + (Σ_p g_p B_p)(Σ_p g_p A_p) x with g = R(W_g m), m the mean of the prompt's tokens; later tokens
    keep the prompt's g. R: softmax, or its largest entries.
    Dims: B prompts, T tokens, I in, O out, R rank. `lora_a` (P, R, I), `lora_b` (P, O, R).
    Source: LoraRetriever (ACL Findings 2024), appendix F; SMEAR (arXiv 2306.03745), section 3.
    """

    def __init__(
        self, base: FrozenLinear, lora_a: Tensor, lora_b: Tensor, how: Sum, kind: RouterKind, reading: Reading
    ) -> None:
        super().__init__()
        self.base, self._how, self._kind, self._reading = base, how, kind, reading
        self._a, self._b = lora_a, lora_b
        self._kept = torch.empty(0)  # the prompt's weights (B, P)
        self.gate = nn.Parameter(torch.zeros(len(lora_a), base.in_features))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, I) -> (B, T, O)
        y: Tensor = self.base(x)
        if self._how == "mixture":
            weights = sparse_weights(x @ self.gate.T, self._kind, self._reading.noise)  # (B, T, P)
            h = torch.einsum("bti,pri->btpr", x, self._a) * weights[..., None]
            return y + torch.einsum("btpr,por->bto", h, self._b)
        g = self._of_prompt(x)
        merged_a, merged_b = torch.einsum("bp,pri->bri", g, self._a), torch.einsum("bp,por->bor", g, self._b)
        return y + (x @ merged_a.mT) @ merged_b.mT

    def _of_prompt(self, x: Tensor) -> Tensor:
        prompt = self._reading.prompt
        if prompt is None or prompt.shape != x.shape[:2]:  # a token after the prompt
            return self._kept
        share = prompt / prompt.sum(dim=1, keepdim=True)
        mean = torch.einsum("bt,bti->bi", share, x)
        weights = sparse_weights(mean @ self.gate.T, self._kind, self._reading.noise)
        self._kept = weights.detach()
        return weights


class LayerRouted:
    """`model` with routed experts. Its linear layers must be FrozenLinear; it is changed in place."""

    def __init__(self, model: nn.Module, experts: Sequence[AdapterWeights], how: Sum, kind: RouterKind) -> None:
        self.model, self.kind, self.reading = model, kind, Reading()
        self._layers: dict[str, RoutedLinear] = {}
        for name in experts[0].modules:
            parts = [expert.modules[name] for expert in experts]
            lora_a = torch.stack([part.lora_a.float() for part in parts])
            lora_b = torch.stack([part.lora_b.float() * part.scaling for part in parts])
            base = model.get_submodule(name)
            frozen = base.base if isinstance(base, RoutedLinear) else base
            assert isinstance(frozen, FrozenLinear), name
            self._layers[name] = RoutedLinear(frozen, lora_a, lora_b, how, kind, self.reading)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, self._layers[name])

    def gates(self) -> dict[str, Tensor]:
        """Return all trained parameters by name."""
        return {name: layer.gate for name, layer in self._layers.items()}

    def load_gates(self, gates: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, gate in self.gates().items():
                gate.copy_(gates[name])


def train_layers(
    routed: LayerRouted, examples: Sequence[Example], loss_of: AnswerLoss, on_step: Callable[[float], None]
) -> None:
    """Train the gates for `num_steps` batches of `examples`. Base and adapters do not change."""
    kind, gates, decoder = routed.kind, list(routed.gates().values()), routed.model.get_submodule("model")
    optimizer = torch.optim.Adam(gates, lr=kind.learning_rate)
    routed.reading.noise = torch.Generator().manual_seed(kind.seed)
    for _, rows in zip(range(kind.num_steps), shuffled(len(examples), kind.seed), strict=False):
        batch = Padded().batch([examples[row] for row in rows])
        routed.reading.prompt = prompt_mask(batch.labels)
        loss = loss_of(batch.read_by(decoder), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(gates, 1.0)
        optimizer.step()
        on_step(loss.item())
    routed.reading.noise = None


def prompt_mask(labels: Tensor) -> Tensor:
    """Return (B, T), 1 for tokens up to the one whose label is the answer's first token."""
    answered = (labels != NO_LABEL).long().cumsum(dim=1)
    return F.pad((answered == 0).float(), (1, -1), value=1.0)
