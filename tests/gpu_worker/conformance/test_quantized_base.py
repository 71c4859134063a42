"""A base model of 8-bit integers, which only vLLM serves, answers plans as its rounded weights do in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.config import WorkerConfig
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.conformance.driver import HostedEngine, job
from tests.gpu_worker.conformance.engines import ENGINES
from tests.gpu_worker.conformance.reference import Reference
from tests.tiny import plan_of, tiny_config

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


def config_of(folder: Path) -> WorkerConfig:
    return tiny_config(folder, max_model_len=256, engine="vllm", dtype="bfloat16")


@pytest.fixture
def hosted(folders: tuple[Path, Path]) -> Iterator[HostedEngine]:
    engine = HostedEngine(ENGINES["vllm"], config_of(folders[0]))
    yield engine
    engine.close()


def test_mixtures_over_a_quantized_base_equal_the_reference(
    hosted: HostedEngine, adapter: MakeAdapter, folders: tuple[Path, Path]
) -> None:
    reference = Reference(folders[1])
    one, other = adapter(1), adapter(2)
    parts = (one, 0.7), (other, 0.6)
    plans = [BASE_PLAN, plan_of("selection", (one, 1.0)), plan_of("mixture", *parts), plan_of("fusion", *parts)]
    known = [reference.greedy("A parrot says", plan, hosted.pool, 1)[0].logprobs for plan in plans]
    for number, answer in enumerate(hosted.answers(*[job("A parrot says", plan) for plan in plans])):
        found = dict(answer.logprobs[0].top)
        errors = [error_of(found, each, reference) for each in known]
        assert errors[number] < TOLERANCE
        assert min(errors[:number] + errors[number + 1 :]) > 2 * errors[number], "each plan has its own answer"


def error_of(found: Mapping[bytes, float], known: torch.Tensor, reference: Reference) -> float:
    """Return the largest difference of a log probability. Each of the first 256 ids is one byte."""
    by_bytes = {reference.token_bytes(token): float(known[token]) for token in range(256)}
    return max(abs(logprob - by_bytes[token]) for token, logprob in found.items())
