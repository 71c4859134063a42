"""The attention function that transformers calls on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.packed_attention import packed_attention
from gpu_worker.model.step_context import StepContext
from gpu_worker.native.attention.kv_cache import KvCache, KvShape
from gpu_worker.native.attention.kv_pages import DeviceKvCache, HostKvCache
from tests.gpu_worker.engine_driver import kv_shape
from tests.gpu_worker.slow_varlen_attention import slow_varlen_attn

VALUE = torch.randn(1, 2, 5, 4)
BUILD = pytest.mark.parametrize(
    "build", [HostKvCache, lambda shape: DeviceKvCache(shape, torch.device("cpu"), slow_varlen_attn)]
)


def layer(*, is_causal: bool = True) -> nn.Module:
    module = nn.Module()
    module.layer_idx, module.is_causal = 1, is_causal  # type: ignore[assignment]
    return module


def filled() -> StepContext:
    """Return a step of five tokens of one row."""
    cache, step = HostKvCache(kv_shape()), StepContext()
    step.fill(None, cache.attention([Segment(cache.allocate(5, 5), 0, 5, 0)]))
    return step


def test_arguments_without_effect_are_accepted() -> None:
    nothing = {"dropout": 0.0, "position_ids": torch.arange(5), "s_aux": None, "use_cache": False, "is_causal": True}
    packed_attention(layer(), VALUE, VALUE, VALUE, None, step=filled(), scaling=1.0, **nothing)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"block_indices": torch.zeros(1, dtype=torch.long)}, "block_indices"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "not causal"),
        ({"module": layer(is_causal=False)}, "not causal"),
    ],
)
def test_arguments_that_would_be_dropped_are_refused_by_name(extra: dict[str, Any], reason: str) -> None:
    arguments = {"module": layer(), "attention_mask": None, "step": filled(), "scaling": 1.0} | extra
    with pytest.raises(BaseModelUnsupported, match=reason):
        packed_attention(query=VALUE, key=VALUE, value=VALUE, **arguments)


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
@pytest.mark.parametrize(
    ("query", "key", "value", "message"),
    [
        ((4, 3, 4), (1, 3, 4), (1, 3, 4), r"keys \(1, 3, 4\) .* implies \(2, 3, 4\)"),
        ((4, 3, 4), (2, 2, 4), (2, 2, 4), r"keys \(2, 2, 4\)"),
        ((4, 3, 4), (4, 3, 4), (4, 3, 4), r"keys \(4, 3, 4\)"),
        ((4, 3, 4), (2, 3, 1), (2, 3, 1), r"keys \(2, 3, 1\)"),
        ((4, 3, 4), (2, 3, 4), (2, 3, 1), r"values \(2, 3, 1\)"),
        ((3, 3, 4), (2, 3, 4), (2, 3, 4), r"queries \(3, 3, 4\).*multiple of 2 key/value heads"),
        ((4, 3, 8), (2, 3, 4), (2, 3, 4), r"queries \(4, 3, 8\).*each of size 4"),
    ],
)
def test_shapes_that_the_cache_would_cut_or_repeat_are_refused(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    message: str,
    build: Callable[[KvShape], KvCache],
) -> None:
    cache = build(kv_shape())
    plan = cache.attention([Segment(cache.allocate(3, 5), 0, 3, 0)])
    with pytest.raises(BaseModelUnsupported, match=message):
        plan.attend(0, torch.ones(query), torch.ones(key), torch.ones(value), scaling=1.0, sliding_window=None)
