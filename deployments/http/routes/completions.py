"""The routes that answer prompts, `/v1/route`, which only shows the plans, and `/v1/outcomes`, which judges them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from deployments.api.adapters import OutcomeRequest
from deployments.api.anthropic_answer import CountedTokens, MessageForm
from deployments.api.anthropic_request import CountTokensRequest, MessagesRequest
from deployments.api.completion_responses import plan_object
from deployments.api.completions import (
    MAX_ROWS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Question,
    RouteQuery,
)
from deployments.api.contract import UNSET, applied_contract
from deployments.api.names import AppliedPolicy
from deployments.api.pool_responses import Outcome
from deployments.api.responses import RouteAnswer
from deployments.api.responses_answer import ResponseForm
from deployments.api.responses_request import ResponsesRequest
from deployments.auth.authenticator import Caller, Work
from deployments.errors import ResponseNotStored
from deployments.generation.completions import StartedCompletion
from deployments.generation.planner import check_chars, refuse_stream_options
from deployments.generation.row_stream import compute_deadline, within
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import KEEP_ALIVE_S, AnyContext, AnyServices, InferCaller, Services
from deployments.http.error_responses import error_body
from deployments.http.openapi import (
    CHAT_ANSWERS,
    COUNT_ANSWERS,
    MESSAGES_ANSWERS,
    OUTCOME_ANSWERS,
    RESPONSES_ANSWERS,
    ROUTE_ANSWERS,
    TEXT_ANSWERS,
)
from deployments.json_types import JsonObject
from deployments.observability.request_context import RequestContext
from gpu_worker.front.request.prompts import Message

router = APIRouter(route_class=AnsweringRoute)
_STREAM_HEADERS = {"X-Accel-Buffering": "no"}  # nginx would buffer events
_DONE = format_sse_event(data_str="[DONE]")
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode  # as `JSONResponse`
T = TypeVar("T")


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


@router.post("/v1/responses", response_model=None, responses=RESPONSES_ANSWERS)
async def responses(
    body: ResponsesRequest, caller: InferCaller, services: AnyServices, context: AnyContext
) -> Response:
    """Answer as a chat does, in the shape of the Responses API. Nothing is stored: `input` is a whole conversation."""
    if body.previous_response_id is not None:
        raise ResponseNotStored
    form = ResponseForm(body, context.request_id)
    return await _respond(body, caller, services, context, form)


@router.post("/v1/messages", response_model=None, responses=MESSAGES_ANSWERS)
async def messages(body: MessagesRequest, caller: InferCaller, services: AnyServices, context: AnyContext) -> Response:
    """Answer as a chat does, in the shape of Anthropic's Messages API."""
    form = MessageForm(body.model, context.request_id, body.stop_sequences or body.stop)
    return await _respond(body, caller, services, context, form)


@router.post("/v1/messages/count_tokens", response_model=None, responses=COUNT_ANSWERS)
async def count_tokens(
    body: CountTokensRequest, caller: InferCaller, services: AnyServices, context: AnyContext
) -> CountedTokens:
    """Return how many tokens the prompt of such a message has, with its tools."""
    return {"input_tokens": await services.completions.count_tokens(body, caller, context)}


@router.post("/v1/route", response_model=None, responses=ROUTE_ANSWERS)
async def route(body: RouteQuery, caller: InferCaller, services: AnyServices, context: AnyContext) -> RouteAnswer:
    """Return the plans for these prompts, with candidates, without generating. Each can be sent as `lora.plan`."""
    context.model = body.model
    planner, tenant = services.planner, caller.tenant
    check_chars(max(map(len, body.prompt)), services.config.served_models.limiting(body.model))
    asked = [Question(prompt, prompt, body.model, body.lora) for prompt in body.prompt]
    async with within(compute_deadline(context.arrived_at, None, services.config.max_request_s)):
        named = await planner.find_policy(body.model, tenant, body.lora.min_generation)
        bound = [] if named is None else [AppliedPolicy.of(named, question, tenant) for question in asked]
        asked = (
            [name.apply_to_question(question) for name, question in zip(bound, asked, strict=True)] if bound else asked
        )
        work = Work(len(asked), num_read=sum(map(planner.tokens_to_route, asked)))
        with services.authenticator.running(caller, work) as usage:
            planned = await planner.plan_all(asked, tenant, usage=usage)
    planned = [name.explain([item])[0] for name, item in zip(bound, planned, strict=True)] if bound else planned
    needed = {
        name.shown: name.policy for name, item in zip(bound, planned, strict=False) if item.plan.contract is not None
    }
    own = {shown: (policy.sampling(), policy.model_fields_set) for shown, policy in needed.items()}
    chats = [
        replace(question, prompt=(Message("user", prompt),))
        for prompt, question in zip(body.prompt, asked, strict=True)
    ]
    shown = [
        replace(item, contract=applied_contract(item.plan, chat, *own.get(item.policy or "", (UNSET, set()))))
        for chat, item in zip(chats, planned, strict=True)
    ]
    return {"object": "list", "data": [plan_object(item, caller.tenant, explain=True) for item in shown]}


@router.post("/v1/outcomes", status_code=201, response_model=None, responses=OUTCOME_ANSWERS)
async def record_outcome(body: OutcomeRequest, caller: InferCaller, services: AnyServices) -> Outcome:
    """Record how well an adapter, or the base model, answered a request to `auto` of the caller's tenant."""
    await services.learning.judge(caller.tenant, (body.request_id, body.adapter, body.score), caller.key_id)
    applies = services.config.learning == "apply"
    return {"request_id": body.request_id, "adapter": body.adapter, "score": body.score, "applies": applies}


async def _respond(
    request: GenerationRequest,
    caller: Caller,
    services: Services,
    context: RequestContext,
    form: ResponseForm | MessageForm | None = None,
) -> Response:
    """Return the answer or its stream; in the shape of chats and completions without `form`."""
    headers: dict[str, str] = {}

    async def start() -> StartedCompletion:
        started = await services.completions.start(request, caller, context)
        headers.update(started.answer.headers())
        if form is not None:
            form.use(started.request, started.sampling_defaults)
        return started

    if not request.stream:
        refuse_stream_options(request)
        started = await start()
        answer = await services.completions.collect(started)
        whole = answer if form is None else form.whole(answer)
        if not started.answer.has_logprobs:
            return JSONResponse(whole, headers=headers)
        body = await asyncio.to_thread(_encode_in_parts, whole, _encode)
        return Response(body, media_type="application/json", headers=headers)

    async def chunks() -> AsyncGenerator[JsonObject]:
        found = services.completions.stream(await start())
        async with aclosing(found if form is None else form.events(found)) as shaped:
            async for chunk in shaped:
                yield chunk

    found = events(chunks(), context, form=form, keep_alive_s=services.keep_alive_s)
    first = await anext(found)  # an error before it becomes a status; a comment may come before the plan
    headers.update(_STREAM_HEADERS)
    return StreamingResponse(_continue(first, found), media_type="text/event-stream", headers=headers)


async def events(
    chunks: AsyncGenerator[JsonObject],
    context: RequestContext,
    *,
    form: ResponseForm | MessageForm | None = None,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> AsyncGenerator[bytes]:
    """Yield the chunks as server-sent events. Leaving closes `chunks`.

    While a chunk is awaited, each `keep_alive_s` yields a comment. An error before the first event or comment is
    raised; a later one becomes the last event.
    """
    has_begun = False
    try:
        async with aclosing(chunks):
            while True:
                coming = asyncio.create_task(_next(chunks))
                try:
                    while not (await asyncio.wait((coming,), timeout=keep_alive_s))[0]:
                        has_begun = True
                        yield KEEPALIVE_COMMENT
                finally:
                    await _end(coming)
                chunk = coming.result()
                if chunk is None:
                    break
                has_begun = True
                yield await _event(chunk)
    except Exception as exc:
        if not has_begun:
            raise
        body = error_body(exc, context)
        for event in [body] if form is None else form.failed(body["error"]):
            yield await _event(event)
        return
    if form is None:  # the others end with the event that says so
        yield _DONE


def _encode_in_parts(value: object, encode: Callable[[object], str]) -> str:
    """Return the JSON of a large answer. The encoder is called for small parts, as all threads wait during a call."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{encode(name)}:{_encode_in_parts(item, encode)}' for name, item in value.items())}}}"
    if not isinstance(value, list):
        return encode(value)
    if len(value) <= MAX_ROWS:
        return f"[{','.join(_encode_in_parts(item, encode) for item in value)}]"
    parts = (value[place : place + MAX_ROWS] for place in range(0, len(value), MAX_ROWS))
    return f"[{','.join(encode(part)[1:-1] for part in parts)}]"


async def _next(chunks: AsyncGenerator[JsonObject]) -> JsonObject | None:
    """Return the next chunk, None after the last one."""
    return await anext(chunks, None)


async def _end(task: asyncio.Task[T]) -> None:
    """Cancel the task unless it is done, and wait until it is, however often the caller is cancelled meanwhile.

    What the task reads can be closed only then.
    """
    cancelled: asyncio.CancelledError | None = None
    task.cancel()
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled


async def _continue(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


async def _event(chunk: JsonObject) -> bytes:
    """Return a server-sent event. Typed events have their type as its name. A large one is encoded in a thread."""
    if _is_large(chunk):
        return await asyncio.to_thread(_large_event, chunk)
    return format_sse_event(data_str=json.dumps(chunk), event=chunk.get("type"))


def _is_large(value: object) -> bool:
    """Return whether a list in this value, such as that of a text's log probabilities, is a long one.

    An object with `bytes` is one token, whose lists are short.
    """
    if isinstance(value, list):
        return len(value) > MAX_ROWS or any(map(_is_large, value))
    return isinstance(value, dict) and "bytes" not in value and any(map(_is_large, value.values()))


def _large_event(chunk: JsonObject) -> bytes:
    """Return a large event. JSON has no line breaks, and `format_sse_event` would stop all threads to look for them."""
    name = f"event: {chunk['type']}\n" if "type" in chunk else ""
    return f"{name}data: {_encode_in_parts(chunk, json.dumps)}\n\n".encode()
