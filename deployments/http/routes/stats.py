"""`GET /v1/stats`: live metrics of the whole application in one object."""

from __future__ import annotations

from fastapi import APIRouter

from deployments.api.pool_responses import Stats
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import AnyCaller, AnyServices
from deployments.http.openapi import STATS_ANSWERS

router = APIRouter(route_class=AnsweringRoute)


@router.get("/v1/stats", response_model=None, responses=STATS_ANSWERS)
async def stats(services: AnyServices, caller: AnyCaller) -> Stats:
    """Return the usage of the caller's tenant, the pool as it sees it, and, for an admin, the load of all workers."""
    return await services.stats.read(caller.tenant, sees_all="admin" in caller.roles)
