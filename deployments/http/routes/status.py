"""`/health`, `/ready`, `/v1/stats`, `/v1/usage`: whether the server runs and is ready, its numbers, and who used it."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import Field

from deployments.api.base import ApiRequest
from deployments.api.pool_responses import Health, Ready, Stats, usage_report
from deployments.errors import RequestInvalid, RoleMissing
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import AnyCaller, AnyServices
from deployments.http.openapi import HEALTH_ANSWERS, READY_ANSWERS, STATS_ANSWERS, USAGE_ANSWERS
from lora_store.usage import DIMENSIONS, MAX_ROWS, Dimension, UsageQuery

router = APIRouter(route_class=AnsweringRoute)
_FIRST_DAY = date(2000, 1, 1)
_DAYS = 30  # that the report covers unless the query says otherwise


class UsageQueryFields(ApiRequest):
    """The query of `/v1/usage`. Days are of UTC."""

    by: list[Dimension] = Field(default=[], max_length=len(DIMENSIONS), description="what each row is for; repeatable")
    start: date | None = Field(
        default=None, ge=_FIRST_DAY, description="the first day, as 2026-11-01; default: 30 days with `end`"
    )
    end: date | None = Field(default=None, ge=_FIRST_DAY, description="the last day; default: today")
    tenant: str | None = Field(default=None, max_length=64, description="only this tenant; another one needs an admin")
    adapter: str | None = Field(
        default=None, max_length=129, description="only requests that this adapter answered, as tenant/name"
    )


@router.head("/health", include_in_schema=False)  # monitors of uptime send HEAD
@router.get("/health", response_model=None, responses=HEALTH_ANSWERS)
async def health() -> Health:
    """Answer that this Ingress runs."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
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


@router.get("/v1/usage", response_model=None, responses=USAGE_ANSWERS)
async def usage(query: Annotated[UsageQueryFields, Query()], services: AnyServices, caller: AnyCaller) -> JSONResponse:
    """Return sums of requests and tokens, and durations, by day, tenant, key, adapter, version or base model.

    Without the role `admin` only those of the own tenant. Requests that other Ingress replicas answered in the last ten
    seconds may be missing.
    """
    end = query.end or datetime.now(UTC).date()
    start = query.start or end - timedelta(days=_DAYS - 1)
    if start > end:
        raise RequestInvalid(f"start: {start} is after end, {end}; give an earlier day", "start")
    tenant = query.tenant if "admin" in caller.roles else caller.tenant
    if query.tenant not in (None, tenant):
        raise RoleMissing(caller.key_id, "admin")
    wanted = UsageQuery(start, end, tuple(dict.fromkeys(query.by)), tenant, query.adapter)
    async with services.usage_log.report_turn(caller.tenant):
        await services.usage_log.send_all()
        rows = await services.store.usage(wanted)
    if len(rows) > MAX_ROWS:
        raise RequestInvalid(
            f"by: the report has more than {MAX_ROWS} rows; ask for fewer days, or group by less", "by"
        )
    return JSONResponse(usage_report(wanted, rows, services.config.usage_days))
