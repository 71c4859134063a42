"""The comparison of vLLM with transformers at start, over answers of transformers' model that are changed."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.eager_check import DECODE_STEPS, DIGEST
from gpu_worker.vllm.front_model import FrontModel, load_front_model
from gpu_worker.vllm.model_check import (
    CheckedAnswer,
    CheckedPrompt,
    EagerModel,
    check_model,
    reason_to_skip,
)
from gpu_worker.vllm.packing import Change
from tests.gpu_worker.families import EQUAL, save
from tests.tiny import tiny_config

NUM_IDS = 20  # of each answer's log probabilities
Spoil = Callable[[CheckedPrompt, Tensor], Tensor]
"""Changes the logits (T, V) of a prompt."""


class Workers:
    """Answers as vLLM should, from the float32 model, with logits that `spoil` has changed. Records what it is sent."""

    def __init__(self, folder: Path, spoil: Spoil, dtype: str) -> None:
        self.config = tiny_config(folder, engine="vllm", dtype=dtype)
        self.model = load_front_model(self.config)
        self._eager = EagerModel(self.config, replace(self.model, dtype=torch.float32))
        self._spoil = spoil
        self.changes: list[str] = []
        self.asked: list[CheckedPrompt] = []
        self.unfit: dict[str, str] = {}
        self.ignored: str | None = None  # the last part of the paths of modules that are computed without adapters

    async def change(self, changes: list[Change]) -> Mapping[str, str]:
        for kind, digest, *values in changes:
            self.changes.append(f"{kind} {digest}")
            if kind == "put":
                names = [name for name, *_ in values[1]]
                self._eager.adapt([name for name in names if name.rpartition(".")[2] != self.ignored])
        return self.unfit

    async def answer(self, prompt: CheckedPrompt) -> CheckedAnswer:
        assert self.changes[-1] == f"put {DIGEST}"
        self.asked.append(prompt)
        tokens = list(prompt.tokens)
        for _ in range(DECODE_STEPS):
            logits = self._eager.logits(tokens, 1, has_adapter=prompt.has_adapter).logits
            tokens.append(int(logits[0].argmax()))
        num_scored = len(tokens) - 1 if prompt.scores_prompt else DECODE_STEPS
        logits = self._eager.logits(tokens[:-1], num_scored, has_adapter=prompt.has_adapter).logits
        best = self._spoil(prompt, logits).log_softmax(-1).topk(NUM_IDS)
        scores = [
            dict(zip(ids, values, strict=True))
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return CheckedAnswer(tokens[len(prompt.tokens) :], scores)

    def check(self, max_len: int = 160) -> FrontModel:
        return asyncio.run(check_model(self.config, self.model, max_len, self.change, self.answer))


@pytest.fixture
def workers(tiny_folders: Mapping[str, Path]) -> Callable[..., Workers]:
    def make(spoil: Spoil = lambda prompt, logits: logits, dtype: str = "float32", family: str = "gemma3") -> Workers:
        return Workers(tiny_folders[family], spoil, dtype)

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_equal_log_probabilities_pass_and_the_adapter_leaves_the_bank(
    dtype: str, family: str, workers: Callable[..., Workers]
) -> None:
    made = workers(dtype=dtype, family=family)
    made.check()
    assert made.changes == [f"put {DIGEST}", f"drop {DIGEST}"]
    long = made.asked[-1]
    window = made.model.window
    assert len(long.tokens) == (40 if window is None else window + 4), "the last tokens cannot see the first ones"
    assert sum(prompt.has_adapter for prompt in made.asked) == len(made.asked) // 2


def test_a_window_of_0_is_none(tmp_path: Path) -> None:
    """Qwen2-MoE's config says so where windows are off."""
    folder = save(tmp_path, "qwen2_moe", EQUAL["qwen2_moe"] | {"num_hidden_layers": 1, "layer_types": None})
    made = Workers(folder, lambda prompt, logits: logits, "float32")
    made.check()
    assert made.model.window is None and len(made.asked[-1].tokens) == 40


def test_a_constant_that_all_logits_of_a_token_share_is_no_difference(workers: Callable[..., Workers]) -> None:
    workers(lambda prompt, logits: logits + 3).check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("applies", "named"),
    [
        (lambda prompt: not prompt.has_adapter and prompt.scores_prompt, "without an adapter"),
        (lambda prompt: prompt.has_adapter, "with an adapter"),
        (lambda prompt: not prompt.scores_prompt, "of 16 tokens"),
    ],
    ids=["plain", "adapted", "long"],
)
def test_prompts_whose_log_probabilities_differ_are_named(
    applies: Callable[[CheckedPrompt], bool], named: str, dtype: str, workers: Callable[..., Workers]
) -> None:
    """The logits are those of other ids."""
    made = workers(lambda prompt, logits: logits.roll(1, dims=-1) if applies(prompt) else logits, dtype)
    with pytest.raises(BaseModelUnsupported, match=rf"does not support gemma3_text: for prompts {named} its log .* 0$"):
        made.check()


def test_one_token_beyond_the_bound_is_refused_in_float32(workers: Callable[..., Workers]) -> None:
    def spoil(size: float) -> Spoil:
        def change(prompt: CheckedPrompt, logits: Tensor) -> Tensor:
            changed = logits.clone()
            changed[-1, logits[-1].argmax()] += size * float(logits[-1].abs().max().clamp(min=1))
            return changed

        return change

    workers(spoil(2e-5)).check()
    with pytest.raises(BaseModelUnsupported):
        workers(spoil(5e-4)).check()


def test_log_probabilities_that_are_not_numbers_are_refused(workers: Callable[..., Workers]) -> None:
    with pytest.raises(BaseModelUnsupported):
        workers(lambda prompt, logits: logits * torch.nan).check()


def test_modules_that_vllm_computes_without_adapters_take_none(
    workers: Callable[..., Workers], caplog: pytest.LogCaptureFixture
) -> None:
    made = workers()
    made.ignored = "v_proj"
    with caplog.at_level(logging.WARNING):
        found = made.check()
    assert set(made.model.shapes) - set(found.shapes) == {f"model.layers.{n}.self_attn.v_proj" for n in range(3)}
    assert "modules named v_proj are refused" in caplog.records[-1].getMessage()
    assert made.changes[-1] == f"drop {DIGEST}"


@pytest.mark.parametrize(
    ("ignored", "part"), [("gate_up_proj", r"\.experts\."), ("down_proj", r"\.experts\."), ("gate", r"\.gate$")]
)
def test_experts_and_routers_that_vllm_computes_without_adapters_take_none(
    ignored: str, part: str, tmp_path: Path
) -> None:
    made = Workers(save(tmp_path, "qwen3_moe", EQUAL["qwen3_moe"]), lambda prompt, logits: logits, "float32")
    assert made.check() == made.model
    made.ignored = ignored
    found = made.check()
    gone = {name for name in made.model.shapes if re.search(part, name)}
    assert gone and made.model.shapes.keys() - found.shapes.keys() == gone and not gone & found.paths.keys()


def test_a_model_that_is_wrong_in_its_window_too_is_refused(workers: Callable[..., Workers]) -> None:
    """Modules without adapters must not hide that the base model differs."""
    made = workers(lambda prompt, logits: logits if prompt.scores_prompt else logits.roll(1, dims=-1))
    made.ignored = "v_proj"
    with pytest.raises(BaseModelUnsupported, match="for prompts of 16 tokens its log"):
        made.check()


def test_an_adapter_that_the_workers_refuse_is_the_reason(workers: Callable[..., Workers]) -> None:
    made = workers()
    made.unfit = {DIGEST: "x has another shape in vLLM's base model"}
    with pytest.raises(BaseModelUnsupported, match=r"refuse an adapter of every module \(x has another shape"):
        made.check()


@pytest.mark.parametrize("max_len", [4, 5, 12])
def test_a_short_context_is_checked_as_far_as_it_goes(max_len: int, workers: Callable[..., Workers]) -> None:
    made = workers()
    made.check(max_len)
    lengths = [len(prompt.tokens) for prompt in made.asked]
    assert max(lengths) == max_len - DECODE_STEPS


@pytest.mark.parametrize(
    ("settings", "changes", "max_len", "reason"),
    [
        ({}, {}, 160, None),
        ({"model_check_max_parameters": 0}, {}, 160, r"parameters, worker.model_check_max_parameters is 0$"),
        ({}, {"num_parameters": 3_000_000_000}, 160, r"^it has 3,000,000,000 parameters, .* is 2,000,000,000$"),
        ({"model_check_max_parameters": 3_000_000_000}, {"num_parameters": 3_000_000_000}, 160, None),
        ({}, {"is_quantized": True}, 160, "its weights are quantised"),
        ({}, {}, DECODE_STEPS, "worker.max_model_len is 3"),
    ],
)
def test_the_reason_for_comparing_nothing_is_logged(
    settings: Mapping[str, Any],
    changes: Mapping[str, Any],
    max_len: int,
    reason: str | None,
    tiny_folders: Mapping[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tiny_config(tiny_folders["llama"], engine="vllm", **settings)
    model: FrontModel = replace(load_front_model(config), **changes)
    if reason is None:
        assert reason_to_skip(config, model, max_len) is None
        return

    async def unused(asked: CheckedPrompt | Sequence[Change]) -> Any:
        raise AssertionError("nothing is asked")

    with caplog.at_level(logging.WARNING):
        asyncio.run(check_model(config, model, max_len, unused, unused))
    [record] = caplog.records
    assert "are not compared with those of transformers" in record.getMessage()
    assert re.search(reason, record.getMessage().partition("transformers: ")[2])
