"""A part of the conformance suite that runs on any device and dtype, over one engine of `benchmarks.gpu`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.engine_cases import plan_of
from benchmarks.gpu.hosting import Hosted, job
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.request import Completion, Job
from gpu_worker.model.base_model import model_source
from lora_store import BASE_PLAN, AdapterRef, AdapterWeights, Plan

PROMPT = "The capital of France is"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # of a log probability, against float32 on the CPU
_TOP = 5

Check = dict[str, object]
"""Its `name`, whether it `passed`, and `detail`."""


async def run_checks(hosted: Hosted, dtype: torch.dtype) -> AsyncIterator[Check]:
    """Yield the result of each check. The engine is idle afterwards."""
    pool = [hosted.add(f"{seed}-check", seed, rank=4 + seed, size=0.05) for seed in range(3)]
    plans = plans_over(pool)
    alone = {name: (await hosted.answers([_scored(plan)]))[0] for name, plan in plans.items()}
    tolerance = TOLERANCE[dtype]
    expected = reference(hosted, plans)
    yield _within("equals the reference", {n: _distance(alone[n], expected[n]) for n in plans}, tolerance)
    together = await hosted.answers([_scored(plan) for plan in plans.values()] * 2)
    pairs = zip([*plans] * 2, together, strict=True)
    distances = {name: _apart(found, alone[name]) for name, found in pairs}
    yield _within("a batch of all kinds equals each alone", distances, tolerance)
    yield _different(alone)
    yield await _follows_a_grammar(hosted, plans["mixture of 3"])
    yield await _frees_a_row_that_is_left(hosted, plans["mixture of 3"])
    yield await _frees_what_is_withdrawn(hosted)


def plans_over(pool: list[AdapterWeights]) -> dict[str, Plan]:
    """Return one plan of each kind."""
    named = [
        (AdapterRef("gpu", f"a{n}", weights.weights_digest), weights.weights_digest) for n, weights in enumerate(pool)
    ]
    return {
        "base": BASE_PLAN,
        "selection": plan_of("selection", named[:1]),
        "mixture of 3": plan_of("mixture", named),
        "fusion of 2": plan_of("fusion", named[1:]),
    }


@torch.inference_mode()
def reference(hosted: Hosted, plans: Mapping[str, Plan]) -> dict[str, Tensor]:
    """Return the log probabilities (V,) after the prompt, in float32 on the CPU with the plan added to the weights."""
    source = model_source(hosted.config)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(source)(PROMPT).input_ids])
    modules = dict(model.named_modules())
    found = {}
    for name, plan in plans.items():
        changes = _changes(plan, hosted.pool)
        for module, change in changes.items():
            modules[module].weight += change
        found[name] = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        for module, change in changes.items():
            modules[module].weight -= change
    return found


def _changes(plan: Plan, pool: Mapping[str, AdapterWeights]) -> dict[str, Tensor]:
    """Return the change (out, in) of each module: sum m B A, or for fusion (sum m B)(sum m A), ranks padded."""
    parts = [(adapter.weight, pool[adapter.weights_digest].modules) for adapter in plan.adapters]
    if not parts:
        return {}
    changes = {}
    for name in parts[0][1]:
        weighted = [(m, modules[name].lora_a.float(), modules[name].lora_b.float()) for m, modules in parts]
        if plan.strategy != "fusion":
            changes[name] = torch.stack([m * (b @ a) for m, a, b in weighted]).sum(0)
            continue
        rank = max(len(a) for _, a, _ in weighted)
        a = torch.stack([m * torch.nn.functional.pad(a, (0, 0, 0, rank - len(a))) for m, a, _ in weighted]).sum(0)
        b = torch.stack([m * torch.nn.functional.pad(b, (0, rank - b.shape[1])) for m, _, b in weighted]).sum(0)
        changes[name] = b @ a
    return changes


async def _follows_a_grammar(hosted: Hosted, plan: Plan) -> Check:
    asked = job(PROMPT, plan, num_new=12)
    sampling = replace(asked.sampling, ignore_eos=False, grammar=Grammar("regex", "(red|green|blue)"))
    [answer, _] = await hosted.answers([replace(asked, sampling=sampling), job(PROMPT)])
    return outcome("a row follows a grammar", re.fullmatch("red|green|blue", answer.text) is not None, answer.text)


async def _frees_a_row_that_is_left(hosted: Hosted, plan: Plan) -> Check:
    stream = hosted.engine.stream(job(PROMPT, plan, num_new=100))
    async for delta in stream:
        if delta is not None:
            break
    await stream.aclose()
    await hosted.answers([job(PROMPT)])  # the engine has made a step since
    status = await hosted.engine.status()
    return outcome("a row that is left is freed", status.num_running + status.active_rows == 0, str(status.num_running))


async def _frees_what_is_withdrawn(hosted: Hosted) -> Check:
    await hosted.engine.forget(list(hosted.pool))
    status = await hosted.engine.status()
    held = (len(status.resident), status.occupied_rows, status.host_cache_bytes)
    return outcome("withdrawn adapters are freed", held == (0, 0, 0), f"{held}")


def _scored(plan: Plan) -> Job:
    return job(PROMPT, plan, num_new=1, logprobs=_TOP)


def _distance(answer: Completion, expected: Tensor) -> float:
    """Return the largest difference of the most likely log probabilities, in order."""
    found = torch.tensor([logprob for _, logprob in answer.logprobs[0].top])
    return float((found - expected.topk(len(found)).values).abs().max())


def _apart(one: Completion, other: Completion) -> float:
    pairs = zip(one.logprobs[0].top, other.logprobs[0].top, strict=True)
    return max(abs(a - b) for (_, a), (_, b) in pairs)


def _different(alone: Mapping[str, Completion]) -> Check:
    """Check that the plans have an effect: without one, all other checks would mean nothing."""
    distances = {name: _apart(alone[name], alone["base"]) for name in alone if name != "base"}
    return outcome("every plan has an effect", min(distances.values()) > 0.01, _shown(distances))


def _within(name: str, distances: Mapping[str, float], tolerance: float) -> Check:
    return outcome(name, all(distance <= tolerance for distance in distances.values()), _shown(distances))


def _shown(distances: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {distance:.1e}" for name, distance in distances.items())


def outcome(name: str, passed: bool, detail: str) -> Check:
    return {"name": name, "passed": passed, "detail": detail}
