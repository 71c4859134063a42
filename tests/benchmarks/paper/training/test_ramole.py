"""RAMoLE's gate: its equations, its identities, and its training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.paper.training.packing import Packed
from benchmarks.paper.training.ramole import Chosen, GatedLinear, GatedModel, GateRecipe, train_gates
from benchmarks.training.bigbench_tasks import Item
from benchmarks.training.lora_training import AnswerLoss, Example, FrozenLinear, Recipe, freeze_linears, tokenize
from gpu_worker.model.base_model import BaseModel
from lora_store import AdapterWeights
from tests.tiny import linear_shapes, random_adapter

P, R, I, O, GATE_RANK = 4, 3, 8, 10, 5  # noqa: E741  the dimensions' names


def layer(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[GatedLinear, Chosen]:
    base, chosen = FrozenLinear.of(torch.nn.Linear(I, O, bias=False)), Chosen()
    chosen.allowed = torch.ones(1, len(lora_a), dtype=torch.bool)
    made = GatedLinear(base, lora_a, lora_b, GATE_RANK, chosen)
    torch.nn.init.normal_(made.gate_b)
    return made, chosen


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return lora_a (P, R, I), lora_b (P, O, R), x (B, T, I)."""
    torch.manual_seed(0)
    return torch.randn(P, R, I), torch.randn(P, O, R), torch.randn(2, 3, I)


def test_the_output_equals_the_papers_equations(drawn: tuple[torch.Tensor, ...]) -> None:
    lora_a, lora_b, x = drawn
    gated, chosen = layer(lora_a, lora_b)
    chosen.allowed = torch.tensor([[True, True, False, True], [False, True, True, False]])
    expected = gated.base(x)
    for row in range(2):
        for token in range(3):
            values = {p: lora_b[p] @ (lora_a[p] @ x[row, token]) for p in range(P) if chosen.allowed[row, p]}
            query = gated.gate_a @ x[row, token]
            scores = {p: (query @ (gated.gate_b.T @ v)) / math.sqrt(GATE_RANK) for p, v in values.items()}
            total = sum(torch.exp(score) for score in scores.values())
            expected[row, token] += sum(torch.exp(scores[p]) / total * v for p, v in values.items())
    torch.testing.assert_close(gated(x), expected, atol=1e-4, rtol=1e-4)


def test_weights_sum_to_one_over_the_allowed(drawn: tuple[torch.Tensor, ...]) -> None:
    lora_a, lora_b, x = drawn
    gated, chosen = layer(lora_a, lora_b)
    chosen.allowed = torch.tensor([[True, False, True, True]])
    h = torch.einsum("bti,pri->btpr", x, lora_a)
    weights = gated.weights(x, h)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3))
    assert not weights[..., 1].any() and weights.std() > 0.05


def test_one_allowed_adapter_is_used_alone_and_equal_ones_act_as_one(drawn: tuple[torch.Tensor, ...]) -> None:
    lora_a, lora_b, x = drawn
    gated, chosen = layer(lora_a, lora_b)
    alone = gated.base(x) + (x @ lora_a[2].T) @ lora_b[2].T
    chosen.allowed = torch.tensor([[False, False, True, False]])
    torch.testing.assert_close(gated(x), alone, atol=1e-5, rtol=1e-5)
    same, _ = layer(lora_a[2:3].repeat(5, 1, 1), lora_b[2:3].repeat(5, 1, 1))
    same.base = gated.base
    torch.testing.assert_close(same(x), alone, atol=1e-5, rtol=1e-5)


def test_fixed_weights_are_a_mixture(drawn: tuple[torch.Tensor, ...]) -> None:
    lora_a, lora_b, x = drawn
    gated, chosen = layer(lora_a, lora_b)
    chosen.fixed = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.2, 0, 0.8]])
    sums = torch.einsum("bp,por,pri,bti->bto", chosen.fixed, lora_b, lora_a, x)
    torch.testing.assert_close(gated(x), gated.base(x) + sums, atol=1e-5, rtol=1e-5)


@pytest.fixture
def frozen(tiny_folders: Mapping[str, Path]) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["gemma3"], dtype=torch.float32).requires_grad_(False)
    freeze_linears(model)
    return model


@pytest.fixture
def adapters(tiny_base: Callable[..., BaseModel]) -> list[AdapterWeights]:
    shapes = linear_shapes(tiny_base())
    return [random_adapter(shapes, seed, rank=3, modules=lambda name: "layers.0" not in name) for seed in range(4)]


@pytest.fixture
def examples(tiny_folders: Mapping[str, Path]) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folders["gemma3"])
    return tokenize([Item(f"say {n}", (f"{n}",)) for n in range(12)], tokenizer)


def test_gates_learn_and_nothing_else_does(
    frozen: torch.nn.Module, adapters: list[AdapterWeights], examples: list[Example]
) -> None:
    model = GatedModel(frozen, adapters, rank=4)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    losses: list[float] = []
    loss_of = AnswerLoss(frozen.model.embed_tokens.weight, examples, Recipe(vocabulary_len=300))
    recipe = GateRecipe(num_steps=30, batch_tokens=400, learning_rate=3e-2, dropped=0.0)
    train_gates(model, examples, loss_of, Packed(examples, frozen.config), recipe, losses.append)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    changed = {name for name, value in frozen.state_dict().items() if not value.equal(before[name])}
    assert changed == set(model.gates())


def test_learnt_gates_weigh_other_adapters_too(frozen: torch.nn.Module, adapters: list[AdapterWeights]) -> None:
    few = GatedModel(frozen, adapters[:2], rank=4)
    learnt = {name: torch.randn_like(value) for name, value in few.gates().items()}
    few.load_gates(learnt)
    every = GatedModel(frozen, adapters, rank=4)
    every.load_gates(learnt)
    ids, both = torch.arange(20)[None], torch.tensor([[True, True]])
    every.chosen.allowed = torch.tensor([[True, True, False, False]])
    with torch.no_grad():
        found = frozen(input_ids=ids).logits
        again = GatedModel(frozen, adapters[:2], rank=4)
        again.load_gates(learnt)
        again.chosen.allowed = both
        torch.testing.assert_close(found, frozen(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("losses", "converged"),
    [
        ([4.0, 3.0, 2.0, 1.0], False),
        ([1.0, 1.0], False),
        ([2.0, 1.0, 1.0, 1.0], True),
        ([2.0, 1.0, 1.0, 0.98], False),
        ([2.0, 1.0, 1.0, 0.995], True),
        ([1.0, 2.0, 0.9, 1.5], False),
    ],
)
def test_a_training_has_converged_if_several_windows_bring_nothing(losses: list[float], converged: bool) -> None:
    recipe = GateRecipe(window=2, patience=2)
    twice = [value for loss in losses for value in (loss - 0.1, loss + 0.1)]
    assert recipe.has_converged(twice) is converged
    assert not recipe.has_converged(twice[:-1])


def test_a_training_ends_once_it_has_converged(
    frozen: torch.nn.Module, adapters: list[AdapterWeights], examples: list[Example]
) -> None:
    losses: list[float] = []
    loss_of = AnswerLoss(frozen.model.embed_tokens.weight, examples, Recipe(vocabulary_len=300))
    recipe = GateRecipe(num_steps=12, window=1, patience=1, least_gain=1.0)
    model = GatedModel(frozen, adapters, rank=4)
    train_gates(model, examples, loss_of, Packed(examples, frozen.config), recipe, losses.append)
    assert len(losses) == 2


def test_watched_layers_report_the_last_tokens_weights(drawn: tuple[torch.Tensor, ...]) -> None:
    lora_a, lora_b, x = drawn
    gated, chosen = layer(lora_a, lora_b)
    chosen.seen = []
    gated(x)
    [seen] = chosen.seen
    torch.testing.assert_close(seen, gated.weights(x, torch.einsum("bti,pri->btpr", x, lora_a))[:, -1])
    assert seen.shape == (2, P)
