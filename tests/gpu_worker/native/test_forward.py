"""One packed forward pass, compared with transformers' own model over each row alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.residency import Residency
from gpu_worker.front.grammar.state import Mask
from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.inject import inject, target_linears
from gpu_worker.model.step_context import StepContext
from gpu_worker.native.attention.kv_pages import HostKvCache
from gpu_worker.native.forward import ForwardPass
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import kv_shape
from tests.gpu_worker.rows import row_of
from tests.tiny import VOCABULARY, TinyBase, TinyFolders, assert_equal_logits

FIRST, SECOND = [256, 1, 2, 3, 4, 5, 6], [256, 90, 91, 92, 93]


@dataclass(frozen=True)
class Parts:
    """A forward pass over a tiny model, and its parts."""

    forward: ForwardPass
    cache: HostKvCache
    model: nn.Module


@pytest.fixture
def parts(tiny_base: TinyBase) -> Parts:
    base, step = tiny_base("llama"), StepContext()
    bank = LoraBank(target_linears(base.model, base.model.get_output_embeddings()), 4)
    inject(base.model, bank, step)
    cache = HostKvCache(kv_shape(num_layers=3, head_dim=8, max_len=40, num_tokens=120))
    return Parts(ForwardPass(base, Residency(bank), cache, step, None, torch.device("cpu")), cache, base.model)


@pytest.fixture
def plain(tiny_folders: TinyFolders) -> Callable[[list[int]], Tensor]:
    """Return transformers' logits (V,) after these tokens."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["llama"], dtype=torch.float32).eval()

    def run(tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        return logits

    return run


@torch.inference_mode()
def test_rows_of_a_step_have_the_same_logits_as_alone(parts: Parts, plain: Callable[[list[int]], Tensor]) -> None:
    """A whole prompt together with the first and then the last chunk of another, and a decode token at the end."""
    long, short = row_of(tokens=FIRST), row_of(tokens=SECOND)
    rows = [parts.cache.allocate(len(tokens) + 1, 40) for tokens in (FIRST, SECOND)]
    assert parts.forward([(long, Segment(rows[0], 0, 4, 0))]).shape == (0, VOCABULARY), "the prompt is incomplete"
    [logits] = parts.forward([(long, Segment(rows[0], 0, 4, 0)), (short, Segment(rows[1], 4, 5, 0))])
    assert_equal_logits(logits, plain(SECOND))
    short.tokens.append(17)
    found = parts.forward([(short, Segment(rows[1], 0, 1, 5)), (long, Segment(rows[0], 1, 3, 4))])
    for own, tokens in zip(found, ([*SECOND, 17], FIRST), strict=True):
        assert_equal_logits(own, plain(tokens))


@torch.inference_mode()
def test_the_same_segments_can_be_computed_again_whole_or_in_part(parts: Parts) -> None:
    rows = [parts.cache.allocate(7, 40) for _ in range(2)]
    scheduled = [(row_of(tokens=FIRST), Segment(rows[0], 0, 7, 0)), (row_of(tokens=SECOND), Segment(rows[1], 7, 5, 0))]
    first, again = parts.forward(scheduled), parts.forward(scheduled)
    assert torch.equal(first, again)
    [alone] = parts.forward(scheduled[:1])
    assert_equal_logits(alone, first[0])


@torch.inference_mode()
def test_logits_are_those_of_the_kept_tokens_in_their_order(parts: Parts) -> None:
    segment = Segment(parts.cache.allocate(7, 40), 0, 7, 0)
    every = parts.forward.logits([BASE_PLAN], [segment], FIRST, range(7))
    for kept in ([0, 1, 2], [6, 5, 4, 3, 2, 1, 0], [3], []):
        assert_equal_logits(parts.forward.logits([BASE_PLAN], [segment], FIRST, kept), every[kept])


@pytest.mark.parametrize("fails", [False, True])
@torch.inference_mode()
def test_a_pass_keeps_no_reference_to_its_rows(fails: bool, parts: Parts) -> None:
    row, asked = row_of(tokens=FIRST), list[int]()

    def masks() -> list[Mask | None]:
        asked.append(len(row.tokens))
        if fails:
            raise RuntimeError("a mask is lost")
        return [None]

    kept = weakref.ref(masks)  # it refers to the row
    with pytest.raises(RuntimeError, match="a mask is lost") if fails else nullcontext():
        parts.forward([(row, Segment(parts.cache.allocate(7, 40), 0, 7, 0))], masks)
    del masks
    gc.collect()
    assert asked == [len(FIRST)]
    assert kept() is None


def raising(module: nn.Module, args: object) -> None:
    raise RuntimeError("the device is lost")


@pytest.mark.parametrize("fault", ["none", "an error", "no finite logits"])
def test_a_device_computes_a_token_unless_it_fails_and_keeps_nothing(fault: str, parts: Parts) -> None:
    if fault == "an error":
        parts.model.register_forward_pre_hook(raising)
    elif fault != "none":
        parts.model.get_output_embeddings().whole.weight.data.fill_(torch.nan)
    with torch.inference_mode():
        assert parts.forward.can_compute(row_of(tokens=[0])) == (fault == "none")
    assert (parts.cache.num_free, parts.cache.num_free_tokens) == (3, 120)
