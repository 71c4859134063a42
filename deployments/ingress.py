"""The Ingress deployment: the routes, and the same calls as plain methods for handle callers.

`serve.ingress` pickles the routes as the class is made: all they use is imported before it, and no annotation is text.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import http_errors
from deployments.answers import Answer, JsonObject, lora_object, model_objects, plan_object, published_object
from deployments.body_limit import BodyLimit
from deployments.config import AppConfig
from deployments.errors import ModelNotFound, NotReady, PublishingOff
from deployments.http_io import TextRequest, adapter_folders, events, is_loopback, parse
from deployments.planner import Planner
from deployments.publisher import Publisher
from deployments.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    PublishRequest,
    RouteQuery,
)
from deployments.store import FolderUpload
from gpu_worker.request import Completion, Delta, Job
from lora_store import LOCAL_TENANT

logger = logging.getLogger(__name__)

_PRELOAD_BATCH = 32
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

app = FastAPI(title="LoraRetriever", docs_url="/docs", redoc_url=None)
http_errors.install(app)
app.add_middleware(BodyLimit)


@serve.ingress(app)
class Ingress:
    """Holds no catalogue: plans come from the Retriever, text from a Worker, writes go to the Store."""

    def __init__(
        self, config: AppConfig, retriever: DeploymentHandle, worker: DeploymentHandle, store: DeploymentHandle
    ) -> None:
        self._config = config
        self._retriever, self._worker = retriever, worker
        self._planner = Planner(config, retriever)
        self._publisher = Publisher(store, retriever, worker)
        self._preload = asyncio.get_event_loop().create_task(self._publish_preload())

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

    async def _publish_preload(self) -> dict[str, str]:
        """Publish what the configured folders hold and the catalogue lacks; what was refused, with the reason."""
        refused = {}
        folders = [folder for path in self._config.preload for folder in adapter_folders(path)]
        for start in range(0, len(folders), _PRELOAD_BATCH):
            uploads = [FolderUpload(folder) for folder in folders[start : start + _PRELOAD_BATCH]]
            outcomes = await self._publisher.publish(uploads, actor="preload")
            for upload, outcome in zip(uploads, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    logger.error("%s was not published: %s", upload.path, outcome)
                    _, body = http_errors.describe(outcome)
                    refused[str(upload.path)] = body["error"]["message"]
        return refused

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

    @app.get("/v1/loras")
    async def loras(self) -> JsonObject:
        generation, records = await self._retriever.records.remote(LOCAL_TENANT)
        return {"object": "list", "generation": generation, "data": [lora_object(record) for record in records]}

    @app.post("/v1/loras")
    async def publish(self, body: PublishRequest, http: Request) -> JSONResponse:
        """Publish a folder of the server's own file system: 201 when every Retriever replica routes to it, else 202."""
        if not self._config.publish_paths or not is_loopback(http):
            raise PublishingOff("folders are published from the server's own machine, with publish_paths on")
        upload = FolderUpload(Path(body.path), body.name, tags=tuple(body.tags), template=body.template)
        [outcome] = await self._publisher.publish([upload], actor="http")
        if isinstance(outcome, Exception):
            raise outcome
        return JSONResponse(published_object(outcome), 202 if outcome.behind else 201)

    @app.get("/health")
    async def health(self) -> JsonObject:
        """This Ingress answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(self) -> JsonObject:
        """Retriever and Worker answer, and the preload is published. 503 until then."""
        if not self._preload.done():
            raise NotReady("the server is still starting")
        if self._preload.exception() is not None:
            logger.error("publishing the preload failed and is tried again", exc_info=self._preload.exception())
            self._preload = asyncio.create_task(self._publish_preload())
            raise NotReady("publishing the preload failed and is tried again")
        refused = self._preload.result()
        await self._worker.module_shapes.remote()
        generation, records = await self._retriever.records.remote(LOCAL_TENANT)
        return {"status": "ready", "generation": generation, "num_adapters": len(records), "refused": refused}
