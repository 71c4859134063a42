from __future__ import annotations

import pytest
import torch

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.attention_plan import AttentionPlan, Segment
from gpu_worker.model.dense_mapping import DenseMapping
from gpu_worker.model.step_context import StepContext
from gpu_worker.native.attention.kv_pages import HostKvCache
from tests.gpu_worker.engine_driver import kv_shape


def plan() -> AttentionPlan:
    return HostKvCache(kv_shape()).attention([Segment(0, 0, 1, 0)])


def test_each_layer_gets_the_steps_plan_once() -> None:
    step, attention = StepContext(), plan()
    step.fill(None, attention)
    assert [step.plan_attention(layer) for layer in (0, 2, 1)] == [attention] * 3
    with pytest.raises(BaseModelUnsupported, match="more than once in layer 2"):
        step.plan_attention(2)


def test_the_next_step_has_its_own_plan_and_composition() -> None:
    step, first, second = StepContext(), plan(), plan()
    composition = DenseMapping(torch.ones(1, 1, 1), torch.ones(1, 1), None)
    step.fill(composition, first)
    assert step.composition is composition and step.plan_attention(0) is first
    step.fill(None, second)
    assert step.composition is None and step.plan_attention(0) is second


def test_a_step_that_was_not_filled_has_no_plan() -> None:
    with pytest.raises(AssertionError, match="was not filled"):
        StepContext().plan_attention(0)
