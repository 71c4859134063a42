"""The attention function that transformers calls on every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.attention_plan import AttentionPlan, Segment
from gpu_worker.model.packed_attention import packed_attention
from gpu_worker.model.step_context import StepContext
from gpu_worker.native.attention.kv_cache import KvCache, KvShape
from gpu_worker.native.attention.kv_pages import DeviceKvCache, HostKvCache
from tests.gpu_worker.engine_driver import kv_shape
from tests.gpu_worker.slow_varlen_attention import slow_varlen_attn


@dataclass
class Noting(AttentionPlan):
    """Returns the values, and records the arguments."""

    asked: list[tuple[int, float, int | None]] = field(default_factory=list)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, sliding_window: int | None
    ) -> Tensor:
        self.asked.append((layer, scaling, sliding_window))
        return value.transpose(0, 1)


VALUE = torch.randn(1, 2, 5, 4)
BUILD = pytest.mark.parametrize(
    "build", [HostKvCache, lambda shape: DeviceKvCache(shape, torch.device("cpu"), slow_varlen_attn)]
)


def layer(index: int = 3, *, is_causal: bool = True) -> nn.Module:
    module = nn.Module()
    module.layer_idx, module.is_causal = index, is_causal  # type: ignore[assignment]
    return module


def filled(plan: AttentionPlan | None = None) -> StepContext:
    step = StepContext()
    step.fill(None, plan or Noting())
    return step


def test_the_steps_plan_is_called_with_the_modules_layer() -> None:
    plan = Noting()
    step = filled(plan)
    attended, weights = packed_attention(layer(3), VALUE, VALUE, VALUE, None, step=step, scaling=0.5, sliding_window=7)
    assert plan.asked == [(3, 0.5, 7)]
    assert weights is None
    torch.testing.assert_close(attended, VALUE.transpose(1, 2))


def test_arguments_without_effect_are_accepted() -> None:
    nothing = {"dropout": 0.0, "position_ids": torch.arange(5), "s_aux": None, "use_cache": False, "is_causal": True}
    packed_attention(layer(), VALUE, VALUE, VALUE, None, step=filled(), scaling=1.0, **nothing)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"softcap": 50.0}, "softcap"),
        ({"block_indices": torch.zeros(1, dtype=torch.long)}, "block_indices"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "not causal"),
        ({"module": layer(is_causal=False)}, "not causal"),
        ({"attention_mask": torch.zeros(5, 5)}, "its own attention mask"),
    ],
)
def test_arguments_that_would_be_dropped_are_refused_by_name(extra: dict[str, Any], reason: str) -> None:
    arguments = {"module": layer(), "attention_mask": None, "step": filled(), "scaling": 1.0} | extra
    with pytest.raises(BaseModelUnsupported, match=reason):
        packed_attention(query=VALUE, key=VALUE, value=VALUE, **arguments)


def test_a_model_that_does_not_pass_the_step_on_is_refused() -> None:
    with pytest.raises(BaseModelUnsupported, match="keyword arguments"):
        packed_attention(layer(), VALUE, VALUE, VALUE, None, scaling=1.0)


@BUILD
def test_a_layer_may_not_see_more_than_the_cache_keeps_for_it(build: Callable[[KvShape], KvCache]) -> None:
    cache = build(kv_shape(window=3, window_layers=frozenset({1}), num_window_tokens=15))
    row = cache.allocate(3, 5)
    plan, parts = cache.attention([Segment(row, 0, 3, 0)]), [torch.ones(heads, 3, 4) for heads in (4, 2, 2)]
    for layer_index, window in ((0, None), (0, 3), (1, 3), (1, 2)):
        plan.attend(layer_index, *parts, scaling=1.0, sliding_window=window)
    for window, seen in ((None, "all"), (4, "4")):
        with pytest.raises(BaseModelUnsupported, match=f"{seen} tokens in a layer whose config implies a window of 3"):
            plan.attend(1, *parts, scaling=1.0, sliding_window=window)


@BUILD
def test_heads_that_do_not_match_the_cache_are_refused(build: Callable[[KvShape], KvCache]) -> None:
    cache = build(kv_shape())
    plan = cache.attention([Segment(cache.allocate(3, 5), 0, 3, 0)])
    query, one_head = torch.ones(4, 3, 4), torch.ones(1, 3, 4)  # which would be stored in both heads
    with pytest.raises(BaseModelUnsupported, match="key"):
        plan.attend(0, query, one_head, one_head, scaling=1.0, sliding_window=None)
