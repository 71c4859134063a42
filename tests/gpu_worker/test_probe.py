"""What an adapter does to the base model's logits, many adapters at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gpu_worker import probe
from gpu_worker.engine import Engine
from gpu_worker.engine_loop import EngineLoop
from gpu_worker.errors import AdapterLoadFailed, AdapterUnfit, EngineStopped, PlanTooLarge
from gpu_worker.probe import probe_shifts
from lora_store.adapter import AdapterWeights, ModuleWeights
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.driving import assert_nothing_held, by_digest, greedy, run, run_together
from tests.tiny import plan_of, random_adapter

MakeEngine = Callable[..., Engine]
Shapes = dict[str, tuple[int, int]]


@pytest.fixture
def shifts_of(start: Callable[[Engine], EngineLoop]) -> Callable[[Engine, list[str]], list[float | Exception]]:
    return lambda engine, digests: run(probe_shifts(start(engine), digests, "probe"))


def idle(shapes: Shapes) -> AdapterWeights:
    """An adapter that does nothing: every lora_b is zero, as training begins."""
    weights = random_adapter(shapes, 9)
    modules = {name: replace(module, lora_b=module.lora_b * 0) for name, module in weights.modules.items()}
    return AdapterWeights("idle", modules)


def test_each_adapter_has_its_own_shift_or_its_own_error(
    make_engine: MakeEngine, shapes: Shapes, shifts_of: Callable[..., list[float | Exception]]
) -> None:
    weak, strong = random_adapter(shapes, 1, size=0.02), random_adapter(shapes, 2, size=0.3)
    wide = random_adapter(shapes, 3, rank=33)
    misfit = AdapterWeights("misfit", {"nowhere": ModuleWeights(torch.ones(1, 1), torch.ones(1, 1), 1.0)})
    engine = make_engine(by_digest(weak, strong, wide, misfit, idle(shapes)), max_batch_size=4)
    digests = [strong.weights_digest, "missing", weak.weights_digest, "misfit", "idle", wide.weights_digest]
    strong_shift, missing, weak_shift, misfitting, nothing, too_wide = shifts_of(engine, digests)
    assert isinstance(strong_shift, float) and isinstance(weak_shift, float)
    assert strong_shift > weak_shift > 0.0
    assert nothing == 0.0
    assert isinstance(missing, AdapterLoadFailed) and isinstance(misfitting, AdapterUnfit)
    assert isinstance(too_wide, PlanTooLarge)
    assert_nothing_held(engine)


def test_the_shift_is_the_largest_change_of_a_logit_in_units_of_the_largest_logit(
    make_engine: MakeEngine, shapes: Shapes, shifts_of: Callable[..., list[float | Exception]]
) -> None:
    pool = [random_adapter(shapes, i, rank=2) for i in range(5)]

    def logits_of(plan: Plan) -> Tensor:
        [answer] = run_together(make_engine(by_digest(*pool)), [greedy(probe.PROMPT, plan)])
        return answer.first_logits

    base = logits_of(BASE_PLAN)
    expected = [
        float((logits_of(plan_of("selection", (weights, 1.0))) - base).abs().max() / base.abs().max())
        for weights in pool
    ]
    found = shifts_of(make_engine(by_digest(*pool)), [weights.weights_digest for weights in pool])
    assert found == pytest.approx(expected, rel=1e-4)


def test_without_an_engine_there_is_no_shift(make_engine: MakeEngine, start: Callable[[Engine], EngineLoop]) -> None:
    loop = start(make_engine({}))
    loop.stop()
    with pytest.raises(EngineStopped):
        run(probe_shifts(loop, ["a"], "probe"))
