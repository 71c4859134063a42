"""Compose adapters one by one: list the tokens of each adapter, so that its rows are read once for all of them."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.bank.bank import InputBank
from gpu_worker.bank.residency import Residency
from gpu_worker.model.lora_kernel import LoraKernel, Pairs, Run
from gpu_worker.model.step_context import Outputs
from lora_store.plan import Plan

RUN_TOKENS = 8  # a row with at least so many tokens is a run (`grouped_lora.cpp`)


class GroupedMapping:
    """The (token, adapter) pairs of a step, for the compiled kernel. Rows of other adapters are never read.

    h of a pair: the rank values of its adapter in float32, m_bs (x · A_s), or m_bs u for a fusion.
    """

    def __init__(self, kernel: LoraKernel, pairs: Pairs) -> None:
        self._kernel, self._pairs = kernel, pairs
        self._last: tuple[Tensor, InputBank] | None = None  # cache: last input and its bank
        self._h = torch.empty(0)

    def add(self, x: Tensor, outputs: Outputs) -> None:
        inputs = outputs[0][1].inputs
        if self._last is not None and self._last[0] is x and self._last[1] is inputs:
            self._kernel.add(self._pairs, self._h, outputs, x=None)
            return
        self._reserve(inputs.num_modules)
        self._last = x, inputs
        self._kernel.add(self._pairs, self._h, outputs, x=x)

    def arguments(self, num_modules: int) -> tuple[int, Tensor]:
        """Return the address of the pairs, and memory for h of so many modules, for a caller of the kernel."""
        self._reserve(num_modules)
        self._last = None  # the caller overwrites h
        return ctypes.addressof(self._pairs), self._h

    def _reserve(self, num_modules: int) -> None:
        if self._h.numel() < (num_values := num_modules * self._pairs.h_len):
            self._h = torch.empty(num_values)


@dataclass(slots=True)
class _Tokens:
    """The tokens of one adapter, as slots, and the adapter's weight for each."""

    slots: list[NDArray[np.int32]]
    weights: list[NDArray[np.float32]]
    num: int = 0

    def add(self, slots: NDArray[np.int32], weight: float) -> int:
        """Add the tokens of a row. Return how many were there before."""
        before, self.num = self.num, self.num + len(slots)
        self.slots.append(slots)
        self.weights.append(np.full(len(slots), weight, dtype=np.float32))
        return before


def grouped_mapping(
    plans: Sequence[Plan], num_tokens: Sequence[int], residency: Residency, kernel: LoraKernel
) -> GroupedMapping:
    """Return the mapping for rows with these plans, where row b has `num_tokens[b]` adjacent tokens.

    Adapters are in the order of their digests, so a row's sums have one order in every batch. Rows of few tokens have
    the first slots.
    """
    starts = np.cumsum([0, *num_tokens], dtype=np.int32)
    slot_tokens, is_fusion = [], []
    of_adapter: defaultdict[str, _Tokens] = defaultdict(lambda: _Tokens([], []))
    runs: list[tuple[int, dict[str, int]]] = []  # number of tokens, and for each adapter the number of earlier ones
    num_slots = 0
    for b in sorted(range(len(plans)), key=lambda b: num_tokens[b] >= RUN_TOKENS):
        adapters = [adapter for adapter in plans[b].adapters if adapter.weight != 0]
        if not adapters:
            continue
        slots = np.arange(num_slots, num_slots + num_tokens[b], dtype=np.int32)
        num_slots += num_tokens[b]
        slot_tokens.append(np.arange(starts[b], starts[b + 1], dtype=np.int32))
        is_fusion.append(np.full(num_tokens[b], plans[b].averages_parameters, dtype=np.uint8))
        earlier = {each.weights_digest: of_adapter[each.weights_digest].add(slots, each.weight) for each in adapters}
        if num_tokens[b] >= RUN_TOKENS:
            runs.append((num_tokens[b], earlier))
    order = {digest: number for number, digest in enumerate(sorted(of_adapter))}
    ordered = [of_adapter[digest] for digest in order]
    pairs = Pairs.of(
        slot_tokens=_joined(slot_tokens, np.int32),
        fusion=_joined(is_fusion, np.uint8),
        slots=[np.concatenate(tokens.slots) for tokens in ordered],
        weights=_joined([part for tokens in ordered for part in tokens.weights], np.float32),
        rank_rows=[residency.rows(digest) for digest in order],
        runs=[Run(num, sorted((order[digest], first) for digest, first in firsts.items())) for num, firsts in runs],
    )
    return GroupedMapping(kernel, pairs)


def num_pair_values(plans: Sequence[Plan], num_tokens: Sequence[int], residency: Residency) -> int:
    """Return the cost of the grouped products: the sum over tokens of the rank rows in their plans."""
    ranks = [sum(len(residency.rows(adapter.weights_digest)) for adapter in plan.adapters) for plan in plans]
    return sum(rank * tokens for rank, tokens in zip(ranks, num_tokens, strict=True))


def _joined(parts: Sequence[NDArray[np.generic]], dtype: type) -> NDArray[np.generic]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
