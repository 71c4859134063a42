"""The engine's steps before it reports ready, which must leave no state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from gpu_worker.errors import LogitsNotFinite, WarmUpFailed
from gpu_worker.native.attention.kv_pages import HostKvCache
from gpu_worker.native.checks.warm_up import warm_up
from gpu_worker.native.loop import Engine
from tests.gpu_worker.engine_driver import (
    BASE_JOB,
    Alone,
    MakeEngine,
    assert_nothing_held,
    assert_same,
    run_together,
)
from tests.gpu_worker.faults import break_adapters
from tests.tiny import FAMILIES

NUM_PROMPT_TOKENS = 8  # per request of the warm-up


class NoKernel(RuntimeError):
    """The error of a device without a kernel."""


NO_KERNEL = NoKernel("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILIES),
        ("gemma3", {"max_batch_size": 1}),
        ("llama", {"max_model_len": 2}),
        ("qwen3", {"bank_rank_rows": 1}),
        ("gemma3", {"lora_products": "torch"}),
        ("mistral", {"max_batch_size": 1, "max_step_tokens": 1, "max_chunk_tokens": 1}),
    ],
    ids=str,
)
def test_it_computes_chunks_and_decode_steps_with_an_adapter_and_leaves_nothing(
    family: str, changes: dict[str, object], make_engine: MakeEngine
) -> None:
    engine = make_engine({}, family, **changes)
    before, passes = engine.status(), passes_of(engine)
    warm_up(engine)
    assert engine.status() == before
    assert (engine.counters.num_steps, engine.counters.num_new_tokens, engine.counters.num_requests) == (0, 0, 0)
    assert_nothing_held(engine)
    assert max(one.num_rows for one in passes) >= 1, "an adapter was composed"
    if engine.max_len > 2:  # otherwise there is room for only one new token, which the prompt's step chooses
        is_behind = [one.last_position >= min(NUM_PROMPT_TOKENS, engine.max_len - 1) for one in passes]
        assert any(is_behind), "decode steps were computed, at positions behind the prompt"
    if engine.max_len > 2 and engine.config.max_step_tokens > 1:
        assert any(one.num_tokens > 1 and one.num_logits == 0 for one in passes), "and a lone chunk"


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass."""

    num_tokens: int
    num_logits: int  # rows
    num_rows: int  # active rows of the bank
    last_position: int


def passes_of(engine: Engine) -> list[Pass]:
    """Record every later forward pass."""
    passes: list[Pass] = []

    def record(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        num_tokens, kept = kwargs["input_ids"].shape[1], kwargs["logits_to_keep"]
        num_logits = num_tokens if isinstance(kept, int) else len(kept)
        last_position = int(kwargs["position_ids"].max())
        passes.append(Pass(num_tokens, num_logits, engine.residency.active_rows, last_position))

    engine.base.model.register_forward_pre_hook(record, with_kwargs=True)
    return passes


def every_pass(engine: Engine) -> None:
    engine.base.model.register_forward_pre_hook(lambda *_: raise_no_kernel())


def decode_steps(engine: Engine) -> None:
    def check(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["position_ids"].max() >= NUM_PROMPT_TOKENS:
            raise_no_kernel()

    engine.base.model.register_forward_pre_hook(check, with_kwargs=True)


def adapters(engine: Engine) -> None:
    break_adapters(engine, NO_KERNEL)


def raise_no_kernel() -> None:
    raise NO_KERNEL


@pytest.mark.parametrize("breaks", [every_pass, decode_steps, adapters])
def test_an_engine_that_cannot_compute_them_is_refused_with_the_cause(
    breaks: Callable[[Engine], None], make_engine: MakeEngine
) -> None:
    engine = make_engine({})
    breaks(engine)
    with pytest.raises(WarmUpFailed, match="no kernel image") as caught:
        warm_up(engine)
    assert isinstance(caught.value.__cause__, NoKernel)


def test_a_model_whose_logits_are_not_finite_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine({})
    with torch.no_grad():
        engine.base.model.get_output_embeddings().whole.weight.fill_(torch.nan)
    with pytest.raises(WarmUpFailed) as caught:
        warm_up(engine)
    assert isinstance(caught.value.__cause__, LogitsNotFinite)


def test_a_warm_engine_answers_as_a_fresh_one_with_and_without_its_cache(alone: Alone, make_engine: MakeEngine) -> None:
    engine = warm_up(make_engine({}))
    [warm] = run_together(engine, [BASE_JOB])
    cache = engine.kv_cache
    assert isinstance(cache, HostKvCache)
    cache.forget()
    for store in cache.stores:
        store.fill_(7)
    engine.release()
    assert not any(store.any() for store in cache.stores)
    [released] = run_together(engine, [BASE_JOB])
    for answer in (warm, released):
        assert_same(answer, alone(BASE_JOB, {}))
