"""Answer every error in the shape of the OpenAI API, and below `/v1/messages` in that of Anthropic's."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from deployments.api.anthropic_answer import anthropic_error
from deployments.api.error_table import describe, http_error_object, response_headers, validation_error
from deployments.http.scope import find_context, find_path
from deployments.json_types import JsonObject
from deployments.observability.request_context import RequestContext

_MAX_SHOWN_CHARS = 100
_INSTEAD = {
    "/responses": "use /v1/responses",
    "/chat/completions": "use /v1/chat/completions",
    "/completions": "use /v1/completions",
    "/models": "use /v1/models",
    "/api/chat": "use /v1/chat/completions",
    "/api/generate": "use /v1/completions",
    "/api/tags": "use /v1/models",
    "/api/embed": "use /v1/embeddings",
}


class ErrorResponse(JSONResponse):
    """An error object as a response. Its code goes into the request's context when it is sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = find_context(scope)
        context.code = self.code
        if find_path(scope).startswith("/v1/messages"):  # also what the middleware refuses
            body = anthropic_error(self.status_code, self._error, context.request_id)
            await JSONResponse(body, self.status_code, self._sent)(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def __init__(self, body: JsonObject, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(body, status, headers)
        self._error, self._sent = body["error"], headers
        self.code: str = self._error["code"]


def error_response(error: Exception) -> ErrorResponse:
    """Return the response to a request that failed with `error`."""
    status, body = describe(error)
    return ErrorResponse(body, status, response_headers(error))


def no_route(path: str) -> str:
    """Return the message for a path that this server does not serve, with what to use instead where that exists."""
    if path.startswith("/v1/v1/"):
        remedy = "give the base URL with a single /v1"
    elif path.startswith("/v1/responses/"):
        remedy = "responses are not stored: keep those that you need"
    else:
        remedy = _INSTEAD.get(path, "/openapi.json lists the routes")
    return f"this server has no {path[:_MAX_SHOWN_CHARS]}; {remedy}"


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer the framework's own errors in the same shape."""

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> ErrorResponse:
        return error_response(validation_error(error))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> ErrorResponse:
        detail = no_route(find_path(request.scope)) if error.status_code == 404 else str(error.detail)
        body = http_error_object(error.status_code, detail)
        return ErrorResponse(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def on_any(_: Request, error: Exception) -> ErrorResponse:
        return error_response(error)


def error_body(error: Exception, context: RequestContext) -> JsonObject:
    _, body = describe(error)
    context.code = body["error"]["code"]
    return body
