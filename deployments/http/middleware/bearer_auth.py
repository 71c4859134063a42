"""Bearer keys become callers before anything else of a request is read. No annotation is text: FastAPI reads them."""

from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from ray import serve
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.auth.authenticator import Authenticator
from deployments.auth.caller import Caller
from deployments.errors import KeyRefused
from deployments.http.error_responses import error_response
from deployments.http.streaming import path_of

_GUARDED = "/v1/"  # the others tell nothing of the pool: health, the description of the API, the console's page
_SCHEME = HTTPBearer(auto_error=False, description="a key of the server's keys file; none where the server has none")


class BearerAuth:
    """ASGI middleware: a request below /v1 without a valid key is answered 401, whatever its path, before its body.

    A route that is reached past it by any means has no caller, and answers 401 itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and path_of(scope).startswith(_GUARDED):
            try:
                caller = _door().authenticate(Headers(scope=scope).get("authorization"))
            except Exception as exc:
                await error_response(exc)(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


def caller_of(http: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_SCHEME)] = None) -> Caller:
    """Raises: KeyRefused."""
    caller: Any = getattr(http.state, "caller", None)
    if not isinstance(caller, Caller):
        raise KeyRefused("this server takes a key, as `Authorization: Bearer KEY`")
    return caller


AnyCaller = Annotated[Caller, Depends(caller_of)]


def asking(caller: AnyCaller) -> Caller:
    """Raises: KeyRefused, RoleMissing."""
    caller.require("infer")
    return caller


def publishing(caller: AnyCaller) -> Caller:
    """Raises: KeyRefused, RoleMissing."""
    caller.require("publish")
    return caller


def administering(caller: AnyCaller) -> Caller:
    """Raises: KeyRefused, RoleMissing."""
    caller.require("admin")
    return caller


Asking = Annotated[Caller, Depends(asking)]
Publishing = Annotated[Caller, Depends(publishing)]
Administering = Annotated[Caller, Depends(administering)]


def _door() -> Authenticator:
    """The door of the replica that answers: Serve knows it, middleware does not."""
    ingress: Any = serve.get_replica_context().servable_object
    door: Authenticator = ingress.door
    return door
