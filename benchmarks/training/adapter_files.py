"""The base model for training, and the files of a trained adapter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.training.bigbench_tasks import Item
from benchmarks.training.lora_training import freeze_linears

BASE_NAME = "gemma-3-270m"


def load_base(folder: Path) -> Any:
    """Load the base model in float32. Its linear layers multiply in bfloat16."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    freeze_linears(base)
    return base


def save_adapter(model: PeftModel, folder: Path, base_name: str = BASE_NAME) -> None:
    """Save a standard PEFT folder, matrices in bfloat16. It names the base model but no local path."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
        config.target_modules = sorted(config.target_modules)  # a set, whose order differs from run to run
    model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the model hub
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    weights = folder / "adapter_model.safetensors"
    tensors = {name: _rounded(name, tensor) for name, tensor in load_file(weights).items()}
    weights.write_bytes(save(tensors, metadata={"format": "pt"}))


def _rounded(name: str, tensor: Tensor) -> Tensor:
    """Keep factors of whole outputs, as DoRA and IA³ have them, in float32: they are close to those of no adapter."""
    return tensor.bfloat16() if "lora_A" in name or "lora_B" in name else tensor


def write_items(path: Path, items: Iterable[Item], labels: Sequence[str] = ()) -> None:
    """Write one JSON object per line: input, the first accepted answer, and the label set if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = {"labels": list(labels)} if labels else {}
    rows = [json.dumps({"input": i.input, "output": i.answers[0], **extra}, ensure_ascii=False) for i in items]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
