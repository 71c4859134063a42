"""Build the parts of an engine that depend on its device: the KV cache, and compiled kernels on the CPU."""

from __future__ import annotations

import torch
from torch import nn

from gpu_worker.attention.decode_attention import load_decode_kernel
from gpu_worker.attention.kv_cache import KvCache, KvShape
from gpu_worker.attention.kv_pages import KvPages
from gpu_worker.attention.kv_regions import KvRegions
from gpu_worker.config import WorkerConfig
from gpu_worker.lora.lora_kernel import LoraKernel, load_lora_kernel
from gpu_worker.model.fused import fuse, load_fused_kernel


def make_kv_cache(config: WorkerConfig, shape: KvShape) -> KvCache:
    """Return a cache of pages on a GPU, or of regions on the CPU, with the compiled kernel if available."""
    if config.device != "cpu":
        return KvPages(shape, torch.device(config.device))
    return KvRegions(shape, load_decode_kernel(config.cache_dir))


def make_lora_kernel(config: WorkerConfig) -> LoraKernel | None:
    """Return the compiled LoRA products, or None if torch computes them."""
    is_native = config.device == "cpu" and config.lora_products == "auto"
    return load_lora_kernel(config.cache_dir) if is_native else None


def fuse_where_compiled(model: nn.Module, config: WorkerConfig) -> None:
    """Fuse the model's small operations on the CPU, if the compiled kernel is available."""
    kernel = load_fused_kernel(config.cache_dir) if config.device == "cpu" else None
    if kernel is not None:
        fuse(model, kernel)
