"""vLLM's two calls for adapters, as its clients make them. No annotation is text: FastAPI reads them."""

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from deployments.api.adapters import LoadAdapterRequest, UnloadAdapterRequest
from deployments.auth.caller import Caller
from deployments.calls.retries import retry_on_replica_death
from deployments.errors import AdapterExists
from deployments.http.api import LOAD_ANSWERS, UNLOAD_ANSWERS
from deployments.http.dependencies import Pool, own_key
from deployments.http.error_responses import AnsweringRoute
from deployments.http.middleware.bearer_auth import Publishing
from deployments.http.routes.adapters import OpenPool
from lora_store import AdapterNotFound

router = APIRouter(route_class=AnsweringRoute, default_response_class=PlainTextResponse)


@router.post("/v1/load_lora_adapter", responses=LOAD_ANSWERS)
async def load_lora_adapter(
    body: LoadAdapterRequest, caller: Publishing, pool: OpenPool, http: Request
) -> PlainTextResponse:
    """Publish a server folder or a source URI; 400 when the name is taken, unless `load_inplace` is set."""
    upload = pool.upload_of(body.upload(), caller, http)
    if not body.load_inplace and await _is_live(pool, caller, body.lora_name):
        raise AdapterExists(body.lora_name)
    [outcome] = await pool.publisher.publish(
        [upload], caller.key_id, caller.limits.tenant_quota, pool.charge_to(caller)
    )
    if isinstance(outcome, Exception):
        raise outcome
    text = f"Success: LoRA adapter '{body.lora_name}' added successfully"
    return PlainTextResponse(text, 202 if outcome.behind else 200)


@router.post("/v1/unload_lora_adapter", responses=UNLOAD_ANSWERS)
async def unload_lora_adapter(body: UnloadAdapterRequest, caller: Publishing, pool: OpenPool) -> PlainTextResponse:
    """Withdraw the adapter; 404 when there is none."""
    tenant, name = own_key(body.lora_name, caller)
    removed = await pool.publisher.withdraw(tenant, [name], caller.key_id)
    text = f"Success: LoRA adapter '{body.lora_name}' removed successfully"
    return PlainTextResponse(text, 202 if removed.behind else 200)


async def _is_live(pool: Pool, caller: Caller, name: str) -> bool:
    """Whether the caller's own tenant has one of that name: another's public one is not in its way."""
    try:
        await retry_on_replica_death(pool.retriever.record, caller.tenant, f"{caller.tenant}/{name}")
    except AdapterNotFound:
        return False
    return True
