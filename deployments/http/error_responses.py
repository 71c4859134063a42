"""Answer every error of every route in the shape of the OpenAI API."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.api.error_table import describe, http_error_object, response_headers, validation_error
from deployments.http.json_body import BoundedRequest
from deployments.http.middleware.request_context import context_of


class ErrorResponse(JSONResponse):
    """An error object as a response. Its code goes into the request's context when it is sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context_of(scope).code = self.code
        await super().__call__(scope, receive, send)

    def __init__(self, body: dict[str, Any], status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(body, status, headers)
        self.code: str = body["error"]["code"]


def error_response(error: Exception) -> ErrorResponse:
    """Return the response to a request that failed with `error`."""
    status, body = describe(error)
    return ErrorResponse(body, status, response_headers(error, status, body["error"]["code"]))


class AnsweringRoute(APIRoute):
    """A route that turns its errors into responses.

    Errors that leave the route would be raised again by Starlette and logged by Serve as crashes, and Serve 2.60
    answers its own BackPressureError and DeploymentUnavailableError in plain text.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answering(request: Request) -> Response:
            bounded = BoundedRequest(request.scope, request.receive)
            try:
                return await handle(bounded)
            except (RequestValidationError, HTTPException):
                if bounded.refusal is not None:
                    return error_response(bounded.refusal)
                raise
            except Exception as exc:
                return error_response(exc)

        return answering


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer the framework's own errors in the same shape."""

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> ErrorResponse:
        return error_response(validation_error(error))

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> ErrorResponse:
        body = http_error_object(error.status_code, str(error.detail))
        return ErrorResponse(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def on_any(_: Request, error: Exception) -> ErrorResponse:
        return error_response(error)
