"""Embeddings that depend on the length of the sequence use one set of factors, independent of the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.base_model import load_base_model
from gpu_worker.model.rope import pin_longrope
from gpu_worker.native.loop import Engine
from tests.gpu_worker.engine_driver import MakeEngine, greedy, run_together
from tests.gpu_worker.families import eager_answer, whole_model
from tests.tiny import SHAPE, byte_tokenizer, tiny_config

ORIGINAL_LEN = 64
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [4.0, 7.0, 9.0, 12.0]
FAMILIES: dict[str, dict[str, float]] = {"phi3": {}, "phimoe": {"short_mscale": 1.1, "long_mscale": 1.4}}


def save(folder: Path, family: str, *, short: list[float] = SHORT, long: list[float] = LONG, **scales: float) -> Path:
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": ORIGINAL_LEN}
    rope |= {"short_factor": short, "long_factor": long, **(FAMILIES[family] | scales)}
    torch.manual_seed(0)
    lengths = {"original_max_position_embeddings": ORIGINAL_LEN}  # Phi-3's, which overrides the one in `rope`
    config = AutoConfig.for_model(family, **SHAPE, rope_parameters=rope, **lengths)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def engine_over(folder: Path, make_engine: MakeEngine, max_model_len: int) -> Engine:
    base = load_base_model(tiny_config(folder, max_model_len=max_model_len))
    return make_engine({}, base=base, max_model_len=max_model_len)


def eager_tokens(folder: Path, prompt: str) -> list[int]:
    """Return 30 tokens of transformers' own model."""
    return eager_answer(whole_model(folder), AutoTokenizer.from_pretrained(folder)(prompt).input_ids, 30)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_row_does_not_change_other_answers(family: str, tmp_path: Path, make_engine: MakeEngine) -> None:
    save(tmp_path, family)
    short, long = greedy("a short prompt", num_new=20), greedy("x" * 100, num_new=20)
    [alone] = run_together(engine_over(tmp_path, make_engine, 160), [short])
    beside, _ = run_together(engine_over(tmp_path, make_engine, 160), [short, long])
    assert beside.tokens == alone.tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("max_model_len", "is_long"), [(ORIGINAL_LEN, False), (ORIGINAL_LEN + 1, True)])
def test_the_maximum_length_selects_the_factors_of_all_rows(
    family: str, max_model_len: int, is_long: bool, tmp_path: Path, make_engine: MakeEngine
) -> None:
    chosen = LONG if is_long else SHORT
    scales = FAMILIES[family]
    scale = scales and dict.fromkeys(scales, scales["long_mscale" if is_long else "short_mscale"])
    # transformers uses the short factors of this family at every length; only the scale depends on the length
    short = SHORT if family == "phimoe" else chosen
    expected = save(tmp_path / "expected", family, short=short, long=chosen, **scale)
    [answer] = run_together(
        engine_over(save(tmp_path / "own", family), make_engine, max_model_len), [greedy("q" * 20, num_new=30)]
    )
    assert answer.tokens == eager_tokens(expected, "q" * 20)


def test_a_row_that_outgrows_the_original_length_keeps_its_factors(tmp_path: Path, make_engine: MakeEngine) -> None:
    expected = save(tmp_path / "expected", "phi3", short=LONG)
    engine = engine_over(save(tmp_path / "own", "phi3"), make_engine, 160)
    prompt = "z" * (ORIGINAL_LEN - 10)
    [answer] = run_together(engine, [greedy(prompt, num_new=30)])
    assert answer.tokens == eager_tokens(expected, prompt)


def test_factors_that_differ_between_kinds_of_layers_are_refused() -> None:
    model = torch.nn.Module()
    model.rope_type = {"full_attention": "longrope", "sliding_attention": "default"}  # type: ignore[assignment]
    with pytest.raises(BaseModelUnsupported, match="longrope"):
        pin_longrope(model, 100)


def test_other_embeddings_are_not_changed() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    before = model.model.rotary_emb.inv_freq.clone()
    pin_longrope(model, 500)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
