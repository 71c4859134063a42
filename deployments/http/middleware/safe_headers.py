"""Add headers that forbid browsers and caches to misuse answers."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_NOT_KEPT = ("application/json", "application/x-ndjson", "text/event-stream", "text/plain")


class SafeHeaders:
    """ASGI middleware: forbid browsers to guess the type of an answer, and caches to store answers of the API.

    Answers contain texts of prompts and data that only one key may see: neither a shared cache nor a browser may store
    them. Files of the console set their own cache headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                if headers.get("content-type", "").startswith(_NOT_KEPT):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        await self._app(scope, receive, answer if scope["type"] == "http" else send)
