"""Base models that vLLM or the processes of a worker cannot serve are refused before vLLM starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, Phi3Config, Phi3ForCausalLM

from gpu_worker.errors import BaseModelUnsupported, WorkerConfigInvalid
from gpu_worker.vllm.front_model import load_front_model
from tests.tiny import SHAPE, byte_tokenizer, tiny_config

# The tiny models have 4 attention heads, 2 key heads and MLPs of 48 values.


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_a_model_evenly_or_several_have_one_key_head(
    size: int, tiny_folders: Mapping[str, Path]
) -> None:
    config = tiny_config(tiny_folders["llama"], engine="vllm", tensor_parallel_size=size)
    assert load_front_model(config).num_kv_heads == 2


@pytest.mark.parametrize(
    ("size", "uneven"),
    [(3, "4 attention heads and 2 key heads"), (8, "4 attention heads"), (5, "4 .* and 48 hidden .* and 2 key heads")],
)
def test_a_number_of_processes_that_does_not_divide_the_model_is_refused_with_the_counts(
    size: int, uneven: str, tiny_folders: Mapping[str, Path]
) -> None:
    config = tiny_config(tiny_folders["llama"], engine="vllm", tensor_parallel_size=size)
    with pytest.raises(WorkerConfigInvalid, match=rf"must divide the base model's {uneven}, got {size}"):
        load_front_model(config)


def test_a_model_whose_layers_hold_several_modules_runs_in_one_process_only(tmp_path: Path) -> None:
    Phi3ForCausalLM(Phi3Config(**SHAPE)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_front_model(tiny_config(tmp_path, engine="vllm")).num_kv_heads == 2
    with pytest.raises(BaseModelUnsupported, match=r"phi3 has gate_up_proj and qkv_proj, .* tensor_parallel_size 1"):
        load_front_model(tiny_config(tmp_path, engine="vllm", tensor_parallel_size=2))


def test_a_width_of_mlps_with_another_name_in_the_configuration_is_checked(tmp_path: Path) -> None:
    """OPT calls it `ffn_dim`, and its MLPs have no module of their own."""
    shape = {name: value for name, value in SHAPE.items() if name.startswith(("vocab", "hidden", "num_hidden"))}
    config = OPTConfig(**shape, num_attention_heads=4, ffn_dim=50, word_embed_proj_dim=SHAPE["hidden_size"])
    OPTForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_front_model(tiny_config(tmp_path, engine="vllm", tensor_parallel_size=2)).num_kv_heads == 4
    with pytest.raises(WorkerConfigInvalid, match="must divide the base model's 50 hidden values of an MLP, got 4"):
        load_front_model(tiny_config(tmp_path, engine="vllm", tensor_parallel_size=4))


def test_quantized_weights_with_float32_are_refused_before_a_request_stops_the_engine(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert load_front_model(tiny_config(folder, engine="vllm", dtype="bfloat16")).dtype is torch.bfloat16
    with pytest.raises(WorkerConfigInvalid, match="'bfloat16' with a quantized base model, got 'float32'"):
        load_front_model(tiny_config(folder, engine="vllm"))
