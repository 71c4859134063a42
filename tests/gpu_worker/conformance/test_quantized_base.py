"""A base model of rounded weights, or with float32 products, answers plans as its numbers do in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import OlmoConfig, OlmoForCausalLM

from gpu_worker.model.base_model import load_base_model
from gpu_worker.model.embedding import is_tied
from gpu_worker.model.packed_linear import KernelLinear
from gpu_worker.model.quantization import QuantizedLinear
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.conformance.driver import HostedEngine, Serve, job
from tests.gpu_worker.conformance.engines import ENGINES
from tests.gpu_worker.conformance.reference import Reference
from tests.soak import Scale
from tests.tiny import SHAPE, byte_tokenizer, change_json, plan_of, random_adapter, tiny_config

GROUP = 32  # inputs that share a scale
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in one integer


def _compressed(form: str, bits: int, kind: str, strategy: str, *, inputs: bool) -> dict[str, Any]:
    number = {"num_bits": bits, "type": kind, "symmetric": True}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": number | {"strategy": strategy, "dynamic": False}}
    if strategy == "group":
        group["weights"]["group_size"] = GROUP
    if inputs:
        group["input_activations"] = number | {"strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _rounded(weight: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Return integers (O, I / G, G) and scales (O, I / G, 1) of groups of inputs."""
    groups = weight.view(len(weight), -1, GROUP)
    scale = groups.abs().amax(dim=-1, keepdim=True) / largest
    return (groups / scale).round().clamp(-largest - 1, largest), scale


def _packed(nibbles: Tensor) -> Tensor:
    """Pack every 8 values of 4 bits along the last dimension into one integer of 32 bits, the first one lowest."""
    parts = nibbles.to(torch.int64).view(*nibbles.shape[:-1], -1, 8)
    whole = (parts << (4 * torch.arange(8))).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)


def _integers_of_8_bits(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    values = (weight / scale).round()
    return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale


def _floats_of_8_bits(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def _integers_of_4_bits(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    values, scale = _rounded(weight, 7)
    scale = scale.bfloat16().float()
    packed = _packed(values.view(weight.shape) + 8)
    shape = torch.tensor(weight.shape)
    tensors = {"weight_packed": packed, "weight_scale": scale.squeeze(-1).bfloat16(), "weight_shape": shape}
    return tensors, (values * scale).view(weight.shape)


def _gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    values, scale = _rounded(weight, 7)
    scale = scale.half().float()
    num_out, num_in = weight.shape
    tensors = {
        "qweight": _packed(values.view(num_out, num_in) + 8).T.contiguous(),
        "qzeros": _packed(torch.full((num_in // GROUP, num_out), 7)),
        "scales": scale.squeeze(-1).T.contiguous().half(),
        "g_idx": torch.arange(num_in, dtype=torch.int32) // GROUP,
    }
    return tensors, (values * scale).view(weight.shape)


def _awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    values, scale = _rounded(weight, 7)
    scale = scale.half().float()
    num_out, num_in = weight.shape
    columns = (values.view(num_out, num_in) + 8).T.reshape(num_in, -1, 8)[..., _AWQ_ORDER].reshape(num_in, num_out)
    tensors = {
        "qweight": _packed(columns),
        "qzeros": _packed(torch.full((num_in // GROUP, num_out), 8)),
        "scales": scale.squeeze(-1).T.contiguous().half(),
    }
    return tensors, (values * scale).view(weight.shape)


@dataclass(frozen=True)
class Format:
    """A way to write weights. `write`: (O, I) -> the module's tensors, and the weight that they stand for.

    `bound`: the largest difference of a log probability, in bfloat16.
    """

    config: Mapping[str, Any]
    write: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
    bound: float


_4_BITS = {"bits": 4, "group_size": GROUP}
# The first one runs at small counts. The inputs of a layer are rounded too in the formats of 8 bits.
FORMATS = {
    "int8": Format(_compressed("int-quantized", 8, "int", "channel", inputs=True), _integers_of_8_bits, 0.15),
    "int4": Format(_compressed("pack-quantized", 4, "int", "group", inputs=False), _integers_of_4_bits, 0.2),
    "gptq": Format({"quant_method": "gptq", "desc_act": False, "sym": True, **_4_BITS}, _gptq, 0.25),
    "awq": Format({"quant_method": "awq", "zero_point": True, **_4_BITS}, _awq, 0.25),
    "fp8": Format(_compressed("float-quantized", 8, "float", "channel", inputs=True), _floats_of_8_bits, 0.8),
}


def write_folders(form: Format, model: Path, path: Path) -> tuple[Path, Path]:
    """Save the model with the weights of its layers rounded: as the format writes them, and as floats."""
    quantized, floats = path / "quantized", path / "floats"
    for folder in (quantized, floats):
        folder.mkdir()
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    whole = load_file(model / "model.safetensors")
    written: dict[str, Tensor] = {}
    for name, weight in whole.items():
        if not name.endswith("_proj.weight"):
            written[name] = weight
            continue
        tensors, whole[name] = form.write(weight)
        written |= {name.removesuffix("weight") + part: tensor for part, tensor in tensors.items()}
    save_file(written, quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(whole, floats / "model.safetensors", metadata={"format": "pt"})
    change_json(quantized / "config.json", {"quantization_config": form.config})
    return quantized, floats


@pytest.mark.parametrize(
    ("engine", "name"), [(engine, name) for engine in ENGINES for name in FORMATS if engine == "vllm" or name == "int8"]
)
def test_mixtures_over_a_quantized_base_equal_the_reference(
    engine: str, name: str, model_folder: Path, tmp_path: Path, scale: Scale, serve: Serve
) -> None:
    if name not in list(FORMATS)[: scale.pick("formats", small=1, full=len(FORMATS))]:
        pytest.skip("runs at full counts")
    quantized, floats = write_folders(FORMATS[name], model_folder, tmp_path)
    assert_within(
        FORMATS[name].bound, serve(quantized, max_model_len=256, engine=engine, dtype="bfloat16"), Reference(floats)
    )


def write_copy(model: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Copy the model's folder with other tensors."""
    shutil.copytree(model, target, dirs_exist_ok=True)
    tensors = change(load_file(model / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_weights_rounded_at_the_start_equal_the_rounded_model(
    quantization: str, model_folder: Path, tmp_path: Path, serve: Serve
) -> None:
    """The native engine rounds a bfloat16 checkpoint; the reference has the same numbers as floats."""
    changes = {"dtype": "auto", "quantization": quantization}
    rounded = load_base_model(tiny_config(model_folder, max_model_len=256, **changes)).model
    head = rounded.get_output_embeddings()
    assert isinstance(head, QuantizedLinear) and is_tied(rounded), "the embedding has the head's matrix"
    found = {f"{name}.weight": layer for name, layer in rounded.named_modules() if isinstance(layer, QuantizedLinear)}
    layers = {name: layer for name, layer in found.items() if layer is not head}
    layers |= {"lm_head.weight": head, "model.embed_tokens.weight": head}
    floats = {name: layer.quantized.dequantized() for name, layer in layers.items()}
    folder = write_copy(model_folder, tmp_path, lambda tensors: tensors | floats)
    change_json(folder / "config.json", {"tie_word_embeddings": False})
    assert_within(0.15, serve(model_folder, max_model_len=256, **changes), Reference(folder))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_model_whose_weights_are_all_rounded_starts(quantization: str, tmp_path: Path, serve: Serve) -> None:
    """OLMo's norms have no weights, so nothing of it stays a number of its own type."""
    torch.manual_seed(0)
    OlmoForCausalLM(OlmoConfig(**SHAPE)).bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    changes = {"dtype": "auto", "quantization": quantization}
    dtype = load_base_model(tiny_config(tmp_path, max_model_len=256, **changes)).dtype
    [answer] = serve(tmp_path, max_model_len=256, **changes).answers(job("The sea is"))
    assert answer.num_new_tokens > 0 and dtype == torch.bfloat16


def test_products_of_bfloat16_weights_are_float32_without_bfloat16_instructions(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    folder = write_copy(model_folder, tmp_path, lambda tensors: {n: t.bfloat16().float() for n, t in tensors.items()})
    hosted = serve(folder, max_model_len=256, dtype="auto")
    model = hosted.engine.loop.base.model  # type: ignore[attr-defined]  # the native engine's
    packed = [module for module in model.modules() if isinstance(module, KernelLinear)]
    assert len(packed) == 7 * 3 + 1 and {layer.dtype for layer in packed} == {torch.float32}
    left = sum(parameter.nbytes for parameter in model.parameters())
    assert left < 1 << 14, "only norms are left; the embedding is looked up in the output head"
    assert_within(1e-3, hosted, Reference(folder))


def assert_within(bound: float, hosted: HostedEngine, reference: Reference) -> list[float]:
    """Check each kind of plan, and that each has its own answer. Return the differences."""
    one, other = (random_adapter(hosted.engine.module_shapes, seed) for seed in (1, 2))
    hosted.add(one, other)
    parts = (one, 0.7), (other, 0.6)
    plans = [BASE_PLAN, plan_of("selection", (one, 1.0)), plan_of("mixture", *parts), plan_of("fusion", *parts)]
    known = [reference.greedy("A parrot says", plan, hosted.pool, 1)[0].logprobs for plan in plans]
    found_errors = []
    for number, answer in enumerate(hosted.answers(*[job("A parrot says", plan) for plan in plans])):
        found = dict(answer.logprobs[0].top)
        errors = [error_of(found, each, reference) for each in known]
        assert errors[number] < bound
        assert min(errors[:number] + errors[number + 1 :]) > 2 * errors[number], "each plan has its own answer"
        found_errors.append(errors[number])
    return found_errors


def error_of(found: Mapping[bytes, float], known: Tensor, reference: Reference) -> float:
    """Return the largest difference of a log probability. Each of the first 256 ids is one byte."""
    by_bytes = {reference.token_bytes(token): float(known[token]) for token in range(256)}
    return max(abs(logprob - by_bytes[token]) for token, logprob in found.items())
