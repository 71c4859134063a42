"""A model that only calls its decoder and its head is computed without its own code, with the same result."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.compiled_model import CompiledModel
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN
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
    """Caps the logits, and no test here has such large ones."""

    def forward(self, *arguments: Any, **others: Any) -> Any:
        output = super().forward(*arguments, **others)
        output.logits = output.logits.clamp(-60, 60)
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


class Lowered(LlamaForCausalLM):
    """Lowers the logit of the last id."""

    def forward(self, *arguments: Any, **others: Any) -> Any:
        output = super().forward(*arguments, **others)
        output.logits = torch.cat([output.logits[..., :-1], output.logits[..., -1:] - 4], dim=2)
        return output


class Told(LlamaForCausalLM):
    """Gives its decoder an argument of its own."""

    def forward(self, **others: Any) -> Any:
        return super().forward(**others, is_causal=True)


class Wasteful(LlamaForCausalLM):
    """Computes the logits of all tokens, whatever it is asked for, if it is asked for a number of them."""

    def forward(self, logits_to_keep: Any = 0, **others: Any) -> Any:
        output = super().forward(logits_to_keep=0, **others)
        if isinstance(logits_to_keep, Tensor):
            output.logits = output.logits[:, logits_to_keep]
        return output


class Doubled(LlamaForCausalLM):
    """Doubles the logits if it computes all of them."""

    def forward(self, logits_to_keep: Any = 0, **others: Any) -> Any:
        output = super().forward(logits_to_keep=logits_to_keep, **others)
        if isinstance(logits_to_keep, int):
            output.logits = output.logits * 2
        return output


@pytest.mark.parametrize("kind", [Same, Scaled, Capped, Normed, Shifted, Backward, Lowered, Told, Wasteful, Doubled])
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


@pytest.mark.parametrize("kept", [[4, 0, 2], [3], [], [0, 1, 2, 3, 4]])
def test_only_the_kept_states_reach_the_head(kept: list[int], make_bf16: MakeBf16) -> None:
    found = []
    for compiles in (True, False):
        engine, sizes = make_bf16({}, compiles=compiles), list[int]()
        head = engine.base.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, given, sizes=sizes: sizes.append(given[0].shape[1]))
        row = engine.kv_cache.allocate(5, 5)
        with torch.inference_mode():
            found.append(engine._forward.logits([BASE_PLAN], [Segment(row, 0, 5, 0)], [7, 8, 9, 10, 11], kept))
        assert sizes == [len(kept)]
    assert len(found[0]) == len(kept) and torch.equal(*found)


def test_a_number_of_last_logits_is_given_to_the_models_own_code(make_bf16: MakeBf16) -> None:
    model = make_bf16({}).base.model
    model.forward._compiled = SimpleNamespace(hidden=lambda _: torch.zeros(1, 3, 8))
    model.forward._own = lambda **others: others["logits_to_keep"]
    assert model(input_ids=torch.tensor([[1]]), logits_to_keep=1) == 1


def test_a_head_that_is_replaced_later_is_used(make_bf16: MakeBf16) -> None:
    engine, called = make_bf16({}), list[int]()
    head = engine.base.model.get_output_embeddings()
    engine.base.model.set_output_embeddings(head.whole)
    head.register_forward_hook(lambda *_: called.append(1))
    run_together(engine, [greedy("abc", num_new=5)])
    assert not called


def _refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model's own code ran")
