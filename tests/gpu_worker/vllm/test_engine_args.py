"""The settings of a worker in vLLM's words. Needs vLLM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from transformers import QianfanOCRConfig, YoutuConfig
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, get_max_concurrency_for_kv_cache_config
from vllm.v1.kv_cache_interface import MambaSpec

from gpu_worker.config import VllmWorkerConfig
from gpu_worker.errors import BaseModelUnsupported, WorkerConfigInvalid
from gpu_worker.model.checkpoint import read_config
from gpu_worker.vllm.engine_args import (
    _engine_args,
    build_config,
    count_latent_bytes,
    expert_bytes,
    kv_bytes,
    set_compilation,
    set_environment,
    thread_variables,
)
from gpu_worker.vllm.front_model import load_front_model
from gpu_worker.vllm.settings import FRONT_PID, PluginSettings
from tests.gpu_worker.conformance.families import save as save_of_vllm
from tests.gpu_worker.families import save
from tests.tiny import byte_tokenizer, change_json, tiny_config

BIND, COUNT = "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"


def built(folder: Path, **settings: Any) -> Any:
    """Return vLLM's configuration of a worker over the folder's model."""
    config = tiny_config(folder, engine="vllm", **settings)
    return build_config(config, load_front_model(config), free_fill=0.0, is_compiled=False)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_of_vllm(tmp_path_factory.mktemp("mixtral"), "mixtral")


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


@pytest.mark.parametrize(
    ("settings", "is_compiled", "is_served"),
    [
        ({"device": "cuda"}, True, False),
        ({"device": "cuda"}, False, True),
        ({"device": "cuda", "lora_products": "torch"}, True, True),
        ({"device": "cpu"}, True, True),
    ],
    ids=str,
)
def test_experts_take_adapters_unless_a_graph_would_replay_them(
    settings: Mapping[str, Any], is_compiled: bool, is_served: bool, mixtral: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_front_model(tiny_config(mixtral, engine="vllm"))
    args = _engine_args(VllmWorkerConfig(**settings), model, 0.0, is_compiled)
    plugin = PluginSettings.of(args.additional_config)
    assert bool(plugin.experts) == is_served
    assert not any(".experts." in name for name in (*plugin.modules, *plugin.outputs))
    assert ("set worker.enforce_eager" in caplog.text) == (not is_served)


def test_adapters_and_fusions_may_each_have_as_many_bytes_for_experts_as_the_cache(mixtral: Path) -> None:
    """At least those of the check at start, at most those of all their rows."""
    model = load_front_model(tiny_config(mixtral, engine="vllm"))
    row = 4 * sum(num[0] * (num_out + num_in) for num_out, num_in, *num in model.shapes.values() if num)

    def found(**settings: Any) -> tuple[float, ...]:
        config = tiny_config(mixtral, engine="vllm", bank_rank_rows=8, fusion_rank_rows=6, **settings)
        return tuple(num_bytes / row for num_bytes in expert_bytes(config, model))

    assert found() == (8, 6)
    assert found(host_cache_bytes=5 * row) == (5, 5)
    assert found(host_cache_bytes=0) == (4, 0)


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


def test_files_of_mistrals_own_tools_beside_those_that_are_checked_are_not_read(
    tiny_folders: Mapping[str, Path], tmp_path: Path, environment: Mapping[str, str]
) -> None:
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "model")
    for name in ("params.json", "consolidated.safetensors"):
        (folder / name).write_text("{}")
    found = built(folder)
    assert (found.model_config.hf_config.model_type, found.load_config.load_format) == ("llama", "hf")


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


def test_the_cpus_cache_is_what_the_free_memory_has_room_for(
    tiny_folders: Mapping[str, Path], environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_folders["gemma3"], engine="vllm")
    model = load_front_model(config)

    def planned(num_free_bytes: int) -> int:
        monkeypatch.setattr("gpu_worker.vllm.engine_args.free_bytes", lambda device: num_free_bytes)
        built = build_config(config, model, free_fill=0.0, is_compiled=False)
        assert built.cache_config.kv_cache_memory_bytes is not None
        return built.cache_config.kv_cache_memory_bytes

    whole = kv_bytes(config, model)
    assert planned(1 << 40) == whole == 8 * 384 * model.kv_token_bytes
    assert kv_bytes(config, model, most_bytes=whole // 2) == whole // 2
    row_bytes = sum(num_out + num_in for num_out, num_in in model.shapes.values())
    beside = 4 * (model.num_parameters + config.num_rank_rows * row_bytes)
    assert planned((beside + whole // 2) * 10 // 9 + 9) == whole // 2
    with pytest.raises(WorkerConfigInvalid, match=r"room for 0 tokens .* may need 384; lower max_model_len"):
        planned(beside)


def test_a_worker_that_shares_a_gpu_needs_its_share_only(tiny_folders: Mapping[str, Path]) -> None:
    model = load_front_model(tiny_config(tiny_folders["gemma3"], engine="vllm"))
    config = VllmWorkerConfig(device="cuda", device_share=0.4, kv_tokens=5000)
    args = _engine_args(config, model, 0.0, False)
    assert args.gpu_memory_utilization == pytest.approx(0.36)
    assert args.kv_cache_memory_bytes == 5000 * model.kv_token_bytes


def test_two_workers_draw_rows_without_a_seed_in_different_ways(tiny_folders: Mapping[str, Path]) -> None:
    config = tiny_config(tiny_folders["gemma3"], engine="vllm")
    model = load_front_model(config)
    assert len({_engine_args(config, model, 0.0, False).seed for _ in range(3)}) == 3


def test_vllm_reads_with_the_tokenizer_of_the_front_end(tiny_folders: Mapping[str, Path]) -> None:
    """By default it takes Mistral's own where the folder has both, and refuses grammars with some of those."""
    config = tiny_config(tiny_folders["mistral"], engine="vllm")
    assert _engine_args(config, load_front_model(config), 0.0, False).tokenizer_mode == "hf"


@pytest.mark.parametrize("max_model_len", [96, 400])
@pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1"])
def test_every_row_of_a_hybrid_model_has_blocks_for_its_states(
    family: str, max_model_len: int, tmp_path: Path, environment: Mapping[str, str]
) -> None:
    """vLLM's workers enlarge the blocks after the cache's size is set. What they do is done here with its functions."""
    folder = save_of_vllm(tmp_path, family)
    vllm_config = built(folder, max_model_len=max_model_len, dtype="bfloat16", max_batch_size=3)
    cache, model_config = vllm_config.cache_config, vllm_config.model_config
    assert model_config.multimodal_config is None or model_config.multimodal_config.language_model_only
    heads = {"num_heads": 4, "head_size": 32, "scale": 1.0, "num_kv_heads": 2}
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.bfloat16):
        attention = Attention(**heads, cache_config=cache, prefix="layers.0")
    current_platform.update_block_size_for_backend(vllm_config)
    found, _ = model_config.registry.resolve_model_cls(model_config.architectures, model_config)
    states = MambaSpec(
        block_size=cache.mamba_block_size,
        shapes=found.get_mamba_state_shape_from_config(vllm_config),
        dtypes=found.get_mamba_state_dtype_from_config(vllm_config),
        page_size_padded=cache.mamba_page_size_padded,
        mamba_cache_mode=cache.mamba_cache_mode,
    )
    assert (cache.block_size > 128) == (family == "qwen3_5"), "its states are larger than vLLM's default block"
    keys = attention.get_kv_cache_spec(vllm_config)
    num_keys, num_states = (1, 2) if family == "qwen3_5" else (3, 3)  # of three layers
    specs = {f"keys.{place}": keys for place in range(num_keys)} | {f"s.{place}": states for place in range(num_states)}
    cache.kv_cache_layout = "LBNHC"  # of all layouts a block has the same size
    [allocated] = get_kv_cache_configs(vllm_config, [specs], [cache.kv_cache_memory_bytes])
    assert get_max_concurrency_for_kv_cache_config(vllm_config, allocated) >= 3


def test_a_part_of_each_head_is_rotated_as_in_the_paper(tmp_path: Path, environment: Mapping[str, str]) -> None:
    """vLLM's operation for the CPU rotates heads only if they follow one another, as they do not in DeepSeek's.

    Source: RoFormer (arXiv 2104.09864), equation 34.
    """
    vllm_config = built(save_of_vllm(tmp_path, "deepseek_v2"))
    heads, positions = torch.randn(5, 4, 96), torch.arange(5)
    angles = positions[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
    turned = torch.view_as_complex(heads[..., 32:].unflatten(-1, (32, 2)).contiguous())
    expected = torch.view_as_real(turned * torch.polar(torch.ones(5, 32), angles)[:, None]).flatten(-2)
    with set_current_vllm_config(vllm_config):
        rotate = get_rope(64, 512, is_neox_style=False, rope_parameters={"rope_type": "default", "rope_theta": 10000})
    found, _ = rotate(positions, heads[..., 32:], None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_latent_attention_keeps_one_latent_a_token_and_on_the_cpu_of_one_size(
    tmp_path: Path, environment: Mapping[str, str]
) -> None:
    folder = save_of_vllm(tmp_path, "deepseek_v2")
    assert built(folder, kv_tokens=1000).cache_config.kv_cache_memory_bytes == 1000 * 3 * (512 + 64) * 4
    change_json(folder / "config.json", {"kv_lora_rank": 256})
    with pytest.raises(BaseModelUnsupported, match=r"deepseek_v2 needs a GPU .* = 576 only, and the model has 320"):
        built(folder, kv_tokens=1000)


@pytest.mark.parametrize(
    ("head_size", "is_generic", "more", "expected"),
    [
        (576, False, {}, 576 * 2),  # DeepSeek V3
        (576, False, {"index_head_dim": 128}, 576 * 2 + 128 + 4),  # DeepSeek V3.2: its indexer's key, with a scale
        (64, True, {}, 576 * 2),  # Youtu-LLM, by vLLM's class for any model of transformers
    ],
)
def test_latents_are_counted_with_the_keys_of_an_indexer(
    head_size: int, is_generic: bool, more: dict[str, int], expected: int
) -> None:
    model_config: Any = SimpleNamespace(
        hf_text_config=SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64, **more),
        dtype=torch.bfloat16,
        get_head_size=lambda: head_size,
        using_transformers_backend=lambda: is_generic,
    )
    assert count_latent_bytes(model_config) == expected


def test_latents_without_a_class_of_vllms_own_are_refused_on_the_cpu(
    tmp_path: Path, environment: Mapping[str, str]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 32}
    ids = {"bos_token_id": None, "eos_token_id": None}
    YoutuConfig(architectures=["YoutuForCausalLM"], **sizes, **heads, **ids).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BaseModelUnsupported, match=r"youtu needs a GPU .* no class of its own"):
        built(tmp_path)


def test_states_that_processes_cannot_share_are_refused_before_a_process_starts(
    tmp_path: Path, environment: Mapping[str, str]
) -> None:
    folder = save_of_vllm(tmp_path, "qwen3_5_text")
    change_json(folder / "config.json", {"linear_num_key_heads": 1, "linear_num_value_heads": 1})
    with pytest.raises(BaseModelUnsupported, match="vLLM refuses qwen3_5_text: 1 is not divisible by 2"):
        built(folder, dtype="bfloat16", tensor_parallel_size=2)


def test_a_config_that_vllm_replaces_is_read_by_transformers_again(
    tmp_path: Path, environment: Mapping[str, str]
) -> None:
    built(folder := save_of_vllm(tmp_path, "qianfan_ocr"))
    assert type(read_config(str(folder))) is QianfanOCRConfig


def test_a_model_with_chunks_is_refused_before_a_process_starts(tmp_path: Path, environment: Mapping[str, str]) -> None:
    """Rnj-1 says that it is Gemma 3, which is the same without chunks."""
    folder = save_of_vllm(tmp_path, "gemma3_text (as Rnj-1)")
    built(folder)
    kinds = ["chunked_attention", "full_attention", "chunked_attention"]
    change_json(folder / "config.json", {"layer_types": kinds})
    with pytest.raises(BaseModelUnsupported, match=r"gemma3_text has no language model .*chunked_attention"):
        load_front_model(tiny_config(folder, engine="vllm"))


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
    with pytest.raises(BaseModelUnsupported, match=reason):
        built(save(tmp_path, family, {}))


@pytest.mark.parametrize(
    ("method", "reason"),
    [("bitsandbytes", r"Unknown quantization method: bitsandbytes\.$"), ("torchao", "Please install torchao")],
)
def test_a_format_of_weights_that_vllm_does_not_read_is_refused_before_a_process_starts(
    method: str, reason: str, tmp_path: Path, environment: Mapping[str, str]
) -> None:
    folder = save_of_vllm(tmp_path, "llama")
    change_json(folder / "config.json", {"quantization_config": {"quant_method": method}})
    with pytest.raises(BaseModelUnsupported, match=f"vLLM refuses llama: {reason}"):
        built(folder, dtype="bfloat16")
