"""What an engine computes before it reports ready, and what must not be left of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gpu_worker.engine import Engine
from gpu_worker.errors import LogitsNotFinite, WarmUpFailed
from gpu_worker.lora_linear import LoraLinear
from gpu_worker.warm_up import warmed_up
from tests.gpu_worker.driving import BASE_JOB, Answer, assert_nothing_held, assert_same, run_together
from tests.tiny import FAMILIES

MakeEngine = Callable[..., Engine]


class NoKernel(RuntimeError):
    """What a device without a kernel raises."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_batch_size": 1},
        {"max_model_len": 2},
        {"bank_rank_rows": 1},
        {"lora_products": "torch"},
        {"max_batch_size": 1, "max_step_tokens": 1, "max_chunk_tokens": 1},
    ],
    ids=str,
)
def test_it_computes_chunks_and_decode_steps_with_an_adapter_and_leaves_nothing(
    family: str, changes: dict[str, object], make_engine: MakeEngine
) -> None:
    engine = make_engine({}, family, **changes)
    before, passes = engine.holdings(), passes_of(engine)
    warmed_up(engine)
    assert engine.holdings() == before
    assert (engine.counters.num_steps, engine.counters.num_new_tokens, engine.counters.num_requests) == (0, 0, 0)
    assert_nothing_held(engine)
    assert max(num_rows for _, _, num_rows in passes) >= 1, "an adapter was composed"
    assert min(num_tokens for num_tokens, _, _ in passes) <= 3, "decode steps were computed"
    if engine.max_len > 2 and engine.config.max_step_tokens > 1:
        assert any(num_tokens > 1 and num_logits == 0 for num_tokens, num_logits, _ in passes), "and a lone chunk"


def passes_of(engine: Engine) -> list[tuple[int, int, int]]:
    """Record (tokens, rows of logits, active bank rows) of every forward pass from now on."""
    passes: list[tuple[int, int, int]] = []

    def record(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        passes.append((kwargs["input_ids"].shape[1], len(kwargs["logits_to_keep"]), engine.residency.active_rows))

    engine.base.model.register_forward_pre_hook(record, with_kwargs=True)
    return passes


def test_a_warm_engine_answers_as_a_fresh_one(make_engine: MakeEngine, alone: Callable[..., Answer]) -> None:
    [answer] = run_together(warmed_up(make_engine({})), [BASE_JOB])
    assert_same(answer, alone(BASE_JOB, {}))


def every_pass(engine: Engine) -> None:
    engine.base.model.register_forward_pre_hook(lambda *_: raise_no_kernel())


def decode_steps(engine: Engine) -> None:
    def check(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["position_ids"].max() >= 8:
            raise_no_kernel()

    engine.base.model.register_forward_pre_hook(check, with_kwargs=True)


def adapters(engine: Engine) -> None:
    linear = next(module for module in engine.base.model.modules() if isinstance(module, LoraLinear))
    linear.register_forward_pre_hook(lambda module, args: module._step.composition and raise_no_kernel())


def raise_no_kernel() -> None:
    raise NoKernel("no kernel image is available for execution on the device")


@pytest.mark.parametrize("breaks", [every_pass, decode_steps, adapters])
def test_an_engine_that_cannot_compute_them_is_refused_with_the_cause(
    breaks: Callable[[Engine], None], make_engine: MakeEngine
) -> None:
    engine = make_engine({})
    breaks(engine)
    with pytest.raises(WarmUpFailed, match="no kernel image") as caught:
        warmed_up(engine)
    assert isinstance(caught.value.__cause__, NoKernel)


def test_a_model_whose_logits_are_not_finite_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine({})
    with torch.no_grad():
        engine.base.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(WarmUpFailed) as caught:
        warmed_up(engine)
    assert isinstance(caught.value.__cause__, LogitsNotFinite)
