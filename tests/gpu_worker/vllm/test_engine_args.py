"""The settings of a worker in vLLM's words. Needs vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import pytest
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

from gpu_worker.config import VllmWorkerConfig
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.vllm.engine_args import build_config, kv_bytes, set_compilation, set_environment, thread_variables
from gpu_worker.vllm.front_model import load_front_model
from gpu_worker.vllm.settings import FRONT_PID
from tests.gpu_worker.conformance.families import save as save_of_vllm
from tests.gpu_worker.families import save
from tests.tiny import tiny_config

BIND, COUNT = "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    """Return the variables of the process, which are restored after the test."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        yield os.environ


@pytest.mark.parametrize(
    ("num_threads", "size", "expected"),
    [
        (None, 1, {BIND: "2,3,6,7"}),
        (4, 1, {BIND: "2,3,6,7"}),
        (None, 2, {BIND: "2,6|3,7"}),
        (1, 1, {BIND: "nobind", COUNT: "1"}),
        (3, 2, {BIND: "nobind", COUNT: "1"}),
        (None, 8, {BIND: "nobind", COUNT: "1"}),
    ],
)
def test_only_an_engine_that_has_the_machine_binds_its_threads(
    num_threads: int | None, size: int, expected: dict[str, str]
) -> None:
    config = VllmWorkerConfig(num_threads=num_threads, tensor_parallel_size=size)
    assert thread_variables(config, [2, 3, 6, 7]) == expected


@pytest.mark.parametrize(
    ("device", "products", "is_compiled", "mode", "graphs"),
    [
        ("cpu", "auto", True, CompilationMode.DYNAMO_TRACE_ONCE, CUDAGraphMode.FULL),
        ("cpu", "auto", False, CompilationMode.NONE, CUDAGraphMode.FULL),
        ("cuda", "auto", True, CompilationMode.NONE, CUDAGraphMode.FULL),
        ("cuda", "torch", True, CompilationMode.NONE, CUDAGraphMode.NONE),
    ],
)
def test_graphs_are_captured_only_with_products_that_a_graph_can_replay(
    device: Literal["cpu", "cuda"],
    products: Literal["auto", "torch"],
    is_compiled: bool,
    mode: CompilationMode,
    graphs: CUDAGraphMode,
) -> None:
    compilation = CompilationConfig(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.FULL)
    config = VllmWorkerConfig(device=device, lora_products=products)
    set_compilation(compilation, config, is_compiled=is_compiled)
    assert (compilation.mode, compilation.cudagraph_mode) == (mode, graphs)


def test_the_key_of_a_compiled_model_is_the_same_in_every_process(
    tiny_folders: Mapping[str, Path], environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM keeps compiled models under this key. Another key at each start would compile the model again."""
    config = tiny_config(tiny_folders["gemma3"], engine="vllm")
    model = load_front_model(config)
    keys = set()
    for pid in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        keys.add(build_config(config, model, free_fill=0.0, is_compiled=True).compute_hash())
        assert environment[FRONT_PID] == str(pid), "the workers end with this process"
    assert len(keys) == 1


def test_sampling_on_a_gpu_needs_no_compiler_of_cuda(environment: Mapping[str, str]) -> None:
    """FlashInfer compiles its sampler when it is first used."""
    set_environment(VllmWorkerConfig(device="cuda"))
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


@pytest.mark.parametrize(("size", "share"), [(1, 1.0), (2, 0.5), (4, 0.5)])
def test_each_process_has_room_for_the_keys_of_its_heads(
    size: int, share: float, tiny_folders: Mapping[str, Path]
) -> None:
    """The model has two heads of keys, so four processes have one each."""
    config = tiny_config(tiny_folders["gemma3"], engine="vllm", tensor_parallel_size=size, kv_tokens=1000)
    model = load_front_model(config)
    assert model.num_kv_heads == 2
    assert kv_bytes(config, model) == share * 1000 * model.kv_token_bytes


def test_every_row_of_a_hybrid_model_has_blocks_for_its_states(tmp_path: Path, environment: Mapping[str, str]) -> None:
    config = tiny_config(save_of_vllm(tmp_path, "qwen3_5"), engine="vllm", max_model_len=96, dtype="bfloat16")
    model = load_front_model(config)
    vllm_config = build_config(config, model, free_fill=0.0, is_compiled=False)
    cache = vllm_config.cache_config
    assert cache.block_size > 96, "a block is as large as a layer's state"
    assert cache.kv_cache_memory_bytes == config.max_batch_size * 2 * cache.block_size * model.kv_token_bytes
    assert vllm_config.model_config.multimodal_config.language_model_only


def test_latent_attention_is_refused_on_the_cpu_before_a_process_starts(
    tmp_path: Path, environment: Mapping[str, str]
) -> None:
    """Tiny models of three families had other answers than in transformers."""
    config = tiny_config(save_of_vllm(tmp_path, "deepseek_v2"), engine="vllm")
    with pytest.raises(BaseModelUnsupported, match="deepseek_v2 has latent attention, which vLLM computes on the CPU"):
        build_config(config, load_front_model(config), free_fill=0.0, is_compiled=False)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("stablelm", "stablelm cannot have adapters .*: vLLM's class StablelmForCausalLM supports no LoRA"),
        ("gptj", "gptj cannot have adapters .*: vLLM's class GPTJForCausalLM supports no LoRA"),
        ("mpt", "vLLM refuses mpt: Model architecture MptForCausalLM was supported in vLLM until"),
        (
            "recurrent_gemma",
            r"recurrent_gemma has layers of other kinds \(linear_attention\), for which vLLM has no class",
        ),
        ("rwkv", r"vLLM refuses rwkv: Model architectures \['RwkvForCausalLM'\] are not supported for now\.$"),
    ],
)
def test_a_class_that_vllm_cannot_give_adapters_is_refused_before_a_process_starts(
    family: str, reason: str, tmp_path: Path, environment: Mapping[str, str]
) -> None:
    config = tiny_config(save(tmp_path, family, {}), engine="vllm")
    with pytest.raises(BaseModelUnsupported, match=reason):
        build_config(config, load_front_model(config), free_fill=0.0, is_compiled=False)
