"""The parts of an engine on each device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.config import WorkerConfig
from gpu_worker.model.base_model import BaseModel
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.model.packed_linear import LinearKernel, has_bf16_vectors, is_kernel_faster, may_use_tiles
from gpu_worker.native.attention.kv_pages import DeviceKvCache, HostKvCache
from gpu_worker.native.device_parts import fuse_where_compiled, make_kv_cache, make_linear_kernel, make_lora_kernel
from gpu_worker.native.fused import Choices, FusedMlp, FusedRmsNorm
from tests.gpu_worker.compilers import path_with_quick_compiler
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


def test_the_base_has_compiled_products_only_on_processors_where_they_are_faster(lora_kernel: LoraKernel) -> None:
    kernel = LinearKernel.load(ON_CPU.cache_dir)
    assert kernel is not None
    assert (make_linear_kernel(ON_CPU) is not None) == (has_bf16_vectors() and is_kernel_faster(kernel))
    assert make_linear_kernel(on("cuda")) is None


@pytest.fixture
def quick_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", path_with_quick_compiler(tmp_path))


@pytest.mark.usefixtures("quick_compiler")
def test_a_library_without_bfloat16_instructions_does_not_replace_onednn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora_kernel: LoraKernel
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-U__AVX512BF16__")  # as a compiler that does not know them
    kernel = LinearKernel.load(tmp_path)
    assert kernel is not None and not kernel.has_bf16_products
    assert make_linear_kernel(replace(ON_CPU, cache_dir=tmp_path)) is None


@pytest.mark.usefixtures("quick_compiler")
def test_a_library_without_tiles_replaces_onednn_only_where_no_tiles_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora_kernel: LoraKernel
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-U__AMX_BF16__")  # as a compiler that does not know them
    kernel = LinearKernel.load(tmp_path)
    assert kernel is not None and not kernel.has_tiles
    expected = has_bf16_vectors() and not may_use_tiles()
    assert (make_linear_kernel(replace(ON_CPU, cache_dir=tmp_path)) is not None) == expected


@pytest.mark.parametrize(("device", "num_norms", "num_mlps"), [("cpu", 3 * 2 + 1, 3), ("cuda", 0, 0)])
def test_small_operations_are_fused_on_the_cpu(
    device: str, num_norms: int, num_mlps: int, tiny_base: Callable[..., BaseModel], lora_kernel: LoraKernel
) -> None:
    model = tiny_base("llama").model
    fuse_where_compiled(model, on(device), Choices())
    modules = list(model.modules())
    assert sum(isinstance(module, FusedRmsNorm) for module in modules) == num_norms
    assert sum(isinstance(module, FusedMlp) for module in modules) == num_mlps
