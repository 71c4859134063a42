"""`/v1/pool`: verify, examine, reindex and clean up the whole pool."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from deployments.api.adapters import DoctorRequest, GcRequest, JobRequest, ReindexRequest
from deployments.api.pool_responses import CollectedBlobs
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import MAY_CHANGE, AdminCaller, AnyContext, AnyServices, require_encoder
from deployments.http.error_responses import error_body
from deployments.http.openapi import DOCTOR_ANSWERS, EXPORT_ANSWERS, FILE_ANSWERS, GC_ANSWERS, LINES_ANSWERS
from deployments.json_types import JsonObject
from deployments.observability.request_context import RequestContext
from deployments.publishing import maintenance
from lora_store.pool_files import PART_BYTES
from retriever_svc.views import tokens_routed

_PARQUET, _BYTES = "application/vnd.apache.parquet", "application/octet-stream"
router = APIRouter(route_class=AnsweringRoute, dependencies=[MAY_CHANGE])


@router.post("/v1/pool/verify", response_class=StreamingResponse, responses=LINES_ANSWERS)
async def verify(_: JobRequest, caller: AdminCaller, services: AnyServices, context: AnyContext) -> StreamingResponse:
    """Read every blob of the caller's own and of public adapters again, and compare it with its digest."""
    return await _stream(maintenance.verify(services.store, caller.tenant), context)


@router.post("/v1/pool/doctor", response_class=StreamingResponse, responses=DOCTOR_ANSWERS)
async def doctor(
    body: DoctorRequest, caller: AdminCaller, services: AnyServices, context: AnyContext
) -> StreamingResponse:
    """Route the samples of the tenant's adapters: report collisions, shadowed and never chosen adapters, and advise.

    Of `prompts` report which adapters answer them. They are charged to the key like those of `/v1/route`.
    """
    prompts = [prompt.asked() for prompt in body.prompts]
    if prompts:
        services.authenticator.charge(caller, sum(tokens_routed(prompt.text) for prompt in prompts), "prompts")
    return await _stream(maintenance.doctor(services.store, services.retriever, caller.tenant, prompts), context)


@router.post("/v1/pool/evaluate", response_class=StreamingResponse, responses=LINES_ANSWERS)
async def evaluate(_: JobRequest, caller: AdminCaller, services: AnyServices, context: AnyContext) -> StreamingResponse:
    """Measure which adapters answer the tenant's sample outputs best, and prefer those in its requests."""
    return await _stream(services.evaluator.evaluate(caller.tenant, caller.key_id), context)


@router.post("/v1/pool/reindex", response_class=StreamingResponse, responses=LINES_ANSWERS)
async def reindex(
    body: ReindexRequest, caller: AdminCaller, services: AnyServices, context: AnyContext, http: Request
) -> StreamingResponse:
    """Embed the pool with another encoder while the old index serves, then switch to it at one generation."""
    require_encoder(services, body.encoder, http)
    parts = services.publisher, services.store, services.retriever, services.learning
    job = maintenance.reindex(*parts, body.encoder, caller.key_id, body.projection)
    return await _stream(job, context)


@router.post("/v1/pool/gc", response_model=None, responses=GC_ANSWERS)
async def gc(body: GcRequest, _: AdminCaller, services: AnyServices) -> CollectedBlobs:
    """Remove blobs and projections that nothing refers to and that are older than the retention."""
    await services.store.ping()
    collected = await services.store.gc(body.retention_s)
    return {
        "num_blobs": collected.num_blobs,
        "num_bytes": collected.num_bytes,
        "num_projections": collected.num_projections,
    }


@router.get("/v1/pool/export", response_class=Response, responses=EXPORT_ANSWERS)
async def export(caller: AdminCaller, services: AnyServices) -> Response:
    """Return what the catalogue says of the caller's adapters, as one Parquet file. Without keys: of all adapters."""
    state = await services.store.pool_state(caller.tenant if services.config.has_keys else None)
    return Response(state, media_type=_PARQUET)


@router.get("/v1/pool/files/{name:path}", response_class=StreamingResponse, responses=FILE_ANSWERS)
async def file(name: str, caller: AdminCaller, services: AnyServices) -> StreamingResponse:
    """Stream a file that an export needs, such as the weights of a kept version."""
    tenant = caller.tenant if services.config.has_keys else None
    opening = await services.store.pool_part(tenant, name, 0)

    async def parts() -> AsyncGenerator[bytes]:
        part, number = opening, 0
        while part:
            yield part
            number += 1
            part = await services.store.pool_part(tenant, name, number) if len(part) == PART_BYTES else b""

    return StreamingResponse(parts(), media_type=_BYTES)


async def _stream(lines: AsyncGenerator[JsonObject], context: RequestContext) -> StreamingResponse:
    """Stream the lines as they arrive. An error before the first line becomes a status."""
    opening = await anext(lines)
    return StreamingResponse(json_lines(opening, lines, context), media_type="application/x-ndjson")


async def json_lines(
    opening: JsonObject, lines: AsyncGenerator[JsonObject], context: RequestContext
) -> AsyncGenerator[str]:
    """Yield `opening` and the lines as one JSON object each. An error becomes the last line. Leaving closes `lines`."""
    try:
        async with aclosing(lines):
            yield f"{json.dumps(opening)}\n"
            async for line in lines:
                yield f"{json.dumps(line)}\n"
    except Exception as exc:
        yield f"{json.dumps(error_body(exc, context))}\n"
