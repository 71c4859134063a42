"""A packed batch trains like its examples alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.paper.training.lower_layers import lower_layers
from benchmarks.paper.training.packing import Packed, common_len
from benchmarks.training.bigbench_tasks import Item
from benchmarks.training.lora_training import (
    NO_LABEL,
    Batch,
    Example,
    FrozenLinear,
    Padded,
    Recipe,
    batches,
    tokenize,
    train_adapter,
)

ITEMS = [Item(f"{n} and {'so on ' * n}", (f"{n + 1}!",)) for n in range(4)]


def load(tiny_folders: Mapping[str, Path]) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_folders["gemma3"], dtype=torch.float32).requires_grad_(False)


@pytest.fixture
def model(tiny_folders: Mapping[str, Path]) -> torch.nn.Module:
    return load(tiny_folders)


@pytest.fixture
def examples(tiny_folders: Mapping[str, Path]) -> list[Example]:
    return tokenize(ITEMS, AutoTokenizer.from_pretrained(tiny_folders["gemma3"]))


def answers(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return hidden states (answer tokens, H) in the order of the examples."""
    hidden = model.model(input_ids=batch.ids, use_cache=False, **batch.inputs).last_hidden_state
    return hidden[batch.labels != NO_LABEL]


def test_hidden_states_and_labels_equal_those_of_each_example_alone(
    model: torch.nn.Module, examples: list[Example]
) -> None:
    """The tiny model's window of 12 tokens is shorter than the examples, so the sliding mask is checked too."""
    batch = Packed(examples, model.config).batch(examples)
    alone = [Padded().batch([example]) for example in examples]
    torch.testing.assert_close(answers(model, batch), torch.cat([answers(model, one) for one in alone]))
    labels = torch.cat([one.labels[one.labels != NO_LABEL] for one in alone])
    assert batch.labels[batch.labels != NO_LABEL].equal(labels)


def test_the_common_beginning_is_counted_once(model: torch.nn.Module, examples: list[Example]) -> None:
    packed, prefix_len = Packed(examples, model.config), common_len([example.ids for example in examples])
    assert prefix_len > 100  # one token per byte: the template's words before the instruction
    assert packed.batch(examples).ids.numel() == packed.num_tokens(examples)
    assert packed.num_tokens(examples) == sum(map(len, [e.ids for e in examples])) - 3 * prefix_len


def test_batches_stay_within_their_tokens(examples: list[Example], model: torch.nn.Module) -> None:
    packed = Packed(examples, model.config)
    recipe = Recipe(batch_tokens=packed.num_tokens(examples[:2]))
    drawn = [batch for _, batch in zip(range(20), batches(examples, recipe, packed), strict=False)]
    assert all(packed.num_tokens(batch) <= recipe.batch_tokens or len(batch) == 1 for batch in drawn)
    assert any(len(batch) == 2 for batch in drawn)


def test_training_goes_the_same_way_in_every_layout(tiny_folders: Mapping[str, Path], examples: list[Example]) -> None:
    recipe = Recipe(first_layer=1, num_steps=12, batch_tokens=1, scales=(1.0,), vocabulary_len=300)
    losses: dict[str, list[float]] = {"padded": [], "packed": [], "lower layers once": []}
    for name, values in losses.items():
        model = load(tiny_folders)
        packed = Packed(examples, model.config)
        if name == "lower layers once":
            with lower_layers(packed, model.model, recipe.first_layer, examples[:2]) as layout:
                train_adapter(model, examples, recipe, values.append, layout)
        else:
            train_adapter(model, examples, recipe, values.append, packed if name == "packed" else Padded())
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-3)
    assert losses["lower layers once"] == pytest.approx(losses["padded"], rel=1e-3)
    assert losses["packed"][-1] < 0.9 * losses["packed"][0]


def test_lower_layers_run_once_per_example_and_are_restored(model: torch.nn.Module, examples: list[Example]) -> None:
    decoder, packed = model.model, Packed(examples, model.config)
    before, runs = list(decoder.layers), []
    handle = decoder.layers[0].register_forward_hook(lambda *_: runs.append(None))
    wanted = packed.batch(examples[:2]).read_by(decoder)
    handle_runs = len(runs)
    with lower_layers(packed, decoder, 2, examples) as layout:
        again = [layout.batch(examples[:2]).read_by(decoder) for _ in range(2)]
        layout.batch(examples)  # the others were computed with the first chunk
        assert len(runs) == handle_runs + 1
    handle.remove()
    torch.testing.assert_close(again[0], wanted)
    torch.testing.assert_close(again[1], wanted)
    assert list(decoder.layers) == before


def test_a_frozen_product_has_the_gradient_of_its_linear_layer() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40, bias=False)
    linear.weight = torch.nn.Parameter(linear.weight.bfloat16().float())
    frozen, x = FrozenLinear.of(linear), torch.randn(2, 3, 24).bfloat16().float()
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(2, 3, 40)
    for layer, given in ((frozen, found), (linear, expected)):
        y = layer(given)
        y.backward(grad)
        assert y.shape == (2, 3, 40)
    torch.testing.assert_close(frozen(x), linear(x), atol=0.02, rtol=0.02)
    torch.testing.assert_close(found.grad, expected.grad, atol=0.03, rtol=0.02)
    assert frozen.weight.grad is None
