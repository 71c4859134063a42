"""What a worker puts into its device's memory, planned before anything is put there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gpu_worker.attention.kv_cache import KvShape
from gpu_worker.attention.kv_regions import region_bytes
from gpu_worker.config import WorkerConfig
from gpu_worker.device.device_memory import MappingLimit, free_bytes, mapping_limits
from gpu_worker.errors import WorkerConfigInvalid
from gpu_worker.lora.inject import target_linears
from gpu_worker.model.base_model import BaseModel, load_base_model

logger = logging.getLogger(__name__)

PAGE_TOKENS = {"cpu": 16, "cuda": 256}  # flash attention 2 reads pages of 256, or a multiple
_SPARE = 0.05  # of what is free: an allocator's gaps, and whoever else lives there
_LOGITS_COPIES = 4  # float32, while a token of each row is chosen
_HIDDEN_COPIES = 8  # of a step's tokens, as wide as the widest layer, in float32


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of the device: what was free when the worker came, and what becomes of it."""

    device: str
    free_bytes: int
    weights_bytes: int
    bank_bytes: int
    headroom_bytes: int
    kv: KvShape

    @property
    def kv_bytes(self) -> int:
        return self.kv.num_pages * self.kv.page_tokens * self.kv.token_bytes

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.bank_bytes + self.headroom_bytes + self.kv_bytes

    def __str__(self) -> str:
        return (
            f"weights {_mib(self.weights_bytes)} + bank {_mib(self.bank_bytes)} + head-room {_mib(self.headroom_bytes)}"
            f" + KV of {self.kv.num_pages * self.kv.page_tokens} tokens {_mib(self.kv_bytes)}"
            f" = {_mib(self.total_bytes)} of {_mib(self.free_bytes)} free on {self.device}"
        )


def plan_memory(
    config: WorkerConfig, base: BaseModel, num_free_bytes: int, limits: Sequence[MappingLimit] = ()
) -> MemoryPlan:
    """The plan, with the KV the config states; where it states none, of all rows at their longest or what fits.

    `limits`: what the process may map, as it was when `num_free_bytes` were free.
    Raises: WorkerConfigInvalid with the sum, where it does not fit, or leaves less KV than one row may need.
    """
    linears = target_linears(base.model, base.model.get_output_embeddings()).values()
    num_weights = sum(linear.in_features + linear.out_features for linear in linears)
    widest = max(max(linear.in_features, linear.out_features) for linear in linears)
    step_bytes = 4 * _LOGITS_COPIES * config.max_batch_size * base.vocab_size
    step_bytes += 4 * _HIDDEN_COPIES * config.max_step_tokens * widest
    plan = MemoryPlan(
        device=config.device,
        free_bytes=num_free_bytes,
        weights_bytes=_weights_bytes(base, config.device),
        bank_bytes=config.bank_rank_rows * num_weights * base.dtype.itemsize,
        headroom_bytes=step_bytes + int(_SPARE * num_free_bytes),
        kv=_one_row(config, base),
    )
    plan = replace(plan, kv=_with_budget(config, plan))
    if plan.total_bytes > num_free_bytes:
        raise WorkerConfigInvalid(
            f"the worker does not fit its device: {plan}; lower kv_tokens, bank_rank_rows, max_batch_size,"
            " max_step_tokens or max_model_len"
        )
    if config.device == "cpu":
        _require_mappable(plan, limits)
    return plan


def _require_mappable(plan: MemoryPlan, limits: Sequence[MappingLimit]) -> None:
    """Refuse a plan whose address space does not fit: on the CPU every row has a region for its longest length.

    Raises: WorkerConfigInvalid with the sum.
    """
    regions_bytes = plan.kv.num_rows * region_bytes(plan.kv)
    num_bytes = plan.total_bytes - plan.kv_bytes + regions_bytes
    for limit in limits:
        if num_bytes > limit.free_bytes:
            raise WorkerConfigInvalid(
                f"the worker does not fit its address space: weights {_mib(plan.weights_bytes)} + bank"
                f" {_mib(plan.bank_bytes)} + head-room {_mib(plan.headroom_bytes)} + KV regions of {plan.kv.num_rows}"
                f" rows × {plan.kv.max_len} tokens {_mib(regions_bytes)} = {_mib(num_bytes)} of"
                f" {_mib(limit.free_bytes)} that {limit.name} leaves; lower max_batch_size or max_model_len,"
                f" or raise that limit"
            )


def _one_row(config: WorkerConfig, base: BaseModel) -> KvShape:
    max_len = min(config.max_model_len, base.max_position)
    return KvShape(
        num_layers=base.num_layers,
        num_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        dtype=base.dtype,
        num_rows=config.max_batch_size,
        max_len=max_len,
        num_tokens=max_len,
        page_tokens=PAGE_TOKENS[config.device],
    )


def _with_budget(config: WorkerConfig, plan: MemoryPlan) -> KvShape:
    """The stated budget; else what fits beside the rest of `plan`, which holds one row. No more than rows can use."""
    page_bytes = plan.kv.page_tokens * plan.kv.token_bytes
    pages_of_row = plan.kv.num_pages
    num_spare_pages = max(plan.free_bytes - plan.total_bytes, 0) // page_bytes
    num_pages = pages_of_row + num_spare_pages if config.kv_tokens is None else plan.kv.pages_of(config.kv_tokens)
    num_pages = min(num_pages, pages_of_row * config.max_batch_size)
    return replace(plan.kv, num_tokens=num_pages * plan.kv.page_tokens)


def _weights_bytes(base: BaseModel, device: str) -> int:
    """On the CPU the output head in bfloat16 is laid out anew, apart from the embedding that it may be one with."""
    is_one = device != "cpu" or base.dtype != torch.bfloat16
    named = base.model.named_parameters(remove_duplicate=is_one)
    return sum(parameter.nbytes for _, parameter in named)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"


def load_planned(config: WorkerConfig, base: BaseModel | None) -> tuple[BaseModel, MemoryPlan]:
    """Return the base model, on its device, and a plan that fits. `base`: one that is loaded already.

    Raises: BaseModelUnsupported, WorkerConfigInvalid.
    """
    device = torch.device(config.device)
    num_free_bytes, limits = free_bytes(device, config.device_share), mapping_limits()  # before the weights are taken
    base = base or load_base_model(config)
    plan = plan_memory(config, base, num_free_bytes, limits)
    logger.info("%s: %s", config.base_model, plan)
    base.model.to(device)
    return base, plan
