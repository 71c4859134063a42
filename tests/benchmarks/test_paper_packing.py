"""A packed batch trains on what its examples alone would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.paper.packing import Packed, common_len
from examples.bigbench_tasks import Item
from examples.lora_training import NO_LABEL, Batch, Example, Padded, Recipe, batches, tokenize, train_adapter

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
    """Hidden states (answer tokens, H) in the order of the examples."""
    hidden = model.model(input_ids=batch.ids, use_cache=False, **batch.inputs).last_hidden_state
    return hidden[batch.labels != NO_LABEL]


def test_hidden_states_and_labels_are_those_of_each_example_alone(
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
    assert prefix_len > 100  # a byte a token: the template's words before the instruction
    assert packed.batch(examples).ids.numel() == packed.num_tokens(examples)
    assert packed.num_tokens(examples) == sum(map(len, [e.ids for e in examples])) - 3 * prefix_len


def test_batches_stay_within_their_tokens(examples: list[Example], model: torch.nn.Module) -> None:
    packed = Packed(examples, model.config)
    recipe = Recipe(batch_tokens=packed.num_tokens(examples[:2]))
    drawn = [batch for _, batch in zip(range(20), batches(examples, recipe, packed), strict=False)]
    assert all(packed.num_tokens(batch) <= recipe.batch_tokens or len(batch) == 1 for batch in drawn)
    assert any(len(batch) == 2 for batch in drawn)


def test_training_goes_the_same_way_in_either_layout(tiny_folders: Mapping[str, Path], examples: list[Example]) -> None:
    recipe = Recipe(first_layer=1, num_steps=12, batch_tokens=1, scales=(1.0,), vocabulary_len=300)
    losses: dict[str, list[float]] = {"padded": [], "packed": []}
    for name, told in losses.items():
        model = load(tiny_folders)
        layout = Packed(examples, model.config) if name == "packed" else Padded()
        train_adapter(model, examples, recipe, told.append, layout)
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-3)
    assert losses["packed"][-1] < 0.9 * losses["packed"][0]
