"""A second base model, derived from the tiny one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.paper.training import second_base
from benchmarks.paper.training.packing import Packed
from benchmarks.paper.training.second_base import (
    BaseRecipe,
    Distilled,
    influences,
    kept_layers,
    make_second_base,
    prompts_of,
)
from benchmarks.training.adapter_files import load_base
from benchmarks.training.lora_training import Recipe, batches
from tests.tiny import byte_tokenizer

TEXTS = [f"{word} {n}" for n in range(6) for word in ("red", "green", "blue")]
RECIPE = BaseRecipe(2, Recipe(num_steps=8, batch_tokens=400, learning_rate=1e-2, vocabulary_len=100))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Mapping[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("second") / "base"
    make_second_base(tiny_folders["gemma3"], folder, TEXTS, ["grey 1", "pink 2"], RECIPE, lambda step, loss: None)
    return folder


def test_the_distillation_brings_the_pruned_model_nearer_to_the_first(made: Path) -> None:
    record = json.loads((made / second_base.RECORD).read_text())
    assert record["divergence_after"] < 0.7 * record["divergence_before"]
    assert record["kept"] == kept_layers(record["influences"], 2) and len(record["influences"]) == 3


def test_the_saved_model_has_fewer_layers_and_embeddings_of_its_own(
    made: Path, tiny_folders: Mapping[str, Path]
) -> None:
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_folders["gemma3"], made))
    kept = json.loads((made / second_base.RECORD).read_text())["kept"]
    assert len(second.model.layers) == second.config.num_hidden_layers == 2
    assert second.config.layer_types == [first.config.layer_types[layer] for layer in kept]
    differs = (first.model.embed_tokens.weight.bfloat16() != second.model.embed_tokens.weight).any(dim=1)
    assert differs[:100].float().mean() > 0.9 and not differs[290:].any()


def test_an_interrupted_distillation_leaves_nothing_and_the_next_gives_the_same_model(
    made: Path, tmp_path: Path, tiny_folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    again, steps = tmp_path / "again", list[int]()
    source, held_out = tiny_folders["gemma3"], ["grey 1", "pink 2"]

    def make() -> None:
        make_second_base(source, again, TEXTS, held_out, RECIPE, lambda step, loss: steps.append(step))

    def half_saved(second: Distilled, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Distilled, "save", half_saved)
        with pytest.raises(KeyboardInterrupt):
            make()
    assert not again.exists()
    make()
    assert steps == 2 * list(range(1, RECIPE.training.num_steps + 1))
    make()
    assert len(steps) == 2 * RECIPE.training.num_steps
    found, expected = (load_file(folder / "model.safetensors") for folder in (again, made))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_the_divergence_is_that_of_both_models_next_tokens(tiny_folders: Mapping[str, Path]) -> None:
    """Compare with whole models that read each prompt alone, over the whole vocabulary."""
    source = tiny_folders["gemma3"]
    examples = prompts_of(TEXTS[:3], byte_tokenizer())
    second = Distilled(source, [1, 2], torch.cat([e.ids for e in examples]), vocabulary_len=300)
    assert second.model.config.layer_types == ["full_attention", "sliding_attention"]
    first, packed = load_base(source), Packed(examples, load_base(source).config)
    with torch.no_grad():
        second.rows += 0.3 * torch.randn(second.rows.shape, generator=torch.Generator().manual_seed(0))
        found = float(second.divergence(first.model, packed.batch(examples)))
        second.model.model.embed_tokens.weight.copy_(second.rows)
        values = []
        for number, example in enumerate(examples):
            logs = [
                model(input_ids=example.ids[None], use_cache=False).logits[0].log_softmax(dim=-1)
                for model in (second.model, first)
            ]
            each = F.kl_div(logs[0], logs[1], log_target=True, reduction="none").sum(dim=-1)
            values.append(each if number == 0 else each[packed.prefix_len :])
    assert found == pytest.approx(float(torch.cat(values).mean()), rel=0.03)


def test_a_layer_that_changes_nothing_has_no_influence(tiny_folders: Mapping[str, Path]) -> None:
    model = load_base(tiny_folders["gemma3"])
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    examples = prompts_of(TEXTS, byte_tokenizer())
    packed = Packed(examples, model.config)
    judged = [packed.batch(chosen) for chosen in islice(batches(examples, RECIPE.training, packed), 2)]
    found = influences(model.model, judged)
    assert found[1] == pytest.approx(0, abs=1e-5) and min(found[0], found[2]) > 0.01
    assert kept_layers(found, 2) == [0, 2]
    assert not any(module._forward_hooks for module in model.model.layers)
