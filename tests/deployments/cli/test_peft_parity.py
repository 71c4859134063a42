from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deployments.cli import peft_parity
from deployments.cli.peft_parity import TOLERANCE, parity_with_peft
from gpu_worker.errors import BaseModelUnsupported
from lora_store import AdapterRefused, Limits, ModuleWeights, check_folder
from lora_store.peft_files import WEIGHTS_FILE
from tests.gpu_worker.families import EQUAL, save, save_multimodal
from tests.tiny import tiny_config

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 2, "lora_alpha": 4, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 9}},
}


def trained(model: Path, folder: Path, **settings: Any) -> Path:
    """Return an adapter that PEFT created, with a random lora_B instead of zeros."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chosen = {"target_modules": ALL_LINEAR} | settings
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **chosen))
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.15)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_every_strategy_agrees_with_peft(
    settings: dict[str, Any], tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    model = tiny_folders["gemma3"]
    differences = parity_with_peft(
        trained(model, tmp_path / "adapter", **settings),
        tiny_config(model, num_threads=1, dtype="bfloat16", quantization="int8"),
    )
    assert list(differences) == ["selection", "mixture", "fusion"]
    assert max(differences.values()) < TOLERANCE / 10


def test_a_wrong_scaling_is_detected_in_every_strategy(
    tiny_folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaling differs from PEFT's lora_alpha / rank by a tenth."""
    model = tiny_folders["llama"]
    folder = trained(model, tmp_path / "adapter", r=4, lora_alpha=8)

    class Misread:
        def __init__(self, path: Path, **options: Any) -> None:
            self.modules = {
                name: ModuleWeights(module.lora_a, module.lora_b, module.scaling * 1.1)
                for name, module in check_folder(path, **options).modules.items()
            }

    monkeypatch.setattr(peft_parity, "check_folder", Misread)  # the point where both sides diverge
    differences = parity_with_peft(folder, tiny_config(model, num_threads=1))
    assert differences["selection"] > TOLERANCE
    assert differences["mixture"] > TOLERANCE


def test_an_adapter_above_the_limits_is_refused(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    model = tiny_folders["llama"]
    folder = trained(model, tmp_path / "adapter", r=4)
    with pytest.raises(AdapterRefused, match="rank"):
        parity_with_peft(folder, tiny_config(model, num_threads=1), Limits(max_rank=3))


def test_what_options_replace_in_the_folder_does_not_matter(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    """`--name`, `--samples` and `--base-name` replace the folder's name, its samples and its base model."""
    model = tiny_folders["llama"]
    folder = trained(model, tmp_path / "tickets (v2)", r=4, lora_alpha=8)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    (folder / "lora_samples.jsonl").write_text("[]\n")
    assert max(parity_with_peft(folder, tiny_config(model, num_threads=1)).values()) < TOLERANCE / 10


def test_other_names_are_compared_as_pefts(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    """The adapter's own name in the keys, for which PEFT alone would leave its weights at random values."""
    model = tiny_folders["llama"]
    folder = trained(model, tmp_path / "adapter", r=4, lora_alpha=8)
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}, folder / WEIGHTS_FILE)
    assert max(parity_with_peft(folder, tiny_config(model, num_threads=1)).values()) < TOLERANCE / 10


def test_an_adapter_on_experts_and_routers_agrees_with_peft(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", "qwen3_moe", EQUAL["qwen3_moe"])
    parameters = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    adapter = trained(
        folder, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=parameters
    )
    assert max(parity_with_peft(adapter, tiny_config(folder, num_threads=1)).values()) < TOLERANCE / 10


def test_an_adapter_of_a_whole_multimodal_model_agrees_with_peft(tmp_path: Path) -> None:
    folder = save_multimodal(tmp_path / "base", "gemma3")
    adapter = trained(folder, tmp_path / "adapter", r=4, lora_alpha=8, exclude_modules=r".*vision_tower.*")
    assert max(parity_with_peft(adapter, tiny_config(folder, num_threads=1)).values()) < TOLERANCE / 10


def test_a_quantised_base_is_refused_in_one_sentence(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    config = json.loads((tiny_folders["llama"] / "config.json").read_text())
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(BaseModelUnsupported, match="compare with the model that they were made from"):
        parity_with_peft(tmp_path, tiny_config(tmp_path))
