"""The HTTP status of each kind of error, and the error object of the OpenAI API."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

import deployments.errors
import gpu_worker.errors
import lora_store.errors
import retriever_svc.errors
from deployments.api.base import UNSUPPORTED
from deployments.errors import (
    DeploymentBusy,
    DeploymentUnavailable,
    NoAnswerInTime,
    ReplicaDied,
    RequestInvalid,
    Unforeseen,
    Unsupported,
)
from deployments.field_problems import describe_problem
from deployments.json_types import JsonMapping, JsonObject
from lora_store.error_kinds import Kind, ReportedError

logger = logging.getLogger(__name__)

_MODULES = (deployments.errors, gpu_worker.errors, lora_store.errors, retriever_svc.errors)
# The HTTP status and the `type` of the error object.
STATUSES: dict[Kind, tuple[int, str]] = {
    Kind.INVALID: (400, "invalid_request_error"),
    Kind.UNAUTHENTICATED: (401, "invalid_request_error"),
    Kind.FORBIDDEN: (403, "permission_error"),
    Kind.MISSING: (404, "not_found_error"),
    Kind.TOO_SLOW: (408, "invalid_request_error"),
    Kind.CONFLICT: (409, "invalid_request_error"),
    Kind.TOO_LARGE: (413, "invalid_request_error"),
    Kind.WRONG_HOST: (421, "invalid_request_error"),
    Kind.UNANSWERABLE: (422, "invalid_request_error"),
    Kind.LIMITED: (429, "rate_limit_error"),
    Kind.FULL: (429, "overloaded_error"),
    Kind.BROKEN: (500, "server_error"),
    Kind.UNFORESEEN: (500, "server_error"),
    Kind.BUSY: (503, "overloaded_error"),
    Kind.UNAVAILABLE: (503, "overloaded_error"),
    Kind.LATE: (504, "timeout_error"),
}
RETRIED = (429, 503)  # with `Retry-After`
# OpenAI's clients would repeat these twice without benefit.
_FINAL = (Kind.CONFLICT, Kind.BROKEN, Kind.LATE)
# Answers that say that something is wrong with the server, and not only that it is busy.
_FAILURES = (Kind.BROKEN, Kind.UNFORESEEN, Kind.UNAVAILABLE)
# Ray's own messages name actors, nodes and queues.
_OURS: dict[type[Exception], type[ReportedError]] = {
    BackPressureError: DeploymentBusy,
    DeploymentUnavailableError: DeploymentUnavailable,
    TimeoutError: NoAnswerInTime,
    RayActorError: ReplicaDied,
    ObjectLostError: ReplicaDied,
}
HTTP_ERROR = "http_error"  # the code of the framework's own errors: an unknown path, a wrong method, a bad form
_UNION_MEMBERS = ("str", "constrained-str", "int", "float", "bool")  # pydantic's names of them in a path
_MAX_PARAM_CHARS = 300


def reported_errors() -> Iterator[type[ReportedError]]:
    """Yield every class of an error that can reach a client."""
    for module in _MODULES:
        for found in vars(module).values():
            is_ours = isinstance(found, type) and found.__module__ == module.__name__
            if is_ours and issubclass(found, ReportedError) and found.kind is not None:
                yield found


def as_reported(error: Exception) -> ReportedError:
    """Return the error as one of this project: the cause that a replica raised, Ray's own, or an unforeseen one."""
    cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
    if isinstance(cause, ReportedError) and cause.kind is not None:
        return cause
    return next((ours() for rays, ours in _OURS.items() if isinstance(cause, rays)), Unforeseen())


def describe(error: Exception) -> tuple[int, JsonObject]:
    """Return (HTTP status, the API's error object). Texts that may quote buckets, endpoints or paths are logged."""
    reported = as_reported(error)
    assert reported.kind is not None
    status, type_ = STATUSES[reported.kind]
    if isinstance(reported, Unforeseen):
        logger.error("an unforeseen error", exc_info=error)
    elif reported.client_message != str(reported):
        logger.warning("answered with %r: %s", reported.client_message, reported)
    return status, error_object(reported.client_message, type_, reported.code, param=reported.param)


def is_refusal(error: Exception) -> bool:
    """Return whether the error is an ordinary answer: of a wrong request, a full queue or an exceeded time."""
    return isinstance(error, ReportedError) and error.kind is not None and error.kind not in _FAILURES


def error_object(message: str, type_: str, code: str, *, param: str | None = None) -> JsonObject:
    """Return the error object. Halves of surrogate pairs, which a message may quote, are escaped: JSON has none."""
    fields = {"message": message, "type": type_, "param": param, "code": code}
    return {"error": {name: text and text.encode(errors="backslashreplace").decode() for name, text in fields.items()}}


def http_error_object(status: int, detail: str) -> JsonObject:
    """Return the error object for a status from the framework."""
    _, type_ = STATUSES[Kind.MISSING if status == 404 else Kind.INVALID]
    return error_object(detail, type_, HTTP_ERROR)


def response_headers(error: Exception) -> dict[str, str]:
    """Return the headers that say whether and when a client should retry."""
    reported = as_reported(error)
    assert reported.kind is not None
    status, _ = STATUSES[reported.kind]
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in RETRIED:
        headers["Retry-After"] = str(max(1, math.ceil(reported.retry_after_s)))
    if reported.kind in _FINAL:
        headers["x-should-retry"] = "false"
    return headers


def validation_error(error: RequestValidationError | ValidationError) -> RequestInvalid | Unsupported:
    """Return the first problem of a malformed request, by the path of its field; unsupported fields come first."""
    problems = error.errors()
    first = next((item for item in problems if item["type"] == UNSUPPORTED), problems[0])
    param = _find_path(first, skip=isinstance(error, RequestValidationError))
    if first["type"] == UNSUPPORTED:
        return Unsupported(param, first["ctx"]["what"])
    suffix = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    text = describe_problem(first) + suffix
    if tuple(first["loc"]) == ("body",) and first["type"] == "missing":
        text = "the request has no body: send a JSON object, such as {}, as application/json"
    elif tuple(first["loc"]) == ("body",) and isinstance(first.get("input"), bytes):
        text = "the body was not read as JSON: send it with the header Content-Type: application/json"
    return RequestInvalid(f"{param}: {text}" if param else text, param or None)


def _find_path(problem: JsonMapping, *, skip: bool) -> str:
    """Return the field as the client sent it: pydantic's path without its names of union members.

    `skip` the first part, in which FastAPI says whether the field was in the body, the query or the path.
    """
    path = list(problem["loc"][1:] if skip else problem["loc"])
    if path and problem["type"] != "extra_forbidden":
        path = [part for part in path if part not in _UNION_MEMBERS and "[" not in str(part)]
    below = problem.get("ctx", {}).get("param")
    return ".".join(str(part) for part in [*path, *([below] if below else [])])[:_MAX_PARAM_CHARS]
