"""Measure the effect of adapters: compare base and adapter logits on a fixed prompt."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gpu_worker.front.request.request import Job, SamplingParams
from lora_store.adapter import AdapterRef
from lora_store.plan import BASE_PLAN, Plan, PlannedAdapter

PROMPT = "Hello"  # two tokens, because a publish may probe a thousand adapters
_TENANT = "probe:"  # not a valid tenant name; probes take turns with tenants
# Rounding in different batches changes logits by up to this share of the largest.
_NOISE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


class ProbedEngine(Protocol):
    """Computes what follows a prompt."""

    async def first_logits(self, jobs: Sequence[Job]) -> list[Tensor | Exception]: ...
    async def preload(self, digests: Collection[str]) -> None: ...


class Prober:
    """Probes many adapters in one step. The first probe also computes the base model's logits.

    `dtype`: of the engine's products.
    """

    def __init__(self, engine: ProbedEngine, dtype: torch.dtype) -> None:
        self._engine, self._noise = engine, _NOISE[dtype]
        self._base: Tensor | None = None
        self._numbers = itertools.count()

    async def shifts(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        """Return max|adapter - base| / max|base| over the logits after the prompt for each adapter, or its error.

        A shift within rounding is 0.0. Raises: the engine's error for the base model.
        """
        if self._base is None:
            [base] = await self._engine.first_logits([self._job(BASE_PLAN)])
            if isinstance(base, Exception):
                raise base
            self._base = base
        await self._engine.preload(weights_digests)  # load all first, so that one step computes all rows
        plans = [_plan_of(digest) for digest in weights_digests]
        adapted = await self._engine.first_logits([self._job(plan) for plan in plans])
        shifts = [logits if isinstance(logits, Exception) else _shift(self._base, logits) for logits in adapted]
        return [0.0 if isinstance(shift, float) and shift <= self._noise else shift for shift in shifts]

    def _job(self, plan: Plan) -> Job:
        sampling = SamplingParams(max_tokens=1, temperature=0)
        return Job(f"probe-{next(self._numbers)}", PROMPT, plan, sampling, tenant=_TENANT)


def _shift(base: Tensor, adapted: Tensor) -> float:
    return float((adapted - base).abs().max() / base.abs().max())


def _plan_of(weights_digest: str) -> Plan:
    adapter = PlannedAdapter(AdapterRef("probe", "probe", weights_digest), weights_digest, 1.0)
    return Plan("selection", (adapter,))
