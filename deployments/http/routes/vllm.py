"""vLLM's two calls that load and unload adapters, for its clients."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from deployments.api.adapters import LoadAdapterRequest, UnloadAdapterRequest
from deployments.auth.authenticator import Caller
from deployments.errors import AdapterExists
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import MAY_CHANGE, AnyServices, PublishCaller, Services, item_of, own_key
from deployments.http.openapi import LOAD_ANSWERS, UNLOAD_ANSWERS
from deployments.http.routes.adapters import publish_items
from lora_store import AdapterNotFound

router = APIRouter(route_class=AnsweringRoute, default_response_class=PlainTextResponse)


@router.post("/v1/load_lora_adapter", responses=LOAD_ANSWERS, dependencies=[MAY_CHANGE])
async def load_lora_adapter(
    body: LoadAdapterRequest, caller: PublishCaller, services: AnyServices, http: Request
) -> PlainTextResponse:
    """Publish a server folder or a source URI. 400 if the name is taken, unless `load_inplace` is set."""
    item = item_of(services, body.upload(), caller, http)
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
    tenant, name = own_key(body.lora_name, caller)
    removed = await services.publisher.withdraw(tenant, [name], caller.key_id)
    text = f"Success: LoRA adapter '{body.lora_name}' removed successfully"
    return PlainTextResponse(text, 202 if removed.behind else 200)


async def _is_live(services: Services, caller: Caller, name: str) -> bool:
    """Return whether the caller's own tenant has the name. Another tenant's public adapter does not block it."""
    try:
        await services.retriever.record(caller.tenant, f"{caller.tenant}/{name}")
    except AdapterNotFound:
        return False
    return True
