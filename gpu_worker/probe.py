"""Does an adapter do anything? Base against adapter logits on a fixed prompt."""

from __future__ import annotations

import asyncio

from torch import Tensor

from gpu_worker.engine_loop import EngineLoop
from gpu_worker.prompts import alpaca_prompt
from gpu_worker.request import Job, SamplingParams
from lora_store.adapter import AdapterRef
from lora_store.plan import BASE_PLAN, Plan, PlannedAdapter

_PROMPT = alpaca_prompt("Name three animals, then add 17 and 25.")


async def probe_shift(loop: EngineLoop, weights_digest: str, request_id: str) -> float:
    """max|adapter - base| / max|base| over the logits after the prompt; 0.0 when the shift drowns in rounding.

    The base model is asked twice, in the same batch: what differs between those two is rounding.
    Raises: AdapterUnfit, AdapterLoadFailed, LogitsNotFinite.
    """
    adapter = PlannedAdapter(AdapterRef("probe", "probe", weights_digest), weights_digest, 1.0)
    plans = (BASE_PLAN, Plan("selection", (adapter,)), BASE_PLAN)
    base, adapted, again = await asyncio.gather(
        *[_first_logits(loop, f"{request_id}-{n}", plan) for n, plan in enumerate(plans)]
    )
    shift, rounding = float((adapted - base).abs().max()), float((again - base).abs().max())
    return shift / float(base.abs().max()) if shift > 2 * rounding else 0.0


async def _first_logits(loop: EngineLoop, request_id: str, plan: Plan) -> Tensor:
    job = Job(request_id, _PROMPT, plan, SamplingParams(max_tokens=1, temperature=0))
    _, last = await loop.complete(job, keep_logits=True)
    assert last.first_logits is not None
    return last.first_logits
