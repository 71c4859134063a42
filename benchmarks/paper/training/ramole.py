"""RAMoLE's learned gate: one more LoRA per layer weighs the retrieved adapters, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.lora_training import AnswerLoss, Example, FrozenLinear, Layout, Recipe, batches
from lora_store import AdapterWeights


class Chosen:
    """The adapters that every layer uses. `allowed` (B, P): those of each row; `fixed` (B, P): weights, no gate.

    `seen`: if it is a list, every layer adds its gate's weights (B, P) for the last token of the next input.
    """

    def __init__(self) -> None:
        self.allowed = torch.empty(0, dtype=torch.bool)
        self.fixed: Tensor | None = None
        self.seen: list[Tensor] | None = None


class GatedLinear(nn.Module):
    """A frozen linear layer, P adapters of rank R, and a gate (A_r, B_r) of rank r.

    v_p = s_p B_p A_p x; q = A_r x; k_p = B_r^T v_p; a = softmax_p(<q, k_p> / sqrt(r)) over the allowed;
    y = W x + sum_p a_p v_p. No v_p is made: <q, k_p> = <(s_p B_p^T B_r) q, A_p x>, both of R numbers.
    Dims: B rows, T tokens, I in, O out. `lora_a` (P, R, I), `lora_b` (P, O, R) with its scaling s_p folded in.
    Source: RAMoLE (arXiv 2406.16989), equations 6 to 11; that s_p is part of v_p is our reading.
    """

    def __init__(self, base: FrozenLinear, lora_a: Tensor, lora_b: Tensor, rank: int, chosen: Chosen) -> None:
        super().__init__()
        self.base, self._chosen, self._rank_of_adapters = base, chosen, lora_a.shape[1]
        self._a = lora_a.flatten(0, 1)  # (P R, I)
        self._bt = lora_b.mT.flatten(0, 1)  # (P R, O)
        self.gate_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.gate_b = nn.Parameter(torch.randn(base.out_features, rank) * 0.01)
        nn.init.kaiming_uniform_(self.gate_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, I) -> (B, T, O)
        y: Tensor = self.base(x)
        h = (x @ self._a.T).unflatten(-1, (-1, self._rank_of_adapters))  # (B, T, P, R)
        weighed = h * self.weights(x, h)[..., None]
        return y + weighed.flatten(-2) @ self._bt

    def weights(self, x: Tensor, h: Tensor) -> Tensor:
        """Return (B, T, P): the weight of each adapter for each token."""
        if self._chosen.fixed is not None:
            return self._chosen.fixed[:, None]
        u = (x @ self.gate_a.T) @ (self._bt @ self.gate_b).T  # (B, T, P R)
        scores = (h * u.view_as(h)).sum(dim=-1) / math.sqrt(len(self.gate_a))
        found = F.softmax(scores.masked_fill(~self._chosen.allowed[:, None], -math.inf), dim=-1)
        if self._chosen.seen is not None:
            self._chosen.seen.append(found[:, -1].detach())
        return found


class GatedModel:
    """`model` with all of `adapters` and gates. Its linear layers must be FrozenLinear; it is changed in place."""

    def __init__(self, model: nn.Module, adapters: Sequence[AdapterWeights], rank: int = 6, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model, self.chosen, self.num_adapters = model, Chosen(), len(adapters)
        self.layers: dict[str, GatedLinear] = {}
        for name in adapters[0].modules:
            parts = [adapter.modules[name] for adapter in adapters]
            lora_a = torch.stack([part.lora_a.float() for part in parts])
            lora_b = torch.stack([part.lora_b.float() * part.scaling for part in parts])
            base = model.get_submodule(name)
            frozen = base.base if isinstance(base, GatedLinear) else base
            assert isinstance(frozen, FrozenLinear), name
            self.layers[name] = GatedLinear(frozen, lora_a, lora_b, rank, self.chosen)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, self.layers[name])

    def gates(self) -> dict[str, Tensor]:
        """Return all trained parameters by name."""
        return {f"{name}.{key}": value for name, layer in self.layers.items() for key, value in layer.named_parameters()
                if key in ("gate_a", "gate_b")}  # fmt: skip

    def load_gates(self, gates: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.gates().items():
                value.copy_(gates[name])


@dataclass(frozen=True, slots=True)
class GateRecipe:
    """Training settings of gates. The paper gives only the share of dropped adapters; the others are ours."""

    num_steps: int = 800  # at most
    batch_tokens: int = 256
    learning_rate: float = 1e-3
    dropped: float = 0.5  # of the adapters, drawn again for every step
    least: int = 2  # adapters that are not dropped
    seed: int = 0
    window: int = 40  # steps; their mean loss decides whether the training has converged
    patience: int = 3  # windows
    least_gain: float = 0.01  # of the loss

    def has_converged(self, losses: Sequence[float]) -> bool:
        """Return whether none of the last `patience` windows has lowered the mean loss by `least_gain`."""
        if len(losses) % self.window:
            return False
        means = [sum(losses[at : at + self.window]) / self.window for at in range(0, len(losses), self.window)]
        before, last = means[: -self.patience], means[-self.patience :]
        return bool(before) and min(last) > (1 - self.least_gain) * min(before)


def train_gates(
    model: GatedModel,
    examples: Sequence[Example],
    loss_of: AnswerLoss,
    layout: Layout,
    recipe: GateRecipe,
    on_step: Callable[[float], None],
) -> None:
    """Train the gates of `model` on `examples` until they have converged. Base and adapters do not change.

    Source: RAMoLE (arXiv 2406.16989), equations 12 and 13.
    """
    draw = torch.Generator().manual_seed(recipe.seed)
    gates = list(model.gates().values())
    optimizer = torch.optim.AdamW(gates, lr=recipe.learning_rate)
    sizes = Recipe(batch_tokens=recipe.batch_tokens, seed=recipe.seed)
    decoder, model.chosen.fixed, losses = model.model.get_submodule("model"), None, list[float]()
    kept = min(model.num_adapters, max(recipe.least, round((1 - recipe.dropped) * model.num_adapters)))
    for chosen in islice(batches(examples, sizes, layout), recipe.num_steps):
        batch = layout.batch(chosen)
        allowed = torch.zeros(1, model.num_adapters, dtype=torch.bool)
        allowed[0, torch.randperm(model.num_adapters, generator=draw)[:kept]] = True
        model.chosen.allowed = allowed
        loss = loss_of(batch.read_by(decoder), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(gates, 1.0)
        optimizer.step()
        losses.append(loss.item())
        on_step(losses[-1])
        if recipe.has_converged(losses):
            break
