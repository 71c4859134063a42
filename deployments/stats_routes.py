"""`GET /v1/stats`: live figures. No annotation is text: FastAPI reads them."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from ray import serve

from deployments import http_errors
from deployments.answers import JsonObject
from deployments.api_docs import STATS_ANSWERS
from deployments.auth import AnyCaller
from deployments.stats_reader import StatsReader

router = APIRouter(route_class=http_errors.AnsweringRoute)


def stats_reader() -> StatsReader:
    """That of the replica that runs the route."""
    ingress: Any = serve.get_replica_context().servable_object
    reader: StatsReader = ingress.stats
    return reader


@router.get("/v1/stats", response_model=None, responses=STATS_ANSWERS)
async def stats(reader: Annotated[StatsReader, Depends(stats_reader)], caller: AnyCaller) -> JsonObject:
    """Requests, bank, caches and tokens over all worker replicas, and the pool as this caller sees it."""
    return await reader.read(caller.tenant)
