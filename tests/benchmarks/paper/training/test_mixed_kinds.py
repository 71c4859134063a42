"""Mixtures of LoRA, DoRA and IA³, held against PEFT's own modules and a loop over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from benchmarks.paper.training.mixed_kinds import MixedModel, read_changes
from benchmarks.training.adapter_files import load_base, save_adapter
from benchmarks.training.bigbench_tasks import Item
from benchmarks.training.lora_training import FrozenLinear, Kind, Recipe, tokenize, train_adapter
from tests.tiny import byte_tokenizer

KINDS: tuple[Kind, ...] = ("lora", "dora", "ia3")
RECIPE = Recipe(rank=3, first_layer=1, num_steps=4, learning_rate=0.1, scales=(1.0,), vocabulary_len=300)
IDS = torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Mapping[str, Path]) -> dict[str, Path]:
    """Train an adapter of each kind on the tiny model."""
    root, base = tmp_path_factory.mktemp("kinds"), load_base(tiny_folders["gemma3"])
    examples = tokenize([Item(f"text {n}", (word,)) for n, word in enumerate(["yes", "no", "or"])], byte_tokenizer())
    for kind in KINDS:
        recipe = replace(RECIPE, kind=kind)
        trained = train_adapter(base, examples, recipe, lambda _: None)
        save_adapter(trained, root / kind)
        base = trained.unload()
    return {kind: root / kind for kind in KINDS}


def peft_model(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(load_base(base), str(folder)).eval()


def changed(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_alone_answers_as_in_peft(
    kind: Kind, folders: dict[str, Path], tiny_folders: Mapping[str, Path]
) -> None:
    mixed = MixedModel(load_base(tiny_folders["gemma3"]), folders)
    mixed.use([{kind: 1.0}] * len(IDS))
    expected = changed(peft_model(tiny_folders["gemma3"], folders[kind]))
    assert torch.allclose(changed(mixed.model), expected, atol=0.05)
    assert not torch.allclose(changed(load_base(tiny_folders["gemma3"])), expected, atol=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_changes_the_layers_of_its_recipe_only(
    kind: Kind, folders: dict[str, Path], tiny_folders: Mapping[str, Path]
) -> None:
    changes = read_changes(folders[kind], load_base(tiny_folders["gemma3"]))
    modules = {name.rpartition(".")[2] for name in changes}
    assert {int(name.split(".")[2]) for name in changes} == {1, 2}
    assert modules == ({"k_proj", "v_proj", "down_proj"} if kind == "ia3" else set(RECIPE.modules))


def test_a_mixture_sums_the_weighed_changes_of_each_row(
    folders: dict[str, Path], tiny_folders: Mapping[str, Path]
) -> None:
    """Compare every layer with PEFT's modules, in a loop over rows and adapters."""
    rows = [{"lora": 0.6, "dora": 0.2, "ia3": 0.2}, {"dora": 1.0}, {"ia3": 0.5, "lora": 0.25}]
    base = tiny_folders["gemma3"]
    mixed = MixedModel(load_base(base), folders)
    mixed.use(rows)
    pefts = {kind: peft_model(base, folders[kind]).get_base_model() for kind in KINDS}
    plain = load_base(base)
    names = [name for name, module in plain.named_modules() if isinstance(module, FrozenLinear)]
    torch.manual_seed(1)
    for name in names:
        layer = plain.get_submodule(name)
        x = torch.randn(len(rows), 5, layer.in_features)
        with torch.no_grad():
            found = mixed.model.get_submodule(name)(x)
            for row, weights in enumerate(rows):
                expected = layer(x[row])
                for kind, weight in weights.items():
                    expected = expected + weight * (pefts[kind].get_submodule(name)(x[row]) - layer(x[row]))
                assert torch.allclose(found[row], expected, atol=0.02), (name, row)
    assert len(names) == 3 * 7


def test_without_weights_the_base_answers(folders: dict[str, Path], tiny_folders: Mapping[str, Path]) -> None:
    mixed = MixedModel(load_base(tiny_folders["gemma3"]), folders)
    mixed.use([{}] * len(IDS))
    assert torch.equal(changed(mixed.model), changed(load_base(tiny_folders["gemma3"])))
