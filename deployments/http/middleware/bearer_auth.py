"""Authenticate requests by bearer keys before anything else of them is read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.auth.authenticator import Authenticator
from deployments.http.error_responses import error_response
from deployments.http.middleware.request_context import context_of, path_of

_GUARDED = "/v1/"  # the other routes show nothing of the pool: health, the description of the API, the console's page


class BearerAuth:
    """ASGI middleware: answer 401 to any request below /v1 without a valid key, before its body is read.

    The caller goes into the request's context. A route that a request reaches in another way finds no caller there
    and answers 401 itself.
    """

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app, self._authenticator = app, authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and path_of(scope).startswith(_GUARDED):
            try:
                caller = self._authenticator.authenticate(Headers(scope=scope).get("authorization"))
            except Exception as exc:
                await error_response(exc)(scope, receive, send)
                return
            context_of(scope).caller = caller
        await self._app(scope, receive, send)
