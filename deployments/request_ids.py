"""An id for every request, in the header `x-request-id` of its answer, whatever the answer is."""

from __future__ import annotations

import uuid

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_KEY = "request_id"


class RequestIds:
    """ASGI middleware: the outermost one, so that refusals of the others carry an id too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})[_KEY] = request_id

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, answer)


def request_id_of(http: Request) -> str:
    request_id: str = http.scope["state"][_KEY]
    return request_id
