"""Supported families answer as transformers does, alone and with PEFT's adapters; all others are refused at start.

Adapters are trained on the whole model and saved by PEFT with its names, checked as an upload, and run in one batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.loop import Engine
from lora_store import AdapterRefused, check_folder
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import MakeEngine, by_digest, greedy, run_together
from tests.gpu_worker.families import (
    EQUAL,
    MULTIMODAL,
    REFUSED,
    eager_answer,
    save,
    save_multimodal,
    train,
    whole_model,
)
from tests.soak import Scale
from tests.tiny import assert_equal_logits, linear_shapes, plan_of, tiny_config

PROMPTS = ["a", "the quick brown fox", "0123456789" * 3, "x y", "lorem ipsum dolor "]
NUM_NEW = 8
SMALL_EQUAL, SMALL_REFUSED = 6, 6


def engine_over(folder: Path, make_engine: MakeEngine, **changes: object) -> Engine:
    """Start an engine that takes its prompts in chunks."""
    base = load_base_model(tiny_config(folder, **changes))
    return make_engine({}, base=base, max_step_tokens=16, **changes)


def some(names: Sequence[str], what: str, small: int, scale: Scale) -> Sequence[str]:
    """Return the first names, or all of them in a full run."""
    return names[: scale.pick(what, small=small, full=len(names))]


def test_supported_families_give_transformers_own_tokens(tmp_path: Path, make_engine: MakeEngine, scale: Scale) -> None:
    jobs = [greedy(prompt, num_new=NUM_NEW) for prompt in PROMPTS]
    for name in some(list(EQUAL), "families served", SMALL_EQUAL, scale):
        folder = save(tmp_path / name, name, EQUAL[name])
        answers = run_together(engine_over(folder, make_engine), jobs)
        model, tokenizer = whole_model(folder), AutoTokenizer.from_pretrained(folder)
        expected = [eager_answer(model, tokenizer(prompt).input_ids, NUM_NEW)[1] for prompt in PROMPTS]
        assert [answer.tokens for answer in answers] == expected, name


def test_supported_families_start_in_bfloat16(tmp_path: Path, make_engine: MakeEngine, scale: Scale) -> None:
    """Experts with random weights tie more often than trained ones, but that does not justify a refusal.

    OLMo rotates by float32 angles.
    """
    names = ["olmo", *(name for name in EQUAL if name != "olmo")]
    for name in some(names, "families in bfloat16", SMALL_EQUAL, scale):
        engine_over(save(tmp_path / name, name, EQUAL[name]), make_engine, dtype="bfloat16")


def test_unsupported_families_are_refused_at_start_by_name(
    tmp_path: Path, make_engine: MakeEngine, scale: Scale
) -> None:
    for name in some(list(REFUSED), "families refused", SMALL_REFUSED, scale):
        settings, reason = REFUSED[name]
        folder = save(tmp_path / name, name, settings)
        with pytest.raises(BaseModelUnsupported, match=re.escape(reason)) as refusal:
            engine_over(folder, make_engine)
        assert name.replace("_", "") in str(refusal.value).lower().replace("_", ""), name


NEW_FAMILIES = ("gpt_neox", "gptj", "opt", "persimmon")
TEXT_PROMPTS = ["The parrot says", "x", "0123456789" * 3]
NUM_TEXT = 5
TEXT = {"target_modules": r".*(language_model|text_model)\..*\w+_proj"}
VISION = r".*(vision_tower|vision_model|visual)\..*(q_proj|qkv)"
# The prefixes of the text part's layers in published checkpoints, by what transformers writes now.
LAYOUTS = ("language_model.model.", "model.language_model.")


def assert_answers_as_peft(
    folder: Path, adapters: Sequence[Path], make_engine: MakeEngine, prompts: Sequence[str] = TEXT_PROMPTS
) -> int:
    """Compare base rows and rows of every adapter, all in one batch, and return how many were compared."""
    base = load_base_model(tiny_config(folder))
    assert not any("visi" in name or "visual" in name for name, _ in base.model.named_parameters()), "not in memory"
    shapes, names = linear_shapes(base), {str(folder)}
    pool = [
        AdapterWeights(path.name, check_folder(path, accepts_base=names, module_shapes=shapes).modules)
        for path in adapters
    ]
    plans = [None, *(plan_of("selection", (weights, 1.0)) for weights in pool)]
    jobs = [greedy(p, *([] if plan is None else [plan]), num_new=NUM_TEXT) for plan in plans for p in prompts]
    answers = iter(run_together(make_engine(by_digest(*pool), base=base, max_step_tokens=16), jobs))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = {}
    for path in (None, *adapters):
        model = whole_model(folder)
        if path is not None:
            model = PeftModel.from_pretrained(model, path).eval()
        for prompt in prompts:
            answer, (first, tokens) = next(answers), eager_answer(model, tokenizer(prompt).input_ids, NUM_TEXT)
            assert_equal_logits(answer.first_logits, first)
            assert answer.tokens == tokens, (folder.name, path, prompt)
            plain.setdefault(prompt, first)
            assert path is None or float((first - plain[prompt]).abs().max()) > 0.01, "the adapter should matter"
    return len(jobs)


def test_multimodal_checkpoints_answer_as_the_whole_model(
    tmp_path: Path, make_engine: MakeEngine, scale: Scale
) -> None:
    names = list(MULTIMODAL)[: scale.pick("multimodal families", small=2, full=len(MULTIMODAL))]
    for name in names:
        folder = save_multimodal(tmp_path / name.partition(" ")[0] / str(len(name)), name)
        adapters = [train(folder, tmp_path / name / str(seed), seed, **TEXT) for seed in (1, 2)]
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
    assert_answers_as_peft(folder, [train(folder, tmp_path / "adapter", 1, **TEXT)], make_engine, TEXT_PROMPTS[:1])
    loaded = load_base_model(tiny_config(folder)).model.get_output_embeddings().weight
    assert torch.equal(loaded, text["lm_head.weight"])


def test_a_head_under_an_unknown_name_is_refused_rather_than_tied(tmp_path: Path) -> None:
    folder = save_multimodal(tmp_path, "mistral3")
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.wrapped.lm_head.weight"] = torch.randn(300, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelUnsupported, match=r"the output head has another name in the files \(language_model"):
        load_base_model(tiny_config(folder))


def test_a_text_adapter_of_either_class_moves_the_logits_of_a_multimodal_checkpoint(
    tmp_path: Path, make_engine: MakeEngine
) -> None:
    """An adapter that was trained on the text model alone has other names than one of the whole model.

    A server that matches neither spelling loads it, and answers as the base model.
    """
    folder = save_multimodal(tmp_path / "base", "gemma3")
    adapter = train(folder, tmp_path / "whole", 1, **TEXT)
    theirs = load_file(adapter / "adapter_model.safetensors")
    shapes = linear_shapes(load_base_model(tiny_config(folder)))
    expected = None
    for prefix in ("model.language_model.", "language_model.model.", "model."):
        spelled = {key.replace("model.language_model.", prefix): tensor for key, tensor in theirs.items()}
        save_file(spelled, adapter / "adapter_model.safetensors")
        found = check_folder(adapter, accepts_base={str(folder)}, module_shapes=shapes).modules
        assert len(found) == len(shapes)
        weights = AdapterWeights(prefix, found)
        engine = make_engine(by_digest(weights), base=load_base_model(tiny_config(folder)))
        jobs = [greedy("x", num_new=1), greedy("x", plan_of("selection", (weights, 1.0)), num_new=1)]
        plain, adapted = (answer.first_logits for answer in run_together(engine, jobs))
        assert float((plain - adapted).abs().max()) > 0.05
        expected = adapted if expected is None else expected
        assert_equal_logits(adapted, expected)
    save_file({key.replace("layers", "blocks"): t for key, t in theirs.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused, match="is not a linear layer of the base model"):
        check_folder(adapter, accepts_base={str(folder)}, module_shapes=shapes)


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
