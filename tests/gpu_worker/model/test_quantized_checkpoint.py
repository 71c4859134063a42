from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.base_model import load_base_model
from gpu_worker.model.checkpoint import read_tensors
from gpu_worker.model.quantization import QuantizedLinear
from gpu_worker.model.quantized_checkpoint import check_format, pack_words, take_weights, unpack_words
from tests.tiny import TinyFolders, change_json, tiny_config

_CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def config_with(form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None, **others: Any) -> Any:
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, **others}


def checkpoint(source: Path, target: Path, *, bits: int) -> dict[str, torch.Tensor]:
    """Save the model with its projections as integers, and return their weights."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors, expected = load_file(target / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight, layer = tensors.pop(name), name.removesuffix(".weight")
        width = 32 if bits == 4 else weight.shape[1]
        scales = torch.stack([part.abs().amax(1) for part in weight.split(width, dim=1)], dim=1) / (2 ** (bits - 1) - 1)
        steps = scales.repeat_interleave(width, dim=1)[:, : weight.shape[1]]
        values = (weight / steps).round().to(torch.int8)
        expected[layer] = values * steps
        tensors[layer + ".weight_scale"] = scales
        if bits == 8:
            tensors[name] = values
        else:
            tensors[layer + ".weight_packed"] = pack_words(values, 4)
            tensors[layer + ".weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    own = config_with("int-quantized", _CHANNEL, _INPUTS) if bits == 8 else config_with("pack-quantized", _GROUPS)
    change_json(target / "config.json", {"quantization_config": own})
    return expected


@pytest.mark.parametrize("bits", [8, 4])
def test_the_integers_of_a_checkpoint_are_kept(bits: int, tmp_path: Path, tiny_folders: TinyFolders) -> None:
    expected = checkpoint(tiny_folders["llama"], tmp_path, bits=bits)
    base = load_base_model(tiny_config(tmp_path, dtype="auto", quantization="int8" if bits == 8 else "none"))
    assert base.dtype == torch.bfloat16
    assert len(expected) >= 14
    for name, weight in expected.items():
        layer = base.model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear) and layer.quantized.bits == bits
        assert layer.quantized.group == (32 if bits == 4 else 0)
        torch.testing.assert_close(layer.quantized.dequantized(), weight, rtol=2**-11, atol=0)  # scales of 11 bits
    is_rounded = isinstance(base.model.get_output_embeddings(), QuantizedLinear)
    assert is_rounded == (bits == 8), "the setting rounds what the checkpoint has as numbers"
    layers = [module for module in base.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == len(expected) + is_rounded


@pytest.mark.parametrize(
    ("bits", "suffix", "tensor", "said"),
    [
        (4, "weight_packed", None, "integers of model.layers.0.mlp.up_proj are missing"),
        (8, "weight_scale", None, "the scales of model.layers.0.mlp.up_proj are missing"),
        (4, "weight_packed", torch.zeros(48, 1, dtype=torch.int32), "up_proj"),  # of 1 bit
        (4, "weight_packed", torch.zeros(48, 4, dtype=torch.int64), "up_proj"),
        (4, "weight_packed", torch.zeros(4, dtype=torch.int32), "up_proj"),
        (4, "weight_shape", torch.tensor([48, 0]), "up_proj"),
        (4, "weight_shape", torch.tensor([48, -32]), "up_proj"),
        (4, "weight_shape", torch.tensor([32]), "up_proj"),
        (4, "weight_shape", None, "up_proj"),
        (4, "weight_scale", torch.ones(48, 0), "up_proj"),
        (4, "weight_scale", torch.ones(48, 3), "up_proj"),
        (4, "weight_scale", torch.ones(48, 1, 1), "up_proj"),
        (4, "weight_scale", torch.ones(47, 1), "up_proj"),
    ],
)
def test_integers_that_are_missing_or_have_another_shape_are_refused(
    bits: int, suffix: str, tensor: torch.Tensor | None, said: str, tmp_path: Path, tiny_folders: TinyFolders
) -> None:
    checkpoint(tiny_folders["llama"], tmp_path, bits=bits)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name := f"model.layers.0.mlp.up_proj.{suffix}"]
    save_file(tensors if tensor is None else tensors | {name: tensor}, tmp_path / "model.safetensors")
    with pytest.raises(BaseModelUnsupported, match=rf"{said}.* Copy the model's files again"):
        load_base_model(tiny_config(tmp_path, dtype="auto"))


def test_the_config_says_how_long_groups_are() -> None:
    """Two scales for 160 inputs are those of 128 and 32, or of 96 and 64. Small groups are kept as 8 bits."""
    values, scales = torch.ones(2, 160, dtype=torch.int8), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for size in (128, 96):
        tensors = {"a.weight_packed": pack_words(values, 4), "a.weight_shape": torch.tensor([2, 160])}
        found = dict(take_weights(tensors | {"a.weight_scale": scales}, {size}))["a"].dequantized()
        assert torch.equal(found, scales.repeat_interleave(size, dim=1)[:, :160])
    scales = torch.rand(2, 10).bfloat16()
    tensors = {"a.weight_packed": pack_words(values, 4), "a.weight_shape": torch.tensor([2, 160])}
    weight = dict(take_weights(tensors | {"a.weight_scale": scales}, {16, 32}))["a"]
    assert (weight.bits, weight.group) == (8, 16)
    assert torch.equal(weight.dequantized(), scales.float().repeat_interleave(16, dim=1))


def test_a_broken_file_is_refused_in_one_sentence(tmp_path: Path, tiny_folders: TinyFolders) -> None:
    checkpoint(tiny_folders["llama"], tmp_path, bits=8)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BaseModelUnsupported, match=r"model.safetensors cannot be read \("):
        load_base_model(tiny_config(tmp_path, dtype="auto"))


def test_weights_that_are_not_on_this_machine_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")

    def fetch(_: str, name: str, *, local_files_only: bool, **__: object) -> str | None:
        return None if local_files_only or name != "model.safetensors" else str(tmp_path / name)

    monkeypatch.setattr("gpu_worker.model.checkpoint.cached_file", fetch)
    assert list(read_tensors("somebody/model")) == ["a"]


def test_integers_in_float32_or_that_the_config_does_not_mention_are_refused(
    tmp_path: Path, tiny_folders: TinyFolders
) -> None:
    checkpoint(tiny_folders["llama"], tmp_path, bits=8)
    with pytest.raises(BaseModelUnsupported, match="dtype 'auto' or 'bfloat16', got 'cpu' and 'float32'"):
        load_base_model(tiny_config(tmp_path))
    shutil.copy(tiny_folders["llama"] / "config.json", tmp_path)
    with pytest.raises(BaseModelUnsupported, match=r"weights of 8 bits \(model.layers.0.*no quantization_config"):
        load_base_model(tiny_config(tmp_path))


@pytest.mark.parametrize("bits", [8, 4])
def test_words_hold_the_first_value_in_the_lowest_bits(bits: int) -> None:
    values = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, 19)).to(torch.int8)
    words = pack_words(values, bits)
    assert torch.equal(unpack_words(words, bits, 19), values)
    assert int(words[0, 0]) & ((1 << bits) - 1) == int(values[0, 0]) + (1 << (bits - 1))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq"}, "by gptq;"),
        ({"quant_method": "awq"}, "by awq;"),
        (config_with("float-quantized", _CHANNEL | {"type": "float"}), r"format float-quantized \(float 8 bits\)"),
        (config_with("pack-quantized", _GROUPS | {"num_bits": 2}), r"format pack-quantized \(int 2 bits\)"),
        (config_with("pack-quantized", _GROUPS | {"symmetric": False}), "with asymmetric weights"),
        (config_with("pack-quantized", _GROUPS | {"group_size": 48}), "with groups of 48"),
        (config_with("pack-quantized", _GROUPS | {"group_size": 0}), "with groups of 0"),
        (config_with("pack-quantized", _GROUPS, transform_config={"config_groups": {"R3": {}}}), "transformed inputs"),
        ({"quant_method": "compressed-tensors", "config_groups": {"W8A8": ["Linear"]}}, "the name of a scheme"),
        (config_with("int-quantized", _CHANNEL, _INPUTS | {"dynamic": False}), "not rounded token by token"),
        (config_with("int-quantized", _CHANNEL, kv_cache_scheme={"num_bits": 8}), "with a quantised KV cache"),
    ],
)
def test_other_formats_are_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(BaseModelUnsupported, match=f"quantised by .*{named.removeprefix('by ')}"):
        check_format(config, "llama")
