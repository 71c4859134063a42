"""`/v1/pool/map`: the pool as a picture, and a prompt's place in it. No annotation is text: FastAPI reads them."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from deployments.api.base import MAX_TEXT_CHARS, ApiRequest
from deployments.api.requested_work import Work
from deployments.api.responses import JsonObject
from deployments.calls.deadlines import deadline_of, within
from deployments.calls.retries import retry_on_replica_death
from deployments.generation.request_limits import check_texts, encoder_tokens
from deployments.http.api import MAP_ANSWERS, PLACE_ANSWERS
from deployments.http.dependencies import Pool, read_pool
from deployments.http.error_responses import AnsweringRoute
from deployments.http.middleware.bearer_auth import AnyCaller, Asking
from lora_store import MAX_PLAN_ADAPTERS
from retriever_svc import Place, Point, PoolMap
from retriever_svc.encoder import MAX_CHARS

router = APIRouter(route_class=AnsweringRoute)
AnyPool = Annotated[Pool, Depends(read_pool)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class PlaceQuery(ApiRequest):
    """`POST /v1/pool/map`. A body, since addresses end in logs and prompts must not."""

    prompt: str = Field(min_length=1, max_length=MAX_TEXT_CHARS)
    adapters: list[Name] = Field(fail_fast=True, default=[], max_length=MAX_PLAN_ADAPTERS)
    min_generation: int = Field(default=0, ge=0, lt=2**63)


@router.get("/v1/pool/map", response_model=None, responses=MAP_ANSWERS)
async def pool_map(
    pool: AnyPool, caller: AnyCaller, min_generation: Annotated[int, Query(ge=0, lt=2**63)] = 0
) -> JsonObject:
    """The adapters that `auto` may choose, at most 2,000 of them, on the plane in which they differ most."""
    drawn: PoolMap = await retry_on_replica_death(pool.retriever.map, caller.tenant, min_generation)
    return {
        "object": "pool_map",
        "generation": drawn.generation,
        "num_adapters": drawn.num_adapters,
        "shown_variance": drawn.shown_variance,
        "points": [point_object(point, caller.tenant) for point in drawn.points],
    }


@router.post("/v1/pool/map", response_model=None, responses=PLACE_ANSWERS)
async def place(body: PlaceQuery, pool: AnyPool, caller: Asking) -> JsonObject:
    """Where a prompt lies on that map, and where these adapters do: a large map does not show all."""
    check_texts([body.prompt], pool.config)
    with pool.door.running(caller, Work(num_read=encoder_tokens([body.prompt]))):
        async with within(deadline_of(None, pool.config.max_request_s)):
            asked = (caller.tenant, body.prompt[:MAX_CHARS], body.adapters, body.min_generation)
            found: Place = await retry_on_replica_death(pool.retriever.place, *asked)
    return {
        "object": "pool_place",
        "generation": found.generation,
        "prompt": {"x": found.prompt.x, "y": found.prompt.y},
        "adapters": [point_object(point, caller.tenant) for point in found.adapters],
    }


def point_object(point: Point, tenant: str) -> JsonObject:
    """An adapter on the map, under the name `tenant` asks for it by."""
    assert point.ref is not None
    return {"name": point.ref.name_for(tenant), "x": point.x, "y": point.y}
