"""Read and write PEFT's adapter folders. Its names appear only here, in `peft_config` and in what they import."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lora_store.adapter import ModuleWeights, Sample
from lora_store.bounded_files import Limits, read_bytes
from lora_store.errors import FileRefused
from lora_store.expert_tensors import split_experts
from lora_store.peft_config import CONFIG_FILE, PeftConfig
from lora_store.safetensors_layout import StoredModule, StoredTensor
from lora_store.sample_files import DESCRIPTION_FILE, SAMPLES_FILE, write_samples
from lora_store.tensor_paths import tensor_key

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "adapter_model.safetensors"
MLX_WEIGHTS_FILE = "adapters.safetensors"
_ROUTERS = (".gate", ".router")  # to PEFT, weights of routers are parameters
PICKLE_FILE = "adapter_model.bin"
TEMPLATE_FILE = "chat_template.jinja"

Side = Literal["lora_a", "lora_b"]
T = TypeVar("T", "Tensor", StoredTensor)
Module = TypeVar("Module", ModuleWeights, StoredModule)
_SIDES: dict[str, Side] = {"A": "lora_a", "B": "lora_b"}
_KEY = re.compile(r"base_model\.model\.([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\.lora_([AB])\.weight")
# Of VeLoRA, which compresses the gradients' inputs, and MonteCLoRA, which perturbs A while it is trained.
_TRAINING_STATE = re.compile(r"base_model\.model\..+\.(?:lora_velora_embed|lora_monteclora_sampler\.\w+)")


def write_peft_folder(
    folder: Path,
    weights: Mapping[str, ModuleWeights],
    *,
    base_model: str,
    samples: Sequence[Sample] = (),
    description: str | None = None,
) -> None:
    """Write a standard PEFT folder that `PeftModel.from_pretrained` can open.

    The most common rank and lora_alpha become the defaults; every other module gets its own pattern. Reading the folder
    returns the scalings exactly, those of rsLoRA to within one rounding.
    """
    from safetensors.torch import save_file  # imported here, since torch takes seconds

    folder.mkdir(parents=True, exist_ok=True)
    tensors, experts = split_experts(weights)
    config = _make_config(weights, experts) | {"base_model_name_or_path": base_model, "task_type": "CAUSAL_LM"}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in weights.keys() - set(experts):
        tensors[tensor_key(name, "A")] = weights[name].lora_a
        tensors[tensor_key(name, "B")] = weights[name].lora_b
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in sorted(tensors.items())}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if samples:
        (folder / SAMPLES_FILE).write_bytes(write_samples(samples))
    if description is not None:
        (folder / DESCRIPTION_FILE).write_text(description)


def template_digest(source: str) -> str:
    """Return the sha256 of a Jinja template. Line endings and the last one do not count, as Jinja ignores both."""
    text = source.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    return hashlib.sha256(text.encode()).hexdigest()


def read_template(folder: Path, limits: Limits) -> str | None:
    """Return the digest of the folder's chat template, None if there is none. Raises: FileRefused."""
    if not os.path.lexists(folder / TEMPLATE_FILE):
        return None
    try:
        return template_digest(read_bytes(folder / TEMPLATE_FILE, limits.max_template_bytes).decode())
    except UnicodeDecodeError as exc:
        raise FileRefused(TEMPLATE_FILE, ["is not UTF-8"]) from exc


def is_only_for_training(key: str) -> bool:
    """Return whether the tensor is state of the training that no prompt's answer depends on."""
    return _TRAINING_STATE.fullmatch(key) is not None


def split_key(key: str) -> tuple[str, Side] | None:
    """Return (module path, side) for the key of a LoRA tensor, None for any other key."""
    match = _KEY.fullmatch(key)
    return (match[1], _SIDES[match[2]]) if match else None


def pair_tensors(tensors: Mapping[str, T]) -> dict[str, dict[Side, T]]:
    """Return the LoRA tensors by module path and side, sorted by module. Ignore other tensors."""
    pairs: dict[str, dict[Side, T]] = {}
    for key in sorted(tensors):
        if split := split_key(key):
            pairs.setdefault(split[0], {})[split[1]] = tensors[key]
    return pairs


def pair_modules(
    make: Callable[[T, T, float], Module],
    config: PeftConfig,
    pairs: Mapping[str, dict[Side, T]],
    paths: Mapping[str, str],
) -> dict[str, Module]:
    """Return the modules that have both sides, each made with its scaling from `config`.

    `paths`: of modules with other paths in the model that was trained.
    """
    return {
        name: make(a, b, config.find_scaling(a.shape[-2], paths.get(name, name), name))
        for name, pair in pairs.items()
        if (a := pair.get("lora_a")) is not None and (b := pair.get("lora_b")) is not None
    }


def _make_config(weights: Mapping[str, ModuleWeights], experts: Collection[str]) -> dict[str, Any]:
    paths = {name: f"{name}.weight" if name.endswith(_ROUTERS) else name for name in weights}
    parameters = {*experts, *(path for name, path in paths.items() if path != name)}
    ranks = {paths[name]: module.rank for name, module in weights.items()}
    alphas = {paths[name]: _compute_alpha(module) for name, module in weights.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({*paths.values()} - parameters),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "rank_pattern": {_exactly(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_exactly(name): value for name, value in alphas.items() if value != alpha},
        "inference_mode": True,
    }


def _compute_alpha(module: ModuleWeights) -> float:
    """Return the lora_alpha that gives exactly this scaling, if there is one; an int as in PEFT's own configs."""
    alpha = module.scaling * module.rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    found = next((one for one in near if one / module.rank == module.scaling), alpha)
    return int(found) if float(found).is_integer() else found


def _exactly(module: str) -> str:
    return "^" + module.replace(".", r"\.")
