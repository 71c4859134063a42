"""vLLM's own calls, for its clients: load and unload adapters, tokenize and detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from deployments.api.adapters import LoadAdapterRequest, UnloadAdapterRequest
from deployments.api.tokens import DetokenizeAnswer, DetokenizeRequest, TokenizeRequest, tokenize_answer
from deployments.auth.authenticator import Caller
from deployments.errors import AdapterExists
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import (
    MAY_CHANGE,
    AnyContext,
    AnyServices,
    InferCaller,
    PublishCaller,
    Services,
    make_item,
    own_key,
)
from deployments.http.openapi import DETOKENIZE_ANSWERS, LOAD_ANSWERS, TOKENIZE_ANSWERS, UNLOAD_ANSWERS
from deployments.http.routes.adapters import publish_items
from lora_store import AdapterNotFound

router = APIRouter(route_class=AnsweringRoute, default_response_class=PlainTextResponse)


@router.post("/v1/load_lora_adapter", responses=LOAD_ANSWERS, dependencies=[MAY_CHANGE])
async def load_lora_adapter(
    body: LoadAdapterRequest, caller: PublishCaller, services: AnyServices, http: Request
) -> PlainTextResponse:
    """Publish a server folder or a source URI. 400 if the name is taken, unless `load_inplace` is set."""
    item = make_item(services, body.upload(), caller, http)
    if not body.load_inplace and await _is_live(services, caller, body.lora_name):
        raise AdapterExists(body.lora_name)
    [outcome] = await publish_items(services, caller, [item])
    if isinstance(outcome, Exception):
        raise outcome
    text = f"Success: LoRA adapter '{body.lora_name}' added successfully"
    return PlainTextResponse(text, 202 if outcome.behind else 200)


@router.post("/v1/unload_lora_adapter", responses=UNLOAD_ANSWERS, dependencies=[MAY_CHANGE])
async def unload_lora_adapter(
    body: UnloadAdapterRequest, caller: PublishCaller, services: AnyServices
) -> PlainTextResponse:
    """Withdraw the adapter. 404 if there is none."""
    async with own_key(body.lora_name, caller, services) as (tenant, name):
        removed = await services.publisher.withdraw(tenant, [name], caller.key_id)
    text = f"Success: LoRA adapter '{body.lora_name}' removed successfully"
    return PlainTextResponse(text, 202 if removed.behind else 200)


@router.post("/tokenize", response_class=JSONResponse, response_model=None, responses=TOKENIZE_ANSWERS)
async def tokenize(body: TokenizeRequest, caller: InferCaller, services: AnyServices, context: AnyContext) -> Response:
    """Return the token ids of a text, or of a conversation as a chat with this model would render it."""
    found = await services.completions.tokenize(body, caller, context)
    return JSONResponse(tokenize_answer(body, found))


@router.post("/detokenize", response_class=JSONResponse, response_model=None, responses=DETOKENIZE_ANSWERS)
async def detokenize(
    body: DetokenizeRequest, caller: InferCaller, services: AnyServices, context: AnyContext
) -> Response:
    """Return the text of token ids."""
    answer: DetokenizeAnswer = {"prompt": await services.completions.detokenize(body, caller, context)}
    return JSONResponse(answer)


async def _is_live(services: Services, caller: Caller, name: str) -> bool:
    """Return whether the caller's own tenant has the name. Another tenant's public adapter does not block it."""
    try:
        await services.retriever.record(caller.tenant, f"{caller.tenant}/{name}")
    except AdapterNotFound:
        return False
    return True
