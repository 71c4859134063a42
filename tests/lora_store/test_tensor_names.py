"""Names that cannot be read as PEFT's are explained in one reason, with PEFT's name of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_store import AdapterRefused, check_folder
from lora_store.tensor_names import misnamed_tensors
from lora_store.tensor_paths import tensor_key
from tests.bad_uploads import Spoil, Tensors, add, rename, tensors
from tests.lora_store.builders import BASE, SHAPES, MakeFolder

Shapes = dict[str, tuple[int, int]]
RIGHT = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
NUM_TENSORS = 6


def renamed(change: Callable[[str], str]) -> Spoil:
    """Change every tensor's name."""

    def spoil(found: Tensors, _: str) -> None:
        for key in list(found):
            found[change(key)] = found.pop(key)

    return tensors(spoil)


def refusal(folder: Path, shapes: Shapes | None) -> tuple[str, ...]:
    with pytest.raises(AdapterRefused) as caught:
        check_folder(folder, accepts_base={BASE}, module_shapes=shapes)
    return caught.value.reasons


SPELLINGS: dict[str, Callable[[str], str]] = {  # without an ending
    "as PEFT": lambda key: key.removesuffix(".weight"),
    "a compiled model": lambda key: f"_orig_mod.{key.removesuffix('.weight')}",
}


@pytest.mark.parametrize("shapes", [SHAPES, None], ids=["base", "no base"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_give_one_reason_with_one_name(spelling: str, shapes: Shapes | None, make_folder: MakeFolder) -> None:
    folder, change = make_folder(), SPELLINGS[spelling]
    renamed(change)(folder)
    [reason] = refusal(folder, shapes)
    assert f"adapter_model.safetensors: all {NUM_TENSORS} tensor names " in reason
    assert f"{change(RIGHT)!r} must be {RIGHT!r}" in reason
    assert reason.endswith("Save the adapter with PEFT's save_pretrained, or rename its tensors")


@pytest.mark.parametrize("theirs", ["thinker.model.", "encoder."])
def test_another_prefix_gives_one_reason_with_both(theirs: str, make_folder: MakeFolder) -> None:
    folder = make_folder()
    rename("base_model.model.model.", f"base_model.model.{theirs}")(folder)
    [reason] = refusal(folder, SHAPES)
    assert f"all {NUM_TENSORS} tensor names begin with 'base_model.model.{theirs}" in reason
    assert "the names of this base begin with 'base_model.model.model." in reason
    assert f"must be {RIGHT!r}" in reason


def test_one_misnamed_tensor_of_several_is_counted(make_folder: MakeFolder) -> None:
    folder = make_folder()
    renamed(lambda key: key.replace("model.layers.1.self_attn.q_proj.lora_A.", "x.layers.1.self_attn.q_proj.lora_A."))(
        folder
    )
    first, second = refusal(folder, SHAPES)
    assert "1 of 6 tensor names begin with 'base_model.model.x.layers.'" in first
    assert second == "module 'model.layers.1.self_attn.q_proj' has lora_B but no lora_A"


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("shapes", [SHAPES, None], ids=["base", "no base"])
def test_an_adapted_vocabulary_is_the_only_reason(layer: str, shapes: Shapes | None, make_folder: MakeFolder) -> None:
    """PEFT saves the whole layer with the pair."""
    where = f"base_model.model.{'model.' * (layer == 'embed_tokens')}{layer}"
    pair = ("lora_embedding_A", "lora_embedding_B") if layer == "embed_tokens" else ("lora_A.weight", "lora_B.weight")
    folder = make_folder()
    for name, shape in [("base_layer.weight", (9, 6)), (pair[0], (4, 6)), (pair[1], (9, 4))]:
        add(f"{where}.{name}", torch.ones(shape))(folder)
    [reason] = refusal(folder, shapes)
    assert reason.startswith(f"the adapter adds or changes vocabulary ('{where}.base_layer.weight', ")
    assert "out of target_modules" in reason


def test_names_that_no_module_ends_with_are_left_to_the_other_checks() -> None:
    keys = [
        *("model.blocks.0.mlp.up_proj.lora_A.weight", "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"),
        *("up_proj.lora_A.weight", "lora_A.weight", f"{'x.' * 1000}lora_A.weight", "...lora_A.weight", "stray"),
        *(RIGHT.replace("weight", "bias"), RIGHT.replace("lora_A", "lora_down")),
    ]
    assert misnamed_tensors(keys, SHAPES) == {}
    right = [tensor_key(module, side) for module in SHAPES for side in "AB"]
    assert misnamed_tensors(right, SHAPES) == misnamed_tensors(right, None) == {}
