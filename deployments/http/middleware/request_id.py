"""An id for every request, in the header `x-request-id` of its answer, whatever the answer is.

Serve's proxy (2.60) keeps the id a client sends in that header, or makes one, hands it on in the request's headers and
adds it to the answer. Added here once more, it would come twice.
"""

from __future__ import annotations

import re
import uuid

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_KEY = "request_id"
_HEADER = "x-request-id"
_FIT = re.compile(r"[A-Za-z0-9._-]{1,64}")  # to be part of an answer's id, and of a line of the log


class RequestIds:
    """ASGI middleware: the outermost one, so that refusals of the others carry an id too.

    Serve's proxy gives every request an id, the client's own where it sent one, which its handles and logs carry along
    and which it puts into the answer itself. That one is taken as long as it is short and plain.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(_HEADER)
        request_id = given if given is not None and _FIT.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})[_KEY] = request_id

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send if given is not None else answer)


def request_id_in(scope: Scope) -> str:
    request_id: str = scope["state"][_KEY]
    return request_id


def request_id_of(http: Request) -> str:
    return request_id_in(http.scope)
