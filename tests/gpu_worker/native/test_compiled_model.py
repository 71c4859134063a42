"""A model that only calls its decoder and its head is computed without its own code, with the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.compiled_model import CompiledModel
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import by_digest, greedy, run_together
from tests.gpu_worker.native.compiled_layers import MakeBf16, jobs_of, logits_of
from tests.tiny import FAMILIES, TinyFolders, tiny_config


class Same(LlamaForCausalLM):
    """Computes the same as its base class."""


class Scaled(LlamaForCausalLM):
    """Divides the logits, as Granite does."""

    def forward(self, *arguments: Any, **others: Any) -> Any:
        output = super().forward(*arguments, **others)
        output.logits = output.logits / 8
        return output


class Capped(LlamaForCausalLM):
    """Caps the logits, as Gemma 2 does."""

    def forward(self, *arguments: Any, **others: Any) -> Any:
        output = super().forward(*arguments, **others)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


class Normed(LlamaForCausalLM):
    """Multiplies what the head reads."""

    def forward(self, *arguments: Any, **others: Any) -> Any:
        own = self.lm_head.forward
        self.lm_head.forward = lambda x: own(x * 2)
        try:
            return super().forward(*arguments, **others)
        finally:
            self.lm_head.forward = own


class Shifted(LlamaForCausalLM):
    """Counts positions from one."""

    def forward(self, position_ids: Tensor, **others: Any) -> Any:
        return super().forward(position_ids=position_ids + 1, **others)


class Backward(LlamaForCausalLM):
    """Reads the ids of the tokens from the other end of its vocabulary."""

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        return super().forward(input_ids=self.config.vocab_size - 1 - input_ids, **others)


@pytest.mark.parametrize("kind", [Same, Scaled, Capped, Normed, Shifted, Backward])
def test_models_that_do_more_are_left_as_they_are(
    kind: type[LlamaForCausalLM], make_bf16: MakeBf16, tiny_folders: TinyFolders, pool: list[AdapterWeights]
) -> None:
    logits = []
    for compiles in (True, False):
        base = load_base_model(tiny_config(tiny_folders["llama"], dtype="bfloat16"))
        base.model.__class__ = kind
        engine = make_bf16(by_digest(*pool), "llama", base=base, compiles=compiles)
        assert isinstance(base.model.forward, CompiledModel) == (compiles and kind is Same)
        logits.append(logits_of(engine, jobs_of(pool)))
    assert all(torch.equal(one, other) for one, other in zip(*logits, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_runs_the_code_of_a_model_that_adds_nothing(family: str, make_bf16: MakeBf16) -> None:
    engine = make_bf16({}, family)
    forward = engine.base.model.forward
    assert isinstance(forward, CompiledModel)
    forward._own = _refuse
    answers = run_together(engine, [greedy("abc", num_new=5), greedy("defghi", num_new=5)])
    assert [len(answer.tokens) for answer in answers] == [5, 5]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_decoder_are_called(register: str, make_bf16: MakeBf16) -> None:
    engine, called = make_bf16({}), list[str]()
    getattr(engine.base.model.base_model, register)(lambda *_: called.append(register))
    run_together(engine, [greedy("abc", num_new=5)])
    assert len(called) == 5


def test_only_the_kept_states_reach_the_head(make_bf16: MakeBf16) -> None:
    """Scores of the prompt's tokens need several of a step's logits, and chunks of a long prompt none."""
    engine = make_bf16({}, max_step_tokens=8)
    head, sizes = engine.base.model.get_output_embeddings(), list[int]()
    head.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[1]))
    run_together(engine, [greedy("abcdefghijklmnopq", num_new=2)])
    assert sizes == [0, 0, 1, 1]


def _refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model's own code ran")
