"""Supported model families give transformers' own tokens; all others are refused at start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.loop import Engine
from tests.gpu_worker.engine_driver import MakeEngine, greedy, run_together
from tests.gpu_worker.families import EQUAL, REFUSED, Settings, eager_answer, save, whole_model
from tests.soak import Scale
from tests.tiny import tiny_config

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


@pytest.mark.parametrize(("name", "more"), [("phimoe", {}), ("qwen2_moe", {"layer_types": ["sliding_attention"] * 3})])
def test_a_window_that_the_layers_do_not_attend_with_is_refused_at_start(
    name: str, more: Settings, tmp_path: Path, make_engine: MakeEngine
) -> None:
    """transformers masks by it, and these layers do not pass it on. The prompts of the start are shorter."""
    settings = EQUAL[name] | {"sliding_window": 60, "use_sliding_window": True} | more
    folder = save(tmp_path / name, name, settings)
    with pytest.raises(BaseModelUnsupported, match=r"attends to all tokens in a layer whose config implies .* of 60"):
        engine_over(folder, make_engine)
    engine_over(folder, make_engine, max_model_len=60)  # no row outgrows it


@pytest.mark.parametrize(
    ("name", "more"),
    [("cohere2", {"layer_types": ["full_attention"] * 3}), ("minimax_m2", {}), ("qwen2_moe", {})],
)
def test_a_window_that_no_layer_has_is_none(name: str, more: Settings, tmp_path: Path) -> None:
    folder = save(tmp_path / name, name, EQUAL[name] | {"sliding_window": 60} | more)
    assert load_base_model(tiny_config(folder)).window is None


def test_a_family_that_reads_the_bias_of_its_output_head_is_refused_with_a_reason(
    tmp_path: Path, make_engine: MakeEngine
) -> None:
    with pytest.raises(BaseModelUnsupported, match="does not support bert"):
        engine_over(save(tmp_path, "bert", {"is_decoder": True}), make_engine)
