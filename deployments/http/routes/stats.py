"""`GET /v1/stats`: live figures. No annotation is text: FastAPI reads them."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from ray import serve

from deployments.api.responses import JsonObject
from deployments.http.api import STATS_ANSWERS
from deployments.http.error_responses import AnsweringRoute
from deployments.http.middleware.bearer_auth import AnyCaller
from deployments.observability.cluster_stats import StatsReader

router = APIRouter(route_class=AnsweringRoute)


def stats_reader() -> StatsReader:
    """That of the replica that runs the route."""
    ingress: Any = serve.get_replica_context().servable_object
    reader: StatsReader = ingress.stats
    return reader


@router.get("/v1/stats", response_model=None, responses=STATS_ANSWERS)
async def stats(reader: Annotated[StatsReader, Depends(stats_reader)], caller: AnyCaller) -> JsonObject:
    """Return what the caller's tenant has had, the pool as it sees it, and to an admin what all workers do."""
    return await reader.read(caller.tenant, sees_all="admin" in caller.roles)
