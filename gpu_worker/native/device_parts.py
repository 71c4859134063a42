"""Build the parts of an engine that depend on its device: the KV cache, the bank, and compiled CPU kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.layout_kernel import LayoutKernel
from gpu_worker.config import WorkerConfig
from gpu_worker.model.inject import inject
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.model.packed_linear import LinearKernel, NarrowLinear, has_bf16_vectors, is_kernel_faster
from gpu_worker.model.quantization import QuantizedLinear
from gpu_worker.model.step_context import StepContext
from gpu_worker.native.attention.decode_attention import DecodeKernel
from gpu_worker.native.attention.kv_cache import KvCache, KvShape
from gpu_worker.native.attention.kv_pages import DeviceKvCache, HostKvCache
from gpu_worker.native.compiled_decoder import compile_decoders
from gpu_worker.native.compiled_layer import compile_layers, load_layer_kernel
from gpu_worker.native.compiled_model import compile_model
from gpu_worker.native.fused import Choices, FusedKernel, fuse
from lora_store.adapter import Shapes


def make_kv_cache(config: WorkerConfig, shape: KvShape) -> KvCache:
    """Return a cache of pages on a GPU or in host memory, there with the compiled kernel if available."""
    if config.device != "cpu":
        return DeviceKvCache(shape, torch.device(config.device))
    return HostKvCache(shape, DecodeKernel.load(config.cache_dir))


def make_bank(
    config: WorkerConfig, linears: Mapping[str, nn.Linear], free_fill: float, experts: Shapes | None = None
) -> LoraBank:
    """Return a bank for adapters of these layers. On the CPU the compiled kernel converts weights for it."""
    kernel = LayoutKernel.load(config.cache_dir) if config.device == "cpu" else None
    return LoraBank(linears, config.bank_rank_rows, experts=experts, free_fill=free_fill, kernel=kernel)


def make_lora_kernel(config: WorkerConfig) -> LoraKernel | None:
    """Return the compiled LoRA products, or None if torch computes them."""
    is_native = config.device == "cpu" and config.lora_products == "auto"
    return LoraKernel.load(config.cache_dir) if is_native else None


def make_linear_kernel(config: WorkerConfig) -> LinearKernel | None:
    """Return the compiled products of the base's layers where they are faster than oneDNN's, else None."""
    if config.device != "cpu" or not has_bf16_vectors():  # then the library need not be compiled
        return None
    kernel = LinearKernel.load(config.cache_dir)
    return kernel if kernel is not None and is_kernel_faster(kernel) else None


def choose_linear_kernel(model: nn.Module, config: WorkerConfig) -> LinearKernel | None:
    """Return the compiled products if they are faster for this model's layers, or if torch has no such products."""
    needs_kernel = any(isinstance(module, QuantizedLinear | NarrowLinear) for module in model.modules())
    return LinearKernel.load(config.cache_dir) if needs_kernel else make_linear_kernel(config)


def inject_adapters(
    model: PreTrainedModel, bank: LoraBank, context: StepContext, config: WorkerConfig, choices: Choices
) -> None:
    """Let the model's layers add the bank's adapters. On the CPU pack and compile the layers where that is faster."""
    linear_kernel = choose_linear_kernel(model, config)
    inject(model, bank, context, linear_kernel)
    layer_kernel = None if linear_kernel is None else load_layer_kernel(config.cache_dir)
    if layer_kernel is not None and compile_layers(model, layer_kernel, choices):
        compile_decoders(model, layer_kernel)
        compile_model(model)


def fuse_where_compiled(model: nn.Module, config: WorkerConfig, choices: Choices) -> None:
    """Fuse the model's small operations on the CPU, if the compiled kernel is available."""
    kernel = FusedKernel.load(config.cache_dir) if config.device == "cpu" else None
    if kernel is not None:
        fuse(model, kernel, choices)
