"""What transformers calls, whatever the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from gpu_worker.attention import packed_attention
from gpu_worker.attention_plan import AttentionPlan
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.step_context import StepContext


@dataclass
class Noting(AttentionPlan):
    """Answers with the values, and notes what it was asked."""

    asked: list[tuple[int, float, int | None]] = field(default_factory=list)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, sliding_window: int | None
    ) -> Tensor:
        self.asked.append((layer, scaling, sliding_window))
        return value.transpose(0, 1)


def test_the_steps_plan_is_asked_for_the_modules_layer() -> None:
    plan, step, module = Noting(), StepContext(), nn.Module()
    step.fill(None, plan)
    module.layer_idx = 3  # type: ignore[assignment]
    value = torch.randn(1, 2, 5, 4)
    attended, weights = packed_attention(module, value, value, value, None, step=step, scaling=0.5, sliding_window=7)
    assert plan.asked == [(3, 0.5, 7)]
    assert weights is None
    torch.testing.assert_close(attended, value.transpose(1, 2))


@pytest.mark.parametrize("extra", [{"s_aux": torch.zeros(4)}, {"softcap": 50.0}])
def test_sinks_and_soft_caps_are_refused_where_they_would_be_dropped(extra: dict[str, object]) -> None:
    nothing = torch.zeros(1, 4, 1, 8)
    with pytest.raises(BaseModelUnsupported):
        packed_attention(nn.Module(), nothing, nothing, nothing, None, step=StepContext(), scaling=1.0, **extra)
