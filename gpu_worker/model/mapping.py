"""Choose the cheaper way to compute a step's LoRA products."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_worker.bank.residency import Residency
from gpu_worker.model.dense_mapping import dense_mapping
from gpu_worker.model.grouped_mapping import grouped_mapping, num_pair_values
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.model.step_context import Composition
from lora_store.plan import Plan

# Measured: docs/benchmarks/index.md, "Dense or grouped".
_VALUE_COST = 1.8  # grouped cost of one rank row for one token, relative to the dense cost
_DENSE_OVERHEAD = 6000  # fixed cost of the dense products, in the same units
_MOVE_COST = 100  # moving one bank row costs this, in the same units


def composition(
    plans: Sequence[Plan],
    num_tokens: Sequence[int],
    residency: Residency,
    dtype: torch.dtype,
    kernel: LoraKernel | None,
    device: torch.device,
) -> Composition | None:
    """Return the composition for rows with these plans, where row b has `num_tokens[b]` adjacent tokens.

    Every adapter of every plan must be active in `residency`. Return None if all plans are the base model.
    The dense products cost tokens · active rank rows, and read these from the bank's prefix: rows elsewhere are moved
    there first. The grouped ones depend only on the adapters in the plans.
    """
    if all(plan.strategy == "base" for plan in plans):
        return None
    if kernel is not None:
        dense_cost = _DENSE_OVERHEAD + sum(num_tokens) * residency.active_rows + _MOVE_COST * residency.num_misplaced
        if _VALUE_COST * num_pair_values(plans, num_tokens, residency) <= dense_cost:
            return grouped_mapping(plans, num_tokens, residency, kernel)
    residency.pack()
    return dense_mapping(plans, num_tokens, residency, dtype, device)


class Composer:
    """Makes the composition of every step. Rows that decode again keep theirs until an adapter joins or leaves."""

    def __init__(
        self, residency: Residency, dtype: torch.dtype, kernel: LoraKernel | None, device: torch.device
    ) -> None:
        self._residency, self._parts = residency, (dtype, kernel, device)
        self._last: tuple[tuple[object, ...], Composition | None] | None = None  # cache: the last step and its result

    def __call__(self, plans: Sequence[Plan], num_tokens: Sequence[int]) -> Composition | None:
        step = list(plans), list(num_tokens), self._residency.num_changes
        if self._last is None or self._last[0] != step:
            self._last = None  # rows may move before an error
            self._last = step, composition(plans, num_tokens, self._residency, *self._parts)
        return self._last[1]
