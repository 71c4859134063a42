"""Add the adapters of each token's plan to fused experts, whose weights are parameters (E, O, I) and no linear layers.

A token's experts differ from its neighbour's, so products are grouped by expert and adapter: the tokens of a pair are
multiplied together. Dims: N tokens, E experts, K experts of a token, R rank, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from gpu_worker.bank.device_layout import DeviceModule
from gpu_worker.bank.residency import RowAssignment
from gpu_worker.model.step_context import ExpertComposition, StepContext
from lora_store.adapter import Shapes
from lora_store.peft_config import EXPERT_PARAMETERS
from lora_store.plan import Plan

_GATE_UP, _DOWN = EXPERT_PARAMETERS


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with fused experts that adapters may change, by path: gated ones without biases."""
    return {path: module for path, module in model.named_modules() if _is_known(module)}


def _is_known(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != set(EXPERT_PARAMETERS) or any(parameter.ndim != 3 for parameter in own.values()):
        return False
    # What transformers' decorator of such classes says of them.
    others = ("has_bias", "is_transposed", "has_post_expert_norm")
    is_gated = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    return is_gated and not any(getattr(module, name, True) for name in others)


def expert_shapes(experts: Mapping[str, nn.Module]) -> Shapes:
    """Return (out, in, experts) of each parameter, by its path."""
    found = {}
    for path, module in experts.items():
        for name in EXPERT_PARAMETERS:
            num, num_out, num_in = module.get_parameter(name).shape
            found[f"{path}.{name}"] = num_out, num_in, num
    return found


def most_expert_bytes(shapes: Shapes, dtype: torch.dtype, *, num_rows: int, limit: int, least_rows: int = 0) -> int:
    """Return the most bytes that adapters in the bank may have for experts: `limit`, at most those of the bank's rows.

    `least_rows`: rows that must fit in any case, such as those of the check at start.
    """
    row_bytes = sum(math.prod(num) * (num_out + num_in) for num_out, num_in, *num in shapes.values() if num)
    return min(max(limit, least_rows * row_bytes * dtype.itemsize), num_rows * row_bytes * dtype.itemsize)


class ExpertMapping:
    """The adapters of a step that have experts, and each token's weights of them. Dims: S adapters, N tokens.

    `weights` (S, N): 0 where an adapter is not in the token's plan. `is_fusion` (N,): the plan averages parameters.
    """

    def __init__(self, adapters: Sequence[Mapping[str, DeviceModule]], weights: Tensor, is_fusion: Tensor) -> None:
        self._adapters, self._weights, self._is_fusion = adapters, weights, is_fusion
        self._names = {name for modules in adapters for name in modules}

    def __contains__(self, name: object) -> bool:
        """Return whether an adapter of the step has this parameter."""
        return name in self._names

    def find_tokens(self, names: Collection[str]) -> Tensor:
        """Return the step's tokens (T,) that have an adapter with one of these parameters in their plan."""
        has_any = [any(name in modules for name in names) for modules in self._adapters]
        return (self._weights[has_any] != 0).any(dim=0).nonzero()[:, 0]

    def add(self, name: str, expert: int, tokens: Tensor, x: Tensor, y: Tensor) -> None:
        """Add the adapters' products of one expert to y (T, O) in place. `tokens` (T,): the step's; x (T, I).

        sum of outputs:         y += sum_s m_s (x A_s) B_s
        average of parameters:  y += sum_s m_s u B_s  with  u = sum_s m_s x A_s by rank index
        Source: LoraRetriever (ACL Findings 2024), section 4.3.
        """
        parts = []
        for modules, of_adapter in zip(self._adapters, self._weights, strict=True):
            weights = of_adapter[tokens]
            rows = weights.nonzero()[:, 0]  # an adapter that overflows must not reach other tokens
            if name in modules and len(rows):
                a, bt = (each[expert].to(x.device) for each in (modules[name].a, modules[name].bt))
                weights = weights[rows, None]
                parts.append((rows, weights, (x[rows] @ a.T).float() * weights, bt))
        is_fusion = self._is_fusion[tokens]
        u = torch.zeros(len(tokens), max((len(bt) for *_, bt in parts), default=0), device=x.device)
        if bool(is_fusion.any()):
            for rows, _, h, _ in parts:
                u[:, : h.shape[1]].index_add_(0, rows, h)
        for rows, weights, h, bt in parts:
            mixed = torch.where(is_fusion[rows, None], weights * u[rows, : h.shape[1]], h)
            y.index_add_(0, rows, mixed.to(bt.dtype) @ bt)


def expert_mapping(
    plans: Sequence[Plan], num_tokens: Sequence[int], residency: RowAssignment, device: torch.device
) -> ExpertMapping | None:
    """Return the mapping for rows with these plans, where row b has `num_tokens[b]` adjacent tokens.

    Return None if no plan has an adapter with experts. Adapters are in the order of their digests, so a row's sums have
    one order in every batch.
    """
    used = {adapter.weights_digest for plan in plans for adapter in plan.adapters}
    order = sorted(used & residency.experts.keys())
    if not order:
        return None
    weights = torch.zeros(len(order), len(plans))
    for b, plan in enumerate(plans):
        for adapter in plan.adapters:
            if adapter.weights_digest in residency.experts:
                weights[order.index(adapter.weights_digest), b] = adapter.weight
    repeats = torch.tensor(num_tokens)
    is_fusion = torch.tensor([plan.averages_parameters for plan in plans]).repeat_interleave(repeats)
    return ExpertMapping(
        [residency.experts[digest] for digest in order],
        weights.repeat_interleave(repeats, dim=1).to(device),
        is_fusion.to(device),
    )


class LoraExperts:
    """The `forward` of fused experts: the module's own, or in steps with adapters on experts one expert at a time."""

    def __init__(self, own: nn.Module, path: str, step: StepContext) -> None:
        self._module, self._forward, self._step = own, own.forward, step
        self._gate_up, self._down = f"{path}.{_GATE_UP}", f"{path}.{_DOWN}"

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts (N, O). `hidden_states` (N, I), the others (N, K)."""
        mapping = self._step.experts
        if mapping is None or not (self._gate_up in mapping or self._down in mapping):
            computed: Tensor = self._forward(hidden_states, top_k_index, top_k_weights)
            return computed
        gate_up, down = (self._module.get_parameter(name) for name in EXPERT_PARAMETERS)
        apply_gate = cast("Callable[[Tensor], Tensor]", self._module._apply_gate)
        return compute_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            tokens=torch.arange(len(hidden_states), device=hidden_states.device),
            names=(self._gate_up, self._down),
            weights_of=lambda expert: (gate_up[expert], down[expert]),
            apply_gate=apply_gate,
            mapping=mapping,
        )


def compute_experts(
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
    *,
    tokens: Tensor,
    names: tuple[str, str],
    weights_of: Callable[[int], tuple[Tensor, Tensor]],
    apply_gate: Callable[[Tensor], Tensor],
    mapping: ExpertComposition,
) -> Tensor:
    """Return the weighted sum of each row's experts (T, I) with the adapters of its plan, one expert after the other.

    `x` (T, I); `chosen`, `shares` (T, K): the experts of each row and their weights; `tokens` (T,): the rows' places in
    the step. `names`: of both parameters in adapters. `weights_of`: returns those of one expert.
    """
    y = torch.zeros(x.shape, device=x.device)  # float32, as transformers sums
    for expert in sorted(set(chosen.flatten().tolist())):
        rows, places = torch.where(chosen == expert)
        (gate_up, down), inputs = weights_of(expert), x[rows]
        inner = nn.functional.linear(inputs, gate_up)
        mapping.add(names[0], expert, tokens[rows], inputs, inner)
        inner = apply_gate(inner)
        outer = nn.functional.linear(inner, down)
        mapping.add(names[1], expert, tokens[rows], inner, outer)
        y.index_add_(0, rows, outer.float() * shares[rows, places, None].float())
    return y.to(x.dtype)


def adapt_experts(experts: Mapping[str, nn.Module], step: StepContext) -> None:
    """Let the modules add the adapters of each step."""
    for path, module in experts.items():
        module.forward = LoraExperts(module, path, step)
