"""A base model of integers, or of bfloat16 with float32 products, answers as its rounded weights do in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.model.base_model import load_base_model
from gpu_worker.model.packed_linear import KernelLinear
from gpu_worker.model.quantization import QuantizedLinear
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.conformance.driver import HostedEngine, job
from tests.gpu_worker.conformance.engines import ENGINES
from tests.gpu_worker.conformance.reference import Reference
from tests.tiny import plan_of, random_adapter, tiny_config

MakeAdapter = Callable[..., AdapterWeights]
# Each input of a layer is rounded to 8 bits too, which the reference does not do.
TOLERANCE = 0.15
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS, "input_activations": _INPUTS}},
    "ignore": ["lm_head"],
}


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Save the model with its layers' weights rounded to 8 bits: as integers with scales, and as floats."""
    integers, floats = tmp_path_factory.mktemp("integers"), tmp_path_factory.mktemp("floats")
    for file in model_folder.iterdir():
        for folder in (integers, floats):
            (folder / file.name).write_bytes(file.read_bytes())
    whole = load_file(model_folder / "model.safetensors")
    rounded = dict(whole)
    for name, weight in whole.items():
        if not name.endswith("_proj.weight"):
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        values = (weight / scale).round()
        rounded[name] = values.to(torch.int8)
        rounded[name.removesuffix("weight") + "weight_scale"] = scale
        whole[name] = values * scale
    save_file(rounded, integers / "model.safetensors", metadata={"format": "pt"})
    save_file(whole, floats / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((integers / "config.json").read_text())
    (integers / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    return integers, floats


@pytest.fixture(params=list(ENGINES))
def hosted(request: pytest.FixtureRequest, folders: tuple[Path, Path]) -> Iterator[HostedEngine]:
    config = tiny_config(folders[0], max_model_len=256, engine=request.param, dtype="bfloat16")
    engine = HostedEngine(ENGINES[request.param], config)
    yield engine
    engine.close()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_weights_rounded_at_the_start_equal_the_rounded_model(
    quantization: str, model_folder: Path, tmp_path: Path
) -> None:
    """The native engine rounds a bfloat16 checkpoint; the reference has the same numbers as floats."""
    config = tiny_config(model_folder, max_model_len=256, dtype="auto", quantization=quantization)
    rounded = load_base_model(config).model
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model_folder / "model.safetensors")
    layers = dict(rounded.named_modules())
    for name in tensors:
        layer = layers.get(name.removesuffix(".weight"))
        if isinstance(layer, QuantizedLinear):
            tensors[name] = layer.quantized.dequantized()
    head = rounded.get_output_embeddings()
    assert isinstance(head, QuantizedLinear)
    assert torch.equal(rounded.get_input_embeddings().weight, head.weight), "the embedding has the head's matrix"
    tensors |= {name: head.quantized.dequantized() for name in ("lm_head.weight", "model.embed_tokens.weight")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    engine = HostedEngine(ENGINES["native"], config)
    try:
        check_plans(
            engine, Reference(tmp_path), *[random_adapter(engine.engine.module_shapes, seed) for seed in (1, 2)]
        )
    finally:
        engine.close()


def test_products_of_bfloat16_weights_are_float32_without_bfloat16_instructions(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model_folder / "model.safetensors")
    rounded = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    save_file(rounded, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = HostedEngine(ENGINES["native"], tiny_config(tmp_path, max_model_len=256, dtype="auto"))
    try:
        model = engine.engine.loop.base.model  # type: ignore[attr-defined]  # the native engine's
        packed = [module for module in model.modules() if isinstance(module, KernelLinear)]
        assert len(packed) == 7 * 3 + 1 and {layer.dtype for layer in packed} == {torch.float32}
        left = sum(parameter.nbytes for parameter in model.parameters())
        assert left < 1 << 14, "only norms are left; the embedding is looked up in the output head"
        one, other = (random_adapter(engine.engine.module_shapes, seed) for seed in (1, 2))
        check_plans(engine, Reference(tmp_path), one, other, tolerance=1e-3)
    finally:
        engine.close()


def test_mixtures_over_a_quantized_base_equal_the_reference(
    hosted: HostedEngine, adapter: MakeAdapter, folders: tuple[Path, Path]
) -> None:
    check_plans(hosted, Reference(folders[1]), adapter(1), adapter(2))


def check_plans(
    hosted: HostedEngine,
    reference: Reference,
    one: AdapterWeights,
    other: AdapterWeights,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    """Compare the answers of the base, of one adapter, of a mixture and of a fusion with the reference."""
    for weights in (one, other):
        hosted.add(weights)
    parts = (one, 0.7), (other, 0.6)
    plans = [BASE_PLAN, plan_of("selection", (one, 1.0)), plan_of("mixture", *parts), plan_of("fusion", *parts)]
    known = [reference.greedy("A parrot says", plan, hosted.pool, 1)[0].logprobs for plan in plans]
    for number, answer in enumerate(hosted.answers(*[job("A parrot says", plan) for plan in plans])):
        found = dict(answer.logprobs[0].top)
        errors = [error_of(found, each, reference) for each in known]
        assert errors[number] < tolerance
        assert min(errors[:number] + errors[number + 1 :]) > 2 * errors[number], "each plan has its own answer"


def error_of(found: Mapping[bytes, float], known: torch.Tensor, reference: Reference) -> float:
    """Return the largest difference of a log probability. Each of the first 256 ids is one byte."""
    by_bytes = {reference.token_bytes(token): float(known[token]) for token in range(256)}
    return max(abs(logprob - by_bytes[token]) for token, logprob in found.items())
