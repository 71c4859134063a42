"""The text part of multimodal checkpoints, and families with adapters, answer as transformers' whole model with PEFT.

Adapters are trained on the whole model and saved by PEFT with its names, checked as an upload, and run in one batch.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.base_model import load_base_model
from lora_store import AdapterRefused, check_folder
from tests.gpu_worker.engine_driver import MakeEngine
from tests.gpu_worker.families import (
    EQUAL,
    MULTIMODAL,
    save,
    save_multimodal,
    train,
)
from tests.gpu_worker.peft_answers import PROMPTS, assert_answers_as_peft
from tests.soak import Scale
from tests.tiny import linear_shapes, tiny_config

NEW_FAMILIES = ("gpt_neox", "gptj", "opt", "persimmon")
ALL_TEXT = r".*(language_model|text_model)\..*\w+_proj"
VISION = r".*(vision_tower|vision_model|visual)\..*(q_proj|qkv)"
# The prefixes of the text part's layers in published checkpoints, by what transformers writes now.
LAYOUTS = ("language_model.model.", "model.language_model.")


def test_multimodal_checkpoints_answer_as_the_whole_model(
    tmp_path: Path, make_engine: MakeEngine, scale: Scale
) -> None:
    names = list(MULTIMODAL)[: scale.pick("multimodal families", small=2, full=len(MULTIMODAL))]
    for name in names:
        folder = save_multimodal(tmp_path / name.partition(" ")[0] / str(len(name)), name)
        adapters = [train(folder, tmp_path / name / str(seed), seed, target_modules=ALL_TEXT) for seed in (1, 2)]
        assert_answers_as_peft(folder, adapters, make_engine)


@pytest.mark.parametrize("prefix", LAYOUTS)
def test_every_layout_of_a_checkpoint_on_disk_is_read(prefix: str, tmp_path: Path, make_engine: MakeEngine) -> None:
    """The head of its own is in the file although the config ties it, as in published checkpoints of Mistral 3."""
    folder = save_multimodal(tmp_path / "base", "mistral3")
    tensors = load_file(folder / "model.safetensors")
    text = {name.removeprefix("language_model."): t for name, t in tensors.items() if name.startswith("language_model")}
    text["lm_head.weight"] = torch.randn_like(text["model.embed_tokens.weight"])
    layout = {
        (f"{prefix}{name.removeprefix('model.')}" if name.startswith("model.") else name): t for name, t in text.items()
    }
    if prefix == "language_model.model.":
        layout["language_model.lm_head.weight"] = layout.pop("lm_head.weight")
    others = {name: t for name, t in tensors.items() if not name.startswith("language_model")}
    save_file(layout | others, folder / "model.safetensors", metadata={"format": "pt"})
    assert_answers_as_peft(
        folder, [train(folder, tmp_path / "adapter", 1, target_modules=ALL_TEXT)], make_engine, PROMPTS[:1]
    )
    loaded = load_base_model(tiny_config(folder)).model.get_output_embeddings().weight
    assert torch.equal(loaded, text["lm_head.weight"])


def test_a_head_under_an_unknown_name_is_refused_rather_than_tied(tmp_path: Path) -> None:
    folder = save_multimodal(tmp_path, "mistral3")
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.wrapped.lm_head.weight"] = torch.randn(300, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelUnsupported, match=r"the output head has another name in the files \(language_model"):
        load_base_model(tiny_config(folder))


def test_an_adapter_of_the_vision_part_is_refused(tmp_path: Path) -> None:
    folder = save_multimodal(tmp_path / "base", "gemma3")
    adapter = train(folder, tmp_path / "adapter", 1, target_modules=VISION)
    shapes = linear_shapes(load_base_model(tiny_config(folder)))
    with pytest.raises(AdapterRefused, match="2 tensors adapt the vision or audio part"):
        check_folder(adapter, accepts_base={str(folder)}, module_shapes=shapes)


@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_adapters_of_families_without_groups_of_heads_equal_peft(
    family: str, tmp_path: Path, make_engine: MakeEngine
) -> None:
    folder = save(tmp_path / "base", family, EQUAL[family])
    adapters = [train(folder, tmp_path / str(seed), seed, target_modules="all-linear") for seed in (1, 2)]
    assert_answers_as_peft(folder, adapters, make_engine)


def random_base(draw: random.Random, folder: Path) -> tuple[Path, str]:
    """Save a random model of a new family or of a multimodal one, and return which of its modules to adapt."""
    name = draw.choice((*NEW_FAMILIES, *MULTIMODAL))
    heads = draw.choice((2, 4))
    shape: dict[str, Any] = {"num_attention_heads": heads, "num_hidden_layers": draw.choice((2, 3))}
    shape |= {"vocab_size": draw.choice((300, 512)), "hidden_size": heads * 8}
    if name in MULTIMODAL:
        _, text, vision = MULTIMODAL[name]
        if "out_hidden_size" in vision:  # its width, and the sections of its positions, are those of four heads
            shape |= {"num_attention_heads": 4, "hidden_size": 32}
        shape |= {"num_key_value_heads": draw.choice((1, shape["num_attention_heads"]))}
        if "layer_types" in text:
            shape["layer_types"] = list(text["layer_types"])[: shape["num_hidden_layers"]]
        return save_multimodal(folder, name, **shape), ALL_TEXT
    settings = dict(EQUAL[name]) | shape
    if name == "opt":
        settings |= {"do_layer_norm_before": draw.random() < 0.5, "word_embed_proj_dim": draw.choice((16, heads * 8))}
    if name == "gpt_neox":
        settings |= {"rotary_pct": draw.choice((0.25, 0.5, 1.0)), "use_parallel_residual": draw.random() < 0.5}
    return save(folder, name, settings), "all-linear"


def test_random_bases_of_the_new_families_answer_as_peft(tmp_path: Path, make_engine: MakeEngine, scale: Scale) -> None:
    """At least 12 rows a base: two adapters and none, prompts of 1 to 70 tokens, in steps of 16 tokens."""
    num_rows = 0
    for seed in range(scale.pick("random bases", small=1, full=90)):
        draw = random.Random(seed)
        folder, modules = random_base(draw, tmp_path / f"{seed}")
        prompts = ["".join(chr(draw.randrange(97, 123)) for _ in range(draw.choice((1, 5, 30, 70)))) for _ in range(4)]
        adapters = [
            train(
                folder,
                tmp_path / f"{seed}-{number}",
                number,
                target_modules=modules,
                r=draw.choice((1, 2, 5)),
                lora_alpha=draw.choice((1, 4, 9)),
                use_rslora=draw.random() < 0.5,
            )
            for number in (1, 2)
        ]
        num_rows += assert_answers_as_peft(folder, adapters, make_engine, prompts)
    scale.record("rows", num_rows)
