"""`/v1/pool`: work on the pool as a whole. No annotation is text: FastAPI reads them."""

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from deployments.api.adapters import GcRequest, JobRequest, ReindexRequest
from deployments.api.responses import JsonObject
from deployments.http.api import GC_ANSWERS, LINES_ANSWERS
from deployments.http.error_responses import AnsweringRoute
from deployments.http.middleware.bearer_auth import Administering
from deployments.http.routes.adapters import OpenPool
from deployments.http.streaming import json_lines
from deployments.publishing import maintenance

router = APIRouter(route_class=AnsweringRoute)


@router.post("/v1/pool/verify", response_class=StreamingResponse, responses=LINES_ANSWERS)
async def verify(_: JobRequest, caller: Administering, pool: OpenPool) -> StreamingResponse:
    """Read every blob of the caller's own and of public adapters again, and compare it with its digest."""
    return await _stream(maintenance.verify(pool.publisher, pool.store, caller.tenant))


@router.post("/v1/pool/doctor", response_class=StreamingResponse, responses=LINES_ANSWERS)
async def doctor(_: JobRequest, caller: Administering, pool: OpenPool) -> StreamingResponse:
    """How the adapters the caller's tenant finds are found by their own samples: collisions, shadows, never chosen."""
    return await _stream(maintenance.doctor(pool.retriever, caller.tenant))


@router.post("/v1/pool/reindex", response_class=StreamingResponse, responses=LINES_ANSWERS)
async def reindex(body: ReindexRequest, caller: Administering, pool: OpenPool, http: Request) -> StreamingResponse:
    """Embed the pool by another encoder beside the old index, then search by it from one generation on."""
    pool.require_encoder(body.encoder, http)
    lines = maintenance.reindex(pool.publisher, pool.store, pool.retriever, body.encoder, actor=caller.key_id)
    return await _stream(lines)


@router.post("/v1/pool/gc", response_model=None, responses=GC_ANSWERS)
async def gc(body: GcRequest, _: Administering, pool: OpenPool) -> JsonObject:
    """Remove what nothing refers to and was written longer ago than the retention."""
    await pool.publisher.reach_store()
    collected = await pool.store.gc.remote(body.retention_s)
    return {"num_blobs": collected.num_blobs, "num_bytes": collected.num_bytes}


async def _stream(lines: AsyncGenerator[JsonObject]) -> StreamingResponse:
    """The lines as they come. An error before the first one is an error, and not a stream."""
    opening = await anext(lines)
    return StreamingResponse(json_lines(opening, lines), media_type="application/x-ndjson")
