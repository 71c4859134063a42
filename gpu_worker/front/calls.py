"""What a call of an engine makes of the events of its rows: whole answers, logits, and the effect of adapters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from gpu_worker.errors import LogitsNotFinite
from gpu_worker.front.delta_stream import Events
from gpu_worker.front.request.request import Completion, Delta, Job, SamplingParams
from lora_store.adapter import AdapterRef
from lora_store.plan import BASE_PLAN, Plan, PlannedAdapter

PROMPT = "Hello"  # two tokens, because a publish may probe a thousand adapters
_TENANT = "probe:"  # not a valid tenant name; probes take turns with tenants
# Rounding in different batches changes logits by up to this share of the largest.
_NOISE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


class CompletionSink:
    """The sink of a request whose answer is wanted whole. Its future is set when the request ends."""

    def __init__(self) -> None:
        self.future: Future[Completion] = Future()
        self._deltas: list[Delta] = []

    def __call__(self, event: Delta | Exception) -> None:
        if isinstance(event, Exception):
            if self.future.set_running_or_notify_cancel():  # else the caller has cancelled the request
                self.future.set_exception(event)
            return
        self._deltas.append(event)
        if event.finish_reason is not None and self.future.set_running_or_notify_cancel():
            self.future.set_result(Completion.joined(self._deltas))


async def wait_for_first_logits(events: Events) -> Tensor | Exception:
    """Return the logits from which a row's first token was chosen, or its error. A row that ends without has one."""
    while True:
        event = await events.get()
        if isinstance(event, Exception):
            return event
        if event.first_logits is not None:
            return event.first_logits
        if event.finish_reason is not None:
            return RuntimeError("the engine computed no logits for a probe")


class Prober:
    """Probes many adapters in one step. The first probe also computes the base model's logits.

    `first_logits`: returns what follows the prompt of each job. `load`: brings weights into host memory.
    `dtype`: of the engine's products.
    """

    def __init__(
        self,
        first_logits: Callable[[Sequence[Job]], Awaitable[list[Tensor | Exception]]],
        load: Callable[[Collection[str]], Awaitable[None]],
        dtype: torch.dtype,
    ) -> None:
        self._first_logits, self._load, self._noise = first_logits, load, _NOISE[dtype]
        self._base: Tensor | None = None
        self._numbers = itertools.count()

    async def shifts(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        """Return max|adapter - base| / max|base| over the logits after the prompt for each adapter, or its error.

        A shift within rounding is 0.0. Raises: the engine's error for the base model; LogitsNotFinite if its logits are
        not finite.
        """
        if self._base is None:
            [base] = await self._first_logits([self._job(BASE_PLAN)])
            if isinstance(base, Exception):
                raise base
            if not base.isfinite().all():
                raise LogitsNotFinite("the base model's logits are not finite, so no adapter can be probed")
            self._base = base
        await self._load(weights_digests)  # load all first, so that one step computes all rows
        plans = [_make_plan(digest) for digest in weights_digests]
        adapted = await self._first_logits([self._job(plan) for plan in plans])
        return [logits if isinstance(logits, Exception) else self._shift(self._base, logits) for logits in adapted]

    def _shift(self, base: Tensor, adapted: Tensor) -> float | Exception:
        shift = float((adapted - base).abs().max() / base.abs().max())
        if not math.isfinite(shift):  # vLLM computes on with such logits
            return LogitsNotFinite("the adapter's weights make the model's logits non-finite; publish other weights")
        return 0.0 if shift <= self._noise else shift

    def _job(self, plan: Plan) -> Job:
        sampling = SamplingParams(max_tokens=1, temperature=0)
        return Job(f"probe-{next(self._numbers)}", PROMPT, plan, sampling, tenant=_TENANT)


def _make_plan(weights_digest: str) -> Plan:
    adapter = PlannedAdapter(AdapterRef("probe", "probe", weights_digest), weights_digest, 1.0)
    return Plan("selection", (adapter,))
