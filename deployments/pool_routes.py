"""`/v1/loras`: what is in the pool, and how it changes. No annotation is text: FastAPI reads them."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.types import Scope

from deployments import http_errors
from deployments.answers import (
    JsonObject,
    batch_object,
    lora_object,
    published_object,
    removed_object,
    status_of,
    versions_object,
)
from deployments.body_limit import DEFAULT_MAX_BODY_BYTES
from deployments.errors import RequestInvalid
from deployments.pool import Pool, open_pool, own_key, read_pool
from deployments.pool_schemas import AdapterSource, PublishBatch, RollbackRequest
from deployments.upload_form import FORM_OVERHEAD_BYTES, read_upload
from deployments.uploads import FolderUpload
from lora_store import LOCAL_TENANT
from retriever_svc import Page

router = APIRouter(route_class=http_errors.AnsweringRoute)
AnyPool = Annotated[Pool, Depends(read_pool)]
OpenPool = Annotated[Pool, Depends(open_pool)]

_FORM = {
    "type": "object",
    "required": ["files", "name"],
    "properties": {
        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "template": {"type": "string"},
    },
}
_JSON = {"anyOf": [AdapterSource.model_json_schema(), PublishBatch.model_json_schema(ref_template="{model}")]}
_BODY = {"multipart/form-data": {"schema": _FORM}, "application/json": {"schema": _JSON}}


@router.get("/v1/loras")
async def loras(
    pool: AnyPool,
    search: Annotated[str, Query(max_length=256)] = "",
    offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, lt=2**31)] = 2**31 - 1,
    min_generation: Annotated[int, Query(ge=0, lt=2**63)] = 0,
) -> JsonObject:
    """The adapters of the pool in whose name or tags every word of `search` stands; all of them, or a page."""
    page: Page = await pool.retriever.find.remote(LOCAL_TENANT, search, offset, limit, min_generation)
    data = [lora_object(record) for record in page.records]
    return {"object": "list", "generation": page.generation, "total": page.num_found, "data": data}


@router.post("/v1/loras", openapi_extra={"requestBody": {"required": True, "content": _BODY}})
async def publish(pool: OpenPool, http: Request) -> JSONResponse:
    """Publish uploaded files, a server folder, a source URI, or a batch of the latter two in one commit.

    201 when every Retriever replica routes to it, 202 when one is still behind, 207 when a part of a batch failed.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _publish_one(pool, http, await read_upload(http))
    if kind != "application/json":
        raise RequestInvalid(f"content-type must be application/json or multipart/form-data, got {kind[:100]!r}")
    body = _parse(await http.body())
    if isinstance(body, AdapterSource):
        return await _publish_one(pool, http, body.upload())
    uploads = [adapter.upload() for adapter in body.adapters]
    for upload in uploads:
        pool.require_path(upload, http)
    outcomes = await pool.publisher.publish(uploads, actor="http")
    answer = batch_object(outcomes)
    failed = any(isinstance(outcome, Exception) for outcome in outcomes)
    return JSONResponse(answer, 207 if failed else max(item["status"] for item in answer["data"]))


@router.get("/v1/loras/{name:path}")
async def show(name: str, pool: AnyPool) -> JsonObject:
    """One adapter, and the versions of it that are kept, the live one first."""
    tenant, bare = own_key(name)
    generation, versions = await pool.retriever.record.remote(tenant, bare)
    return lora_object(versions[0]) | {"versions": versions_object(versions), "catalogue_generation": generation}


@router.delete("/v1/loras/{name:path}")
async def withdraw(name: str, pool: OpenPool) -> JSONResponse:
    """Take the adapter and all its versions out of the pool; running requests end as they began."""
    tenant, bare = own_key(name)
    removed = await pool.publisher.withdraw(tenant, [bare], actor="http")
    return JSONResponse(removed_object(removed), 202 if removed.behind else 200)


@router.post("/v1/loras/{name:path}/rollback")
async def rollback(name: str, body: RollbackRequest, pool: OpenPool) -> JSONResponse:
    """Publish a kept version again: the one before the live one, or the one the digest names."""
    published = await pool.publisher.rollback(own_key(name), body.digest, actor="http")
    return JSONResponse(published_object(published), status_of(published))


def max_body_bytes(scope: Scope) -> int:
    """Uploads may be as large as the configuration says, every other body is small."""
    kind = dict(scope["headers"]).get(b"content-type", b"")
    if scope["path"].endswith("/v1/loras") and kind.startswith(b"multipart/form-data"):
        return read_pool().config.max_upload_bytes + FORM_OVERHEAD_BYTES
    return DEFAULT_MAX_BODY_BYTES


async def _publish_one(pool: Pool, http: Request, upload: FolderUpload) -> JSONResponse:
    pool.require_path(upload, http)
    [outcome] = await pool.publisher.publish([upload], actor="http")
    if isinstance(outcome, Exception):
        raise outcome
    return JSONResponse(published_object(outcome), status_of(outcome))


def _parse(body: bytes) -> AdapterSource | PublishBatch:
    """Raises: RequestInvalid."""
    try:
        data: Any = from_json(body)
    except ValueError as exc:
        raise RequestInvalid(f"the body is no JSON: {exc}") from exc
    try:
        if isinstance(data, dict) and "adapters" in data:
            return PublishBatch.model_validate(data)
        return AdapterSource.model_validate(data)
    except ValidationError as exc:
        raise http_errors.validation_error(exc) from exc
