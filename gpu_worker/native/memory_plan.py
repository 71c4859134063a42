"""Plan the device memory of a worker before it is allocated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gpu_worker.bank.device_memory import MappingLimit, free_bytes, mapping_limits
from gpu_worker.config import NativeWorkerConfig
from gpu_worker.errors import WorkerConfigInvalid
from gpu_worker.model.base_model import BaseModel, load_base_model
from gpu_worker.model.eager_check import RANK
from gpu_worker.model.embedding import QuantizedRows
from gpu_worker.model.experts import most_expert_bytes
from gpu_worker.model.inject import Adaptable
from gpu_worker.model.quantization import QuantizedLinear
from gpu_worker.native.attention.kv_cache import KvShape
from gpu_worker.native.device_parts import choose_linear_kernel
from gpu_worker.native.scheduler import MAX_SCORED_TOKENS

logger = logging.getLogger(__name__)

PAGE_TOKENS = {"cpu": 16, "cuda": 256}  # flash attention 2 reads pages of 256, or a multiple
_SPARE = 0.05  # share of free memory reserved for allocator fragmentation and other processes
_LOGITS_COPIES = 4  # float32 copies of the logits during sampling
_HIDDEN_COPIES = 8  # float32 copies of a step's hidden states, as wide as the widest layer


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The bytes that were free on the device at start, and their use."""

    device: str
    free_bytes: int
    weights_bytes: int
    bank_bytes: int
    headroom_bytes: int
    kv: KvShape
    expert_bytes: int = 0  # the most that adapters in the bank may have for fused experts, always in host memory

    @property
    def kv_bytes(self) -> int:
        return self.kv.num_bytes

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.bank_bytes + self.counted_expert_bytes + self.headroom_bytes + self.kv_bytes

    @property
    def counted_expert_bytes(self) -> int:
        return self.expert_bytes if self.device == "cpu" else 0

    def __str__(self) -> str:
        experts = f" + adapters' experts {_mib(self.counted_expert_bytes)}" if self.counted_expert_bytes else ""
        return (
            f"weights {_mib(self.weights_bytes)} + bank {_mib(self.bank_bytes)}{experts}"
            f" + headroom {_mib(self.headroom_bytes)} + KV of {_kv(self.kv)} {_mib(self.kv_bytes)}"
            f" = {_mib(self.total_bytes)} of {_mib(self.free_bytes)} free on {self.device}"
        )


def plan_memory(
    config: NativeWorkerConfig, base: BaseModel, num_free_bytes: int, limits: Sequence[MappingLimit] = ()
) -> MemoryPlan:
    """Plan the memory with the configured KV; by default with KV for all rows at their longest, or what fits.

    `limits`: limits of the process's mappings, measured together with `num_free_bytes`.
    Raises: WorkerConfigInvalid, with the sum, if the plan does not fit or leaves too little KV for one row.
    """
    found = Adaptable.of(base.model)
    linears = found.linears.values()
    num_weights = sum(linear.in_features + linear.out_features for linear in linears)
    widest = max(max(linear.in_features, linear.out_features) for linear in linears)
    num_logits = max(config.max_batch_size, MAX_SCORED_TOKENS)
    step_bytes = 4 * _LOGITS_COPIES * num_logits * base.vocab_size
    step_bytes += 4 * _HIDDEN_COPIES * config.max_step_tokens * widest
    plan = MemoryPlan(
        device=config.device,
        free_bytes=num_free_bytes,
        weights_bytes=_weights_bytes(base, config),
        bank_bytes=config.bank_rank_rows * num_weights * base.dtype.itemsize,
        headroom_bytes=step_bytes + int(_SPARE * num_free_bytes),
        kv=_one_row(config, base),
        expert_bytes=most_expert_bytes(
            found.shapes, base.dtype, num_rows=config.bank_rank_rows, limit=config.host_cache_bytes, least_rows=RANK
        ),
    )
    plan = replace(plan, kv=_with_budget(config, plan))
    if plan.total_bytes > num_free_bytes:
        raise WorkerConfigInvalid(
            f"the worker needs more memory than is free: {plan}; lower kv_tokens, bank_rank_rows, max_batch_size,"
            f" max_step_tokens{', host_cache_bytes' if plan.counted_expert_bytes else ''} or max_model_len"
        )
    for limit in limits if config.device == "cpu" else ():
        if plan.total_bytes > limit.free_bytes:
            raise WorkerConfigInvalid(
                f"the worker needs more address space than allowed: {plan}, and of {_mib(limit.free_bytes)} that"
                f" {limit.name} leaves; lower kv_tokens, max_batch_size or max_model_len, or raise that limit"
            )
    return plan


def _one_row(config: NativeWorkerConfig, base: BaseModel) -> KvShape:
    max_len = min(config.max_model_len, base.max_position)
    has_windows = base.window is not None and base.window < max_len
    shape = KvShape(
        num_layers=base.num_layers,
        num_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        dtype=base.dtype,
        num_rows=config.max_batch_size,
        max_len=max_len,
        num_tokens=max_len,
        page_tokens=PAGE_TOKENS[config.device],
        window=base.window if has_windows else None,
        window_layers=base.window_layers if has_windows else frozenset(),
        kept_share=config.prefix_cache_share if config.prefix_cache else 0.0,
    )
    return _with_pages(shape, shape.num_pages, config)


def _with_pages(shape: KvShape, num_pages: int, config: NativeWorkerConfig) -> KvShape:
    """Return the shape with `num_pages` for whole rows, and as many for windows as rows hold and prefixes may keep."""
    num_window_pages = min(num_pages, _most_window_pages(shape, config)) if shape.window_layers else 0
    tokens = shape.page_tokens
    return replace(shape, num_tokens=num_pages * tokens, num_window_tokens=num_window_pages * tokens)


def _most_window_pages(shape: KvShape, config: NativeWorkerConfig) -> int:
    """Return the most pages for windows: those of the rows of a step, and as many for kept prefixes.

    The rows hold the tokens that the step sees or computes; a window may begin and end within a page.
    """
    of_windows = shape.num_rows * (shape.pages_of(shape.window or 0) + 2)
    return of_windows + int(shape.kept_share * of_windows) + shape.pages_of(config.max_step_tokens)


def _with_budget(config: NativeWorkerConfig, plan: MemoryPlan) -> KvShape:
    """Return the configured budget, or else one row plus all spare memory of `plan`; at most what the rows can use."""
    kv = plan.kv
    if config.kv_tokens is None:
        num_pages = _pages_within(plan.kv_bytes + max(plan.free_bytes - plan.total_bytes, 0), kv, config)
    else:
        num_pages = kv.pages_of(config.kv_tokens)
    return _with_pages(kv, min(num_pages, kv.num_pages * config.max_batch_size), config)


def _pages_within(num_bytes: int, kv: KvShape, config: NativeWorkerConfig) -> int:
    """Return the most pages for whole rows that fit, together with the windows' pages."""
    layer_bytes = kv.page_tokens * kv.layer_token_bytes
    num_pages = num_bytes // (kv.num_layers * layer_bytes)
    most = _most_window_pages(kv, config)
    if not kv.window_layers or num_pages <= most:
        return num_pages
    num_whole = kv.num_layers - len(kv.window_layers)
    return (num_bytes - most * len(kv.window_layers) * layer_bytes) // (num_whole * layer_bytes)


def _weights_bytes(base: BaseModel, config: NativeWorkerConfig) -> int:
    """Return the bytes of the weights. A bfloat16 output head that oneDNN packs is a second copy of a tied embedding.

    Of a layer or an embedding of integers only these stay, after the checks at start.
    """
    has_copy = config.device == "cpu" and base.dtype == torch.bfloat16
    is_one = not has_copy or choose_linear_kernel(base.model, config) is not None
    named = base.model.named_parameters(remove_duplicate=is_one)
    integers = [module for module in base.model.modules() if isinstance(module, QuantizedLinear | QuantizedRows)]
    held = sum(module.quantized.num_bytes for module in integers)
    return int(sum(parameter.nbytes for _, parameter in named)) + held


def _kv(kv: KvShape) -> str:
    text = f"{kv.num_pages * kv.page_tokens} tokens"
    if not kv.window_layers:
        return text
    windows = f"{len(kv.window_layers)} of {kv.num_layers} layers keep a window of {kv.window}"
    without = replace(kv, window_layers=frozenset()).num_bytes
    return f"{text} ({windows}, which saves {_mib(without - kv.num_bytes)})"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"


def load_planned(
    config: NativeWorkerConfig, base: BaseModel | None, source: str | None = None
) -> tuple[BaseModel, MemoryPlan]:
    """Load the base model onto its device and plan the memory. `base`: use this model, which is loaded already.
    `source`: as in `load_base_model`.

    Raises: BaseModelUnsupported, WorkerConfigInvalid.
    """
    device = torch.device(config.device)
    num_free_bytes, limits = (
        free_bytes(device, config.device_share),
        mapping_limits(),
    )  # measured before the weights are loaded
    base = base or load_base_model(config, source)
    plan = plan_memory(config, base, num_free_bytes, limits)
    logger.info("%s: %s", config.base_model, plan)
    base.model.to(device)
    return base, plan
