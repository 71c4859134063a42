"""An adapter gives the same results in the engine as with PEFT, alone and in PEFT's own combination."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from gpu_worker.model.base_model import load_base_model
from lora_store import check_folder
from lora_store.adapter import AdapterWeights
from lora_store.peft_files import write_peft_folder
from tests.gpu_worker.engine_driver import MakeEngine, by_digest, greedy, run_together
from tests.gpu_worker.families import train, whole_model
from tests.lora_store.builders import read_folder
from tests.tiny import TinyFolders, assert_equal_logits, linear_shapes, plan_of, tiny_config

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR},
    "attention only": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ALL_LINEAR},
    "rank pattern": {
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"mlp.up_proj": 5, r"layers\.1\.self_attn\.q_proj": 1, "^model.layers.2.mlp.down_proj": 6},
        "target_modules": ALL_LINEAR,
    },
    "both patterns": {
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"q_proj": 9, r"layers\.[01]\..*up_proj": 1},
        "target_modules": ALL_LINEAR,
    },
    "patterns, rank-stabilised": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 4},
        "alpha_pattern": {"v_proj": 7},
        "target_modules": ALL_LINEAR,
    },
    "regular expression": {"r": 4, "lora_alpha": 4, "target_modules": r".*layers\.[02]\.(self_attn\.k|mlp\.gate)_proj"},
}
# Settings of the training only. PEFT saves tensors of their own with the pairs.
TRAINING: dict[str, dict[str, Any]] = {
    "VeLoRA": {"velora_config": VeloraConfig(num_groups=4)},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)},
}
PROMPTS = ["The parrot says", "x"]


@dataclass(frozen=True)
class Trained:
    """A PEFT folder, and the adapter read from it."""

    folder: Path
    weights: AdapterWeights


@pytest.fixture(scope="module")
def trained(tiny_folders: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Return an adapter of every config, created and saved by PEFT, with a random lora_B instead of zeros."""
    pool = {}
    for seed, (name, settings) in enumerate(CONFIGS.items()):
        folder = train(tiny_folders["gemma3"], tmp_path_factory.mktemp("adapter"), seed, **settings)
        pool[name] = Trained(folder, AdapterWeights(f"digest of {name}", read_folder(folder).modules))
    return pool


def logits_of(model: PeftModel, tiny_folders: TinyFolders, prompt: str) -> Tensor:
    """Return PEFT's logits for the prompt's last token."""
    tokens = AutoTokenizer.from_pretrained(tiny_folders["gemma3"])(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens).logits[0, -1]
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_selection_equals_the_peft_model_of_the_same_folder_and_of_one_written_here(
    name: str, trained: dict[str, Trained], tiny_folders: TinyFolders, make_engine: MakeEngine, tmp_path: Path
) -> None:
    weights = trained[name].weights
    model = PeftModel.from_pretrained(whole_model(tiny_folders["gemma3"]), trained[name].folder).eval()
    write_peft_folder(tmp_path, weights.modules, base_model="tiny")
    model.load_adapter(tmp_path, adapter_name="written here")
    jobs = [greedy(prompt, plan_of("selection", (weights, 1.0)), prompt, num_new=1) for prompt in PROMPTS]
    for answer, job in zip(run_together(make_engine(by_digest(weights)), jobs), jobs, strict=True):
        assert isinstance(job.prompt, str)
        for adapter in ("default", "written here"):
            model.set_adapter(adapter)
            expected = logits_of(model, tiny_folders, job.prompt)
            assert_equal_logits(answer.first_logits, expected)
        with model.disable_adapter():
            base = logits_of(model, tiny_folders, job.prompt)
        assert float((expected - base).abs().max()) > 0.05, "the adapter should matter"


@pytest.mark.parametrize("kind", TRAINING)
def test_settings_of_the_training_do_not_change_the_answer(
    kind: str, tiny_folders: TinyFolders, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """Trained for a step, saved by PEFT, checked as an upload, and compared with PEFT's model for generating."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM", **TRAINING[kind]}
    trained = get_peft_model(whole_model(tiny_folders["gemma3"]), LoraConfig(**settings)).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    for key, parameter in trained.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.15)
    tokens = torch.arange(3, 30)[None]
    trained(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    trained.eval().save_pretrained(tmp_path)
    checked_equals_peft(tmp_path, tiny_folders, make_engine)


def test_float64_tensors_are_rounded_as_by_peft(
    trained: dict[str, Trained], tiny_folders: TinyFolders, make_engine: MakeEngine, tmp_path: Path
) -> None:
    shutil.copytree(trained["plain"].folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    third = {key: tensor.double() / 3 for key, tensor in tensors.items()}
    save_file(third, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    checked_equals_peft(tmp_path, tiny_folders, make_engine)


def checked_equals_peft(folder: Path, tiny_folders: TinyFolders, make_engine: MakeEngine) -> None:
    """Check the folder as an upload, and compare the engine's logits with PEFT's."""
    base = load_base_model(tiny_config(tiny_folders["gemma3"]))
    accepts = {str(tiny_folders["gemma3"])}
    checked = check_folder(folder, accepts_base=accepts, module_shapes=linear_shapes(base))
    weights = AdapterWeights("digest", checked.modules)
    assert len(weights.modules) == 3 * len(ALL_LINEAR)
    model = PeftModel.from_pretrained(whole_model(tiny_folders["gemma3"]), folder).eval()
    job = greedy(PROMPTS[0], plan_of("selection", (weights, 1.0)), num_new=1)
    [answer] = run_together(make_engine(by_digest(weights)), [job])
    expected = logits_of(model, tiny_folders, PROMPTS[0])
    assert_equal_logits(answer.first_logits, expected)
    with model.disable_adapter():
        assert float((expected - logits_of(model, tiny_folders, PROMPTS[0])).abs().max()) > 0.01
