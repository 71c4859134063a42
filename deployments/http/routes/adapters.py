"""`/v1/loras`: what is in the pool, and how it changes. No annotation is text: FastAPI reads them."""

from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.types import Scope

from deployments.api import error_table
from deployments.api.adapters import (
    MAX_TAG_CHARS,
    MAX_TAGS,
    AdapterSource,
    ApproveRequest,
    PublishBatch,
    RollbackRequest,
    VisibilityRequest,
)
from deployments.api.publish_item import MAX_UPLOAD_FILES, PublishItem
from deployments.api.responses import (
    JsonObject,
    batch_object,
    list_object,
    lora_object,
    published_object,
    removed_object,
    settled_object,
    status_of,
    versions_object,
)
from deployments.auth.caller import Caller
from deployments.calls.retries import retry_on_replica_death
from deployments.config.app import FORM_OVERHEAD_BYTES
from deployments.errors import RequestInvalid, VersionChanged
from deployments.http.api import (
    APPROVE_ANSWERS,
    LORA_ANSWERS,
    LORAS_ANSWERS,
    PUBLISH_ANSWERS,
    ROLLBACK_ANSWERS,
    VISIBILITY_ANSWERS,
    WITHDRAW_ANSWERS,
)
from deployments.http.dependencies import Pool, open_pool, own_key, read_pool
from deployments.http.error_responses import AnsweringRoute
from deployments.http.middleware.bearer_auth import Administering, AnyCaller, Publishing
from deployments.http.middleware.body_limit import DEFAULT_MAX_BODY_BYTES
from deployments.http.streaming import path_of
from deployments.http.upload_form import read_upload
from lora_store import VISIBILITIES
from retriever_svc import Page, PageRequest

router = APIRouter(route_class=AnsweringRoute)
AnyPool = Annotated[Pool, Depends(read_pool)]
OpenPool = Annotated[Pool, Depends(open_pool)]
MAX_PAGE = 1000
_LORAS = "/v1/loras"

_FORM = {
    "type": "object",
    "required": ["files", "name"],
    "properties": {
        "files": {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": MAX_UPLOAD_FILES},
        "name": {"type": "string", "maxLength": 64},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": MAX_TAG_CHARS}, "maxItems": MAX_TAGS},
        "template": {"type": "string", "enum": ["alpaca", "chat"]},
        "visibility": {"type": "string", "enum": list(VISIBILITIES)},
    },
}
_ONE, _MANY = AdapterSource.model_json_schema(), PublishBatch.model_json_schema()
_MANY["properties"]["adapters"]["items"] = _ONE  # in place of a reference, which would lead out of the document
_JSON = {"anyOf": [_ONE, {name: value for name, value in _MANY.items() if name != "$defs"}]}
_BODY = {"multipart/form-data": {"schema": _FORM}, "application/json": {"schema": _JSON}}


@router.get(_LORAS, response_model=None, responses=LORAS_ANSWERS)
async def loras(
    pool: AnyPool,
    caller: AnyCaller,
    search: Annotated[str, Query(max_length=256)] = "",
    after: Annotated[str, Query(max_length=256, description="the last id of the page before")] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    min_generation: Annotated[int, Query(ge=0, lt=2**63)] = 0,
) -> JsonObject:
    """A page of what the caller may use in whose name or tags every word of `search` stands, and how many there are."""
    wanted = PageRequest(limit, after, words=search)
    page: Page = await retry_on_replica_death(pool.retriever.page, caller.tenant, wanted, min_generation)
    data = [lora_object(record, caller.tenant) for _, record in page.rows]
    counted = {"generation": page.generation, "total": page.num_found}
    return counted | list_object(data, has_more=page.has_more)


@router.post(
    _LORAS,
    status_code=201,
    responses=PUBLISH_ANSWERS,
    openapi_extra={"requestBody": {"required": True, "content": _BODY}},
)
async def publish(caller: Publishing, pool: OpenPool, http: Request) -> JSONResponse:
    """Publish uploaded files, a server folder, a source URI, or a batch of the latter two in one commit.

    201 when every Retriever replica routes to it, 202 when one is still behind, 207 when a part of a batch failed.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _publish_files(pool, caller, http)
    if kind != "application/json":
        raise RequestInvalid(f"content-type must be application/json or multipart/form-data, got {kind[:100]!r}")
    body = _parse(await http.json())
    if isinstance(body, AdapterSource):
        return await _publish_one(pool, caller, http, body.upload())
    uploads = [pool.upload_of(adapter.upload(), caller, http) for adapter in body.adapters]
    outcomes = await pool.publisher.publish(uploads, caller.key_id, caller.limits.tenant_quota, pool.charge_to(caller))
    answer = batch_object(outcomes)
    failed = any(isinstance(outcome, Exception) for outcome in outcomes)
    return JSONResponse(answer, 207 if failed else max(item["status"] for item in answer["data"]))


@router.get("/v1/loras/{name:path}", response_model=None, responses=LORA_ANSWERS)
async def show(name: str, pool: AnyPool, caller: AnyCaller) -> JsonObject:
    """One adapter, and the versions of it that are kept, the live one first."""
    generation, versions = await retry_on_replica_death(pool.retriever.record, caller.tenant, name)
    return lora_object(versions[0], caller.tenant) | {
        "versions": versions_object(versions),
        "catalogue_generation": generation,
    }


@router.delete("/v1/loras/{name:path}", responses=WITHDRAW_ANSWERS)
async def withdraw(name: str, caller: Publishing, pool: OpenPool) -> JSONResponse:
    """Take the adapter and all its versions out of the pool; running requests end as they began."""
    tenant, bare = own_key(name, caller)
    removed = await pool.publisher.withdraw(tenant, [bare], caller.key_id)
    return JSONResponse(removed_object(removed), 202 if removed.behind else 200)


@router.post("/v1/loras/{name:path}/rollback", status_code=201, responses=ROLLBACK_ANSWERS)
async def rollback(name: str, body: RollbackRequest, caller: Publishing, pool: OpenPool) -> JSONResponse:
    """Publish a kept version again: the one before the live one, or the one the digest names."""
    charge = pool.charge_to(caller)
    published = await pool.publisher.rollback(own_key(name, caller), body.digest, caller.key_id, charge)
    return JSONResponse(published_object(published), status_of(published))


@router.patch("/v1/loras/{name:path}", response_model=None, responses=VISIBILITY_ANSWERS)
async def set_visibility(name: str, body: VisibilityRequest, caller: Publishing, pool: OpenPool) -> JSONResponse:
    """Make an adapter public, which claims its bare name (409 where another tenant has it), or private."""
    key = own_key(name, caller)
    settled = await pool.publisher.set_visibility(key, body.visibility, caller.key_id)
    answer = {"name": key[1], "visibility": body.visibility} | settled_object(settled)
    return JSONResponse(answer, 202 if settled.behind else 200)


@router.post("/v1/loras/{name:path}/approve", response_model=None, responses=APPROVE_ANSWERS)
async def approve(name: str, body: ApproveRequest, caller: Administering, pool: OpenPool) -> JSONResponse:
    """Let `auto` choose this version of a public adapter for every tenant. 409 where another version is live by now."""
    if "@" in name:
        raise RequestInvalid("name: the live version is approved; `digest` says which one that must be", "name")
    _, versions = await retry_on_replica_death(pool.retriever.record, caller.tenant, name)
    record = versions[0]
    if record.ref.digest != body.digest:
        raise VersionChanged(name, body.digest, record.ref.digest)
    if record.visibility != "public":
        raise RequestInvalid("name: only a public adapter is approved", "name")
    pool.require_approver(record.ref, caller)
    settled = await pool.publisher.approve([record.ref], caller.key_id)
    answer = {"name": record.ref.name, "digest": record.ref.digest, "approved": True} | settled_object(settled)
    return JSONResponse(answer, 202 if settled.behind else 200)


def max_body_bytes(scope: Scope) -> int:
    """Uploads may be as large as the configuration says, every other body is small."""
    kind = dict(scope["headers"]).get(b"content-type", b"")
    is_form = kind.lower().startswith(b"multipart/form-data")
    if is_form and scope["method"] == "POST" and path_of(scope) == _LORAS:
        return read_pool().config.max_upload_bytes + FORM_OVERHEAD_BYTES
    return DEFAULT_MAX_BODY_BYTES


async def _publish_files(pool: Pool, caller: Caller, http: Request) -> JSONResponse:
    """What was uploaded counts against the budget until it is published, also where the client has left by then."""
    with ExitStack() as stack:
        counted = stack.enter_context(pool.uploads.reading(http, caller.tenant))
        upload = await read_upload(counted)
        held = stack.pop_all()

    async def publish_held() -> JSONResponse:
        with held:
            return await _publish_one(pool, caller, http, upload)

    return await pool.background.run(publish_held())


async def _publish_one(pool: Pool, caller: Caller, http: Request, upload: PublishItem) -> JSONResponse:
    uploads = [pool.upload_of(upload, caller, http)]
    [outcome] = await pool.publisher.publish(uploads, caller.key_id, caller.limits.tenant_quota, pool.charge_to(caller))
    if isinstance(outcome, Exception):
        raise outcome
    return JSONResponse(published_object(outcome), status_of(outcome))


def _parse(data: Any) -> AdapterSource | PublishBatch:
    """Raises: RequestInvalid."""
    try:
        if isinstance(data, dict) and "adapters" in data:
            return PublishBatch.model_validate(data)
        return AdapterSource.model_validate(data)
    except ValidationError as exc:
        raise error_table.validation_error(exc) from exc
