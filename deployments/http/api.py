"""Build the HTTP application: routes, middleware and error handling over the services of one replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from ray.exceptions import RayError
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from deployments.http.bodies import BodyLimit, max_body_bytes
from deployments.http.dependencies import Services
from deployments.http.error_responses import install_error_handlers
from deployments.http.middleware import Admission, RequestContextMiddleware
from deployments.http.openapi import Api
from deployments.http.routes import (
    adapters,
    completions,
    console,
    embeddings,
    maintenance,
    models,
    names,
    pool_map,
    status,
    vllm,
)
from deployments.observability.usage import UsageLog
from lora_store import StoreUnavailable

# Serve traces every call already: FastAPI's own spans would duplicate its spans.
_LAST_SEND_S = 5.0  # what is not sent stays on the machine, for the next replica there
_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
_EXPOSED = [
    *("x-request-id", "request-id", "retry-after", "x-should-retry", "x-ignored-fields", "x-ignored-headers"),
    *(f"x-ratelimit-{name}-{kind}" for name in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
    *("x-lora-strategy", "x-lora-adapters", "x-lora-generation", "x-lora-reason", "x-lora-why"),
    "x-lora-policy",
]
_ROUTES = (completions, embeddings, models, names, adapters, vllm, maintenance, pool_map, status, console)


def build_api(services: Services) -> Api:
    """Return the application over these services. An application belongs to one replica, as its services do."""
    app = Api(
        title="LoraRetriever",
        docs_url=None,
        redoc_url=None,
        telemetry=_TELEMETRY,
        middleware=list_middleware(services),
        lifespan=partial(finish_at_end, services),
    )
    app.state.services = services
    install_error_handlers(app)
    for routes in _ROUTES:
        app.include_router(routes.router)
    return app


@asynccontextmanager
async def finish_at_end(services: Services, app: FastAPI) -> AsyncIterator[None]:
    """Send usage to the pool while the replica runs, and apply outcomes when it stops. Serve calls this."""
    async with send_usage(services.usage_log, app):
        try:
            yield
        finally:
            await services.learning.finish(_LAST_SEND_S)


@asynccontextmanager
async def send_usage(usage_log: UsageLog, _: FastAPI) -> AsyncIterator[None]:
    """Send usage to the pool while the replica runs, and once more when it stops."""
    sending = asyncio.create_task(usage_log.keep_sending())
    try:
        yield
    finally:
        sending.cancel()
        with suppress(StoreUnavailable, TimeoutError, RayError, asyncio.CancelledError):
            async with asyncio.timeout(_LAST_SEND_S):
                await usage_log.send_all()


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Return the middleware that lets pages of these origins read answers. No cookie is ever needed."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    ]


def list_middleware(services: Services) -> list[Middleware]:
    """Return the middleware in the order in which a request passes it. No other place decides this order."""
    limit_of = partial(max_body_bytes, services.config.max_upload_bytes)
    return [
        Middleware(  # outermost: every answer has an id
            RequestContextMiddleware,
            authenticator=services.authenticator,
            metrics=services.metrics,
            usage_log=services.usage_log,
        ),
        *_cors(services.config.cors_origins),  # outside the others, so that a page can read refusals
        Middleware(
            Admission, config=services.config, authenticator=services.authenticator, in_flight=services.in_flight
        ),
        Middleware(BodyLimit, limit_of=limit_of, budget=services.bodies),
    ]
