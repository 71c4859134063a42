"""`/v1/pool/map`: the pool as points of a plane, and the position of a prompt among them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import Field

from deployments.api.base import MAX_TEXT_CHARS, ApiRequest
from deployments.api.pool_responses import PromptPlace, place_object
from deployments.auth.authenticator import Work
from deployments.generation.planner import check_chars, reading
from deployments.generation.row_stream import compute_deadline, within
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import AnyCaller, AnyContext, AnyServices, InferCaller
from deployments.http.openapi import MAP_ANSWERS, PLACE_ANSWERS
from lora_store import MAX_PLAN_ADAPTERS
from retriever_svc.encoder import MAX_CHARS, tokens_read

router = APIRouter(route_class=AnsweringRoute)
Name = Annotated[str, Field(min_length=1, max_length=256)]


class PlaceQuery(ApiRequest):
    """`POST /v1/pool/map`. It takes a body because addresses end up in logs, where prompts must not be."""

    prompt: str = Field(min_length=1, max_length=MAX_TEXT_CHARS)
    adapters: list[Name] = Field(fail_fast=True, default=[], max_length=MAX_PLAN_ADAPTERS)
    min_generation: int = Field(default=0, ge=0, lt=2**63)


@router.get("/v1/pool/map", response_model=None, responses=MAP_ANSWERS)
async def pool_map(
    services: AnyServices, caller: AnyCaller, min_generation: Annotated[int, Query(ge=0, lt=2**63)] = 0
) -> Response:
    """Return the adapters that `auto` may choose, at most 10,000, in named clusters. Near ones have similar samples."""
    return Response(await services.retriever.map(caller.tenant, min_generation), media_type="application/json")


@router.post("/v1/pool/map", response_model=None, responses=PLACE_ANSWERS)
async def place(body: PlaceQuery, services: AnyServices, caller: InferCaller, context: AnyContext) -> PromptPlace:
    """Return the position of a prompt on that map, and of these adapters: a large map does not show all."""
    check_chars(len(body.prompt), services.config.served_models.widest)
    work = Work(num_read=tokens_read(body.prompt))
    with services.authenticator.running(caller, work) as usage, reading(usage):
        async with within(compute_deadline(context.arrived_at, None, services.config.max_request_s)):
            asked = (caller.tenant, body.prompt[:MAX_CHARS], body.adapters, body.min_generation)
            found = await services.retriever.place(*asked)
    return place_object(found, caller.tenant)
