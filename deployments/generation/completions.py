"""Answer completion requests: plan them, send one job per row to the Workers, and put the answer together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace

from deployments.api.completion_responses import Answer, ChatAnswer, TextAnswer
from deployments.api.completions import ChatCompletionRequest, Question
from deployments.api.parsing import TextRequest
from deployments.api.planned import Planned
from deployments.api.responses import JsonObject
from deployments.auth.authenticator import Authenticator
from deployments.auth.caller import Caller
from deployments.auth.quotas import TokenUsage
from deployments.calls.deadlines import deadline_of, within
from deployments.calls.worker_client import WorkerClient
from deployments.config.app import AppConfig
from deployments.generation.jobs import jobs_of, merge
from deployments.generation.planner import Planner
from deployments.generation.request_limits import check_limits, work_of
from deployments.generation.row_stream import RowStream, StreamLimits
from deployments.observability.request_context import RequestContext
from deployments.observability.tracing import tracer
from deployments.scaling.scale_from_zero import WorkerGate
from gpu_worker.request.request import Completion, Delta


@dataclass(frozen=True, slots=True)
class StartedCompletion:
    """A planned request. Closing `held` gives back what it counts against the limits of its key."""

    answer: Answer
    rows: Sequence[RowStream]
    usage: TokenUsage
    held: ExitStack


class CompletionService:
    """Plans requests and streams their rows. It serves the HTTP routes and calls through a Ray handle alike."""

    def __init__(
        self,
        config: AppConfig,
        authenticator: Authenticator,
        planner: Planner,
        gate: WorkerGate,
        worker: WorkerClient,
        limits: StreamLimits,
    ) -> None:
        self._config, self._authenticator, self._planner = config, authenticator, planner
        self._gate, self._worker, self._limits = gate, worker, limits

    async def start(self, request: TextRequest, caller: Caller, context: RequestContext) -> StartedCompletion:
        """Check and plan the request, and wait for a Worker. Its answer must be collected or streamed afterwards."""
        deadline = deadline_of(context.arrived_at, request.timeout_s, self._config.max_request_s)
        questions = request.questions()
        request.sampling()  # refuse invalid sampling before any call
        check_limits(request, questions, self._config)
        with ExitStack() as stack:
            texts = [text for question in questions if (text := self._planner.text_read(question)) is not None]
            usage = stack.enter_context(self._authenticator.running(caller, work_of(request, questions, texts)))
            plans = await self._plan(questions, caller, context, deadline)
            async with within(deadline):
                await self._gate.ready()
            answer = _answer_to(request, plans, caller, context)
            jobs = jobs_of(answer.request_id, request, questions, plans, self._config.template)
            rows = [
                RowStream(
                    worker=self._worker,
                    job=replace(job, tenant=caller.tenant),
                    index=index,
                    question=index // request.n,
                    usage=usage,
                    context=context,
                    deadline=deadline,
                    limits=self._limits,
                )
                for index, job in enumerate(jobs)
            ]
            return StartedCompletion(answer, rows, usage, stack.pop_all())

    async def collect(self, started: StartedCompletion) -> ChatAnswer | TextAnswer:
        """Return the whole answer."""
        with started.held:
            tasks = [asyncio.create_task(row.collect()) for row in started.rows]
            try:
                parts = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return started.answer.whole([Completion.joined(deltas) for deltas in parts])

    async def stream(self, started: StartedCompletion, *, include_usage: bool) -> AsyncGenerator[JsonObject | None]:
        """Yield the chunks: the plans with the first text, text as it arrives, then the usage. None is a heartbeat.

        An error before the first text is raised before anything is yielded.
        """
        lasts: dict[int, Delta] = {}
        with started.held:
            async with aclosing(merge([row.deltas() for row in started.rows])) as deltas:
                async for index, delta in deltas:
                    if delta is None:
                        if lasts:
                            yield None
                        continue
                    if not lasts:
                        yield started.answer.opening()
                    lasts[index] = delta
                    yield started.answer.chunk(index, delta)
        if include_usage:
            yield started.answer.usage_chunk([lasts[index] for index in range(len(started.rows))])

    async def _plan(
        self, questions: Sequence[Question], caller: Caller, context: RequestContext, deadline: float
    ) -> Sequence[Planned]:
        began = time.monotonic()
        with tracer.start_as_current_span("plan"):
            async with within(deadline):
                plans = await self._planner.plan_all(questions, caller.tenant)
        context.record_plans(plans, time.monotonic() - began)
        return plans


def _answer_to(request: TextRequest, plans: Sequence[Planned], caller: Caller, context: RequestContext) -> Answer:
    return Answer(
        "chat" if isinstance(request, ChatCompletionRequest) else "text",
        request.model,
        plans,
        caller.tenant,
        request.lora.explain,
        num_choices=request.n,
        has_logprobs=request.num_logprobs is not None,
        request_id=context.request_id,
    )
