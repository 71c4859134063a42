"""The parts of an engine on each device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gpu_worker.config import WorkerConfig
from gpu_worker.model.base_model import BaseModel
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.native import device_parts
from gpu_worker.native.attention.kv_pages import DeviceKvCache, HostKvCache
from gpu_worker.native.device_parts import fuse_where_compiled, make_kv_cache, make_linear_kernel, make_lora_kernel
from gpu_worker.native.fused import Choices, FusedMlp, FusedRmsNorm
from tests.gpu_worker.engine_driver import kv_shape

ON_CPU = WorkerConfig(device="cpu")


def on(device: Any) -> WorkerConfig:
    return replace(ON_CPU, device=device)


def test_keys_and_values_are_in_host_memory_on_the_cpu_and_on_the_device_elsewhere() -> None:
    assert isinstance(make_kv_cache(ON_CPU, kv_shape()), HostKvCache)
    assert isinstance(make_kv_cache(on("meta"), kv_shape()), DeviceKvCache)  # a device without memory


@pytest.mark.parametrize(
    ("config", "is_compiled"), [(ON_CPU, True), (replace(ON_CPU, lora_products="torch"), False), (on("cuda"), False)]
)
def test_products_are_compiled_on_the_cpu_unless_torch_is_configured(
    config: WorkerConfig, is_compiled: bool, lora_kernel: LoraKernel
) -> None:
    assert isinstance(make_lora_kernel(config), LoraKernel) == is_compiled


@pytest.mark.parametrize(("has_vectors", "is_faster"), [(True, True), (True, False), (False, True)])
def test_the_base_has_compiled_products_only_on_processors_where_they_are_faster(
    has_vectors: bool, is_faster: bool, monkeypatch: pytest.MonkeyPatch, lora_kernel: LoraKernel
) -> None:
    monkeypatch.setattr(device_parts, "has_bf16_vectors", lambda: has_vectors)
    monkeypatch.setattr(device_parts, "is_kernel_faster", lambda kernel: is_faster)
    assert (make_linear_kernel(ON_CPU) is not None) == (has_vectors and is_faster)
    assert make_linear_kernel(on("cuda")) is None


@pytest.mark.parametrize(("device", "num_norms", "num_mlps"), [("cpu", 3 * 2 + 1, 3), ("cuda", 0, 0)])
def test_small_operations_are_fused_on_the_cpu(
    device: str, num_norms: int, num_mlps: int, tiny_base: Callable[..., BaseModel], lora_kernel: LoraKernel
) -> None:
    model = tiny_base("llama").model
    fuse_where_compiled(model, on(device), Choices())
    modules = list(model.modules())
    assert sum(isinstance(module, FusedRmsNorm) for module in modules) == num_norms
    assert sum(isinstance(module, FusedMlp) for module in modules) == num_mlps
