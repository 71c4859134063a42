"""The attention function that transformers calls on every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

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
    ],
)
def test_arguments_that_would_be_dropped_are_refused_by_name(extra: dict[str, object], reason: str) -> None:
    with pytest.raises(BaseModelUnsupported, match=reason):
        packed_attention(layer(), VALUE, VALUE, VALUE, None, step=filled(), scaling=1.0, **extra)


def test_a_mask_of_the_models_own_is_refused() -> None:
    with pytest.raises(BaseModelUnsupported, match="its own attention mask"):
        packed_attention(layer(), VALUE, VALUE, VALUE, torch.zeros(5, 5), step=filled(), scaling=1.0)


def test_a_layer_that_is_not_causal_is_refused() -> None:
    with pytest.raises(BaseModelUnsupported, match="not causal"):
        packed_attention(layer(is_causal=False), VALUE, VALUE, VALUE, None, step=filled(), scaling=1.0)


def test_a_model_that_does_not_pass_the_step_on_is_refused() -> None:
    with pytest.raises(BaseModelUnsupported, match="keyword arguments"):
        packed_attention(layer(), VALUE, VALUE, VALUE, None, scaling=1.0)


def test_a_layer_may_attend_once_per_step() -> None:
    step = filled()
    for index in (0, 1):
        packed_attention(layer(index), VALUE, VALUE, VALUE, None, step=step, scaling=1.0)
    with pytest.raises(BaseModelUnsupported, match="more than once in layer 1"):
        packed_attention(layer(1), VALUE, VALUE, VALUE, None, step=step, scaling=1.0)
    step.fill(None, Noting())
    packed_attention(layer(1), VALUE, VALUE, VALUE, None, step=step, scaling=1.0)


@pytest.mark.parametrize(
    "build", [HostKvCache, lambda shape: DeviceKvCache(shape, torch.device("cpu"), slow_varlen_attn)]
)
def test_a_layer_may_not_see_more_than_the_cache_keeps_for_it(build: Callable[[KvShape], KvCache]) -> None:
    cache = build(kv_shape(window=3, window_layers=frozenset({1}), num_window_tokens=15))
    row = cache.allocate(3, 5)
    plan, parts = cache.attention([Segment(row, 0, 3, 0)]), [torch.ones(heads, 3, 4) for heads in (4, 2, 2)]
    for layer_index, window in ((0, None), (0, 3), (1, 3), (1, 2)):
        plan.attend(layer_index, *parts, scaling=1.0, sliding_window=window)
    for window, seen in ((None, "all"), (4, "4")):
        with pytest.raises(BaseModelUnsupported, match=f"{seen} tokens in a layer whose config implies a window of 3"):
            plan.attend(1, *parts, scaling=1.0, sliding_window=window)


@pytest.mark.parametrize("over", ["host", "device"])
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((4, 3, 4), (1, 3, 4), (1, 3, 4)),  # would be stored in both heads
        ((4, 3, 4), (4, 3, 4), (4, 3, 4)),
        ((4, 3, 4), (2, 3, 1), (2, 3, 1)),
        ((4, 3, 4), (2, 3, 4), (2, 3, 1)),
        ((3, 3, 4), (2, 3, 4), (2, 3, 4)),
        ((4, 3, 8), (2, 3, 4), (2, 3, 4)),
    ],
    ids=str,
)
def test_heads_that_do_not_match_the_cache_are_refused(
    over: str, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
) -> None:
    shape = kv_shape()
    cache: KvCache = (
        HostKvCache(shape) if over == "host" else DeviceKvCache(shape, torch.device("cpu"), slow_varlen_attn)
    )
    row = cache.allocate(3, 5)
    plan = cache.attention([Segment(row, 0, 3, 0)])
    parts = (torch.ones(query), torch.ones(key), torch.ones(value))
    with pytest.raises(BaseModelUnsupported, match="key"):
        plan.attend(0, *parts, scaling=1.0, sliding_window=None)
