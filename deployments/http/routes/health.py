"""`/health` and `/ready`, for probes. They need no key."""

from __future__ import annotations

from fastapi import APIRouter

from deployments.api.pool_responses import Health, Ready
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import AnyServices
from deployments.http.openapi import HEALTH_ANSWERS, READY_ANSWERS

router = APIRouter(route_class=AnsweringRoute)


@router.get("/health", response_model=None, responses=HEALTH_ANSWERS)
async def health() -> Health:
    """Answer that this Ingress runs."""
    return {"status": "ok"}


@router.get("/ready", response_model=None, responses=READY_ANSWERS)
async def ready(services: AnyServices) -> Ready:
    """Answer 200 once Retriever and Worker answer and the preload is published, 503 before.

    Workers that are scaled to zero count as answering. The route waits some seconds for them. On a server with keys
    the answer is the status alone.
    """
    return await services.readiness.public()
