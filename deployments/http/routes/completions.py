"""`/v1/chat/completions`, `/v1/completions`, and `/v1/route`, which shows the plans alone."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, StreamingResponse

from deployments.api.completions import ChatCompletionRequest, CompletionRequest, RouteQuery, TextRequest
from deployments.api.responses import RouteAnswer, plan_object
from deployments.api.tolerance import ignored_header
from deployments.auth.authenticator import Caller, Work
from deployments.calls.serve_calls import deadline_of, within
from deployments.generation.planner import check_texts, refuse_stream_options, text_read
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import AnyContext, AnyServices, InferCaller, Services
from deployments.http.openapi import CHAT_ANSWERS, ROUTE_ANSWERS, TEXT_ANSWERS
from deployments.http.streaming import events
from deployments.observability.request_metrics import RequestContext
from retriever_svc.encoder import tokens_read

router = APIRouter(route_class=AnsweringRoute)
_STREAM_HEADERS = {"X-Accel-Buffering": "no"}  # nginx would buffer events


@router.post("/v1/chat/completions", response_model=None, responses=CHAT_ANSWERS)
async def chat_completions(
    body: ChatCompletionRequest, caller: InferCaller, services: AnyServices, context: AnyContext
) -> Response:
    """Answer a conversation with the adapters that fit it; as server-sent events if `stream` is set."""
    return await _respond(body, caller, services, context)


@router.post("/v1/completions", response_model=None, responses=TEXT_ANSWERS)
async def completions(
    body: CompletionRequest, caller: InferCaller, services: AnyServices, context: AnyContext
) -> Response:
    """Continue prompts as they are, each with the adapters that fit it."""
    return await _respond(body, caller, services, context)


@router.post("/v1/route", response_model=None, responses=ROUTE_ANSWERS)
async def route(body: RouteQuery, caller: InferCaller, services: AnyServices, context: AnyContext) -> RouteAnswer:
    """Return the plans for these prompts, with candidates, without generating. Each can be sent as `lora.plan`."""
    config = services.config
    check_texts(body.prompt, config)
    texts = [text for prompt in body.prompt if (text := text_read(prompt, body.lora)) is not None]
    with services.authenticator.running(caller, Work(len(body.prompt), num_read=sum(map(tokens_read, texts)))):
        async with within(deadline_of(context.arrived_at, None, config.max_request_s)):
            planned = await services.planner.route_all(body.prompt, body.lora, caller.tenant)
    return {"object": "list", "data": [plan_object(item, caller.tenant, explain=True) for item in planned]}


async def _respond(request: TextRequest, caller: Caller, services: Services, context: RequestContext) -> Response:
    if not request.stream:
        refuse_stream_options(request)
    started = await services.completions.start(request, caller, context)
    headers = started.answer.headers() | ignored_header(context.ignored)
    if not request.stream:
        return JSONResponse(await services.completions.collect(started), headers=headers)
    chunks = services.completions.stream(started, include_usage=request.include_usage)
    opening = await anext(chunks)  # an error before the first token becomes a status
    body = events(opening, chunks, context, keep_alive_s=services.keep_alive_s)
    return StreamingResponse(body, media_type="text/event-stream", headers=_STREAM_HEADERS | headers)
