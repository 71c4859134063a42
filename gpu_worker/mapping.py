"""The mapping matrix of one step, and the rank-space composition it drives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.attention_plan import AttentionPlan
from gpu_worker.residency import Residency
from lora_store.plan import Plan


@dataclass(frozen=True, slots=True)
class TokenMapping:
    """The mapping matrix, expanded to tokens. Dims: N tokens, P active rank rows, R widest adapter's rank.

    weights (N, P): m_bs of the token's row at every rank row of adapter s, 0 elsewhere.
    by_rank (P, R): 1 where a rank row holds rank index r of its adapter.
    fusion (N, 1): tokens whose plan is a fusion; None when no token's is.
    """

    weights: Tensor
    member: Tensor  # (N, P) bool, weights != 0
    by_rank: Tensor
    fusion: Tensor | None


class StepContext:
    """The one mutable object a forward pass reads: who is composed of what, and where every token's KV lives.

    The engine fills it before each forward pass; `LoraLinear` and the attention function read it.
    """

    def __init__(self) -> None:
        self._mapping: TokenMapping | None = None
        self._attention: AttentionPlan | None = None

    def fill(self, mapping: TokenMapping | None, attention: AttentionPlan) -> None:
        """Set up the next forward pass; `mapping` is None when no token of the step has an adapter."""
        self._mapping, self._attention = mapping, attention

    @property
    def has_adapters(self) -> bool:
        return self._mapping is not None

    @property
    def attention(self) -> AttentionPlan:
        assert self._attention is not None, "the step context was not filled"
        return self._attention

    def compose(self, h: Tensor) -> Tensor:
        """The step between the two LoRA products: (N, P) -> (N, P).

        mixture, selection:  h_s <- m_bs h_s
        fusion:              u = sum_s m_bs h_s by rank index;  h_s <- m_bs u
        Values of adapters that are not in a token's plan are dropped, not multiplied by zero: an adapter
        that overflows can spoil only its own rows.
        Source: LoraRetriever (ACL Findings 2024), section 4.3, contracted at rank level.
        """
        mapping = self._mapping
        assert mapping is not None, "compose is called only where has_adapters"
        mixed = torch.where(mapping.member, h * mapping.weights, 0)
        if mapping.fusion is None:
            return mixed
        u = mixed.masked_fill(~mapping.fusion, 0) @ mapping.by_rank  # (N, R)
        fused = torch.where(mapping.member, (u @ mapping.by_rank.T) * mapping.weights, 0)
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
    weights = rows.repeat_interleave(repeats, dim=0).to(dtype)
    is_fusion = torch.tensor([plan.strategy == "fusion" for plan in plans])
    fusion = is_fusion.repeat_interleave(repeats)[:, None] if bool(is_fusion.any()) else None
    return TokenMapping(weights, weights != 0, by_rank, fusion)
