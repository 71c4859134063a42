"""Base models that vLLM or the processes of a worker cannot serve are refused before vLLM starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, OPTConfig, Phi3Config, PretrainedConfig

from gpu_worker.errors import BaseModelUnsupported, WorkerConfigInvalid
from gpu_worker.vllm.front_model import FrontModel, load_front_model, narrowed
from tests.gpu_worker.conformance.families import config_of
from tests.tiny import SHAPE, TinyFolders, byte_tokenizer, change_json, tiny_config

_PARTS = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
# The tiny models have 4 attention heads, 2 key heads and MLPs of 48 values.


def load(folder: Path, config: PretrainedConfig | None = None, **settings: Any) -> FrontModel:
    """Read the model of the folder, after writing its configuration and a tokenizer where one is given."""
    if config is not None:
        config.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return load_front_model(tiny_config(folder, engine="vllm", **settings))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_a_model_evenly_or_several_have_one_key_head(size: int, tiny_folders: TinyFolders) -> None:
    assert load(tiny_folders["llama"], tensor_parallel_size=size).num_kv_heads == 2


@pytest.mark.parametrize(
    ("size", "uneven"),
    [(3, "4 attention heads and 2 key heads"), (8, "4 attention heads"), (5, "4 .* and 48 hidden .* and 2 key heads")],
)
def test_a_number_of_processes_that_does_not_divide_the_model_is_refused_with_the_counts(
    size: int, uneven: str, tiny_folders: TinyFolders
) -> None:
    with pytest.raises(WorkerConfigInvalid, match=rf"must divide the base model's {uneven}, got {size}"):
        load(tiny_folders["llama"], tensor_parallel_size=size)


def test_a_model_whose_layers_hold_several_modules_runs_in_one_process_only(tmp_path: Path) -> None:
    assert load(tmp_path, Phi3Config(**SHAPE)).num_kv_heads == 2
    with pytest.raises(BaseModelUnsupported, match=r"phi3 has gate_up_proj and qkv_proj, .* tensor_parallel_size 1"):
        load(tmp_path, tensor_parallel_size=2)


def test_a_width_of_mlps_with_another_name_in_the_configuration_is_checked(tmp_path: Path) -> None:
    """OPT calls it `ffn_dim`, and its MLPs have no module of their own."""
    shape = {name: value for name, value in SHAPE.items() if name.startswith(("vocab", "hidden", "num_hidden"))}
    config = OPTConfig(**shape, num_attention_heads=4, ffn_dim=50, word_embed_proj_dim=SHAPE["hidden_size"])
    assert load(tmp_path, config, tensor_parallel_size=2).num_kv_heads == 4
    with pytest.raises(WorkerConfigInvalid, match="must divide the base model's 50 hidden values of an MLP, got 4"):
        load(tmp_path, tensor_parallel_size=4)


def test_keys_have_room_for_the_largest_heads_of_all_layers(tmp_path: Path) -> None:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = AutoConfig.for_model("gemma4_text", **SHAPE, head_dim=8, global_head_dim=32, layer_types=layers)
    model = load(tmp_path, config)
    assert model.kv_token_bytes == 3 * 2 * model.num_kv_heads * 32 * 4


def test_quantized_weights_with_float32_are_refused_before_a_request_stops_the_engine(
    tiny_folders: TinyFolders, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "quantized")
    change_json(folder / "config.json", {"quantization_config": {"quant_method": "gptq"}})
    assert load(folder, dtype="bfloat16").dtype is torch.bfloat16
    with pytest.raises(WorkerConfigInvalid, match="'bfloat16' with a quantized base model, got 'float32'"):
        load(folder)


@pytest.mark.parametrize("place", ["whole", "text"])
def test_quantized_weights_of_a_multimodal_model_are_found_in_both_configs(place: str, tmp_path: Path) -> None:
    assert not load(tmp_path, config_of("gemma3"), dtype="bfloat16").is_quantized
    changes = {"quantization_config": {"quant_method": "gptq"}}
    change_json(tmp_path / "config.json", changes if place == "whole" else {"text_config": changes})
    assert load(tmp_path, dtype="bfloat16").is_quantized


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("t5gemma", {}, "t5gemma has an encoder-decoder architecture, which the vLLM engine does not support"),
        ("rwkv", {}, "rwkv has a config without num_attention_heads, which the vLLM engine does not support"),
        ("gpt2", {}, "no linear layer that an adapter could target"),
        ("jamba", {}, "jamba needs a GPU with the vLLM engine: vLLM has no CPU code for layers of Mamba 1"),
        ("laguna", {}, "laguna needs a GPU with the vLLM engine: vLLM has no CPU code for its choice of experts"),
        ("nemotron_h", {}, "nemotron_h needs a GPU .*: vLLM has no CPU code for experts without a gate"),
        ("deepseek_v3", {}, "deepseek_v3 needs scoring_func 'sigmoid' in config.json .* got None"),
        ("deepseek_v32", {}, "vLLM has no CPU code for its choice of tokens to attend to"),
        ("inkling_mm_model", {}, "inkling_mm_model needs a GPU .*: vLLM has no CPU code for its attention"),
        ("unlimited_ocr", {}, "unlimited_ocr needs a GPU with the vLLM engine: vLLM has no CPU code for its window"),
        ("olmo_hybrid", {}, "olmo_hybrid needs a GPU with the vLLM engine"),
        ("jetmoe", {}, "cannot load jetmoe: its attention has more heads of keys than config.json says"),
        ("voxtral_realtime", {}, "cannot load voxtral_realtime: its class needs sound for every token"),
        ("sarvam_mla", {}, "sarvam_mla: its class asks for a head size that transformers changes"),
        ("qwen3_5_moe", {}, "qwen3_5_moe_text has linear attention, which vLLM computes on the CPU in bfloat16 only"),
        ("qwen3_next", {}, "on the CPU in bfloat16 only: set worker.dtype to 'bfloat16', got 'float32'"),
        ("blip-2", {"text_config": {"model_type": "t5"}}, "blip-2 has an encoder-decoder architecture"),
        ("Keye", {"num_attention_heads": 0}, "Keye has num_attention_heads 0, which the vLLM engine does not support"),
        (
            "vit",
            {"vocab_size": 8, "max_position_embeddings": 8},
            "vit has no language model that transformers can buil",
        ),
    ],
)
def test_a_model_that_the_front_end_cannot_describe_is_refused_in_one_sentence(
    family: str, changes: Mapping[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelUnsupported, match=reason) as found:
        load(tmp_path, AutoConfig.for_model(family, **changes))
    assert "\n" not in str(found.value)


def test_a_language_model_whose_settings_transformers_refuses_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Phi-4-multimodal's are read when its language model is, after the rest of config.json."""
    scaling = {"type": "longrope", "short_factor": [1], "long_factor": [1]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi4mm", "rope_scaling": scaling}))
    with pytest.raises(BaseModelUnsupported, match=r"cannot be read \(.*short_factor field must have length 48, got 1"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["gemma3", "idefics3", "llava"])
def test_a_multimodal_model_takes_adapters_of_its_language_model_by_the_names_of_a_text_model(
    family: str, tmp_path: Path
) -> None:
    config = config_of(family)
    found = load(tmp_path, config)
    layers = {f"model.layers.{number}.{part}" for number in range(3) for part in _PARTS}
    assert set(found.shapes) == layers and found.is_multimodal
    with torch.device("meta"):
        modules = dict(AutoModelForImageTextToText.from_config(config).named_modules())
    text = config.get_text_config()
    for name, path in found.paths.items():
        assert path != name and (modules[path].out_features, modules[path].in_features) == found.shapes[name]
    assert (found.vocab_size, found.num_kv_heads) == (text.vocab_size, text.num_key_value_heads)


def test_a_mixture_takes_adapters_of_its_experts_its_router_and_its_other_layers(tmp_path: Path) -> None:
    found = load(tmp_path, config_of("deepseek_v3"))
    kinds = {name.rpartition("layers.1.")[2] for name in found.shapes if "layers.1." in name}
    assert {"self_attn.q_a_proj", "self_attn.o_proj", "mlp.shared_experts.down_proj"} < kinds
    assert "model.layers.0.mlp.up_proj" in found.shapes
    assert found.shapes["model.layers.1.mlp.experts.gate_up_proj"] == (64, 128, 4)
    assert found.shapes["model.layers.1.mlp.experts.down_proj"] == (128, 32, 4)
    assert found.shapes["model.layers.1.mlp.gate"] == (4, 128)
    assert found.shapes.keys() - found.paths.keys() == {name for name in found.shapes if ".experts." in name}


def test_experts_of_a_multimodal_model_have_the_names_of_a_text_model(tmp_path: Path) -> None:
    found = load(tmp_path, config_of("qwen3_vl_moe"))
    assert found.shapes["model.layers.2.mlp.experts.down_proj"] == (128, 32, 4)
    assert found.paths["model.layers.2.mlp.gate"] == "model.language_model.layers.2.mlp.gate"


def test_experts_that_the_workers_share_are_kept(tmp_path: Path) -> None:
    model = load(tmp_path, config_of("mixtral"))
    name = "model.layers.0.mlp.experts.down_proj"
    num_out, num_in, num = model.shapes[name]
    assert narrowed(model, [dict(model.shapes) | {name: (num_out, num_in // 2, num)}, model.shapes]) == model
    other = narrowed(model, [dict(model.shapes) | {name: (num_out, num_in, num + 1)}])
    assert other.shapes.keys() == model.shapes.keys() - {name} and other.paths == model.paths
    few = narrowed(model, [{each: model.shapes[each] for each in (name, "model.layers.0.mlp.gate")}])
    assert list(few.paths) == ["model.layers.0.mlp.gate"]


@pytest.fixture
def llama(tiny_folders: TinyFolders) -> FrontModel:
    return load(tiny_folders["llama"])


def test_modules_that_the_workers_hold_with_the_same_shape_are_kept_without_a_word(
    llama: FrontModel, caplog: pytest.LogCaptureFixture
) -> None:
    assert narrowed(llama, [llama.shapes]) == llama
    halves = []
    for place in (1, 2):  # each worker's share ends at half of the outputs, or at all of them
        halves.append({name: (num_out * place // 2, num_in) for name, (num_out, num_in) in llama.shapes.items()})
    assert narrowed(llama, halves) == llama
    assert not caplog.records


def test_modules_that_a_worker_lacks_or_has_otherwise_take_no_adapters(
    llama: FrontModel, caplog: pytest.LogCaptureFixture
) -> None:
    other, missing, *rest = llama.shapes
    held = dict(llama.shapes) | {other: (5, 5)}
    found = narrowed(llama, [held, {name: shape for name, shape in held.items() if name != missing}])
    assert list(found.shapes) == rest
    [record] = caplog.records
    text = record.getMessage()
    assert f"2 of the base model's {len(llama.shapes)} modules are refused" in text and f"{other}, {missing}" in text


def test_a_model_without_a_common_module_is_refused(llama: FrontModel) -> None:
    with pytest.raises(
        BaseModelUnsupported, match=r"llama cannot have adapters .* other shapes .*, for example model\."
    ):
        narrowed(llama, [dict.fromkeys(llama.shapes, (1, 1))])
