"""The table from error class to HTTP status, and the error object of the OpenAI API."""

from __future__ import annotations

import logging
import math

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments import errors as api_errors
from deployments.api.base import UNSUPPORTED
from deployments.errors import RequestInvalid, Unsupported
from deployments.field_problems import describe_problem
from deployments.json_types import JsonMapping, JsonObject
from gpu_worker import errors as worker_errors
from lora_store import errors as store_errors
from retriever_svc import errors as retriever_errors

logger = logging.getLogger(__name__)

_INVALID, _FORBIDDEN, _LIMITED, _MISSING, _OVERLOADED, _LATE, _SERVER = (
    "invalid_request_error",
    "permission_error",
    "rate_limit_error",
    "not_found_error",
    "overloaded_error",
    "timeout_error",
    "server_error",
)
_POISON, _FAILED, _DAMAGED = "poison_request", "request_failed", "store_damaged"
_KINDS = ("str", "constrained-str", "int", "float", "bool")  # pydantic's names of union members in a path
_MAX_PARAM_CHARS = 300
_UNFORESEEN = "internal_error"
# (error class, HTTP status, type, code); the first match counts
TABLE: tuple[tuple[type[Exception], int, str, str], ...] = (
    (api_errors.RequestInvalid, 400, _INVALID, "invalid_request"),
    (api_errors.Unsupported, 400, _INVALID, "unsupported"),
    (api_errors.ResponseNotStored, 400, _INVALID, "previous_response_not_found"),
    (api_errors.KeyRefused, 401, _INVALID, "invalid_api_key"),
    (api_errors.KeysUnavailable, 503, _OVERLOADED, "keys_unavailable"),
    (api_errors.RoleMissing, 403, _FORBIDDEN, "role_missing"),
    (api_errors.SelfApproval, 403, _FORBIDDEN, "self_approval"),
    (api_errors.RateLimited, 429, _LIMITED, "rate_limit_exceeded"),
    (api_errors.ModelNotFound, 404, _MISSING, "model_not_found"),
    (store_errors.AdapterNotFound, 404, _MISSING, "model_not_found"),
    (api_errors.VersionNotKept, 404, _MISSING, "version_not_found"),
    (api_errors.VersionChanged, 409, _INVALID, "version_changed"),
    (api_errors.RequestNotKept, 404, _MISSING, "request_not_kept"),
    (api_errors.AdapterExists, 400, _INVALID, "adapter_exists"),
    (api_errors.HostRefused, 421, _INVALID, "host_not_allowed"),
    (api_errors.OriginRefused, 403, _FORBIDDEN, "origin_not_allowed"),
    (api_errors.PublishingDisabled, 403, _FORBIDDEN, "publishing_disabled"),
    (api_errors.SourceRefused, 403, _FORBIDDEN, "source_not_allowed"),
    (api_errors.SourceMissing, 404, _MISSING, "source_not_found"),
    (api_errors.SourceUnavailable, 503, _OVERLOADED, "source_unavailable"),
    (api_errors.BodyNotAllowed, 400, _INVALID, "body_not_allowed"),
    (api_errors.BodyTooLarge, 413, _INVALID, "body_too_large"),
    (api_errors.BodyTooSlow, 408, _INVALID, "body_too_slow"),
    (api_errors.BodyMemoryFull, 503, _OVERLOADED, "body_memory_full"),
    (api_errors.UploadMemoryFull, 503, _OVERLOADED, "upload_memory_full"),
    (api_errors.ServerOverloaded, 429, _OVERLOADED, "server_overloaded"),
    (api_errors.EncoderBusy, 503, _OVERLOADED, "encoder_busy"),
    (api_errors.NotReady, 503, _OVERLOADED, "not_ready"),
    (api_errors.WorkerStarting, 503, _OVERLOADED, "worker_starting"),
    (api_errors.PoisonRequest, 500, _SERVER, _POISON),
    (store_errors.PublicNameTaken, 409, _INVALID, "name_taken"),
    (store_errors.QuotaExceeded, 403, _FORBIDDEN, "quota_exceeded"),
    (store_errors.AdapterRefused, 400, _INVALID, "adapter_refused"),
    (store_errors.PlanInvalid, 400, _INVALID, "plan_invalid"),
    (store_errors.VersionConflict, 503, _OVERLOADED, "version_conflict"),
    (store_errors.StoreUnavailable, 503, _OVERLOADED, "store_unavailable"),
    (store_errors.StoreDamaged, 500, _SERVER, _DAMAGED),
    (store_errors.StoreIsNewer, 503, _OVERLOADED, "store_is_newer"),
    (store_errors.EncoderIncomplete, 503, _OVERLOADED, "encoder_incomplete"),
    (store_errors.BlobCorrupted, 500, _SERVER, "blob_corrupted"),
    (retriever_errors.EncoderUnusable, 400, _INVALID, "encoder_unusable"),
    (retriever_errors.ProjectionUnusable, 400, _INVALID, "projection_unusable"),
    (retriever_errors.RouteInvalid, 400, _INVALID, "invalid_request"),
    (retriever_errors.NoAdapterMatched, 422, _INVALID, "no_adapter_matched"),
    (retriever_errors.AdapterIncompatible, 400, _INVALID, "adapter_incompatible"),
    (retriever_errors.PlanGone, 409, _INVALID, "plan_gone"),
    (retriever_errors.StaleIndex, 503, _OVERLOADED, "stale_index"),
    (worker_errors.SamplingInvalid, 400, _INVALID, "invalid_request"),
    (worker_errors.PromptInvalid, 400, _INVALID, "invalid_prompt"),
    (worker_errors.PromptTooLong, 400, _INVALID, "context_length_exceeded"),
    (worker_errors.GrammarInvalid, 400, _INVALID, "grammar_invalid"),
    (worker_errors.GrammarFailed, 422, _INVALID, "grammar_failed"),
    (worker_errors.PlanTooLarge, 400, _INVALID, "plan_too_large"),
    (worker_errors.AdapterUnfit, 400, _INVALID, "adapter_incompatible"),
    (worker_errors.LogitsNotFinite, 422, _INVALID, "logits_not_finite"),
    (worker_errors.RequestFailed, 500, _SERVER, _FAILED),
    (worker_errors.AdapterLoadFailed, 503, _OVERLOADED, "adapter_load_failed"),
    (worker_errors.DeadlineExceeded, 504, _LATE, "deadline_exceeded"),
    (worker_errors.WaitedTooLong, 503, _OVERLOADED, "queue_timeout"),
    (worker_errors.EngineFull, 503, _OVERLOADED, "engine_full"),
    (worker_errors.EngineStopped, 503, _OVERLOADED, "engine_stopped"),
    (BackPressureError, 503, _OVERLOADED, "overloaded"),
    (DeploymentUnavailableError, 503, _OVERLOADED, "unavailable"),
    (RayActorError, 503, _OVERLOADED, "replica_died"),
    (ObjectLostError, 503, _OVERLOADED, "replica_died"),
    (TimeoutError, 503, _OVERLOADED, "timeout"),
)
# Answers of 5xx that say nothing about the state of the server except that it is busy.
_OF_LOAD = (
    api_errors.EncoderBusy,
    retriever_errors.StaleIndex,
    worker_errors.DeadlineExceeded,
    worker_errors.EngineFull,
    worker_errors.WaitedTooLong,
)
# Ray's own messages name actors, nodes and queues.
_SAID: dict[type[Exception], str] = {
    BackPressureError: "too many requests wait; try again later",
    DeploymentUnavailableError: "a part of the server is not available; try again later",
    TimeoutError: "a part of the server did not answer in time; try again later",
    RayActorError: "the replica that worked on this request has died; try again",
    ObjectLostError: "the answer was lost with its replica; try again",
}


def describe(error: Exception) -> tuple[int, JsonObject]:
    """Return (HTTP status, the API's error object). Other errors give a 500 without internal details."""
    cause = _cause_of(error)
    for kind, status, type_, code in TABLE:
        if isinstance(cause, kind):
            return status, error_object(_message_of(cause, kind), type_, code, param=getattr(cause, "param", None))
    logger.error("an unforeseen error", exc_info=error)
    return 500, error_object("the server failed to answer this request", _SERVER, _UNFORESEEN)


def _message_of(cause: Exception, kind: type[Exception]) -> str:
    """Return the message for the client. Texts that may quote buckets, endpoints or paths are logged instead."""
    safe: str | None = getattr(cause, "client_message", None)
    if safe is not None:
        logger.warning("answered with %r: %s", safe, cause)
        return safe
    return _SAID.get(kind) or str(cause)


def is_refusal(error: Exception) -> bool:
    """Return whether the error is an ordinary answer: of a wrong request, a full queue or an exceeded time."""
    status = next((status for kind, status, _, _ in TABLE if isinstance(error, kind)), 500)
    return status < 500 or isinstance(error, _OF_LOAD)


def code_of(error: Exception) -> str:
    """Return the code that `describe` gives."""
    cause = _cause_of(error)
    return next((code for kind, _, _, code in TABLE if isinstance(cause, kind)), _UNFORESEEN)


def error_object(message: str, type_: str, code: str, *, param: str | None = None) -> JsonObject:
    """Return the error object. Halves of surrogate pairs, which a message may quote, are escaped: JSON has none."""
    fields = {"message": message, "type": type_, "param": param, "code": code}
    return {"error": {name: text and text.encode(errors="backslashreplace").decode() for name, text in fields.items()}}


def http_error_object(status: int, detail: str) -> JsonObject:
    """Return the error object for a status from the framework."""
    return error_object(detail, _MISSING if status == 404 else _INVALID, "http_error")


def response_headers(error: Exception, status: int, code: str) -> dict[str, str]:
    """Return the headers that say whether and when a client should retry."""
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (409, 504):  # otherwise the openai client would retry twice without benefit
        headers["x-should-retry"] = "false"
    if status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(getattr(_cause_of(error), "retry_after_s", 1))))
    if code in (_POISON, _FAILED, _DAMAGED):
        headers["x-should-retry"] = "false"  # OpenAI's clients retry every other 500
    return headers


def _cause_of(error: Exception) -> Exception:
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error


def validation_error(error: RequestValidationError | ValidationError) -> RequestInvalid | Unsupported:
    """Return the first problem of a malformed request, by the path of its field; unsupported fields come first."""
    problems = error.errors()
    first = next((item for item in problems if item["type"] == UNSUPPORTED), problems[0])
    param = _path_of(first, skip=isinstance(error, RequestValidationError))
    if first["type"] == UNSUPPORTED:
        return Unsupported(param, first["ctx"]["what"])
    suffix = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    text = describe_problem(first) + suffix
    if tuple(first["loc"]) == ("body",) and first["type"] == "missing":
        text = "the request has no body: send a JSON object, such as {}, as application/json"
    elif tuple(first["loc"]) == ("body",) and isinstance(first.get("input"), bytes):
        text = "the body was not read as JSON: send it with the header Content-Type: application/json"
    return RequestInvalid(f"{param}: {text}" if param else text, param or None)


def _path_of(problem: JsonMapping, *, skip: bool) -> str:
    """Return the field as the client sent it: pydantic's path without its names of union members.

    `skip` the first part, in which FastAPI says whether the field was in the body, the query or the path.
    """
    if problem["type"] == "json_invalid":
        return ""  # its path is a position in the text
    path = list(problem["loc"][1:] if skip else problem["loc"])
    if path and problem["type"] != "extra_forbidden":
        path = [part for part in path if part not in _KINDS and "[" not in str(part)]
    below = problem.get("ctx", {}).get("param")
    return ".".join(str(part) for part in [*path, *([below] if below else [])])[:_MAX_PARAM_CHARS]
