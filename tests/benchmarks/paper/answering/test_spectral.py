"""Scores from adapters' weights, against full matrices and loops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.paper.answering.spectral import SIGNALS, Directions, Spectra, calibrated
from lora_store import AdapterWeights, ModuleWeights

TEXTS = ["count to three", "name the capital of a large country"]


@pytest.fixture
def model(tiny_folders: Mapping[str, Path]) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_folders["gemma3"], dtype=torch.float32)


@pytest.fixture
def adapters(model: torch.nn.Module) -> list[AdapterWeights]:
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers.1" in name}
    shapes = {name: (m.out_features, m.in_features) for name, m in linear.items()}
    return [
        AdapterWeights(
            str(seed),
            {name: ModuleWeights(torch.randn(3, i), torch.randn(o, 3), 0.5 + seed) for name, (o, i) in shapes.items()},
        )
        for seed in range(2)
    ]


def slow_signals(part: ModuleWeights, tokens: torch.Tensor) -> tuple[float, float, float]:
    """Return the signals of one adapter in one layer from its whole matrix, token by token. `tokens` (T, I)."""
    matrix = part.scaling * part.lora_b @ part.lora_a
    first = torch.linalg.svd(matrix).Vh[0]
    arrow = [abs(float(first @ x)) / float(x.norm()) for x in tokens]
    spectr = [float((matrix @ x).norm()) / float(x.norm()) for x in tokens]
    return sum(arrow) / len(arrow), sum(spectr) / len(spectr), spectr[-1]


def test_a_layers_signals_are_those_of_the_whole_matrix() -> None:
    torch.manual_seed(1)
    parts = [ModuleWeights(torch.randn(3, 8), torch.randn(10, 3), scaling) for scaling in (0.5, 2.0)]
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = Directions.of(parts).signals(x, mask)
    for prompt, length in ((0, 5), (1, 3)):
        for number, part in enumerate(parts):
            expected = slow_signals(part, x[prompt, :length])
            assert found[:, prompt, number].tolist() == pytest.approx(expected, rel=1e-4)


def test_a_prompt_has_the_same_scores_alone_and_in_a_padded_batch(
    model: torch.nn.Module, adapters: list[AdapterWeights], tiny_folders: Mapping[str, Path]
) -> None:
    spectra, tokenizer = Spectra(model, adapters), AutoTokenizer.from_pretrained(tiny_folders["gemma3"])
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    together = spectra.scores(batch["input_ids"], batch["attention_mask"])
    assert together.keys() == set(SIGNALS)
    for number, text in enumerate(TEXTS):
        one = tokenizer([text], return_tensors="pt")
        alone = spectra.scores(one["input_ids"], one["attention_mask"])
        for name in SIGNALS:
            torch.testing.assert_close(together[name][number], alone[name][0], rtol=1e-4, atol=1e-5)


def test_layers_count_equally(
    model: torch.nn.Module, adapters: list[AdapterWeights], tiny_folders: Mapping[str, Path]
) -> None:
    inputs: dict[str, torch.Tensor] = {}
    for name in adapters[0].modules:
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0][0]}))
    one = AutoTokenizer.from_pretrained(tiny_folders["gemma3"])([TEXTS[0]], return_tensors="pt")
    found = Spectra(model, adapters).scores(one["input_ids"], one["attention_mask"])
    for number, adapter in enumerate(adapters):
        layers = [slow_signals(part, inputs[name].detach()) for name, part in adapter.modules.items()]
        for signal, values in zip(SIGNALS, zip(*layers, strict=True), strict=True):
            assert float(found[signal][0, number]) == pytest.approx(sum(values) / len(values), rel=1e-3)


def test_calibration_takes_away_each_adapters_own_level() -> None:
    reference = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    found = calibrated(torch.tensor([[2.0, 20.0]]), reference)
    torch.testing.assert_close(found, torch.zeros(1, 2))
    up = calibrated(torch.tensor([[3.0, 20.0]]), reference)
    assert up[0, 0] > up[0, 1]
