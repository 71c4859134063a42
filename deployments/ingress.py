"""The Ingress deployment: the routes, and the same calls as plain methods for handle callers.

`serve.ingress` pickles the routes as the class is made: all they use is imported before it, and no annotation is text.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.telemetry import TelemetryConfig
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.api.completion_responses import Answer
from deployments.api.completions import ChatCompletionRequest, CompletionRequest, RouteQuery
from deployments.api.parsing import TextRequest, parse
from deployments.api.requested_work import Work
from deployments.api.responses import JsonObject, plan_object
from deployments.auth.authenticator import Authenticator
from deployments.auth.caller import LOCAL_CALLER, Caller
from deployments.auth.quotas import TokenUsage
from deployments.auth.ray_token import require_token_mode
from deployments.calls.background_tasks import Background
from deployments.calls.deadlines import deadline_of, seconds_until, within
from deployments.calls.heartbeat import SILENCE_S, drop_heartbeats
from deployments.calls.retries import retry_stream
from deployments.calls.transport import bypass_http_proxy, direct
from deployments.config.app import FORM_OVERHEAD_BYTES, AppConfig
from deployments.generation.jobs import interleaved, jobs_of
from deployments.generation.planner import Planner, text_read
from deployments.generation.request_limits import check_limits, check_texts, encoder_tokens, prompt_tokens, work_of
from deployments.http.api import CHAT_ANSWERS, HEALTH_ANSWERS, READY_ANSWERS, ROUTE_ANSWERS, TEXT_ANSWERS, Api
from deployments.http.dependencies import Pool, bodies_here, config_here, in_flight_here, request_figures_here
from deployments.http.error_responses import install
from deployments.http.middleware.access_log import RequestRecorder
from deployments.http.middleware.bearer_auth import Asking, BearerAuth
from deployments.http.middleware.body_limit import DEFAULT_MAX_BODY_BYTES, BodyLimit
from deployments.http.middleware.concurrency_limit import InFlight, InFlightLimit
from deployments.http.middleware.host_guard import HostGuard
from deployments.http.middleware.request_id import RequestIds
from deployments.http.middleware.safe_headers import SafeHeaders
from deployments.http.readiness import Readiness
from deployments.http.routes import adapters, console, maintenance, models, pool_map, stats, vllm
from deployments.http.shared_bytes import SharedBytes
from deployments.http.streaming import events, refuse_stream_options
from deployments.http.upload_budget import UploadBudget
from deployments.observability import request_record
from deployments.observability.cluster_stats import StatsReader
from deployments.observability.logs import join_serve_logs
from deployments.observability.metrics import SERVE, MetricFactory
from deployments.observability.request_metrics import ChangeMetrics, RequestMetrics
from deployments.observability.request_record import RequestRecord
from deployments.observability.tracing import tracer
from deployments.publishing.preload import Preload
from deployments.publishing.publisher import Publisher
from deployments.publishing.reclaimer import Reclaimer
from deployments.scaling.scale_from_zero import WorkerGate
from gpu_worker.errors import AdapterLoadFailed, EngineFull, WaitedTooLong
from gpu_worker.request.request import Completion, Delta, Job

WORKER_GRACE_S = 5.0  # a step of the engine, and the way
# The server's own reasons not to start a job: its prompt is not charged.
NO_ROOM = (EngineFull, WaitedTooLong, AdapterLoadFailed, BackPressureError, DeploymentUnavailableError)
STREAM_HEADERS = {"X-Accel-Buffering": "no"}

# Serve traces every call already; FastAPI would hang its own spans beside them.
TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}

app = Api(title="LoraRetriever", docs_url=None, redoc_url=None, telemetry=TELEMETRY)
install(app)
app.add_middleware(BodyLimit, limit_of=adapters.max_body_bytes, budget=bodies_here)
app.add_middleware(InFlightLimit, in_flight=in_flight_here)
app.add_middleware(BearerAuth)  # the last ones added are asked first
app.add_middleware(HostGuard, config=config_here)
app.add_middleware(RequestRecorder, figures=request_figures_here)
app.add_middleware(RequestIds)
app.add_middleware(SafeHeaders)
for routes in (models, adapters, vllm, maintenance, pool_map, stats, console):
    app.include_router(routes.router)


@dataclass(frozen=True, slots=True)
class Begun:
    """A request that was planned. `held` is its place among what its key may run, given back when it is closed."""

    answer: Answer
    jobs: Sequence[Job]
    meter: TokenUsage
    held: ExitStack
    record: RequestRecord
    deadline: float  # by this process's monotonic clock


@serve.ingress(app)
class Ingress:
    """Holds no catalogue: plans come from the Retriever, text from a Worker, writes go to the Store."""

    def __init__(
        self,
        config: AppConfig,
        retriever: DeploymentHandle,
        worker: DeploymentHandle,
        store: DeploymentHandle,
        *,
        worker_grace_s: float = WORKER_GRACE_S,
        silence_s: float = SILENCE_S,
        kinds: MetricFactory = SERVE,
    ) -> None:
        join_serve_logs()
        require_token_mode(allow_unauthenticated=config.allow_unauthenticated_ray)
        bypass_http_proxy()
        self.requests = RequestMetrics(kinds)
        self._config, self._worker_grace_s = config, worker_grace_s
        self._retriever, self._worker = retriever, worker
        self._silence_s = silence_s
        self._waking = WorkerGate(worker, config.scale_from_zero_timeout_s if config.workers_scale_to_zero else None)
        self.door = Authenticator(config)
        self._planner = Planner(config, retriever)
        self.background = Background()
        longest_request_s = config.worker_scaling.graceful_shutdown_timeout_s
        releaser = Reclaimer(store, worker, self.background, longest_request_s=longest_request_s)
        publisher = Publisher(
            store,
            retriever,
            worker,
            background=self.background,
            releaser=releaser,
            waking=self._waking,
            metrics=ChangeMetrics(kinds),
        )
        has_tenants, one_upload = config.keys_file is not None, config.max_upload_bytes + FORM_OVERHEAD_BYTES
        uploads = UploadBudget(config.max_upload_total_bytes, always_bytes=one_upload, has_tenants=has_tenants)
        self.pool = Pool(config, self.door, publisher, store, retriever, uploads, self.background)
        self.stats = StatsReader(config, retriever, worker)
        self.in_flight = InFlight(config.max_concurrent_requests)
        self.bodies = SharedBytes(
            config.max_body_total_bytes,
            always_bytes=DEFAULT_MAX_BODY_BYTES,
            has_tenants=has_tenants,
        )
        self.preload = Preload(
            config.preload, publisher, approves=config.keys_file is not None or config.public_requires_approval
        )

        self.readiness = Readiness(self.preload, self._waking, retriever, worker, has_keys=self.pool.has_keys)

    def __del__(self) -> None:
        """Serve calls it before the replica's process ends."""
        self.preload.cancel()
        self.background.cancel()

    async def generate(self, request: TextRequest | Mapping[str, Any], caller: Caller = LOCAL_CALLER) -> JsonObject:
        """The whole answer, as the HTTP route gives it. A mapping is read like the route's JSON body.

        Who calls through a Ray handle is trusted, and says for whom: roles are the routes' matter.
        """
        with self.requests.record_call(RequestRecord(uuid.uuid4().hex, "generate")) as record:
            request = parse(request)
            refuse_stream_options(request)
            return await self._whole(await self._begin(request, caller, record))

    async def stream(
        self, request: TextRequest | Mapping[str, Any], caller: Caller = LOCAL_CALLER
    ) -> AsyncGenerator[JsonObject]:
        """The answer's chunks, as the HTTP route streams them: the plan first, then text as it is made."""
        with self.requests.record_call(RequestRecord(uuid.uuid4().hex, "stream")) as record:
            request = parse(request)
            begun = await self._begin(request, caller, record)
            async with aclosing(self._chunks(begun, request.include_usage)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def started(self) -> JsonObject:
        """Return what `/ready` says, for the operator: with the paths of preloaded folders that were refused."""
        return await self.readiness.details()

    async def _begin(self, request: TextRequest, caller: Caller, record: RequestRecord) -> Begun:
        deadline = deadline_of(request.timeout_s, self._config.max_request_s)
        questions = request.questions()
        request.sampling()  # what cannot be sampled asks nobody
        check_limits(request, questions, self._config)
        with ExitStack() as stack:
            texts = [text for question in questions if (text := self._planner.text_read(question)) is not None]
            meter = stack.enter_context(self.door.running(caller, work_of(request, questions, texts)))
            began = time.monotonic()
            with tracer.start_as_current_span("plan"):
                async with within(deadline):
                    plans = await self._planner.plan_all(questions, caller.tenant)
            record.planned(plans, time.monotonic() - began)
            async with within(deadline):
                await self._waking.wait()
            answer = Answer(
                "chat" if isinstance(request, ChatCompletionRequest) else "text",
                request.model,
                plans,
                caller.tenant,
                request.lora.explain,
                num_choices=request.n,
                tells_logprobs=request.num_logprobs is not None,
                request_id=record.request_id,
            )
            jobs = jobs_of(answer.request_id, request, questions, plans, self._config.template)
            jobs = [replace(job, tenant=caller.tenant) for job in jobs]
            return Begun(answer, jobs, meter, stack.pop_all(), record, deadline)

    async def _whole(self, begun: Begun) -> JsonObject:
        parts: list[list[Delta]] = [[] for _ in begun.jobs]
        with begun.held:
            async with aclosing(self._rows(begun, whole=True)) as rows:
                async for index, delta in rows:
                    parts[index].append(delta)
        return begun.answer.whole([Completion.joined(deltas) for deltas in parts])

    async def _chunks(self, begun: Begun, include_usage: bool) -> AsyncGenerator[JsonObject]:
        lasts: dict[int, Delta] = {}
        with begun.held:
            async with aclosing(self._rows(begun, whole=False)) as rows:
                index, delta = await anext(rows)  # an error before the first token is an error, not a broken stream
                yield begun.answer.opening()
                lasts[index] = delta
                yield begun.answer.chunk(index, delta)
                async for index, delta in rows:
                    lasts[index] = delta
                    yield begun.answer.chunk(index, delta)
        if include_usage:
            yield begun.answer.usage_chunk([lasts[index] for index in range(len(begun.jobs))])

    def _rows(self, begun: Begun, *, whole: bool) -> AsyncGenerator[tuple[int, Delta]]:
        attempts = [partial(self._attempt, begun, index) for index in range(len(begun.jobs))]
        return interleaved([retry_stream(attempt, whole=whole) for attempt in attempts])

    def _attempt(self, begun: Begun, index: int) -> AsyncGenerator[Delta]:
        question = index // begun.answer.num_choices
        return begun.record.watch(index, self._deltas(begun.jobs[index], question, begun.meter, begun.deadline))

    async def _deltas(self, job: Job, question: int, meter: TokenUsage, deadline: float) -> AsyncGenerator[Delta]:
        """One Worker's deltas; leaving early cancels the job there. A repeat is metered in the place of the first."""
        job = replace(job, time_left_s=seconds_until(deadline))
        meter.sent(job.request_id, question, prompt_tokens(job.prompt))
        response = direct(self._worker).options(stream=True).stream.remote(job)
        try:
            async with aclosing(drop_heartbeats(aiter(response), self._silence_s)) as deltas:
                while True:
                    async with within(deadline + self._worker_grace_s):  # the Worker keeps it, unless it hangs
                        delta = await anext(deltas, None)
                    if delta is None:
                        return
                    meter.saw(job.request_id, question, delta.num_prompt_tokens, delta.num_new_tokens)
                    yield delta
        except NO_ROOM:
            meter.not_started(job.request_id)
            raise
        finally:
            response.cancel()

    @app.post("/v1/chat/completions", response_model=None, responses=CHAT_ANSWERS)
    async def chat_completions(self, body: ChatCompletionRequest, caller: Asking) -> Response:
        """Answer a conversation, by the adapters that fit it; as server-sent events with `stream`."""
        return await self._respond(body, caller)

    @app.post("/v1/completions", response_model=None, responses=TEXT_ANSWERS)
    async def completions(self, body: CompletionRequest, caller: Asking) -> Response:
        """Continue prompts as they are, each by the adapters that fit it."""
        return await self._respond(body, caller)

    async def _respond(self, request: TextRequest, caller: Caller) -> Response:
        if not request.stream:
            refuse_stream_options(request)
        begun = await self._begin(request, caller, request_record.current())
        headers = begun.answer.headers()
        if not request.stream:
            return JSONResponse(await self._whole(begun), headers=headers)
        chunks = self._chunks(begun, request.include_usage)
        opening = await anext(chunks)
        headers = STREAM_HEADERS | headers
        return StreamingResponse(events(opening, chunks), media_type="text/event-stream", headers=headers)

    @app.post("/v1/route", response_model=None, responses=ROUTE_ANSWERS)
    async def route(self, body: RouteQuery, caller: Asking) -> JsonObject:
        """The plans for these prompts, candidates included; nothing is generated. Each can be sent as `lora.plan`."""
        check_texts(body.prompt, self._config)
        texts = [text for prompt in body.prompt if (text := text_read(prompt, body.lora)) is not None]
        with self.door.running(caller, Work(len(body.prompt), num_read=encoder_tokens(texts))):
            async with within(deadline_of(None, self._config.max_request_s)):
                planned = await self._planner.route_all(body.prompt, body.lora, caller.tenant)
        return {"object": "list", "data": [plan_object(item, caller.tenant, explain=True) for item in planned]}

    @app.get("/health", response_model=None, responses=HEALTH_ANSWERS)
    async def health(self) -> JsonObject:
        """This Ingress answers."""
        return {"status": "ok"}

    @app.get("/ready", response_model=None, responses=READY_ANSWERS)
    async def ready(self) -> JsonObject:
        """Retriever and Worker answer, or all workers sleep, and the preload is published. 503 until then.

        It waits some seconds for them. Where there are keys, the answer to anybody is the status alone.
        """
        return await self.readiness.public()
