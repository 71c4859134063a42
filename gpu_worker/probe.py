"""Does an adapter do anything? Base against adapter logits on a fixed prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.engine_loop import EngineLoop
from gpu_worker.request import Job, SamplingParams
from lora_store.adapter import AdapterRef
from lora_store.plan import BASE_PLAN, Plan, PlannedAdapter

PROMPT = "Hello there"  # short: a thousand adapters are asked it when a pool is published


# A row's logits differ by this share of the largest with the company it runs in: rounding, no adapter's doing.
_NOISE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


async def probe_shifts(loop: EngineLoop, weights_digests: Sequence[str], request_id: str) -> list[float | Exception]:
    """For each adapter max|adapter - base| / max|base| over the logits after the prompt, or why there is none.

    0.0 when the shift drowns in rounding. All are asked in one batch, between two rows of the base model: what
    differs between those two is rounding as well.
    Raises: what the engine says of the base model's rows.
    """
    plans = [BASE_PLAN, *[_plan_of(digest) for digest in weights_digests], BASE_PLAN]
    asked = [_first_logits(loop, f"{request_id}-{number}", plan) for number, plan in enumerate(plans)]
    base, *adapted, again = await asyncio.gather(*asked)
    if isinstance(base, Exception):
        raise base
    if isinstance(again, Exception):
        raise again
    noise = max(_NOISE[loop.engine.base.dtype], 2 * _shift(base, again))
    shifts = [logits if isinstance(logits, Exception) else _shift(base, logits) for logits in adapted]
    return [0.0 if isinstance(shift, float) and shift <= noise else shift for shift in shifts]


def _shift(base: Tensor, other: Tensor) -> float:
    return float((other - base).abs().max() / base.abs().max())


def _plan_of(weights_digest: str) -> Plan:
    ref = AdapterRef("probe", "probe", weights_digest)
    return Plan("selection", (PlannedAdapter(ref, weights_digest, 1.0),))


async def _first_logits(loop: EngineLoop, request_id: str, plan: Plan) -> Tensor | Exception:
    job = Job(request_id, PROMPT, plan, SamplingParams(max_tokens=1, temperature=0))
    try:
        _, last = await loop.complete(job, keep_logits=True)
    except Exception as exc:
        return exc
    assert last.first_logits is not None
    return last.first_logits
