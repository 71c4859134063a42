"""`/health`, `/ready` and `/v1/stats`: whether the server runs, whether it is ready, and its numbers."""

from __future__ import annotations

from fastapi import APIRouter

from deployments.api.pool_responses import Health, Ready, Stats
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import AnyCaller, AnyServices
from deployments.http.openapi import HEALTH_ANSWERS, READY_ANSWERS, STATS_ANSWERS

router = APIRouter(route_class=AnsweringRoute)


@router.get("/health", response_model=None, responses=HEALTH_ANSWERS)
async def health() -> Health:
    """Answer that this Ingress runs."""
    return {"status": "ok"}


@router.get("/ready", response_model=None, responses=READY_ANSWERS)
async def ready(services: AnyServices) -> Ready:
    """Answer 200 once Retriever and Worker answer and the preload is published, 503 before.

    Workers that are scaled to zero count as answering. The route waits some seconds for them. On a server with keys
    the answer is only the status.
    """
    return await services.readiness.public()


@router.get("/v1/stats", response_model=None, responses=STATS_ANSWERS)
async def stats(services: AnyServices, caller: AnyCaller) -> Stats:
    """Return the usage of the caller's tenant, the pool as it sees it, and, for an admin, the load of all workers."""
    return await services.stats.read(caller.tenant, sees_all="admin" in caller.roles)
