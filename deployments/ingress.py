"""The Ingress deployment: the routes, and the same calls as plain methods for handle callers.

`serve.ingress` pickles the routes as the class is made: all they use is imported before it, and no annotation is text.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Literal

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import admin_routes, console_routes, http_errors, map_routes, pool_routes, stats_routes, vllm_routes
from deployments.answers import Answer, JsonObject, model_objects, plan_object
from deployments.background import Background
from deployments.body_limit import BodyLimit
from deployments.config import AppConfig
from deployments.errors import ModelNotFound, NotReady
from deployments.http_io import TextRequest, events, parse
from deployments.planner import Planner
from deployments.pool import Pool
from deployments.preload import Preload
from deployments.publisher import Publisher
from deployments.releaser import Releaser
from deployments.schemas import ChatCompletionRequest, CompletionRequest, RouteQuery
from deployments.stats_reader import StatsReader
from gpu_worker.request import Completion, Delta, Job
from lora_store import LOCAL_TENANT

READY_WAIT_S = 5.0
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

app = FastAPI(title="LoraRetriever", docs_url="/docs", redoc_url=None)
http_errors.install(app)
app.add_middleware(BodyLimit, limit_of=pool_routes.max_body_bytes)
for routes in (pool_routes, vllm_routes, admin_routes, map_routes, stats_routes, console_routes):
    app.include_router(routes.router)


@serve.ingress(app)
class Ingress:
    """Holds no catalogue: plans come from the Retriever, text from a Worker, writes go to the Store."""

    def __init__(
        self, config: AppConfig, retriever: DeploymentHandle, worker: DeploymentHandle, store: DeploymentHandle
    ) -> None:
        self._config = config
        self._retriever, self._worker = retriever, worker
        self._planner = Planner(config, retriever)
        self.background = Background()
        longest_request_s = config.worker_scaling.graceful_shutdown_timeout_s
        releaser = Releaser(store, worker, self.background, longest_request_s=longest_request_s)
        publisher = Publisher(store, retriever, worker, background=self.background, releaser=releaser)
        self.pool = Pool(config, publisher, store, retriever)
        self.stats = StatsReader(config, retriever, worker)
        self.preload = Preload(config.preload, publisher)

    def __del__(self) -> None:
        """Serve calls it before the replica's process ends."""
        self.preload.cancel()
        self.background.cancel()

    async def generate(self, request: TextRequest | Mapping[str, Any]) -> JsonObject:
        """The whole answer, as the HTTP route gives it. A mapping is read like the route's JSON body."""
        request = parse(request)
        answer, job = await self._begin(request)
        parts = [delta async for delta in self._deltas(job)]
        last = parts[-1]
        assert last.finish_reason is not None
        text = "".join(part.text for part in parts)
        return answer.whole(Completion(text, last.num_prompt_tokens, last.num_new_tokens, last.finish_reason))

    async def stream(self, request: TextRequest | Mapping[str, Any]) -> AsyncGenerator[JsonObject]:
        """The answer's chunks, as the HTTP route streams them: the plan first, then text as it is made."""
        request = parse(request)
        answer, job = await self._begin(request)
        async with aclosing(self._deltas(job)) as deltas:
            last = await anext(deltas)  # an error before the first token is an error, not a broken stream
            yield answer.opening()
            yield answer.chunk(last)
            async for last in deltas:
                yield answer.chunk(last)
        if request.include_usage:
            yield answer.usage_chunk(last)

    async def _begin(self, request: TextRequest) -> tuple[Answer, Job]:
        planned = await self._planner.plan(request, request.retrieval_text, LOCAL_TENANT)
        kind: Literal["chat", "text"] = "chat" if isinstance(request, ChatCompletionRequest) else "text"
        answer = Answer(kind, request.model, planned, request.lora.explain)
        template = planned.plan.template or self._config.template
        job = Job(answer.request_id, request.prompt_for_worker, planned.plan, request.sampling(), template)
        return answer, job

    async def _deltas(self, job: Job) -> AsyncGenerator[Delta]:
        """The Worker's deltas; leaving early cancels the job there."""
        response = self._worker.options(stream=True).stream.remote(job)
        try:
            async for delta in response:
                yield delta
        finally:
            response.cancel()

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(self, body: ChatCompletionRequest) -> Response:
        return await self._respond(body)

    @app.post("/v1/completions", response_model=None)
    async def completions(self, body: CompletionRequest) -> Response:
        return await self._respond(body)

    async def _respond(self, request: TextRequest) -> Response:
        if not request.stream:
            return JSONResponse(await self.generate(request))
        chunks = self.stream(request)
        opening = await anext(chunks)
        return StreamingResponse(events(opening, chunks), media_type="text/event-stream", headers=STREAM_HEADERS)

    @app.post("/v1/route")
    async def route(self, body: RouteQuery) -> JsonObject:
        """The plans for these prompts, candidates included; nothing is generated."""
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        planned = await asyncio.gather(*[self._planner.route(prompt, body.lora, LOCAL_TENANT) for prompt in prompts])
        return {"object": "list", "data": [plan_object(item, explain=True) for item in planned]}

    @app.get("/v1/models")
    async def models(self) -> JsonObject:
        _, records = await self._retriever.records.remote(LOCAL_TENANT)
        return {"object": "list", "data": model_objects(self._config.served_base_name, records)}

    @app.get("/v1/models/{model:path}")
    async def model(self, model: str) -> JsonObject:
        cards = (await self.models())["data"]
        for card in cards:
            if card["id"] == model:
                found: JsonObject = card
                return found
        raise ModelNotFound(model)

    @app.get("/health")
    async def health(self) -> JsonObject:
        """This Ingress answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(self) -> JsonObject:
        """Retriever and Worker answer, and the preload is published. 503 until then."""
        refused = self.preload.refused()
        try:
            async with asyncio.timeout(READY_WAIT_S):
                await self._worker.module_shapes.remote()
                generation, num_adapters = await self._retriever.count.remote()
        except TimeoutError as exc:
            raise NotReady(f"the Retriever or the Worker did not answer within {READY_WAIT_S:.0f} s") from exc
        return {"status": "ready", "generation": generation, "num_adapters": num_adapters, "refused": refused}
