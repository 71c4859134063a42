"""The mapping matrix of one step, and the rank-space composition it drives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.attention_plan import AttentionPlan
from gpu_worker.bank import InputBank
from gpu_worker.residency import Residency
from gpu_worker.transfer import to_device
from lora_store.plan import Plan


@dataclass(frozen=True, slots=True)
class TokenMapping:
    """The mapping matrix, expanded to tokens. Dims: N tokens, P active rank rows, R widest adapter's rank.

    weights (P, 1, N): m_bs of the token's row at every rank row of adapter s, 0 elsewhere.
    by_rank (P, R): 1 where a rank row holds rank index r of its adapter.
    fusion (N,): tokens whose plan is a fusion; None when no token's is.
    """

    weights: Tensor
    absent: Tensor  # (P, 1, N) bool, weights == 0
    by_rank: Tensor
    fusion: Tensor | None

    def to(self, device: torch.device) -> TokenMapping:
        """The same on `device`."""
        return TokenMapping(
            to_device(self.weights, device),
            to_device(self.absent, device),
            to_device(self.by_rank, device),
            None if self.fusion is None else to_device(self.fusion, device),
        )


class StepContext:
    """The one mutable object a forward pass reads: who is composed of what, and where every token's KV lives.

    The engine fills it before each forward pass; `LoraLinear` and the attention function read it.
    """

    def __init__(self) -> None:
        self._mapping: TokenMapping | None = None
        self._attention: AttentionPlan | None = None
        self._last: tuple[Tensor, InputBank, Tensor] | None = None  # the input composed last, by what, and into what

    def fill(self, mapping: TokenMapping | None, attention: AttentionPlan) -> None:
        """Set up the next forward pass; `mapping` is None when no token of the step has an adapter."""
        self._mapping, self._attention, self._last = mapping, attention, None

    @property
    def has_adapters(self) -> bool:
        return self._mapping is not None

    @property
    def attention(self) -> AttentionPlan:
        assert self._attention is not None, "the step context was not filled"
        return self._attention

    def composed(self, x: Tensor, bank: InputBank) -> Tensor:
        """compose(A · x) for all M modules of `bank`: (..., N, I) -> (P, M, N); once for modules called in turn."""
        if self._last is None or self._last[0] is not x or self._last[1] is not bank:
            h = (bank.a @ x.flatten(0, -2).T).view(-1, bank.num_modules, x.shape[-2])
            self._last = x, bank, self.compose(h)
        return self._last[2]

    def compose(self, h: Tensor) -> Tensor:
        """The step between the two LoRA products: (P, M, N) -> (P, M, N). `h` may be changed in place.

        mixture, selection:  h_s <- m_bs h_s
        fusion:              u = sum_s m_bs h_s by rank index;  h_s <- m_bs u
        Values of adapters that are not in a token's plan are dropped, not multiplied by zero: an adapter
        that overflows can spoil only its own rows.
        Source: LoraRetriever (ACL Findings 2024), section 4.3, contracted at rank level.
        """
        mapping = self._mapping
        assert mapping is not None, "compose is called only where has_adapters"
        mixed = h.mul_(mapping.weights).masked_fill_(mapping.absent, 0)
        if mapping.fusion is None:
            return mixed
        summed = mixed.masked_fill(~mapping.fusion, 0).flatten(1)
        u = mapping.by_rank @ (mapping.by_rank.T @ summed)  # (P, M · N), by way of (R, M · N)
        fused = u.view_as(mixed).mul_(mapping.weights).masked_fill_(mapping.absent, 0)
        return torch.where(mapping.fusion, fused, mixed)


def token_mapping(
    plans: Sequence[Plan], num_tokens: Sequence[int], residency: Residency, dtype: torch.dtype
) -> TokenMapping | None:
    """The mapping matrix for rows with these plans, row b standing for `num_tokens[b]` adjacent tokens.

    Every adapter of every plan must be active in `residency`. None when all plans are the base model.
    """
    if all(plan.strategy == "base" for plan in plans):
        return None
    rows = torch.zeros(len(plans), residency.active_rows)
    for b, plan in enumerate(plans):
        for adapter in plan.adapters:
            rows[b, residency.rows(adapter.weights_digest)] = adapter.weight
    rank_of = torch.tensor(residency.rank_indices())
    by_rank = torch.nn.functional.one_hot(rank_of, int(rank_of.max()) + 1).to(dtype)
    repeats = torch.tensor(num_tokens)
    weights = rows.repeat_interleave(repeats, dim=0).T.to(dtype).contiguous()[:, None]
    is_fusion = torch.tensor([plan.strategy == "fusion" for plan in plans])
    fusion = is_fusion.repeat_interleave(repeats) if bool(is_fusion.any()) else None
    return TokenMapping(weights, weights == 0, by_rank, fusion)
