"""The Ingress deployment: builds the services of one replica, serves them over HTTP and to callers of Ray handles."""

from __future__ import annotations

import asyncio
import logging
import os
import reprlib
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeStatus

from deployments.api.completion_responses import ChatAnswer, TextAnswer
from deployments.api.completions import TextRequest, parse
from deployments.api.pool_responses import Ready
from deployments.auth.authenticator import LOCAL_CALLER, Authenticator, Caller, InFlight, Limiter
from deployments.auth.key_file import load_keys
from deployments.auth.ray_token import require_token_mode
from deployments.background import Background
from deployments.byte_budget import ByteBudget
from deployments.calls.catalogue_clients import RetrieverClient, StoreClient, serve_retriever, serve_store
from deployments.calls.h11_proxy import warn_if_unbounded
from deployments.calls.serve_calls import bypass_http_proxy
from deployments.calls.worker_client import HEARTBEAT_TIMEOUT_S, BaseWorkers, Workers, serve_worker
from deployments.config.app import FORM_OVERHEAD_BYTES, AppConfig
from deployments.errors import RequestInvalid
from deployments.generation.completions import CompletionService
from deployments.generation.notes import PromptNotes
from deployments.generation.planner import Planner, refuse_stream_options
from deployments.generation.row_stream import WORKER_GRACE_S
from deployments.generation.shadows import Shadows
from deployments.http.api import build_api
from deployments.http.bodies import DEFAULT_MAX_BODY_BYTES, MAX_BODY_TOTAL_BYTES
from deployments.http.dependencies import KEEP_ALIVE_S, Services
from deployments.http.listener import Listener, listening_at
from deployments.http.readiness import Readiness
from deployments.json_types import JsonMapping, JsonObject
from deployments.observability.cluster_stats import StatsReader
from deployments.observability.logs import join_serve_logs
from deployments.observability.metrics import SERVE, MetricFactory
from deployments.observability.request_context import RequestContext
from deployments.observability.request_metrics import ChangeMetrics, RequestMetrics
from deployments.observability.usage import UsageLog
from deployments.publishing.evaluation import AnswerScorer, Evaluator
from deployments.publishing.idle_evaluation import IdleEvaluations, IdleScorer
from deployments.publishing.learning import Learning
from deployments.publishing.preload import Preload
from deployments.publishing.publisher import Publisher
from deployments.publishing.reclaimer import Reclaimer, withdraw_expired

logger = logging.getLogger(__name__)
REPLICAS_COUNTED_EVERY_S = 15.0  # by each replica; Serve's controller answers from memory
NOT_ANSWERING = ("STARTING", "STOPPING")  # states of replicas, in Serve's words


class Ingress:
    """Holds no catalogue: plans come from the Retriever, text from a Worker, writes go to the Store.

    `app.py` passes it to `serve.ingress`, which calls `__serve_build_asgi_app__` once the replica is constructed. With
    an `address` (host, port) the replica also listens there itself, for requests that do not pass Serve's proxy.
    """

    _listener: Listener | None = None

    def __init__(
        self,
        config: AppConfig,
        retriever: DeploymentHandle,
        workers: Mapping[str, DeploymentHandle],
        store: DeploymentHandle,
        *,
        address: tuple[str, int] | None = None,
        silence_s: float = HEARTBEAT_TIMEOUT_S,
        grace_s: float = WORKER_GRACE_S,
        keep_alive_s: float = KEEP_ALIVE_S,
        kinds: MetricFactory = SERVE,
        max_body_total_bytes: int = MAX_BODY_TOTAL_BYTES,
    ) -> None:
        join_serve_logs()
        self._address = address
        if address is None:
            warn_if_unbounded(os.environ)
        require_token_mode(allow_unauthenticated=config.allow_unauthenticated_ray)
        bypass_http_proxy()
        clients = (
            serve_retriever(retriever),
            _serve_workers(config, workers, silence_s),
            serve_store(store),
        )
        self.services = _build_services(config, *clients, grace_s, keep_alive_s, kinds, max_body_total_bytes)
        expire = withdraw_expired(self.services.publisher.expire)
        loop = asyncio.get_event_loop()
        self._repeating = [loop.create_task(expire)]
        if config.ingress_scaling.max_replicas > 1:
            self._repeating.append(loop.create_task(follow_replicas(self.services.authenticator)))

    async def __serve_build_asgi_app__(self) -> FastAPI:
        app = build_api(self.services)
        if self._address is not None:
            self._listener = Listener(app, await listening_at(*self._address))
            self._listener.start()
        return app

    def reconfigure(self, user_config: JsonMapping) -> None:
        """Use other defaults of requests, without a restart. Serve calls this with the deployment's `user_config`.

        Raises: ValueError if it has anything else.
        """
        services = self.services
        services.planner.defaults, sampling = services.config.retrieval.changed(user_config)
        services.stats.defaults, services.completions.sampling_defaults = services.planner.defaults, sampling

    def check_health(self) -> None:
        """Raises: RuntimeError if the replica should listen itself, and does not; then Serve replaces it."""
        if self._listener is not None and self._listener.has_failed:
            raise RuntimeError("the HTTP listener has failed")

    def __del__(self) -> None:
        """Cancel what runs in the background. Serve calls this before the replica's process ends."""
        if self._listener is not None:
            self._listener.stop()
        if hasattr(self, "services"):  # the constructor may have failed
            self.services.preload.cancel()
            self.services.background.cancel()
            self.services.usage_log.close()
            for task in self._repeating:
                if not task.get_loop().is_closed():
                    task.cancel()

    async def finish_requests(self, within_s: float) -> bool:
        """Accept no more connections at the own address, and wait until requests are answered, or for `within_s`.

        Meanwhile apply the outcomes that wait.
        """
        applying = asyncio.create_task(self.services.learning.finish(within_s))
        is_answered = self._listener is None or await self._listener.stopped(within_s)
        await applying
        return is_answered

    async def generate(
        self, request: TextRequest | JsonMapping, caller: Caller = LOCAL_CALLER
    ) -> ChatAnswer | TextAnswer:
        """Return the whole answer, like the HTTP route. A mapping is parsed like the route's JSON body.

        Callers of a Ray handle are trusted and name the tenant they call for; roles apply to HTTP routes only.
        """
        with self._record_call("generate", caller) as context:
            request = parse(request)
            refuse_stream_options(request)
            completions = self.services.completions
            return await completions.collect(await completions.start(request, caller, context))

    async def stream(
        self, request: TextRequest | JsonMapping, caller: Caller = LOCAL_CALLER
    ) -> AsyncGenerator[JsonObject]:
        """Yield the answer's chunks, like the HTTP route: the plan first, then text as it arrives."""
        with self._record_call("stream", caller) as context:
            request, completions = parse(request), self.services.completions
            started = await completions.start(request, caller, context)
            async with aclosing(completions.stream(started)) as chunks:
                async for chunk in chunks:
                    yield chunk

    @contextmanager
    def _record_call(self, name: str, caller: Caller) -> Iterator[RequestContext]:
        context = RequestContext(uuid.uuid4().hex, name)
        try:
            with self.services.metrics.record_call(context):
                if not isinstance(caller, Caller):
                    raise RequestInvalid(
                        f"caller: must be a deployments.auth.authenticator.Caller, got {reprlib.repr(caller)}", "caller"
                    )
                context.caller, context.tenant = caller, caller.tenant
                yield context
        finally:
            self.services.usage_log.record(context)

    async def started(self) -> Ready:
        """Return the answer of `/ready` for the operator: with the paths of preloaded folders that are not live."""
        return await self.services.readiness.details()


async def follow_replicas(
    limiter: Limiter,
    status: Callable[[], ServeStatus] = serve.status,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Divide the limits of keys by the replicas of this deployment that run, until cancelled, also after an error."""
    while True:
        await sleep(REPLICAS_COUNTED_EVERY_S)
        try:
            own = serve.get_replica_context()
            found = (await asyncio.to_thread(status)).applications[own.app_name].deployments[own.deployment]
            states = found.replica_states.items()  # those that update or recover answer too
            limiter.divide_by(max(1, sum(number for state, number in states if state not in NOT_ANSWERING)))
        except Exception as exc:
            logger.warning("limits of keys are divided by the replicas that ran before, retrying: %r", exc)


def _serve_workers(config: AppConfig, handles: Mapping[str, DeploymentHandle], silence_s: float) -> Workers:
    """Return the workers of every base model. Those that may be scaled to zero hold requests until one runs."""
    served: dict[str, BaseWorkers] = {}
    for name, model in config.by_model.items():
        client = serve_worker(handles[name], heartbeat_timeout_s=silence_s)
        timeout_s = config.scale_from_zero_timeout_s if model.workers_scale_to_zero else None
        served[name] = BaseWorkers(client, timeout_s)
    return Workers(served, config.served_models.bases)


def _build_services(
    config: AppConfig,
    retriever: RetrieverClient,
    workers: Workers,
    store: StoreClient,
    grace_s: float,
    keep_alive_s: float,
    kinds: MetricFactory,
    max_body_total_bytes: int,
) -> Services:
    has_keys, background, changes = config.has_keys, Background(), ChangeMetrics(kinds)
    models = config.served_models
    metrics = RequestMetrics(kinds, max_tenants=config.tenant_metrics)
    usage_log = UsageLog(config.usage_folder, models.first.name, store.put_usage)
    shadows = Shadows(workers, background, metrics, has_keys=config.has_keys)
    notes = PromptNotes(store, background, is_on=config.learning != "off")
    longest_request_s = max(each.worker_scaling.graceful_shutdown_timeout_s for each in config.by_model.values())
    reclaimer = Reclaimer(store, workers, background, longest_request_s=longest_request_s)
    publisher = Publisher(store, retriever, workers, background=background, reclaimer=reclaimer, metrics=changes)
    find_caller = load_keys(config.api_key, config.keys_file)
    authenticator = Authenticator(find_caller, config.ingress_scaling.min_replicas)  # `follow_replicas` corrects it
    planner = Planner(models, config.retrieval, retriever)
    approves = has_keys or config.public_requires_approval
    preload = Preload(config.preload, publisher, bases=models.bases, approves=approves)
    scorer = AnswerScorer(workers, models)
    while_idle = Evaluator(store, retriever, publisher, IdleScorer(scorer, workers))
    evaluation_of = None
    if config.evaluate_after_publish:
        evaluations = IdleEvaluations(while_idle, background, changes)
        publisher.subscribe(evaluations.after_publish)
        evaluation_of = evaluations.state_of
    one_upload = config.max_upload_bytes + FORM_OVERHEAD_BYTES
    return Services(
        config=config,
        authenticator=authenticator,
        planner=planner,
        completions=CompletionService(
            models,
            authenticator,
            planner,
            workers,
            grace_s,
            shadows,
            notes,
            usage_log,
            is_strict=config.strict_fields,
        ),
        publisher=publisher,
        evaluator=Evaluator(store, retriever, publisher, scorer),
        learning=Learning(store, retriever, publisher, background, applies=config.learning == "apply"),
        store=store,
        retriever=retriever,
        readiness=Readiness(preload, workers, retriever, has_keys=has_keys),
        stats=StatsReader(config, retriever, workers, evaluation_of=evaluation_of),
        metrics=metrics,
        usage_log=usage_log,
        background=background,
        in_flight=InFlight(config.max_concurrent_requests),
        bodies=ByteBudget(max_body_total_bytes, always_bytes=DEFAULT_MAX_BODY_BYTES, has_tenants=has_keys),
        uploads=ByteBudget(config.max_upload_total_bytes, always_bytes=one_upload, has_tenants=has_keys),
        preload=preload,
        keep_alive_s=keep_alive_s,
    )
