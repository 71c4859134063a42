from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lora_store import AdapterRefused, Limits, ModuleWeights, Sample, write_peft_folder
from lora_store.sample_files import read_description
from lora_store.weights_blob import encode_weights
from tests.lora_store.builders import MakeFolder, MakeWeights, read_folder

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def _llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))


def _gemma() -> PreTrainedModel:
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8, layer_types=layers))


def _lora_layers(model: Any) -> dict[str, Any]:
    """Return PEFT's own layers by the base model's module path."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }


@pytest.mark.parametrize(
    ("make_model", "use_rslora", "dtype"), [(_llama, False, torch.float32), (_gemma, True, torch.bfloat16)]
)
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {
            "rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 2, r"model\.layers\.\d+\.mlp\..*": 3},
            "alpha_pattern": {r"^model\.layers\.0\..*(v|up)_proj": 3, "proj": 99, "down_proj": 5},
        },
    ],
    ids=["uniform", "patterns"],
)
def test_a_folder_of_peft_is_read_as_peft_reads_it(
    tmp_path: Path,
    make_model: Callable[[], PreTrainedModel],
    use_rslora: bool,
    dtype: torch.dtype,
    patterns: dict[str, Any],
) -> None:
    config = LoraConfig(
        r=6, lora_alpha=12, target_modules=TARGETS, use_rslora=use_rslora, init_lora_weights=False, **patterns
    )
    model = get_peft_model(make_model(), config).to(dtype)
    model.save_pretrained(tmp_path)
    layers = _lora_layers(model)
    read = read_folder(tmp_path)
    assert set(read.modules) == set(layers)
    assert len(layers) == 8
    for name, layer in layers.items():
        module = read.modules[name]
        assert module.scaling == layer.scaling["default"]
        assert module.rank == layer.r["default"] == read.config.find_rank(name)
        assert module.lora_a.dtype == dtype
        assert torch.equal(module.lora_a, layer.lora_A["default"].weight)
        assert torch.equal(module.lora_b, layer.lora_B["default"].weight)
    assert read.config.unsupported == ()


@pytest.mark.parametrize("make_model", [_llama, _gemma], ids=["llama", "gemma3"])
def test_peft_opens_a_written_folder_with_every_modules_weights_rank_and_scaling(
    tmp_path: Path, make_model: Callable[[], PreTrainedModel]
) -> None:
    base = make_model()
    random = torch.Generator().manual_seed(1)
    shapes = {
        name: tuple(module.weight.shape) for name, module in base.named_modules() if name.rpartition(".")[2] in TARGETS
    }
    weights = {
        name: ModuleWeights(
            torch.randn(rank := 1 + number % 3, num_in, generator=random),
            torch.randn(num_out, rank, generator=random),
            0.3 + number / 7,
        )
        for number, (name, (num_out, num_in)) in enumerate(shapes.items())
    }
    write_peft_folder(tmp_path / "adapter", weights, base_model="tiny-base")
    layers = _lora_layers(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert set(layers) == set(weights)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A["default"].weight, weights[name].lora_a)
        assert torch.equal(layer.lora_B["default"].weight, weights[name].lora_b)
        assert layer.scaling["default"] == pytest.approx(weights[name].scaling, rel=1e-15)
        assert read_folder(tmp_path / "adapter").modules[name].scaling == layer.scaling["default"]


def test_a_written_folder_reads_back_to_the_same_digest(tmp_path: Path, make_weights: MakeWeights) -> None:
    write_peft_folder(tmp_path, make_weights(), base_model="b")
    assert read_folder(tmp_path).samples == ()
    samples = [Sample("Write a poem.", "Roses"), Sample("two\nlines\u2028 – é"), Sample("é" * 4000)]
    write_peft_folder(tmp_path, make_weights(), base_model="b", samples=samples, description="Poems.")
    read = read_folder(tmp_path)
    assert encode_weights(read.modules) == encode_weights(make_weights())
    assert read.samples == tuple(samples)
    assert (read_description(tmp_path, Limits()), read.config.base_model) == ("Poems.", "b")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (4, 8, {}), "equal alphas need no pattern"
    assert config["rank_pattern"] == {r"^model\.layers\.0\.mlp\.up_proj": 2}


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "lora_samples.jsonl"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_never_followed(tmp_path: Path, make_folder: MakeFolder, file: str, dangling: bool) -> None:
    folder = make_folder()
    (folder / file).rename(tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / ("nowhere" if dangling else "elsewhere"))
    with pytest.raises(AdapterRefused, match=f"{file}: is a symbolic link"):
        read_folder(folder)
