"""`/v1/outcomes`: how well the adapters answered."""

from __future__ import annotations

from fastapi import APIRouter

from deployments.api.adapters import OutcomeRequest
from deployments.api.pool_responses import Outcome
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import AnyServices, InferCaller
from deployments.http.openapi import OUTCOME_ANSWERS

router = APIRouter(route_class=AnsweringRoute)


@router.post("/v1/outcomes", status_code=201, response_model=None, responses=OUTCOME_ANSWERS)
async def record_outcome(body: OutcomeRequest, caller: InferCaller, services: AnyServices) -> Outcome:
    """Record how well an adapter, or the base model, answered a request to `auto` of the caller's tenant."""
    await services.learning.judge(caller.tenant, (body.request_id, body.adapter, body.score), caller.key_id)
    applies = services.config.learning == "apply"
    return {"request_id": body.request_id, "adapter": body.adapter, "score": body.score, "applies": applies}
