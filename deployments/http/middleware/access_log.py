"""Sees every HTTP request from its arrival to the last byte of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http.middleware.request_id import request_id_in
from deployments.observability import request_record
from deployments.observability.request_metrics import RequestMetrics
from deployments.observability.request_record import RequestRecord

_NOT_MATCHED = "none"
_PROBES = ("/health", "/ready")  # asked every few seconds, by machines


class RequestRecorder:
    """ASGI middleware, outside of all that may refuse, within what gives the request its id."""

    def __init__(self, app: ASGIApp, figures: Callable[[], RequestMetrics]) -> None:
        self._app, self._figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) in _PROBES:
            await self._app(scope, receive, send)
            return
        record = RequestRecord(request_id_in(scope), _NOT_MATCHED, scope["method"])
        request_record.begin(record)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except asyncio.CancelledError:
            raise
        except Exception:
            record.status, record.code = 500, "internal_error"
            raise
        finally:
            record.route = getattr(scope.get("route"), "path", _NOT_MATCHED)
            self._figures().record_request(record)
