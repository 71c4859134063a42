"""Compose adapters with two dense products over all active rank rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.bank.bank import InputBank, ModuleBank
from gpu_worker.bank.residency import Residency
from gpu_worker.model.step_context import Outputs
from gpu_worker.model.transfer import to_device
from lora_store.plan import Plan


class DenseMapping:
    """The mapping matrix, expanded to tokens. Dims: N tokens, P active rank rows, R rank of the widest adapter.

    weights (P, 1, N): m_bs of the token's row at every rank row of adapter s, 0 elsewhere.
    by_rank (P, R): 1 where a rank row holds rank index r of its adapter.
    fusion (N,): True for tokens whose plan is a fusion; None if no plan is.
    """

    def __init__(self, weights: Tensor, by_rank: Tensor, fusion: Tensor | None) -> None:
        self._weights, self._absent = weights, weights == 0
        self._by_rank, self._fusion = by_rank, fusion
        self._last: tuple[Tensor, InputBank, Tensor] | None = (
            None  # cache: last input, its bank, and the composed values
        )

    def add(self, x: Tensor, outputs: Outputs) -> None:
        for y, bank in outputs:
            self._add(x, y, bank)

    def _add(self, x: Tensor, y: Tensor, bank: ModuleBank) -> None:
        y.flatten(0, -2).addmm_(self._composed(x, bank.inputs)[:, bank.index].T, bank.bt)

    def _composed(self, x: Tensor, bank: InputBank) -> Tensor:
        """Return compose(A · x) for all M modules of `bank`: (..., N, I) -> (P, M, N). Computed once per input."""
        if self._last is None or self._last[0] is not x or self._last[1] is not bank:
            h = (bank.a @ x.flatten(0, -2).T).view(-1, bank.num_modules, x.shape[-2])
            self._last = x, bank, self._compose(h)
        return self._last[2]

    def _compose(self, h: Tensor) -> Tensor:
        """Mix rank values between the two LoRA products: (P, M, N) -> (P, M, N). Changes `h` in place.

        sum of outputs:         h_s <- m_bs h_s
        average of parameters:  u = sum_s m_bs h_s by rank index;  h_s <- m_bs u
        Values of adapters outside a token's plan are dropped, not multiplied by zero: an adapter that overflows
        affects only its own rows.
        Source: LoraRetriever (ACL Findings 2024), section 4.3, contracted at rank level.
        """
        mixed = h.mul_(self._weights).masked_fill_(self._absent, 0)
        if self._fusion is None:
            return mixed
        summed = mixed.masked_fill(~self._fusion, 0).flatten(1)
        u = self._by_rank @ (self._by_rank.T @ summed)  # (P, M · N), by way of (R, M · N)
        fused = u.view_as(mixed).mul_(self._weights).masked_fill_(self._absent, 0)
        return torch.where(self._fusion, fused, mixed)


def dense_mapping(
    plans: Sequence[Plan], num_tokens: Sequence[int], residency: Residency, dtype: torch.dtype, device: torch.device
) -> DenseMapping:
    """Return the mapping for rows with these plans, where row b has `num_tokens[b]` adjacent tokens."""
    rows = torch.zeros(len(plans), residency.active_rows)
    for b, plan in enumerate(plans):
        for adapter in plan.adapters:
            rows[b, residency.rows(adapter.weights_digest)] = adapter.weight
    rank_of = torch.tensor(residency.rank_indices())
    by_rank = torch.nn.functional.one_hot(rank_of, int(rank_of.max()) + 1).to(dtype)
    repeats = torch.tensor(num_tokens)
    weights = rows.repeat_interleave(repeats, dim=0).T.to(dtype).contiguous()[:, None]
    is_fusion = torch.tensor([plan.averages_parameters for plan in plans])
    fusion = to_device(is_fusion.repeat_interleave(repeats), device) if bool(is_fusion.any()) else None
    return DenseMapping(to_device(weights, device), to_device(by_rank, device), fusion)
