"""Does an adapter do anything? Base against adapter logits on a fixed prompt."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.engine_loop import EngineLoop
from gpu_worker.request import Job, SamplingParams
from lora_store.adapter import AdapterRef
from lora_store.plan import BASE_PLAN, Plan, PlannedAdapter

PROMPT = "Hello"  # two tokens: a thousand adapters are asked it when a pool is published
# A row's logits differ by this share of the largest with the company it runs in: rounding, no adapter's doing.
_NOISE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


class Prober:
    """Probes many adapters in one step. The base model's logits are computed once, by the first probe."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._base: Tensor | None = None
        self._numbers = itertools.count()

    async def shifts(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        """For each adapter max|adapter - base| / max|base| over the logits after the prompt, or why there is none.

        0.0 when the shift drowns in rounding. Raises: what the engine says of the base model's own run.
        """
        if self._base is None:
            self._base = await self._first_logits(BASE_PLAN)
        await self._loop.preload(weights_digests)  # a step costs little more for many rows than for one: let there be one
        return await asyncio.gather(*[self._shift(self._base, digest) for digest in weights_digests])

    async def _shift(self, base: Tensor, weights_digest: str) -> float | Exception:
        adapter = PlannedAdapter(AdapterRef("probe", "probe", weights_digest), weights_digest, 1.0)
        try:
            adapted = await self._first_logits(Plan("selection", (adapter,)))
        except Exception as exc:
            return exc
        shift = float((adapted - base).abs().max() / base.abs().max())
        return shift if shift > _NOISE[self._loop.engine.base.dtype] else 0.0

    async def _first_logits(self, plan: Plan) -> Tensor:
        job = Job(f"probe-{next(self._numbers)}", PROMPT, plan, SamplingParams(max_tokens=1, temperature=0))
        _, last = await self._loop.complete(job, keep_logits=True)
        assert last.first_logits is not None
        return last.first_logits
