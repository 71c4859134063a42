"""Routers in every layer: their equations and their training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.paper.training.experts import Sum
from benchmarks.paper.training.layer_routers import LayerRouted, Reading, RoutedLinear, prompt_mask, train_layers
from benchmarks.paper.training.routers import RouterKind
from benchmarks.training.bigbench_tasks import Item
from benchmarks.training.lora_training import NO_LABEL, AnswerLoss, FrozenLinear, Recipe, freeze_linears, tokenize
from gpu_worker.model.base_model import BaseModel
from tests.tiny import linear_shapes, random_adapter

P, R, I, O = 4, 3, 8, 10  # noqa: E741  the dimensions' names


def routed(how: Sum, kind: RouterKind) -> tuple[RoutedLinear, Reading, torch.Tensor]:
    torch.manual_seed(0)
    base, reading = FrozenLinear.of(torch.nn.Linear(I, O, bias=False)), Reading()
    layer = RoutedLinear(base, torch.randn(P, R, I), torch.randn(P, O, R), how, kind, reading)
    torch.nn.init.normal_(layer.gate)
    return layer, reading, torch.randn(2, 5, I)


@pytest.mark.parametrize("num_chosen", [None, 1, 3])
def test_every_token_has_its_own_mixture(num_chosen: int | None) -> None:
    layer, _, x = routed("mixture", RouterKind(num_chosen))
    expected = layer.base(x)
    for row in range(2):
        for token in range(5):
            weights = (layer.gate @ x[row, token]).softmax(dim=0)
            best = weights.argsort(descending=True)[: num_chosen or P]
            total = weights[best].sum()
            for p in best.tolist():
                expected[row, token] += weights[p] / total * (layer._b[p] @ (layer._a[p] @ x[row, token]))
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_fusion_averages_the_prompt_and_keeps_its_weights_for_later_tokens() -> None:
    layer, reading, x = routed("fusion", RouterKind())
    reading.prompt = torch.tensor([[0.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    means = [x[0, 1:4].mean(dim=0), x[1].mean(dim=0)]
    weights = torch.stack([(layer.gate @ mean).softmax(dim=0) for mean in means])

    def fused(inputs: torch.Tensor) -> torch.Tensor:
        made = layer.base(inputs)
        for row in range(2):
            a, b = (torch.einsum("p,pij->ij", weights[row], own) for own in (layer._a, layer._b))
            made[row] += inputs[row] @ a.T @ b.T
        return made

    torch.testing.assert_close(layer(x), fused(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x[:, :1]), fused(x[:, :1]), atol=1e-4, rtol=1e-4)


def test_the_prompt_ends_with_the_token_that_predicts_the_answer() -> None:
    labels = torch.tensor([[NO_LABEL, NO_LABEL, 5, 6, NO_LABEL], [NO_LABEL, 7, NO_LABEL, NO_LABEL, NO_LABEL]])
    assert prompt_mask(labels).tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("how", ["mixture", "fusion"])
def test_gates_learn_and_nothing_else_does(
    how: Sum, tiny_base: Callable[..., BaseModel], tiny_folders: Mapping[str, Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["gemma3"], dtype=torch.float32).requires_grad_(False)
    freeze_linears(model)
    shapes = linear_shapes(tiny_base())
    adapters = [random_adapter(shapes, seed, rank=3, modules=lambda name: "layers.0" not in name) for seed in range(3)]
    examples = tokenize(
        [Item(f"say {n}", (f"{n}",)) for n in range(12)], AutoTokenizer.from_pretrained(model.name_or_path)
    )
    made = LayerRouted(model, adapters, how, RouterKind(learning_rate=3e-2, num_steps=25))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses: list[float] = []
    loss_of = AnswerLoss(model.model.embed_tokens.weight, examples, Recipe(vocabulary_len=300))
    train_layers(made, examples, loss_of, losses.append)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5]) and made.reading.noise is None
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {f"{name}.gate" for name in made.gates()}
    again = LayerRouted(model, adapters, how, made.kind)
    assert not any(gate.any() for gate in again.gates().values())
    again.load_gates(made.gates())
    assert all(gate.equal(made.gates()[name]) for name, gate in again.gates().items())
