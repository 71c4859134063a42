"""Every error of every route as an answer in the API's own shape."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from deployments.api.error_table import describe, http_error_object, response_headers, validation_error
from deployments.http.json_body import BoundedRequest
from deployments.observability.request_record import note_refusal


def error_response(error: Exception) -> JSONResponse:
    status, body = describe(error)
    note_refusal(body["error"]["code"])
    return JSONResponse(body, status, headers=response_headers(error, status, body["error"]["code"]))


class AnsweringRoute(APIRoute):
    """A route whose errors are answers. Further out, Starlette would raise them again and Serve log each as a crash,
    and Serve 2.60 answers its own BackPressureError and DeploymentUnavailableError in plain text."""

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


def install(app: FastAPI) -> None:
    """Every error of every route leaves in the API's own shape."""
    app.router.route_class = AnsweringRoute

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(validation_error(error))

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> JSONResponse:
        body = http_error_object(error.status_code, str(error.detail))
        note_refusal("http_error")
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def on_any(_: Request, error: Exception) -> JSONResponse:
        return error_response(error)
