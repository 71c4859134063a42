"""Adapters on fused experts give PEFT's answers alone, and the reference's in every kind of plan."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_worker.errors import BaseModelUnsupported, PlanTooLarge, WorkerConfigInvalid
from gpu_worker.front.request.request import Job
from gpu_worker.model import experts
from gpu_worker.model.base_model import load_base_model
from gpu_worker.model.inject import Adaptable
from gpu_worker.native.loop import Engine
from gpu_worker.native.memory_plan import plan_memory
from lora_store.adapter import AdapterWeights, Shapes
from lora_store.plan import BASE_PLAN, Plan
from lora_store.strategies.registry import Strategy
from tests.gpu_worker.conformance.reference import Reference
from tests.gpu_worker.engine_driver import MakeEngine, by_digest, greedy, run_together
from tests.gpu_worker.families import EQUAL, WITH_EXPERTS, save, train
from tests.gpu_worker.peft_answers import NUM_NEW, PROMPTS, assert_answers_as_peft
from tests.soak import Scale
from tests.tiny import assert_equal_logits, plan_of, random_adapter, tiny_config


def is_expert(name: str) -> bool:
    return name.endswith((".gate_up_proj", ".down_proj")) and ".experts." in name


def shapes_of(folder: Path) -> Shapes:
    return Adaptable.of(load_base_model(tiny_config(folder)).model).shapes


def engine_over(folder: Path, make_engine: MakeEngine, pool: Mapping[str, AdapterWeights], **changes: Any) -> Engine:
    return make_engine(pool, base=load_base_model(tiny_config(folder, **changes)), max_step_tokens=16, **changes)


def train_experts(folder: Path, target: Path, seed: int, **settings: Any) -> Path:
    """Save an adapter on attention and experts, with random weights, as PEFT does."""
    chosen = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    return train(folder, target, seed, **chosen | settings)


def test_adapters_on_experts_answer_as_with_peft(tmp_path: Path, make_engine: MakeEngine) -> None:
    """Adapters that PEFT saved and the base model, in one batch."""
    folder = save(tmp_path / "base", "qwen3_moe", EQUAL["qwen3_moe"])
    of_each: dict[str, dict[str, Any]] = {
        "plain": {},
        "patterns": {
            "use_rslora": True,
            "rank_pattern": {r".*\.gate_up_proj": 5},
            "alpha_pattern": {r".*\.down_proj": 9},
        },
        "one-parameter": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        "one-layer": {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
        "router": {"target_parameters": ["gate.weight", "down_proj"], "alpha_pattern": {"gate.weight": 20}},
        "all-linear": {"target_modules": "all-linear", "target_parameters": None},
    }
    adapters = [
        train_experts(folder, tmp_path / name, seed, **settings)
        for seed, (name, settings) in enumerate(of_each.items())
    ]
    assert_answers_as_peft(folder, adapters, make_engine)


def plans_of(shapes: Shapes) -> tuple[dict[str, AdapterWeights], dict[str, Plan]]:
    """Return a pool of adapters, on everything, on experts only and on the rest only, and plans over them."""
    whole = random_adapter(shapes, 1, rank=3)
    only = random_adapter(shapes, 2, rank_of=lambda name: 5 if "gate_up" in name else 2, modules=is_expert)
    rest = random_adapter(shapes, 3, rank=2, modules=lambda name: not is_expert(name))
    return by_digest(whole, only, rest), {
        "base": BASE_PLAN,
        "selection": plan_of("selection", (whole, 1.0)),
        "experts only": plan_of("selection", (only, -0.7)),
        "mixture": plan_of("mixture", (whole, 0.4), (only, 0.5), (rest, 0.3)),
        "a weight of zero": plan_of("mixture", (whole, 0.0), (rest, 1.0)),
        "fusion": plan_of("fusion", (whole, 0.5), (only, 0.4), (rest, -0.25)),
    }


def random_plans(shapes: Shapes, seed: int) -> tuple[dict[str, AdapterWeights], dict[str, Plan]]:
    """Return adapters with random modules and ranks, and plans over some of them with any weights."""
    draw = random.Random(seed)
    adapters = []
    for number in range(4):
        share, ranks = draw.choice((0.3, 0.8, 1.0)), {name: draw.choice((1, 2, 3, 6)) for name in shapes}
        chosen = {name for name in shapes if draw.random() < share} or {draw.choice(sorted(shapes))}
        adapters.append(
            random_adapter(shapes, 100 * seed + number, rank_of=ranks.__getitem__, modules=chosen.__contains__)
        )
    plans = {}
    for number in range(6):
        parts = draw.sample(adapters, draw.randint(1, 4))
        strategy: Strategy = draw.choice(("mixture", "fusion")) if len(parts) > 1 else "selection"
        plans[str(number)] = plan_of(strategy, *((each, draw.choice((1.0, 0.5, -0.4, 0.0, 0.3))) for each in parts))
    return by_digest(*adapters), plans


def assert_follows_the_reference(
    folder: Path, make_engine: MakeEngine, pool: Mapping[str, AdapterWeights], plans: Mapping[str, Plan]
) -> int:
    """Compare all plans for two prompts in one batch with weights plus deltas. Return how many rows were compared."""
    reference = Reference(folder)
    jobs = [greedy(prompt, plan, num_new=NUM_NEW) for plan in plans.values() for prompt in PROMPTS[:2]]
    answers = run_together(engine_over(folder, make_engine, pool), jobs)
    for job, answer in zip(jobs, answers, strict=True):
        assert isinstance(job.prompt, str)
        steps = reference.greedy(job.prompt, job.plan, pool, NUM_NEW)
        assert answer.tokens == [step.token for step in steps], (folder.name, job.plan)
        assert_equal_logits(answer.first_logits.log_softmax(-1), steps[0].logprobs.float())
    return len(jobs)


def test_every_plan_over_experts_equals_the_reference(tmp_path: Path, make_engine: MakeEngine, scale: Scale) -> None:
    names = WITH_EXPERTS[: scale.pick("families with adapters on experts", small=2, full=len(WITH_EXPERTS))]
    for name in names:
        folder = save(tmp_path / name, name, EQUAL[name])
        assert assert_follows_the_reference(folder, make_engine, *plans_of(shapes_of(folder))) == 12


def test_random_plans_over_experts_equal_the_reference(tmp_path: Path, make_engine: MakeEngine, scale: Scale) -> None:
    for seed in range(scale.pick("batches of random plans over experts", small=1, full=85)):
        name = WITH_EXPERTS[seed % len(WITH_EXPERTS)]
        folder = save(tmp_path / f"{name}-{seed}", name, EQUAL[name])
        assert assert_follows_the_reference(folder, make_engine, *random_plans(shapes_of(folder), seed)) == 12


def moe(tmp_path: Path) -> Path:
    return save(tmp_path / "base", "mixtral", EQUAL["mixtral"])


def asked(plan: Plan) -> Job:
    return greedy("The parrot says", plan, num_new=3)


def test_an_adapter_on_experts_is_replaced_while_the_engine_serves(tmp_path: Path, make_engine: MakeEngine) -> None:
    """The experts of one adapter fit, so each load evicts the adapter before, and no answer mixes two."""
    folder = moe(tmp_path)
    shapes = shapes_of(folder)
    first, second = (random_adapter(shapes, seed, rank=4) for seed in (1, 2))
    engine = engine_over(folder, make_engine, by_digest(first, second), host_cache_bytes=0)
    plans = [plan_of("selection", (weights, 1.0)) for weights in (first, second)]
    alone = [run_together(engine_over(folder, make_engine, by_digest(first, second)), [asked(plan)]) for plan in plans]
    answers = run_together(engine, [asked(plan) for plan in [*plans, *plans]])
    assert [answer.tokens for answer in answers] == 2 * [answer.tokens for [answer] in alone]
    assert len(engine.residency.experts) == 1
    both, after = run_together(engine, [asked(plan_of("mixture", (first, 0.5), (second, 0.5))), asked(plans[0])])
    assert isinstance(both.error, PlanTooLarge)
    assert "bytes for their experts" in str(both.error)
    assert after.tokens == alone[0][0].tokens


def test_experts_that_overflow_reach_only_their_own_rows(tmp_path: Path, make_engine: MakeEngine) -> None:
    folder = moe(tmp_path)
    shapes = shapes_of(folder)
    good, other = random_adapter(shapes, 1), random_adapter(shapes, 2, modules=is_expert)
    spoilt = {name: replace(each, lora_a=torch.full_like(each.lora_a, 3e38)) for name, each in other.modules.items()}
    huge = replace(other, modules=spoilt)  # its product with any input is infinite
    engine = engine_over(folder, make_engine, by_digest(good, huge))
    jobs = [asked(plan_of("selection", (weights, 1.0))) for weights in (good, huge)] + [asked(BASE_PLAN)]
    served, failed, base = run_together(engine, jobs)
    assert failed.error is not None
    alone = engine_over(folder, make_engine, by_digest(good))
    assert [served.tokens, base.tokens] == [answer.tokens for answer in run_together(alone, [jobs[0], jobs[2]])]


def test_a_model_whose_experts_ignore_adapters_is_refused(
    tmp_path: Path, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts.ExpertMapping, "add", lambda *arguments: None)
    with pytest.raises(BaseModelUnsupported, match="with an adapter"):
        engine_over(moe(tmp_path), make_engine, {})


def test_the_memory_plan_counts_the_experts_of_adapters(tmp_path: Path, make_engine: MakeEngine) -> None:
    folder = moe(tmp_path)
    row_bytes = sum(4 * num * (num_out + num_in) for num_out, num_in, num in expert_only(shapes_of(folder)))
    few = engine_over(folder, make_engine, {}, host_cache_bytes=0).memory
    cached = engine_over(folder, make_engine, {}, host_cache_bytes=5 * row_bytes).memory
    most = engine_over(folder, make_engine, {}).memory
    rows = tiny_config(folder).bank_rank_rows
    assert [few.expert_bytes, cached.expert_bytes, most.expert_bytes] == [n * row_bytes for n in (4, 5, rows)]
    assert most.total_bytes - replace(most, expert_bytes=0).total_bytes == most.expert_bytes
    assert "adapters' experts" in str(most)
    on_gpu = replace(most, device="cuda")
    assert on_gpu.total_bytes == replace(on_gpu, expert_bytes=0).total_bytes, "they stay in host memory"
    assert "adapters' experts" not in str(on_gpu)
    with pytest.raises(WorkerConfigInvalid, match=r"adapters' experts .*max_step_tokens, host_cache_bytes or"):
        plan_memory(tiny_config(folder), load_base_model(tiny_config(folder)), most.weights_bytes)


def expert_only(shapes: Shapes) -> list[tuple[int, ...]]:
    return [shape for shape in shapes.values() if len(shape) > 2]
